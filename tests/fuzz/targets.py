"""What is fuzzed: functions of bytes. Each returns, or raises an `EpmeshError`; everything else is a finding.

A target also asserts what must hold of whatever it accepted. Seeds are well-formed inputs, so that mutations get past
the first check.
"""

from __future__ import annotations

import functools
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import zmq
from google.protobuf.message import DecodeError, Message
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from epmesh.addresses import parse_addresses, split_address
from epmesh.communicator_methods import Assembly
from epmesh.errors import EpmeshError, InvalidRequest, PeerLost, from_proto
from epmesh.frames import decode, encode, num_bytes, tensor_meta
from epmesh.front import check_frames
from epmesh.placement import Placement
from epmesh.v1 import (
    error_pb2,
    frame_pb2,
    front_pb2,
    group_service_pb2,
    membership_service_pb2,
    rank_service_pb2,
    router_service_pb2,
    view_pb2,
)
from epmesh.version import VERSION
from epmesh.view import NodeInfo, RankInfo, RankMode, View
from epmesh_server.cli.options import parse_size
from epmesh_server.cli.waits import summed
from epmesh_server.coordinator.log import LOG_NAME, FileStore
from epmesh_server.coordinator.wire import (
    record_from_proto,
    record_to_proto,
    registration_from_proto,
    report_from_proto,
)
from epmesh_server.hosted.options import parse_hold
from epmesh_server.membership import Membership, MembershipSettings, MeshCreated, Snapshot, ViewCommitted
from epmesh_server.membership.actions import Append, Publish
from epmesh_server.membership.events import (
    CreateGroup,
    DestroyGroup,
    Event,
    OpenSession,
    RegisterNode,
    SetPlacement,
    Tick,
)
from epmesh_server.metrics_server import answer_of
from epmesh_server.node import descriptors
from epmesh_server.node.metrics import of_ranks
from epmesh_server.node.rank_stats import StatsBook
from epmesh_server.node.settings import NodeSettings
from epmesh_server.node.store import KeyValueStore
from epmesh_server.ranks.driver_tensors import read_tensors
from epmesh_server.ranks.front import Front, Incoming
from epmesh_server.ranks.links import LinkHub
from epmesh_server.ranks.serving_rows import parse_router_rows, parse_rows
from epmesh_server.ranks.session import standing_in
from tests.processes import eventually

MESH, RANK, INCARNATION = "m", 0, 7
FENCE = 3  # the newest epoch that a link takes frames of
M = TypeVar("M", bound=Message)
_LENGTH = struct.Struct("<H")


@dataclass(frozen=True)
class Target:
    """One function of bytes, and inputs that it accepts."""

    name: str
    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def pack(parts: Sequence[bytes]) -> bytes:
    """Several byte strings as one input; `unpack` reverses it."""
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def unpack(data: bytes) -> Iterator[bytes]:
    """The parts of an input; any bytes have some."""
    at = 0
    while at + _LENGTH.size <= len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        yield data[at : at + length]
        at += length


def _parsed(kind: type[M], data: bytes) -> M:
    """What gRPC does before a handler sees a message."""
    try:
        return kind.FromString(data)
    except DecodeError as exc:
        raise InvalidRequest(f"no {kind.DESCRIPTOR.name}") from exc


# Frames of links and fronts ------------------------------------------------------------------------------------------


class _Route:
    bytes = b"nobody"


@functools.cache
def _hub() -> LinkHub:
    hub = LinkHub("127.0.0.1", INCARNATION, lambda _: None)
    hub.identify(MESH, RANK, functools.partial(standing_in, None, FENCE))
    return hub


def link_messages(data: bytes) -> None:
    """Messages in the order in which they come out of a link's ROUTER."""
    hub = _hub()
    inbox = hub.inbox(0, 1)
    try:
        for part in unpack(data):
            with suppress(EpmeshError):
                hub._take_in(_Route(), decode(list(unpack(part))), inbox)  # type: ignore[arg-type]
        for message in inbox._messages.values():
            sizes = [num_bytes(meta) for meta in message.header.tensors]
            assert sizes == [len(view) for view in message.tensors]
    finally:
        assert all(epoch <= FENCE for _, _, epoch in hub._receiving), "nobody is past the fence"
        hub.forget_epochs_before(1 << 64, ())
        assert (hub._held.messages, hub._held.num_bytes) == (0, 0), "what waited behind holes is given back"
        hub._oldest = 0
        for state in (hub._receiving, hub._inboxes, hub._holes, hub._lost, hub._current, hub._early):
            state.clear()


