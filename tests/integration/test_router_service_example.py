"""The example's HTTP service as a process of its own, against ranks that serve the example's experts."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from epmesh.testing import LocalMesh
from examples import moe_lm
from tests.integration.commands import open_shell
from tests.processes import eventually

ROOT = Path(__file__).resolve().parents[2]
EXPERTS = "examples.moe_lm.serving:experts"
PROMPTS = ("And it came to pass", "The LORD is my", "In the beginning", "Blessed are", "He that hath", "naïve é")
NUM_TOKENS = 24
_WITHIN_S = 30.0


class Service:
    """One running service."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "examples.router_service", "--port", "0", *arguments],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if not name.startswith(("EPMESH_", "ROUTER_"))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        self.lines: list[str] = [self.process.stdout.readline()]
        found = re.search(r"listens at ([\d.]+):(\d+)", self.lines[0])
        assert found, self.lines
        self.host, self.port = found[1], int(found[2])
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout or ()), daemon=True)
        self._reader.start()

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, str], str]:
        """Status, headers and body of an answer."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=_WITHIN_S)
        with contextlib.closing(connection):
            connection.request(method, path, body if isinstance(body, bytes | None) else json.dumps(body))
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read().decode()

    def generate(self, prompt: str, **more: Any) -> tuple[int, dict[str, Any]]:
        status, _, text = self.ask("POST", "/v1/generate", {"prompt": prompt, "max_tokens": NUM_TOKENS, **more})
        return status, json.loads(text)

    def await_ready(self) -> None:
        assert eventually(lambda: self.ask("GET", "/healthz")[0] == 200), self.lines

    def end(self) -> int:
        """Sends SIGTERM and waits; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(_WITHIN_S)
        self._reader.join(_WITHIN_S)
        return code


@contextlib.contextmanager
def open_service(*arguments: str) -> Iterator[Service]:
    service = Service(*arguments)
    try:
        yield service
        assert service.end() == 0, service.lines
        assert not [line for line in service.lines if "Traceback" in line], service.lines
    finally:
        service.process.kill()
        service.process.wait()
        assert service.process.stdout is not None
        service._reader.join()
        service.process.stdout.close()


@contextlib.contextmanager
def open_mesh(held: Sequence[range]) -> Iterator[LocalMesh]:
    with LocalMesh(2, 1, num_experts=16, experts=EXPERTS, held=held) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def mesh() -> Iterator[LocalMesh]:
    with open_mesh([range(8), range(8, 16)]) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def service(mesh: LocalMesh) -> Iterator[Service]:
    with open_service("--mesh", ",".join(mesh.addresses)) as service:
        service.await_ready()
        yield service


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """What one process generates that has all experts."""
    model, tokenizer = moe_lm.load(), moe_lm.load_tokenizer()
    prompts = moe_lm.encode_prompts(tokenizer, PROMPTS)
    texts = moe_lm.generate(model, prompts, end=tokenizer.end, num_steps=NUM_TOKENS).texts(tokenizer)
    return dict(zip(PROMPTS, texts, strict=True))


def events(text: str) -> list[tuple[str, dict[str, str]]]:
    """Kind and data of server-sent events."""
    found = re.findall(r"(?:event: (\w+)\n)?data: (.*)\n\n", text)
    return [(kind, json.loads(data)) for kind, data in found]


def test_requests_at_once_get_the_text_of_a_single_process(service: Service, expected: dict[str, str]) -> None:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(service.generate, PROMPTS))
    assert answers == [(200, {"text": expected[prompt]}) for prompt in PROMPTS]


def test_a_stream_brings_the_same_text_in_pieces(service: Service, expected: dict[str, str]) -> None:
    for prompt in (PROMPTS[0], PROMPTS[-1]):
        body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "stream": True}
        status, headers, text = service.ask("POST", "/v1/generate", body)
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        *pieces, last = events(text)
        assert last == ("end", {})
        assert len(pieces) > 1
        assert "".join(data["text"] for _, data in pieces) == expected[prompt]


def test_the_service_runs_without_torch(service: Service) -> None:
    assert service.generate("And")[0] == 200
    assert "torch" not in Path(f"/proc/{service.process.pid}/maps").read_text()


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (b"{", 400, "no JSON"),
        (b"[" * 10_000, 400, "no JSON"),
        (b"[]", 400, "object"),
        ({"max_tokens": 3}, 400, "prompt is null"),
        ({"prompt": 7}, 400, "prompt is 7"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens is 0; it must be 1 to 200"),
        ({"prompt": "a", "max_tokens": 201}, 400, "max_tokens is 201"),
        ({"prompt": "a", "max_tokens": True}, 400, "max_tokens is true"),
        ({"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens is 1.5"),
        ({"prompt": "a", "stream": "yes"}, 400, 'stream is "yes"'),
        ({"prompt": "a", "speed": 1}, 400, "unknown fields ['speed']"),
        ({"prompt": "word " * 250, "max_tokens": 9}, 400, "the model takes 256"),
        ({"prompt": "a" * (64 << 10)}, 413, "more than 65536 bytes"),
    ],
)
def test_a_request_that_is_wrong_is_told_what_is(service: Service, body: Any, status: int, word: str) -> None:
    code, _, text = service.ask("POST", "/v1/generate", body)
    assert code == status
    assert word in json.loads(text)["message"]


