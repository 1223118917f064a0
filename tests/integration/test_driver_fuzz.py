"""Whatever comes to a rank's front under a driver's token is answered, typed, and the rank goes on."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from epmesh.channels import NodeAddress
from epmesh.driver_session import DriverSession
from epmesh.frames import ITEM_BYTES
from epmesh.front import FrontClient, FrontPeer
from epmesh.v1 import front_pb2
from tests.integration.hosted_mesh import HostedMesh

ROUNDS = 400
NUMBERS = (0, 1, 2, 3, 63, 64, 255, 1 << 16, (1 << 31) - 1)
METHODS = [field.name for field in front_pb2.MethodArguments.DESCRIPTOR.fields]


@pytest.fixture(scope="module")
def mesh() -> Iterator[HostedMesh]:
    with HostedMesh(1, 1, buffer_bytes=1 << 16) as mesh:
        mesh.attach(0).destroy()  # it is there
        yield mesh


def scribble(message: Any, source: random.Random, depth: int = 0) -> None:
    """Fills some of a message's fields with odd values."""
    for field in message.DESCRIPTOR.fields:
        if source.random() < 0.4 or field.name in ("world_size", "timeout_s"):  # those two only make it wait
            continue
        several = field.is_repeated
        if field.message_type is not None:
            if depth < 3:
                for _ in range(source.randrange(3) if several else 1):
                    inner = getattr(message, field.name)
                    scribble(inner.add() if several else inner, source, depth + 1)
            continue
        values = [_odd(field, source) for _ in range(source.randrange(4) if several else 1)]
        if several:
            getattr(message, field.name).extend(values)
        else:
            setattr(message, field.name, values[0])


def _odd(field: Any, source: random.Random) -> Any:
    if field.type == field.TYPE_STRING:
        return source.choice(["", "ep", "world", "no such", "float32", "int64", "bool", "x" * 300])
    if field.type == field.TYPE_BYTES:
        return source.randbytes(source.randrange(5))
    if field.type == field.TYPE_ENUM:
        return source.randrange(12)
    if field.type in (field.TYPE_SINT32, field.TYPE_SINT64):
        return source.choice(NUMBERS) * source.choice((1, -1))
    if field.type == field.TYPE_BOOL:
        return source.random() < 0.5
    return source.choice(NUMBERS)


def odd_request(source: random.Random, token: bytes) -> tuple[front_pb2.FrontRequest, list[bytes]]:
    """A request whose frames fit its metas, most of the time, and whose call makes no sense, most of the time."""
    request = front_pb2.FrontRequest()
    call = request.driver_call
    call.token, call.group = token, source.choice(["ep", "ep", "ep", "world", "nowhere"])
    call.shared_memory = source.random() < 0.5
    arguments = getattr(call.arguments, source.choice([name for name in METHODS if name != "remove_group"]))
    arguments.SetInParent()
    scribble(arguments, source)
    frames = []
    for _ in range(source.choice((0, 1, 1, 3, 3, 4))):
        dtype = source.choice(list(ITEM_BYTES))
        shape = [source.randrange(4) for _ in range(source.choice((0, 1, 2, 2, 2, 3)))]
        request.tensors.add(dtype=dtype, shape=shape)
        place = source.choice((-1, -1, -1, 0, 64, 1 << 16, 1 << 40))
        request.places.append(place)
        if place == -1 and source.random() < 0.97:
            frames.append(source.randbytes(int(np.prod(shape)) * ITEM_BYTES[dtype]))
    if source.random() < 0.1:
        request.released.extend(source.choice(NUMBERS) for _ in range(3))
    if source.random() < 0.1:
        del request.places[:]
    return request, frames


@pytest.mark.parametrize("seed", range(3))
def test_odd_calls_are_answered_and_the_rank_goes_on(mesh: HostedMesh, seed: int) -> None:
    source, answers = random.Random(seed), dict[str, int]()
    session = DriverSession(NodeAddress(mesh.addresses[0]), 0, "fuzz", 10.0, tls=None)
    peer = FrontPeer(0, session.granted.incarnation, session.granted.front_endpoint)
    with contextlib.closing(FrontClient(session.granted.mesh_id)) as client:
        for _ in range(ROUNDS):
            request, frames = odd_request(source, session.granted.token)
            error = client.call(peer, request, frames, timeout_s=25.0).exception(30.0)
            name = "done" if error is None else type(error).__name__
            assert "rank 0 failed" not in str(error), (request, error)
            answers[name] = answers.get(name, 0) + 1
            assert session.error is None, (request, session.error)
    session.detach()
    assert answers.keys() <= {"done", "InvalidRequest", "ExpertUnavailable", "NotReady"}, answers
    assert min(answers["done"], answers["InvalidRequest"]) > ROUNDS / 20, answers
    with mesh.attach(0) as comm:
        tensor: Any = np.ones(2, np.float32)
        assert comm.all_reduce(tensor).tolist() == [1.0, 1.0]
