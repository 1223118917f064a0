"""A rank in a process of its own, made of raw stubs; run as a module, driven by lines on stdin.

``write GROUP MEMBERSHIP_EPOCH TEXT`` writes into its own buffer of a group, ``hold SECONDS`` keeps the GIL for so
long, ``error`` waits for the end of the session, ``leave`` leaves in good order. Each is answered by one line.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import mmap
import os
import queue
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import zmq

from epmesh.v1 import rank_service_pb2, rank_service_pb2_grpc
from epmesh_server.shared_memory import ControlPage
from tests.integration.raw_rank import ask_descriptors, declaration
from tests.integration.waiting import soon


class RankProcess:
    """The test's handle on one such process."""

    def __init__(self, process: asyncio.subprocess.Process, rank: int) -> None:
        self.process = process
        self.rank = rank

    async def ask(self, line: str) -> str:
        """Sends a command; returns the answer."""
        self.tell(line)
        return await self.answer()

    def tell(self, line: str) -> None:
        """Sends a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())

    async def answer(self) -> str:
        """The next answer."""
        assert self.process.stdout is not None
        line: bytes = await soon(self.process.stdout.readline())
        return line.decode().strip()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal."""
        self.process.send_signal(number)


@contextlib.asynccontextmanager
async def rank_process(node: rank_service_pb2.DescribeNodeResponse, incarnation: int) -> AsyncIterator[RankProcess]:
    """Starts a rank process; gives it once its session is open and its page mapped."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.integration.rank_process", node.grpc_socket, node.descriptor_socket),
        str(incarnation),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    handle = RankProcess(process, -1)
    try:
        handle.rank = int(await handle.answer())
        yield handle
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def main() -> None:
    """Opens a session and does what stdin says until it ends."""
    grpc_socket, descriptor_socket, incarnation = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    context = zmq.Context(io_threads=1)
    links = context.socket(zmq.ROUTER)
    links.bind("tcp://127.0.0.1:0")
    endpoint = links.getsockopt_string(zmq.LAST_ENDPOINT)
    requests: queue.SimpleQueue[rank_service_pb2.RankSessionRequest | None] = queue.SimpleQueue()
    opening = rank_service_pb2.OpenRank(pid=os.getpid(), declaration=declaration(incarnation, endpoint))
    requests.put(rank_service_pb2.RankSessionRequest(open=opening))
    with grpc.insecure_channel(f"unix:{grpc_socket}") as channel:
        stream = rank_service_pb2_grpc.RankServiceStub(channel).RankSession(iter(requests.get, None))
        opened = next(iter(stream)).opened
        _, fds = ask_descriptors(
            descriptor_socket,
            rank_service_pb2.DescriptorRequest(token=opened.token, control_page=rank_service_pb2.ControlPage()),
        )
        page = ControlPage(fds[0])
        _say(str(opened.rank))
        for words in _commands():
            if words[0] == "write":
                _write(descriptor_socket, opened, int(words[1]), int(words[2]), words[3])
                _say("written")
            elif words[0] == "hold":
                ctypes.PyDLL(None).usleep(int(float(words[1]) * 1e6))  # PyDLL calls with the GIL held
                _say("released")
            elif words[0] == "error":
                _say(next(one.error.message for one in stream if one.HasField("error")))
            elif words[0] == "leave":
                requests.put(rank_service_pb2.RankSessionRequest(close=rank_service_pb2.CloseRank()))
                requests.put(None)
                _say(f"left {len(list(itertools.takewhile(lambda one: not one.HasField('error'), stream)))}")
                break
        page.close()
    context.destroy(0)


def _commands() -> Iterator[list[str]]:
    for line in sys.stdin:
        yield line.split()


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _write(path: Path, opened: rank_service_pb2.RankOpened, group_id: int, membership_epoch: int, text: str) -> None:
    wanted = rank_service_pb2.GroupBuffers(group_id=group_id, membership_epoch=membership_epoch)
    answer, fds = ask_descriptors(path, rank_service_pb2.DescriptorRequest(token=opened.token, group_buffers=wanted))
    section = list(answer.ranks).index(opened.rank) * (answer.memfd_bytes // len(answer.ranks))
    with mmap.mmap(fds[0], answer.memfd_bytes) as memory:
        memory[section : section + len(text)] = text.encode()
    for fd in fds:
        os.close(fd)


if __name__ == "__main__":
    main()
