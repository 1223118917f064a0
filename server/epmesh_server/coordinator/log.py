"""The coordinator's memory: records, each durable before anybody hears of it.

::

    file   = magic frame*
    frame  = length u32 | CRC-32 of the bytes u32 | CRC-32 of the eight bytes before u32 | bytes   (little endian)
    bytes  = LogBatch, what one `append` wrote

A frame is there whole or not at all. A crash leaves at most the last frame torn: nobody was told of it, so it is cut
off. Anything else that does not add up is damage, and refused, for a log with a hole would let epochs come back.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from google.protobuf.message import DecodeError

from epmesh.errors import EpmeshError, InvalidRequest, MeshUnavailable
from epmesh.v1 import log_pb2
from epmesh_server.coordinator.wire import record_from_proto, record_to_proto
from epmesh_server.membership import MeshCreated, Record, Snapshot

LOG_NAME, LOCK_NAME = "membership.log", "lock"
MAGIC = b"epmesh log 1\n"
MAX_FRAME_BYTES = 64 << 20
COMPACT_AT_BYTES = 64 << 20

_HEADER = struct.Struct("<III")
_WORDS = struct.Struct("<II")
_log = logging.getLogger(__name__)


class Store(Protocol):
    """Where a coordinator keeps its records. Called from one thread at a time; may block."""

    def load(self) -> list[Record]:
        """All records, or fewer that fold into the same `Snapshot`; called once, first.

        Raises:
            InvalidRequest: the store is damaged.
        """

    def append(self, records: Sequence[Record]) -> None:
        """Adds records, all or none of them; they are durable when this returns.

        Raises:
            MeshUnavailable: they may not be, and nothing can be appended any more.
        """

    @property
    def num_bytes(self) -> int:
        """What the records take."""

    def close(self) -> None:
        """Lets go of the store; idempotent."""


class MemoryStore:
    """A store that lives as long as its object."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.records = list(records)

    def load(self) -> list[Record]:
        """All records."""
        return list(self.records)

    def append(self, records: Sequence[Record]) -> None:
        """Adds records."""
        self.records.extend(records)

    @property
    def num_bytes(self) -> int:
        """None of any disk."""
        return 0

    def close(self) -> None:
        """Nothing to let go of."""


class FileStore:
    """A log in a directory of its own, held by an exclusive lock."""

    def __init__(self, directory: Path, *, compact_at_bytes: int = COMPACT_AT_BYTES) -> None:
        """Takes the directory, which is made when missing.

        Raises:
            InvalidRequest: another coordinator has it, or it cannot be written.
        """
        self._directory = directory
        self._path = directory / LOG_NAME
        self._compact_at_bytes = compact_at_bytes
        self._snapshot = Snapshot()
        self._file: BinaryIO | None = None
        self._bytes = 0
        self._compacted_bytes = 0
        self._failed = False
        try:
            _make_directory(directory)
            self._lock = _lock(directory)
        except OSError as exc:
            raise InvalidRequest(
                f"data directory {directory} cannot be used: {exc.strerror}; choose another with --data-dir"
            ) from exc

    def load(self) -> list[Record]:
        """All that still matters of the log; rewrites it so that it holds no more than that.

        Raises:
            InvalidRequest: the log is damaged, or of a newer version.
        """
        try:
            for record in self._read():
                self._snapshot.apply(record)
            self._compact()
        except OSError as exc:
            raise InvalidRequest(f"log {self._path} cannot be used: {exc.strerror}") from exc
        return list(self._snapshot.records())

    @property
    def num_bytes(self) -> int:
        """Size of the log."""
        return self._bytes

    def append(self, records: Sequence[Record]) -> None:
        """Adds records as one frame and waits until they are on disk."""
        if self._file is None or self._failed:
            raise MeshUnavailable(f"log {self._path} is closed, or failed before; restart the coordinator")
        frame = _frame(records)
        try:
            _write(self._file, frame)
            self._bytes += len(frame)
            for record in records:
                self._snapshot.apply(record)
            if self._bytes > max(self._compact_at_bytes, 4 * self._compacted_bytes):
                self._compact_if_possible()
        except OSError as exc:
            # What a failed fsync left on disk is unknown: only a fresh start can tell.
            self._failed = True
            raise MeshUnavailable(
                f"log {self._path} cannot be written: {exc.strerror}; make room and restart the coordinator"
            ) from exc

    def close(self) -> None:
        """Closes the log and releases the directory; idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._lock.close()

    def _read(self) -> Iterator[Record]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            reader = _Reader(file, self._path)
            for batch in reader.batches():
                yield from reader.records(batch)

    def _compact_if_possible(self) -> None:
        try:
            self._write_snapshot()
        except OSError as exc:
            self._compacted_bytes = self._bytes  # the log is whole all the same; try again when it is much larger
            _log.warning("log %s was not compacted: %s", self._path, exc)
        else:
            self._replace()

    def _compact(self) -> None:
        self._write_snapshot()
        self._replace()

    @property
    def _fresh(self) -> Path:
        return self._path.with_suffix(".new")

    def _write_snapshot(self) -> None:
        """Writes all that matters into a file beside the log."""
        frames = (_frame((record,)) for record in self._snapshot.records())
        descriptor = os.open(self._fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            _write(file, MAGIC + b"".join(frames))

    def _replace(self) -> None:
        """Puts that file in the log's place; from the rename on, only it may be appended to."""
        file = self._fresh.open("ab")
        try:
            self._fresh.rename(self._path)
            _fsync_directory(self._directory)
        except OSError:
            file.close()
            raise
        if self._file is not None:
            self._file.close()
        self._file = file
        self._bytes = self._compacted_bytes = os.fstat(file.fileno()).st_size


