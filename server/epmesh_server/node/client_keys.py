"""Leases on clients' keys: whom, besides members, the fronts of this node's ranks admit, and for how long.

Used on the event loop only. Every lease has a number, and the user id of its connections has it too: that is how a
rank, which is told of leases that ended, tells a connection that has outlived its lease.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass

from epmesh.curve import check_key
from epmesh.errors import Overloaded, Unauthenticated
from epmesh.v1 import rank_service_pb2
from epmesh_server.curve_users import ClientUser, printable
from epmesh_server.revocation import CertificateId
from epmesh_server.token_bucket import TokenBuckets

LEASE_S = 30.0
MAX_LEASES, MAX_LEASES_A_CLIENT = 8192, 1024
NEW_LEASES_A_SECOND = 16.0
"""Of one client, after as many at once as it may have: every rank of the node hears of each."""
_RETRY_AFTER_S = 1.0


@dataclass
class _Lease:
    """One key's lease; the owner of `user` is who may renew and release it, `certificate` what that showed last."""

    user: ClientUser
    until: float
    certificate: CertificateId | None


class ClientKeyTable:
    """All running leases."""

    def __init__(self, lease_s: float = LEASE_S, clock: Callable[[], float] = time.monotonic) -> None:
        """Nobody has a lease yet; the clock's seconds are those of `lease_s`."""
        self.lease_s = lease_s
        self.ended = 0  # leases that did
        self._clock = clock
        self._numbers = itertools.count(1)
        self._newest = 0
        self._by_key: dict[bytes, _Lease] = {}  # ascending by end: renewing puts a lease at the end
        self._by_owner: Counter[str] = Counter()
        self._new = TokenBuckets(NEW_LEASES_A_SECOND, MAX_LEASES_A_CLIENT)
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._by_key)

    def lease(self, key: bytes, name: str, owner: str, certificate: CertificateId | None = None) -> None:
        """Begins or renews a lease.

        Args:
            certificate: the lease ends with it, should it be revoked.

        Raises:
            InvalidRequest: the key is none.
            Unauthenticated: somebody else leased it.
            Overloaded: there are too many, of this owner or in all, or the owner begins too many in a short time.
        """
        check_key(key)
        self.end_late()
        known = self._by_key.pop(key, None)
        if known is not None and known.user.owner != owner:
            self._by_key[key] = known
            raise Unauthenticated(f"this key is leased by {known.user.name!r}; make a key pair of your own")
        if known is None:
            self._check_room(owner)
            self._newest = next(self._numbers)
            known = _Lease(ClientUser(self._newest, owner, printable(name)), 0.0, certificate)
            self._by_owner[owner] += 1
            self._notify()
        known.until, known.certificate = self._clock() + self.lease_s, certificate
        self._by_key[key] = known

    def release(self, key: bytes, owner: str) -> None:
        """Ends a lease, if `owner` has it."""
        known = self._by_key.get(key)
        if known is not None and known.user.owner == owner:
            self._end(key)
            self._notify()

    def end_revoked(self, revoked: Container[CertificateId]) -> None:
        """Ends the leases that were last renewed with a certificate among `revoked`."""
        ended = [key for key, lease in self._by_key.items() if lease.certificate in revoked]
        for key in ended:
            self._end(key)
        if ended:
            self._notify()

    def users(self, key: bytes) -> Mapping[bytes, str]:
        """User id by key: of this one alone, if its lease runs."""
        known = self._by_key.get(key)
        return {key: str(known.user)} if known is not None and known.until > self._clock() else {}

    def end_late(self) -> float | None:
        """Ends what was not renewed in time; seconds until the next lease ends, `None` where there is none."""
        now, ended = self._clock(), False
        while self._by_key and (first := next(iter(self._by_key.values()))).until <= now:
            self._end(next(iter(self._by_key)))
            ended = True
        if ended:
            self._notify()
        return first.until - now if self._by_key else None

    def notice(self) -> rank_service_pb2.ClientKeys:
        """What ranks are told."""
        live = sorted(lease.user.lease for lease in self._by_key.values())
        return rank_service_pb2.ClientKeys(newest=self._newest, live=live)

    @property
    def next_change(self) -> asyncio.Event:
        """Set by the next change from now on; taken before something is decided, it tells whether that still holds."""
        return self._changed

    async def changed(self) -> None:
        """Returns after the next change."""
        await self._changed.wait()

    async def expire(self) -> None:
        """Ends leases when their time comes, until cancelled."""
        while True:
            left_s = self.end_late()
            await asyncio.sleep(self.lease_s / 4 if left_s is None else min(left_s, self.lease_s / 4) + 0.01)

    def _check_room(self, owner: str) -> None:
        if len(self._by_key) >= MAX_LEASES:
            raise Overloaded(_RETRY_AFTER_S, f"{len(self._by_key)} keys are leased here; there can be no more")
        if self._by_owner[owner] >= MAX_LEASES_A_CLIENT:
            raise Overloaded(
                _RETRY_AFTER_S, f"{owner} has {self._by_owner[owner]} keys leased here; close clients it does not need"
            )
        wait_s = self._new.take(owner, self._clock())
        if wait_s:
            raise Overloaded(wait_s, f"{owner} leases new keys too often here; keep clients and their keys")

    def _end(self, key: bytes) -> None:
        lease = self._by_key.pop(key)
        self.ended += 1
        owner = lease.user.owner
        self._by_owner[owner] -= 1
        if not self._by_owner[owner]:
            del self._by_owner[owner]

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
