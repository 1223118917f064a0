"""The mesh of docker/compose.yaml as a test drives it: by docker-compose, docker, and HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")
COMPOSE_FILE = Path(__file__).parents[2] / "docker" / "compose.yaml"
ETCD_FILE = COMPOSE_FILE.with_name("etcd.env")
PROMPT, NUM_TOKENS = "And it came to pass", 24
MESH = ("coordinator", "node-0", "node-1", "router")
_EVERYTHING = ("--profile", "more", "--profile", "tools", "--profile", "etcd")
_COMMAND_S, _REQUEST_S, _READY_S = 180.0, 40.0, 180.0


def run(*command: str, environment: dict[str, str] | None = None, within_s: float = _COMMAND_S) -> str:
    """Runs a command; returns what it printed.

    Raises:
        AssertionError: it failed; with all its output.
    """
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def wait_until(holds: Callable[[], T], what: str, within_s: float = _READY_S) -> T:
    """Asks again and again until it holds; returns the answer."""
    deadline = time.monotonic() + within_s
    while not (answer := holds()):
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        time.sleep(0.2)
    return answer


@dataclass
class Stack:
    """One project of docker-compose. A context manager: everything it made is gone in the end.

    Attributes:
        options: of docker-compose, before those of this class.
    """

    project: str
    environment: dict[str, str]
    options: tuple[str, ...] = ()

    def compose(self, *arguments: str) -> str:
        """Runs docker-compose on this project."""
        project = ("--project-name", self.project, "--file", str(COMPOSE_FILE))
        command = ("docker-compose", *self.options, *project, *arguments)
        return run(*command, environment=self.environment)

    def docker(self, *arguments: str) -> str:
        """Runs docker."""
        return run("docker", *arguments, environment=self.environment)

    def container(self, service: str) -> str:
        """The id of a service's container, running or not."""
        wanted = f"label=com.docker.compose.service={service}"
        project = f"label=com.docker.compose.project={self.project}"
        found = self.docker("ps", "--all", "--quiet", "--no-trunc", "--filter", project, "--filter", wanted).split()
        assert len(found) == 1, f"{service} has containers {found}"
        return found[0]

    def address(self, service: str) -> str:
        """The IP address of a service's container on the mesh's network; empty while it has none."""
        shown = json.loads(self.docker("inspect", self.container(service)))[0]
        address: str = shown["NetworkSettings"]["Networks"].get(self.network, {}).get("IPAddress", "")
        return address

    @property
    def network(self) -> str:
        """The name of the mesh's network."""
        return f"{self.project}_mesh"

    def image(self, name: str) -> str:
        """The image of nodes or of the router service."""
        return f"epmesh-{name}:{self.environment.get('EPMESH_TAG', 'latest')}"

    def doctor(self, *command: str) -> dict[str, str]:
        """What the doctor has to say of a container, asked by a command of docker: by cause, what mends it.

        Raises:
            AssertionError: its exit code does not fit to what it found.
        """
        done = subprocess.run(
            ("docker", *command), env=self.environment, capture_output=True, text=True, timeout=_COMMAND_S, check=False
        )
        assert done.returncode in (0, 1), f"exit {done.returncode}\n{done.stdout}{done.stderr}"
        found = [finding for finding in json.loads(done.stdout)["findings"] if finding["severity"] != "ok"]
        assert done.returncode == any(finding["severity"] == "error" for finding in found)
        return {finding["cause"]: finding["mend"] for finding in found}

    def view(self, service: str = "node-0") -> dict[str, Any]:
        """The view that a node knows; an empty one while it does not answer."""
        command = ("exec", self.container(service), "epmesh", "status", "--json", "127.0.0.1:7400")
        done = subprocess.run(
            ("docker", *command), env=self.environment, capture_output=True, text=True, timeout=_COMMAND_S, check=False
        )
        view: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {"nodes": [], "epoch": 0}
        return view

    def ranks(self, service: str = "node-0") -> dict[str, int]:
        """By node id, how many ranks of it answer routers, as a node sees it."""
        return {
            node["node_id"]: sum(bool(rank["front_endpoint"]) for rank in node["ranks"])
            for node in self.view(service)["nodes"]
        }

    def wait_ranks(self, expected: dict[str, int], service: str = "node-0") -> None:
        """Until the view that a node knows has just these."""
        wait_until(lambda: self.ranks(service) == expected, f"{expected} at {service}, and not {self.ranks(service)}")

    def url(self) -> str:
        """Where the router service answers."""
        return f"http://{self.compose('port', 'router', '8080').strip()}"

    def logs(self) -> str:
        """The containers and what they wrote last, for whoever looks for a failure's cause; or why there is nothing."""
        shown = [("ps", "--all"), ("logs", "--no-color", "--timestamps", "--tail", "150")]
        try:
            return "".join(self.compose(*_EVERYTHING, *command) for command in shown)
        except (AssertionError, subprocess.TimeoutExpired) as exc:
            return f"no logs: {exc}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            sys.stdout.write(self.logs())
        self.compose(*_EVERYTHING, "down", "--volumes", "--remove-orphans", "--timeout", "5")


def generate(url: str) -> str:
    """The router service's text for the prompt.

    Raises:
        OSError: it answered with an error, or not at all.
    """
    body = json.dumps({"prompt": PROMPT, "max_tokens": NUM_TOKENS}).encode()
    request = urllib.request.Request(f"{url}/v1/generate", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_REQUEST_S) as answer:
            text: str = json.load(answer)["text"]
            return text
    except urllib.error.HTTPError as exc:
        raise OSError(f"{exc.code}: {exc.read(2000).decode(errors='replace')}") from exc


def ready(url: str) -> bool:
    """Whether the router service says that it is ready."""
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=5):
            return True
    except OSError:
        return False


@dataclass
class Traffic:
    """Requests without a pause while something happens. A context manager; looks at every answer in the end.

    Attributes:
        failures: what requests failed with.
        texts: how often each text came.
    """

    url: str
    failures: list[str] = field(default_factory=list)
    texts: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="traffic")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                text = generate(self.url)
            except OSError as exc:
                self.failures.append(str(exc))
            else:
                self.texts[text] = self.texts.get(text, 0) + 1

    def wait_more(self, requests: int = 3) -> None:
        """Until so many more requests were answered."""
        wanted = sum(self.texts.values()) + requests
        wait_until(lambda: sum(self.texts.values()) >= wanted or bool(self.failures), f"{wanted} answers")

    def check(self, text: str) -> None:
        """No request failed, and every answer was `text`."""
        assert not self.failures, f"{len(self.failures)} of {sum(self.texts.values())} failed: {self.failures[:3]}"
        assert set(self.texts) == {text}, f"{self.texts}, and not {text!r}"
