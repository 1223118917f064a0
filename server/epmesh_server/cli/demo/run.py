"""The demo from start to end: two acts, the reference, the verdict."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from epmesh.errors import EpmeshError, PeerLost
from epmesh_server.cli.demo.plan import DemoPlan, find_checkout, import_model
from epmesh_server.cli.demo.progress import LocalProgress, Progress, ProgressReceiver
from epmesh_server.cli.demo.screen import Screen, Show, make_console

if TYPE_CHECKING:  # torch comes with these; it is imported when the screen already says something
    from epmesh.view import View
    from epmesh_server.cli.demo.rank_work import RankReport
    from epmesh_server.cli.demo.router_work import RouterReport
    from epmesh_server.cli.demo.verdict import Summary

Work = Callable[..., "RankReport"]

_FRAME_S = 0.05
_CLEANING_UP_S = 3.0  # more than it takes
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_demo(plan: DemoPlan | None = None, *, work: Work | None = None, console: Console | None = None) -> int:
    """Runs the demo and shows it; nothing is left when it returns, however it ends.

    Args:
        plan: what to run.
        work: what each rank of the first act does, default `generate_share`.
        console: where to show it, default stdout.

    Returns:
        The exit code: 0 after ``demo: PASS``, 1 after ``demo: FAIL``.
    """
    plan = plan or DemoPlan()
    screen = Screen(console or make_console(), plan)
    try:
        with _interruptible():
            acts = _run(plan, screen, work)
    except KeyboardInterrupt:
        screen.failed("interrupted")
        return 1
    except Exception as exc:  # noqa: BLE001 - whatever it is, the last line is the verdict
        if not isinstance(exc, EpmeshError | ImportError):  # a mistake of ours: say where
            print("".join(_trace(exc)), file=sys.stderr, end="", flush=True)
        screen.failed(*_reasons(exc))
        return 1
    screen.summary(*acts)
    return 0 if all(act.passed for act in acts) else 1


def _trace(error: Exception) -> list[str]:
    """Where an error comes from: in the rank that raised it, if one did."""
    notes = getattr(error, "__notes__", [])
    return notes[:1] or traceback.format_exception(error)


def _reasons(error: Exception) -> list[str]:
    """The error, and those that other ranks raised, without repetition: the lowest rank's may be but a consequence."""
    also = [note.splitlines()[0] for note in getattr(error, "__notes__", []) if note.startswith("also ")]
    others = [line.removeprefix("also ").rpartition(", raised in ")[0] for line in also]
    return list(dict.fromkeys([f"{type(error).__name__}: {error}", *others]))


def _run(plan: DemoPlan, screen: Screen, work: Work | None) -> tuple[Summary, Summary]:
    root = find_checkout()
    with _fork_server():
        screen.act("act 1: ranks join, and exchange rows by dispatch and combine")
        reports = _generate_on_mesh(plan, root, screen, work)
        screen.act("act 2: routers, which are no ranks, send rows to experts that hosted ranks serve")
        routed, view = _generate_by_routers(plan, root, screen)
    with screen.phase("generating the same in one process, with all experts"):
        from epmesh_server.cli.demo.reference import generate_reference
        from epmesh_server.cli.demo.verdict import summarise, summarise_routed

        reference, shape = generate_reference(root, plan)
        return summarise(reports, reference, shape), summarise_routed(routed, view, reference, shape)


def _generate_on_mesh(plan: DemoPlan, root: Path, screen: Screen, work: Work | None) -> list[RankReport]:
    def owner(prompt: int) -> str:
        return f"rank {next(rank for rank in range(plan.world_size) if prompt in plan.share(rank))}"

    with contextlib.ExitStack() as stack:
        with screen.phase(f"starting {plan.nodes} node services with {plan.ranks_per_node} ranks each"):
            from epmesh.testing import LocalMesh

            moe_lm = import_model(root)
            receiver = stack.enter_context(ProgressReceiver())
            mesh = stack.enter_context(
                LocalMesh(
                    plan.nodes,
                    plan.ranks_per_node,
                    num_experts=moe_lm.load_config().num_experts,
                    exchange_timeout_s=plan.exchange_timeout_s,
                )
            )
        share = len(plan.share(0))
        screen.mesh(mesh.view(), f"each rank continues {share} prompts, its tokens go where their experts are")
        tokenizer = moe_lm.load_tokenizer()
        future = mesh.start(work or _default_work(), root, plan, receiver.path)
        with screen.generating(tokenizer.decode, owner) as show:
            _follow([future], receiver, Progress(len(plan.prompts)), show)
        reports = future.result()
        for report in reports:
            if isinstance(report, PeerLost):
                raise report
    screen.texts([tokenizer.decode(row) for report in reports for row in report.tokens.tolist()], owner)
    return reports


