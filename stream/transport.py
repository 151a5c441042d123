"""A Faust transport that hands agents partition batches.

Faust's stock consumer turns every record into a message and four tasks; here one message carries all records
that one fetch returned for a partition, as a `FetchedBlock`. Group membership, rebalancing and the consumer's
thread stay Faust's.

Guaranteed: the blocks of a partition are handed over in order, and each says where the one before it ended
(`FetchedBlock.start`), so a block that was dropped on the way (Faust drops what was fetched before a rebalance)
is noticed by whoever applies them. Offsets are committed only by `BlockConsumer.commit_positions`: Faust's own
acknowledgements count messages, which here are batches.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import faust
from aiokafka.errors import ConsumerStoppedError, IllegalStateError
from faust.transport.consumer import RecordMap
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread, Consumer, Transport
from faust.types import TP, ConsumerMessage

from stream.wire import RecordBlock

__all__ = ["BlockConsumer", "BlockSchema", "BlockTransport", "FetchedBlock"]


@dataclass(frozen=True)
class FetchedBlock:
    """Consecutive records of one partition.

    `start`: offset right after the block before (or the offset last sought); the block's first record is at or
    after it, since a log may have holes.
    """

    partition: int
    start: int
    records: RecordBlock

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


class _BlockThread(AIOKafkaConsumerThread):
    """The consumer's thread, without a Python object for each record beyond the one that aiokafka parses."""

    async def _fetch_records(
        self,
        consumer: Any,
        active_partitions: set[TP] | None,
        timeout: float | None = None,
        max_records: int | None = None,
    ) -> RecordMap:
        if not self.consumer.flow_active:
            return {}
        fetcher = consumer._fetcher
        if consumer._closed or fetcher._closed:
            raise ConsumerStoppedError()
        deadline = time.monotonic() + (timeout or 0.0)
        with fetcher._subscriptions.fetch_context():
            while True:
                for result in fetcher._records.values():
                    records = getattr(result, "_partition_records", None)
                    if records is not None:
                        # Named tuples of eleven fields, made here by default, cost more than parsing the record.
                        records._consumer_record = _as_parsed
                found: RecordMap = await fetcher.fetched_records(active_partitions, timeout=0, max_records=max_records)
                left = deadline - time.monotonic()
                if found or left <= 0 or fetcher._closed:
                    return found
                await asyncio.wait([fetcher._create_fetch_waiter()], timeout=left)


def _as_parsed(tp: Any, record: Any) -> Any:
    return record


class BlockConsumer(Consumer):
    """Faust's aiokafka consumer, a partition batch at a time.

    `start_positions`, set by the worker, says where each assigned partition goes on; it is asked each time Faust
    would seek to the committed offsets, because the position restored with the rows is the one that fits them.
    """

    start_positions: Callable[[Iterable[TP]], Mapping[TP, int]] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._next: dict[TP, int] = {}

    def _new_consumer_thread(self) -> AIOKafkaConsumerThread:
        return _BlockThread(self, loop=self.loop, beacon=self.beacon)

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, Any]]:
        """Yield one message for each partition that has records."""
        records, active = await self._wait_next_records(timeout)
        generation = self.app.consumer_generation_id
        if not records or self.should_stop:
            return
        if not self.flow_active:
            # Fetched while a rebalance began: whoever owns the partitions next reads them again.
            await self.perform_seek()
            return
        for tp, batch in records.items():
            if not self.flow_active or self.app.consumer_generation_id != generation:
                return
            if not batch or (active is not None and tp not in active and tp not in self._buffered_partitions):
                continue
            block = FetchedBlock(tp.partition, self._next.get(tp, batch[0].offset), _block(batch))
            self._next[tp] = block.end
            yield tp, self._message(tp, block, generation)

    def _message(self, tp: TP, block: FetchedBlock, generation: int) -> Any:
        # Without the generation Faust takes the message for one from before the rebalance and drops it.
        return ConsumerMessage(
            tp.topic, tp.partition, int(block.records.offsets[0]), block.records.timestamps_ms[-1] / 1000.0, 0,
            (), None, block, None, -1, -1, tp, generation_id=generation,
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
        self._next[tp] = position
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


class BlockTransport(Transport):
    """Faust transport whose consumer is a `BlockConsumer`."""

    Consumer: ClassVar[type[Consumer]] = BlockConsumer


def _block(batch: list[Any]) -> RecordBlock:
    headers = [record.headers for record in batch]
    return RecordBlock.from_lists(
        [record.key for record in batch],
        [record.value for record in batch],
        [record.offset for record in batch],
        [record.timestamp for record in batch],
        headers if any(headers) else None,
    )
