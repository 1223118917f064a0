"""docker/systemd: the services take what the units set."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from epmesh_server.access import Identity, Role
from epmesh_server.certificates import Authority
from epmesh_server.cli import serving
from epmesh_server.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "deploy.md").read_text()


def test_a_coordinator_takes_what_its_unit_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(serving, "coordinate", lambda *call: calls.append(call))
    unit = run("epmesh-coordinator", tmp_path, Identity(Role.COORDINATOR))
    ((options, _),) = calls
    assert (options.host, options.insecure) == ("0.0.0.0", False)
    assert options.data_dir.is_relative_to(Path("/var/lib", unit["StateDirectory"][0]))


def test_a_node_takes_what_its_unit_and_the_pages_file_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(serving, "serve", lambda *call: calls.append(call))
    (file,) = re.findall(r"^```\n(EPMESH_NODE_ID=.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    unit = run("epmesh-node", tmp_path, Identity(Role.NODE, "host-a"), **dict(re.findall(r"(\w+)=(.*)", file)))
    ((settings, beside, hosted),) = calls
    assert (settings.node_id, settings.host, settings.advertise, beside) == ("host-a", "0.0.0.0", None, None)
    assert settings.runtime_dir.is_relative_to(Path("/run", unit["RuntimeDirectory"][0]))
    assert float(unit["TimeoutStopSec"][0]) > hosted.drain_s
    assert hosted.count == 8


def test_the_pages_doctor_gets_the_settings_of_the_unit() -> None:
    unit = (ROOT / "docker" / "systemd" / "epmesh-node.service").read_text()
    as_user = r"^runuser -u epmesh -- env (.*?) /opt/epmesh/bin/epmesh doctor$"
    (command,) = re.findall(as_user, PAGE, re.MULTILINE | re.DOTALL)
    given = command.replace("\\\n", " ").split()
    assert sorted(word for word in given if word.startswith("EPMESH_")) == sorted(
        re.findall(r"^Environment=(.*)$", unit, re.MULTILINE)
    )
    assert "".join(re.findall(r"\$\(cat (\S+)\)", command)) in unit


def run(name: str, directory: Path, identity: Identity, **more: str) -> dict[str, list[str]]:
    """Runs what a unit starts, with its environment and certificates made for it; returns the unit's settings."""
    text = (ROOT / "docker" / "systemd" / f"{name}.service").read_text()
    unit: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
        unit.setdefault(key, []).append(value)
    given = dict(one.split("=", 1) for one in unit["Environment"]) | more
    assert given["EPMESH_TLS_DIR"] in PAGE
    place = directory / "tls"
    Authority.make(directory / "authority").issue(place, [identity])
    program, *arguments = shlex.split(unit["ExecStart"][0])
    assert program == "/opt/epmesh/bin/epmesh"
    given |= {"EPMESH_TLS_DIR": str(place), "EPMESH_LOG_LEVEL": "error"}
    done = CliRunner().invoke(app, arguments, env=given, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return unit