def _generate_by_routers(plan: DemoPlan, root: Path, screen: Screen) -> tuple[list[RouterReport], View]:
    """The routers' reports, and the view of the mesh that served them."""

    def owner(prompt: int) -> str:
        return f"router {next(router for router in range(plan.num_routers) if prompt in plan.router_share(router))}"

    with contextlib.ExitStack() as stack:
        with screen.phase(f"starting {plan.nodes} node services that host {plan.ranks_per_node} serving ranks each"):
            import epmesh
            from epmesh.testing import LocalMesh
            from epmesh_server.cli.demo.router_work import generate_routed

            moe_lm = import_model(root)
            mesh = stack.enter_context(
                LocalMesh(
                    plan.nodes,
                    plan.ranks_per_node,
                    num_experts=moe_lm.load_config().num_experts,
                    experts=plan.served_experts,
                )
            )
            view = mesh.view()
            stack.enter_context(_one_thread())
            threads = stack.enter_context(ThreadPoolExecutor(plan.num_routers, "demo-router"))
            # Closed before the threads are waited for: whatever is under way ends then.
            routers = [
                stack.enter_context(epmesh.Router(mesh.addresses, timeout_s=plan.exchange_timeout_s))
                for _ in range(plan.num_routers)
            ]
        share = len(plan.router_share(0))
        screen.mesh(view, f"each router continues {share} prompts, attention in its own thread, experts over there")
        progress, tokenizer = LocalProgress(), moe_lm.load_tokenizer()
        futures = [
            threads.submit(generate_routed, router, view, number, root, plan, progress.send)
            for number, router in enumerate(routers)
        ]
        with screen.generating(tokenizer.decode, owner) as show:
            _follow(futures, progress, Progress(len(plan.prompts)), show)
        return [future.result() for future in futures], view


class _Receiver(Protocol):
    def receive(self, timeout_s: float) -> list[dict[int, list[int]]]:
        """What came in, waiting up to `timeout_s` for the first."""


def _follow(futures: list[Future[Any]], receiver: _Receiver, progress: Progress, show: Show) -> None:
    """Shows progress until all `futures` are done."""
    while wait(futures, 0).not_done:
        for tokens in receiver.receive(_FRAME_S):
            progress.update(tokens)
        show(progress)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Has torch use one thread here, as every rank does."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _default_work() -> Work:
    from epmesh_server.cli.demo.rank_work import generate_share

    return generate_share


@contextlib.contextmanager
def _fork_server() -> Iterator[None]:
    """Has the mesh's fork server import torch while this process does; ends it unless it was there before."""
    from epmesh_server.processes.fork_server import stop_fork_server
    from epmesh_server.testing.preload import start_mesh_fork_server

    mine = False
    try:
        mine = start_mesh_fork_server()
        yield
    finally:
        if mine:
            stop_fork_server()


class _Interrupted(KeyboardInterrupt):
    """Ctrl-C, or a signal that means the same.

    (Where a plain KeyboardInterrupt passes through an ``exec``, as those of dataclasses being made while torch is
    imported, the interpreter ends itself by SIGINT in the end, whatever the exit code was to be.)
    """


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Has SIGTERM and SIGHUP end the block as Ctrl-C does, and no second one disturb the cleaning up.

    After a while a signal counts again: an exception raised inside a finalizer is dropped by the interpreter.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    deaf_until = 0.0

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal deaf_until
        if time.monotonic() >= deaf_until:
            deaf_until = time.monotonic() + _CLEANING_UP_S
            raise _Interrupted

    for number in _SIGNALS:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
