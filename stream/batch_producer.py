"""A producer of whole record batches to one topic, from a thread of its own.

Guaranteed: what is handed over for a partition arrives in that order and once, as long as this object lives: each
batch carries its writer's id and a sequence number, one batch of a partition is under way at a time, and a
repeated one keeps its number. `flush` returns when everything handed over before it is confirmed by all in-sync
replicas, or raises. A refusal, or no confirmation in time, sets `failure`, and every later call raises it.
Unconfirmed bytes are bounded: `send` waits for a slow broker.

A partition has one writer: each begins by asking for the producer id of the partition's transactional id, under a
new epoch, and no transaction is ever begun with it. Once the later writer has written, the broker refuses the
earlier one, whatever it still has to send after a pause; its `flush` then raises `Fenced`.

Not guaranteed: what becomes of unconfirmed batches after a failure, `give_up` or `close`; some may have been written.

Source of the protocol: KIP-98 (idempotent and transactional producers).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiokafka.client import AIOKafkaClient
from aiokafka.errors import (
    ConcurrentTransactions,
    DuplicateSequenceNumber,
    InvalidProducerEpoch,
    KafkaError,
    NoError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.structs import TopicPartition

from stream.batch_queue import BatchQueue, Lane, QueuedBatch
from stream.errors import BrokerError
from stream.kafka import REQUEST_TIMEOUT_S
from stream.produce_requests import InitProducerId, ProduceBatches
from stream.security import asyncio_security
from stream.settings import Settings
from stream.store.keys import PackedKeys
from stream.wire.record_batch import Codec
from stream.wire.values import PackedValues

__all__ = ["BatchProducer", "ProducerLimits", "asyncio_client_config"]

logger = logging.getLogger(__name__)

#: What comes within it goes together, unless `hasten` says that no more will: a request costs as much as a hundred
#: records.
_LINGER_S = 0.005
_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 1.0
#: A coordinator forgets a transactional id that is not asked for in a week (transactional.id.expiration.ms).
_LONGEST_IDENTITY_S = 86_400.0
#: In a request for a coordinator: of a transactional id.
_OF_TRANSACTIONS = 1
#: PRODUCER_FENCED, which aiokafka has no name for.
_PRODUCER_FENCED = 90
#: How often timeouts are looked at.
_TICK_S = 0.5


@dataclass(frozen=True)
class ProducerLimits:
    """Bounds of a `BatchProducer`; times in seconds."""

    #: A broker refuses batches above its max.message.bytes, by default 1,048,588.
    batch_bytes: int = 960_000
    #: Batches of several partitions go together up to here.
    request_bytes: int = 2_000_000
    #: Handed over and not confirmed; what one call hands over comes on top.
    unconfirmed_bytes: int = 64 * 1024 * 1024
    #: For one request. As librdkafka's request.timeout.ms.
    request_s: float = REQUEST_TIMEOUT_S
    #: A batch not confirmed for so long fails. As librdkafka's message.timeout.ms.
    delivery_s: float = 300.0
    #: A topic or partition not known for so long fails. As librdkafka's topic.metadata.propagation.max.ms.
    unknown_topic_s: float = 30.0


def asyncio_client_config(settings: Settings) -> dict[str, Any]:
    """Keyword arguments of aiokafka's clients: where the brokers are, and how to reach them."""
    return {
        "bootstrap_servers": settings.kafka.bootstrap_servers,
        "client_id": "livestate",
        **asyncio_security(settings.kafka),
    }


class BatchProducer:
    """See the module. `send`, `flush` and `close` may be called from different threads, `send` from one at a time.

    The thread starts with the first record.

    Parameters
    ----------
    config: keyword arguments of aiokafka's client.
    writer: what the transactional ids begin with; a partition's number follows.
    wall_clock: seconds since 1970, for the records' timestamps. clock: monotonic seconds, for timeouts.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        topic: str,
        codec: Codec,
        writer: str,
        limits: ProducerLimits | None = None,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        limits = limits or ProducerLimits()
        name = f"records for topic {topic!r}"
        self._queue = BatchQueue(name, limits.batch_bytes, limits.unconfirmed_bytes, wall_clock, clock)
        self._sender = _Sender(self._queue, config, topic, codec, writer, limits, clock)
        self._thread = threading.Thread(target=self._sender.run, name="batch-producer", daemon=True)
        self._starting = threading.Lock()
        self._is_started = False

    @property
    def failure(self) -> BrokerError | None:
        """What was refused, if something was."""
        return self._queue.failure

    @property
    def unconfirmed_bytes(self) -> int:
        """Bytes of records, uncompressed, that were handed over and are not confirmed."""
        return self._queue.unconfirmed_bytes

    def begin(self, partition: int, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        """Become the partition's writer; what earlier ones still have to send is refused from the first record on.

        Not to be put off until there is something to send: whoever was paused meanwhile would come back as the later
        writer.

        Raises
        ------
        BrokerError: the broker did not grant a producer id in time.
        """
        self._start()
        self._queue.begin(partition, timeout_s, self._sender.wake)

    def send(self, partition: int, keys: PackedKeys, values: PackedValues | None) -> None:
        """Hand over one record for each key, a tombstone where `values` is None. The arrays are not kept.

        Raises
        ------
        BrokerError: the broker refused something, or did not confirm it in time; or this is closed; or the partition
            was not begun.
        """
        self._queue.put(partition, keys, values)
        self._sender.wake()

    def hasten(self) -> None:
        """No more comes for now: what was handed over need not wait for company."""
        self._sender.hasten()

    def flush(self, timeout_s: float, partition: int | None = None) -> None:
        """Wait until everything handed over before this call is confirmed; of one partition, or of all.

        Raises
        ------
        Fenced: another producer writes a partition now; `give_up` it.
        BrokerError: something was refused, or is not confirmed within `timeout_s`.
        """
        self._queue.wait_confirmed(timeout_s, partition)

    def give_up(self, partition: int) -> None:
        """Drop what is not confirmed of a partition, and write no more of it."""
        self._queue.give_up(partition)

    def _start(self) -> None:
        with self._starting:
            if not self._is_started:
                self._is_started = True
                self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop; what is not confirmed by now may be lost. Calling it again does nothing."""
        self._queue.close()
        if self._is_started:
            self._sender.stop()
            self._thread.join(timeout_s)


