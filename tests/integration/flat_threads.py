"""A group whose ranks are threads of this process, each with a Gloo group that is made directly."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

import epmesh

_torch: Any = dist  # not all that it exports is declared
_Gloo = _torch.ProcessGroupGloo
JOIN_S = 60.0


def hash_store() -> Any:
    """A store for the threads of this process."""
    return _torch.HashStore()


def gloo_group(store: Any, rank: int, world_size: int) -> Any:
    """A process group of which ``torch.distributed`` knows nothing."""
    options = _Gloo._Options()
    options._devices = [_Gloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=20)
    return _Gloo(store, rank, world_size, options)


def together(world_size: int, work: Callable[..., Any], *args: Any, name: str = "ep", **options: Any) -> list[Any]:
    """What ``work(comm, *args)`` returned in every rank, all at once; raises what the lowest one raised."""
    store = hash_store()
    results: list[Any] = [None] * world_size
    errors: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        try:
            group = gloo_group(store, rank, world_size)
            with epmesh.DeviceCommunicator(group, unique_name=name, **{"exchange_timeout_s": 20.0, **options}) as comm:
                results[rank] = work(comm, *args)
        except BaseException as exc:  # noqa: BLE001 - raised below
            errors[rank] = exc

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_S)
    for rank in sorted(errors):
        raise errors[rank]
    assert not any(thread.is_alive() for thread in threads), "a rank does not come back"
    return results
