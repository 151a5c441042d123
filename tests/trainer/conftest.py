"""The small shop on a real broker: topics of its own, publishers, readers, trainer processes."""

import multiprocessing
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Message, Producer, TopicPartition

from stream.broker import Broker
from stream.kafka import client_config, ensure_topics, producer_config
from stream.parameter_log import MARKER_KEY, Marker, VersionAssembler, decode_marker
from stream.settings import Settings, parse
from trainer.timeline import Record

from .program import run_as
from .shop import TOML

ROOT = Path(__file__).parents[2]
#: Makes processes by forking one that has imported everything: most of a trainer's start is imports.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["trainer.files", "trainer.service", "tests.trainer.program"])


class LiveShop:
    """Settings and topics of one test."""

    def __init__(self, broker: Broker, directory: Path, toml: str = TOML, **overrides: str) -> None:
        self.directory = directory
        prefix = uuid.uuid4().hex[:8]
        names = ("events", "feedback", "embeddings", "changelog", "parameters", "dead_letters")
        self.environment = {f"LIVESTATE_TOPICS__{name.upper()}": f"{prefix}-{name}" for name in names}
        self.environment |= {
            "LIVESTATE_KAFKA__BOOTSTRAP_SERVERS": broker.bootstrap_servers,
            "LIVESTATE_KAFKA__GROUP": prefix,
            "LIVESTATE_TRAINER__DATA_DIR": str(directory / "trainer"),
            "LIVESTATE_TRAINER__HTTP_PORT": "0",
            "LIVESTATE_TRAINER__PUBLISH_INTERVAL_S": "0.1",
            "LIVESTATE_TRAINER__CHECKPOINT_INTERVAL_S": "0.3",
            **{f"LIVESTATE_{name}": value for name, value in overrides.items()},
        }
        self.file = directory / "settings.toml"
        self.file.write_text(toml)
        self.settings: Settings = parse(toml, self.environment)
        ensure_topics(self.settings, create=True)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._forked: list[ForkServerProcess] = []

    def publish(self, topic: str, records: Iterable[Record]) -> None:
        """Write records to their partitions with their own times, and wait until the broker has them."""
        failed: list[str] = []
        producer = Producer(producer_config(self.settings, compression_type="none"))
        for record in records:
            producer.produce(
                topic, record.value, record.key, record.partition, timestamp=record.timestamp_ms,
                headers=list(record.headers), on_delivery=lambda error, _: error and failed.append(error.str()),
            )  # fmt: skip
            producer.poll(0)
        assert producer.flush(30) == 0
        assert not failed

    def read(self, topic: str, partitions: int = 1) -> list[Message]:
        """Every committed record there is now."""
        consumer = Consumer(
            client_config(self.settings, group_id="reader", enable_partition_eof=True, auto_offset_reset="earliest")
        )
        consumer.assign([TopicPartition(topic, p, 0) for p in range(partitions)])
        found: list[Message] = []
        ended: set[int] = set()
        while len(ended) < partitions:
            for message in consumer.consume(1000, timeout=0.1):
                if message.error() is None:
                    found.append(message)
                else:
                    ended.add(message.partition() or 0)
        consumer.close()
        return found

    def versions(self) -> tuple[VersionAssembler, list[Marker]]:
        """What a worker makes of the parameters topic, and every marker in it."""
        assembler = VersionAssembler()
        markers = []
        for message in self.read(self.settings.topics.parameters):
            assembler.feed(message.key(), message.value(), message.headers() or ())
            if message.key() == MARKER_KEY:
                markers.append(decode_marker(message.value() or b""))
        return assembler, markers

    def process(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A `livestate trainer` process of its own; killed at the end of the test."""
        with (self.directory / "trainer.log").open("ab") as log:
            process = subprocess.Popen(
                [
                    sys.executable, "-m", "tests.trainer.program", "trainer", "--settings", str(self.file),
                    *arguments,
                ],
                env={**os.environ, "PYTHONPATH": str(ROOT), **self.environment}, cwd=ROOT, stdout=log, stderr=log,
            )  # fmt: skip
        self._processes.append(process)
        return process

    def forked(self, *arguments: str) -> ForkServerProcess:
        """The same, started in a fraction of the time."""
        command = ["trainer", "--settings", str(self.file), *arguments]
        process = _FORKS.Process(target=run_as, args=(command, self.environment, self.directory / "trainer.log"))
        process.start()
        self._forked.append(process)
        return process

    def log(self) -> str:
        return (self.directory / "trainer.log").read_text()

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for forked in self._forked:
            forked.kill()
            forked.join()


NewShop = Callable[..., LiveShop]


@pytest.fixture
def new_shop(broker: Broker, tmp_path: Path) -> Iterator[NewShop]:
    """Makes shops on each kind of broker."""
    yield from _shops(broker, tmp_path)


@pytest.fixture
def new_embedded_shop(embedded_broker: Broker, tmp_path: Path) -> Iterator[NewShop]:
    """Makes shops on the embedded broker."""
    yield from _shops(embedded_broker, tmp_path)


def _shops(broker: Broker, directory: Path) -> Iterator[NewShop]:
    made: list[LiveShop] = []

    def make(**overrides: str) -> LiveShop:
        place = directory / f"shop-{len(made)}"
        place.mkdir()
        made.append(LiveShop(broker, place, **overrides))
        return made[-1]

    yield make
    for one in made:
        one.close()
