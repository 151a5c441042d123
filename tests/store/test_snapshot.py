"""Snapshots of one instant while writing goes on, kills in the middle, other partition counts, damage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from stream.errors import StoreError
from stream.store import EmbeddingStore, PackedKeys, StoreCorrupt, StoreOptions
from tests.store.conftest import Opener

N = 3000
KEYS = PackedKeys.from_int64(np.arange(N))


def write_all(store: EmbeddingStore, value: float, offset: int) -> None:
    store.upsert(KEYS, np.full((N, 4), value), event_ms=offset + 1, offsets=offset)


@pytest.mark.parametrize("memory_rows", [None, 50, 10_000])
def test_given_writers_that_go_on_then_the_snapshot_is_of_its_instant(
    open_store: Opener, tmp_path: Path, memory_rows: int | None
) -> None:
    store = open_store(None if memory_rows is None else "table", memory_rows=memory_rows)
    write_all(store, 1, 1)
    store.flush()
    store.upsert(KEYS.take(np.arange(500)), np.full((500, 4), 2), event_ms=3, offsets=2)
    store.delete(KEYS.take(np.arange(10)))
    snapshot = store.snapshot({"offset": b"3"})
    chunks = snapshot.records(100)
    seen = dict(zip(*next(chunks), strict=True))

    # Everything changes between the chunks: values, deletions, new keys, commits.
    for round_, chunk in enumerate(chunks):
        for key, row in zip(*chunk, strict=True):
            assert key not in seen
            seen[key] = row
        write_all(store, 100 + round_, 100 + round_)
        store.delete(KEYS.take(np.arange(round_ * 20, round_ * 20 + 20) % N))
        store.upsert([f"new {round_}".encode()], np.ones((1, 4)), event_ms=9)
        if round_ % 3 == 0:
            store.flush()
    snapshot.close()

    values = {int.from_bytes(key, "big"): np.frombuffer(row, "<f4", 1, 32)[0] for key, row in seen.items()}
    assert values == {i: 2 if i < 500 else 1 for i in range(10, N)}


def test_given_a_writer_thread_then_every_snapshot_is_of_one_moment(open_store: Opener, tmp_path: Path) -> None:
    store = open_store(memory_rows=200)
    write_all(store, 0, 0)
    stop = threading.Event()

    def write() -> None:
        round_ = 0
        while not stop.is_set():
            round_ += 1
            write_all(store, round_, round_)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(3):
            store.snapshot().write(tmp_path / "snapshot")
            with EmbeddingStore.open(None, StoreOptions(width=4)) as loaded:
                loaded.load([tmp_path / "snapshot"])
                assert len(loaded) == N
                assert np.unique(loaded.lookup(KEYS).vectors).shape == (1,)
    finally:
        stop.set()
        writer.join()


KILLED_WRITER = """
import sys, numpy as np
from stream.store import EmbeddingStore, PackedKeys, StoreOptions
store = EmbeddingStore.open(None, StoreOptions(width=64))
keys = PackedKeys.from_int64(np.arange(20_000))
value = 0
while True:
    value += 1
    store.upsert(keys, np.full((20_000, 64), value), event_ms=value)
    store.snapshot().write(sys.argv[1])
    print(value, flush=True)
