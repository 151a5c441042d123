"""What a worker writes besides its changelog: embeddings and dead letters.

Guaranteed: a record handed over is confirmed by the broker before `flush` returns, or `flush` raises; after a
refusal nothing is silently lost, since every later call raises too. A broker slower than the worker makes the
calls wait, so memory stays bounded. Embeddings of a partition arrive in the order in which they were handed over,
and none of them after the first one of the worker that owns the partition next.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from confluent_kafka import KafkaError, Message, Producer

from stream.batch_producer import BatchProducer, ProducerLimits, asyncio_client_config
from stream.errors import BrokerError
from stream.kafka import producer_config
from stream.settings import Settings
from stream.store.keys import PackedKeys
from stream.wire import RecordBlock, Rejected, dead_letter_headers
from stream.wire.values import PackedValues

__all__ = ["Outputs"]


class Outputs:
    """The producers of a worker's embeddings and dead letters.

    For both: calls may come from one thread at a time, `flush` from any.
    """

    def __init__(self, settings: Settings, limits: ProducerLimits | None = None) -> None:
        self._topics = settings.topics
        self._timeout_s = settings.worker.stop_timeout_s
        self._refusal: BrokerError | None = None
        self._embeddings = BatchProducer(
            asyncio_client_config(settings),
            settings.topics.embeddings,
            settings.kafka.compression,
            f"{settings.kafka.group}-{settings.topics.embeddings}",
            limits,
        )
        self._dead_letters = Producer(
            {**producer_config(settings, delivery_report_only_error=True), "on_delivery": self._refused}
        )

    @property
    def failure(self) -> BrokerError | None:
        """Of the first record that the broker refused."""
        return self._embeddings.failure or self._refusal

    def begin(self, partition: int) -> None:
        """Own a partition's embeddings, before its rows are restored.

        Raises
        ------
        BrokerError: the broker does not grant it in time.
        """
        self._embeddings.begin(partition)

    def embeddings(self, partition: int, keys: PackedKeys, values: PackedValues) -> None:
        """Publish embedding records to the partition their events came from."""
        self._dead_letters.poll(0)
        self._check()
        self._embeddings.send(partition, keys, values)

    def tombstones(self, partition: int, keys: PackedKeys) -> None:
        """Delete the embeddings of these clients."""
        self._check()
        self._embeddings.send(partition, keys, None)

    def hasten(self) -> None:
        """No more embeddings come for now: those handed over go at once, and not a little later with others."""
        self._embeddings.hasten()

    def dead_letters(self, partition: int, records: RecordBlock, rejected: Sequence[Rejected]) -> None:
        """Send records that are not events to dead-letters: original key, value and headers, and the reason."""
        for one in rejected:
            headers: list[Any] = dead_letter_headers(
                one.reason, one.detail, self._topics.events, partition, int(records.offsets[one.index])
            )
            while True:
                try:
                    self._dead_letters.produce(
                        self._topics.dead_letters,
                        value=records.value(one.index),
                        key=records.key(one.index),
                        headers=[*records.headers_of(one.index), *headers],
                    )
                    break
                except BufferError:
                    # The queue is full: waiting here is the back-pressure.
                    self._dead_letters.poll(0.05)
                    self._check()
        self._dead_letters.poll(0)
        self._check()

    def flush(self, partition: int | None = None, timeout_s: float | None = None) -> None:
        """Wait until everything handed over is confirmed.

        Parameters
        ----------
        partition: of which embeddings; all by default. Dead letters are waited for in any case.
        timeout_s: for how long; never longer than `worker.stop_timeout_s`, which is the default.

        Raises
        ------
        Fenced: another worker writes the partition's embeddings now.
        BrokerError: a record was refused, or the broker did not confirm in time.
        """
        timeout_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)
        deadline = time.monotonic() + timeout_s
        self._embeddings.flush(timeout_s, partition)
        left = self._dead_letters.flush(max(0.0, deadline - time.monotonic()))
        self._check()
        if left > 0:
            raise BrokerError(f"{left} dead letters were not confirmed within {timeout_s:g} s")

    def give_up(self, partition: int) -> None:
        """Drop embeddings of a partition that are not confirmed: whoever owns it next publishes them again."""
        self._embeddings.give_up(partition)

    def close(self) -> None:
        """Stop producing; what was not flushed may be lost."""
        self._embeddings.close()

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _refused(self, error: KafkaError | None, message: Message) -> None:
        if error is not None and self._refusal is None:
            self._refusal = BrokerError(
                f"topic {message.topic()!r} refused a record: {error.str()}; nothing more is read until it is "
                f"repaired and the worker started again"
            )
