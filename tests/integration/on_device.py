"""Runs works that are written for CPU tensors on a communicator whose tensors live on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from epmesh import Communicator, Handle


def on_device(comm: Communicator, work: Callable[..., Any], *args: Any) -> Any:
    """``work(comm, *args)``, with tensors taken to the communicator's device on the way in, and back on the way out."""
    return work(OnDevice(comm), *args)


class OnDevice:
    """A communicator that takes and gives CPU tensors; what is overwritten in place is overwritten in the caller's."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._comm, name)
        return self._staged(found) if callable(found) else found

    @property
    def device(self) -> torch.device:
        """What the caller's tensors are on."""
        return torch.device("cpu")

    def allocate_combine_input(self, *args: Any) -> None:
        """What it would give is no CPU tensor."""

    def get_symmetric_memory_buffer(self, *args: Any) -> None:
        """What it would give is no CPU tensor."""

    def batch_isend_irecv(self, p2p_ops: Sequence[Any]) -> list[Any]:
        """As the communicator's."""
        moved = [SimpleNamespace(**{**vars(op), "tensor": op.tensor.to(self._comm.device)}) for op in p2p_ops]
        works = self._comm.batch_isend_irecv(moved)
        return [_Work(work, there.tensor, op.tensor) for work, there, op in zip(works, moved, p2p_ops, strict=True)]

    def _staged(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            originals: list[tuple[torch.Tensor, torch.Tensor]] = []
            there = [self._there(arg, originals) for arg in args]
            named = {name: self._there(arg, originals) for name, arg in keywords.items()}
            result = self._back(method(*there, **named), originals)
            self._comm.check()  # the device is done, so what went wrong there is known
            return result

        return call

    def _there(self, value: Any, originals: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        if isinstance(value, _Handle):
            return value.inner
        if isinstance(value, list):
            return [self._there(each, originals) for each in value]
        if not isinstance(value, torch.Tensor):
            return value
        moved = value.to(self._comm.device)
        originals.append((moved, value))
        return moved

    def _back(self, value: Any, originals: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
            return type(value)(self._back(each, originals) for each in value)
        if isinstance(value, Communicator):
            return OnDevice(value)
        if isinstance(value, Handle):
            return _Handle(value, self)
        if not isinstance(value, torch.Tensor):
            return value
        assert value.device == self._comm.device, f"a result on {value.device}"
        for moved, original in originals:
            if value is moved:
                return original.copy_(moved.cpu())
        return value.cpu()


class _Handle(Handle):
    def __init__(self, inner: Handle, owner: OnDevice) -> None:
        self.inner = inner
        self._owner = owner

    @property
    def sequence(self) -> int:
        return self.inner.sequence

    def wait(self) -> tuple[Any, ...]:
        result: tuple[Any, ...] = self._owner._back(self.inner.wait(), [])
        return result


class _Work:
    def __init__(self, work: Any, there: torch.Tensor, here: torch.Tensor) -> None:
        self._work, self._there, self._here = work, there, here

    def wait(self) -> None:
        self._work.wait()
        self._here.copy_(self._there.cpu())
