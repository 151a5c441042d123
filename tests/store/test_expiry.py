"""Rows end by age or by number: exactly then, everywhere, and leave nothing behind."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stream.errors import StoreError
from stream.store import EmbeddingStore, PackedKeys, StoreOptions
from tests.store.conftest import Opener

ONE = np.ones((1, 4), np.float32)


def tombstones(store: EmbeddingStore) -> set[bytes]:
    checkpoint = store.checkpoint()
    gone = {key for keys, rows in checkpoint.slices(3) for key, row in zip(keys, rows, strict=True) if row is None}
    checkpoint.commit()
    return gone


@pytest.mark.parametrize("memory_rows", [1, 100])
@pytest.mark.parametrize("flushed", [False, True])
def test_given_age_equal_to_ttl_then_the_row_is_expired_and_one_less_is_not(
    open_store: Opener, memory_rows: int, flushed: bool
) -> None:
    store = open_store(memory_rows=memory_rows, ttl_ms=1000)
    store.upsert([b"a"], ONE, event_ms=5000)
    store.upsert([b"b"], ONE, event_ms=5001)
    if flushed:
        store.flush()

    store.advance_watermark(6000)

    assert store.lookup([b"a", b"b"]).found.tolist() == [False, True]
    assert [key for keys, _ in store.scan() for key in keys] == [b"b"]


def test_given_late_input_then_neither_watermark_nor_row_moves_back(open_store: Opener) -> None:
    store = open_store(ttl_ms=100)
    store.upsert([b"a"], ONE, event_ms=1000)
    store.advance_watermark(1000)
    store.upsert([b"a"], ONE, event_ms=950)
    store.advance_watermark(500)
    with store.update([b"a"], now_ms=400):
        pass

    assert store.watermark_ms == 1000
    assert store.lookup([b"a"]).last_event_ms.tolist() == [1000]


def test_given_reads_only_then_a_row_expires_all_the_same(open_store: Opener) -> None:
    store = open_store(ttl_ms=100)
    store.upsert([b"a"], ONE, event_ms=1)
    for ms in range(1, 101):
        store.advance_watermark(ms)
        assert store.lookup([b"a"]).found[0]
    store.advance_watermark(101)
    assert not store.lookup([b"a"]).found[0]


@pytest.mark.parametrize("swept", [False, True])
def test_given_a_returning_client_then_it_starts_from_zero_without_residue(open_store: Opener, swept: bool) -> None:
    store = open_store(ttl_ms=100, state_width=2, memory_rows=10)
    with store.update([b"a"]) as slots:
        store.rows[slots] = 7
        store.events_seen[slots] = 7
        store.last_event_ms[slots] = 1
    store.advance_watermark(101)
    if swept:
        assert store.sweep(1000.0) == [b"a"]
        store.flush()

    with store.update([b"a"]) as slots:
        assert not store.rows[slots].any()
        assert store.events_seen[slots].tolist() == [0]
        store.last_event_ms[slots] = 200
    assert store.lookup([b"a"]).found[0]
    assert store.stats.expired == 1


def test_given_a_new_key_in_a_freed_slot_then_it_carries_no_residue(open_store: Opener) -> None:
    store = open_store(None, ttl_ms=100, state_width=2)
    names = [f"{i}".encode() for i in range(100)]
    with store.update(names) as slots:
        store.rows[slots] = 9
        store.last_event_ms[slots] = 1
    store.advance_watermark(1000)
    assert set(store.sweep(1000.0)) == set(names)
    with store.update([f"new {i}".encode() for i in range(100)]) as again:
        assert set(again.tolist()) == set(slots.tolist())
        assert not store.rows[again].any()
        assert not store.events_seen[again].any()
        assert (store.applied_offset[again] == -1).all()


@pytest.mark.parametrize("memory_rows", [3, 500])
def test_given_expired_rows_in_memory_and_on_disk_when_swept_then_all_become_tombstones(
    open_store: Opener, memory_rows: int
) -> None:
    store = open_store(memory_rows=memory_rows, ttl_ms=1000)
    names = [f"key {i}".encode() for i in range(300)]
    store.upsert(names, np.ones((300, 4)), event_ms=np.arange(300) + 1)
    assert not tombstones(store)
    store.advance_watermark(1200)

    ended = store.sweep(10_000.0)

    assert set(ended) == set(names[:200])
    assert len(ended) == 200
    assert len(store) == 100
    if memory_rows == 3:
        assert store.stats.memory_rows <= 3, "what is swept on disk does not come into memory"
        store.close()
        store = open_store(memory_rows=memory_rows, ttl_ms=1000)
        assert len(store) == 100, "what the sweep ended on disk stays ended, and owed"
        store.advance_watermark(1200)
    assert tombstones(store) == set(names[:200])
    assert not tombstones(store)
    store.close()
    store = open_store(memory_rows=memory_rows, ttl_ms=1000)
    assert len(store) == 100
    assert store.watermark_ms == 1200
    assert store.lookup(names).found.tolist() == [False] * 200 + [True] * 100


@pytest.mark.parametrize("swept", [False, True])
def test_given_a_table_closed_over_expired_rows_when_opened_again_then_they_end_without_waiting_for_time(
    open_store: Opener, swept: bool
) -> None:
    # Given a table with an expired row that was not swept, or whose end no checkpoint has
    store = open_store(ttl_ms=100)
    store.upsert([b"old", b"new"], np.ones((2, 4)), event_ms=np.array([1, 150]))
    store.advance_watermark(150)
    store.flush()
    assert store.sweep(1000.0) == [b"old"] if swept else True
    store.close()

    store = open_store(ttl_ms=100)

    assert store.sweep(1000.0) == [b"old"]
    assert tombstones(store) == {b"old"}
    assert store.sweep(1000.0) == []


def test_given_a_budget_then_the_sweep_stops_when_it_is_spent(open_store: Opener) -> None:
    store = open_store(memory_rows=10, ttl_ms=10)
    store.upsert(PackedKeys.from_int64(np.arange(2000)), np.ones((2000, 4)), event_ms=1)
    store.flush()
    store.advance_watermark(100)
    ticks = itertools.count()

    first = store.sweep(3.0, clock=lambda: next(ticks) / 1000)

    assert 0 < len(first) < 2000
    rest: list[bytes] = []
    while more := store.sweep(3.0, clock=lambda: next(ticks) / 1000):
        rest += more
        store.flush()
    assert len(first) + len(rest) == 2000
    assert len(store) == 0


def test_given_an_open_checkpoint_then_the_sweep_waits(open_store: Opener) -> None:
    store = open_store(ttl_ms=10)
    store.upsert([b"a"], ONE, event_ms=1)
    checkpoint = store.checkpoint()
    store.advance_watermark(100)
    assert store.sweep(100.0) == []
    checkpoint.abandon()
    assert store.sweep(100.0) == [b"a"]


@pytest.mark.parametrize("memory_rows", [None, 2, 100])
def test_given_a_cap_then_the_least_recently_updated_go_first_and_the_cap_is_never_passed(
    open_store: Opener, memory_rows: int | None
) -> None:
    store = open_store(None if memory_rows is None else "table", max_rows=20, memory_rows=memory_rows)
    assert store.take_capped() == []
    for i in range(60):
        store.upsert([f"{i}".encode()], ONE, event_ms=i + 1)
        if i == 30:
            store.upsert([b"12"], ONE, event_ms=1000)
        if i % 7 == 0:
            store.flush()
        assert len(store) <= 20

    left = {key for keys, _ in store.scan() for key in keys}
    assert left == {b"12"} | {f"{i}".encode() for i in range(41, 60)}
    assert set(store.take_capped()) == {f"{i}".encode() for i in range(41)} - {b"12"}
    assert store.take_capped() == []


def test_given_a_floor_then_expiry_leaves_the_most_recently_updated(open_store: Opener) -> None:
    store = open_store(None, ttl_ms=10, min_rows=3)
    for i in range(10):
        store.upsert([f"{i}".encode()], ONE, event_ms=i + 1)

    store.advance_watermark(10_000)

    assert store.lookup([f"{i}".encode() for i in range(10)]).found.tolist() == [False] * 7 + [True] * 3
    assert len(store.sweep(1000.0)) == 7
    assert len(store) == 3


def test_given_a_batch_that_moves_time_then_rows_can_expire_within_it(open_store: Opener) -> None:
    """A batch equals one event at a time when each event is judged by the watermark before it."""
    store = open_store(None, ttl_ms=100)
    store.upsert([b"a"], ONE, event_ms=1)
    store.advance_watermark(1)
    with store.update([b"a"]) as slots:
        assert store.reset_expired(slots, np.array([100])).tolist() == [False]
        assert store.reset_expired(slots, np.array([101])).tolist() == [True]
        assert store.events_seen[slots].tolist() == [0]
        store.last_event_ms[slots] = 500


def test_given_a_table_that_gets_a_ttl_later_then_rows_already_on_disk_expire_too(open_store: Opener) -> None:
    store = open_store(memory_rows=2)
    store.upsert(PackedKeys.from_int64(np.arange(50)), np.ones((50, 4)), event_ms=1)
    store.flush()
    store.close()
    store = open_store(memory_rows=2, ttl_ms=10)
    store.advance_watermark(100)
    assert len(store.sweep(1000.0)) == 50


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"width": -1}, "width"),
        ({"width": 4, "ttl_ms": 0}, "ttl_ms"),
        ({"width": 4, "max_rows": 3, "min_rows": 4}, "min_rows"),
        ({"width": 4, "admission_threshold": 0}, "admission_threshold"),
        ({"width": 4, "memory_rows": 1.5}, "memory_rows"),
        ({"width": 4, "init_scale": float("nan")}, "init_scale"),
        ({"width": 4, "admission_mode": "guess"}, "admission_mode"),
    ],
)
def test_given_a_wrong_option_then_it_is_refused_with_name_and_what_would_do(
    options: dict[str, object], name: str
) -> None:
    with pytest.raises(StoreError, match=rf"store\.{name}: .* is not possible; accepted: "):
        StoreOptions(**options)  # type: ignore[arg-type]


def newest(store: EmbeddingStore, names: list[bytes]) -> set[bytes]:
    return {name for name, found in zip(names, store.lookup(names).found, strict=True) if found}


@pytest.mark.parametrize("memory_rows", [50, 60, 400, None])
@pytest.mark.parametrize("seed", [1, 2])
def test_given_a_floor_and_rows_on_disk_then_it_counts_all_of_them(
    open_store: Opener, memory_rows: int | None, seed: int
) -> None:
    """Rows are updated, evicted by reads, and expire, over and over; a dict says who the newest are."""
    rng = np.random.default_rng(seed)
    name = None if memory_rows is None else "table"
    options = {"memory_rows": memory_rows, "ttl_ms": 80, "min_rows": 50}
    store = open_store(name, **options)
    names = [f"key {i}".encode() for i in range(600)]
    times: dict[bytes, int] = {}
    ms, horizon, held_back = 0, -1, 0
    for round_ in range(60):
        chosen = rng.permutation(600)[: int(rng.integers(1, 110))]
        batch = [names[i] for i in chosen]
        when = ms + 1 + np.arange(len(batch))
        store.upsert(batch, np.ones((len(batch), 4)), event_ms=when)
        times |= dict(zip(batch, when.tolist(), strict=True))
        ms = int(when[-1]) + int(rng.integers(0, 30))
        if round_ % 3 == 0:
            store.flush()
        store.advance_watermark(ms)
        top = sorted(times.values(), reverse=True)
        if len(top) > 50:
            horizon = max(horizon, min(ms - 80, top[49] - 1))
            held_back += top[49] - 1 < ms - 80
        times = {key: last for key, last in times.items() if last > horizon}
        assert newest(store, names) == set(times)
        if round_ % 4 == 0:
            store.sweep(10_000.0)
        if memory_rows is not None:
            assert store.stats.memory_rows <= memory_rows + len(names)
            if round_ % 10 == 9:
                store.flush()
                store.close()
                store = open_store(name, **options)
                store.sweep(10_000.0)
    assert 5 < held_back < 55, "both the floor and the time to live decide at times"
    store.advance_watermark(10**6)
    assert newest(store, names) == set(sorted(times, key=lambda key: times[key])[-50:])


def test_given_the_floor_when_the_newest_are_deleted_then_older_rows_on_disk_take_their_places(
    open_store: Opener,
) -> None:
    store = open_store(memory_rows=20, ttl_ms=100, min_rows=10, cold_rows=0)
    names = [f"{i}".encode() for i in range(300)]
    for i, key in enumerate(names):
        store.upsert([key], ONE, event_ms=1000 + i)
        if i % 50 == 0:
            store.flush()
    store.flush()
    store.delete(names[200:])
    store.flush()

    store.advance_watermark(10_000)
    assert set(names[190:200]) <= newest(store, names), "at least so many, while it is not known who they are"
    store.sweep(10_000.0)

    assert newest(store, names) == set(names[190:200])
    assert len(store) == 10


def test_given_a_restored_table_then_the_floor_counts_its_rows(open_store: Opener) -> None:
    source = open_store("source", memory_rows=500)
    names = [f"{i}".encode() for i in range(200)]
    source.upsert(names, np.ones((200, 4)), event_ms=np.arange(200) + 1)
    checkpoint = source.checkpoint()
    records = [pair for keys, rows in checkpoint.slices(50) for pair in zip(keys, rows, strict=True)]
    checkpoint.commit()
    store = open_store("restored", memory_rows=20, ttl_ms=50, min_rows=10)
    store.restore([key for key, _ in records], [row for _, row in records])

    store.advance_watermark(100_000)
    assert newest(store, names) >= set(names[190:])
    store.sweep(10_000.0)
    assert newest(store, names) == set(names[190:])


def test_given_a_swept_row_on_disk_when_its_key_returns_then_it_starts_from_zero_and_expires_again(
    open_store: Opener,
) -> None:
    store = open_store(memory_rows=1, ttl_ms=10)
    names = [f"{i}".encode() for i in range(20)]
    store.upsert(names, np.full((20, 4), 7.0), event_ms=1, offsets=np.arange(20))
    store.flush()
    store.lookup(names)
    store.advance_watermark(100)
    assert set(store.sweep(1000.0)) == set(names)

    with store.update(names) as slots:
        assert not store.vectors[slots].any()
        assert not store.events_seen[slots].any()
        assert store.applied_offset[slots].tolist() == list(range(20))
        store.last_event_ms[slots] = 101
    store.flush()
    assert len(store) == 20
    store.advance_watermark(200)
    assert set(store.sweep(1000.0)) == set(names)
    assert tombstones(store) == set(names)


def test_given_a_failed_update_of_an_expired_row_then_the_next_sweep_tells_its_end(open_store: Opener) -> None:
    store = open_store(memory_rows=5, ttl_ms=10)
    store.upsert([b"a", b"b"], np.ones((2, 4)), event_ms=[1, 95])
    store.advance_watermark(100)
    with pytest.raises(KeyError), store.update([b"a", b"b", b"new"]):
        raise KeyError("model")
    assert store.sweep(1000.0) == [b"a"]
    assert tombstones(store) == {b"a"}
    assert len(store) == 1


def test_given_a_checkpoint_over_an_expired_row_then_it_is_still_the_sweep_that_ends_and_tells_it(
    open_store: Opener,
) -> None:
    store = open_store(memory_rows=1, ttl_ms=10)
    names = [b"a", b"b", b"c"]
    store.upsert(names, np.ones((3, 4)), event_ms=1)
    store.advance_watermark(100)
    assert tombstones(store) == set()
    assert set(store.sweep(1000.0)) == set(names)
    assert tombstones(store) == set(names)