def _link_message(kind: frame_pb2.FrameKind, number: int, **fields: Any) -> bytes:
    header = frame_pb2.FrameHeader(
        mesh_id=MESH, epoch=1, kind=kind, source=8, incarnation=3, link_sequence=number, sequence=1, **fields
    )
    header.tensors.append(tensor_meta("float32", (2, 1)))
    return pack([bytes(frame) for frame in encode(header, [bytes(8)])])


def _probe() -> bytes:
    link = frame_pb2.LinkState(probe=1, first_kept=1, last=3)
    header = frame_pb2.FrameHeader(
        mesh_id=MESH, epoch=1, kind=frame_pb2.FRAME_KIND_PROBE, source=8, incarnation=3, link=link
    )
    return pack([header.SerializeToString()])


_escaped: list[Exception] = []


@functools.cache
def _front() -> Front:
    front = Front("127.0.0.1", budget_bytes=1 << 20, on_request=_read_request)
    front.identify(MESH, RANK, INCARNATION)
    return front


def _read_request(incoming: Incoming) -> None:
    """What the handlers of drivers, neighbours and routers make of a request before they look at their rank."""
    try:
        _read(incoming)
    except Exception as exc:
        if not isinstance(exc, EpmeshError):
            _escaped.append(exc)  # a front's thread survives everything, so what it swallows is noted here
        raise
    finally:
        incoming.answer()


def _read(incoming: Incoming) -> None:
    request, kind = incoming.request, incoming.request.WhichOneof("request")
    read_tensors(incoming, None, torch.device("cpu"))
    if kind == "serve_rows":
        layer = request.serve_rows.layer if request.serve_rows.HasField("layer") else None
        rows = parse_router_rows(layer, request.serve_rows.ranks, request.tensors, incoming.tensors)
        for rank in rows.wanted:
            rows.share(rank, rows.index(rank))
    elif kind == "serve_share":
        parse_rows(None, request.tensors, incoming.tensors)


def front_requests(data: bytes) -> None:
    """Requests of one connection to a rank's front."""
    front = _front()
    for part in unpack(data):
        with suppress(EpmeshError):
            front._take_in(zmq.Frame(b"nobody"), list(unpack(part)))
    while _escaped:
        raise _escaped.pop()
    assert front.open_requests == 0, "every request is answered"
    assert eventually(lambda: front.open_bytes == 0), "and gives its bytes back"


def _rows_request() -> bytes:
    arrays: list[np.ndarray[Any, Any]] = [
        np.ones((2, 4), np.float32),
        np.ones((2, 2), np.float32),
        np.zeros((2, 2), np.int64),
        np.zeros((2, 2), np.uint8),
    ]
    metas = [tensor_meta(str(array.dtype), array.shape) for array in arrays]
    rows = front_pb2.ServeRows(epoch=1, ranks=[0], layer=1)
    request = front_pb2.FrontRequest(
        request_id=1, mesh_id=MESH, rank=RANK, incarnation=INCARNATION, deadline_ms=9, serve_rows=rows, tensors=metas
    )
    return pack([request.SerializeToString(), *(array.tobytes() for array in arrays)])


def front_response(data: bytes) -> None:
    """An answer of a rank's front, as a router or driver reads it."""
    frames = list(unpack(data))
    if frames:
        response = _parsed(front_pb2.FrontResponse, frames[0])
        views = check_frames(response, frames[1:])
        assert sum(map(len, views)) <= len(data)
        if response.HasField("error"):
            from_proto(response.error)


def forward_request(data: bytes) -> None:
    """A router's rows over gRPC."""
    parts = [_parsed(router_service_pb2.ForwardRowsRequest, part) for part in unpack(data)]
    if parts:
        assembly = Assembly(parts[0].tensors, 1 << 16)
        for part in parts:
            assembly.add(part.data)
        assert sum(map(len, assembly.tensors())) == assembly.num_bytes


def _forward_seed() -> bytes:
    request = router_service_pb2.ForwardRowsRequest(mesh_id=MESH, epoch=1, ranks=[0], data=bytes(8))
    request.tensors.append(tensor_meta("float32", (2, 1)))
    return request.SerializeToString()


def descriptor_request(data: bytes) -> None:
    """A datagram on the descriptor socket."""
    descriptors._parse(data)


def _descriptor_seed() -> bytes:
    buffers = rank_service_pb2.GroupBuffers(group_id=1, membership_epoch=1)
    return rank_service_pb2.DescriptorRequest(token=b"t", group_buffers=buffers).SerializeToString()


# Protobufs of the control plane --------------------------------------------------------------------------------------


