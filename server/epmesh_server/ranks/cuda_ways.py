"""One exact exchange of a rank with a GPU: the way there and the way back. See `cuda_exchange`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from epmesh.errors import EpmeshError, InvalidRequest
from epmesh_server.kernels.lane import Lane, Rows, Sent
from epmesh_server.kernels.status import Code, Report, error_of, signature
from epmesh_server.ranks.arguments import refusals
from epmesh_server.ranks.calls import Call
from epmesh_server.ranks.dispatch import DispatchStage
from epmesh_server.ranks.open_exchange import OpenExchange, Relayed, Request
from epmesh_server.ranks.tensors import row_bytes

if TYPE_CHECKING:
    from epmesh_server.ranks.cuda_exchange import CudaExchange

_SPIN_S = 0.001
_POLL_S = 0.0005
_HOST_GRACE_S = 0.5  # the kernel's limit comes first: it knows who is late
_NEWS_S = 1.0  # how long to wait to hear why a kernel was given up


class CudaWayThere:
    """One exact dispatch on one rank.

    Attributes:
        sequence: its number.
        counts: after `wait`, rows received by source position.
        bytes_sent, floor_bytes: between nodes: none.
    """

    bytes_sent = floor_bytes = 0

    def __init__(self, owner: CudaExchange, sequence: int, rows: Rows | None) -> None:
        """Prepares; `rows` is `None` where this rank's input is refused."""
        self.sequence = sequence
        self._owner, self._member = owner, owner.member
        self._rows = rows
        self._stamp = owner.member.flag(sequence)
        self._lane: Lane | None = None
        self._sent: Sent | None = None
        self._door: DispatchStage | None = None
        self._passed = False  # the host's door, which can be passed once a number
        self.counts: list[int] = []

    def post(self, call: Call) -> None:
        """Launches, or posts the call at the host's door."""
        self._call = call
        lane = self._owner.exact
        if self._rows is None or lane is None or not self._owner.suits(lane) or not lane.fits(self._rows):
            self._open_door()
        else:
            self._launch(lane, self._rows)

    def let_caller_go(self) -> None:
        """Copies the rows where no kernel reads them yet."""
        if self._rows is not None and self._sent is None:
            copies = tuple(tensor.clone() for tensor in self._rows.tensors)
            self._rows = Rows(copies, self._rows.table, self._rows.eligible, self._rows.has_ids)

    def wait(self) -> None:
        """Waits for everybody's part.

        Raises:
            EpmeshError: the calls do not agree, or a member refused: the same on all members.
        """
        try:
            if self._door is None:
                self._await_device()
            if self._door is not None:
                self._pass_door()
        except BaseException:
            if self._lane is not None:
                self._lane.abort(self._stamp)
            raise

    def assemble(self) -> list[torch.Tensor]:
        """All received rows, by source rank, then source row, in new tensors."""
        assert self._lane is not None
        assert self._sent is not None
        assert self._rows is not None
        self.counts = self._lane.counts(self._stamp)
        self._owner.settled(self, self._sent)
        with self._owner.on_stream():
            return self._lane.take(self._rows, self._sent, sum(self.counts), self._stamp)

    def relayed(self) -> dict[int, Relayed]:
        """Nothing: the group is inside one node."""
        return {}

    def _launch(self, lane: Lane, rows: Rows) -> None:
        digest = digest_of(self._call)
        self._lane = lane
        self._sent = lane.dispatch(rows, digest, stamp=self._stamp)

    def _open_door(self) -> None:
        """Posts the call, or why this rank's ids cannot be routed."""
        if self._lane is not None:
            self._lane.abort(self._stamp)  # first: looking at the ids waits for the device
        if self._rows is not None:
            try:
                with refusals():
                    self._owner.check_ids(self._rows)
            except EpmeshError as exc:
                self._call.refusal.CopyFrom(exc.to_proto())
        self._call.numbers.extend(self._owner.needs(self._rows))
        self._door = DispatchStage(self._member, self.sequence, [], None)
        self._door.post(self._call)

    def _pass_door(self) -> None:
        """Compares all calls, and launches once there is memory for them."""
        assert self._door is not None
        calls = self._door.wait()
        assert self._rows is not None  # its refusal was raised on all ranks
        self._door, self._passed = None, True
        with self._owner.on_stream():
            self._launch(self._owner.form_exact(calls, self._rows, self.sequence), self._rows)
        self._await_device()

    def _await_device(self) -> None:
        """Waits for the kernel, or for a member at the host's door."""
        lane, member = self._lane, self._member
        assert lane is not None

        def ready() -> bool:
            until = time.perf_counter() + _SPIN_S
            while time.perf_counter() < until:
                if lane.outcome(self._stamp)[0]:
                    return True
            flags = member.buffers.recv_flags(self.sequence)  # of members at the host's door
            return not self._passed and bool((flags == np.uint64(self._stamp)).any())

        deadline = time.monotonic() + member.timeout_s + _HOST_GRACE_S
        member.wait_until(ready, self.sequence, deadline, self._others, _POLL_S)
        done, report = lane.outcome(self._stamp)
        if report is not None:
            self._heed(report)
        elif not done:
            self._open_door()
        else:
            member.check(self.sequence)

    def _heed(self, report: Report) -> None:
        member = self._member
        position = member.topology.local[report.source]
        if report.code is Code.LATE:
            raise member.give_up(self.sequence, [position])
        if report.code in (Code.ABORTED, Code.AHEAD):
            deadline = time.monotonic() + _NEWS_S
            member.wait_until(lambda: False, self.sequence, deadline, lambda: [position])
        elif self._passed:
            raise error_of(report, self._owner.rank_of(report), self._call.method)
        else:
            self._open_door()  # calls differ, or ids cannot be routed; whose, all hear there

    def _others(self) -> list[int]:
        topology = self._member.topology
        return [position for position in topology.local if position != topology.me]


