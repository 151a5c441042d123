"""Records for the events topic, drawn from a seed: good events in every shape, and records that are no events.

Guaranteed: the same seed gives the same records. Event time is the source's own; it moves about a second with
each event, and now and then a quarter of an hour at once, so that rows with a time to live end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import msgpack
import numpy as np
from confluent_kafka import Producer

from stream.kafka import producer_config
from stream.settings import Settings
from stream.wire import encode_event, encode_event_json

__all__ = ["JSON", "Publisher", "Record", "Source"]

JSON = [("content-type", b"application/json")]
START_MS = 1_600_000_000_000
_CHUNK_S = 0.02


class Record(NamedTuple):
    """What a publisher sends."""

    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]] | None = None


class Source:
    """An endless stream of records.

    Parameters
    ----------
    seed: of every choice.
    clients: how many; half of the events are those of few of them.
    bad: the share of records that are no events.
    """

    def __init__(self, seed: int, clients: int = 400, bad: float = 0.02) -> None:
        self._rng = np.random.default_rng(seed)
        self._clients = clients
        self._bad = bad
        self._clock_ms = START_MS
        self._last = Record(b"client-0", b"")

    def __iter__(self) -> Iterator[Record]:
        while True:
            yield self.record()

    def record(self) -> Record:
        """The next one."""
        draw = self._rng.random()
        if draw < self._bad:
            return self._broken(self.event())
        if draw < self._bad + 0.01:
            # The same event again is another event: offsets tell events apart.
            return self._last
        self._last = self.event()
        return self._last

    def event(self) -> Record:
        """A good event."""
        rng = self._rng
        few = rng.random() < 0.5
        number = min(int(rng.zipf(1.4)), self._clients) if few else int(rng.integers(1, self._clients + 1))
        client = f"client-{number}"
        self._clock_ms += 900_000 if rng.random() < 0.0003 else int(rng.integers(0, 2000))
        at = self._clock_ms - (int(rng.integers(0, 600_000)) if rng.random() < 0.05 else 0)
        modality, fields = self._fields()
        if rng.random() < 0.03:
            return Record(client.encode(), encode_event_json(client, at, modality, fields), JSON)
        return Record(client.encode(), encode_event(client, at, modality, fields))

    def _fields(self) -> tuple[str, dict[str, str | float]]:
        rng = self._rng
        if rng.random() < 0.2:
            fields: dict[str, str | float] = {"product": str(rng.choice(["loan", "card", "other"]))}
            return "offer", fields if rng.random() < 0.5 else {**fields, "rate": float(rng.normal(0.03, 0.01))}
        fields = {"amount": float(rng.normal(20, 40)), "merchant": str(rng.choice(["bakery", "fuel", "shop-1", "x"]))}
        return "pay", fields if rng.random() < 0.7 else {**fields, "channel": str(rng.choice(["web", "shop"]))}

    def _broken(self, good: Record) -> Record:
        key, value, headers = good
        assert value is not None
        kind = int(self._rng.integers(6))
        if kind == 0:
            return Record(key, None)
        if kind == 1:
            return Record(key, value[: len(value) // 2], headers)
        if kind == 2:
            return Record(b"somebody else", value, headers)
        if kind == 3:
            return Record(key, self._rng.bytes(40))
        if kind == 4:
            return Record(key, msgpack.packb({"client_id": str(key), "modality": "pay", "fields": {}}))
        return Record(key, msgpack.packb([1, 2, 3]))


class Publisher(threading.Thread):
    """Publishes a source's records at a steady rate until it is stopped; `published` counts them.

    A broker that is away makes it wait, as it would any publisher; what was handed over is delivered once.
    """

    def __init__(self, settings: Settings, source: Source, per_second: float) -> None:
        super().__init__(name="publisher", daemon=True)
        self.published = 0
        self._topic = settings.topics.events
        self._source = source
        self._per_second = per_second
        self._stopping = threading.Event()
        self._refused: list[str] = []
        self._producer = Producer({**producer_config(settings), "on_delivery": self._delivered})

    def run(self) -> None:
        """Publish until `stop`."""
        began, sent = time.monotonic(), 0
        while not self._stopping.wait(_CHUNK_S):
            due = int((time.monotonic() - began) * self._per_second)
            # After a wait nothing is caught up with in one rush.
            sent = max(sent, due - 500)
            while sent < due:
                self.send(self._source.record())
                sent += 1

    def publish(self, count: int) -> None:
        """Publish `count` records now and wait until they are delivered; not beside a running thread."""
        for _ in range(count):
            self.send(self._source.record())
        self.flush()

    def send(self, record: Record, partition: int = -1) -> None:
        """Hand over one record."""
        headers = {} if record.headers is None else {"headers": list(record.headers)}
        while True:
            try:
                self._producer.produce(
                    self._topic, key=record.key, value=record.value, partition=partition, **headers
                )  # fmt: skip
                break
            except BufferError:
                self._producer.poll(0.05)
        self._producer.poll(0)
        self.published += 1

    def flush(self) -> None:
        """Wait until everything handed over is delivered."""
        left = self._producer.flush(60)
        assert left == 0, f"{left} records were not delivered within 60 s"
        assert not self._refused, f"{len(self._refused)} records were refused: {self._refused[0]}"

    def stop(self) -> None:
        """End the thread, with everything delivered."""
        self._stopping.set()
        if self.is_alive():
            self.join()
        self.flush()

    def _delivered(self, error: object, _: object) -> None:
        if error is not None:
            self._refused.append(str(error))
