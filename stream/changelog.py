"""The changelog topic: what a lost worker is restored from.

A partition's rows are written in one transaction for each checkpoint, by a producer whose transactional id is
the partition's. Opening a writer fences the one before it, so a worker that lost the partition while it was
paused cannot write over its successor: its commit fails with `Fenced`. The last record of a checkpoint, under
the empty key, says how far the input was applied.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import msgpack
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from stream.errors import BrokerError, Fenced, StoreError
from stream.kafka import client_config, log_range, producer_config
from stream.settings import Settings

__all__ = ["META_KEY", "ChangelogBatch", "ChangelogWriter", "PartitionMeta", "read_changelog"]

logger = logging.getLogger(__name__)

#: No client has the empty key, so a partition's own record can have it.
META_KEY = b""
_OPEN_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class PartitionMeta:
    """What belongs to a partition rather than to a row, at one checkpoint.

    `position`: next input offset to apply. `watermark_ms`: largest event time applied. `trunk`, `layout`: what
    made the rows.
    """

    position: int
    watermark_ms: int
    trunk: str
    layout: str

    def encode(self) -> bytes:
        """MessagePack map with these names."""
        packed: bytes = msgpack.packb(asdict(self))
        return packed

    @classmethod
    def decode(cls, data: bytes) -> PartitionMeta:
        """Raises StoreError when the bytes are not a partition's record."""
        try:
            return cls(**msgpack.unpackb(data))
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise StoreError(f"a partition's record in the changelog cannot be read: {error}") from error


class ChangelogWriter:
    """Writes one partition's checkpoints.

    Parameters
    ----------
    settings, partition: whose changelog.

    Raises
    ------
    BrokerError: the broker does not grant the transactional id in time.
    """

    def __init__(self, settings: Settings, partition: int) -> None:
        self._topic = settings.topics.changelog
        self._partition = partition
        self._producer = Producer(
            producer_config(
                settings,
                transactional_id=f"{settings.kafka.group}-{self._topic}-{partition}",
                transaction_timeout_ms=60_000,
                # Rows of many slices in one request; a commit does not wait for it.
                linger_ms=50,
                # Below a broker's max.message.bytes, by default 1,048,588, which bounds a whole batch.
                batch_size=960_000,
            )
        )
        self._in_transaction = False
        self._last_offset = -1
        self._failure: KafkaError | None = None
        #: No further checkpoint can be written; the partition has to be opened anew by whoever owns it.
        self.is_broken = False
        try:
            self._producer.init_transactions(_OPEN_TIMEOUT_S)
        except KafkaException as error:
            raise self._error(error, "was not granted") from error

    def begin(self) -> None:
        """Start a checkpoint."""
        self._failure = None
        try:
            self._producer.begin_transaction()
        except KafkaException as error:
            raise self._error(error, "cannot begin") from error
        self._in_transaction = True

    def write(self, keys: Sequence[bytes], rows: Sequence[bytes | None]) -> None:
        """Add rows, None for a tombstone; waits where the producer's queue is full."""
        self._write(keys, rows, None)

    def _write(
        self, keys: Sequence[bytes], rows: Sequence[bytes | None], on_delivery: Callable[..., None] | None
    ) -> None:
        produce, topic, partition = self._producer.produce, self._topic, self._partition
        for key, row in zip(keys, rows, strict=True):
            while True:
                try:
                    produce(topic, row, key, partition, on_delivery)
                    break
                except BufferError:
                    self._wait()
                except KafkaException as error:
                    raise self._error(error, "cannot be written") from error

    def _wait(self) -> None:
        try:
            self._producer.poll(0.05)
        except KafkaException as error:
            raise self._error(error, "cannot be written") from error

    def commit(self, meta: PartitionMeta, timeout_s: float) -> int:
        """End the checkpoint; returns the changelog offset just after it. Blocks until the broker has it.

        Raises
        ------
        Fenced: another worker has taken the partition over; nothing of this checkpoint is in the changelog.
        BrokerError: the broker refused, and nothing of this checkpoint is in the changelog; or it did not answer
            in time, and nobody knows (`is_broken`): whoever opens the partition next finds out.
        """
        # Only the last record's offset is of interest; a row that is refused makes the commit fail.
        self._write([META_KEY], [meta.encode()], self._delivered)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self._producer.commit_transaction(max(0.1, deadline - time.monotonic()))
                break
            except (KafkaException, SystemError) as raised:
                error = _raised(raised)
                reason: KafkaError = error.args[0]
                if reason.retriable() and time.monotonic() < deadline:
                    continue
                if not reason.txn_requires_abort():
                    # Opening the producer anew would tell, but would also fence a successor, if there is one.
                    self.is_broken = True
                    self._in_transaction = False
                raise self._error(error, "cannot be committed") from error
        self._in_transaction = False
        if self._failure is not None:
            self.is_broken = True
            raise BrokerError(f"changelog partition {self._partition}: {self._failure.str()}")
        return self._last_offset + 1

    def abort(self) -> None:
        """Give up the checkpoint, if one is open; never raises."""
        if self._in_transaction:
            self._in_transaction = False
            try:
                self._producer.abort_transaction(5.0)
            except KafkaException as error:
                self.is_broken = True
                logger.warning("%s", self._error(error, "cannot be aborted"))

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self._failure = error
        else:
            self._last_offset = max(self._last_offset, message.offset() or 0)

    def _error(self, error: KafkaException, what: str) -> BrokerError:
        reason: KafkaError = error.args[0]
        text = f"checkpoint of changelog partition {self._partition} {what}: {reason.str()}"
        if reason.fatal() or reason.code() in (KafkaError._FENCED, KafkaError.INVALID_PRODUCER_EPOCH):
            return Fenced(f"{text}; another worker has taken the partition over")
        return BrokerError(text)


