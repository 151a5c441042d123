"""Blocks fetched from real brokers: nothing lost or doubled through seeks, pauses, transactions and damage."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.protocol.fetch import FetchRequest
from confluent_kafka import Producer
from confluent_kafka import TopicPartition as ClientPartition
from confluent_kafka.admin import AdminClient, NewTopic
from faust.types import TP

from stream.broker import Broker
from stream.errors import BrokerError
from stream.transport import BlockFetcher, FetchedBlock, _together
from stream.wire import RecordBlock
from stream.wire.record_reader import RecordReader

Records = list[tuple[int, bytes | None, bytes | None, list[tuple[str, bytes | None]]]]
MOST = 50


class Topic:
    """A topic of its own, and what is in it."""

    def __init__(self, broker: Broker, partitions: int = 1) -> None:
        self.servers = broker.bootstrap_servers
        self.name = f"t-{uuid.uuid4().hex[:8]}"
        admin = AdminClient({"bootstrap.servers": self.servers})
        admin.create_topics([NewTopic(self.name, partitions, 1)])[self.name].result(30)
        self.partitions = [TopicPartition(self.name, number) for number in range(partitions)]

    def publish(self, values: list[bytes], partition: int = 0, **config: Any) -> None:
        producer = Producer({"bootstrap.servers": self.servers, "linger.ms": 20, **config})
        for i, value in enumerate(values):
            headers = [("name", value), ("null", None)] if i % 10 == 3 else []
            key = None if i % 7 == 6 else b"%d" % i
            producer.produce(self.name, value if i % 11 else None, key, partition, headers=headers)
        assert producer.flush(30) == 0

    @asynccontextmanager
    async def fetching(
        self, processor_s: Callable[[], float] = time.process_time, **options: Any
    ) -> AsyncIterator[tuple[AIOKafkaConsumer, BlockFetcher]]:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.servers, enable_auto_commit=False, auto_offset_reset="earliest", **options
        )
        await consumer.start()
        try:
            fetcher = BlockFetcher.take_over(consumer, processor_s)
            consumer.assign(self.partitions)
            yield consumer, fetcher
        finally:
            await consumer.stop()


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))


async def one(fetcher: BlockFetcher, most: int = MOST) -> FetchedBlock:
    """The next block of a topic of one partition."""
    (block,) = (await fetcher.fetched_blocks(None, 30.0, most)).values()
    return block


def content(records: RecordBlock) -> Records:
    return [
        (int(records.offsets[i]), records.key(i), records.value(i), list(records.headers_of(i)))
        for i in range(len(records))
    ]


async def by_aiokafka(topic: Topic, count: int) -> Records:
    """The first records of the topic, by aiokafka's own consumer."""
    consumer = AIOKafkaConsumer(bootstrap_servers=topic.servers, enable_auto_commit=False, auto_offset_reset="earliest")
    await consumer.start()
    try:
        consumer.assign(topic.partitions)
        found = [await consumer.getone() for _ in range(count)]
        return [(r.offset, r.key, r.value, list(r.headers)) for r in found]
    finally:
        await consumer.stop()


def test_every_record_comes_once_in_every_codec(broker: Broker) -> None:
    # Given records with and without keys, values and headers, in batches of every codec
    topic = Topic(broker)
    for codec in ("none", "gzip", "snappy", "lz4", "zstd", "none"):
        topic.publish([b"%s-%d" % (codec.encode(), i) for i in range(120)], **{"compression.type": codec})

    async def main() -> None:
        async with topic.fetching(max_partition_fetch_bytes=4000) as (consumer, fetcher):
            # When they are fetched in blocks
            found: Records = []
            while len(found) < 720:
                block = await one(fetcher)
                # Then each block begins where the one before ended, and the consumer stands at its end
                assert block.start == len(found)
                assert await consumer.position(topic.partitions[0]) == block.end
                assert len(block.records) <= MOST
                found += content(block.records)
            # And they are what aiokafka reads
            assert found == await by_aiokafka(topic, 720)
            assert consumer.highwater(topic.partitions[0]) == 720
            assert await fetcher.fetched_blocks(None, 0.0, MOST) == {}
            # And what comes later is waited for
            waiting = asyncio.create_task(one(fetcher))
            await asyncio.to_thread(topic.publish, [b"later"])
            assert (await waiting).start == 720

    run(main)


