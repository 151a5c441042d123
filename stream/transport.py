"""A Faust transport that hands agents partition batches.

Faust's stock consumer turns every record into a message and four tasks; here all records that one fetch returned for a
partition are a `FetchedBlock`, read from the bytes of the response straight into arrays, and one message carries a
block, or several small ones of different partitions. Group membership, rebalancing and the consumer's thread stay
Faust's; fetching and positions stay aiokafka's.

Guaranteed: the blocks of a partition are handed over in order, and each says where the one before it ended
(`FetchedBlock.start`), so a block that was dropped on the way (Faust drops what was fetched before a rebalance)
is noticed by whoever applies them. Offsets are committed only by `BlockConsumer.commit_positions`: Faust's own
acknowledgements count messages, which here are batches.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, ClassVar

import faust
import numpy as np
from aiokafka.consumer.fetcher import READ_COMMITTED, Fetcher, FetchError
from aiokafka.errors import ConsumerStoppedError, IllegalStateError
from aiokafka.record.memory_records import MemoryRecords
from faust.auth import SASLCredentials, SSLCredentials
from faust.transport.consumer import RecordMap
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread, Consumer, Transport
from faust.types import TP, ConsumerMessage

from stream.errors import BrokerError
from stream.security import asyncio_security
from stream.settings import Kafka
from stream.wire import RecordBlock
from stream.wire.record_reader import RecordReader, load_kernels

__all__ = [
    "EVENTS_ISOLATION",
    "BlockConsumer",
    "BlockFetcher",
    "BlockSchema",
    "BlockTransport",
    "FetchedBlock",
    "broker_credentials",
]

#: Events of transactions that were aborted never happened.
EVENTS_ISOLATION = "read_committed"
#: Of a block, where Faust is given no number: what `worker.batch_records` may be at most.
_MOST_RECORDS = 65_536
#: While records come steadily, the broker holds a fetch for so long, unless so many bytes come together: the shorter
#: time as long as this process uses less of a core than the lower share, the longer time from the upper share on.
_GATHER_MS, _WORTH_BYTES = (8.0, 20.0), 128 * 1024
_SPARE_SHARES = (0.6, 0.9)
#: The share is a mean that forgets within so long; to ask for processor time is a system call, so that is seldom done.
_SHARE_S, _ASKED_S = 1.0, 0.05
#: Otherwise it answers as soon as there is a record; aiokafka's own default.
_WAIT_MS = 500
#: Blocks of one fetch go into one message up to so many records: handing a message over costs what applying a small
#: block does.
_TOGETHER = 4_096
#: While fetched records wait here, partitions without any are asked at most so often, and the broker answers at once.
_GLANCE_S = 0.02


@dataclass(frozen=True)
class FetchedBlock:
    """Consecutive records of one partition.

    `start`: offset right after the block before (or the offset last sought); the block's first record is at or
    after it, since a log may have holes.
    """

    partition: int
    start: int
    records: RecordBlock
    #: Whether blocks of other partitions were fetched with it, and are handed over after it.
    more: bool = False

    @property
    def end(self) -> int:
        """Offset right after the last record."""
        return int(self.records.offsets[-1]) + 1


class BlockSchema(faust.Schema):
    """Passes the block through: decoding happens in arrays, where the block is applied."""

    def compile(self, app: Any, **_: Any) -> Callable[..., Any]:
        """A decode function that wraps the message and nothing more."""
        create_event = app.create_event

        async def decode(message: Any, *, propagate: bool = False) -> Any:
            return create_event(None, message.value, message.headers, message)

        return decode


class _FetchedBytes(MemoryRecords):
    """The record set of a fetch response as aiokafka keeps it, and its bytes."""

    def __init__(self, data: bytes | None) -> None:
        super().__init__(data or b"")
        self.data = data or b""


class _FetchedRecords:
    """What aiokafka keeps of a fetch until it is consumed, in place of its own `PartitionRecords`."""

    def __init__(
        self,
        tp: Any,
        records: _FetchedBytes,
        aborted_transactions: Iterable[tuple[int, int]] | None,
        fetch_offset: int,
        _key_deserializer: Any,
        _value_deserializer: Any,
        check_crcs: bool,
        isolation_level: int,
    ) -> None:
        self.reader = RecordReader(
            records.data,
            fetch_offset,
            check_crcs=check_crcs,
            aborted=(aborted_transactions or ()) if isolation_level == READ_COMMITTED else None,
            name=f"partition {tp.partition} of {tp.topic}",
        )

    @property
    def next_fetch_offset(self) -> int:
        return self.reader.position


class BlockFetcher(Fetcher):
    """aiokafka's fetcher, which parses what it fetched into blocks when they are asked for.

    Positions move with the blocks given out; a seek falls between two blocks, never into one, from any thread.
    """

    #: aiokafka's own code, with other classes for what it makes of a response: the bytes are not kept otherwise.
    _proc_fetch_request: ClassVar[Any] = FunctionType(
        Fetcher._proc_fetch_request.__code__,
        {
            **Fetcher._proc_fetch_request.__globals__,
            "MemoryRecords": _FetchedBytes,
            "PartitionRecords": _FetchedRecords,
        },
    )

    _ends: dict[TP, int]
    _moving: threading.Lock
    #: When records were given out last.
    _given_at: float
    #: When some partitions were asked for while records of others waited here.
    _glanced_at: float
    #: Processor time of this process, in seconds.
    _processor_s: Callable[[], float]
    #: Of a core, that this process used lately; as of when, and of which processor time.
    _share: float
    _measured: tuple[float, float]
    #: For how long the broker holds a fetch while records come steadily.
    _gather_ms: int

    @classmethod
    def take_over(cls, consumer: Any, processor_s: Callable[[], float] = time.process_time) -> BlockFetcher:
        """Make the fetcher of a started consumer that has fetched nothing yet one of this class.

        processor_s: seconds of processor time that this process has used.
        """
        fetcher: BlockFetcher = consumer._fetcher
        # The consumer makes its fetcher itself, and starts it at once.
        fetcher.__class__ = cls
        fetcher._ends = {}
        fetcher._moving = threading.Lock()
        fetcher._given_at = fetcher._glanced_at = -math.inf
        fetcher._processor_s, fetcher._share, fetcher._gather_ms = processor_s, 0.0, round(_GATHER_MS[0])
        fetcher._measured = fetcher._loop.time(), processor_s()
        return fetcher

    def _get_actions_per_node(self, assignment: Any) -> Any:
        """What to fetch from which broker; see aiokafka.

        At a steady rate each fetch, block and answer has its fixed cost, for the broker as for the worker; so there is
        a bound to how many there are, and the partitions of a broker come together. The less of a core this process
        has to spare, the fewer there are. After a pause nothing waits.

        A broker has one fetch at a time. Were it to wait there for a partition that is at its end, another one, whose
        records are used up meanwhile, would stand still with more of them on the broker: what is asked for beside
        records that wait here is therefore answered at once.
        """
        now = self._loop.time()
        if self._records:
            self._fetch_max_wait_ms, self._fetch_min_bytes = 0, 1
        elif now - self._given_at < _GATHER_MS[-1] / 1000.0:
            self._note_share(now)
            self._fetch_max_wait_ms, self._fetch_min_bytes = self._gather_ms, _WORTH_BYTES
        else:
            self._fetch_max_wait_ms, self._fetch_min_bytes = _WAIT_MS, 1
        requests, resets, timeout, *others = super()._get_actions_per_node(assignment)
        if requests and self._records:
            wait = self._glanced_at + _GLANCE_S - now
            if wait > 0:
                requests, timeout = [], min(timeout, wait)
            else:
                self._glanced_at = now
        return requests, resets, timeout, *others

    def _note_share(self, now: float) -> None:
        """See how much of a core this process has to spare, and so how long the broker is to hold a fetch."""
        before, used_before = self._measured
        elapsed_s = now - before
        if elapsed_s < _ASKED_S:
            return
        used = self._processor_s()
        self._measured = now, used
        self._share += (used - used_before - elapsed_s * self._share) / max(elapsed_s, _SHARE_S)
        self._gather_ms = round(float(np.interp(self._share, _SPARE_SHARES, _GATHER_MS)))

    def seek_to(self, tp: Any, offset: int) -> None:
        """Read on from `offset`."""
        with self._moving:
            super().seek_to(tp, offset)
            self._ends[tp] = offset

    async def fetched_blocks(
        self, partitions: set[TP] | None, timeout: float, max_records: int
    ) -> dict[TP, FetchedBlock]:
        """The next block of each partition that has records, each of at most `max_records`; waits for the first.

        Parameters
        ----------
        partitions: others keep what was fetched for later; None or none: all.
        timeout: seconds.

        Raises
        ------
        BrokerError: a record batch is damaged; the next call reads it again.
        KafkaError: what aiokafka's fetcher met.
        """
        deadline = self._loop.time() + timeout
        while True:
            if self._subscriptions.reassignment_in_progress:
                await self._subscriptions.wait_for_assignment()
            found = self._take_blocks(partitions, max_records)
            if found:
                self._given_at = self._loop.time()
            left = deadline - self._loop.time()
            if found or left <= 0 or self._closed:
                return found
            waiter = self._create_fetch_waiter()
            await asyncio.wait([waiter], timeout=left)
            if waiter.done():
                # The coordinator reports its errors here.
                waiter.result()
            else:
                waiter.cancel()

    def _take_blocks(self, partitions: set[TP] | None, max_records: int) -> dict[TP, FetchedBlock]:
        found = self._find_blocks(partitions, max_records)
        *others, _ = found or [None]
        for tp in others:
            found[tp] = replace(found[tp], more=True)
        return found

    def _find_blocks(self, partitions: set[TP] | None, max_records: int) -> dict[TP, FetchedBlock]:
        found: dict[TP, FetchedBlock] = {}
        for tp in list(self._records):
            if partitions and tp not in partitions:
                if not self._subscriptions.is_assigned(tp):
                    self._records.pop(tp, None)
                continue
            with self._moving:
                # A seek may have dropped it since.
                result = self._records.get(tp)
                if result is None:
                    continue
                if isinstance(result, FetchError):
                    if found:
                        # Raised in the next call; what is in hand is not lost by it.
                        break
                    self._drop(tp)
                    result.check_raise()
                try:
                    block = self._next_block(tp, result, max_records)
                except BrokerError:
                    if found:
                        break
                    self._drop(tp)
                    raise
                if not result.has_more():
                    self._drop(tp)
            if block is not None:
                found[tp] = block
        return found

    def _next_block(self, tp: TP, result: Any, max_records: int) -> FetchedBlock | None:
        if not result.check_assignment(tp):
            return None
        reader: RecordReader = result._partition_records.reader
        start = self._ends.get(tp, reader.position)
        records = reader.take(max_records)
        result._update_position()
        if reader.done:
            result._partition_records = None
        if records is None:
            return None
        block = FetchedBlock(tp.partition, start, records)
        self._ends[tp] = block.end
        return block

    def _drop(self, tp: TP) -> None:
        """What was fetched is used up: the partition may be fetched again."""
        self._records.pop(tp, None)
        self._notify(self._wait_consume_future)


class _BlockThread(AIOKafkaConsumerThread):
    """The consumer's thread, which gives out blocks."""

    async def on_start(self) -> None:
        # Compiled or loaded here, before the group counts on this thread's heartbeats.
        load_kernels()
        await super().on_start()
        # Faust asks for it only where it commits in transactions itself.
        BlockFetcher.take_over(self._consumer)._isolation_level = READ_COMMITTED

    async def _fetch_records(
        self,
        consumer: Any,
        active_partitions: set[TP] | None,
        timeout: float | None = None,
        max_records: int | None = None,
    ) -> RecordMap:
        if not self.consumer.flow_active:
            return {}
        fetcher: BlockFetcher = consumer._fetcher
        if consumer._closed or fetcher._closed:
            raise ConsumerStoppedError()
        with fetcher._subscriptions.fetch_context():
            return await fetcher.fetched_blocks(active_partitions, timeout or 0.0, max_records or _MOST_RECORDS)