def _raised(error: KafkaException | SystemError) -> KafkaException:
    """What the client raised: a fatal error that comes just before a delivery report is raised around the report."""
    if isinstance(error, KafkaException):
        return error
    if isinstance(error.__cause__, KafkaException):
        return error.__cause__
    raise error


@dataclass(frozen=True)
class ChangelogBatch:
    """Consecutive records: `next_offset` is the offset after them; `meta` the last partition record, if any."""

    keys: list[bytes]
    rows: list[bytes | None]
    meta: PartitionMeta | None
    next_offset: int


def read_changelog(settings: Settings, partition: int, start: int) -> Iterator[ChangelogBatch]:
    """Read committed records from `start` to the end there is now, in batches of some thousands.

    Raises
    ------
    BrokerError: the broker does not answer or the topic is not there.
    """
    topic = settings.topics.changelog
    consumer = Consumer(
        client_config(
            settings,
            group_id=f"{settings.kafka.group}-changelog",
            enable_auto_commit=False,
            isolation_level="read_committed",
            auto_offset_reset="earliest",
            enable_partition_eof=True,
            queued_min_messages=100_000,
            fetch_wait_max_ms=20,
        )
    )
    try:
        # Asking first spares the wait for an end-of-partition event where there is nothing to read.
        low, high = log_range(consumer, topic, partition)
        if high <= max(low, start):
            return
        consumer.assign([TopicPartition(topic, partition, max(low, start))])
        while True:
            keys: list[bytes] = []
            rows: list[bytes | None] = []
            meta: PartitionMeta | None = None
            next_offset, ended = -1, False
            for message in consumer.consume(10_000, timeout=0.1):
                error = message.error()
                if error is not None:
                    if error.code() == KafkaError._PARTITION_EOF:
                        ended = True
                        continue
                    if error.retriable():
                        continue
                    raise BrokerError(f"topic {topic!r} cannot be read: {error.str()}")
                next_offset = (message.offset() or 0) + 1
                key, value = message.key() or b"", message.value()
                if key != META_KEY:
                    keys.append(key)
                    rows.append(value)
                elif value is not None:
                    meta = PartitionMeta.decode(value)
            if next_offset >= 0:
                yield ChangelogBatch(keys, rows, meta, next_offset)
            if ended:
                return
    except KafkaException as error:
        raise BrokerError(f"topic {topic!r} cannot be read: {error.args[0].str()}") from error
    finally:
        consumer.close()
