"""What a worker writes besides its changelog: embeddings and dead letters.

Guaranteed: a record handed over is confirmed by the broker before `flush` returns, or `flush` raises; after a
refusal nothing is silently lost, since every later call raises too. A broker slower than the worker makes the
calls wait, so memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from confluent_kafka import KafkaError, Message, Producer

from stream.errors import BrokerError
from stream.kafka import producer_config
from stream.settings import Settings
from stream.wire import RecordBlock, Rejected, dead_letter_headers

__all__ = ["Outputs"]

#: Few requests for a micro-batch; a broker refuses batches above its max.message.bytes, by default 1,048,588.
_BATCH_BYTES = 960_000


class Outputs:
    """One producer for a worker's embeddings and dead letters.

    `failure` is set by the first record that the broker refused.
    """

    def __init__(self, settings: Settings) -> None:
        self._topics = settings.topics
        self._timeout_s = settings.worker.stop_timeout_s
        self.failure: BrokerError | None = None
        self._producer = Producer(
            # A call back for each delivered embedding would cost more than producing it.
            {
                **producer_config(settings, delivery_report_only_error=True, batch_size=_BATCH_BYTES),
                "on_delivery": self._refused,
            }
        )

    def embeddings(self, partition: int, keys: Sequence[bytes], values: Sequence[bytes | None]) -> None:
        """Produce embedding records, None for a tombstone, to the partition their events came from."""
        topic, produce = self._topics.embeddings, self._producer.produce
        for key, value in zip(keys, values, strict=True):
            while True:
                try:
                    # By position: naming the arguments doubles the cost of the call.
                    produce(topic, value, key, partition)
                    break
                except BufferError:
                    self._wait()
        self._producer.poll(0)
        self._check()

    def dead_letters(self, partition: int, records: RecordBlock, rejected: Sequence[Rejected]) -> None:
        """Send records that are not events to dead-letters: original key, value and headers, and the reason."""
        for one in rejected:
            headers: list[Any] = dead_letter_headers(
                one.reason, one.detail, self._topics.events, partition, int(records.offsets[one.index])
            )
            while True:
                try:
                    self._producer.produce(
                        self._topics.dead_letters,
                        value=records.value(one.index),
                        key=records.key(one.index),
                        headers=[*records.headers_of(one.index), *headers],
                    )
                    break
                except BufferError:
                    self._wait()
        self._check()

    def flush(self) -> None:
        """Wait until everything handed over is confirmed.

        Raises
        ------
        BrokerError: a record was refused, or the broker did not confirm in time.
        """
        left = self._producer.flush(self._timeout_s)
        self._check()
        if left > 0:
            raise BrokerError(f"{left} embeddings and dead letters were not confirmed within {self._timeout_s:g} s")

    def _wait(self) -> None:
        # The queue is full: waiting here is the back-pressure.
        self._producer.poll(0.05)
        self._check()

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _refused(self, error: KafkaError | None, message: Message) -> None:
        if error is not None and self.failure is None:
            self.failure = BrokerError(
                f"topic {message.topic()!r} refused a record: {error.str()}; nothing more is read until it is "
                f"repaired and the worker started again"
            )
