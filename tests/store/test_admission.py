"""Frequency filtering: exact to the occurrence, kept through everything; the sketch never late and seldom early."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.errors import StoreError
from stream.store import EmbeddingStore, PackedKeys, StoreOptions
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


@dataclass
class Ledger:
    """A worker's view of one partition: the log, its own position, and what a crash leaves of the rest."""

    log: list[tuple[bytes, float]]
    position: int = 0
    committed: int = 0
    records: list[tuple[bytes, bytes | None]] = field(default_factory=list)


def consume(store: EmbeddingStore, ledger: Ledger, stop: int) -> None:
    """One batch through observe() and update(), as the README has it."""
    offsets = np.arange(ledger.position, stop)
    keys = [ledger.log[offset][0] for offset in offsets]
    admission = store.observe(keys, offsets, 1, [str(offset).encode() for offset in offsets])
    assert admission.stop == len(keys)
    events = [int(payload) for _, held in admission.released for payload in held]
    events += offsets[admission.admitted].tolist()
    with store.update([ledger.log[offset][0] for offset in events]) as slots:
        for slot, offset in zip(slots.tolist(), events, strict=True):
            if offset > store.applied_offset[slot]:
                store.vectors[slot] = store.vectors[slot] * np.float32(0.7) + np.float32(ledger.log[offset][1])
                store.events_seen[slot] += 1
                store.last_event_ms[slot] = 1
                store.applied_offset[slot] = offset
    ledger.position = stop


@given(
    names=st.lists(st.sampled_from([b"a", b"b", b"c", b"d-of-more-than-sixteen-bytes"]), min_size=1, max_size=80),
    threshold=st.sampled_from([1, 2, 3, 16]),
    memory_rows=st.sampled_from([1, 2, 50]),
    steps=st.lists(
        st.one_of(
            st.integers(1, 30),
            st.sampled_from(["checkpoint", "slow checkpoint", "crash", "crash, disk lost"]),
        ),
        max_size=14,
    ),
)
@settings(max_examples=int(os.environ.get("LIVESTATE_EXAMPLES", "60")), deadline=None)
def test_given_batches_cut_anywhere_and_crashes_then_rows_equal_those_without_a_filter(
    names: list[bytes], threshold: int, memory_rows: int, steps: list[int | str]
) -> None:
    ledger = Ledger([(key, float(i % 7 - 3)) for i, key in enumerate(names)])
    options = StoreOptions(width=2, admission_threshold=threshold, memory_rows=memory_rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table"
        store = EmbeddingStore.open(path, options)
        for move in [*steps, len(names)]:
            if isinstance(move, int):
                consume(store, ledger, min(ledger.position + move, len(names)))
            elif move.endswith("checkpoint"):
                at, taken = ledger.position, store.checkpoint()
                for keys, rows in taken.slices(2):
                    ledger.records += zip(keys, rows, strict=True)
                    if move.startswith("slow") and ledger.position < len(names):
                        # Rows given out may be newer than the position, and admitted since.
                        consume(store, ledger, ledger.position + 1)
                taken.commit({"records": str(len(ledger.records)).encode()})
                ledger.committed = at
            else:
                store.close()
                if move.endswith("lost"):
                    shutil.rmtree(path)
                store = EmbeddingStore.open(path, options)
                rest = ledger.records[int(store.meta("records") or b"0") :]
                store.restore([key for key, _ in rest], [row for _, row in rest])
                ledger.position = ledger.committed

        with EmbeddingStore.open(None, StoreOptions(width=2)) as unfiltered:
            consume(unfiltered, Ledger(ledger.log), len(names))
            mine, theirs = store.lookup(names), unfiltered.lookup(names)
        enough = np.array([names.count(key) >= threshold for key in names])
        assert (mine.found == enough).all()
        for got, wanted in zip(mine, theirs, strict=True):
            assert got[enough].tobytes() == wanted[enough].tobytes()
        assert len(store) == len({key for key in names if names.count(key) >= threshold})
        store.close()


def test_given_a_batch_that_moves_time_then_waiting_keys_and_rows_start_over_within_it(open_store: Opener) -> None:
    store = open_store(None, admission_threshold=2, ttl_ms=100)
    assert occur(store, b"row", 0, ms=1) is None
    assert occur(store, b"row", 1, ms=1) == [b"0", b"1"]
    store.advance_watermark(1)

    # The third moves time past the second's and the row's; what comes after starts from zero.
    keys = [b"waits", b"mover", b"waits", b"row", b"row", b"waits"]
    admission = store.observe(keys, range(2, 8), [2, 200, 201, 202, 203, 204], [b"2", b"3", b"4", b"5", b"6", b"7"])

    assert admission.admitted.tolist() == [False, False, False, False, True, True]
    assert admission.released == [(4, [b"5"]), (5, [b"4"])]
    assert admission.gone == []
    assert admission.stop == 6
    assert store.stats.expired == 1


def test_given_a_row_of_the_batch_that_expires_in_it_then_observe_stops_before_it(open_store: Opener) -> None:
    store = open_store(None, admission_threshold=2, ttl_ms=100)
    keys = [b"a", b"a", b"b", b"a", b"a"]
    offsets, times = np.arange(5), np.array([1, 2, 500, 501, 502])
    payloads = [str(offset).encode() for offset in offsets]

    first = store.observe(keys, offsets, times, payloads)
    with store.update([b"a", b"a"]) as slots:
        store.events_seen[slots[0]] = 2
        store.last_event_ms[slots[0]] = 2
        store.applied_offset[slots[0]] = 1
    store.advance_watermark(500)
    second = store.observe(keys[3:], offsets[3:], times[3:], payloads[3:])

    assert first.stop == 3
    assert first.admitted.tolist() == [False, True, False, False, False]
    assert second.stop == 2
    assert second.admitted.tolist() == [False, True]
    assert second.released == [(1, [b"3"])]


def test_given_a_row_found_expired_then_its_key_is_reported_gone_and_so_it_is_on_a_replay(open_store: Opener) -> None:
    store = open_store(admission_threshold=2, ttl_ms=10, memory_rows=1)
    occur(store, b"a", 0)
    occur(store, b"a", 1)
    store.advance_watermark(100)

    assert store.observe([b"a"], [2], [100], [b"2"]).gone == [b"a"]
    assert store.observe([b"b"], [3], [100], [b"3"]).gone == []
    assert store.sweep(1000.0) == [b"a"], "for a caller who does not look at gone"
    # The tombstone may have been lost with the process that was to send it.
    assert store.observe([b"a", b"a"], [1, 2], [1, 100], [b"1", b"2"]).gone == [b"a"]
    assert store.observe([b"a"], [4], [100], [b"4"]).released == [(0, [b"2"])]
    assert len(store) == 0, "a row only once it is updated"


def test_given_an_event_that_itself_moves_time_past_its_row_then_the_row_starts_over(open_store: Opener) -> None:
    store = open_store(None, admission_threshold=2, ttl_ms=10)
    occur(store, b"a", 0, ms=1)
    occur(store, b"a", 1, ms=1)
    assert store.observe([b"a"], [2], [10], [b"2"]).admitted.tolist() == [True]
    assert store.observe([b"a"], [2], [11], [b"2"]).gone == [b"a"]
