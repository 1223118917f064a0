"""What the service is told at its start."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from epmesh import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """Limits of the service; every one is a bound, none a wish.

    Attributes:
        mesh: host:port of node services or a coordinator; the first that answers is used.
        max_tokens: most tokens a request may ask for.
        max_body_bytes: of a request.
        max_open: requests under way at once; one more is refused with 503 and Retry-After.
        timeout_s: for a whole request, waiting included.
        drain_s: how long requests under way may go on after SIGTERM.
        tls_dir: directory with ``ca.crt``, ``tls.crt`` and ``tls.key`` of a router, where the mesh is secured.
    """

    mesh: tuple[str, ...]
    max_tokens: int = 200
    max_body_bytes: int = 64 << 10
    max_open: int = 64
    timeout_s: float = 30.0
    drain_s: float = 20.0
    tls_dir: str | None = None

    def __post_init__(self) -> None:
        if not self.mesh:
            raise InvalidRequest("no mesh is named; give --mesh host:port[,host:port], or set EPMESH_MESH")
        for name in (one.name for one in fields(self) if one.type in ("int", "float")):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InvalidRequest(f"{name} is {value}; it must be positive")
