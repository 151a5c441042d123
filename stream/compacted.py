"""A topic's partition as compaction would leave it: the latest record of each key, up to an end not before the start's.

Guarantees: committed records alone, where the broker keeps transactions apart; memory does not grow with the number of
keys, which are kept in a scratch database until it is closed.
Not guaranteed: the records' order among each other; it is that of their keys.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgpack
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from rocksdict import Options, Rdict, WriteBatch

from stream.errors import BrokerError, DataError
from stream.kafka import client_config, log_range
from stream.settings import Settings
from stream.wire.block import Headers

__all__ = ["CompactedPartition", "Record"]

#: Key, value (None for a tombstone), headers.
Record = tuple[bytes, bytes | None, Headers]


class CompactedPartition:
    """Reads a partition when made; a context manager that removes the scratch database.

    Parameters
    ----------
    scratch: directory that a database may be made in; as large as the records that are alive.
    tombstones: whether keys whose latest record is null are kept.
    passed: told now and then how much has been read, 0 to 1.

    Attributes: `alive` is the number of values; records without a key are left out.

    Raises
    ------
    BrokerError: the topic cannot be read.
    DataError: the scratch directory cannot be written.
    """

    def __init__(
        self,
        settings: Settings,
        topic: str,
        partition: int,
        scratch: Path,
        *,
        tombstones: bool = False,
        passed: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._topic = topic
        self._partition = partition
        self._tombstones = tombstones
        try:
            self._directory = Path(tempfile.mkdtemp(prefix="compacting-", dir=scratch))
        except OSError as error:
            raise DataError(f"{str(scratch)!r} cannot be written: {error.strerror}") from error
        self._database = Rdict(str(self._directory / "db"), Options(raw_mode=True))
        try:
            self._read(passed)
        except KafkaException as error:
            self.close()
            raise BrokerError(f"topic {topic!r} cannot be read: {error.args[0].str()}") from error
        except BaseException:
            self.close()
            raise

    def records(self) -> Iterator[Record]:
        """Each key's latest record, by rising key."""
        for key, packed in self._database.items():
            value, headers = msgpack.unpackb(packed)
            yield key, value, [(name, content) for name, content in headers]

    def get(self, key: bytes) -> bytes | None:
        """The latest value of a key."""
        packed = self._database.get(key)
        return None if packed is None else msgpack.unpackb(packed)[0]

    def close(self) -> None:
        """Remove the scratch database."""
        self._database.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, passed: Callable[[float], None]) -> None:
        consumer = Consumer(
            client_config(
                self._settings,
                group_id=f"{self._settings.kafka.group}-export",
                enable_auto_commit=False,
                isolation_level="read_committed",
                auto_offset_reset="earliest",
                enable_partition_eof=True,
                fetch_wait_max_ms=20,
                fetch_message_max_bytes=64 * 1024 * 1024,
            )
        )
        try:
            low, high = log_range(consumer, self._topic, self._partition)
            if high <= low:
                return
            consumer.assign([TopicPartition(self._topic, self._partition, low)])
            while self._take(consumer.consume(5_000, timeout=0.5), low, high, passed):
                pass
        finally:
            consumer.close()

    def _take(self, messages: list[Any], low: int, high: int, passed: Callable[[float], None]) -> bool:
        """Note records; False once the end that there was at the start is reached."""
        batch = WriteBatch(raw_mode=True)
        goes_on = True
        for message in messages:
            error = message.error()
            if error is not None:
                if error.code() == KafkaError._PARTITION_EOF:
                    goes_on = False
                elif not error.retriable():
                    raise KafkaException(error)
                continue
            key, value = message.key(), message.value()
            if key is None:
                continue
            if value is None and not self._tombstones:
                batch.delete(key)
            else:
                batch.put(key, msgpack.packb([value, list(message.headers() or ())]))
            passed(min(1.0, (message.offset() + 1 - low) / (high - low)))
        if len(batch):
            self._database.write(batch)
        return goes_on
