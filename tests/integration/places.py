"""Places where something is wrong: namespaces of their own, made by a few shell commands, gone with the process."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_WITHIN_S = 60.0
_UNSHARE = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")

# What the commands of places may call. `net` makes an interface with an address; whatever is sent to its network by an
# address that `nobody` names gets no answer at all.
_SHELL = r"""
set -euo pipefail
ip link set lo up
net() { ip link add "$1" type veth peer name "$1-peer"; ip address add "$2" dev "$1" $([[ $2 != *:* ]] || echo nodad)
        ip link set "$1" up; ip link set "$1-peer" up; }
nobody() { ip neighbour replace "$2" lladdr 02:00:00:00:00:99 dev "$1" nud permanent; }
named() { printf '%s\n' "$@" > "$PLACE/hosts"; mount --bind "$PLACE/hosts" /etc/hosts; }
asks() { printf '%s\n' "$@" > "$PLACE/resolv.conf"; mount --bind "$PLACE/resolv.conf" /etc/resolv.conf; }
listens() { until (: > "/dev/tcp/${1%:*}/${1##*:}") 2> /dev/null; do sleep 0.05; done; }
registered() { until epmesh status "$1" 2> /dev/null | grep -q "epoch [1-9]"; do sleep 0.05; done; }
epmesh() { python -m epmesh_server.cli "$@"; }
coordinator() { python -m epmesh_server.cli coordinator --data-dir "$PLACE/state" "$@" & }
stranger() { python -m http.server "$1" --bind 127.0.0.1 > "$PLACE/stranger" 2>&1 & listens "127.0.0.1:$1"; }
named '127.0.0.1 localhost'
asks ''
"""


@dataclass(frozen=True)
class Place:
    """A place with something wrong, and what the doctor should say of it.

    Attributes:
        causes: findings of the doctor that are no ok, in any order.
        seen: what the texts of findings contain.
        setup: shell commands that make the place.
        arguments: of `epmesh doctor`.
        wrapper: a command that runs it, such as `taskset`.
        may: further causes that depend on the machine.
    """

    name: str
    causes: tuple[str, ...]
    setup: str = ""
    arguments: str = ""
    seen: tuple[str, ...] = ()
    wrapper: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    may: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What `epmesh doctor --json` said, its exit code, and how long it took."""

    document: dict[str, Any]
    code: int
    took_s: float

    def causes(self, *severities: str) -> set[str]:
        """Causes of findings of these severities."""
        return {finding["cause"] for finding in self.document["findings"] if finding["severity"] in severities}

    @property
    def text(self) -> str:
        """All that was seen."""
        return "\n".join(finding["seen"] for finding in self.document["findings"])


@functools.cache
def why_no_places() -> str:
    """Why this machine can make no namespaces; empty where it can."""
    if os.geteuid() != 0:
        return "needs root, to make network and mount namespaces"
    tried = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True, check=False, timeout=_WITHIN_S)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def run_there(
    command: str, setup: str = "", environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a shell command in a new place, with an empty directory; processes and directory end with it."""
    kept = {name: value for name, value in os.environ.items() if name in ("LANG", "PYTHONPATH", "VIRTUAL_ENV")}
    with tempfile.TemporaryDirectory(prefix="place-") as directory:  # pytest's would be too long for unix sockets
        return subprocess.run(
            [*_UNSHARE, "bash", "-c", f"{_SHELL}\n{setup}\n{command}"],
            capture_output=True,
            text=True,
            check=False,
            timeout=_WITHIN_S,
            cwd=ROOT,
            env={
                **kept,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PLACE": directory,
                "TMPDIR": directory,
                "XDG_STATE_HOME": f"{directory}/state",
                **(environment or {}),
            },
        )


def examine(place: Place) -> Report:
    """What the doctor says in a place."""
    command = f"{place.wrapper} python -m epmesh_server.cli doctor --json {place.arguments}"
    timed = f"began=${{EPOCHREALTIME}}; code=0; {command} || code=$?; echo $began $EPOCHREALTIME; exit $code"
    ended = run_there(timed, place.setup, place.environment)
    assert ended.stdout.startswith("{"), ended.stdout + ended.stderr
    document, end = json.JSONDecoder().raw_decode(ended.stdout)
    began_s, ended_s = map(float, ended.stdout[end:].split())
    return Report(document, ended.returncode, ended_s - began_s)
