"""Cost of lookups when most rows are on disk: `python -m tests.bench.growth`.

Ten million rows of 32 floats under 16-byte keys are looked up in batches of 4,096 under a Zipf(1.0) access pattern,
first all in memory, then with one million in memory and everything in RocksDB, with and without copies of the rows
that left memory in a scratch file (`cold_rows`), whose pages are the system's. All answer the same batches. The last
line is JSON: in_memory_per_s, tiered_per_s, ratio, and tiered_without_copies_per_s.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
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


def resident(kind: str) -> str:
    """A kind of resident memory of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return f"{int(line.split()[1]) // 1024} MiB"
    return "unknown"


def main() -> None:
    """Run both tables and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--memory-rows", type=int, default=1_000_000)
    parser.add_argument("--cold-rows", type=int, default=10_000_000)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--warm-up", type=int, default=1500)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    every = zipf_batches(arguments.rows, arguments.warm_up + arguments.batches, rng)
    warm_up, batches = every[: arguments.warm_up], every[arguments.warm_up :]

    with EmbeddingStore.open(None, StoreOptions(width=WIDTH, reserve_rows=arguments.rows + BATCH)) as store:
        rate = fill(store, arguments.rows, arguments.rows)
        print(f"in memory: {rate:,.0f} rows/s written", flush=True)
        in_memory = measure(store, warm_up[-100:], batches)
        print(f"in memory: {in_memory:,.0f} lookups/s over {len(store):,} rows", flush=True)
    del store
    gc.collect()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table"
        figures: dict[str, float] = {}
        for name, cold_rows in (("tiered_per_s", arguments.cold_rows), ("tiered_without_copies_per_s", 0)):
            options = StoreOptions(width=WIDTH, memory_rows=arguments.memory_rows, cold_rows=cold_rows)
            with EmbeddingStore.open(path, options) as store:
                if not len(store):
                    rate = fill(store, arguments.rows, arguments.memory_rows // 2)
                    print(f"tiered: {rate:,.0f} rows/s written and committed", flush=True)
                figures[name] = measure(store, warm_up if cold_rows else warm_up[-100:], batches)
                stats = store.stats
                print(
                    f"tiered, {cold_rows:,} copies of rows that left memory: {figures[name]:,.0f} lookups/s over "
                    f"{stats.rows:,} rows, {stats.memory_rows:,} in memory; "
                    f"resident memory {resident('RssAnon')} private, {resident('RssFile')} of files",
                    flush=True,
                )
    figures = {"in_memory_per_s": in_memory} | figures
    line = {name: round(value) for name, value in figures.items()}
    print(json.dumps(line | {"ratio": round(figures["tiered_per_s"] / in_memory, 3)}))


if __name__ == "__main__":
    main()
