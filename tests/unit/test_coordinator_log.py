"""The log on disk: nothing acknowledged is lost, nothing torn is believed, nothing damaged is read over."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epmesh.errors import InvalidRequest, MeshUnavailable
from epmesh.view import NodeInfo, RankInfo, RankMode, View
from epmesh_server.coordinator import log as log_module
from epmesh_server.coordinator.log import LOG_NAME, MAGIC, FileStore, MemoryStore, Store
from epmesh_server.membership import (
    EpochUsed,
    MeshCreated,
    NodeRegistered,
    RanksLost,
    Record,
    Registration,
    Snapshot,
    ViewCommitted,
)
from tests.unit.fake_mesh import FakeMesh, fold, two_nodes

CREATED = MeshCreated("mesh", 8)


def registered(slot: int, incarnation: int = 1) -> NodeRegistered:
    return NodeRegistered(Registration(f"node-{slot}", incarnation, f"10.0.0.{slot}:7400", "0.1.0"), slot)


def committed(epoch: int) -> ViewCommitted:
    info = RankInfo(0, epoch, "cpu", RankMode.EXCHANGE, "tcp://127.0.0.1:1")
    return ViewCommitted(View("mesh", epoch, epoch, 8, (NodeInfo(0, "node-0", 1, "h:1", (info,)),)))


BATCHES: list[list[Record]] = [
    [CREATED],
    [registered(0), registered(1)],
    [EpochUsed(1, 65_536)],
    [RanksLost(((0, 7),)), committed(1)],
    [registered(1, 2)],
    [EpochUsed(2, 65_537), RanksLost(((8, 3),))],
    [committed(2)],
]


def folded(batches: Sequence[Sequence[Record]]) -> list[Record]:
    return list(fold(record for batch in batches for record in batch).records())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "state" / "coordinator"


def written(directory: Path, batches: Sequence[Sequence[Record]] = BATCHES) -> bytes:
    """The log with one frame for each batch."""
    store = FileStore(directory)
    assert store.load() == []
    for batch in batches:
        store.append(batch)
    store.close()
    return (directory / LOG_NAME).read_bytes()


def read(directory: Path) -> list[Record]:
    store = FileStore(directory)
    try:
        return store.load()
    finally:
        store.close()


def records_or_refusal(directory: Path) -> list[Record] | InvalidRequest:
    try:
        return read(directory)
    except InvalidRequest as error:
        return error


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, directory: Path) -> Iterator[Store]:
    made: Store = FileStore(directory) if request.param == "file" else MemoryStore()
    yield made
    made.close()
    made.close()


def test_a_new_store_is_empty_and_takes_records(store: Store) -> None:
    assert store.load() == []
    for batch in BATCHES:
        store.append(batch)


def test_what_was_written_is_read_again(directory: Path) -> None:
    written(directory)
    assert read(directory) == folded(BATCHES)
    assert read(directory) == folded(BATCHES)


def test_a_log_is_rewritten_to_what_matters_when_it_is_opened(directory: Path) -> None:
    size = len(written(directory, [*BATCHES, *([committed(epoch)] for epoch in range(3, 300))]))
    read(directory)
    assert (directory / LOG_NAME).stat().st_size < size / 50
    assert sorted(path.name for path in directory.iterdir()) == ["lock", LOG_NAME]


def test_a_long_log_is_rewritten_while_it_is_in_use(directory: Path) -> None:
    store = FileStore(directory, compact_at_bytes=4096)
    store.load()
    store.append([CREATED])
    sizes = []
    for epoch in range(1, 400):
        store.append([EpochUsed(epoch, 65_536)])
        store.append([committed(epoch)])
        sizes.append((directory / LOG_NAME).stat().st_size)
    store.close()
    assert max(sizes) < 8192
    assert read(directory) == [CREATED, EpochUsed(399, 65_536), committed(399)]


def test_a_log_that_cannot_be_rewritten_is_gone_on_with(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(directory, compact_at_bytes=256)
    store.load()
    store.append([CREATED])

    def full(self: FileStore) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileStore, "_write_snapshot", full)
    for epoch in range(1, 50):
        store.append([committed(epoch)])
    monkeypatch.undo()
    store.close()
    assert read(directory)[-1] == committed(49)


@pytest.mark.parametrize("torn", range(1, 60, 7))
def test_a_torn_tail_is_cut_off_with_a_warning(directory: Path, torn: int, caplog: pytest.LogCaptureFixture) -> None:
    whole = written(directory)
    (directory / LOG_NAME).write_bytes(whole[:-torn])
    assert read(directory) == folded(BATCHES[:-1])
    assert "half written" in caplog.text
    assert str(directory / LOG_NAME) in caplog.text


def test_every_byte_at_which_a_crash_may_cut_leaves_what_was_acknowledged(directory: Path) -> None:
    ends = [len(MAGIC)]
    for count in range(1, len(BATCHES) + 1):
        where = directory.with_name(f"of-{count}")
        ends.append(len(written(where, BATCHES[:count])))
    whole = written(directory)
    for size in range(len(whole) + 1):
        (directory / LOG_NAME).write_bytes(whole[:size])
        acknowledged = sum(end <= size for end in ends[1:])
        assert read(directory) == folded(BATCHES[:acknowledged]), size


def test_a_tail_of_zeros_is_torn_too(directory: Path) -> None:
    whole = written(directory)
    (directory / LOG_NAME).write_bytes(whole + bytes(5000))
    assert read(directory) == folded(BATCHES)


@settings(max_examples=150, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_in_the_last_frame(
    tmp_path_factory: pytest.TempPathFactory, where: float, bit: int
) -> None:
    directory = tmp_path_factory.mktemp("log")
    data = bytearray(written(directory))
    last = len(written(directory.with_name(directory.name + "-short"), BATCHES[:-1]))
    at = int(where * len(data))
    data[at] ^= 1 << bit
    (directory / LOG_NAME).write_bytes(data)
    found = records_or_refusal(directory)
    if isinstance(found, InvalidRequest):
        assert str(directory / LOG_NAME) in str(found)
        assert "put a copy of it from before in its place" in str(found)
    else:
        assert at >= last
        assert found == folded(BATCHES[:-1])


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200), prefix=st.booleans())
def test_any_other_file_is_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes, prefix: bool) -> None:
    directory = tmp_path_factory.mktemp("log")
    (directory / LOG_NAME).write_bytes(MAGIC + data if prefix else data)
    found = records_or_refusal(directory)
    assert found == [] or (isinstance(found, InvalidRequest) and "is damaged at byte" in str(found))


def test_a_refused_log_is_left_as_it_is(directory: Path) -> None:
    data = bytearray(written(directory))
    data[40] ^= 1
    (directory / LOG_NAME).write_bytes(data)
    with pytest.raises(InvalidRequest):
        read(directory)
    assert (directory / LOG_NAME).read_bytes() == data


def test_a_frame_larger_than_any_that_is_written_is_refused_unread(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(directory)
    monkeypatch.setattr(log_module, "MAX_FRAME_BYTES", 60)
    with pytest.raises(InvalidRequest, match="at most 60"):
        read(directory)


def test_a_record_larger_than_a_frame_may_be_is_not_written(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(directory)
    store.load()
    store.append([CREATED])
    monkeypatch.setattr(log_module, "MAX_FRAME_BYTES", 60)
    with pytest.raises(MeshUnavailable, match="larger than 60"):
        store.append([committed(1)])
    store.append([EpochUsed(1, 65_536)])
    store.close()
    monkeypatch.undo()
    assert read(directory) == [CREATED, EpochUsed(1, 65_536)]


def test_a_log_begins_with_its_mesh(directory: Path) -> None:
    written(directory, [[registered(0)]])
    with pytest.raises(InvalidRequest, match="NodeRegistered stands where it cannot"):
        read(directory)


def test_a_directory_belongs_to_one_coordinator(directory: Path) -> None:
    store = FileStore(directory)
    with pytest.raises(InvalidRequest, match=rf"{directory} is in use .*process {os.getpid()}.*--data-dir"):
        FileStore(directory)
    store.close()
    FileStore(directory).close()


def test_directory_and_files_are_the_users_alone(directory: Path) -> None:
    written(directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()] == [0o600, 0o600]


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="--data-dir"):
        FileStore(tmp_path / "file" / "below")


def test_after_a_failed_write_nothing_is_appended_any_more(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(directory)
    store.load()
    store.append([CREATED])

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(MeshUnavailable, match="Input/output error"):
        store.append([registered(0)])
    monkeypatch.undo()
    with pytest.raises(MeshUnavailable, match="restart the coordinator"):
        store.append([registered(1)])
    store.close()


def test_every_record_is_on_disk_when_append_returns(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def counted(descriptor: int) -> None:
        fsync(descriptor)
        synced.append((directory / LOG_NAME).stat().st_size if (directory / LOG_NAME).exists() else 0)

    monkeypatch.setattr(os, "fsync", counted)
    store = FileStore(directory)
    store.load()
    assert len(synced) == 3  # the directory's entry, the file, the file's entry
    for batch in BATCHES:
        store.append(batch)
        assert synced[-1] == (directory / LOG_NAME).stat().st_size
    assert len(synced) == 3 + len(BATCHES)
    store.close()


def test_a_whole_meshs_history_comes_back(directory: Path) -> None:
    mesh, a, b = two_nodes()
    mesh.report_links(a, (0, 8))
    mesh.advance(0.2)
    mesh.kill_rank(b, 9)
    mesh.settle()
    written(directory, [mesh.records])
    records = read(directory)
    assert records == list(fold(mesh.records).records())
    assert FakeMesh(records=records).view == mesh.view


def test_an_empty_snapshot_has_no_records() -> None:
    assert list(Snapshot().records()) == []