"""


def test_given_a_kill_while_writing_then_the_previous_snapshot_loads(tmp_path: Path) -> None:
    for attempt in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED_WRITER, str(tmp_path / "snapshot")], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        finished = 0
        for _ in range(2 + attempt):
            finished = int(process.stdout.readline())
        # The next one has begun, or is about to; wait until its directory shows.
        part = tmp_path / "snapshot"
        while len([entry for entry in part.iterdir() if entry.is_dir()]) < 2 and process.poll() is None:
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()

        with EmbeddingStore.open(None, StoreOptions(width=64)) as store:
            store.load([tmp_path / "snapshot"])
            values = np.unique(store.lookup(PackedKeys.from_int64(np.arange(20_000))).vectors)
            assert values.shape == (1,)
            assert values[0] >= finished


def test_given_two_partitions_when_loaded_into_three_then_every_row_is_in_its_place(
    open_store: Opener, tmp_path: Path
) -> None:
    def number(keys: PackedKeys, count: int) -> np.ndarray:
        return np.array([int.from_bytes(key, "big") % count for key in keys])

    for part in range(2):
        store = open_store(f"old {part}", memory_rows=100, ttl_ms=10**6)
        mine = KEYS.take(np.flatnonzero(number(KEYS, 2) == part))
        store.upsert(mine, np.full((len(mine), 4), part), event_ms=1000 + part, offsets=77)
        store.advance_watermark(2000 + part)
        store.snapshot({"offset": str(part).encode()}).write(tmp_path / f"snapshot {part}")

    for part in range(3):
        store = open_store(f"new {part}", memory_rows=100, ttl_ms=10**6)
        metas = store.load(
            [tmp_path / "snapshot 0", tmp_path / "snapshot 1"],
            keep=lambda keys, part=part: number(keys, 3) == part,  # type: ignore[misc]
            forget_offsets=True,
        )
        assert metas == [{"offset": b"0"}, {"offset": b"1"}]
        assert store.watermark_ms == 2001
        mine = np.flatnonzero(number(KEYS, 3) == part)
        found = store.lookup(KEYS)
        assert np.flatnonzero(found.found).tolist() == mine.tolist()
        assert (found.vectors[mine, 0] == mine % 2).all()
        assert (found.applied_offset[mine] == -1).all()
        assert len(store) == mine.shape[0]


def test_given_a_damaged_snapshot_then_it_is_refused_by_name(open_store: Opener, tmp_path: Path) -> None:
    store = open_store(None)
    write_all(store, 1, 1)
    root = tmp_path / "snapshot"
    with pytest.raises(StoreCorrupt, match="no snapshot was ever finished"):
        open_store(None).load([root])
    store.snapshot().write(root)
    (part,) = (entry for entry in root.iterdir() if entry.is_dir())
    whole = (part / "rows").read_bytes()
    for damaged, text in (
        (whole[:-1], "fail their checksum"),
        (whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:], "fail their checksum"),
        (b"", "0 rows where the manifest says 3000"),
        (b"xx" + whole, "no chunk of rows at byte 0"),
    ):
        (part / "rows").write_bytes(damaged)
        with pytest.raises(StoreCorrupt, match=text):
            open_store(None).load([root])
    (part / "manifest.json").unlink()
    with pytest.raises(StoreCorrupt, match="not readable"):
        open_store(None).load([root])


def test_given_a_table_in_use_or_of_another_width_then_loading_is_refused(open_store: Opener, tmp_path: Path) -> None:
    store = open_store(None)
    write_all(store, 1, 1)
    store.snapshot().write(tmp_path / "snapshot")
    with pytest.raises(StoreError, match="load into a table in use"):
        store.load([tmp_path / "snapshot"])
    with pytest.raises(StoreError, match="width and state_width"):
        open_store(None, width=5).load([tmp_path / "snapshot"])
    snapshot = store.snapshot()
    list(snapshot.records())
    with pytest.raises(StoreError, match="used already"):
        list(snapshot.records())
    with pytest.raises(StoreError, match="being written already"):
        store.snapshot()
    snapshot.close()
    store.snapshot().close()


def test_given_rows_when_exported_then_parquet_has_them(open_store: Opener, tmp_path: Path) -> None:
    store = open_store(state_width=2, memory_rows=50, admission_threshold=2)
    store.observe([b"waits"], [0], [1], [b"event"])
    names = [f"{i}".encode() for i in range(200)]
    store.observe(names + names)
    with store.update(names) as slots:
        store.rows[slots] = np.arange(1200, dtype=np.float32).reshape(200, 6)
        store.events_seen[slots] = 3
        store.last_event_ms[slots] = np.arange(200)
        store.applied_offset[slots] = np.arange(200) + 7

    assert store.snapshot().export_parquet(tmp_path / "rows.parquet") == 200

    table = pq.read_table(tmp_path / "rows.parquet").sort_by("last_event_ms")
    assert table.column_names == ["key", "events_seen", "last_event_ms", "applied_offset", "vector", "state"]
    assert table["key"].to_pylist() == names
    assert table["vector"].to_pylist() == [[6.0 * i + j for j in range(4)] for i in range(200)]
    assert table["state"].to_pylist() == [[6.0 * i + j for j in (4, 5)] for i in range(200)]
    assert table["applied_offset"].to_pylist() == [i + 7 for i in range(200)]
