"""A device group over NCCL: bytes move between the GPUs of one node, on the caller's stream, by one primitive.

torch's ``ProcessGroupNCCL`` is constructed directly. Its own handling of errors, which ends processes, is off; who
watches is `epmesh_server.ranks.cuda_watch`. Only sends and receives are used, and every pair of members is connected
when the group is formed: later calls launch and return, so that nobody is inside NCCL for long when it must be aborted.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from epmesh.errors import DeadlineExceeded, EpmeshError, InvalidRequest
from epmesh_server.ranks.store import NodeStore

_cuda: Any = torch.cuda  # streams and events are not typed
_SLICE_S = 0.01  # between two looks at what else may have happened
_REASON_S = 1.0  # how long to wait to hear why NCCL failed: of a death it knows first
_MOST_IN_FLIGHT = 64  # launches; more could fill the device's queue, and then a launch does not return
_NEVER = timedelta(days=365)  # torch's own time limit, which is not ours
_ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
}


class GroupEndedError(Exception):
    """The group was aborted."""


@dataclass
class _Launch:
    """A kernel on the way.

    Attributes:
        begun_at: ``time.monotonic`` when the device was first seen to have come to it.
    """

    begun: Any
    done: Any
    begun_at: float | None = None


class NcclDeviceGroup:
    """The members of a group on one node, each with a GPU of its own; ranks are positions among them.

    One thread launches. Another, the watch, may call `overdue` and `abort`.

    Attributes:
        process_group: torch's.
        late: whether a launch was not done within the time limit, and the group was given up for it.
    """

    process_group: Any

    def __init__(
        self,
        store: Callable[[Callable[[], None]], NodeStore],
        rank: int,
        size: int,
        device: torch.device,
        timeout_s: float,
        check: Callable[[], None],
    ) -> None:
        """Connects to the other members, in a thread: NCCL may wait for a member that is dead.

        Args:
            store: makes the store, given what it calls while it waits.
            timeout_s: longest time to connect, and from a launch's beginning on the device to its end.
            check: called while waiting; takes in messages, and raises what ends the wait.

        Raises:
            DeadlineExceeded, InvalidRequest: it took too long, or NCCL failed.
        """
        self.late = False
        self._rank, self._size, self._device, self._timeout_s = rank, size, device, timeout_s
        self._store = store(self._check_wanted)  # the group keeps only a C++ reference
        self._inside = threading.Lock()  # held by whoever is inside NCCL
        self._ended = False  # guarded by _inside
        self._launched: deque[_Launch] = deque()  # guarded by _inside
        self._unwanted = threading.Event()
        self._connected = threading.Event()
        self._failure: BaseException | None = None
        threading.Thread(target=self._connect, name="epmesh-nccl-connect", daemon=True).start()
        try:
            self._await_connection(check)
        except BaseException:
            self._unwanted.set()
            raise

    def move(self, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor]) -> None:
        """Launches: member i gets ``outgoing[i]``, whose bytes come into its ``incoming[me]``. Nothing is waited for.

        Args:
            outgoing, incoming: one contiguous tensor a member, on the device; of no elements where nothing moves.

        Raises:
            GroupEndedError: the group was aborted.
            RuntimeError: NCCL's error.
        """
        self._make_room()
        stream = _cuda.current_stream(self._device)
        launch = _Launch(_cuda.Event(), _cuda.Event())
        with self._inside:
            if self._ended:
                raise GroupEndedError
            launch.begun.record(stream)
            self.process_group.alltoall(_flat(incoming), _flat(outgoing), _on_this_stream())
            launch.done.record(stream)
            self._launched.append(launch)

    def overdue(self) -> bool:
        """Whether the device has been at a launch for longer than the time limit."""
        with self._inside:
            self._forget_done()
            if self._ended or not self._launched:
                return self.late
            first, now = self._launched[0], time.monotonic()
            if first.begun_at is None and first.begun.query():
                first.begun_at = now
            if first.begun_at is not None and now - first.begun_at > self._timeout_s:
                self.late = True
            return self.late

    def drain(self, timeout_s: float) -> bool:
        """Waits until everything launched is done; whether it is."""
        deadline = time.monotonic() + timeout_s
        while self._in_flight():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def abort(self) -> None:
        """Ends whatever is in flight; idempotent. The group is of no use afterwards."""
        with self._inside:
            if not self._ended:
                self._ended = True
                self.process_group.abort()

    def _in_flight(self) -> int:
        with self._inside:
            self._forget_done()
            return len(self._launched)

    def _forget_done(self) -> None:
        while self._launched and self._launched[0].done.query():
            self._launched.popleft()

    def _make_room(self) -> None:
        """Waits while much is in flight; whoever watches ends that in the end."""
        while self._in_flight() >= _MOST_IN_FLIGHT:
            time.sleep(0.001)

    # Connecting ------------------------------------------------------------------------------------------------

    def _await_connection(self, check: Callable[[], None]) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not self._connected.wait(_SLICE_S):
            check()
            if time.monotonic() > deadline:
                raise DeadlineExceeded(message=f"connecting with NCCL took over {self._timeout_s:g} s")
        if self._failure is None:
            return
        deadline = time.monotonic() + _REASON_S
        while time.monotonic() < deadline:
            check()
            time.sleep(_SLICE_S)
        if isinstance(self._failure, EpmeshError):
            raise self._failure
        raise InvalidRequest(f"NCCL could not connect: {self._failure}; NCCL_DEBUG=INFO shows why") from self._failure

    def _connect(self) -> None:
        """In its own thread, which stays inside NCCL where a member never comes; then nobody waits for it."""
        try:
            torch.cuda.set_device(self._device)
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = _NEVER
            with _environment(_ENVIRONMENT):
                self.process_group = dist.ProcessGroupNCCL(self._store, self._rank, self._size, options)
            self._greet_all()
        except BaseException as exc:  # noqa: BLE001 - raised by the thread that waits
            self._failure = exc
        self._connected.set()
        if self._unwanted.is_set() and hasattr(self, "process_group"):
            self.abort()

    def _greet_all(self) -> None:
        """Moves a byte between all members, which connects them."""
        stream = _cuda.Stream(self._device)
        with _cuda.stream(stream):
            bytes_out = torch.zeros(self._size, dtype=torch.uint8, device=self._device)
            bytes_in = torch.empty_like(bytes_out)
            arriving, leaving = list(torch.split(bytes_in, 1)), list(torch.split(bytes_out, 1))
            self.process_group.alltoall(arriving, leaving, _on_this_stream())
            done = _cuda.Event()
            done.record(stream)
        while not done.query():
            self._check_wanted()
            time.sleep(0.001)

    def _check_wanted(self) -> None:
        if self._unwanted.is_set():
            raise DeadlineExceeded(message="nobody waits for this device group any more")


def _on_this_stream() -> Any:
    options = dist.AllToAllOptions()
    options.asyncOp = False
    return options


def _flat(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Their bytes: all that NCCL has to know of a dtype."""
    return [tensor.detach().view(-1).view(torch.uint8) for tensor in tensors]


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets what torch reads while it makes a group, and puts back what stood there: other groups are not ours."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