class _Reader:
    """Reads a log from its start and knows where damage is."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._size = os.fstat(file.fileno()).st_size
        self._at = 0
        self._first = True

    def batches(self) -> Iterator[bytes]:
        """The bytes of every whole frame.

        Raises:
            InvalidRequest: there is damage before the end.
        """
        magic = self._file.read(len(MAGIC))
        if magic != MAGIC[: len(magic)] or len(magic) < min(len(MAGIC), self._size):
            raise self._damaged(f"it starts with {magic!r}, not {MAGIC!r}")
        while (batch := self._next()) is not None:
            yield batch

    def records(self, batch: bytes) -> Iterator[Record]:
        """What a batch holds.

        Raises:
            InvalidRequest: it is damaged or of a newer version.
        """
        try:
            messages = log_pb2.LogBatch.FromString(batch).records
            records = [record_from_proto(message) for message in messages]
        except (DecodeError, EpmeshError) as exc:
            raise self._damaged(str(exc)) from exc
        for record in records:
            if self._first is not isinstance(record, MeshCreated):
                raise self._damaged(f"a {type(record).__name__} stands where it cannot")
            self._first = False
            yield record

    def _next(self) -> bytes | None:
        """The next frame's bytes, or `None` at the end or at a torn last frame."""
        self._at = self._file.tell()
        left = self._size - self._at
        header = self._file.read(_HEADER.size)
        if len(header) == _HEADER.size and any(header):
            length, checksum = self._checked(header)
            batch = self._file.read(length) if _HEADER.size + length <= left else b""
            if len(batch) == length and zlib.crc32(batch) == checksum:
                return batch
            if _HEADER.size + length < left:
                raise self._damaged("the checksum of a frame is wrong, and others follow it")
        elif len(header) == _HEADER.size and not self._is_zero(left - len(header)):
            raise self._damaged("a frame's header is zero, and more follows it")
        self._cut_off(left)
        return None

    def _is_zero(self, num_bytes: int) -> bool:
        """A file system may make a file longer and never write what belongs there: then all is zero."""
        return num_bytes <= MAX_FRAME_BYTES and not any(self._file.read(num_bytes))

    def _checked(self, header: bytes) -> tuple[int, int]:
        """Length and checksum of a frame; the length is not used before it is known to be what was written."""
        length, checksum, header_checksum = _HEADER.unpack(header)
        if zlib.crc32(header[: _WORDS.size]) != header_checksum:
            raise self._damaged("the checksum of a frame's header is wrong")
        if length > MAX_FRAME_BYTES:
            raise self._damaged(f"a frame has {length} bytes, and at most {MAX_FRAME_BYTES} are written")
        return length, checksum

    def _cut_off(self, num_bytes: int) -> None:
        if num_bytes:
            _log.warning(
                "log %s: cut off %d bytes at its end, which a crash left half written and nobody was told of",
                self._path,
                num_bytes,
            )

    def _damaged(self, why: str) -> InvalidRequest:
        return InvalidRequest(
            f"log {self._path} is damaged at byte {self._at}: {why}; put a copy of it from before in its place, "
            f"or move it away to start a new mesh, in which every rank must join again"
        )


def _write(file: BinaryIO, data: bytes) -> None:
    """Writes and waits until it is on disk."""
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _frame(records: Iterable[Record]) -> bytes:
    batch = log_pb2.LogBatch(records=map(record_to_proto, records)).SerializeToString()
    if len(batch) > MAX_FRAME_BYTES:
        raise MeshUnavailable(f"a record of {len(batch)} bytes is larger than {MAX_FRAME_BYTES}; the mesh is too large")
    words = _WORDS.pack(len(batch), zlib.crc32(batch))
    return words + struct.pack("<I", zlib.crc32(words)) + batch


def _make_directory(directory: Path) -> None:
    if not directory.is_dir():
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _fsync_directory(directory.parent)


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(directory: Path) -> BinaryIO:
    """Holds the directory for as long as the file is open: the kernel lets go of it with the process."""
    path = directory / LOCK_NAME
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = file.read(32).decode(errors="replace").strip()
        file.close()
        raise InvalidRequest(
            f"data directory {directory} is in use by another coordinator (process {holder or 'unknown'}); "
            f"stop it, or choose another with --data-dir"
        ) from None
    except OSError:
        file.close()
        raise
    file.truncate(0)
    file.write(f"{os.getpid()}\n".encode())
    return file