class CudaWayBack:
    """One exact combine on one rank; nobody waits for it on the host."""

    bytes_sent = floor_bytes = 0

    def __init__(self, owner: CudaExchange, exchange: OpenExchange, hidden_states: torch.Tensor, sent: Sent) -> None:
        self._owner, self._exchange, self._hidden, self._sent = owner, exchange, hidden_states, sent

    def post(self, is_sequence_parallel: bool, output: torch.Tensor | None) -> None:
        """Launches; a refusal is raised here, and by a later call on the others."""
        lane = self._owner.exact
        if lane is None:
            raise InvalidRequest(f"exchange {self._exchange.sequence} is not open any more; dispatch again")
        self._owner.hear(self._exchange.sequence)
        flag = self._owner.member.flag(self._exchange.sequence)
        arguments = self._hidden, is_sequence_parallel, output
        self._result = launch_combine(self._owner, self._exchange, lane, *arguments, self._sent, flag)

    def collect(self) -> torch.Tensor:
        """``[num_tokens, hidden]``, once the device is done."""
        return self._result


def digest_of(call: Call | Request) -> int:
    """What flags carry of a call, so that those that do not match are seen."""
    return signature(f"{call.method} {call.arguments}")


def launch_combine(
    owner: CudaExchange,
    exchange: OpenExchange,
    lane: Lane,
    hidden_states: torch.Tensor,
    is_sequence_parallel: bool,
    output: torch.Tensor | None,
    sent: Sent,
    flag: int,
) -> torch.Tensor:
    """Launches a combine, or a refusal of it."""
    try:
        with refusals():
            sizes = owner.member.view.tensor_parallel_size
            text = exchange.check_results(hidden_states, output, is_sequence_parallel, sizes)
            if not hidden_states.shape[1]:
                raise InvalidRequest("results without columns; there must be at least one on a GPU")
            lane.check_results(row_bytes(hidden_states))
            owner.check_lent(exchange, lane, row_bytes(hidden_states))
    except EpmeshError:
        nothing = torch.zeros((0, 1), device=owner.device)
        if not torch.cuda.is_current_stream_capturing():
            lane.combine(nothing, sent, 0, stamp=flag, slot=exchange.slot, refused=True, phases=(True, False))
            if lane.counted:
                owner.drop_static()
        raise
    into = output if output is not None and output.is_contiguous() else None
    result = lane.combine(
        hidden_states.contiguous(), sent, signature(text), stamp=flag, slot=exchange.slot, output=into
    )
    prepared = getattr(exchange, "prepared", None)
    if prepared is not None and not torch.cuda.is_current_stream_capturing():
        prepared.remember_combine(hidden_states, result, is_sequence_parallel, signature(text))
    return result if output is None or into is not None else output.copy_(result)
