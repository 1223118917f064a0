"""The memory that a group's ranks on one node share on their GPUs: each makes an arena and maps everybody else's.

Handles go through the node's store, so every rank of the group forms the same arenas at the same call, or all raise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from epmesh.errors import InvalidRequest
from epmesh.layout import Topology
from epmesh_server.kernels.plan import ArenaPlan
from epmesh_server.ranks.cuda_memory import OwnMemory, PeerMemory, Shared
from epmesh_server.ranks.store import NodeStore

_DONE, _FAILED = b"+", b"-"
_MOST_TEXT = 1000


class Arenas:
    """One formation.

    Attributes:
        bases: address of each local member's arena, as this process maps it, in order of position.
    """

    def __init__(self, plan: ArenaPlan, topology: Topology, device: torch.device, store: NodeStore) -> None:
        """Makes this rank's arena and maps the others'; collective over the local members.

        Args:
            store: of this formation alone.

        Raises:
            InvalidRequest: some rank could not; the same text on all.
            DeadlineExceeded: some rank did not come.
        """
        self._topology, self._store = topology, store
        self._own: OwnMemory | None = None
        self._peers: list[PeerMemory] = []
        self.bases: tuple[int, ...] = ()
        try:
            shared = self._exchange("own", lambda: self._make(plan, device))
            self._exchange("mapped", lambda: self._map(shared, device))
        except BaseException:
            self.close()
            raise

    def lend(self, at: int, size: int) -> torch.Tensor:
        """``[size]`` uint8 of this rank's own arena, from byte `at` on; it keeps the memory."""
        assert self._own is not None
        return self._own.lend(at, size)

    def close(self) -> None:
        """Unmaps and frees everything, once this device is done; idempotent. Peers may go on using what they mapped."""
        peers, self._peers = self._peers, []
        for peer in peers:
            peer.close()
        if self._own is not None:
            self._own.close()

    def _make(self, plan: ArenaPlan, device: torch.device) -> bytes:
        self._own = OwnMemory(plan.total_bytes, device)
        return self._own.share().encode()

    def _map(self, shared: list[bytes], device: torch.device) -> bytes:
        assert self._own is not None
        bases = []
        for position, data in zip(self._topology.local, shared, strict=True):
            if position == self._topology.me:
                bases.append(self._own.address)
            else:
                self._peers.append(PeerMemory(Shared.decode(data), device))
                bases.append(self._peers[-1].address)
        self.bases = tuple(bases)
        return b""

    def _exchange(self, step: str, make: Callable[[], bytes]) -> list[bytes]:
        """What every local member made, or the error of the lowest that could not."""
        try:
            answer = _DONE + make()
        except (InvalidRequest, RuntimeError) as exc:  # torch raises the latter for what CUDA refuses
            answer = _FAILED + str(exc).encode()[:_MOST_TEXT]
        self._store.set(f"{step}/{self._topology.me}", answer)
        found = [self._store.get(f"{step}/{position}") for position in self._topology.local]
        for position, each in zip(self._topology.local, found, strict=True):
            if each[:1] != _DONE:
                rank = self._topology.ranks[position]
                raise InvalidRequest(
                    f"rank {rank} could not share its GPU's memory: {each[1:].decode(errors='replace')}"
                )
        return [each[1:] for each in found]
