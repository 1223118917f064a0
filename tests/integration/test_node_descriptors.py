"""Buffers and pages as the descriptor socket hands them out."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
from pathlib import Path

import pytest

from epmesh.errors import EpmeshError, InvalidRequest, NotReady, StaleEpoch, Unauthenticated
from epmesh.v1 import rank_service_pb2
from tests.integration.fake_coordinator import EP, WORLD
from tests.integration.node_under_test import mesh
from tests.integration.rank_process import rank_process
from tests.integration.raw_rank import ask_descriptors
from tests.integration.waiting import PATIENCE_S, on_event_loop


@on_event_loop
async def test_buffers_are_the_same_memory_for_all_members_and_new_in_every_membership() -> None:
    async with mesh() as m:
        first = await m.rank(1)
        async with rank_process(await m.node.describe(), incarnation=2) as other:
            await m.commit(1, [0, 1])
            assert await other.ask(f"write {EP} 1 hello") == "written"
            answer, fds = await first.buffers(EP, 1)
            assert list(answer.ranks) == [0, 1]
            assert len(fds) == 3
            section = answer.memfd_bytes // 2
            with mmap.mmap(fds[0], answer.memfd_bytes) as memory:
                assert memory[section : section + 5] == b"hello"
            await m.session.commit(m.session.make_view(2, membership_epoch=1))
            _, kept = await first.buffers(EP, 1)
            assert os.fstat(kept[0]).st_ino == os.fstat(fds[0]).st_ino
            await m.session.commit(m.session.make_view(3))
            answer, renewed = await first.buffers(EP, 3)
            assert os.fstat(renewed[0]).st_ino != os.fstat(fds[0]).st_ino
            with mmap.mmap(renewed[0], answer.memfd_bytes) as memory:
                assert memory[section : section + 5] == bytes(5)
            with pytest.raises(StaleEpoch, match="membership epoch 1 is over"):
                await first.buffers(EP, 1)


@on_event_loop
async def test_nobody_can_shrink_a_buffer_under_the_others() -> None:
    async with mesh() as m:
        rank = await m.rank(1)
        await m.commit(1, [0])
        answer, fds = await rank.buffers(WORLD, 1)
        assert os.fstat(fds[0]).st_size == answer.memfd_bytes
        assert (os.fstat(fds[0]).st_mode & 0o777, os.fstat(fds[0]).st_nlink) == (0o600, 0)
        with pytest.raises(PermissionError):
            os.ftruncate(fds[0], 0)


@on_event_loop
async def test_buffers_of_unknown_groups_epochs_and_strangers_are_refused() -> None:
    async with mesh() as m:
        rank = await m.rank(1)
        with pytest.raises(NotReady, match="no view yet"):
            await rank.buffers(EP, 1)
        await m.commit(1, [0])
        with pytest.raises(InvalidRequest, match="no group with id 77"):
            await rank.buffers(77, 1)
        with pytest.raises(NotReady, match="membership epoch 2"):
            await rank.buffers(EP, 2)
        stranger = await m.rank(2)
        with pytest.raises(InvalidRequest, match="rank 1 is not in group 'ep'"):
            await stranger.buffers(EP, 1)


@pytest.mark.parametrize(
    ("datagram", "error", "said"),
    [
        (rank_service_pb2.DescriptorRequest(token=b"guess"), Unauthenticated, "token"),
        (rank_service_pb2.DescriptorRequest(control_page=rank_service_pb2.ControlPage()), Unauthenticated, "token"),
        (b"\xff" * 64, InvalidRequest, "no DescriptorRequest"),
        (b"\0" * 5000, InvalidRequest, "at most 4096 bytes"),
    ],
    ids=["guess", "nothing", "noise", "oversize"],
)
@on_event_loop
async def test_bad_datagrams_are_refused_typed(
    datagram: rank_service_pb2.DescriptorRequest | bytes, error: type[EpmeshError], said: str
) -> None:
    async with mesh() as m:
        await m.rank(1)
        path = Path((await m.node.describe()).descriptor_socket)
        with pytest.raises(error, match=said):
            await asyncio.to_thread(ask_descriptors, path, datagram)


@on_event_loop
async def test_the_token_of_a_rank_that_left_opens_nothing() -> None:
    async with mesh() as m:
        rank = await m.rank(1)
        await rank.page()
        await rank.send(close=rank_service_pb2.CloseRank())
        while m.session.ranks or m.session.reports.qsize():
            await m.session.expect("ranks")
        with pytest.raises(Unauthenticated):
            await rank.page()


@on_event_loop
async def test_silent_connections_do_not_hurt() -> None:
    async with mesh() as m:
        node = await m.node.registered()
        silent = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(50)]
        try:
            for connection in silent:
                connection.connect(node.descriptor_socket)
            rank = await m.rank(1)
            assert not (await rank.page()).closed
        finally:
            for connection in silent:
                connection.close()


@on_event_loop
async def test_sockets_are_for_this_user_alone() -> None:
    async with mesh() as m:
        node = await m.node.describe()
        for path in map(Path, (node.grpc_socket, node.descriptor_socket)):
            assert path.is_socket()
            assert path.parent.stat().st_mode & 0o777 == 0o700


@on_event_loop
async def test_a_caller_of_another_user_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that got past the modes of directory and socket, and knows a token."""
    async with mesh() as m:
        node = await m.node.describe()
        rank = await m.rank(1)
        assert _mode(node.descriptor_socket) == 0o600
        request = rank_service_pb2.DescriptorRequest(
            token=rank.opened.token, control_page=rank_service_pb2.ControlPage()
        )
        monkeypatch.setattr("epmesh_server.node.descriptors.os.geteuid", lambda: os.getuid() + 1)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(PATIENCE_S)
            connection.connect(node.descriptor_socket)
            assert await asyncio.to_thread(_answer_to, connection, request.SerializeToString()) == b""
        monkeypatch.undo()
        await rank.page()


def _answer_to(connection: socket.socket, datagram: bytes) -> bytes:
    try:
        connection.sendall(datagram)
        return connection.recv(4096)
    except (BrokenPipeError, ConnectionResetError):
        return b""


def _mode(path: str) -> int:
    return Path(path).stat().st_mode & 0o777