def view(data: bytes) -> None:
    """A view, as nodes, ranks and routers read it."""
    read = View.from_proto(_parsed(view_pb2.View, data))
    again = View.from_proto(read.to_proto())
    assert again == read, "a view survives the wire"


def _committed() -> View:
    info = RankInfo(0, 1, "cpu", RankMode.EXCHANGE, "tcp://127.0.0.1:1")
    return View(MESH, 1, 1, 8, (NodeInfo(0, "n", 1, "h:1", (info,)),))


def error(data: bytes) -> None:
    """An error, as everybody reads it."""
    read = from_proto(_parsed(error_pb2.Error, data))
    assert type(from_proto(read.to_proto())) is type(read)


def coordinator(data: bytes) -> None:
    """A coordinator's whole life: messages of nodes and of clients, and time that passes."""
    settings = MembershipSettings(version=VERSION)
    snapshot = Snapshot()
    snapshot.apply(MeshCreated(MESH, settings.stride))
    machine, now, epoch = Membership(settings, snapshot, 0.0), 0.0, 0
    for number, part in enumerate(unpack(data), start=1):
        with suppress(EpmeshError):
            event = _event(part, number)
            now += part[0] / 64 if part else 0.0
            for action in machine.step(event, now) if event is not None else ():
                if isinstance(action, Append):
                    for record in action.records:
                        assert record_from_proto(record_to_proto(record)) == record
                elif isinstance(action, Publish):
                    assert action.view.epoch > epoch, "epochs never fall"
                    epoch = action.view.epoch


def _event(part: bytes, number: int) -> Event | None:
    """The event that a message is; the first byte says which message, and how much time passed."""
    kind, rest = part[0] % 7 if part else 0, part[1:]
    if kind == 0:
        return Tick()
    if kind == 1:
        request = _parsed(membership_service_pb2.RegisterNodeRequest, rest)
        return RegisterNode(
            number, registration_from_proto(request), request.slot if request.HasField("slot") else None
        )
    if kind == 2:
        hello = _parsed(membership_service_pb2.Hello, rest)
        return OpenSession(number, hello.slot, hello.incarnation, hello.epoch)
    if kind == 3:
        return report_from_proto(rest[0] if rest else 0, _parsed(membership_service_pb2.NodeSessionRequest, rest[1:]))
    if kind == 4:
        create = _parsed(group_service_pb2.CreateGroupRequest, rest)
        return CreateGroup(number, create.request_id, create.name, tuple(create.ranks))
    if kind == 5:
        destroy = _parsed(group_service_pb2.DestroyGroupRequest, rest)
        return DestroyGroup(number, destroy.request_id, destroy.name)
    place = _parsed(group_service_pb2.SetExpertPlacementRequest, rest)
    return SetPlacement(number, place.request_id, *Placement.from_proto(place.placement))


def _life() -> bytes:
    """A node registers, opens its session, reports a rank, and answers what it is asked."""
    registered = membership_service_pb2.RegisterNodeRequest(
        node_id="n", incarnation=1, address="127.0.0.1:7400", version=VERSION
    )
    hello = membership_service_pb2.Hello(slot=0, incarnation=1)
    reports = [membership_service_pb2.NodeSessionRequest() for _ in range(4)]
    declared = reports[0].ranks.ranks.add(world_size=1, exchange_timeout_s=1.0)
    declared.rank.rank, declared.rank.incarnation, declared.rank.device = 0, 1, "cpu"
    declared.rank.mode = view_pb2.RANK_MODE_EXCHANGE
    declared.rank.link_endpoint = "tcp://127.0.0.1:1"
    reports[1].prepared.epoch = reports[2].finished.epoch = reports[3].committed.epoch = 1
    group = group_service_pb2.CreateGroupRequest(request_id="a", name="pair", ranks=[0])
    return pack(
        [
            b"\x01" + registered.SerializeToString(),
            b"\x02" + hello.SerializeToString(),
            *(b"\x03\x02" + report.SerializeToString() for report in reports),
            b"\x04" + group.SerializeToString(),
        ]
    )


# The log and the configuration ---------------------------------------------------------------------------------------


def log(data: bytes) -> None:
    """A coordinator's log: read, or refused; what was read is the same when it is read again."""
    with tempfile.TemporaryDirectory(prefix="epmesh-fuzz-") as name:
        directory = Path(name) / "log"
        directory.mkdir(mode=0o700)
        (directory / LOG_NAME).write_bytes(data)
        first = _load(directory)
        assert _load(directory) == first


