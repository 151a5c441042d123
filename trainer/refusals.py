"""Feedback that cannot be used, on its way to the dead-letters topic as it was received, with the reason."""

from __future__ import annotations

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from stream.errors import BrokerError, RecordError
from stream.kafka import producer_config
from stream.settings import Settings
from stream.wire import dead_letter_headers
from trainer.timeline import Record

__all__ = ["Refusals"]


class Refusals:
    """Writes dead letters."""

    def __init__(self, settings: Settings) -> None:
        self._topics = settings.topics
        self._producer = Producer(producer_config(settings))
        self._failure: KafkaError | None = None

    def send(self, record: Record, error: RecordError) -> None:
        """Hand over one record; it is there for certain once `flush` says so.

        Raises
        ------
        BrokerError: the topic cannot be written.
        """
        headers = [
            *record.headers,
            *dead_letter_headers(error.reason, str(error), self._topics.feedback, record.partition, record.offset),
        ]
        while True:
            try:
                self._producer.produce(
                    self._topics.dead_letters, record.value, record.key, headers=headers, on_delivery=self._delivered
                )
                self._producer.poll(0)
                return
            except BufferError:
                self._producer.poll(0.05)
            except KafkaException as failure:
                raise self._unwritable(failure.args[0]) from failure

    def flush(self, timeout_s: float) -> int:
        """Wait until all are confirmed, but no longer; returns how many are not.

        Raises
        ------
        BrokerError: the topic cannot be written.
        """
        waiting: int = self._producer.flush(timeout_s)
        if self._failure is not None:
            raise self._unwritable(self._failure)
        return waiting

    def _unwritable(self, error: KafkaError) -> BrokerError:
        return BrokerError(f"topic {self._topics.dead_letters!r} cannot be written: {error.str()}")

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self._failure = error
