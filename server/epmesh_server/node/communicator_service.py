"""CommunicatorService: who drives a rank, and calls on it for drivers that reach nothing but gRPC.

All calls have one form, so one handler serves them all: it gathers a request's tensors, passes them to the rank's front
as any driver does, and cuts what comes back into messages.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from epmesh.communicator_methods import METHODS, SERVICE, Assembly, Method, messages
from epmesh.errors import EpmeshError, InvalidRequest, PeerLost
from epmesh.front import FrontPeer, FrontReply
from epmesh.grpc_errors import abort
from epmesh.v1 import communicator_service_pb2 as wire
from epmesh.v1 import front_pb2
from epmesh_server.node.call_budget import CallBudget
from epmesh_server.node.call_waits import DEFAULT_IDLE_S, CallWaits, gather
from epmesh_server.node.drivers import Driver, Drivers, lost
from epmesh_server.node.front_caller import FrontCaller
from epmesh_server.node.registration import Enrolment
from epmesh_server.node.rpc import seconds_left

_LEAST_CALL_S, _MAX_CALL_S = 0.001, 3600.0
_ABORT_S = 1.0  # what sending an error may take; one that does not read hears of it once it does
_SETTLE_S = 1.0  # how long after its connection broke a rank's end may be noticed
_Context = grpc.aio.ServicerContext[Any, Any]


class CommunicatorService:
    """CommunicatorService of one node. `add_to` serves it.

    Args:
        descriptor_socket: where drivers on this host get the memory that they share with their rank.
        budget_bytes: most bytes of tensors that all calls under way may have announced; beyond, `Overloaded`.
        idle_s: how long a caller may take to send, or to read, its next message; beyond, `DeadlineExceeded`.
    """

    def __init__(
        self,
        drivers: Drivers,
        enrolment: Enrolment,
        caller: FrontCaller,
        *,
        descriptor_socket: str,
        budget_bytes: int,
        idle_s: float = DEFAULT_IDLE_S,
    ) -> None:
        self._drivers = drivers
        self._descriptor_socket = descriptor_socket
        self._enrolment = enrolment
        self._caller = caller
        self._budget = CallBudget(budget_bytes)
        self._idle_s = idle_s

    @property
    def budget(self) -> CallBudget:
        """What calls hold."""
        return self._budget

    def add_to(self, server: grpc.aio.Server) -> None:
        """Has `server` serve it."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "AttachRank": grpc.unary_stream_rpc_method_handler(
                self._attach,
                request_deserializer=wire.AttachRankRequest.FromString,
                response_serializer=wire.AttachRankResponse.SerializeToString,
            ),
            "DetachRank": grpc.unary_unary_rpc_method_handler(
                self._detach,
                request_deserializer=wire.DetachRankRequest.FromString,
                response_serializer=wire.DetachRankResponse.SerializeToString,
            ),
        }
        handlers.update((method.name, self._handler(method)) for method in METHODS.values())
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    # Not a generator: one that is suspended in a `yield` would hear late that its caller is gone.
    async def _attach(self, request: wire.AttachRankRequest, context: _Context) -> None:
        try:
            driver = self._drivers.attach(request)
        except EpmeshError as exc:
            await abort(context, exc)
        hold = driver.hold
        try:
            await context.write(self._granted(driver))
            await _first(driver.detached.wait(), driver.entry.ended.wait(), hold.wait())
        finally:
            self._drivers.gone(driver, hold)  # before anything else: the handler is cancelled when the driver is gone
        if not driver.detached.is_set() and not hold.is_set():
            await abort(context, lost(driver))

    async def _detach(self, request: wire.DetachRankRequest, context: _Context) -> wire.DetachRankResponse:
        try:
            self._drivers.detach(request.rank, request.token)
        except EpmeshError as exc:
            await abort(context, exc)
        return wire.DetachRankResponse()

    def _granted(self, driver: Driver) -> wire.AttachRankResponse:
        shown = driver.entry.declaration.rank
        return wire.AttachRankResponse(
            token=driver.token,
            mesh_id=self._mesh_id,
            incarnation=shown.incarnation,
            front_endpoint=shown.front_endpoint,
            descriptor_socket=self._descriptor_socket,
            curve_key=shown.curve_key,
        )

    @property
    def _mesh_id(self) -> str:
        registration = self._enrolment.current
        return registration.mesh_id if registration else ""

    def _handler(self, method: Method) -> grpc.RpcMethodHandler[Any, Any]:
        async def call(requests: AsyncIterator[Any], context: _Context) -> None:
            try:
                await self._call(method, requests, context)
            except EpmeshError as exc:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_ABORT_S):
                        await abort(context, exc)

        return grpc.stream_stream_rpc_method_handler(
            call,
            request_deserializer=method.request.FromString,
            response_serializer=method.response.SerializeToString,
        )

    async def _call(self, method: Method, requests: AsyncIterator[Any], context: _Context) -> None:
        waits = CallWaits(method.name, context, self._idle_s)
        first = await waits.until(anext(requests, None), lambda: "its first message did not come")
        if first is None or not first.HasField("call"):
            raise InvalidRequest(f"the first message of {method.name} must have `call`")
        driver = self._drivers.driver_of(first.call.rank, first.call.token)
        assembly = Assembly(first.call.tensors, self._budget.most)
        with waits.driven_by(driver):
            with self._budget.holding(assembly.num_bytes, driver.entry.rank):
                assembly.add(first.data)
                await gather(assembly, requests, waits)
                reply = await self._forward(driver, _request(method, first, assembly), assembly.tensors(), context)
            await _write(method, reply, context, waits)

    async def _forward(
        self, driver: Driver, request: front_pb2.FrontRequest, tensors: list[memoryview], context: _Context
    ) -> FrontReply:
        """What the rank answers; an error as soon as the rank is gone."""
        shown = driver.entry.declaration.rank
        peer = FrontPeer(driver.entry.rank, shown.incarnation, shown.front_endpoint, shown.curve_key)
        timeout_s = max(_LEAST_CALL_S, seconds_left(context, _MAX_CALL_S))
        answer = asyncio.ensure_future(self._caller.call(self._mesh_id, peer, request, tensors, timeout_s=timeout_s))
        ended = asyncio.ensure_future(driver.entry.ended.wait())
        try:
            await asyncio.wait((answer, ended), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise lost(driver)
            return answer.result()
        except PeerLost as exc:
            if driver.entry.rank not in exc.ranks:
                raise  # the rank lost a peer; otherwise it is the rank itself that does not answer
            await asyncio.wait((ended,), timeout=_SETTLE_S)
            raise lost(driver) from exc
        finally:
            answer.cancel()
            ended.cancel()


async def _write(method: Method, reply: FrontReply, context: _Context, waits: CallWaits) -> None:
    """Sends the answer as fast as it is read."""
    num_bytes = sum(map(len, reply.tensors))
    header = wire.CallResult(result=reply.response.driver_result, tensors=reply.response.tensors)
    waits.begin(num_bytes)
    for message in messages(method.response, {"result": header}, reply.tensors):
        await waits.until(context.write(message), lambda: f"its answer of {num_bytes} bytes was not read")


def _request(method: Method, first: Any, assembly: Assembly) -> front_pb2.FrontRequest:
    call = front_pb2.DriverCall(token=first.call.token, group=first.call.group)
    getattr(call.arguments, method.field).CopyFrom(first.arguments)
    if first.call.HasField("refusal"):
        call.refusal.CopyFrom(first.call.refusal)
    return front_pb2.FrontRequest(driver_call=call, tensors=assembly.metas)


async def _first(*waits: Any) -> None:
    """Returns when one of `waits` is done; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
