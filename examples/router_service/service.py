"""The service's routes."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

import epmesh
from epmesh import EpmeshError, Overloaded
from examples.moe_lm.config import load_config
from examples.moe_lm.numpy_model import NumpyModel
from examples.moe_lm.tokenizer import load_tokenizer
from examples.router_service.generator import TextGenerator
from examples.router_service.mesh import MeshWatch
from examples.router_service.metrics import ServiceMetrics
from examples.router_service.options import ServiceOptions
from examples.router_service.requests import GenerateRequest, body_of, headers_of, read_body, status_of

_log = logging.getLogger(__name__)
_CLIENT_GONE = 499  # no client sees it; the count of those that went away does


class TextService:
    """``/v1/generate``, ``/healthz`` and ``/metrics`` over one router."""

    def __init__(self, options: ServiceOptions) -> None:
        self._options = options
        self._router = epmesh.AsyncRouter(options.mesh, timeout_s=options.timeout_s, tls=options.tls_dir)
        self._watch = MeshWatch(options.mesh, load_config(), options.tls_dir)
        self._generator = TextGenerator(self._router, NumpyModel.load(), load_tokenizer())
        self._open = 0
        self.metrics = ServiceMetrics(
            lambda: self._router.stats, lambda: self._watch.epoch, lambda: not self._watch.why_not_ready()
        )

    def application(self) -> Starlette:
        """The service as an ASGI application, which closes the router at its end."""
        routes = [
            Route("/v1/generate", self.generate, methods=["POST"]),
            Route("/healthz", self.health),
            Route("/metrics", self.scrape),
        ]
        return Starlette(routes=routes, lifespan=self._life)

    async def generate(self, request: Request) -> Response:
        """Continues a prompt."""
        began = time.monotonic()
        try:
            with self._place():
                return await self._answer(request, began)
        except EpmeshError as error:
            if status_of(error) >= 500:
                _log.warning("generate.failed: %s: %s", type(error).__name__, error)
            return self._count(JSONResponse(body_of(error), status_of(error), headers_of(error)), began)
        except ClientDisconnect:
            return self._count(Response(status_code=_CLIENT_GONE), began)

    async def health(self, request: Request) -> Response:
        """200 where every expert can be asked, else 503 with the reason."""
        reason = self._watch.why_not_ready()
        return PlainTextResponse(f"{reason or 'ok'}\n", 503 if reason else 200)

    async def scrape(self, request: Request) -> Response:
        """Metrics in Prometheus' text format."""
        return Response(generate_latest(self.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @contextlib.asynccontextmanager
    async def _life(self, _: Starlette) -> AsyncIterator[None]:
        async with self._watch.following():
            try:
                yield
            finally:
                await self._router.close()

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """One of the requests that may be under way."""
        if self._open >= self._options.max_open:
            raise Overloaded(1.0, f"{self._open} requests are under way, which is the most; try again in a second")
        with self._counted():
            yield

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._open += 1
        self.metrics.open.set(self._open)
        try:
            yield
        finally:
            self._open -= 1
            self.metrics.open.set(self._open)

    async def _answer(self, request: Request, began: float) -> Response:
        options, deadline = self._options, began + self._options.timeout_s
        body = await read_body(request.stream(), options.max_body_bytes, options.timeout_s)
        wanted = GenerateRequest.parse(body, options.max_tokens)
        self._watch.require_mesh()
        prompt = self._generator.encode(wanted.prompt, wanted.max_tokens)
        pieces = self._generator.pieces(prompt, wanted.max_tokens, deadline)
        if wanted.stream:
            first = await anext(pieces, "")  # what fails at once has a status of its own
            return StreamingResponse(self._events(first, pieces, began), media_type="text/event-stream")
        text = ""
        async with aclosing(pieces):
            async for piece in pieces:
                self.metrics.tokens.inc()
                text += piece
                if await request.is_disconnected():
                    raise ClientDisconnect
        return self._count(JSONResponse({"text": text}), began)

    async def _events(self, first: str, pieces: AsyncGenerator[str], began: float) -> AsyncIterator[str]:
        """``data: {"text": ...}`` for every piece, then ``event: end``, or ``event: error`` with an error's body."""
        code = _CLIENT_GONE
        with self._counted():
            try:
                async with aclosing(pieces):
                    piece: str | None = first
                    while piece is not None:
                        self.metrics.tokens.inc()
                        yield _event({"text": piece})
                        piece = await anext(pieces, None)
                code = 200
                yield _event({}, "end")
            except EpmeshError as error:
                code = status_of(error)
                yield _event(body_of(error), "error")
            finally:
                self._observe(code, began)

    def _count(self, response: Response, began: float) -> Response:
        self._observe(response.status_code, began)
        return response

    def _observe(self, code: int, began: float) -> None:
        self.metrics.requests.labels(str(code)).inc()
        self.metrics.seconds.observe(time.monotonic() - began)


def _event(data: dict[str, str], kind: str = "") -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n" if kind else f"data: {json.dumps(data)}\n\n"
