"""Cost of a table most of whose rows are on disk: `python -m tests.bench.growth`.

Ten million rows of 32 floats under 16-byte keys are looked up in batches of 4,096 under a Zipf(1.0) access pattern,
first all in memory, then with one million in memory and everything in RocksDB: as a table is by default, with copies
of the rows that left memory in a scratch file whose pages are the system's, and without these copies. All answer the
same batches. Then a million other rows expire, in memory and with a tenth of them there, and the sweep's slices are
timed, each with a budget of 4 ms. The last line is JSON: in_memory_per_s, tiered_per_s, ratio,
tiered_without_copies_per_s, what the tiered table wrote a second and holds of memory, page cache and disk, and per
sweep the rows it ended a second and its slices (median, 99th percentile, longest, share above 5 ms; and the same of
the processor's time, which leaves out waiting for the processor or the disk).
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stream.store import EmbeddingStore, PackedKeys, StoreOptions

WIDTH = 32
BATCH = 4096


def make_keys(ids: np.ndarray) -> PackedKeys:
    """16-byte keys, a bijection of ids that scatters them."""
    words = np.empty((ids.shape[0], 2), np.uint64)
    words[:, 0] = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    words[:, 1] = ids
    return PackedKeys(words.view(np.uint8).reshape(-1), np.arange(ids.shape[0] + 1, dtype=np.int64) * 16)


def zipf_batches(rows: int, batches: int, rng: np.random.Generator) -> list[PackedKeys]:
    """Batches of keys drawn with probability proportional to 1 / rank; ranks are spread over the ids."""
    cumulative = np.cumsum(1.0 / np.arange(1, rows + 1))
    ranks = np.searchsorted(cumulative, rng.random(batches * BATCH) * cumulative[-1])
    ids = rng.permutation(rows)[ranks]
    return [make_keys(ids[i : i + BATCH]) for i in range(0, batches * BATCH, BATCH)]


def fill(store: EmbeddingStore, rows: int, flush_every: int) -> float:
    """Rows written per second, commits included."""
    rng = np.random.default_rng(1)
    vectors = rng.random((BATCH, WIDTH), np.float32)
    started = time.perf_counter()
    due = flush_every
    for start in range(0, rows, BATCH):
        ids = np.arange(start, min(start + BATCH, rows))
        store.upsert(make_keys(ids), vectors[: ids.shape[0]], event_ms=1, offsets=ids)
        if start >= due:
            store.flush()
            due += flush_every
    store.flush()
    return rows / (time.perf_counter() - started)


def measure(store: EmbeddingStore, warm_up: list[PackedKeys], batches: list[PackedKeys]) -> float:
    """Lookups per second: the best of three passes, so that other work on the machine counts least."""
    for keys in warm_up:
        store.lookup(keys)
    best = 0.0
    part = len(batches) // 3
    for i in range(3):
        started = time.perf_counter()
        for keys in batches[i * part : (i + 1) * part]:
            store.lookup(keys)
        best = max(best, part * BATCH / (time.perf_counter() - started))
    return best


def resident_bytes(kind: str) -> int:
    """A kind of resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    return 0