class BlockConsumer(Consumer):
    """Faust's aiokafka consumer, a partition batch at a time.

    `start_positions`, set by the worker, says where each assigned partition goes on; it is asked each time Faust
    would seek to the committed offsets, because the position restored with the rows is the one that fits them.
    """

    start_positions: Callable[[Iterable[TP]], Mapping[TP, int]] | None = None

    def _new_consumer_thread(self) -> AIOKafkaConsumerThread:
        return _BlockThread(self, loop=self.loop, beacon=self.beacon)

    async def verify_all_partitions_active(self) -> None:
        """Faust's regular look for partitions that stand still counts messages, which here are batches.

        It also takes a consumer whose thread is still starting for a crash; lag tells what it would.
        """

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, Any]]:
        """Yield messages whose values are the next blocks of the partitions that have records, as lists."""
        records, active = await self._wait_next_records(timeout)
        generation = self.app.consumer_generation_id
        if not records or self.should_stop:
            return
        if not self.flow_active:
            # Fetched while a rebalance began: whoever owns the partitions next reads them again.
            await self.perform_seek()
            return
        wanted = [
            (tp, block)
            for tp, block in records.items()
            if active is None or tp in active or tp in self._buffered_partitions
        ]
        for tp, blocks in _together(wanted):
            if not self.flow_active or self.app.consumer_generation_id != generation:
                return
            records_of = blocks[0].records
            # Without the generation Faust takes the message for one from before the rebalance and drops it.
            yield tp, ConsumerMessage(
                tp.topic, tp.partition, int(records_of.offsets[0]), records_of.timestamps_ms[-1] / 1000.0, 0,
                (), None, blocks, None, -1, -1, tp, generation_id=generation,
            )  # fmt: skip

    async def perform_seek(self) -> None:
        """Seek every assigned partition to where its restored state goes on."""
        if self.start_positions is None:
            await super().perform_seek()
            return
        positions = dict(self.start_positions(self.assignment()))
        for tp, position in positions.items():
            self.seek_block(tp, position)

    def seek_block(self, tp: TP, position: int) -> None:
        """Read on from `position`; a partition that is no longer assigned is left alone."""
        try:
            self._thread.seek(tp, position)
        except IllegalStateError:
            return
        self._read_offset[tp] = position or None

    async def commit_positions(self, positions: Mapping[TP, int]) -> bool:
        """Commit next offsets to the group; False when the group has moved on without this worker."""
        committed: bool = await self._thread.commit(positions)
        return committed

    async def commit(self, topics: Any = None, start_new_transaction: bool = True) -> bool:
        """Nothing: offsets are committed with a checkpoint, by `commit_positions`."""
        return False

    def highwater_or_none(self, tp: TP) -> int | None:
        """Offset after the last record the broker has told of; None if the partition is not assigned."""
        try:
            highwater: int | None = self._thread.highwater(tp)
        except (IllegalStateError, AssertionError, KeyError):
            return None
        return highwater


def _together(wanted: Iterable[tuple[TP, FetchedBlock]]) -> Iterator[tuple[TP, list[FetchedBlock]]]:
    """The blocks in their order, small ones in one list, each list with the partition of its first block."""
    first: TP | None = None
    blocks: list[FetchedBlock] = []
    count = 0
    for tp, block in wanted:
        count += len(block.records)
        if first is not None and count > _TOGETHER:
            yield first, blocks
            first, blocks, count = None, [], len(block.records)
        first = first or tp
        blocks.append(block)
    if first is not None:
        yield first, blocks


class BlockTransport(Transport):
    """Faust transport whose consumer is a `BlockConsumer`."""

    Consumer: ClassVar[type[Consumer]] = BlockConsumer


def broker_credentials(kafka: Kafka) -> Any:
    """Faust's `broker_credentials`; None where connections are neither encrypted nor asked for a password."""
    security = asyncio_security(kafka)
    if "sasl_mechanism" in security:
        return SASLCredentials(
            username=security["sasl_plain_username"],
            password=security["sasl_plain_password"],
            mechanism=security["sasl_mechanism"],
            ssl_context=security.get("ssl_context"),
        )
    return SSLCredentials(security["ssl_context"]) if "ssl_context" in security else None
