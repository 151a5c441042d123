"""Events may keep their row alive for different times: it lives as long as the one that lasts longest."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest

from stream.errors import StoreError
from stream.store import FOR_EVER, EmbeddingStore, StoreOptions
from stream.store.lives import MAX_SPREAD_MS
from tests.store.conftest import Opener

#: What the tables below have: 1,000 ms of their own, and 50, 5,000 or for ever where an event says so.
TTLS: dict[str, Any] = {"ttl_ms": 1000, "event_ttls_ms": (50, 5000)}
MODES: dict[str, dict[str, Any]] = {
    "in memory": {"name": None},
    "on disk, all in memory": {"memory_rows": 100},
    "on disk, few in memory": {"memory_rows": 1},
    "on disk, without cold copies": {"memory_rows": 1, "cold_rows": 0},
    "all keys of one hash": {"memory_rows": 2, "hasher": lambda keys: np.zeros(len(keys), np.uint64)},
}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=[name.replace(" ", "_") for name in MODES])


def put(store: EmbeddingStore, key: bytes, ms: int, ttl_ms: int | None = None) -> None:
    store.upsert([key], np.ones((1, 4), np.float32), event_ms=ms, ttl_ms=ttl_ms)


def alive(store: EmbeddingStore, *keys: bytes) -> list[bool]:
    found: list[bool] = store.lookup(keys).found.tolist()
    return found


@modes
def test_given_rows_of_different_lives_then_each_expires_at_its_own_deadline(
    open_store: Opener, mode: dict[str, Any]
) -> None:
    store = open_store(**TTLS, **mode)
    for key, ttl_ms in ((b"own", None), (b"short", 50), (b"long", 5000)):
        put(store, key, 100, ttl_ms)

    expected = [(149, b"own short long"), (150, b"own long"), (1099, b"own long"), (1100, b"long"), (5099, b"long")]
    for now, names in [*expected, (5100, b"")]:
        store.advance_watermark(now)
        assert alive(store, b"own", b"short", b"long") == [name in names for name in (b"own", b"short", b"long")]
        ended = set(store.sweep(1000.0))
        assert not ended & set(names.split())
        assert len(store) == len(names.split())


@modes
def test_given_a_short_event_after_a_long_one_then_the_row_keeps_the_later_deadline(
    open_store: Opener, mode: dict[str, Any]
) -> None:
    store = open_store(**TTLS, **mode)
    put(store, b"a", 100, 5000)
    for ms in range(110, 5000, 40):
        put(store, b"a", ms, 50)
        put(store, b"other", ms, 50)

    # Then what kept it was the long event, though it was updated since
    store.advance_watermark(5099)
    assert alive(store, b"a", b"other") == [True, False]
    # And the short ones give it no more than their own time
    store.advance_watermark(5100)
    assert alive(store, b"a") == [False]


@modes
def test_given_late_events_then_deadlines_do_not_depend_on_their_order(
    open_store: Opener, mode: dict[str, Any]
) -> None:
    events = [(100, 5000), (900, 50), (500, 1000), (899, 50), (1, 1000)]
    options = {**mode, "name": None, "memory_rows": None} if mode.get("name", "") is None else dict(mode)
    for turn in range(5):
        name = options.get("name", "table")
        store = open_store(**{**TTLS, **options, "name": None if name is None else f"table {turn}"})
        for ms, ttl_ms in events[turn:] + events[:turn]:
            put(store, b"a", ms, ttl_ms)
        store.advance_watermark(5099)
        assert alive(store, b"a") == [True]
        store.advance_watermark(5100)
        assert alive(store, b"a") == [False]


@modes
def test_given_an_event_that_keeps_its_row_for_ever_then_it_does(open_store: Opener, mode: dict[str, Any]) -> None:
    store = open_store(ttl_ms=None, event_ttls_ms=(50,), **mode)
    put(store, b"ever", 1, FOR_EVER)
    put(store, b"own", 1)
    put(store, b"both", 1, FOR_EVER)
    put(store, b"both", 2, 50)
    put(store, b"short", 1, 50)

    store.advance_watermark(10**15)

    assert alive(store, b"ever", b"own", b"both", b"short") == [True, True, True, False]
    assert store.sweep(1000.0) in ([b"short"], [])
    assert len(store) == 3


@modes
def test_given_a_returning_client_then_its_life_starts_anew(open_store: Opener, mode: dict[str, Any]) -> None:
    store = open_store(**TTLS, **mode)
    put(store, b"a", 100, 5000)
    store.advance_watermark(5100)
    put(store, b"a", 5100, 50)

    found = store.lookup([b"a"])
    assert found.events_seen.tolist() == [1]
    store.advance_watermark(5150)
    assert alive(store, b"a") == [False]


@modes
def test_given_a_full_table_then_rows_that_would_expire_first_go_first(
    open_store: Opener, mode: dict[str, Any]
) -> None:
    store = open_store(**TTLS, **mode, max_rows=2)
    store.take_capped()
    put(store, b"long", 100, 5000)
    put(store, b"short", 110, 50)
    put(store, b"own", 120)

    assert alive(store, b"long", b"short", b"own") == [True, False, True]
    assert store.take_capped() == [b"short"]


def test_given_a_failed_update_then_lives_are_as_they_were(open_store: Opener) -> None:
    store = open_store(**TTLS, memory_rows=10)
    put(store, b"a", 100, 50)
    with contextlib.suppress(KeyError), store.update([b"a"]) as slots:
        store.prolong(slots, np.array([100]), np.array([5000]))
        raise KeyError
    store.advance_watermark(150)
    assert alive(store, b"a") == [False]


def test_given_a_changelog_and_a_snapshot_then_lives_come_back_with_the_rows(open_store: Opener, tmp_path: Any) -> None:
    store = open_store("one", **TTLS, memory_rows=1, admission_threshold=1)
    put(store, b"long", 100, 5000)
    put(store, b"long", 200, 50)
    put(store, b"short", 200, 50)
    checkpoint = store.checkpoint()
    records = [pair for keys, rows in checkpoint.slices(1) for pair in zip(keys, rows, strict=True)]
    checkpoint.commit()
    store.snapshot().write(tmp_path / "snapshot")
    restored = open_store("two", **TTLS, memory_rows=1)
    restored.restore([key for key, _ in records], [row for _, row in records])
    loaded = open_store(None, **TTLS)
    loaded.load([tmp_path / "snapshot"])
    store.close()
    reopened = open_store("one", **TTLS, memory_rows=1)

    for other in (restored, loaded, reopened):
        other.advance_watermark(250)
        assert alive(other, b"long", b"short") == [True, False]
        other.advance_watermark(5099)
        assert alive(other, b"long") == [True]
        other.advance_watermark(5100)
        assert alive(other, b"long") == [False]


@pytest.mark.parametrize("memory_rows", [1, 100])
def test_given_rows_written_with_one_ttl_when_events_get_their_own_then_they_keep_it(
    open_store: Opener, memory_rows: int
) -> None:
    store = open_store(ttl_ms=1000, memory_rows=memory_rows)
    put(store, b"old", 100)
    put(store, b"gone", 50)
    store.advance_watermark(1050)
    store.flush()
    store.close()

    # When the table is opened with other ttls, and a new row comes
    store = open_store(**TTLS, memory_rows=memory_rows)
    put(store, b"new", 1050, 5000)
    # Then what was expired still is, and the rest expires when it would have
    assert alive(store, b"old", b"gone", b"new") == [True, False, True]
    store.advance_watermark(1100)
    assert alive(store, b"old", b"new") == [False, True]
    assert set(store.sweep(1000.0)) == {b"old", b"gone"}
    store.flush()
    store.close()

    # And back to one ttl all rows have that one
    store = open_store(ttl_ms=1000, memory_rows=memory_rows)
    assert alive(store, b"new") == [True]
    store.advance_watermark(2050)
    assert alive(store, b"new") == [False]
    assert store.sweep(1000.0) == [b"new"]


def test_given_a_table_of_one_ttl_then_what_it_writes_is_what_it_always_wrote(open_store: Opener) -> None:
    store = open_store(ttl_ms=1000, memory_rows=10)
    put(store, b"a", 7)
    ((_, (row,)),) = list(store.checkpoint().slices(10))
    assert (
        row
        == bytes([1, 0, 0, 0])
        + np.array([4 | 1 << 32, 0], "<i8").tobytes()[:4]
        + np.array([1, 7, -1], "<i8").tobytes()
        + np.ones(4, "<f4").tobytes()
    )


def test_given_min_rows_then_those_that_would_expire_last_stay(open_store: Opener) -> None:
    store = open_store(None, **TTLS, min_rows=2)
    put(store, b"long", 100, 5000)
    put(store, b"own", 110)
    put(store, b"short", 120, 50)
    store.advance_watermark(10_000)
    assert alive(store, b"long", b"own", b"short") == [True, True, False]


@pytest.mark.parametrize("ttl_ms", [49, 5001, FOR_EVER, 0])
def test_given_a_ttl_that_the_table_does_not_have_then_it_is_refused(open_store: Opener, ttl_ms: int) -> None:
    store = open_store(None, **TTLS)
    with pytest.raises(StoreError, match=f"ttl_ms: {ttl_ms} .*accepted: 50 to 5000"):
        put(store, b"a", 100, ttl_ms)
    assert len(store) == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"event_ttls_ms": (0,)}, "event_ttls_ms"),
        ({"event_ttls_ms": (FOR_EVER,)}, "event_ttls_ms"),
        ({"event_ttls_ms": (1, 2 + MAX_SPREAD_MS)}, "event_ttls_ms"),
        ({"event_ttls_ms": (1,), "ttl_ms": 2 + MAX_SPREAD_MS}, "ttl_ms"),
    ],
)
def test_given_ttls_that_no_table_can_keep_then_they_are_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(StoreError, match=f"store.{named}: "):
        StoreOptions(width=4, **options)


def test_given_the_widest_spread_then_deadlines_are_exact(open_store: Opener) -> None:
    longest = 1 + MAX_SPREAD_MS
    store = open_store(ttl_ms=longest, event_ttls_ms=(1,), memory_rows=1)
    start = 1_700_000_000_000
    put(store, b"long", start)
    put(store, b"short", start, 1)
    put(store, b"long", start + longest - 1, 1)
    store.advance_watermark(start + longest - 1)
    assert alive(store, b"long", b"short") == [True, False]
    store.advance_watermark(start + longest)
    assert alive(store, b"long") == [False]
