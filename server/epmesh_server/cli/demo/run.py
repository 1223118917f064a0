"""The demo from start to end: mesh, generation, reference, verdict."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from epmesh.errors import EpmeshError, PeerLost
from epmesh_server.cli.demo.plan import DemoPlan, find_checkout, import_model
from epmesh_server.cli.demo.progress import Progress, ProgressReceiver
from epmesh_server.cli.demo.screen import Screen, Show, make_console

if TYPE_CHECKING:  # torch comes with these; it is imported when the screen already says something
    from epmesh_server.cli.demo.rank_work import RankReport
    from epmesh_server.cli.demo.verdict import Summary

Work = Callable[..., "RankReport"]

_FRAME_S = 0.05
_CLEANING_UP_S = 3.0  # more than it takes
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_demo(plan: DemoPlan | None = None, *, work: Work | None = None, console: Console | None = None) -> int:
    """Runs the demo and shows it; nothing is left when it returns, however it ends.

    Args:
        plan: what to run.
        work: what each rank does, default `generate_share`.
        console: where to show it, default stdout.

    Returns:
        The exit code: 0 after ``demo: PASS``, 1 after ``demo: FAIL``.
    """
    plan = plan or DemoPlan()
    screen = Screen(console or make_console(), plan)
    try:
        with _interruptible():
            summary = _run(plan, screen, work)
    except KeyboardInterrupt:
        screen.failed("interrupted")
        return 1
    except Exception as exc:  # noqa: BLE001 - whatever it is, the last line is the verdict
        if not isinstance(exc, EpmeshError | ImportError):  # a mistake of ours: say where
            print("".join(_trace(exc)), file=sys.stderr, end="", flush=True)
        screen.failed(*_reasons(exc))
        return 1
    screen.summary(summary)
    return 0 if summary.passed else 1


def _trace(error: Exception) -> list[str]:
    """Where an error comes from: in the rank that raised it, if one did."""
    notes = getattr(error, "__notes__", [])
    return notes[:1] or traceback.format_exception(error)


def _reasons(error: Exception) -> list[str]:
    """The error, and those that other ranks raised, without repetition: the lowest rank's may be but a consequence."""
    also = [note.splitlines()[0] for note in getattr(error, "__notes__", []) if note.startswith("also ")]
    others = [line.removeprefix("also ").rpartition(", raised in ")[0] for line in also]
    return list(dict.fromkeys([f"{type(error).__name__}: {error}", *others]))


def _run(plan: DemoPlan, screen: Screen, work: Work | None) -> Summary:
    root = find_checkout()
    reports = _generate_on_mesh(plan, root, screen, work)
    with screen.phase("generating the same in one process, with all experts"):
        from epmesh_server.cli.demo.reference import generate_reference
        from epmesh_server.cli.demo.verdict import summarise

        reference, shape = generate_reference(root, plan)
        return summarise(reports, reference, shape)


def _generate_on_mesh(plan: DemoPlan, root: Path, screen: Screen, work: Work | None) -> list[RankReport]:
    with contextlib.ExitStack() as stack:
        with screen.phase(f"starting {plan.nodes} node services with {plan.ranks_per_node} ranks each"):
            stack.enter_context(_fork_server())
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
        screen.mesh(mesh.view())
        tokenizer = moe_lm.load_tokenizer()
        future = mesh.start(work or _default_work(), root, plan, receiver.path)
        with screen.generating(tokenizer.decode) as show:
            reports = _follow(future, receiver, Progress(len(plan.prompts)), show)
    screen.texts([tokenizer.decode(row) for report in reports for row in report.tokens.tolist()])
    return reports


def _follow(future: Future[list[Any]], receiver: ProgressReceiver, progress: Progress, show: Show) -> list[RankReport]:
    """Shows progress until all ranks have reported; their reports by rank.

    Raises:
        Exception: what a rank raised; `PeerLost` for one that died.
    """
    while not future.done():
        for tokens in receiver.receive(_FRAME_S):
            progress.update(tokens)
        show(progress)
    reports = future.result()
    for report in reports:
        if isinstance(report, PeerLost):
            raise report
    return reports


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
            raise KeyboardInterrupt

    for number in _SIGNALS:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
