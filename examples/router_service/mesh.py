"""What the service knows of the mesh: whether it is in reach, and whether somebody holds every expert."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from functools import partial

import epmesh
from epmesh.view import RankMode, View
from examples.moe_lm.config import MoeConfig

_log = logging.getLogger(__name__)
_TRY_S = 2.0  # for one try to connect; SIGTERM waits for no more than that
_NAMED_EXPERTS = 8


class MeshWatch:
    """Follows the views of a mesh that may not be there yet: a name server that is late stops nobody."""

    def __init__(self, addresses: Sequence[str], config: MoeConfig, tls_dir: str | None = None) -> None:
        self._addresses, self._config, self._tls_dir = addresses, config, tls_dir
        self._mesh: epmesh.Mesh | None = None
        self._problem = "not connected yet"

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Connects in the background, as often as it takes."""
        connecting = asyncio.create_task(self._connect())
        try:
            yield
        finally:
            connecting.cancel()
            await asyncio.gather(connecting, return_exceptions=True)
            if self._mesh is not None:
                await asyncio.to_thread(self._mesh.close)

    @property
    def epoch(self) -> int:
        """Of the newest view; 0 before the first."""
        return self._mesh.view.epoch if self._mesh else 0

    def require_mesh(self) -> None:
        """Lets requests pass once the mesh was in reach; the router follows it from then on.

        Raises:
            MeshUnavailable: with the last try's reason.
        """
        if self._mesh is None:
            raise epmesh.MeshUnavailable(self._problem)

    def why_not_ready(self) -> str:
        """Why a request would fail now; empty where it would not."""
        if self._mesh is None:
            return self._problem
        if not self._mesh.connected:
            return f"no node service or coordinator can be reached; the last one was {self._mesh.address}"
        return missing_experts(self._mesh.view, self._config)

    async def _connect(self) -> None:
        while self._mesh is None:
            connect = partial(epmesh.connect, self._addresses, timeout_s=_TRY_S, tls=self._tls_dir)
            trying = asyncio.create_task(asyncio.to_thread(connect))
            try:
                self._mesh = await asyncio.shield(trying)
            except asyncio.CancelledError:
                with contextlib.suppress(epmesh.EpmeshError):
                    self._mesh = await trying  # a thread cannot be stopped, and what it brings has to be closed
                raise
            except epmesh.EpmeshError as error:
                if str(error) != self._problem:
                    _log.warning("mesh.failed: %s", error)
                self._problem = str(error)
                await asyncio.sleep(_TRY_S / 4)
        _log.info("mesh.complete: epoch %d at %s", self._mesh.view.epoch, self._mesh.address)


def missing_experts(view: View, config: MoeConfig) -> str:
    """Why not every expert of the model has a rank that serves it; empty where every one has."""
    serving = {info.rank for info in view.ranks.values() if info.mode is RankMode.SERVE and info.front_endpoint}
    if not serving:
        return f"no rank serves in epoch {view.epoch}"
    for layer in range(config.num_layers):
        placement = view.placement(layer)
        if placement is None:
            return f"no experts of layer {layer} are placed in epoch {view.epoch}"
        if placement.num_experts != config.num_experts:
            return f"the mesh has {placement.num_experts} experts in layer {layer}, the model {config.num_experts}"
        missing = [expert for expert, holders in enumerate(placement.holders) if not serving & set(holders)]
        if missing:
            more = " and more" if len(missing) > _NAMED_EXPERTS else ""
            return f"nobody serves experts {missing[:_NAMED_EXPERTS]}{more} of layer {layer} in epoch {view.epoch}"
    return ""
