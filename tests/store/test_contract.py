"""What every table does, whatever its mode: one suite, all modes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stream.errors import StoreError
from stream.store import EmbeddingStore, PackedKeys, StoreOptions

WIDTH = 4
N = 700

MODES: dict[str, dict[str, Any]] = {
    "in memory": {},
    "in memory, with a changelog": {"changelog": True},
    "in memory, growing": {"reserve_rows": 1},
    "on disk, all in memory": {"memory_rows": 10_000},
    "on disk, few in memory": {"memory_rows": 16},
    "on disk, one in memory": {"memory_rows": 1},
    "on disk, without cold copies": {"memory_rows": 16, "cold_rows": 0},
    "on disk, with cold copies": {"memory_rows": 16, "cold_rows": 10_000},
    "on disk, with few cold copies": {"memory_rows": 16, "cold_rows": 50},
    "with optimizer state": {"state_width": 3, "memory_rows": 16},
    "with a cap and a ttl that nothing reaches": {"max_rows": 10**6, "ttl_ms": 10**12, "memory_rows": 16},
    "with times to live of each event": {"ttl_ms": 10**11, "event_ttls_ms": (10**10, None), "memory_rows": 16},
    "one hash for all keys": {"memory_rows": 600, "hasher": lambda keys: np.zeros(len(keys), np.uint64)},
}


@pytest.fixture(params=MODES, ids=lambda name: name.replace(" ", "_"))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EmbeddingStore]:
    options = dict(MODES[request.param])
    hasher = options.pop("hasher", None)
    path = tmp_path / "table" if "memory_rows" in options else None
    with EmbeddingStore.open(path, StoreOptions(width=WIDTH, **options), hasher=hasher) as opened:
        yield opened


@pytest.fixture
def keys() -> PackedKeys:
    """Keys of every length from 1 to 1,024 bytes, all different, many sharing long prefixes."""
    return PackedKeys.from_list([bytes([i % 251]) * (1 + i * 1023 // (N - 1)) + b"" for i in range(N)])


@pytest.fixture
def vectors() -> np.ndarray:
    return np.random.default_rng(3).random((N, WIDTH), np.float32)


def test_given_upserted_rows_when_looked_up_then_they_are_found_bit_for_bit(
    store: EmbeddingStore, keys: PackedKeys, vectors: np.ndarray
) -> None:
    store.upsert(keys, vectors, event_ms=np.arange(N) + 1, offsets=np.arange(N))

    found = store.lookup(keys.take(np.arange(N)[::-1]))

    assert found.found.all()
    assert (found.vectors == vectors[::-1]).all()
    assert (found.last_event_ms == np.arange(N)[::-1] + 1).all()
    assert (found.applied_offset == np.arange(N)[::-1]).all()
    assert (found.events_seen == 1).all()
    assert len(store) == N


def test_given_a_miss_then_the_default_is_read_and_nothing_is_made(store: EmbeddingStore) -> None:
    found = store.lookup([b"nobody", b"no one"], default=[1, 2, 3, 4])

    assert not found.found.any()
    assert found.vectors.tolist() == [[1, 2, 3, 4]] * 2
    assert found.applied_offset.tolist() == [-1, -1]
    assert len(store) == 0


def test_given_duplicates_in_an_upsert_then_they_apply_in_order(store: EmbeddingStore) -> None:
    store.upsert([b"a", b"b", b"a"], [[1] * 4, [2] * 4, [3] * 4], event_ms=[5, 6, 4], offsets=[7, 8, 9])

    found = store.lookup([b"a", b"b"])

    assert found.vectors[:, 0].tolist() == [3, 2]
    assert found.events_seen.tolist() == [2, 1]
    assert found.last_event_ms.tolist() == [5, 6]
    assert found.applied_offset.tolist() == [9, 8]


def test_given_duplicates_in_an_update_then_they_share_a_slot(store: EmbeddingStore) -> None:
    with store.update([b"a", b"b", b"a"]) as slots:
        assert slots[0] == slots[2] != slots[1]
        for slot in slots:
            store.vectors[slot] += 1

    assert store.lookup([b"a", b"b"]).vectors[:, 0].tolist() == [2, 1]


def test_given_keys_that_differ_in_one_byte_anywhere_then_they_are_different_rows(store: EmbeddingStore) -> None:
    base = bytes(1024)
    names = [base[:i] + b"\x01" + base[i + 1 :] for i in (0, 7, 8, 15, 16, 17, 511, 1023)]
    names += [base, base[:-1], base[:16], base[:15], base[:8], base[:1]]

    store.upsert(names, np.arange(len(names) * WIDTH).reshape(-1, WIDTH), event_ms=1)

    assert store.lookup(names).vectors[:, 0].tolist() == [i * WIDTH for i in range(len(names))]
    assert len(store) == len(names)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_given_a_position_that_no_key_has_when_keys_are_taken_then_it_is_named(wrong: int) -> None:
    keys = PackedKeys.from_list([b"a", b"bc", b"d"])

    with pytest.raises(IndexError, match=f"key {wrong} of 3"):
        keys.take([2, wrong])

    assert list(keys.take([2, 1, 1])) == [b"d", b"bc", b"bc"]
    assert list(keys.take([])) == []


def test_given_integers_of_the_full_range_then_each_is_its_own_key(store: EmbeddingStore) -> None:
    values = np.array([-(2**63), -1, 0, 1, 255, 256, 2**63 - 1])

    store.upsert(PackedKeys.from_int64(values), np.arange(28).reshape(7, 4), event_ms=1)

    assert store.lookup(PackedKeys.from_int64(values)).vectors[:, 0].tolist() == [0, 4, 8, 12, 16, 20, 24]


def test_given_deleted_rows_then_they_are_gone_and_a_new_one_starts_from_zero(
    store: EmbeddingStore, keys: PackedKeys, vectors: np.ndarray
) -> None:
    store.upsert(keys, vectors, event_ms=1)

    had = store.delete([keys[3], keys[3], b"nobody"])

    assert had.tolist() == [True, False, False]
    assert not store.lookup([keys[3]]).found[0]
    assert len(store) == N - 1
    with store.update([keys[3]]) as slots:
        assert not store.rows[slots].any()
        assert store.events_seen[slots[0]] == 0
        store.last_event_ms[slots] = 1
    assert store.lookup([keys[3]]).found[0]


def test_given_many_deletions_then_all_other_rows_are_still_found(
    store: EmbeddingStore, keys: PackedKeys, vectors: np.ndarray
) -> None:
    rng = np.random.default_rng(0)
    present = np.zeros(N, np.bool_)
    for _ in range(12):
        chosen = np.unique(rng.integers(0, N, 150))
        store.upsert(keys.take(chosen), vectors[chosen], event_ms=1)
        present[chosen] = True
        gone = np.unique(rng.integers(0, N, 100))
        assert store.delete(keys.take(gone)).tolist() == present[gone].tolist()
        present[gone] = False
        found = store.lookup(keys)
        assert (found.found == present).all()
        assert (found.vectors[present] == vectors[present]).all()


def test_given_rows_when_scanned_then_each_comes_once(
    store: EmbeddingStore, keys: PackedKeys, vectors: np.ndarray
) -> None:
    store.upsert(keys, vectors, event_ms=1)
    store.flush()
    store.upsert(keys.take(np.arange(10)), vectors[:10] + 1, event_ms=2)

    seen = {key: rows.vectors[i].copy() for part, rows in store.scan(64) for i, key in enumerate(part)}

    assert len(seen) == N
    expected = vectors.copy()
    expected[:10] += 1
    assert all((seen[key] == expected[i]).all() for i, key in enumerate(keys))


def test_given_an_exception_inside_update_then_every_row_is_as_before(store: EmbeddingStore) -> None:
    store.upsert([b"old"], [[1, 2, 3, 4]], event_ms=1, offsets=5)

    def fail() -> None:
        with store.update([b"old", b"new", b"old"]) as slots:
            store.rows[slots] = 9
            store.events_seen[slots] = 9
            store.applied_offset[slots] = 9
            raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError, match="model failed"):
        fail()

    found = store.lookup([b"old", b"new"])
    assert found.found.tolist() == [True, False]
    assert found.vectors[0].tolist() == [1, 2, 3, 4]
    assert (found.events_seen[0], found.applied_offset[0]) == (1, 5)
    assert len(store) == 1


def test_given_lookups_inside_update_then_rows_do_not_move(
    store: EmbeddingStore, keys: PackedKeys, vectors: np.ndarray
) -> None:
    store.upsert(keys, vectors, event_ms=1)

    with store.update(keys.take([0, 1])) as slots:
        before = store.vectors[slots].copy()
        assert store.lookup(keys).found.all()
        assert (store.vectors[slots] == before).all()


def test_given_a_snapshot_when_loaded_then_contents_are_equal_bit_for_bit(
    store: EmbeddingStore, keys: PackedKeys, vectors: np.ndarray, tmp_path: Path
) -> None:
    store.upsert(keys, vectors, event_ms=np.arange(N) + 1, offsets=np.arange(N))
    snapshot = store.snapshot({"offset": b"699"})
    store.upsert(keys, vectors + 1, event_ms=N + 1)
    store.delete(keys.take(np.arange(100)))

    assert snapshot.write(tmp_path / "snapshot") == N

    options = StoreOptions(width=WIDTH, state_width=store.options.state_width)
    with EmbeddingStore.open(None, options) as other:
        assert other.load([tmp_path / "snapshot"]) == [{"offset": b"699"}]
        found = other.lookup(keys)
        assert found.found.all()
        assert (found.vectors == vectors).all()
        assert (found.applied_offset == np.arange(N)).all()


def test_given_wrong_arguments_then_they_are_refused_by_name(store: EmbeddingStore) -> None:
    with pytest.raises(StoreError, match=r"upsert vectors: shape \(1, 3\); \(1, 4\) is needed"):
        store.upsert([b"a"], [[1, 2, 3]])
    with pytest.raises(StoreError, match="lookup default"):
        store.lookup([b"a"], default=[1])
    with pytest.raises(StoreError, match="key 1: 0 bytes long; a key has 1 to 1024 bytes"):
        store.lookup([b"a", b""])
    with pytest.raises(StoreError, match="key 0: 1025 bytes long"):
        store.lookup([b"a" * 1025])
    with store.update([b"a"]), pytest.raises(StoreError, match="inside update"):
        store.delete([b"a"])
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.lookup([b"a"])
    assert store.stats.rows == len(store) == 1


def test_given_empty_batches_then_nothing_happens(store: EmbeddingStore) -> None:
    store.upsert([], np.empty((0, WIDTH)))
    assert store.lookup([]).vectors.shape == (0, WIDTH)
    assert store.delete([]).shape == (0,)
    with store.update([]) as slots:
        assert slots.shape == (0,)
    assert list(store.scan()) == []
    assert len(store) == 0


def test_given_no_cold_rows_option_then_copies_come_as_rows_leave_and_are_bounded(tmp_path: Path) -> None:
    with EmbeddingStore.open(tmp_path / "table", StoreOptions(width=WIDTH, memory_rows=16)) as store:
        assert (store.stats.cold_rows, store.stats.cold_bytes) == (0, 0)
        keys = PackedKeys.from_int64(np.arange(1000))
        for start in range(0, 1000, 100):
            part = keys.take(np.arange(start, start + 100))
            store.upsert(part, np.full((100, WIDTH), start), event_ms=1)
        assert store.stats.memory_rows <= 16
        assert 100 <= store.stats.cold_rows <= 160
        assert store.stats.cold_bytes < 1 << 20
        assert (store.lookup(keys).vectors[:, 0] == np.arange(1000) // 100 * 100).all()
        reads = store.stats.disk_reads
        store.lookup(keys.take(np.arange(984, 1000)))
        assert store.stats.disk_reads == reads, "just read, so in memory or copied"


FULL = """
import resource, signal, sys
import numpy as np
from stream.store import EmbeddingStore, PackedKeys, StoreOptions
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600 << 10, 600 << 10))
keys = PackedKeys.from_int64(np.arange(5000))
with EmbeddingStore.open(sys.argv[1], StoreOptions(width=4, memory_rows=1000)) as store:
    store.upsert(keys, np.arange(20_000).reshape(5000, 4), event_ms=1)
    store.upsert([b"long" * 200], np.ones((1, 4)), event_ms=1)
    assert (store.lookup(keys).vectors[:, 0] == np.arange(0, 20_000, 4)).all()
    print(store.stats.cold_rows, store.stats.cold_bytes)
"""


def test_given_no_room_for_copies_then_the_table_goes_on_without(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path / "table")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    copies, taken = map(int, done.stdout.split())
    assert copies == 0
    assert taken < 600 << 10
