"""KeyService: clients lease their CURVE keys at the node service of the ranks they ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from epmesh.errors import EpmeshError, InvalidRequest, Unauthenticated
from epmesh.grpc_errors import abort
from epmesh.v1 import key_service_pb2 as wire
from epmesh.v1 import key_service_pb2_grpc
from epmesh_server.node.client_keys import ClientKeyTable
from epmesh_server.secure_server import certificate_of, client_of

_Context = grpc.aio.ServicerContext[Any, Any]


class KeyService(key_service_pb2_grpc.KeyServiceServicer):
    """KeyService over a table of leases.

    Args:
        taken: whether a key is that of a member, or the node service's own.
        curve: whether this node's ranks use CURVE at all.
    """

    def __init__(self, table: ClientKeyTable, taken: Callable[[bytes], bool], *, curve: bool) -> None:
        self._table = table
        self._taken = taken
        self._curve = curve

    async def LeaseKey(self, request: wire.LeaseKeyRequest, context: _Context) -> wire.LeaseKeyResponse:
        """Begins or renews a lease."""
        try:
            if not self._curve:
                raise InvalidRequest("the ranks of this node do not use CURVE; connect to them in the clear")
            if self._taken(request.public_key):
                raise Unauthenticated("this key is a member's of the mesh; make a key pair of your own")
            self._table.lease(
                request.public_key, request.name or "unnamed", client_of(context), certificate_of(context)
            )
        except EpmeshError as exc:
            await abort(context, exc)
        return wire.LeaseKeyResponse(lease_s=self._table.lease_s)

    async def ReleaseKey(self, request: wire.ReleaseKeyRequest, context: _Context) -> wire.ReleaseKeyResponse:
        """Ends a lease of the caller's."""
        self._table.release(request.public_key, client_of(context))
        return wire.ReleaseKeyResponse()
