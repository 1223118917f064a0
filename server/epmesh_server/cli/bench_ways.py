"""``epmesh bench --of router|attach``: what the other ways in cost, beside a floor or beside joined ranks.

A router's forward stands beside a plain ZeroMQ round trip of the same bytes to one process and back. An attached rank's
dispatch and combine stand beside those of joined ranks, of the same meshes one after the other.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np
import zmq
from rich.console import Console
from rich.table import Table

from epmesh_server.cli.bench import BenchPlan

if TYPE_CHECKING:
    import torch

    from epmesh import Communicator

TRANSPORTS = ("shm", "zmq", "grpc")
_EXPERTS = f"{__name__}:identity_experts"
_TIMEOUT_S = 30.0

Row = dict[str, float]


def bench_routers(plan: BenchPlan, *, as_json: bool = False) -> list[Row]:
    """Times forwards, one at a time, and prints milliseconds: medians over runs."""
    import epmesh
    from epmesh.testing import LocalMesh

    report = _Report(plan, "router", as_json=as_json)
    made = LocalMesh(plan.nodes, plan.ranks, num_experts=plan.experts, experts=_EXPERTS, tls=plan.tls)
    with made as mesh, _Echo() as echo:
        routers = {name: epmesh.Router(mesh.addresses, transport=name, tls=mesh.tls) for name in ("zmq", "grpc")}
        for tokens in plan.tokens:
            rows = _inputs(plan, tokens, seed=tokens)
            calls: dict[str, Callable[[], object]] = {
                f"forward by {name}": functools.partial(router.forward, *rows, timeout=_TIMEOUT_S)
                for name, router in routers.items()
            }
            calls["bare round trip"] = echo.call([tensor.numpy().view("uint8") for tensor in rows])
            times = _in_turn(plan, calls)
            report.add({"tokens": tokens, **times, "zmq / bare": times["forward by zmq"] / times["bare round trip"]})
        for router in routers.values():
            router.close()
    return report.finish(
        f"one forward at a time of one router; {plan.nodes} nodes x {plan.ranks} serving ranks whose experts return"
        " what they are given; bare: the same bytes by ZeroMQ to one process, and the rows back"
    )


def bench_attach(plan: BenchPlan, *, as_json: bool = False) -> list[Row]:
    """Times dispatch + combine of joined ranks and of attached ones by each transport, in milliseconds."""
    from epmesh.testing import LocalMesh

    report = _Report(plan, "attach", as_json=as_json)
    columns: dict[str, list[float]] = {}
    ways: dict[str, dict[str, Any]] = {"join": {}}
    ways |= {name: {"hosted": True, "transport": name} for name in TRANSPORTS}
    for name, options in ways.items():
        with LocalMesh(plan.nodes, plan.ranks, num_experts=plan.experts, tls=plan.tls, **options) as mesh:
            columns[name] = [_slowest(mesh.run(time_pairs, plan, tokens)) for tokens in plan.tokens]
        report.say(f"{name}: measured")
    for index, tokens in enumerate(plan.tokens):
        times = {name: values[index] for name, values in columns.items()}
        report.add({"tokens": tokens, **times, "shm / join": times["shm"] / times["join"]})
    return report.finish(
        f"dispatch + combine, the slowest rank's time; {plan.nodes} nodes x {plan.ranks} ranks; attached ranks have a"
        " driver in a process of its own each"
    )


def identity_experts(_: Communicator) -> Callable[..., torch.Tensor]:
    """A factory of experts that return the rows they are given."""
    return lambda _layer, hidden_states, _weights, _ids: hidden_states


def time_pairs(comm: Communicator, plan: BenchPlan, tokens: int) -> list[float]:
    """One rank's part: seconds of every run."""
    import torch

    rows = _inputs(plan, tokens, seed=1000 * tokens + comm.rank)
    durations = []
    for _ in range(plan.warmups + plan.runs):
        comm.all_reduce(torch.zeros(1))
        started = time.perf_counter()
        comm.combine(comm.dispatch(*rows)[0])
        durations.append(time.perf_counter() - started)
    return durations[plan.warmups :]


def _inputs(plan: BenchPlan, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    source = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, plan.experts, generator=source).argsort(dim=1)[:, : plan.topk]
    return torch.randn(tokens, plan.hidden, generator=source), torch.rand(tokens, plan.topk, generator=source), ids


def _in_turn(plan: BenchPlan, calls: dict[str, Callable[[], object]]) -> Row:
    """Medians in milliseconds; the calls take turns, so that what else the machine does falls on all alike."""
    durations: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(plan.warmups + plan.runs):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            durations[name].append(time.perf_counter() - started)
    return {name: 1e3 * statistics.median(each[plan.warmups :]) for name, each in durations.items()}


def _slowest(of_ranks: Sequence[Sequence[float]]) -> float:
    slowest: list[float] = [max(run) for run in zip(*of_ranks, strict=True)]
    return 1e3 * statistics.median(slowest)


class _Echo:
    """A process that sends the first frame of what it gets back."""

    def __enter__(self) -> _Echo:
        from epmesh_server.processes.child import Child

        self._child = Child("echo", echo_main)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REQ)
        self._socket.linger = 0
        self._socket.rcvtimeo = self._socket.sndtimeo = int(_TIMEOUT_S * 1000)
        self._socket.connect(self._child.receive())
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._context.term()
        self._child.close()

    def call(self, arrays: Sequence[np.ndarray[Any, Any]]) -> Callable[[], object]:
        """A round trip with these arrays."""

        def trip() -> object:
            self._socket.send_multipart([np.ascontiguousarray(array).data for array in arrays], copy=False)
            return self._socket.recv()

        return trip


def echo_main(pipe: Connection[Any, Any]) -> None:
    """Answers until it is killed."""
    from epmesh_server.processes import pickling

    context = zmq.Context()
    socket = context.socket(zmq.REP)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    pipe.send_bytes(pickling.dumps(f"tcp://127.0.0.1:{port}"))
    while True:
        socket.send(socket.recv_multipart(copy=False)[0], copy=False)


class _Report:
    """Says how far it is, and prints the table or one JSON object."""

    def __init__(self, plan: BenchPlan, what: str, *, as_json: bool) -> None:
        self._plan, self._what, self._as_json = plan, what, as_json
        self._console = Console(file=sys.stderr if as_json else sys.stdout, soft_wrap=True)
        self._rows: list[Row] = []
        self.say(
            f"{what}, on this machine, hidden {plan.hidden} float32, top-{plan.topk} of {plan.experts} experts, "
            f"{plan.runs} runs after {plan.warmups}"
        )

    def say(self, text: str) -> None:
        self._console.print(f"bench: {text}", highlight=False)

    def add(self, row: Row) -> None:
        self._rows.append(row)
        self.say(", ".join(f"{name} {value:.1f}" for name, value in row.items()))

    def finish(self, note: str) -> list[Row]:
        if self._as_json:
            print(json.dumps({"of": self._what, "plan": asdict(self._plan), "rows": self._rows}))
            return self._rows
        table = Table()
        for name in self._rows[0]:
            table.add_column(name, justify="right")
        for row in self._rows:
            table.add_row(*(f"{value:.0f}" if name == "tokens" else f"{value:.2f}" for name, value in row.items()))
        self._console.print(table)
        self.say(f"milliseconds, medians; {note}")
        return self._rows
