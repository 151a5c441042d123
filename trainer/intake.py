"""What the trainer reads: all partitions of events and feedback, each from where its checkpoint ends.

Guaranteed: records come in the order of `Timeline`; no partition is read further ahead than `_BUFFERED` records while
others hold it up; a log that ends before the checkpoint's position is refused. No consumer group decides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from stream.errors import BrokerError
from stream.kafka import client_config, log_ends
from stream.settings import Settings
from trainer.timeline import EVENTS, FEEDBACK, Record, Slice, Timeline

__all__ = ["Intake"]

logger = logging.getLogger(__name__)

_FETCH_RECORDS = 10_000
_FETCH_WAIT_S = 0.02
#: A partition is not read further ahead than this while others hold it up.
_BUFFERED = 20_000

#: Kind of input and partition.
_Place = tuple[int, int]


class Intake:
    """Reads both topics.

    Parameters
    ----------
    positions: by kind and partition, the offset that comes next; moved by whoever applies the records.
    clock: UTC seconds.

    Raises
    ------
    BrokerError: a log ends before its position: it is not the log that the checkpoint was made from.
    """

    def __init__(self, settings: Settings, positions: Mapping[_Place, int], clock: Callable[[], float]) -> None:
        self._settings = settings
        self._positions = positions
        self._clock = clock
        self._timeline = Timeline(settings.topics.partitions)
        self._topics = {settings.topics.events: EVENTS, settings.topics.feedback: FEEDBACK}
        self._paused: set[_Place] = set()
        #: Ends of the partitions at the start that are still to be reached.
        self._behind: dict[_Place, int] = {}
        self._ends: dict[_Place, int] = {}
        assigned = [
            TopicPartition(topic, p, positions.get((kind, p), 0))
            for topic, kind in self._topics.items()
            for p in range(settings.topics.partitions)
        ]
        self._find_ends(assigned)
        self._consumer = Consumer(
            client_config(
                settings,
                group_id=f"{settings.kafka.group}-trainer",
                enable_auto_commit=False,
                enable_auto_offset_store=False,
                isolation_level="read_committed",
                auto_offset_reset="earliest",
                enable_partition_eof=True,
                fetch_wait_max_ms=20,
                queued_min_messages=20_000,
                queued_max_messages_kbytes=32 * 1024,
            )
        )
        self._consumer.assign(assigned)

    def _find_ends(self, assigned: list[TopicPartition]) -> None:
        """Check the positions against the logs, and note what there is to be read again."""
        for tp in assigned:
            low, high = log_ends(self._settings, tp.topic, tp.partition)
            if high < tp.offset:
                raise BrokerError(
                    f"topic {tp.topic!r} partition {tp.partition} ends at offset {high}, but the checkpoint in "
                    f"trainer.data_dir = {self._settings.trainer.data_dir!r} has read up to {tp.offset}: the topic "
                    f"was made anew; use another trainer.data_dir, or restore the topic"
                )
            if low > tp.offset > 0:
                logger.warning(
                    "topic %s partition %d: %d records were deleted by the broker before they were read",
                    tp.topic, tp.partition, low - tp.offset,
                )  # fmt: skip
            if low > tp.offset:
                tp.offset = low
            place = (self._topics[tp.topic], tp.partition)
            self._ends[place] = high
            if high > tp.offset:
                self._behind[place] = high

    @property
    def is_catching_up(self) -> bool:
        """Whether something that was there at the start is still to be applied."""
        for place, end in list(self._behind.items()):
            # A log may end in records that no reader sees, so its end is also where reading ended.
            if self._positions.get(place, 0) >= end or self._timeline.is_drained(*place):
                del self._behind[place]
        return bool(self._behind)

    def take_as_caught_up(self) -> None:
        """Whatever was there at the start is as good as applied."""
        self._behind.clear()

    @property
    def is_empty(self) -> bool:
        """Whether everything that was fetched has been taken."""
        return self._timeline.is_empty

    @property
    def oldest_ms(self) -> int | None:
        """Kafka's time of the oldest record that was fetched and not taken yet; None: there is none."""
        return self._timeline.oldest_ms

    def fetch(self) -> None:
        """Wait a moment for what the broker has.

        Raises
        ------
        BrokerError: a topic cannot be read.
        """
        found: dict[_Place, list[Record]] = {}
        ended: set[_Place] = set()
        now_ms = int(self._clock() * 1000)
        try:
            messages = self._consumer.consume(_FETCH_RECORDS, timeout=_FETCH_WAIT_S)
        except KafkaException as error:
            raise BrokerError(f"events and feedback cannot be read: {error.args[0].str()}") from error
        for message in messages:
            problem = message.error()
            place = (self._topics[message.topic() or ""], message.partition() or 0)
            if problem is None:
                found.setdefault(place, []).append(_record(message))
                ended.discard(place)
            elif problem.code() == KafkaError._PARTITION_EOF:
                ended.add(place)
            elif problem.fatal():
                raise BrokerError(f"topic {message.topic()!r} cannot be read: {problem.str()}")
            else:
                logger.warning("topic %s: %s", message.topic(), problem.str())
        for (kind, p), records in found.items():
            self._timeline.add(kind, p, records, now_ms)
        for kind, p in ended:
            self._timeline.end(kind, p)
        for kind, p in found:
            if (kind, p) not in self._paused and self._timeline.buffered(kind, p) > _BUFFERED:
                self._paused.add((kind, p))
                self._consumer.pause([TopicPartition(self._name(kind), p)])
        for kind, p in list(self._paused):
            if self._timeline.buffered(kind, p) < _BUFFERED // 4:
                self._paused.discard((kind, p))
                self._consumer.resume([TopicPartition(self._name(kind), p)])

    def take(self, blocked: Collection[int]) -> Slice:
        """What comes next; see `Timeline.take`."""
        return self._timeline.take(blocked)

    def stop_waiting(self) -> None:
        """Go on without the partitions that bring nothing and hold the others up."""
        for kind, p in self._timeline.stop_waiting():
            logger.warning("partition %d of %s brings nothing: going on without it", p, self._name(kind))

    def waiting(self) -> dict[str, int]:
        """Of each topic, the records that were not applied yet."""
        records = {}
        for topic, kind in self._topics.items():
            lag = 0
            for p in range(self._settings.topics.partitions):
                _, high = self._consumer.get_watermark_offsets(TopicPartition(topic, p), cached=True)
                # Before the first fetch the client knows no end, and the one found at the start holds.
                end = max(high, self._ends[kind, p])
                lag += max(0, end - self._positions.get((kind, p), 0))
            records[topic] = lag
        return records

    def close(self) -> None:
        """Let go of the broker."""
        self._consumer.close()

    def _name(self, kind: int) -> str:
        return self._settings.topics.events if kind == EVENTS else self._settings.topics.feedback


def _record(message: Message) -> Record:
    kind, timestamp_ms = message.timestamp()
    return Record(
        message.partition() or 0,
        message.offset() or 0,
        timestamp_ms if kind else 0,
        message.key(),
        message.value(),
        message.headers() or (),
    )
