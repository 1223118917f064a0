"""Coordinator and node service as children of a local mesh."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from typing import Any

from epmesh_server.coordinator import CoordinatorSettings, run_coordinator
from epmesh_server.node import NodeSettings, run_node
from epmesh_server.processes import pickling
from epmesh_server.processes.raised import Raised
from epmesh_server.testing.messages import Bound


def coordinator_main(pipe: Connection[Any, Any], settings: CoordinatorSettings) -> None:
    """Runs a coordinator until SIGTERM or the owner's end; reports the bound address, or why there is none."""
    _report(pipe, lambda stop, on_ready: run_coordinator(settings, stop, on_ready))


def node_main(pipe: Connection[Any, Any], settings: NodeSettings) -> None:
    """Runs a node service until SIGTERM or the owner's end; reports the bound address, or why there is none."""
    _report(pipe, lambda stop, on_ready: run_node(settings, stop, on_ready))


Run = Callable[[asyncio.Event, Callable[[str], None]], Awaitable[None]]


def _report(pipe: Connection[Any, Any], run: Run) -> None:
    try:
        asyncio.run(_until_stopped(pipe, run))
    except Exception as exc:  # noqa: BLE001 - whatever it is, the owner raises it
        pipe.send_bytes(pickling.dumps(Raised.of(exc)))


async def _until_stopped(pipe: Connection[Any, Any], run: Run) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def end() -> None:
        logging.disable()  # the whole mesh is ending: that the others are gone is no news
        stop.set()

    loop.add_signal_handler(signal.SIGTERM, end)
    loop.add_reader(pipe.fileno(), end)  # nothing is ever sent here: readable means the owner is gone
    try:
        await run(stop, lambda address: pipe.send_bytes(pickling.dumps(Bound(address))))
    finally:
        loop.remove_reader(pipe.fileno())
