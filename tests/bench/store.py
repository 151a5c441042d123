"""Cost of the embedding store in memory: `python -m tests.bench.store`.

16-byte keys, 32 floats, batches of 4,096, one thread. Beside it, in the same run and on the same keys, rows in a
plain dict of numpy arrays and rows in RocksDB alone (its bulk writes and multi-gets through rocksdict). Keys reach
the store packed, or as lists of bytes objects of 8 to 40 bytes, made just before as a consumer makes them. Admission
is measured with a threshold of 2, events held in memory, and the sketch's error with as many keys as rows. Resident
memory is read from the system after 1 and 4 million rows, each in a process of its own, and before and after a
million rows expired and a million others came. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rocksdict import BlockBasedOptions, Cache, Options, Rdict, WriteBatch

from stream.store import EmbeddingStore, PackedKeys, StoreOptions

WIDTH = 32
BATCH = 4096
KEY = 16


def resident_bytes() -> int:
    """Resident memory of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def make_keys(first: int, count: int, seed: int = 1) -> PackedKeys:
    """`count` distinct 16-byte keys."""
    words = np.random.default_rng([seed, first]).integers(0, 2**63, (count, 2), dtype=np.uint64)
    words[:, 0] = np.arange(first, first + count, dtype=np.uint64)
    return PackedKeys(words.view(np.uint8).reshape(-1), np.arange(count + 1, dtype=np.int64) * KEY)


def chunks(count: int) -> Iterable[tuple[int, int]]:
    """(first, size) of batches that make up `count`."""
    return ((first, min(BATCH, count - first)) for first in range(0, count, BATCH))


def per_second(operation: Callable[[Any], object], batches: Sequence[Any], count: int, passes: int = 3) -> float:
    """Keys a second, the best of some passes."""
    best = 0.0
    for _ in range(passes):
        started = time.perf_counter()
        for batch in batches:
            operation(batch)
        best = max(best, count / (time.perf_counter() - started))
    return best


def fill(store: EmbeddingStore, first: int, rows: int, event_ms: int) -> float:
    """Insert new rows; keys a second, the making of the keys not counted."""
    vectors = np.random.default_rng(0).random((BATCH, WIDTH), np.float32)
    spent = 0.0
    for start, size in chunks(rows):
        keys = make_keys(first + start, size)
        started = time.perf_counter()
        store.upsert(keys, vectors[:size], event_ms=event_ms)
        spent += time.perf_counter() - started
    return rows / spent


def compile_kernels() -> float:
    """Run everything once, so that compiling is not in the figures; seconds it took."""
    started = time.perf_counter()
    with EmbeddingStore.open(None, StoreOptions(width=WIDTH, reserve_rows=64, ttl_ms=10)) as store:
        fill(store, 0, 1000, 1)
        store.upsert([b"a key of more than 16 bytes", b"short"], np.zeros((2, WIDTH)), event_ms=1)
        store.lookup(make_keys(0, 10))
        store.advance_watermark(1000)
        store.sweep(1000.0)
        fill(store, 10_000, 1000, 1000)
    return time.perf_counter() - started


def measure_overhead(rows: int) -> None:
    """Print bytes of resident memory per row beyond the vector, in this process."""
    compile_kernels()
    before = resident_bytes()
    store = EmbeddingStore.open(None, StoreOptions(width=WIDTH))
    fill(store, 0, rows, 1)
    print((resident_bytes() - before) / rows - 4 * WIDTH)


def measure_reuse(rows: int) -> None:
    """Print resident memory after a turnover of all rows over that of the first plateau, in this process."""
    compile_kernels()
    store = EmbeddingStore.open(None, StoreOptions(width=WIDTH, ttl_ms=1000))
    fill(store, 0, rows, 1)
    plateau = resident_bytes()
    store.advance_watermark(10_000)
    while store.sweep(5.0):
        pass
    assert len(store) == 0
    fill(store, rows, rows, 10_000)
    print(resident_bytes() / plateau)


