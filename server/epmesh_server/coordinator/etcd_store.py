"""The coordinator's records in etcd: one key for each batch, written by the leader alone.

::

    PREFIX/leader              who leads, bound to a lease
    PREFIX/log/NUMBER          LogBatch, what one `append` wrote; numbers of 16 digits, without a hole

Every transaction compares the revision at which the leader's key was made, so that a deposed leader writes nothing. Now
and then one transaction puts all that still matters in the place of all batches.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf.message import DecodeError

from epmesh.errors import EpmeshError, InvalidRequest, MeshUnavailable
from epmesh.v1 import log_pb2
from epmesh_server.coordinator.etcd_client import decoded, encoded
from epmesh_server.coordinator.etcd_leader import Leadership
from epmesh_server.coordinator.wire import record_from_proto, record_to_proto
from epmesh_server.membership import MeshCreated, Record, Snapshot

MAX_BATCH_BYTES = 1 << 20  # etcd takes requests of 1.5 MiB, and base64 is not counted
COMPACT_AT_BATCHES = 256
_PAGE_BATCHES = 64
_LOAD_TIMEOUT_S = 5.0
_log = logging.getLogger(__name__)


class EtcdStore:
    """A log in etcd, for as long as this process leads."""

    def __init__(self, leadership: Leadership, *, compact_at_batches: int = COMPACT_AT_BATCHES) -> None:
        """Takes over the leadership: `close` ends it."""
        self._leadership = leadership
        self._log = f"{leadership.location.prefix}/log/"
        self._compact_at_batches = compact_at_batches
        self._snapshot = Snapshot()
        self._sizes: dict[int, int] = {}  # of the batches in etcd, by number
        self._next = 0
        self._failed = False

    def load(self) -> list[Record]:
        """All that still matters of the log.

        Raises:
            InvalidRequest: it is damaged, or of a newer version.
            MeshUnavailable: etcd does not answer.
        """
        for number, batch in self._batches():
            if self._sizes and number != self._next:
                raise self._damaged(self._next, "it is missing, and later ones are there")
            for record in self._records(number, batch):
                self._snapshot.apply(record)
            self._sizes[number] = len(batch)
            self._next = number + 1
        return list(self._snapshot.records())

    def append(self, records: Sequence[Record]) -> None:
        """Adds records as one batch; a majority of etcd has them when this returns.

        Raises:
            MeshUnavailable: this process leads no more, or etcd did not answer; nothing can be appended any more.
        """
        if self._failed or self._leadership.lost:
            raise MeshUnavailable(f"log at {self._leadership.location} is no longer this coordinator's; restart it")
        batch = _batch(records)
        self._failed = True  # until it is known to be there
        self._write(self._next, batch, [])
        self._failed = False
        self._sizes[self._next] = len(batch)
        self._next += 1
        for record in records:
            self._snapshot.apply(record)
        if len(self._sizes) > self._compact_at_batches:
            self._compact()

    @property
    def num_bytes(self) -> int:
        """Size of all batches."""
        return sum(self._sizes.values())

    def close(self) -> None:
        """Gives the lead back; idempotent."""
        self._failed = True
        self._leadership.close()

    def _compact(self) -> None:
        """Puts what matters in the place of all batches; where that is too large the log is gone on with."""
        try:
            batch = _batch(self._snapshot.records())
        except MeshUnavailable as exc:
            self._compact_at_batches *= 2
            _log.warning("log at %s was not compacted: %s", self._leadership.location, exc)
            return
        self._failed = True
        everything = {"key": encoded(self._log), "range_end": self._key(self._next)}
        self._write(self._next, batch, [{"request_delete_range": everything}])
        self._failed = False
        self._sizes = {self._next: len(batch)}
        self._next += 1

    def _write(self, number: int, batch: bytes, others: list[dict[str, Any]]) -> None:
        """Puts one batch, once, however often etcd is asked to.

        Raises:
            MeshUnavailable: it was not, or may not have been.
        """
        key, leader = self._key(number), self._leadership.key
        ours = {"key": leader, "target": "CREATE", "result": "EQUAL", "create_revision": self._leadership.revision}
        new = {"key": key, "target": "CREATE", "result": "EQUAL", "create_revision": "0"}
        request = {
            "compare": [ours, new],
            "success": [*others, {"request_put": {"key": key, "value": encoded(batch)}}],
            "failure": [{"request_range": {"key": leader}}, {"request_range": {"key": key}}],
        }
        answer = self._leadership.client.call("kv/txn", request)
        if not answer.get("succeeded") and not self._written_before(answer, batch):
            raise MeshUnavailable(f"another coordinator leads at {self._leadership.location}; this one must end")

    def _written_before(self, answer: dict[str, Any], batch: bytes) -> bool:
        """Whether a member carried the write out and could not say so, and another was asked then."""
        leader, found = (part["response_range"].get("kvs", []) for part in answer["responses"])
        ours = bool(leader) and leader[0]["create_revision"] == self._leadership.revision
        return ours and bool(found) and decoded(found[0]["value"]) == batch

    def _batches(self) -> Iterable[tuple[int, bytes]]:
        start, end = encoded(self._log), encoded(self._log + "~")
        more = True
        while more:
            request = {"key": start, "range_end": end, "limit": str(_PAGE_BATCHES)}
            answer = self._leadership.client.call("kv/range", request, _LOAD_TIMEOUT_S)
            pairs, more = answer.get("kvs", []), bool(answer.get("more"))
            for pair in pairs:
                key = decoded(pair["key"])
                yield self._number(key), decoded(pair.get("value", ""))
                start = encoded(key + b"\0")

    def _key(self, number: int) -> str:
        return encoded(f"{self._log}{number:016d}")

    def _number(self, key: bytes) -> int:
        digits = key.decode(errors="replace").removeprefix(self._log)
        if not (digits.isascii() and digits.isdigit() and len(digits) == 16):
            raise self._damaged(digits, "it is no number of 16 digits")
        return int(digits)

    def _records(self, number: int, batch: bytes) -> list[Record]:
        try:
            records = [record_from_proto(message) for message in log_pb2.LogBatch.FromString(batch).records]
        except (DecodeError, EpmeshError) as exc:
            raise self._damaged(number, str(exc)) from exc
        for at, record in enumerate(records):
            if isinstance(record, MeshCreated) is not (at == 0 and not self._sizes):
                raise self._damaged(number, f"a {type(record).__name__} stands where it cannot")
        return records

    def _damaged(self, which: int | str, why: str) -> InvalidRequest:
        return InvalidRequest(
            f"log at {self._leadership.location} is damaged at batch {which}: {why}; restore etcd from a backup, "
            f"or choose another prefix to start a new mesh, in which every rank must join again"
        )


def _batch(records: Iterable[Record]) -> bytes:
    batch = log_pb2.LogBatch(records=map(record_to_proto, records)).SerializeToString()
    if len(batch) > MAX_BATCH_BYTES:
        raise MeshUnavailable(
            f"a record of {len(batch)} bytes is larger than {MAX_BATCH_BYTES}, which etcd takes; the mesh is too large"
        )
    return batch
