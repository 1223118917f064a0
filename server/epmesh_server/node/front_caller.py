"""How the node service asks its ranks' fronts, from its event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from epmesh.curve import KeyPair
from epmesh.frames import Buffer
from epmesh.front import FrontClient, FrontPeer, FrontReply
from epmesh.v1 import front_pb2
from epmesh.view import View


class FrontCaller:
    """Requests to fronts of the mesh that the node is in. Used on the event loop only; connects when first asked."""

    def __init__(self, pair: KeyPair | None = None) -> None:
        """Connects to nobody yet; `pair` is the node service's own, which its ranks admit."""
        self._pair = pair
        self._client: FrontClient | None = None
        self._mesh_id = ""

    async def call(
        self,
        mesh_id: str,
        peer: FrontPeer,
        request: front_pb2.FrontRequest,
        tensors: Sequence[Buffer] = (),
        *,
        timeout_s: float,
    ) -> FrontReply:
        """Makes one request, as `FrontClient.call`. Cancelling the coroutine tells the rank to give the request up.

        Raises:
            EpmeshError: what the rank answered; `PeerLost`, `DeadlineExceeded`, `MeshUnavailable` as the client says.
        """
        if self._client is None or self._mesh_id != mesh_id:
            self.close()
            self._client, self._mesh_id = FrontClient(mesh_id, pair=self._pair), mesh_id
        return await asyncio.wrap_future(self._client.call(peer, request, tensors, timeout_s=timeout_s))

    def close(self) -> None:
        """Fails what is pending and ends the client; the next call makes another one."""
        client, self._client = self._client, None
        if client is not None:
            client.close()


def front_peer(view: View, rank: int) -> FrontPeer | None:
    """Where the front of `rank` is; `None` where the view has no such rank, or it takes no requests."""
    info = view.ranks.get(rank)
    if info is None or not info.front_endpoint:
        return None
    return FrontPeer(rank, info.incarnation, info.front_endpoint, info.curve_key)