def test_a_seek_is_where_the_next_block_begins(broker: Broker) -> None:
    topic = Topic(broker)
    topic.publish([b"%d" % i for i in range(500)])
    (tp,) = topic.partitions

    async def main() -> None:
        async with topic.fetching() as (consumer, fetcher):
            await one(fetcher)
            for position in (120, 499, 0, 7):
                # Given more at hand, when another offset is sought
                consumer.seek(tp, position)
                # Then the next block begins there, though its batch begins before
                block = await one(fetcher)
                assert (block.start, int(block.records.offsets[0])) == (position, position)

    run(main)


def test_records_that_come_steadily_come_together(apache_broker: Broker) -> None:
    # Given a topic of two partitions
    topic = Topic(apache_broker, 2)

    async def main() -> None:
        async with topic.fetching() as (_, fetcher):
            # When records are published one by one, much faster than blocks are to come
            stop = threading.Event()
            publishing = asyncio.create_task(asyncio.to_thread(publish_steadily, topic, stop))
            await fetcher.fetched_blocks(None, 30.0, MOST)
            began, rounds, records = time.monotonic(), 0, 0
            while time.monotonic() - began < 1.0:
                found = await fetcher.fetched_blocks(None, 30.0, 65_536)
                rounds, records = rounds + 1, records + sum(len(block.records) for block in found.values())
            took = time.monotonic() - began
            stop.set()
            await publishing
            # Then they are given out at most some hundred times a second
            assert records > rounds
            assert rounds <= took / 0.007 + 2

    run(main)


def test_the_less_a_process_has_to_spare_the_longer_a_fetch_is_held(apache_broker: Broker) -> None:
    # Given records that come steadily, and a process that has used no processor time
    topic = Topic(apache_broker, 2)
    used = 0.0

    async def main() -> None:
        nonlocal used
        async with topic.fetching(lambda: used) as (_, fetcher):
            stop = threading.Event()
            publishing = asyncio.create_task(asyncio.to_thread(publish_steadily, topic, stop))

            async def held_for(wanted_ms: int) -> None:
                while fetcher._gather_ms != wanted_ms:
                    await fetcher.fetched_blocks(None, 30.0, 65_536)

            try:
                # Then the broker holds fetches for the shortest time
                await held_for(8)
                # And when it has used more than a second within a moment, for the longest
                used = 1.5
                await held_for(20)
                # And for the shortest again after a while of rest
                await held_for(8)
            finally:
                stop.set()
                await publishing

    run(main)


def test_of_blocks_that_come_together_the_last_one_says_so(broker: Broker) -> None:
    # Given records in every partition
    topic = Topic(broker, 3)
    for tp in topic.partitions:
        topic.publish([b"%d" % i for i in range(20)], tp.partition)

    async def main() -> None:
        async with topic.fetching() as (_, fetcher):
            seen = 0
            while seen < 60:
                # When blocks are handed over, of one partition or of several
                found = list((await fetcher.fetched_blocks(None, 30.0, 7)).values())
                seen += sum(len(block.records) for block in found)
                # Then all but the last one say that another follows
                assert [block.more for block in found] == [True] * (len(found) - 1) + [False]
            assert await fetcher.fetched_blocks(None, 0.0, 7) == {}

    run(main)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([5, 7, 30], [[0, 1, 2]]),
        ([9000], [[0]]),
        ([4000, 96, 1, 9000, 4096, 2, 3], [[0, 1], [2], [3], [4], [5, 6]]),
    ],
)
def test_small_blocks_come_in_one_message(sizes: list[int], expected: list[list[int]]) -> None:
    # Given a fetch with blocks of so many records, of as many partitions
    fetched = []
    for number, size in enumerate(sizes):
        records = RecordBlock.from_lists([b"key"] * size, [b"value"] * size, np.arange(size), np.full(size, 10**13))
        fetched.append((TP("events", number), FetchedBlock(number, 0, records)))
    # Then they are handed over in their order, together up to so many records, by the partition of the first
    together = list(_together(fetched))
    assert [[block.partition for block in blocks] for _, blocks in together] == expected
    assert [tp.partition for tp, _ in together] == [numbers[0] for numbers in expected]


