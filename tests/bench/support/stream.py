"""A steady stream of events and a consumer that notes when each of their offsets is seen.

A partition's offsets are consecutive and one producer writes them in order, so an offset tells which publication it
was. Times are of the process's own monotonic clock, taken at `produce` and when the consumer hands the record out.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import numpy as np
from confluent_kafka import Consumer, Message, Producer, TopicPartition
from numpy.typing import NDArray

from stream.kafka import client_config, log_range, producer_config
from stream.settings import Settings
from tests.bench.support.workload import Workload

__all__ = ["Publisher", "Watcher", "undisturbed"]

_TICK_S = 0.002


class Publisher:
    """Publishes the workload's events to a topic at a steady rate, for so many seconds.

    They are made here, since that takes tenths of a second which would be missing among the publications.

    after: called after each event with its number, key and partition, and the producer.
    """

    def __init__(
        self,
        settings: Settings,
        topic: str,
        workload: Workload,
        rate: float,
        seconds: float,
        after: Callable[[int, bytes, int, Producer], None] | None = None,
    ) -> None:
        self._settings = settings
        self._topic = topic
        self._chunks = [*workload.chunks(int(seconds * rate), settings.topics.partitions)]
        self._rate = rate
        self._after = after
        self.times: list[list[float]] = [[] for _ in range(settings.topics.partitions)]
        self.late_s = 0.0

    def run(self, stopping: threading.Event) -> None:
        """Publish them all; `late_s` is the furthest it fell behind its schedule."""
        producer = Producer(producer_config(self._settings))
        sent, started = 0, time.perf_counter()
        for keys, values, partitions in self._chunks:
            for key, value, partition in zip(keys, values, partitions, strict=True):
                now = time.perf_counter()
                due = started + sent / self._rate
                while due > now:
                    producer.poll(0)
                    time.sleep(max(_TICK_S, due - now))
                    now = time.perf_counter()
                self.late_s = max(self.late_s, now - due - _TICK_S)
                producer.produce(self._topic, value, key, partition)
                self.times[partition].append(now)
                if self._after is not None:
                    self._after(sent, key, partition, producer)
                sent += 1
                if stopping.is_set():
                    producer.flush(30)
                    return
        producer.flush(30)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Without this process's garbage collector, which would stop publishing and watching for tenths of a second."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Watcher:
    """Reads a topic from its end on a thread of its own and notes when each offset was seen first, until it is left.

    offset_of: the event's offset in a record of the topic. deletions: whether records without a value are of events.
    """

    def __init__(
        self, settings: Settings, topic: str, offset_of: Callable[[Message], int], *, deletions: bool = True
    ) -> None:
        self._offset_of = offset_of
        self._deletions = deletions
        self._consumer = Consumer(client_config(settings, group_id="bench-watcher", enable_auto_commit=False))
        starts = []
        for number in range(settings.topics.partitions):
            _, end = log_range(self._consumer, topic, number)
            starts.append(TopicPartition(topic, number, end))
        self._consumer.assign(starts)
        # Looked into after the reading only: reading a record's offset takes longer than taking the record.
        self._taken: list[tuple[float, list[Message]]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._read, name="watcher")
        self._thread.start()

    def _read(self) -> None:
        while not self._stopping.is_set():
            # One record is waited for, then whatever has come is taken: asking for many would wait for all of them.
            first = self._consumer.poll(0.05)
            if first is None:
                continue
            messages = [first, *self._consumer.consume(1000, timeout=0)]
            self._taken.append((time.perf_counter(), messages))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop reading; what was noted stays."""
        self._stopping.set()
        self._thread.join(30)
        self._consumer.close()

    def sightings(self) -> Iterator[tuple[float, Message]]:
        """(when it was in hand, record) of everything that was read."""
        for at, messages in self._taken:
            for message in messages:
                if message.error() is None:
                    yield at, message

    def delays(self, published: list[list[float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(publication times, seconds from publication to sight) of every offset seen, for events from offset 0 on."""
        seen: set[tuple[int, int]] = set()
        when, delay = [], []
        for at, message in self.sightings():
            if message.value() is None and not self._deletions:
                continue
            number, offset = message.partition() or 0, self._offset_of(message)
            if (number, offset) not in seen and offset < len(published[number]):
                seen.add((number, offset))
                when.append(published[number][offset])
                delay.append(at - published[number][offset])
        order = np.argsort(when)
        return np.array(when)[order], np.array(delay)[order]
