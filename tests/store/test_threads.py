"""Readers beside the writer: whole rows, nothing resurrected, whatever moves between memory and disk."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from stream.store import PackedKeys
from tests.store.conftest import Opener

N = 400
KEYS = PackedKeys.from_int64(np.arange(N))


def run_beside(read: Callable[[], None], write: Callable[[int], None], rounds: int) -> None:
    """Two reading threads while `write` runs for so many rounds; their errors are raised here."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def loop() -> None:
        try:
            while not stop.is_set():
                read()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=loop) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for round_ in range(1, rounds + 1):
            write(round_)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("memory_rows", [None, 40, 350])
def test_given_updates_and_evictions_then_a_reader_sees_whole_rows_only(
    open_store: Opener, memory_rows: int | None
) -> None:
    store = open_store(None if memory_rows is None else "table", width=32, memory_rows=memory_rows)
    store.upsert(KEYS, np.zeros((N, 32)), event_ms=1, offsets=0)
    last = np.zeros(N)

    def read() -> None:
        found = store.lookup(KEYS)
        assert found.found.all()
        assert (found.vectors == found.vectors[:, :1]).all(), "torn row"
        assert (found.vectors[:, 0] == found.applied_offset).all(), "vector and offset of different updates"

    def write(round_: int) -> None:
        chosen = np.random.default_rng(round_).permutation(N)[:150]
        with store.update(KEYS.take(chosen)) as slots:
            for part in np.array_split(slots, 5):
                store.vectors[part] = round_
            store.applied_offset[slots] = round_
        last[chosen] = round_
        if round_ % 10 == 0 and memory_rows is not None:
            store.flush()

    run_beside(read, write, 150)
    assert (store.lookup(KEYS).vectors[:, 0] == last).all()


@pytest.mark.parametrize("memory_rows", [None, 40])
def test_given_expiry_eviction_and_deletion_then_no_row_is_mixed_or_resurrected(
    open_store: Opener, memory_rows: int | None
) -> None:
    """Each life of a key has a larger number than the one before; a reader never sees the number go down."""
    store = open_store(None if memory_rows is None else "table", width=32, memory_rows=memory_rows, ttl_ms=10)
    seen = threading.local()

    def read() -> None:
        if not hasattr(seen, "life"):
            seen.life = np.zeros(N)
        horizon = store.horizon_ms
        found = store.lookup(KEYS)
        assert (found.vectors == found.vectors[:, :1]).all(), "mixed row"
        life = found.vectors[found.found, 0]
        assert (life >= seen.life[found.found]).all(), "an older life came back"
        assert (found.last_event_ms[found.found] > horizon).all(), "expired row served"
        seen.life[found.found] = life

    def write(round_: int) -> None:
        rng = np.random.default_rng(round_)
        ms = round_ * 4
        store.advance_watermark(ms)
        chosen = rng.permutation(N)[:200]
        store.delete(KEYS.take(chosen[:50]))
        store.upsert(KEYS.take(chosen), np.full((200, 32), round_), event_ms=ms)
        store.sweep(5.0)
        if round_ % 10 == 0:
            store.flush()

    run_beside(read, write, 120)


def test_given_two_writers_then_no_update_is_lost(open_store: Opener) -> None:
    store = open_store(memory_rows=40)
    store.upsert(KEYS, np.zeros((N, 4)), event_ms=1)

    def add() -> None:
        for _ in range(50):
            with store.update(KEYS) as slots:
                store.vectors[slots] += 1

    threads = [threading.Thread(target=add) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (store.lookup(KEYS).vectors == 100).all()
