"""Readers of the parameters topic end with the trainer's bits, whatever happens, and never serve anything else."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from confluent_kafka import Producer

from stream.broker import ApacheBroker, Broker
from stream.kafka import producer_config
from stream.model.parameters import ParameterSet, Tensor, encode_tensor
from stream.parameter_log import MARKER_KEY, Marker, ParameterReader, encode_marker
from stream.settings import Settings
from tests.support.brokers import require_apache
from tests.support.compaction import compact_at_once, wait_until_compacted
from tests.support.processes import http_get, metric, wait_for
from trainer.pretrain import random_trunk, save_parameters
from trainer.publisher import Publisher, read_latest

from .conftest import LiveShop, NewShop
from .shop import posterior
from .test_crash import opened
from .test_service import stream

Bits = dict[str, bytes]


def bits(tensors: ParameterSet) -> Bits:
    return {name: np.asarray(tensor).tobytes() for name, tensor in tensors.items()}


def content(version: int, random: np.random.Generator) -> dict[str, Tensor]:
    """A version's tensors: one that is always new, some that seldom are, and one that comes and goes."""
    tensors = {f"trunk/{i}": np.full(3, float(version // (7 * (i + 1)))) for i in range(4)}
    tensors["head/t/weight"] = random.normal(size=5)
    if version % 10 < 5:
        tensors["head/other/weight"] = np.full(2, float(version // 10))
    return tensors


class Reader:
    """What a worker reads with, and the bits of every version that it staged."""

    def __init__(self, settings: Settings) -> None:
        self.served: list[tuple[int, Bits]] = []
        self.reader = ParameterReader(settings, self._on_version)

    def _on_version(self, parameters: ParameterSet, marker: Marker) -> None:
        self.served.append((parameters.version, bits(parameters)))

    def wait(self, version: int) -> None:
        wait_for(
            lambda: self.reader.error is not None or bool(self.served and self.served[-1][0] >= version),
            60, f"version {version} is served",
        )  # fmt: skip
        assert self.reader.error is None


@contextmanager
def reading(settings: Settings) -> Iterator[Reader]:
    reader = Reader(settings)
    reader.reader.start()
    try:
        yield reader
    finally:
        reader.reader.stop()


def publish_versions(publisher: Publisher, count: int, random: np.random.Generator) -> dict[int, Bits]:
    """The bits of the next versions, by number, as they were published."""
    published = {}
    for _ in range(count):
        version = publisher.publish(content(publisher.version + 1, random), [], 0)
        published[version.version] = bits(version)
    return published


@pytest.mark.parametrize("kind", ["embedded", "apache"])
def test_a_reader_that_was_away_for_a_thousand_versions_ends_as_the_trainer(
    kind: str, request: pytest.FixtureRequest
) -> None:
    # Given a log, on Apache Kafka one that compacts as soon as it can, and a reader that has its first versions
    broker: Broker = request.getfixturevalue(f"{kind}_broker")
    shop = LiveShop(broker, request.getfixturevalue("tmp_path"))
    count, random = (1000, np.random.default_rng(1)) if kind == "embedded" else (80, np.random.default_rng(2))
    if kind == "apache":
        compact_at_once(shop.settings)
    publisher = Publisher(shop.settings)
    published = publish_versions(publisher, 3, random)
    with reading(shop.settings) as reader:
        reader.wait(3)
    # When that one is down over many versions
    with reading(shop.settings) as live:
        published |= publish_versions(publisher, count, random)
        if kind == "apache":
            wait_until_compacted(shop.settings, lambda: published.update(publish_versions(publisher, 1, random)))
        last = publisher.version
        # Then it, one that never was there before, and one that was there all the time have the trainer's bits
        with reading(shop.settings) as back, reading(shop.settings) as late:
            for one in (back, late, live):
                one.wait(last)
                assert one.served[-1] == (last, published[last])
                # And not one of them served anything else
                assert all(found == published[version] for version, found in one.served)
                versions = [version for version, _ in one.served]
                assert versions == sorted(set(versions))
    publisher.close()


def test_pieces_that_are_doubled_lost_or_of_aborted_transactions_are_never_served(new_shop: NewShop) -> None:
    # Given a live reader, and a log of versions
    shop = new_shop()
    random = np.random.default_rng(3)
    topic = shop.settings.topics.parameters
    publisher = Publisher(shop.settings)
    stranger = Producer(producer_config(shop.settings, transactional_id=f"{topic}-stranger"))
    stranger.init_transactions(30)
    with reading(shop.settings) as live:
        published = publish_versions(publisher, 2, random)
        for ends in (stranger.abort_transaction, stranger.commit_transaction):
            # When tensors and markers come that are pieces of versions: of one that was aborted, or lost a part
            before = shop.read(topic)
            number = publisher.version + 1
            stranger.begin_transaction()
            stray = encode_tensor("head/t/weight", number, np.full(5, 99.0))
            stranger.produce(topic, stray, b"head/t/weight", partition=0)
            torn = Marker(9, number, number - 1, {"head/t/weight": (number, 1), "head/lost": (number, 2)}, (), 0)
            stranger.produce(topic, encode_marker(torn), MARKER_KEY, partition=0)
            # And all of the log comes again
            for message in before:
                stranger.produce(topic, message.value(), message.key(), partition=0)
            ends(30)
            published |= publish_versions(publisher, 2, random)
        live.wait(publisher.version)
        # Then whole versions were served, with the trainer's bits, each once
        assert live.served == sorted(published.items())
        # And a reader that comes now ends with them too
        with reading(shop.settings) as late:
            late.wait(publisher.version)
            assert late.served[-1] == live.served[-1]
    publisher.close()


def test_of_two_trainers_the_older_ends_and_says_why(new_shop: NewShop, free_port: int) -> None:
    # Given a trainer that publishes
    shop = new_shop()
    trunk = shop.directory / "trunk.msgpack"
    save_parameters(trunk, random_trunk(shop.settings, []))
    older = shop.forked("--trunk", str(trunk))
    wait_for(lambda: not older.is_alive() or read_latest(shop.settings) is not None, 60, "it publishes")
    # When another one starts, with a directory of its own
    shop.environment |= {
        "LIVESTATE_TRAINER__DATA_DIR": str(shop.directory / "other"),
        "LIVESTATE_TRAINER__HTTP_PORT": str(free_port),
    }
    newer = shop.forked("--trunk", str(trunk))
    wait_for(lambda: not newer.is_alive() or metric(free_port, "livestate_parameter_version") > 0, 60, "it publishes")
    events, feedback = stream()
    shop.publish(shop.settings.topics.events, events)
    shop.publish(shop.settings.topics.feedback, feedback)
    # Then the older one ends with the reason as soon as it wants to publish, and the newer one goes on
    older.join(60)
    assert older.exitcode not in (None, 0)
    assert "another trainer of group" in shop.log()
    assert "this one must stop" in shop.log()
    wait_for(
        lambda: sum(len(marker.feedback_ms) for marker in shop.versions()[1] if marker.epoch == 2) == len(feedback),
        60, "everything is in versions of the newer one",
    )  # fmt: skip
    assert newer.is_alive()


@pytest.mark.timeout(600)
def test_nothing_is_lost_while_the_broker_is_away(
    tmp_path: Path, free_port: int, request: pytest.FixtureRequest
) -> None:
    away_s = request.config.getoption("--broker-away")
    clients = 400
    with ApacheBroker(require_apache(), tmp_path / "broker") as broker:
        # Given a trainer that publishes all the time, as feedback comes all the time
        shop = LiveShop(
            broker, tmp_path, TRAINER__HTTP_PORT=str(free_port), TRAINER__PUBLISH_INTERVAL_S="0.01"
        )  # fmt: skip
        trunk = shop.directory / "trunk.msgpack"
        save_parameters(trunk, random_trunk(shop.settings, []))
        trainer = shop.forked("--trunk", str(trunk))
        events, feedback = stream(clients=clients)
        shop.publish(shop.settings.topics.events, events)
        stopping = threading.Event()

        def publish() -> None:
            # Whatever cannot be sent now is sent later.
            config = producer_config(shop.settings, message_timeout_ms=0, enable_idempotence=True)
            producer = Producer(config)
            for one in feedback:
                producer.produce(
                    shop.settings.topics.feedback, one.value, one.key, one.partition, timestamp=one.timestamp_ms
                )
                producer.poll(0)
                stopping.wait(away_s / clients)
            producer.flush(120)

        def learned() -> float:
            assert trainer.is_alive(), shop.log()
            return metric(free_port, "livestate_examples_learned_total")

        publishing = threading.Thread(target=publish, name="feedback")
        try:
            with reading(shop.settings) as reader:
                wait_for(lambda: metric(free_port, "livestate_parameter_version") > 0, 60, "the first version")
                publishing.start()
                wait_for(lambda: learned() > 20, 60, "something is learned")
                # When the broker is gone, in the middle of whatever it was doing, and comes back
                broker.kill()
                gone = time.monotonic()
                wait_for(lambda: http_get(free_port, "/readyz")[0] == 503, 60, "the trainer says that it is not ready")
                trainer.join(max(0.0, gone + away_s - time.monotonic()))
                broker.start()
                # Then the trainer goes on by itself
                wait_for(lambda: learned() == clients, 120, "everything is learned")
                wait_for(lambda: http_get(free_port, "/readyz")[0] == 200, 60, "the trainer is ready again")
                publishing.join(120)
                assert trainer.pid is not None
                os.kill(trainer.pid, signal.SIGTERM)
                trainer.join(60)
                assert trainer.exitcode == 0, shop.log()
                latest = read_latest(shop.settings)
                assert latest is not None
                reader.wait(latest[0].version)
        finally:
            stopping.set()
            publishing.join(120)
        # And every label is in one version, and the reader, which was there all the time, has the trainer's bits
        markers = {marker.version: marker for marker in shop.versions()[1]}
        times = sorted(at for marker in markers.values() for at in marker.feedback_ms)
        assert times == sorted(one.timestamp_ms for one in feedback)
        assert reader.served[-1] == (latest[0].version, bits(latest[0]))
        with opened(shop) as known:
            learner = known.learners["redeemed"]
            assert learner.labels == clients
            assert posterior(learner).mean.tobytes() == reader.served[-1][1]["head/redeemed/weight"]
