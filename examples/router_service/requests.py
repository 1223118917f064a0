"""What a request may say, and which HTTP status an error is."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterable
from dataclasses import dataclass

from epmesh import (
    DeadlineExceeded,
    EpmeshError,
    ExpertUnavailable,
    InvalidRequest,
    MeshUnavailable,
    NotReady,
    Overloaded,
)

_STATUS: dict[type[EpmeshError], int] = {
    InvalidRequest: 400,
    Overloaded: 503,
    ExpertUnavailable: 503,
    MeshUnavailable: 503,
    NotReady: 503,
    DeadlineExceeded: 504,
}


class BodyTooLarge(InvalidRequest):
    """A request's body is longer than is taken; 413 by HTTP."""


@dataclass(frozen=True)
class GenerateRequest:
    """Body of ``POST /v1/generate``.

    Attributes:
        prompt: what to continue.
        max_tokens: most tokens to add.
        stream: whether the text is wanted as it grows, as server-sent events.
    """

    prompt: str
    max_tokens: int = 32
    stream: bool = False

    @classmethod
    def parse(cls, body: bytes, max_tokens: int) -> GenerateRequest:
        """Reads a body.

        Raises:
            InvalidRequest: names the value, and what it must be.
        """
        try:
            given = json.loads(body)
        except (ValueError, RecursionError) as exc:
            raise InvalidRequest(f"the body is no JSON: {exc}") from exc
        if not isinstance(given, dict):
            raise InvalidRequest("the body must be an object with prompt and max_tokens")
        if unknown := sorted(set(given) - {"prompt", "max_tokens", "stream"}):
            raise InvalidRequest(f"unknown fields {unknown}; there are prompt, max_tokens and stream")
        prompt, count, stream = given.get("prompt"), given.get("max_tokens", cls.max_tokens), given.get("stream", False)
        if not isinstance(prompt, str):
            raise InvalidRequest(f"prompt is {_shown(prompt)}; it must be a string")
        if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= max_tokens:
            raise InvalidRequest(f"max_tokens is {_shown(count)}; it must be 1 to {max_tokens}")
        if not isinstance(stream, bool):
            raise InvalidRequest(f"stream is {_shown(stream)}; it must be true or false")
        return cls(prompt, count, stream)


async def read_body(chunks: AsyncIterable[bytes], max_bytes: int, timeout_s: float) -> bytes:
    """All of a body, unless it is too long: then the rest is not read.

    Raises:
        BodyTooLarge: it has more than `max_bytes`.
        DeadlineExceeded: it did not come within `timeout_s`.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in chunks:
                body += chunk
                if len(body) > max_bytes:
                    raise BodyTooLarge(f"the body has more than {max_bytes} bytes")
    except TimeoutError:
        raise DeadlineExceeded(message=f"the body did not come within {timeout_s:g} s") from None
    return bytes(body)


def status_of(error: EpmeshError) -> int:
    """HTTP status of an error; 500 for what experts raised."""
    if isinstance(error, BodyTooLarge):
        return 413
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)


def headers_of(error: EpmeshError) -> dict[str, str]:
    """Retry-After, in whole seconds, where trying again makes sense."""
    if isinstance(error, Overloaded):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    return {"Retry-After": "1"} if status_of(error) == 503 else {}


def body_of(error: EpmeshError) -> dict[str, str]:
    """What a caller is told."""
    return {"error": type(error).__name__, "message": str(error)}


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