def measure_observe(rows: int) -> dict[str, float]:
    """Occurrences a second through observe() with a threshold of 2: first, second and later ones of each key.

    The events held are 105 bytes each. The update that makes an admitted key's row is not counted.
    """
    store = EmbeddingStore.open(None, StoreOptions(width=WIDTH, admission_threshold=2))
    payloads = [bytes(105)] * BATCH
    figures: dict[str, float] = {}
    for turn, name in enumerate(("waiting", "admitted", "known")):
        spent = 0.0
        for start, size in chunks(rows):
            keys = make_keys(start, size)
            offsets = np.arange(start, start + size) + turn * rows
            started = time.perf_counter()
            admission = store.observe(keys, offsets, 1, payloads[:size])
            spent += time.perf_counter() - started
            with store.update(keys.take(np.flatnonzero(admission.admitted))) as slots:
                store.events_seen[slots] += 1
                store.last_event_ms[slots] = 1
        figures[name] = rows / spent
    return figures


def measure_sketch(keys: int) -> tuple[float, float]:
    """Share of keys admitted before their second occurrence in sketch mode, at nominal load and at twice that."""
    options = StoreOptions(width=WIDTH, admission_threshold=2, admission_mode="sketch", sketch_keys=keys)
    shares = []
    with EmbeddingStore.open(None, options) as store:
        early = 0
        for half in range(2):
            for start, size in chunks(keys):
                early += int(store.observe(make_keys(half * keys + start, size)).admitted.sum())
            shares.append(early / ((half + 1) * keys))
    return shares[0], shares[1]


