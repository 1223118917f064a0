"""How a servicer ends a call with a typed error; the other side is :func:`epmesh.errors.from_rpc_error`."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc

from epmesh.errors import METADATA_KEY, EpmeshError, status_code

# gRPC refuses a call whose metadata is larger than 8 KiB, the default of both sides. The error is there twice, as text
# in the details (percent-encoded, up to three bytes a byte) and as message (base64).
_MAX_DETAILS_BYTES = 512
_MAX_MESSAGE_BYTES = 1536
_MAX_LIST = 256


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: EpmeshError) -> NoReturn:
    """Ends the call behind `context` with `error`, as status code, details and trailing metadata.

    Call it from a grpc.aio servicer, unary or streaming. Long texts and lists are shortened to what gRPC carries.

    Raises:
        grpc.aio.AbortError: always; let it pass.
    """
    message = error.to_proto()
    message.message = _shortened(message.message, _MAX_MESSAGE_BYTES)
    del message.ranks[_MAX_LIST:]
    del message.experts[_MAX_LIST:]
    metadata = ((METADATA_KEY, message.SerializeToString()),)
    await context.abort(status_code(error), _shortened(str(error), _MAX_DETAILS_BYTES), metadata)
    raise AssertionError("abort always raises")


def _shortened(text: str, limit: int) -> str:
    """`text` in at most `limit` bytes of UTF-8, never in the middle of a character."""
    data = text.encode(errors="replace")
    return text if len(data) <= limit else data[: limit - 3].decode(errors="ignore") + "..."
