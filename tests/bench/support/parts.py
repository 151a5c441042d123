"""The speed of each unavoidable part of a serving worker, alone: the limit of any worker made of these parts.

Every part is measured in processor time of this process, all its threads included, so that a broker on the other
core, or a neighbour on the machine, does not count. Figures are microseconds of one core for each unit.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import numpy as np
from aiokafka import AIOKafkaConsumer, TopicPartition
from confluent_kafka import Producer

from stream.allocator import keep_freed_memory
from stream.batch_producer import BatchProducer, asyncio_client_config
from stream.kafka import producer_config
from stream.model.engine import Engine
from stream.store import PackedKeys
from stream.transport import BlockFetcher
from stream.wire import EventDecoder, PackedValues, RecordBlock, Schema
from tests.bench.support.site import Site
from tests.bench.support.workload import EPOCH_MS, Workload

__all__ = ["consume", "decode", "produce", "publish", "recurrent"]


def _best(run: Callable[[], object], units: int, repeats: int = 20) -> float:
    """Microseconds of processor time a unit: the fastest quarter of the repetitions."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    times.sort()
    return float(np.mean(times[: max(1, repeats // 4)])) / units * 1e6


def consume(site: Site, events: int) -> float:
    """Blocks by the worker's fetcher, as large as the worker's, over real records."""

    async def read() -> float:
        topics = site.settings.topics
        consumer = AIOKafkaConsumer(
            bootstrap_servers=site.settings.kafka.bootstrap_servers, enable_auto_commit=False,
            auto_offset_reset="earliest",
        )  # fmt: skip
        await consumer.start()
        fetcher = BlockFetcher.take_over(consumer)
        try:
            consumer.assign([TopicPartition(topics.events, p) for p in range(topics.partitions)])
            most = site.settings.worker.batch_records
            await fetcher.fetched_blocks(None, 10.0, most)
            seen, started = 0, time.process_time()
            while seen < events:
                blocks = await fetcher.fetched_blocks(None, 5.0, most)
                if not blocks:
                    break
                seen += sum(len(block.records) for block in blocks.values())
            return (time.process_time() - started) / max(1, seen) * 1e6
        finally:
            await consumer.stop()

    return asyncio.run(read())


def _block(workload: Workload, events: int) -> RecordBlock:
    keys, values, _ = next(workload.chunks(events, 1))
    later = np.full(events, EPOCH_MS + 10**7)
    return RecordBlock.from_lists(keys, values, np.arange(events), later)


def decode(site: Site, workload: Workload, batch: int) -> float:
    """`EventDecoder.decode` on a block of records that lie in arrays already."""
    decoder = EventDecoder(Schema.compile(site.settings), site.settings.limits, site.settings.topics.format)
    block = _block(workload, batch)
    if not decoder.decode(block).accepted.all():
        raise RuntimeError("the workload's own records were refused")
    return _best(lambda: decoder.decode(block), batch)


def recurrent(site: Site, batch: int, waves: int = 1) -> float:
    """`Cell.run` on inputs that are ready: `batch` events in that many waves of equal size."""
    cell = Engine(site.layout, site.parameters).cell
    rng = np.random.default_rng(3)
    inputs = rng.standard_normal((batch, site.layout.inputs)).astype(np.float32)
    starts = np.linspace(0, batch, waves + 1).astype(np.int64)
    # Of as many clients as the largest wave has.
    slots = np.arange(np.diff(starts).max())
    first, none = np.zeros((batch, site.layout.hidden), np.float32), np.empty(0, np.int64)
    cell.run(inputs, starts, first, slots, none)
    return _best(lambda: cell.run(inputs, starts, first, slots, none), batch)


def produce(site: Site, value_bytes: int, records: int) -> float:
    """Records of that size by `Producer.produce`, until all are confirmed; librdkafka's threads included."""
    producer = Producer(producer_config(site.settings, delivery_report_only_error=True))
    rng = np.random.default_rng(4)
    # States of a trained network hardly compress: neither do these.
    values = [rng.bytes(value_bytes) for _ in range(1000)]
    keys = [f"c{i:05d}".encode() for i in range(1000)]
    topic, partitions = site.settings.topics.embeddings, site.settings.topics.partitions
    producer.produce(topic, value=values[0], key=keys[0], partition=0)
    producer.flush(30)
    started = time.process_time()
    for i in range(records):
        while True:
            try:
                # Positional: named arguments cost the caller as much again as the call itself.
                producer.produce(topic, values[i % 1000], keys[i % 1000], i // 4096 % partitions)
                break
            except BufferError:
                producer.poll(0.05)
        if i % 4096 == 0:
            producer.poll(0)
    if producer.flush(120):
        raise RuntimeError("records were not confirmed")
    return (time.process_time() - started) / records * 1e6


def publish(site: Site, value_bytes: int, records: int, batch: int) -> float:
    """Records of that size as the worker publishes embeddings, `batch` to a call, until all are confirmed."""
    keep_freed_memory()
    topics = site.settings.topics
    producer = BatchProducer(
        asyncio_client_config(site.settings), topics.embeddings, site.settings.kafka.compression, "bench"
    )
    for partition in range(topics.partitions):
        producer.begin(partition)
    rng = np.random.default_rng(4)
    # States of a trained network hardly compress: neither do these.
    values = PackedValues.from_list([rng.bytes(value_bytes) for _ in range(batch)])
    keys = PackedKeys.from_list([f"c{i:05d}".encode() for i in range(batch)])
    calls = max(1, records // batch)
    try:
        for partition in range(topics.partitions):
            producer.send(partition, keys, values)
        producer.flush(60)
        started = time.process_time()
        for i in range(calls):
            producer.send(i % topics.partitions, keys, values)
        producer.flush(120)
        return (time.process_time() - started) / (calls * batch) * 1e6
    finally:
        producer.close()