def in_own_process(what: str, rows: int) -> float:
    """Run one of the memory measurements in a fresh process."""
    command = [sys.executable, "-m", "tests.bench.store", "--measure", what, "--rows", str(rows)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_dict(rows: int, batches: list[list[bytes]]) -> tuple[float, float]:
    """Finds and upserts a second of a dict of numpy arrays."""
    table: dict[bytes, np.ndarray] = {}
    for start, size in chunks(rows):
        vectors = np.random.default_rng(start).random((size, WIDTH), np.float32)
        table.update(zip(make_keys(start, size).to_list(), (row.copy() for row in vectors), strict=True))
    out = np.empty((BATCH, WIDTH), np.float32)
    values = np.random.default_rng(0).random((BATCH, WIDTH), np.float32)

    def find(keys: list[bytes]) -> None:
        get = table.get
        for i, key in enumerate(keys):
            row = get(key)
            if row is not None:
                out[i] = row

    def upsert(keys: list[bytes]) -> None:
        for i, key in enumerate(keys):
            table[key][:] = values[i]

    count = sum(map(len, batches))
    return per_second(find, batches, count), per_second(upsert, batches, count)


def measure_rocksdb(rows: int, batches: list[list[bytes]]) -> tuple[float, float]:
    """Finds and upserts a second of RocksDB alone, with a bloom filter and a cache that holds everything."""
    value = bytes(4 * WIDTH)
    with tempfile.TemporaryDirectory() as folder:
        table = BlockBasedOptions()
        table.set_bloom_filter(10, False)
        table.set_block_cache(Cache(512 << 20))
        options = Options(raw_mode=True)
        options.set_block_based_table_factory(table)
        database = Rdict(folder, options)

        def upsert(keys: list[bytes]) -> None:
            batch = WriteBatch(raw_mode=True)
            for key in keys:
                batch.put(key, value)
            database.write(batch)

        for start, size in chunks(rows):
            upsert(make_keys(start, size).to_list())
        database.flush()
        count = sum(map(len, batches))
        finds = per_second(lambda keys: np.frombuffer(b"".join(database[keys]), np.float32), batches, count)
        upserts = per_second(upsert, batches, count, 1)
        database.close()
    return finds, upserts


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--measure", choices=["overhead", "reuse"])
    arguments = parser.parse_args(argv)
    rows = arguments.rows
    if arguments.measure == "overhead":
        return measure_overhead(rows)
    if arguments.measure == "reuse":
        return measure_reuse(rows)

    print(f"first use: {compile_kernels():.1f} s (compiled code is cached beside the modules)", flush=True)
    rng = np.random.default_rng(7)
    every = PackedKeys.concatenate([make_keys(start, size) for start, size in chunks(rows)])
    batches = [every.take(rng.integers(0, rows, BATCH)) for _ in range(150)]
    count = len(batches) * BATCH
    values = rng.random((BATCH, WIDTH), np.float32)

    inserts = 0.0
    for _ in range(2):
        store = EmbeddingStore.open(None, StoreOptions(width=WIDTH))
        inserts = max(inserts, fill(store, 0, rows, 1))
    finds = per_second(store.lookup, batches, count)
    assert store.lookup(batches[0]).found.all()
    upserts = per_second(lambda keys: store.upsert(keys, values, event_ms=2), batches, count)
    store.close()
    print(f"packed keys, {rows:,} rows: {finds:,.0f} finds, {upserts:,.0f} upserts, {inserts:,.0f} inserts per s")

    lengths = rng.integers(8, 41, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    mixed = PackedKeys(rng.integers(0, 256, int(offsets[-1]), dtype=np.uint8), offsets)
    store = EmbeddingStore.open(None, StoreOptions(width=WIDTH))
    for start, size in chunks(rows):
        store.upsert(mixed.take(np.arange(start, start + size)), values[:size], event_ms=1)
    from_bytes = 0.0
    for _ in range(3):
        lists = [mixed.take(rng.integers(0, rows, BATCH)).to_list() for _ in range(50)]
        from_bytes = max(from_bytes, per_second(store.lookup, lists, 50 * BATCH, 1))
    store.close()
    print(f"lists of bytes objects of 8 to 40 bytes: {from_bytes:,.0f} finds per s", flush=True)

    observed = measure_observe(rows // 4)
    observes = 3 / sum(1 / value for value in observed.values())
    parts = ", ".join(f"{value:,.0f} {name}" for name, value in observed.items())
    print(f"observe, threshold 2: {observes:,.0f} occurrences per s ({parts})", flush=True)

    nominal, twice = measure_sketch(rows)
    print(f"sketch, threshold 2: {nominal:.5%} of keys early at nominal load, {twice:.3%} at twice that", flush=True)

    some = [keys.to_list() for keys in batches[:20]]
    dict_finds, dict_upserts = measure_dict(rows, some)
    print(f"dict of arrays: {dict_finds:,.0f} finds, {dict_upserts:,.0f} upserts per s", flush=True)
    disk_finds, disk_upserts = measure_rocksdb(rows, some)
    print(f"RocksDB alone: {disk_finds:,.0f} finds, {disk_upserts:,.0f} upserts per s", flush=True)
    overhead = {size: in_own_process("overhead", size) for size in (rows, 4 * rows)}
    for size, value in overhead.items():
        print(f"resident memory beyond the vector over {size:,} rows: {value:.1f} bytes a row", flush=True)
    reuse = in_own_process("reuse", rows)
    print(f"resident memory after all rows expired and as many came: {reuse:.3f} of the first plateau")
    print(
        json.dumps(
            {
                "finds_per_s": round(finds),
                "upserts_per_s": round(upserts),
                "inserts_per_s": round(inserts),
                "finds_from_bytes_per_s": round(from_bytes),
                "observes_per_s": round(observes),
                **{f"observes_{name}_per_s": round(value) for name, value in observed.items()},
                "sketch_early_share": round(nominal, 7),
                "sketch_early_share_at_twice_the_load": round(twice, 6),
                "dict_finds_per_s": round(dict_finds),
                "dict_upserts_per_s": round(dict_upserts),
                "rocksdb_finds_per_s": round(disk_finds),
                "rocksdb_upserts_per_s": round(disk_upserts),
                "overhead_bytes_per_row": round(max(overhead.values()), 1),
                "reuse_ratio": round(reuse, 3),
            }
        )
    )
    return None


if __name__ == "__main__":
    main()