class _Sender:
    """The producer's thread: takes batches from the queue, sends them to their leaders, settles them."""

    def __init__(
        self,
        queue: BatchQueue,
        config: Mapping[str, Any],
        topic: str,
        codec: Codec,
        writer: str,
        limits: ProducerLimits,
        clock: Callable[[], float],
    ) -> None:
        self._queue, self._topic, self._codec, self._limits, self._clock = queue, topic, codec, limits, clock
        self._writer = writer
        self._config = {**config, "request_timeout_ms": int(limits.request_s * 1000)}
        #: partition -> since when the cluster does not know it
        self._unknown: dict[int, float] = {}
        self._refreshed_at = -math.inf
        self._sending: set[asyncio.Task[None]] = set()
        #: Guards what other threads use to reach this one.
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._due: asyncio.Event | None = None
        #: Set where what is due need not wait for more.
        self._hurry: asyncio.Event | None = None
        self._is_woken = self._is_stopped = False

    # ---------------------------------------------------------------- from other threads

    def wake(self) -> None:
        """Something was put into the queue."""
        with self._lock:
            # Waking a loop is a system call: once is enough until it has looked.
            if not self._is_woken and self._loop is not None and self._due is not None:
                self._is_woken = True
                self._loop.call_soon_threadsafe(self._due.set)

    def hasten(self) -> None:
        """What was put into the queue waits no longer for more."""
        with self._lock:
            # Without anything new there is nothing to send.
            if self._is_woken and self._loop is not None and self._hurry is not None:
                self._loop.call_soon_threadsafe(self._hurry.set)

    def stop(self) -> None:
        """End `run` soon."""
        with self._lock:
            self._is_stopped = True
            if self._loop is not None and self._task is not None:
                self._loop.call_soon_threadsafe(self._task.cancel)

    # ---------------------------------------------------------------- the thread

    def run(self) -> None:
        """Send until something fails or `stop` is called."""
        try:
            asyncio.run(self._serve())
        except asyncio.CancelledError:
            return
        except Exception as error:
            logger.exception("the producer for topic %s failed", self._topic)
            self._fail(f"can no longer be written: {error!r}")

    async def _serve(self) -> None:
        due, hurry = asyncio.Event(), asyncio.Event()
        due.set()
        with self._lock:
            if self._is_stopped:
                return
            self._loop, self._task, self._due = asyncio.get_running_loop(), asyncio.current_task(), due
            self._hurry = hurry
        client = AIOKafkaClient(**self._config)
        try:
            await self._start(client)
            while self._queue.failure is None:
                await due.wait()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LINGER_S):
                        await hurry.wait()
                due.clear()
                hurry.clear()
                with self._lock:
                    self._is_woken = False
                self._dispatch(client)
        finally:
            with self._lock:
                self._loop = None
            for task in self._sending:
                task.cancel()
            await asyncio.gather(*self._sending, return_exceptions=True)
            await client.close()

    async def _start(self, client: AIOKafkaClient) -> None:
        """Find the brokers, however long it takes; batches fail meanwhile when overdue."""
        self._tick()
        backoff = _BACKOFF_S
        while self._queue.failure is None:
            try:
                await client.bootstrap()
                client.set_topics([self._topic])
                return
            except KafkaError as refusal:
                if not refusal.retriable:
                    self._fail(f"cannot be written: {_text(refusal)}")
                    return
                logger.info("no broker yet: %s", _text(refusal))
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, _LONGEST_BACKOFF_S)

    async def _identify(self, client: AIOKafkaClient, lane: Lane) -> None:
        """Become the partition's writer, however long it takes; its batches fail meanwhile when overdue."""
        name = f"{self._writer}-{lane.partition}"
        backoff = _BACKOFF_S
        while self._queue.failure is None:
            try:
                node = await client.coordinator_lookup(_OF_TRANSACTIONS, name)
                if not self._queue.is_current(lane):
                    # A later lane of the partition would be fenced by what this one asks for after it.
                    return
                answer = await client.send(node, InitProducerId(name))
                error = for_code(answer.error_code)
                if error is NoError:
                    self._queue.identify(lane, answer.producer_id, answer.producer_epoch)
                    return
                raise error()
            except KafkaError as refusal:
                # The last one means that the epoch before is still being ended.
                if not refusal.retriable and not isinstance(refusal, ConcurrentTransactions):
                    self._fail(f"cannot be written: {_text(refusal)} (transactional id {name!r})")
                    return
                logger.info("no producer id for partition %d yet: %s", lane.partition, _text(refusal))
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, _LONGEST_BACKOFF_S)

    def _tick(self) -> None:
        """Look at the timeouts, now and regularly."""
        age = self._queue.oldest_s()
        if age > self._limits.delivery_s:
            self._fail(f"did not confirm a batch within {self._limits.delivery_s:g} s")
        if self._due is not None:
            self._due.set()
        asyncio.get_running_loop().call_later(_TICK_S, self._tick)

    def _dispatch(self, client: AIOKafkaClient) -> None:
        """Send what is ready: one request for each leader, more where batches are large."""
        for lane in self._queue.take_unidentified(_LONGEST_IDENTITY_S):
            self._begin(self._identify(client, lane))
        leaders: dict[int, list[QueuedBatch]] = {}
        is_stale = False
        for lane in self._queue.ready():
            leader = client.cluster.leader_for_partition(TopicPartition(self._topic, lane.partition))
            if leader is None:
                self._note_unknown(lane.partition)
            if leader is None or leader == -1:
                is_stale = True
                continue
            batch = self._queue.take(lane)
            if batch is None:
                continue
            together = leaders.setdefault(leader, [])
            if together and sum(one.records.size for one in together) + batch.records.size > self._limits.request_bytes:
                self._begin(self._deliver(client, leader, together))
                leaders[leader] = together = []
            together.append(batch)
        for leader, together in leaders.items():
            self._begin(self._deliver(client, leader, together))
        if is_stale and self._clock() - self._refreshed_at >= _BACKOFF_S:
            self._refreshed_at = self._clock()
            client.force_metadata_update()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._sending.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a batch for topic %s was not sent", self._topic, exc_info=error)
            self._fail(f"can no longer be written: {error!r}")
        if self._due is not None and self._hurry is not None:
            # What had to wait for this answer has waited long enough.
            self._due.set()
            self._hurry.set()

    async def _deliver(self, client: AIOKafkaClient, node: int, batches: Sequence[QueuedBatch]) -> None:
        sealed = [(batch.partition, batch.sealed(self._codec)) for batch in batches]
        request = ProduceBatches(self._topic, sealed, int(self._limits.request_s * 1000))
        outcomes: dict[int, KafkaError] = {}
        try:
            answer = await client.send(node, request)
        except KafkaError as error:
            outcomes = {batch.partition: error for batch in batches}
        else:
            for _, partitions in answer.topics:
                outcomes = {partition: _error(code) for partition, code, *_ in partitions if code}
        again = [batch for batch in batches if not self._settle(batch, outcomes.get(batch.partition))]
        if not again:
            return
        if any(outcomes[batch.partition].invalid_metadata for batch in again):
            client.force_metadata_update()
        await asyncio.sleep(min(_LONGEST_BACKOFF_S, _BACKOFF_S * 2 ** min(10, again[0].attempts - 1)))
        for batch in again:
            self._queue.give_back(batch)

    def _settle(self, batch: QueuedBatch, error: KafkaError | None) -> bool:
        """Confirm a batch, or fail for it; False if it is to be sent again."""
        # An earlier attempt arrived, and its answer was lost.
        if error is None or isinstance(error, DuplicateSequenceNumber):
            self._unknown.pop(batch.partition, None)
            self._queue.confirm(batch)
            return True
        if isinstance(error, InvalidProducerEpoch):
            logger.warning("partition %d of topic %s has another writer now", batch.partition, self._topic)
            self._queue.fence(batch.lane)
            return True
        if not error.retriable:
            self._fail(
                f"refused a batch of {batch.records.count} records for partition {batch.partition}: {_text(error)}"
            )
            return True
        if isinstance(error, UnknownTopicOrPartitionError):
            self._note_unknown(batch.partition)
        else:
            self._unknown.pop(batch.partition, None)
        logger.info("partition %d of topic %s: sent again: %s", batch.partition, self._topic, _text(error))
        return False

    def _note_unknown(self, partition: int) -> None:
        since = self._unknown.setdefault(partition, self._clock())
        if self._clock() - since > self._limits.unknown_topic_s:
            self._fail(f"has had no partition {partition} for {self._limits.unknown_topic_s:g} s")

    def _fail(self, text: str) -> None:
        self._queue.fail(
            BrokerError(
                f"topic {self._topic!r} {text}; nothing more is read until it is repaired and the worker started again"
            )
        )


def _error(code: int) -> KafkaError:
    return InvalidProducerEpoch() if code == _PRODUCER_FENCED else for_code(code)()


def _text(error: KafkaError) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
