"""A system under test: topics of its own on a real broker, a published trunk, events, workers."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from confluent_kafka import Producer

from stream.broker import Broker
from stream.kafka import ensure_topics, producer_config
from stream.model.heads import Questions
from stream.model.layout import Layout
from stream.model.parameters import ParameterSet
from stream.settings import Settings, load
from stream.wire import Schema, encode_event
from tests.support.processes import Livestate
from tests.support.settings import write_settings
from tests.support.trunk import publish_version, random_head, random_trunk


class System:
    """Settings, topics and parameters of one test, and workers on demand."""

    def __init__(self, broker: Broker, directory: Path, extra: str = "") -> None:
        self.directory = directory
        prefix = uuid.uuid4().hex[:8]
        names = ("events", "feedback", "embeddings", "changelog", "parameters", "dead_letters")
        self.environment = {f"LIVESTATE_TOPICS__{n.upper()}": f"{prefix}-{n}" for n in names}
        self.environment |= {
            "LIVESTATE_TOPICS__PARTITIONS": "2",
            **broker.environment,
            "LIVESTATE_KAFKA__GROUP": prefix,
            "LIVESTATE_KAFKA__SESSION_TIMEOUT_S": "2",
            "LIVESTATE_WORKER__CHECKPOINT_INTERVAL_S": "0.3",
            "LIVESTATE_WORKER__BATCH_RECORDS": "500",
        }
        self.file = write_settings(directory / "settings.toml", extra)
        self.settings: Settings = load(self.file, self.environment)
        ensure_topics(self.settings, create=True)
        self.layout = Layout.compile(self.settings, Schema.compile(self.settings))
        self.parameters: ParameterSet = random_trunk(self.layout)
        self._rng = np.random.default_rng(5)
        self.clock_ms = 1_600_000_000_000
        self.published = 0
        self._producer = Producer(producer_config(self.settings))

    def publish_parameters(self, version: int = 1, with_head: bool = True) -> None:
        width = Questions(self.layout).tasks[0].width
        head = random_head("accepted", width, seed=version) if with_head else {}
        publish_version(self.settings, self.parameters.updated(head, version), version, version - 1)

    def worker(self, port: int, name: str = "a") -> Livestate:
        return Livestate(
            self.directory / f"worker-{name}.log",
            ["worker", "--settings", str(self.file)],
            self.environment
            | {
                "LIVESTATE_WORKER__HTTP_PORT": str(port),
                "LIVESTATE_WORKER__DATA_DIR": str(self.directory / f"data-{name}"),
            },
        )

    def publish(self, events: int, clients: int = 60) -> None:
        """Random events of few clients, some of them late, confirmed before this returns."""
        rng = self._rng
        for _ in range(events):
            client = f"client-{min(int(rng.zipf(1.4)), clients)}"
            self.clock_ms += int(rng.integers(0, 2000))
            at = self.clock_ms - (int(rng.integers(0, 60_000)) if rng.random() < 0.1 else 0)
            if rng.random() < 0.2:
                value = encode_event(client, at, "offer", {"product": str(rng.choice(["loan", "card", "other"]))})
            else:
                merchant = str(rng.choice(["bakery", "fuel", "shop-1", "x"]))
                value = encode_event(client, at, "pay", {"amount": float(rng.normal(20, 40)), "merchant": merchant})
            self.send(client.encode(), value)
        self.flush()
        self.published += events

    def send(self, key: bytes | None, value: bytes | None, **more: object) -> None:
        self._producer.produce(self.settings.topics.events, key=key, value=value, **more)
        self._producer.poll(0)

    def flush(self) -> None:
        assert self._producer.flush(60) == 0


@pytest.fixture
def new_system(broker: Broker, tmp_path: Path) -> Callable[..., System]:
    """Makes systems on each kind of broker."""

    def make(extra: str = "") -> System:
        directory = tmp_path / uuid.uuid4().hex[:6]
        directory.mkdir()
        return System(broker, directory, extra)

    return make
