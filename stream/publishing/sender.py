"""Records checked as their reader would, and sent in order, with what is confirmed known to the row.

Guarantees: what is sent was accepted by the worker's decoder, or the trainer's, with these settings; records of a
client keep their order; none is doubled by the producer's own repetitions; `confirmed` names a row up to which every
record sent is on the topic.
Not guaranteed: that records after `confirmed` are not there, when the broker went away: nobody knows.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from stream.errors import BrokerError, RecordError, TopicError
from stream.kafka import producer_config, wait_until_reachable
from stream.publishing.mapping import Record
from stream.settings import Settings
from stream.wire import EventDecoder, RecordBlock, Schema, decode_feedback
from stream.wire.reasons import INVALID_UTF8, OUT_OF_RANGE, TOO_DEEP, WRONG_TYPE

__all__ = ["Checked", "Checker", "Sender"]

_MSGPACK: Final = [("content-type", b"application/msgpack")]
#: Longer than a broker takes to restart, shorter than anybody waits.
_DELIVERY_TIMEOUT_MS: Final = 60_000


@dataclass(frozen=True, slots=True)
class Checked:
    """Keys and values of n records; those in `errors`, by index, are not to be sent."""

    keys: list[bytes]
    values: list[bytes]
    errors: dict[int, RecordError]


class Checker:
    """Encodes records, and reads them back as a worker (`events`) or the trainer (`feedback`) would."""

    def __init__(self, settings: Settings, kind: str) -> None:
        self._settings = settings
        self._decoder = EventDecoder(Schema.compile(settings), settings.limits, "msgpack") if kind == "events" else None
        self._encode = msgspec.msgpack.Encoder().encode

    def check(self, records: Sequence[Record], now_ms: int) -> Checked:
        """The records as bytes.

        Parameters
        ----------
        now_ms: Kafka timestamp that they will have, UTC milliseconds.
        """
        keys: list[bytes] = []
        values: list[bytes] = []
        errors: dict[int, RecordError] = {}
        for i, record in enumerate(records):
            key = value = b""
            if isinstance(record, RecordError):
                errors[i] = record
            else:
                try:
                    client_id = record.get("client_id")
                    key = client_id.encode() if isinstance(client_id, str) else b""
                    value = self._encode(_ordered(record))
                except (UnicodeEncodeError, OverflowError, RecursionError, TypeError) as error:
                    errors[i] = _unencodable(error)
            keys.append(key)
            values.append(value)
        for i, refused in self._refused(keys, values, now_ms):
            errors.setdefault(i, refused)
        return Checked(keys, values, errors)

    def _refused(self, keys: list[bytes], values: list[bytes], now_ms: int) -> list[tuple[int, RecordError]]:
        n = len(keys)
        if self._decoder is not None:
            block = RecordBlock.from_lists(keys, values, np.arange(n), np.full(n, now_ms))
            return [(one.index, RecordError(one.reason, one.detail)) for one in self._decoder.decode(block).rejected]
        refused = []
        for i, (key, value) in enumerate(zip(keys, values, strict=True)):
            try:
                decode_feedback(key, value, _MSGPACK, self._settings)
            except RecordError as error:
                refused.append((i, error))
        return refused


class Sender:
    """An idempotent producer for one topic.

    Parameters
    ----------
    first_row: number of the first row that will be sent.

    Raises
    ------
    BrokerError: the broker does not answer, or the topic is not there.
    """

    def __init__(self, settings: Settings, topic: str, first_row: int, timeout_s: float) -> None:
        self._topic = topic
        cluster = wait_until_reachable(settings, timeout_s)
        if topic not in cluster.topics:
            raise TopicError(
                f"topic {topic!r} is not there on {settings.kafka.bootstrap_servers}: "
                f"create it with `livestate topics --create`"
            )
        # Readers of a topic of JSON need to be told.
        self._headers = _MSGPACK if settings.topics.format == "json" else None
        self._producer = Producer(producer_config(settings, message_timeout_ms=_DELIVERY_TIMEOUT_MS))
        self._chunks: deque[_Chunk] = deque()
        self._refused: list[KafkaError] = []
        #: The last row up to which everything sent is confirmed.
        self.confirmed = first_row - 1
        #: Records handed over.
        self.sent = 0

    def send(self, keys: Sequence[bytes], values: Sequence[bytes], timestamp_ms: int, last_row: int) -> None:
        """Hand records over; waits where the queue is full.

        Parameters
        ----------
        last_row: of all rows up to here everything is handed over with this call.

        Raises
        ------
        BrokerError: a record was refused, or not confirmed in time.
        """
        chunk = _Chunk(last_row, len(keys), self._refused)
        self._chunks.append(chunk)
        produce, topic, done, headers = self._producer.produce, self._topic, chunk.done, self._headers
        more: dict[str, Any] = {} if headers is None else {"headers": headers}
        for key, value in zip(keys, values, strict=True):
            while True:
                try:
                    produce(topic, value, key, on_delivery=done, timestamp=timestamp_ms, **more)
                    break
                except BufferError:
                    self._producer.poll(0.05)
                    self._check()
                except KafkaException as error:
                    raise BrokerError(f"topic {topic!r} cannot be written: {error.args[0].str()}") from error
        self.sent += len(keys)
        self.poll(0.0)

    def poll(self, seconds: float) -> None:
        """Take confirmations for so long; raises BrokerError as `send` does."""
        self._producer.poll(seconds)
        self._check()

    def finish(self, timeout_s: float = 1.5 * _DELIVERY_TIMEOUT_MS / 1000) -> None:
        """Wait until everything is confirmed; raises BrokerError where it is not."""
        deadline = time.monotonic() + timeout_s
        while self._producer.flush(0.2):
            self._check()
            if time.monotonic() > deadline:
                raise BrokerError(f"topic {self._topic!r}: records were not confirmed within {timeout_s:g} s")
        self._check()

    def _check(self) -> None:
        while self._chunks and not self._chunks[0].left and not self._chunks[0].failed:
            self.confirmed = self._chunks.popleft().last_row
        if self._refused:
            raise BrokerError(f"topic {self._topic!r} cannot be written: {self._refused[0].str()}")


class _Chunk:
    """Records handed over together, and how many of them are not confirmed."""

    __slots__ = ("_refused", "failed", "last_row", "left")

    def __init__(self, last_row: int, n: int, refused: list[KafkaError]) -> None:
        self.last_row = last_row
        self.left = n
        self.failed = False
        self._refused = refused

    def done(self, error: KafkaError | None, message: Message) -> None:
        self.left -= 1
        if error is not None:
            self.failed = True
            self._refused.append(error)


def _ordered(record: dict[str, Any]) -> dict[str, Any]:
    """The same with an event's fields last, so that a reader in one pass knows the modality before them."""
    if "fields" in record and next(reversed(record)) != "fields":
        record["fields"] = record.pop("fields")
    return record


def _unencodable(error: Exception) -> RecordError:
    reasons = {UnicodeEncodeError: INVALID_UTF8, OverflowError: OUT_OF_RANGE, RecursionError: TOO_DEEP}
    return RecordError(reasons.get(type(error), WRONG_TYPE), f"cannot be written as MessagePack: {error}")
