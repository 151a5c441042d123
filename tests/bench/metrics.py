"""What metrics cost a worker: a micro-batch's counts beside the micro-batch itself, and the answer to Prometheus.

    python -m tests.bench.metrics [--seconds N] [--clients 100000]

Blocks of several sizes are applied to rows in memory (decode, find, recurrent unit, embeddings), without a broker, and
counted as a worker counts them. Both are processor time of the same loop, the median over its blocks, so that a
neighbour on the machine counts less; the clock's own time is part of the counts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator

import numpy as np
import torch
from prometheus_client import generate_latest

from stream.metrics import WorkerMetrics
from stream.model.engine import Engine
from stream.model.heads import Questions
from stream.model.layout import Layout
from stream.partition import Partition, Served
from stream.settings import parse
from stream.store import EmbeddingStore, StoreOptions
from stream.transport import FetchedBlock
from stream.wire import EmbeddingEncoder, EventDecoder, RecordBlock, Schema
from tests.bench.support.site import machine
from tests.bench.support.workload import EPOCH_MS, Workload, random_parameters, settings_text

__all__ = ["main"]

_SIZES = (100, 1_000, 8_192)


def _blocks(workload: Workload, size: int) -> Iterator[FetchedBlock]:
    """The workload's events for ever, in blocks of that size."""
    offset = 0
    while True:
        for keys, values, _ in workload.chunks(20 * size, 1):
            for start in range(0, len(keys) - size + 1, size):
                chosen = slice(start, start + size)
                offsets = np.arange(offset, offset + size)
                times = np.full(size, EPOCH_MS + 10**9)
                yield FetchedBlock(0, offset, RecordBlock.from_lists(keys[chosen], values[chosen], offsets, times))
                offset += size


def _share(size: int, clients: int, seconds: float) -> tuple[float, float]:
    """Processor time of a block of that size, and of its counts, in microseconds; the medians."""
    settings = parse(settings_text())
    schema = Schema.compile(settings)
    layout = Layout.compile(settings, schema)
    questions, parameters = Questions(layout), random_parameters(layout)
    served = Served(Engine(layout, parameters), questions, questions.heads(parameters), 1)
    decoder = EventDecoder(schema, settings.limits, "msgpack")
    metrics = WorkerMetrics()
    with EmbeddingStore.open(None, StoreOptions(width=layout.width)) as store:
        partition = Partition(0, store, 0, decoder, EmbeddingEncoder(layout.hidden, []))
        applying: list[float] = []
        counting: list[float] = []
        end = 0.0
        for done, block in enumerate(_blocks(Workload(clients=clients), size)):
            before = time.process_time()
            applied = partition.apply(block, served)
            between = time.process_time()
            metrics.batches.count(
                0, len(block.records), applied.events, applied.replayed, applied.waves,
                seconds=between - before, age_s=time.time() - int(block.records.timestamps_ms[0]) / 1000.0, lag=3,
            )  # fmt: skip
            for _, embeddings in applied.embeddings:
                metrics.batches.embeddings += len(embeddings or ())
            after = time.process_time()
            # The first ones compile.
            if done < 5:
                end = time.monotonic() + seconds
                continue
            applying.append(between - before)
            counting.append(after - between)
            if time.monotonic() >= end:
                return float(np.median(applying)) * 1e6, float(np.median(counting)) * 1e6
    raise AssertionError("blocks never end")


def _answer(partitions: int, seconds: float) -> tuple[float, int]:
    """Milliseconds of processor time for an answer to Prometheus, and its bytes."""
    metrics = WorkerMetrics()
    with EmbeddingStore.open(None, StoreOptions(width=8)) as store:
        metrics.stores.read = lambda: [(number, store.stats) for number in range(partitions)]
        for number in range(partitions):
            metrics.batches.lag[number] = 1
        body = generate_latest(metrics.registry)
        started, answers, end = time.process_time(), 0, time.monotonic() + seconds
        while time.monotonic() < end:
            body = generate_latest(metrics.registry)
            answers += 1
        return (time.process_time() - started) / answers * 1e3, len(body)


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """Measure, print, and return the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each size of blocks")
    parser.add_argument("--clients", type=int, default=100_000)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    figures: dict[str, object] = {"machine": machine()}
    for size in _SIZES:
        applying, counting = _share(size, options.clients, options.seconds)
        figures |= {
            f"block_of_{size}_us": round(applying, 1),
            f"counts_of_{size}_us": round(counting, 2),
            f"share_of_{size}": round(counting / (applying + counting), 5),
        }
        print(f"blocks of {size}: {applying:.0f} us, counts {counting:.1f} us")
    milliseconds, length = _answer(4, options.seconds)
    figures |= {"answer_ms": round(milliseconds, 2), "answer_bytes": length}
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()
