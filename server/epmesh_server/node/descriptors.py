"""The descriptor broker: hands memfds and eventfds to ranks over a unix socket, which gRPC cannot.

One datagram asks, one answers (SOCK_SEQPACKET); descriptors ride along as SCM_RIGHTS. A caller must run under this
process's user and show the token of a living session.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from google.protobuf.message import DecodeError

from epmesh.errors import EpmeshError, InvalidRequest, NotReady, Unauthenticated
from epmesh.v1 import rank_service_pb2
from epmesh_server.node.buffers import BufferPool
from epmesh_server.node.drivers import Driver, Drivers
from epmesh_server.node.ranks import LocalRank, RankTable
from epmesh_server.node.views import ViewBoard
from epmesh_server.shared_memory import CONTROL_PAGE_BYTES

_log = logging.getLogger(__name__)
MAX_DATAGRAM_BYTES = 4096
MAX_CONNECTIONS = 512
SILENT_S = 10.0
_BACKLOG = 128
_UCRED = struct.Struct("3i")

_Answer = tuple[rank_service_pb2.DescriptorResponse, Sequence[int]]


class DescriptorBroker:
    """Listens at `path` until closed. Connections that show no valid token within `SILENT_S` are closed."""

    def __init__(self, path: Path, table: RankTable, board: ViewBoard, pool: BufferPool, drivers: Drivers) -> None:
        self._path = path
        self._drivers = drivers
        self._table = table
        self._board = board
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._timers: dict[socket.socket, asyncio.TimerHandle | None] = {}
        self._listener = _listen(path)
        self._loop.add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Closes every connection and removes the socket; idempotent."""
        if self._listener.fileno() < 0:
            return
        self._loop.remove_reader(self._listener)
        self._listener.close()
        self._path.unlink(missing_ok=True)
        for connection in list(self._timers):
            self._drop(connection)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as exc:  # the caller went away again, or descriptors are short
            _log.warning("descriptor socket: cannot accept: %s", exc)
            return
        if len(self._timers) >= MAX_CONNECTIONS or not _same_user(connection):
            connection.close()
            return
        connection.setblocking(False)
        self._timers[connection] = self._loop.call_later(SILENT_S, self._drop, connection)
        self._loop.add_reader(connection, self._read, connection)

    def _drop(self, connection: socket.socket) -> None:
        timer = self._timers.pop(connection, None)
        if timer is not None:
            timer.cancel()
        if connection.fileno() >= 0:
            self._loop.remove_reader(connection)
            connection.close()

    def _read(self, connection: socket.socket) -> None:
        try:
            # One byte more than is taken shows that there was more. Descriptors sent to us are dropped by the kernel.
            datagram = connection.recv(MAX_DATAGRAM_BYTES + 1)
        except BlockingIOError:
            return
        except OSError:
            datagram = b""
        if not datagram:
            self._drop(connection)
            return
        response, descriptors = self._answer(connection, datagram)
        self._send(connection, response, descriptors)

    def _send(
        self, connection: socket.socket, response: rank_service_pb2.DescriptorResponse, descriptors: Sequence[int]
    ) -> None:
        try:
            socket.send_fds(connection, [response.SerializeToString()], list(descriptors), socket.MSG_NOSIGNAL)
        except OSError as exc:  # gone, or it does not read its answers
            _log.debug("descriptor socket: answer not sent: %s", exc)
            self._drop(connection)

    def _answer(self, connection: socket.socket, datagram: bytes) -> _Answer:
        try:
            request = _parse(datagram)
            driver = self._drivers.by_token(request.token)
            if driver is not None:
                self._trust(connection)
                return self._serve_driver(driver, request)
            entry = self._authenticate(connection, request.token)
            return self._serve(entry, request)
        except EpmeshError as exc:
            return rank_service_pb2.DescriptorResponse(error=exc.to_proto()), ()

    def _authenticate(self, connection: socket.socket, token: bytes) -> LocalRank:
        entry = self._table.by_token(token)
        if entry is None:
            raise Unauthenticated("the token is not that of a living rank of this node")
        self._trust(connection)
        return entry

    def _trust(self, connection: socket.socket) -> None:
        """The connection has shown a valid token: it may be silent for as long as it likes."""
        timer = self._timers.get(connection)
        if timer is not None:
            timer.cancel()
            self._timers[connection] = None

    def _serve(self, entry: LocalRank, request: rank_service_pb2.DescriptorRequest) -> _Answer:
        wanted = request.WhichOneof("wanted")
        if wanted == "control_page":
            response = rank_service_pb2.DescriptorResponse(memfd_bytes=CONTROL_PAGE_BYTES)
            return response, (entry.page_fd, entry.wake_fd)
        if wanted == "group_buffers":
            return self._group_buffers(entry, request.group_buffers)
        if wanted == "serve_buffers":
            return self._serve_buffers(entry, request.serve_buffers)
        if wanted == "driver_buffers":
            driver = self._drivers.by_token(request.driver_buffers.driver_token)
            if driver is None or driver.entry is not entry:
                raise Unauthenticated(f"the driver's token is not that of the driver of rank {entry.rank}")
            return self._driver_buffers(driver)
        raise InvalidRequest(
            "a descriptor request must ask for control_page, group_buffers, serve_buffers or driver_buffers"
        )

    def _serve_driver(self, driver: Driver, request: rank_service_pb2.DescriptorRequest) -> _Answer:
        if request.WhichOneof("wanted") != "driver_buffers":
            raise InvalidRequest("a driver may ask for driver_buffers alone")
        return self._driver_buffers(driver)

    def _driver_buffers(self, driver: Driver) -> _Answer:
        memfd, num_bytes = self._drivers.memory(driver)
        return rank_service_pb2.DescriptorResponse(memfd_bytes=num_bytes), (memfd,)

    def _group_buffers(self, entry: LocalRank, wanted: rank_service_pb2.GroupBuffers) -> _Answer:
        if self._board.view is None:
            raise NotReady("there is no view yet")
        buffers = self._pool.get(self._board.view, wanted.group_id, wanted.membership_epoch, entry.rank)
        response = rank_service_pb2.DescriptorResponse(
            ranks=buffers.ranks,
            memfd_bytes=buffers.memfd_bytes,
            region_bytes=buffers.layout.region_bytes,
        )
        return response, buffers.descriptors

    def _serve_buffers(self, entry: LocalRank, wanted: rank_service_pb2.ServeBuffers) -> _Answer:
        if self._board.view is None:
            raise NotReady("there is no view yet")
        memory = self._pool.get_serving(self._board.view, wanted.membership_epoch, entry.rank)
        response = rank_service_pb2.DescriptorResponse(ranks=memory.ranks, memfd_bytes=memory.memfd_bytes)
        return response, (memory.memfd,)


def _parse(datagram: bytes) -> rank_service_pb2.DescriptorRequest:
    if len(datagram) > MAX_DATAGRAM_BYTES:
        raise InvalidRequest(f"a descriptor request has at most {MAX_DATAGRAM_BYTES} bytes")
    try:
        return rank_service_pb2.DescriptorRequest.FromString(datagram)
    except DecodeError:
        raise InvalidRequest("the datagram is no DescriptorRequest") from None


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        path.unlink(missing_ok=True)  # the directory is locked: whoever left it is dead
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as exc:
        listener.close()
        raise InvalidRequest(f"cannot listen at {path}: {exc}") from exc
    return listener


def _same_user(connection: socket.socket) -> bool:
    _, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid != os.geteuid():
        _log.warning("descriptor socket: refused a caller of user %d", uid)
        return False
    return True
