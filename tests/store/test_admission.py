"""Frequency filtering: exact to the occurrence, kept through everything; the sketch never late and seldom early."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stream.errors import StoreError
from stream.store import EmbeddingStore, PackedKeys
from stream.store.sketch import Sketch
from tests.store.conftest import Opener


def occur(store: EmbeddingStore, key: bytes, offset: int, ms: int = 1) -> list[bytes] | None:
    """Apply one event as the worker does; the payloads applied, None while the key waits."""
    admission = store.observe([key], [offset], [ms], [str(offset).encode()])
    if not admission.admitted[0]:
        with store.update([key]) as slots:
            assert slots.tolist() == [-1]
        return None
    events = [payload for _, held in admission.released for payload in held] + [str(offset).encode()]
    with store.update([key]) as slots:
        for payload in events:
            store.vectors[slots[0]] = store.vectors[slots[0]] * 0.5 + int(payload)
            store.events_seen[slots[0]] += 1
            store.last_event_ms[slots[0]] = ms
            store.applied_offset[slots[0]] = int(payload)
    return events


@pytest.mark.parametrize("threshold", [1, 2, 16, 1000])
@pytest.mark.parametrize("memory_rows", [None, 1, 100])
def test_given_a_threshold_then_the_nth_occurrence_admits_with_all_before_it(
    open_store: Opener, threshold: int, memory_rows: int | None
) -> None:
    name = None if memory_rows is None else "table"
    store = open_store(name, admission_threshold=threshold, memory_rows=memory_rows)
    unfiltered = open_store(None)

    applied = [occur(store, b"client", offset) for offset in range(threshold + 2)]
    for offset in range(threshold + 2):
        occur(unfiltered, b"client", offset)

    assert applied[: threshold - 1] == [None] * (threshold - 1)
    assert applied[threshold - 1] == [str(i).encode() for i in range(threshold)]
    assert applied[threshold:] == [[str(threshold).encode()], [str(threshold + 1).encode()]]
    mine, theirs = store.lookup([b"client"]), unfiltered.lookup([b"client"])
    assert mine.vectors.tobytes() == theirs.vectors.tobytes()
    assert mine.events_seen.tolist() == theirs.events_seen.tolist() == [threshold + 2]


def test_given_one_batch_with_many_occurrences_then_they_count_in_order(open_store: Opener) -> None:
    store = open_store(None, admission_threshold=3)

    admission = store.observe([b"a", b"b", b"a", b"a", b"a"], range(5), 1, [b"0", b"1", b"2", b"3", b"4"])

    assert admission.admitted.tolist() == [False, False, False, True, True]
    assert admission.released == [(3, [b"0", b"2"])]


def test_given_replayed_occurrences_then_they_are_not_counted_again(open_store: Opener) -> None:
    store = open_store(None, admission_threshold=3)
    for _ in range(5):
        assert occur(store, b"a", 0) is None
    assert occur(store, b"a", 1) is None
    assert occur(store, b"a", 2) == [b"0", b"1", b"2"]


def test_given_a_failed_update_then_the_occurrence_admits_again_when_retried(open_store: Opener) -> None:
    store = open_store(None, admission_threshold=2)
    store.observe([b"a"], [0], [1], [b"0"])
    store.observe([b"a"], [1], [1], [b"1"])
    with pytest.raises(KeyError), store.update([b"a"]):
        raise KeyError("model")
    assert not store.lookup([b"a"]).found[0]
    assert occur(store, b"a", 1) == [b"0", b"1"]


def test_given_restart_restore_and_snapshot_then_counts_and_held_events_are_kept(
    open_store: Opener, tmp_path: Path
) -> None:
    store = open_store("first", admission_threshold=4, memory_rows=50)
    for offset in range(2):
        occur(store, b"a", offset)
        occur(store, b"b" * 300, offset)
    records: list[tuple[bytes, bytes | None]] = []
    checkpoint = store.checkpoint()
    for keys, rows in checkpoint.slices(1):
        records += zip(keys, rows, strict=True)
    checkpoint.commit()
    store.snapshot().write(tmp_path / "snapshot")
    store.close()

    reopened = open_store("first", admission_threshold=4, memory_rows=50)
    restored = open_store("second", admission_threshold=4, memory_rows=50)
    restored.restore([key for key, _ in records], [row for _, row in records])
    loaded = open_store(None, admission_threshold=4)
    loaded.load([tmp_path / "snapshot"])

    for other in (reopened, restored, loaded):
        for key in (b"a", b"b" * 300):
            assert not other.lookup([key]).found[0]
            assert occur(other, key, 2) is None
            assert occur(other, key, 3) == [b"0", b"1", b"2", b"3"]


def test_given_a_key_that_expired_then_counting_starts_from_zero(open_store: Opener) -> None:
    store = open_store(admission_threshold=2, ttl_ms=10, memory_rows=5)
    occur(store, b"waits", 0, ms=1)
    occur(store, b"row", 1, ms=1)
    assert occur(store, b"row", 2, ms=1) is not None
    store.advance_watermark(11)

    assert not store.lookup([b"row"]).found[0]
    assert occur(store, b"row", 3, ms=12) is None
    assert occur(store, b"waits", 4, ms=12) is None
    assert occur(store, b"row", 5, ms=12) == [b"3", b"5"]
    assert store.lookup([b"row"]).events_seen.tolist() == [2]


def test_given_more_held_bytes_than_allowed_then_the_oldest_are_dropped_and_counted(open_store: Opener) -> None:
    store = open_store(None, admission_threshold=4, max_held_bytes=10)
    for offset in range(3):
        store.observe([b"a"], [offset], [1], [bytes([offset]) * 4])
    assert store.observe([b"a"], [3], [1], [b"now"]).released == [(0, [b"\1" * 4, b"\2" * 4])]
    assert store.stats.held_dropped == 1


def test_given_a_deleted_waiting_key_then_nothing_is_left_of_it(open_store: Opener) -> None:
    store = open_store(admission_threshold=2, memory_rows=5)
    occur(store, b"a", 0)
    store.flush()
    assert store.delete([b"a"]).tolist() == [False]
    store.flush()
    assert occur(store, b"a", 1) is None
    assert occur(store, b"a", 2) == [b"1", b"2"]


@pytest.mark.parametrize("threshold", [2, 16])
def test_given_the_sketch_then_nothing_is_late_and_few_are_early(threshold: int) -> None:
    nominal = 20_000
    sketch = Sketch(nominal, threshold, seed=1)
    keys = PackedKeys.from_int64(np.random.default_rng(0).integers(-(2**62), 2**62, 2 * nominal))
    early = np.zeros(2 * nominal, np.bool_)
    for half in (np.arange(nominal), np.arange(nominal, 2 * nominal)):
        part = keys.take(half)
        for _ in range(threshold - 1):
            early[half] |= sketch.count(part)
    assert early[:nominal].mean() <= 0.001
    assert early.mean() <= 0.02
    assert sketch.count(keys).all()
    assert sketch.nbytes <= 24 * nominal


def test_given_the_sketch_mode_then_counts_survive_a_restart_and_a_restore(open_store: Opener) -> None:
    options = {"admission_threshold": 3, "admission_mode": "sketch", "sketch_keys": 2000, "memory_rows": 10}
    store = open_store("first", **options)
    names = [f"value {i}".encode() for i in range(50)]
    assert not store.observe(names).admitted.any()
    checkpoint = store.checkpoint()
    records = [pair for keys, rows in checkpoint.slices(2) for pair in zip(keys, rows, strict=True)]
    checkpoint.commit()
    store.close()

    restored = open_store("second", **options)
    restored.restore([key for key, _ in records], [row for _, row in records])
    for other in (open_store("first", **options), restored):
        assert not other.observe(names).admitted.any()
        assert other.observe(names + names).admitted.all()
        with other.update(names) as slots:
            assert (slots >= 0).all()
            other.last_event_ms[slots] = 1
        assert other.lookup(names).found.all()


def test_given_the_sketch_mode_then_events_cannot_be_held(open_store: Opener) -> None:
    store = open_store(None, admission_threshold=2, admission_mode="sketch", sketch_keys=100)
    with pytest.raises(StoreError, match="admission_mode"):
        store.observe([b"a"], payloads=[b"event"])
