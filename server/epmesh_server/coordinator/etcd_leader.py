"""Who of several coordinators leads: the one whose key it is, for as long as its etcd lease is kept alive.

The lease only makes a standby take over soon. What keeps a deposed leader from writing is the revision at which it
made its key: every write compares it in the same transaction (see `etcd_store`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from typing import Any

from epmesh.errors import MeshUnavailable
from epmesh_server.coordinator.etcd_client import EtcdClient, EtcdLocation, encoded

LEASE_S = 2  # the least that etcd grants with its usual settings
_POLL_S = 0.25
_LOG_EVERY_S = 5.0
_log = logging.getLogger(__name__)


class Leadership:
    """This process leads until its lease ends; a thread keeps it alive. Made by `campaign`.

    Attributes:
        client: for calls of the leader.
        location: where the mesh is.
        revision: at which the leader's key was made; no other leadership's.
    """

    def __init__(self, client: EtcdClient, location: EtcdLocation, lease: _Lease, revision: str) -> None:
        self.client, self.location, self.revision = client, location, revision
        self._lease = lease
        self._closing = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="etcd-lease", daemon=True)
        self._thread.start()

    @property
    def key(self) -> str:
        """The leader's key, as the API takes it."""
        return _leader_key(self.location)

    @property
    def lost(self) -> bool:
        """Whether the lease is over, or may be."""
        return self._lost.is_set() or self._lease.left_s() <= 0

    async def until_lost(self) -> None:
        """Waits until the lease is over.

        Raises:
            MeshUnavailable: always.
        """
        while True:
            if self.lost:
                raise MeshUnavailable(
                    f"this coordinator leads no more: its lease at {self.location} is over; restart it"
                )
            await asyncio.sleep(0.1)

    def close(self) -> None:
        """Gives the lead back, if etcd answers; idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join()
        with contextlib.suppress(MeshUnavailable):  # it ends by itself then
            self._lease.revoke()

    def _keep(self) -> None:
        while not self._closing.wait(self._lease.ttl_s / 4):
            try:
                alive = self._lease.renew()
            except MeshUnavailable as exc:
                _log.warning("etcd: the lease was not renewed, %.1f s are left: %s", self._lease.left_s(), exc)
                alive = self._lease.left_s() > 0
            if not alive:
                self._lost.set()
                return


class _Lease:
    """A lease of etcd; its end is counted from when the last renewal was sent, so it never seems longer than it is."""

    def __init__(self, client: EtcdClient) -> None:
        self._client = client
        sent = time.monotonic()
        answer = client.call("lease/grant", {"TTL": str(LEASE_S)})
        self.id, self.ttl_s = str(answer["ID"]), float(answer["TTL"])
        self._until = sent + self.ttl_s

    def left_s(self) -> float:
        return self._until - time.monotonic()

    def renew(self) -> bool:
        """Whether it is still there."""
        sent = time.monotonic()
        answer = self._client.call("lease/keepalive", {"ID": self.id}, within_s=self.ttl_s / 4)
        ttl_s = float(answer.get("result", {}).get("TTL", 0))
        if ttl_s > 0:
            self._until = sent + ttl_s
        return ttl_s > 0

    def revoke(self) -> None:
        self._client.call("lease/revoke", {"ID": self.id}, within_s=0.5)


async def lead(location: EtcdLocation, name: str, stop: asyncio.Event) -> Leadership | None:
    """Waits until this process leads; `None` where `stop` was set before.

    Args:
        location: where the mesh is.
        name: of this process, for whoever looks at the leader's key.
        stop: ends the wait.
    """
    ended = threading.Event()
    waiting = asyncio.create_task(asyncio.to_thread(campaign, location, name, ended))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((waiting, stopping), return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        ended.set()
        if (leadership := await waiting) is not None:
            await asyncio.to_thread(leadership.close)
        raise
    finally:
        ended.set()
        stopping.cancel()
    return await waiting


def campaign(location: EtcdLocation, name: str, ended: threading.Event) -> Leadership | None:
    """Polls until nobody leads, and leads then; `None` where `ended` was set before. Outlasts an etcd that is away."""
    client = EtcdClient(location.hosts)
    told = -_LOG_EVERY_S
    waited = False
    while not ended.is_set():
        try:
            if (leadership := _try(client, location, name)) is not None:
                return leadership
            if not waited:
                _log.info("another coordinator leads at %s: standing by", location)
                waited = True
        except MeshUnavailable as exc:
            if time.monotonic() - told >= _LOG_EVERY_S:
                told = time.monotonic()
                _log.warning("etcd is away, trying again: %s", exc)
        ended.wait(_POLL_S)
    return None


def _try(client: EtcdClient, location: EtcdLocation, name: str) -> Leadership | None:
    key = _leader_key(location)
    if client.call("kv/range", {"key": key}).get("kvs"):
        return None
    lease = _Lease(client)
    request: dict[str, Any] = {
        "compare": [{"key": key, "target": "CREATE", "result": "EQUAL", "create_revision": "0"}],
        "success": [{"request_put": {"key": key, "value": encoded(name), "lease": lease.id}}],
    }
    answer = client.call("kv/txn", request)  # where this raises, the lease ends by itself and its key with it
    if answer.get("succeeded"):
        return Leadership(client, location, lease, str(answer["header"]["revision"]))
    lease.revoke()
    return None


def _leader_key(location: EtcdLocation) -> str:
    return encoded(f"{location.prefix}/leader")
