"""A partition's rows under another trunk, recomputed from the events beside the rows that are served.

Guaranteed: the rows after the events up to an offset equal, bit for bit, one pass over those events under the new
trunk; nothing that is served, published or in the changelog changes until the owner switches to them.
Not guaranteed: clients whose events the broker has deleted by age; they have no row until their next event.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from stream.batch_producer import asyncio_client_config
from stream.errors import BrokerError
from stream.kafka import log_ends
from stream.model.engine import Engine
from stream.partition import Partition, Served
from stream.restore import partition_path, store_options
from stream.settings import Settings
from stream.store import EmbeddingStore
from stream.transport import EVENTS_ISOLATION, BlockFetcher, FetchedBlock
from stream.wire import EmbeddingEncoder, EventDecoder

__all__ = ["EventReader", "Rebuild"]

logger = logging.getLogger(__name__)

#: Those of a worker that is behind: each has its fixed costs.
_BLOCK_RECORDS = 32_768
_FETCH_BYTES = 8 * 1024 * 1024
_SWEEP_MS = 20.0
_READ_TIMEOUT_S = 30.0

_T = TypeVar("_T")


class EventReader:
    """One partition of the events topic as blocks that follow each other, from an offset up to any later one.

    A context manager that closes its consumer. It has an event loop on a thread of its own, so that the broker's next
    answer comes while a block is applied: call it from one thread at a time, and from none that runs a loop.
    """

    def __init__(self, settings: Settings, number: int, start: int) -> None:
        self._tp = TopicPartition(settings.topics.events, number)
        self._position = start
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"events-{number}", daemon=True)
        self._thread.start()
        try:
            self._consumer, self._fetcher = self._run(self._start(settings, start))
        except BaseException as error:
            self._stop()
            if isinstance(error, KafkaError):
                raise self._cannot(error) from error
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the consumer."""
        if not self._loop.is_closed():
            self._run(self._consumer.stop())
            self._stop()

    def block(self, stop: int) -> FetchedBlock | None:
        """The next block of records below `stop`; None where there are none left.

        Raises
        ------
        BrokerError: the topic cannot be read.
        """
        try:
            return self._run(self._next(stop))
        except KafkaError as error:
            raise self._cannot(error) from error

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self, settings: Settings, start: int) -> tuple[AIOKafkaConsumer, BlockFetcher]:
        consumer = AIOKafkaConsumer(
            **asyncio_client_config(settings),
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level=EVENTS_ISOLATION,
            max_partition_fetch_bytes=max(_FETCH_BYTES, 2 * settings.limits.record_bytes),
            fetch_max_wait_ms=50,
        )
        await consumer.start()
        fetcher = BlockFetcher.take_over(consumer)
        consumer.assign([self._tp])
        consumer.seek(self._tp, start)
        return consumer, fetcher

    async def _next(self, stop: int) -> FetchedBlock | None:
        deadline = self._loop.time() + _READ_TIMEOUT_S
        while self._position < stop:
            wanted = min(_BLOCK_RECORDS, stop - self._position)
            found = await self._fetcher.fetched_blocks(None, 0.1, wanted)
            block = found.get(self._tp)
            if block is None:
                # Records that no reader sees may lie at the end.
                self._position = max(self._position, await self._consumer.position(self._tp))
                if self._loop.time() > deadline:
                    raise BrokerError(f"topic {self._tp.topic!r} partition {self._tp.partition}: nothing to read")
                continue
            start, self._position = self._position, block.end
            below = int(np.searchsorted(block.records.offsets, stop))
            if below == len(block.records):
                return FetchedBlock(block.partition, start, block.records)
            # A log with holes brought more than was asked for: the rest is read again.
            self._position = stop
            self._consumer.seek(self._tp, stop)
            return FetchedBlock(block.partition, start, block.records.first(below)) if below else None
        return None

    def _cannot(self, error: KafkaError) -> BrokerError:
        return BrokerError(f"topic {self._tp.topic!r} cannot be read: {error}")


class Rebuild:
    """A partition under a new trunk, from the first event there is.

    Parameters
    ----------
    served: of the new trunk. It gets an engine of its own, since this one works on another thread.
    decoder, encoder: the worker's.

    Raises
    ------
    BrokerError: the events cannot be read.
    StoreError: `worker.data_dir` cannot be written.
    """

    def __init__(
        self, settings: Settings, number: int, served: Served, decoder: EventDecoder, encoder: EmbeddingEncoder
    ) -> None:
        engine = Engine(served.engine.layout, served.engine.parameters)
        self._served = Served(engine, served.questions, served.heads, served.version)
        self.trunk_id = engine.trunk_id
        self._path = partition_path(settings, number, self.trunk_id)
        # What is left of an attempt that did not come to its end.
        shutil.rmtree(self._path, ignore_errors=True)
        first, self._log_end = log_ends(settings, settings.topics.events, number)
        if first > 0:
            logger.warning(
                "partition %d is rebuilt from offset %d on: what was before is no longer in topic %r",
                number, first, settings.topics.events,
            )  # fmt: skip
        store = EmbeddingStore.open(self._path, store_options(settings, engine.layout.width))
        self.partition = Partition(number, store, first, decoder, encoder)
        self._reader = EventReader(settings, number, first)

    @property
    def log_end(self) -> int:
        """Where the events ended when the rebuild began: no row that exists then is ahead of it."""
        return self._log_end

    def run(self, stop: int, stopping: threading.Event, on_events: Callable[[int], None] | None = None) -> bool:
        """Apply events below `stop`; False if `stopping` was set before all of them were.

        on_events: called with the number of events of each block.
        """
        while True:
            if stopping.is_set():
                return False
            block = self._reader.block(stop)
            if block is None:
                return True
            applied = self.partition.apply(block, self._served, silently=True)
            self.partition.sweep(_SWEEP_MS)
            if on_events is not None:
                on_events(applied.events)

    def finish(self, position: int) -> Partition:
        """The partition, to go on at `position`, which its events were applied up to; the reader is closed."""
        self._reader.close()
        self.partition.position = max(self.partition.position, position)
        return self.partition

    def discard(self) -> None:
        """Give the rows up."""
        self._reader.close()
        self.partition.store.close()
        shutil.rmtree(self._path, ignore_errors=True)