def test_metrics_count_requests_and_what_the_router_did(service: Service) -> None:
    before = metrics(service)
    service.generate("And it came")
    service.ask("POST", "/v1/generate", b"{")
    after = metrics(service)
    assert after['router_requests_total{code="200"}'] - before.get('router_requests_total{code="200"}', 0) == 1
    assert after['router_requests_total{code="400"}'] - before.get('router_requests_total{code="400"}', 0) == 1
    assert after["epmesh_router_forwards_total"] - before["epmesh_router_forwards_total"] == NUM_TOKENS * 4
    assert after["router_generated_tokens_total"] - before["router_generated_tokens_total"] == NUM_TOKENS
    assert after["router_ready"] == after["epmesh_epoch"] / after["epmesh_epoch"] == 1
    assert after["epmesh_router_forwards_failed_total"] == after["router_open_requests"] == 0
    assert {'epmesh_router_answers_total{slot="0"}', 'epmesh_router_answers_total{slot="1"}'} <= after.keys()


def metrics(service: Service) -> dict[str, float]:
    status, headers, text = service.ask("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=")
    return {name: float(value) for name, value in re.findall(r"^([^#\s]+) (\S+)$", text, re.MULTILINE)}


def test_one_request_more_than_may_be_under_way_is_refused_at_once(mesh: LocalMesh) -> None:
    with open_service("--mesh", mesh.address, "--max-open", "1", "--timeout", "5") as service:
        service.await_ready()
        with socket.create_connection((service.host, service.port), timeout=_WITHIN_S) as slow:
            slow.sendall(b"POST /v1/generate HTTP/1.1\r\nHost: here\r\nContent-Length: 9\r\n\r\n")
            assert eventually(lambda: metrics(service)["router_open_requests"] == 1)
            status, headers, text = service.ask("POST", "/v1/generate", {"prompt": "a"})
            assert (status, headers["retry-after"], json.loads(text)["error"]) == (503, "1", "Overloaded")
            assert slow.recv(4096).startswith(b"HTTP/1.1 504 ")  # its body never came
        assert service.generate("And")[0] == 200


def test_a_request_whose_time_is_over_is_told_so(mesh: LocalMesh) -> None:
    with open_service("--mesh", mesh.address, "--timeout", "0.004") as service:
        service.await_ready()
        status, answer = service.generate("And it came to pass", max_tokens=200)
        assert (status, answer["error"]) == (504, "DeadlineExceeded")


def test_sigterm_lets_a_stream_end(mesh: LocalMesh) -> None:
    with open_service("--mesh", mesh.address) as service:
        service.await_ready()
        connection = http.client.HTTPConnection(service.host, service.port, timeout=_WITHIN_S)
        with contextlib.closing(connection):
            body = json.dumps({"prompt": "And it came to pass", "max_tokens": 200, "stream": True})
            connection.request("POST", "/v1/generate", body)
            answer = connection.getresponse()
            begun = answer.read(16)
            service.process.send_signal(signal.SIGTERM)
            *pieces, last = events((begun + answer.read()).decode())
        assert last == ("end", {})
        assert len(pieces) > 20


def test_a_service_that_starts_before_its_mesh_becomes_ready_with_it() -> None:
    with open_shell() as shell, open_service("--mesh", shell.address) as service:
        status, _, reason = service.ask("GET", "/healthz")
        assert status == 503
        assert reason.strip()
        status, headers, text = service.ask("POST", "/v1/generate", {"prompt": "And"})
        assert (status, json.loads(text)["error"]) == (503, "MeshUnavailable")
        assert "retry-after" in headers
        serving = shell.start("serve", "--ranks", "1", "--num-experts", "16", "--experts", EXPERTS)
        service.await_ready()
        assert service.generate("And")[0] == 200
        serving.stop()
        assert eventually(lambda: "no " in service.ask("GET", "/healthz")[2])


def test_a_service_generates_by_a_secured_mesh_with_a_routers_certificate(expected: dict[str, str]) -> None:
    with LocalMesh(1, 2, num_experts=16, experts=EXPERTS, tls=True) as mesh:
        assert mesh.tls is not None
        with open_service("--mesh", mesh.address, "--tls-dir", str(mesh.tls.certificate.parent)) as service:
            service.await_ready()
            assert service.generate(PROMPTS[0]) == (200, {"text": expected[PROMPTS[0]]})
        with open_service("--mesh", mesh.address) as stranger:
            assert eventually(lambda: "certificate" in stranger.ask("GET", "/healthz")[2])
            assert stranger.generate(PROMPTS[0])[0] == 503


@pytest.mark.fault
def test_nobody_sees_an_error_when_a_node_is_killed_whose_experts_have_replicas(expected: dict[str, str]) -> None:
    with open_mesh([range(16)] * 2) as mesh, open_service("--mesh", ",".join(mesh.addresses)) as service:
        service.await_ready()
        with ThreadPoolExecutor(4) as pool:
            first = [pool.submit(service.generate, prompt) for prompt in PROMPTS]
            assert eventually(lambda: metrics(service)["router_generated_tokens_total"] > NUM_TOKENS)
            mesh.kill_node(1)
            answers = [one.result(_WITHIN_S) for one in first] + list(pool.map(service.generate, PROMPTS))
        assert answers == [(200, {"text": expected[prompt]}) for prompt in PROMPTS * 2]


@pytest.mark.fault
def test_experts_that_nobody_holds_any_more_are_named() -> None:
    with open_mesh([range(8), range(8, 16)]) as mesh, open_service("--mesh", mesh.address) as service:
        service.await_ready()
        mesh.kill_node(1)
        assert eventually(lambda: service.ask("GET", "/healthz")[0] == 503)
        assert "nobody serves experts [8, 9, 10, 11, 12, 13, 14, 15] of layer 0" in service.ask("GET", "/healthz")[2]
        status, headers, text = service.ask("POST", "/v1/generate", {"prompt": "And", "max_tokens": 9})
        assert (status, json.loads(text)["error"]) == (503, "ExpertUnavailable")
        assert "retry-after" in headers