def _load(directory: Path) -> list[Any]:
    store = FileStore(directory)
    try:
        return store.load()
    finally:
        store.close()


def _log_seed() -> bytes:
    with tempfile.TemporaryDirectory(prefix="epmesh-fuzz-") as name:
        store = FileStore(Path(name) / "log")
        store.load()
        store.append([MeshCreated(MESH, 8)])
        store.append([ViewCommitted(_committed())])
        store.close()
        return (Path(name) / "log" / LOG_NAME).read_bytes()


def configuration(data: bytes) -> None:
    """What people write on command lines and in environments."""
    text = data.decode(errors="surrogateescape")
    for parse in (parse_size, parse_hold, functools.partial(split_address, what="x")):
        with suppress(InvalidRequest):
            parse(text)
    with suppress(InvalidRequest):
        parse_addresses(text.split(","), "x")
    for field in ("host", "node_id", "coordinator", "advertise", "link_host"):
        with suppress(InvalidRequest):
            NodeSettings(**{field: text})  # type: ignore[arg-type]


def key_value_store(data: bytes) -> None:
    """A node's store: what it counts is what it holds."""
    store = KeyValueStore()
    parts = list(unpack(data))
    for key, value in zip(parts[::2], parts[1::2], strict=False):
        name = key.decode(errors="replace")
        with suppress(EpmeshError):
            store.set(name, value)
        with suppress(EpmeshError):
            store.add(name, len(value))
        with suppress(EpmeshError):
            store.compare_set(name, value, key)
        with suppress(EpmeshError):
            store.delete(name[::-1])
    assert store._bytes == sum(len(key) + len(value) for key, value in store._values.items())


# Metrics -------------------------------------------------------------------------------------------------------------


def scrape(data: bytes) -> None:
    """What somebody sends to a metrics port: the answer is HTTP, and says how long it is."""
    answer = answer_of(data, CollectorRegistry())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 ")
    assert body == b"" or f"Content-Length: {len(body)}".encode() in head


class _Rank:
    """As much of a local rank as its figures need."""

    rank = 0


def rank_stats(data: bytes) -> None:
    """A rank's figures: whatever they are, they can be scraped, and stay within their bounds."""
    book = StatsBook(lambda: 0.0)
    book.take(_Rank(), _parsed(rank_service_pb2.RankStats, data))  # type: ignore[arg-type]
    ((_, record),) = book.records()
    assert len(record.stats.groups) <= 64
    summed(book.recent_waits())
    registry = CollectorRegistry()
    registry.register(_Figures(book))
    list(text_string_to_metric_families(generate_latest(registry).decode()))


class _Figures(Collector):
    def __init__(self, book: StatsBook) -> None:
        self._book = book

    def collect(self) -> Iterator[Metric]:
        yield from of_ranks(self._book)


def _stats_seed() -> bytes:
    waited = [frame_pb2.WaitedFor(rank=1, seconds=0.5)]
    durations = rank_service_pb2.Durations(counts=[1] * 16, sum_s=0.25)
    group = rank_service_pb2.GroupStats(group="ep", dispatches=durations, combines=durations, waited_for=waited)
    group.errors.add(error="PeerLost", count=1)
    serving = rank_service_pb2.ServingStats(requests=3, rows=9)
    return rank_service_pb2.RankStats(groups=[group], serving=serving).SerializeToString()


TARGETS = {
    target.name: target
    for target in (
        Target("link_messages", link_messages, (pack([_link_message(frame_pb2.FRAME_KIND_DISPATCH, 1), _probe()]),)),
        Target("front_requests", front_requests, (pack([_rows_request()]),)),
        Target("front_response", front_response, (pack([front_pb2.FrontResponse(request_id=1).SerializeToString()]),)),
        Target("forward_request", forward_request, (pack([_forward_seed()]),)),
        Target("descriptor_request", descriptor_request, (_descriptor_seed(),)),
        Target("view", view, (_committed().to_proto().SerializeToString(),)),
        Target("error", error, (PeerLost([3], 2).to_proto().SerializeToString(),)),
        Target("coordinator", coordinator, (_life(),)),
        Target("log", log, (_log_seed(),)),
        Target("configuration", configuration, (b"127.0.0.1:7400", b"64MiB", b"0-3;4-7", b"[::1]:7401")),
        Target("key_value_store", key_value_store, (pack([b"1/k", b"v", b"1/c", b"3"]),)),
        Target("scrape", scrape, (b"GET /metrics HTTP/1.1\r\nHost: node-0\r\n\r\n",)),
        Target("rank_stats", rank_stats, (_stats_seed(),)),
    )
}
