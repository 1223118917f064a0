"""Tests on an event loop that wait for what must happen, but not for ever."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

PATIENCE_S = 60.0  # of a machine that is busy with other things, too
_P = ParamSpec("_P")


def on_event_loop(test: Callable[_P, Coroutine[Any, Any, None]]) -> Callable[_P, None]:
    """Runs a test that is a coroutine on an event loop of its own."""

    @functools.wraps(test)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


async def soon(awaitable: Any) -> Any:
    """Waits for what must happen, but not for ever."""
    return await asyncio.wait_for(awaitable, PATIENCE_S)


async def until(happened: Callable[[], bool]) -> None:
    """Waits for a condition on shared memory, which cannot be awaited."""
    async with asyncio.timeout(PATIENCE_S):
        while not happened():  # noqa: ASYNC110 - nobody can set an event there
            await asyncio.sleep(0.001)