def publish_steadily(topic: Topic, stop: threading.Event) -> None:
    producer = Producer({"bootstrap.servers": topic.servers, "linger.ms": 0})
    while not stop.is_set():
        for tp in topic.partitions:
            producer.produce(topic.name, b"value", b"key", tp.partition)
        producer.poll(0.001)
    assert producer.flush(30) == 0


def test_a_partition_at_its_end_does_not_hold_up_one_with_more(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a partition with records and one without
    topic = Topic(broker, 2)
    full, empty = topic.partitions
    topic.publish([b"%d" % i for i in range(4 * MOST)], full.partition)
    asked: list[tuple[float, set[int], int]] = []

    async def main() -> None:
        async with topic.fetching() as (_, fetcher):
            send = fetcher._client.send

            async def noting(node: int, request: Any, **options: Any) -> Any:
                if isinstance(request, FetchRequest):
                    partitions = {partition for _, parts in request.topics for partition, *_ in parts}
                    asked.append((time.monotonic(), partitions, request._max_wait_ms))
                return await send(node, request, **options)

            monkeypatch.setattr(fetcher._client, "send", noting)
            # When the other one is asked for while fetched records wait here
            found = (await fetcher.fetched_blocks(None, 30.0, MOST))[full].end
            while [partitions for _, partitions, _ in asked].count({empty.partition}) < 4:
                await asyncio.sleep(0.005)
            glances = [(at, wait_ms) for at, partitions, wait_ms in asked if partitions == {empty.partition}]
            # Then the broker is to answer at once, and is not asked again and again
            assert all(wait_ms == 0 for _, wait_ms in glances)
            assert glances[3][0] - glances[0][0] >= 3 * 0.018
            # And once all are given out, both are waited for
            while found < 4 * MOST:
                found = (await fetcher.fetched_blocks(None, 30.0, MOST))[full].end
            while asked[-1][1] != {full.partition, empty.partition}:
                await asyncio.sleep(0.005)
            assert asked[-1][2] > 0

    run(main)


def test_records_that_are_gone_are_a_hole_after_the_start(apache_broker: Broker) -> None:
    # Given a log whose first records are deleted
    topic = Topic(apache_broker)
    topic.publish([b"%d" % i for i in range(10)])
    admin = AdminClient({"bootstrap.servers": topic.servers})
    admin.delete_records([ClientPartition(topic.name, 0, 4)])[ClientPartition(topic.name, 0)].result(30)

    async def main() -> None:
        async with topic.fetching() as (consumer, fetcher):
            # When one of them is sought, and aiokafka goes on with the earliest there is
            consumer.seek(topic.partitions[0], 2)
            block = await one(fetcher)
            # Then the block still begins where it was asked to
            assert (block.start, block.records.offsets.tolist()) == (2, [4, 5, 6, 7, 8, 9])

    run(main)


def test_partitions_left_out_keep_what_was_fetched(broker: Broker) -> None:
    topic = Topic(broker, partitions=3)
    for partition in range(3):
        topic.publish([b"%d" % i for i in range(100)], partition)

    async def main() -> None:
        async with topic.fetching() as (_, fetcher):
            seen = dict.fromkeys(topic.partitions, 0)

            async def take(chosen: set[Any] | None) -> None:
                for tp, block in (await fetcher.fetched_blocks(chosen, 1.0, MOST)).items():
                    assert chosen is None or tp in chosen
                    assert block.partition == tp.partition
                    assert block.start == seen[tp] == block.records.offsets[0]
                    seen[tp] = block.end

            # Given one partition that is active, when it is read to its end
            first, *others = topic.partitions
            while seen[first] < 100:
                await take({first})
            # Then the others are where they were, and come whole later
            assert [seen[tp] for tp in others] == [0, 0]
            while any(end < 100 for end in seen.values()):
                await take(None)
            # And one that aiokafka has paused comes when it is resumed
            topic.publish([b"more"], first.partition)
            fetcher._subscriptions.pause(first)
            assert await fetcher.fetched_blocks(None, 0.2, MOST) == {}
            fetcher._subscriptions.resume(first)
            while seen[first] < 101:
                await take(None)

    run(main)


def test_seeks_of_another_thread_fall_between_blocks(broker: Broker) -> None:
    # Given a consumer that reads on its own thread
    topic = Topic(broker)
    topic.publish([b"x" * (i % 50) for i in range(20_000)])
    (tp,) = topic.partitions
    blocks: list[FetchedBlock] = []
    sought: list[int] = []
    rng = np.random.default_rng(3)

    async def main() -> None:
        async with topic.fetching() as (consumer, fetcher):
            stopping = threading.Event()

            def seek() -> None:
                while not stopping.wait(0.002):
                    position = int(rng.integers(20_000))
                    sought.append(position)
                    consumer.seek(tp, position)

            # When another thread seeks all the time
            seeking = threading.Thread(target=seek)
            seeking.start()
            try:
                while len(blocks) < 100 or len(sought) < 50:
                    blocks.extend((await fetcher.fetched_blocks(None, 0.05, 700)).values())
            finally:
                stopping.set()
                await asyncio.to_thread(seeking.join)

    run(main)
    # Then every block begins where the one before ended or where one was to begin, and holds all from there on
    end = 0
    for block in blocks:
        assert block.start == end or block.start in sought
        assert block.records.offsets.tolist() == list(range(block.start, block.end))
        end = block.end


def test_a_damaged_batch_is_an_error_and_is_fetched_again(broker: Broker) -> None:
    topic = Topic(broker)
    topic.publish([b"%d" % i for i in range(30)])
    (tp,) = topic.partitions

    async def main() -> None:
        async with topic.fetching() as (_, fetcher):
            while tp not in fetcher._records:
                await asyncio.wait([fetcher._create_fetch_waiter()], timeout=1.0)
            # Given a response that was damaged on its way
            fetched = fetcher._records[tp]._partition_records
            data = bytearray(fetched.reader._data)
            data[-1] ^= 1
            fetched.reader = RecordReader(bytes(data), 0, name="partition 0 of events")
            # When it is read, then the error says where
            with pytest.raises(BrokerError, match=r"partition 0 of events: record batch at offset \d+ is damaged"):
                await fetcher.fetched_blocks(None, 30.0, MOST)
            # And the next read has it whole
            block = await one(fetcher)
            assert (block.start, block.end) == (0, 30)

    run(main)


def test_aborted_transactions_are_left_out_where_only_committed_ones_count(apache_broker: Broker) -> None:
    # Given transactions, committed and aborted, among other records
    topic = Topic(apache_broker)
    topic.publish([b"plain"] * 5)
    producer = Producer({"bootstrap.servers": topic.servers, "transactional.id": topic.name, "linger.ms": 5})
    producer.init_transactions(30)
    committed: set[bytes] = {b"plain"}
    for number in range(8):
        producer.begin_transaction()
        value = b"transaction %d" % number
        for _ in range(6):
            producer.produce(topic.name, value, b"k", 0)
        # Aborted only once the records are in the log: otherwise they never are.
        assert producer.flush(30) == 0
        if number % 3 == 0:
            producer.abort_transaction(30)
        else:
            producer.commit_transaction(30)
            committed.add(value)
    topic.publish([b"plain"] * 3)

    async def read(isolation: str, last: int) -> list[bytes]:
        values: list[bytes] = []
        async with topic.fetching(isolation_level=isolation) as (_, fetcher):
            end = 0
            while end < last:
                block = await one(fetcher, 4)
                # Then markers and what was aborted are holes in the log, and not between blocks
                assert block.start == end
                end = block.end
                values += [block.records.value(i) or b"plain" for i in range(len(block.records))]
        return values

    async def main() -> None:
        last = 5 + 8 * 7 + 3
        everything = await read("read_uncommitted", last)
        assert len(everything) == 5 + 8 * 6 + 3
        assert await read("read_committed", last) == [value for value in everything if value in committed]

    run(main)