def disk_bytes(folder: Path) -> int:
    """Disk in use by the files in a folder."""
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def measure_sweep(rows: int, memory_rows: int | None, folder: Path) -> dict[str, float]:
    """Let `rows` rows expire at once and sweep them; figures of the slices."""
    options = StoreOptions(width=WIDTH, memory_rows=memory_rows, ttl_ms=1000)
    took: list[float] = []
    worked: list[float] = []
    with EmbeddingStore.open(folder if memory_rows else None, options) as store:
        fill(store, rows, (memory_rows or rows) // 2)
        store.advance_watermark(10_000)
        # Python's own collector passes over all objects now and then; that is no work of the sweep's.
        gc.collect()
        gc.disable()
        while len(store):
            started, began = time.perf_counter(), time.thread_time()
            store.sweep(4.0)
            took.append(1000.0 * (time.perf_counter() - started))
            worked.append(1000.0 * (time.thread_time() - began))
        gc.enable()
    slices = np.array(took)
    return {
        "rows_per_s": round(1000.0 * rows / slices.sum()),
        "slice_ms_median": round(float(np.median(slices)), 2),
        "slice_ms_p99": round(float(np.percentile(slices, 99)), 2),
        "slice_ms_max": round(float(slices.max()), 2),
        "slice_cpu_ms_p99": round(float(np.percentile(worked, 99)), 2),
        "slice_cpu_ms_max": round(max(worked), 2),
        "slices": slices.shape[0],
        "share_above_5_ms": round(float((slices > 5.0).mean()), 5),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tables and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--memory-rows", type=int, default=1_000_000)
    parser.add_argument("--sweep-rows", type=int, default=1_000_000)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--warm-up", type=int, default=1500)
    arguments = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    every = zipf_batches(arguments.rows, arguments.warm_up + arguments.batches, rng)
    warm_up, batches = every[: arguments.warm_up], every[arguments.warm_up :]
    line: dict[str, object] = {}

    with tempfile.TemporaryDirectory() as folder:
        # The first of each only loads compiled code.
        measure_sweep(1000, None, Path(folder) / "memory")
        measure_sweep(1000, 100, Path(folder) / "tiered")
        for name, memory_rows in (("memory", None), ("tiered", arguments.sweep_rows // 10)):
            swept = measure_sweep(arguments.sweep_rows, memory_rows, Path(folder) / "swept")
            print(f"sweep, {name}: {json.dumps(swept)}", flush=True)
            line |= {f"sweep_{name}_{key}": value for key, value in swept.items()}

    with EmbeddingStore.open(None, StoreOptions(width=WIDTH, reserve_rows=arguments.rows + BATCH)) as store:
        rate = fill(store, arguments.rows, arguments.rows)
        print(f"in memory: {rate:,.0f} rows/s written", flush=True)
        in_memory = measure(store, warm_up[-100:], batches)
        print(f"in memory: {in_memory:,.0f} lookups/s over {len(store):,} rows", flush=True)
    del store
    gc.collect()
    before = resident_bytes("RssAnon")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table"
        with EmbeddingStore.open(path, StoreOptions(width=WIDTH, memory_rows=arguments.memory_rows)) as store:
            rate = fill(store, arguments.rows, arguments.memory_rows // 2)
            print(f"tiered: {rate:,.0f} rows/s written and committed", flush=True)
            tiered = measure(store, warm_up, batches)
            stats = store.stats
            private, files = resident_bytes("RssAnon") - before, resident_bytes("RssFile")
            database = disk_bytes(path)
            print(
                f"tiered: {tiered:,.0f} lookups/s over {stats.rows:,} rows, {stats.memory_rows:,} in memory and "
                f"{stats.cold_rows:,} copies; {private >> 20} MiB private memory, {files >> 20} MiB of files' pages "
                f"mapped; on disk {database >> 20} MiB of database, {stats.cold_bytes >> 20} MiB of copies",
                flush=True,
            )
        without_copies = StoreOptions(width=WIDTH, memory_rows=arguments.memory_rows, cold_rows=0)
        with EmbeddingStore.open(path, without_copies) as store:
            bare = measure(store, warm_up[-100:], batches)
            print(f"tiered, without copies: {bare:,.0f} lookups/s", flush=True)
    line = {
        "in_memory_per_s": round(in_memory),
        "tiered_per_s": round(tiered),
        "ratio": round(tiered / in_memory, 3),
        "tiered_without_copies_per_s": round(bare),
        "tiered_writes_per_s": round(rate),
        "private_bytes": private,
        "mapped_file_bytes": files,
        "database_bytes": database,
        "copies_bytes": stats.cold_bytes,
    } | line
    print(json.dumps(line))


if __name__ == "__main__":
    main()
