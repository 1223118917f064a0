"""``GET /metrics`` on a service's own event loop, over HTTP or HTTPS: no thread, few connections, with deadlines."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from epmesh.addresses import join_address
from epmesh.errors import InvalidRequest, Unauthenticated
from epmesh_server.metrics_guard import MetricsGuard

_log = logging.getLogger(__name__)

PATH = "/metrics"
_MAX_CONNECTIONS = 16
_MAX_HEAD_BYTES = 8192
_WITHIN_S = 5.0
_REASONS = {
    200: "OK",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    500: "Internal Server Error",
}


@contextlib.asynccontextmanager
async def serve_metrics(
    host: str, port: int, registry: CollectorRegistry, guard: MetricsGuard | None = None
) -> AsyncIterator[str]:
    """Answers while the block runs; gives the bound ``host:port``.

    Args:
        port: 0 takes a free one.
        registry: asked at every scrape, on the event loop.
        guard: who may ask, over TLS; `None`: everybody, in plain HTTP.

    Raises:
        InvalidRequest: the port cannot be bound.
    """
    scrapes = _Scrapes(registry, guard)
    secured: dict[str, Any] = {} if guard is None else {"ssl": guard.context, "ssl_handshake_timeout": _WITHIN_S}
    try:
        server = await asyncio.start_server(scrapes.connected, host.strip("[]"), port, limit=_MAX_HEAD_BYTES, **secured)
    except OSError as exc:
        raise InvalidRequest(
            f"cannot listen for metrics at {join_address(host, port)}: {exc.strerror or exc}; choose another "
            f"--metrics-port, or 0 for none"
        ) from exc
    bound = join_address(host, server.sockets[0].getsockname()[1])
    _log.info("metrics at %s://%s%s", "http" if guard is None else "https", bound, PATH)
    try:
        yield bound
    finally:
        server.close()
        await scrapes.close()
        await server.wait_closed()


@contextlib.asynccontextmanager
async def maybe_metrics(
    host: str, port: int | None, registry: CollectorRegistry, guard: MetricsGuard | None = None
) -> AsyncIterator[str]:
    """As `serve_metrics`; with `None` for a port there are none, and the address is empty."""
    if port is None:
        yield ""
        return
    async with serve_metrics(host, port, registry, guard) as bound:
        yield bound


class ServiceCollector(Collector):
    """Metrics of one service, collected on its event loop."""

    def registry(self) -> CollectorRegistry:
        """A registry with these metrics alone."""
        registry = CollectorRegistry()
        registry.register(self)
        return registry

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: no name here can meet another one's."""
        return ()


def of_view(epoch: int, nodes: int, ranks: int) -> Iterator[Metric]:
    """What every service says of the newest view."""
    yield GaugeMetricFamily("epmesh_epoch", "The newest view that this process knows.", epoch)
    yield GaugeMetricFamily("epmesh_view_nodes", "Nodes of that view.", nodes)
    yield GaugeMetricFamily("epmesh_view_ranks", "Ranks of that view.", ranks)


class _Scrapes:
    """The connections that are open."""

    def __init__(self, registry: CollectorRegistry, guard: MetricsGuard | None) -> None:
        self._registry = registry
        self._guard = guard
        self._open: set[asyncio.Task[None]] = set()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request and its answer; one connection too many is closed without."""
        task = asyncio.current_task()
        assert task is not None
        if len(self._open) >= _MAX_CONNECTIONS:
            writer.close()
            return
        self._open.add(task)
        try:
            async with asyncio.timeout(_WITHIN_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._refusal(writer) or answer_of(head, self._registry))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as exc:
            _log.debug("metrics.failed: %s", exc)
        finally:
            self._open.discard(task)
            writer.close()

    def _refusal(self, writer: asyncio.StreamWriter) -> bytes | None:
        """The answer to somebody who may not ask."""
        if self._guard is None:
            return None
        try:
            self._guard.check(writer.get_extra_info("ssl_object"))
        except Unauthenticated as error:
            return _response(403, f"{error}\n".encode())
        return None

    async def close(self) -> None:
        """Ends what is under way."""
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)


def answer_of(head: bytes, registry: CollectorRegistry) -> bytes:
    """The whole answer to a request whose head this is."""
    method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
    target, _, version = rest.partition(b" ")
    if not version.startswith(b"HTTP/1."):
        return _response(400, b"this is no HTTP request\n")
    if target.partition(b"?")[0] != PATH.encode():
        return _response(404, f"there is only {PATH}\n".encode())
    if method not in (b"GET", b"HEAD"):
        return _response(405, b"only GET is answered\n")
    try:
        body = generate_latest(registry)
    except Exception:  # noqa: BLE001 - a figure that cannot be had must not end the service
        _log.exception("metrics.failed")
        return _response(500, b"see the log\n")
    return _response(200, body, CONTENT_TYPE_LATEST, with_body=method == b"GET")


def _response(
    status: int, body: bytes, content_type: str = "text/plain; charset=utf-8", *, with_body: bool = True
) -> bytes:
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        f"Connection: close\r\n\r\n"
    )
    return head.encode() + (body if with_body else b"")
