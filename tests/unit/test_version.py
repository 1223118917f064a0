"""Versions: who may work with whom, and that a rank asks before it does anything else."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

import epmesh
from epmesh.errors import InvalidRequest
from epmesh.v1 import rank_service_pb2, rank_service_pb2_grpc
from epmesh.version import VERSION, check_compatible

OTHERS = ["0.2.0", "1.1.0", "", "x"]


class FakeNodeService(rank_service_pb2_grpc.RankServiceServicer):
    """A node service that says it has `version`, and writes down what it is asked."""

    def __init__(self) -> None:
        self.version = VERSION
        self.asked: list[str] = []

    def DescribeNode(self, request: object, context: object) -> rank_service_pb2.DescribeNodeResponse:
        self.asked.append("DescribeNode")
        return rank_service_pb2.DescribeNodeResponse(version=self.version, registered=False)

    def RankSession(self, request_iterator: object, context: Any) -> Any:
        self.asked.append("RankSession")
        context.abort(grpc.StatusCode.INTERNAL, "a rank of another version went on")


@pytest.fixture
def service() -> Iterator[tuple[FakeNodeService, str]]:
    fake = FakeNodeService()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    rank_service_pb2_grpc.add_RankServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield fake, f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.parametrize("theirs", OTHERS)
def test_another_major_or_minor_version_is_refused_and_both_are_named(theirs: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_compatible("0.1.3", theirs, "node 'a'", here="the coordinator")
    assert all(part in str(caught.value) for part in ("node 'a'", repr(theirs), "the coordinator", "'0.1.3'"))


@pytest.mark.parametrize("theirs", ["0.1.3", "0.1.99.dev3", "0.1"])
def test_another_patch_version_is_accepted(theirs: str) -> None:
    check_compatible("0.1.3", theirs, "node 'a'")


@pytest.mark.parametrize("theirs", OTHERS)
def test_a_rank_refuses_a_node_service_of_another_version_at_once(
    service: tuple[FakeNodeService, str], theirs: str
) -> None:
    fake, address = service
    fake.version = theirs
    with pytest.raises(InvalidRequest) as caught:
        epmesh.join(address, timeout_s=20)
    assert all(part in str(caught.value) for part in (address, repr(theirs), repr(VERSION)))
    assert fake.asked == ["DescribeNode"]
