"""The key-value store of a node."""

from __future__ import annotations

import asyncio

import pytest

from epmesh.errors import DeadlineExceeded, InvalidRequest, Overloaded, StaleEpoch
from epmesh_server.node.store import MAX_TOTAL_BYTES, MAX_VALUE_BYTES, KeyValueStore


def test_values_are_kept_by_key() -> None:
    store = KeyValueStore()
    store.set("1/a", b"x")
    store.set("1/a", b"y")
    assert asyncio.run(store.get("1/a", 0)) == b"y"
    assert store.exist(["1/a"])
    assert not store.exist(["1/a", "1/b"])
    assert store.delete("1/a")
    assert not store.delete("1/a")


def test_counters_count() -> None:
    store = KeyValueStore()
    assert [store.add("1/n", amount) for amount in (2, 3, -1)] == [2, 5, 4]
    assert asyncio.run(store.get("1/n", 0)) == b"4"
    store.set("1/n", b"x")
    with pytest.raises(InvalidRequest, match="no counter"):
        store.add("1/n", 1)


def test_a_conditional_write_says_what_is_there() -> None:
    store = KeyValueStore()
    assert store.compare_set("1/a", b"", b"first") == b"first"
    assert store.compare_set("1/a", b"", b"second") == b"first"
    assert store.compare_set("1/a", b"first", b"third") == b"third"
    assert store.compare_set("1/b", b"other", b"never") == b""


def test_a_reader_waits_for_its_writer() -> None:
    async def scenario() -> None:
        store = KeyValueStore()
        readers = [asyncio.create_task(store.get("1/a", 10)) for _ in range(3)]
        await asyncio.sleep(0)
        store.set("1/a", b"x")
        assert await asyncio.gather(*readers) == [b"x"] * 3
        with pytest.raises(DeadlineExceeded, match="nobody wrote key '1/b'"):
            await store.get("1/b", 0.01)

    asyncio.run(scenario())


def test_a_new_membership_drops_keys_and_sends_their_readers_away() -> None:
    async def scenario() -> None:
        store = KeyValueStore()
        store.set("1/a", b"x")
        store.set("2/a", b"y")
        reader = asyncio.create_task(store.get("1/b", 10))
        later = asyncio.create_task(store.get("3/b", 10))
        await asyncio.sleep(0)
        store.drop_before(2)
        with pytest.raises(StaleEpoch):
            await reader
        with pytest.raises(StaleEpoch, match="older than membership epoch 2"):
            store.set("1/a", b"z")
        assert len(store) == 1
        store.set("3/b", b"z")
        assert await later == b"z"
        store.drop_before(1)
        assert await store.get("2/a", 0) == b"y"

    asyncio.run(scenario())


def test_another_mesh_may_start_at_small_epochs_again() -> None:
    store = KeyValueStore()
    store.drop_before(9)
    store.set("9/a", b"x")
    store.clear()
    assert len(store) == 0
    store.set("1/a", b"x")


@pytest.mark.parametrize("key", ["", "a", "a/b", "/b", "-1/b", "1" * 30 + "/a", "1/" + "k" * 2000, "²/a"])
def test_keys_without_an_epoch_or_too_long_are_refused(key: str) -> None:
    with pytest.raises(InvalidRequest):
        KeyValueStore().set(key, b"")


def test_memory_is_bounded_and_given_back() -> None:
    store = KeyValueStore()
    with pytest.raises(InvalidRequest, match="at most"):
        store.set("1/a", bytes(MAX_VALUE_BYTES + 1))
    value = bytes(MAX_VALUE_BYTES)
    kept = MAX_TOTAL_BYTES // MAX_VALUE_BYTES - 1
    for number in range(kept):
        store.set(f"1/{number}", value)
        store.set(f"1/{number}", value)
    store.set("1/last", bytes(MAX_VALUE_BYTES // 2))
    with pytest.raises(Overloaded):
        store.set("1/more", value)
    store.delete("1/0")
    store.set("1/more", value)
    store.drop_before(2)
    store.set("2/0", value)
