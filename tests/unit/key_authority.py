"""A node service's key authority on an event loop of its own, for tests of sockets."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Self

from epmesh.curve import KeyPair
from epmesh.view import NodeInfo, RankInfo, RankMode, View
from epmesh_server.node.client_keys import ClientKeyTable
from epmesh_server.node.key_authority import KeyAuthority
from epmesh_server.node.views import ViewBoard

PATIENCE_S = 30.0
MESH = "mesh"


class Authority:
    """Use it in a with statement."""

    def __init__(self, lease_s: float = 30.0) -> None:
        self.pair = KeyPair.generate()
        self.board = ViewBoard()
        self.clients = ClientKeyTable(lease_s)
        self._folder = Path(tempfile.mkdtemp(prefix="epmesh-test-"))
        self.path = self._folder / "zap.sock"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._ranks: dict[int, RankInfo] = {}

    def __enter__(self) -> Self:
        self._thread.start()

        async def start() -> KeyAuthority:
            return KeyAuthority(self.path, self.pair, self.board, self.clients)

        self.authority = self.run(start())
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self.authority.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()
        shutil.rmtree(self._folder)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine on the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE_S)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a function on the loop."""

        async def called() -> Any:
            return function(*args)

        return self.run(called())

    def show(self, rank: int, incarnation: int, key: bytes, link_endpoint: str = "", front_endpoint: str = "") -> View:
        """Publishes a view that has a rank with this key, besides those shown before."""
        info = RankInfo(rank, incarnation, "cpu", RankMode.EXCHANGE, link_endpoint, front_endpoint, key)
        self._ranks[rank] = info
        ranks = tuple(self._ranks[number] for number in sorted(self._ranks))
        view = View(MESH, self.board.epoch + 1, 1, 8, (NodeInfo(0, "node-0", 1, "127.0.0.1:1", ranks),))
        self.call(self.board.publish, view.to_proto())
        return view
