"""Versions on a real broker: whole, rising, never lost, and from one trainer at a time."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from stream.broker import ApacheBroker, Broker, EmbeddedBroker
from stream.errors import BrokerError, Fenced
from stream.kafka import client_config
from stream.model.parameters import Tensor
from stream.parameter_log import MARKER_KEY
from tests.support.brokers import require_apache
from trainer.publisher import Publisher, read_latest

from .conftest import LiveShop, NewShop


def tensors(weight: float, *more: str) -> dict[str, Tensor]:
    return {
        "trunk/a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "head/t/weight": np.array([weight, 1.0]),
        **{name: np.zeros(1) for name in more},
    }


def bits(found: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: np.asarray(tensor).tobytes() for name, tensor in found.items()}


def test_a_version_is_read_back_bit_for_bit(new_shop: NewShop) -> None:
    # Given an empty log
    shop = new_shop()
    publisher = Publisher(shop.settings)
    assert (publisher.current, publisher.version, publisher.epoch) == (None, 0, 1)
    # When a version is published
    published = publisher.publish(tensors(0.5), [11, 12], 1000)
    publisher.close()
    # Then readers have the same tensors, and the marker says where they come from
    latest = read_latest(shop.settings)
    assert latest is not None
    parameters, marker = latest
    assert bits(dict(parameters)) == bits(dict(published)) == bits(tensors(0.5))
    assert (marker.epoch, marker.version, marker.previous) == (1, 1, 0)
    assert (marker.feedback_ms, marker.created_ms) == ((11, 12), 1000)


def test_only_what_changed_is_written_and_what_went_is_removed(new_shop: NewShop) -> None:
    shop = new_shop()
    publisher = Publisher(shop.settings)
    publisher.publish(tensors(0.5, "head/old/weight"), [], 0)
    before = len(shop.read(shop.settings.topics.parameters))
    # When one tensor changes and one goes
    publisher.publish(tensors(0.7), [], 0)
    publisher.close()
    # Then that one, a null for the other and the marker are written
    after = [(message.key(), message.value() is None) for message in shop.read(shop.settings.topics.parameters)]
    assert after[before:] == [(b"head/t/weight", False), (b"head/old/weight", True), (MARKER_KEY, False)]
    assembler, _ = shop.versions()
    assert assembler.current is not None
    assert bits(dict(assembler.current)) == bits(tensors(0.7))
    assert assembler.torn == 0


def test_versions_and_epochs_rise_over_restarts(new_shop: NewShop) -> None:
    shop = new_shop()
    for restart in range(1, 4):
        publisher = Publisher(shop.settings)
        assert publisher.epoch == restart
        assert publisher.version == 2 * (restart - 1)
        for _ in range(2):
            publisher.publish(tensors(restart / 7), [], 0)
        publisher.close()
    _, markers = shop.versions()
    assert [(marker.epoch, marker.version, marker.previous) for marker in markers] == [
        (1, 1, 0), (1, 2, 1), (2, 3, 2), (2, 4, 3), (3, 5, 4), (3, 6, 5),
    ]  # fmt: skip
    # The trunk was written once.
    assert {marker.tensors["trunk/a"][0] for marker in markers} == {1}


def test_no_version_is_at_or_below_that_of_the_checkpoint(new_shop: NewShop) -> None:
    shop = new_shop()
    publisher = Publisher(shop.settings)
    publisher.raise_floor(41)
    assert publisher.publish(tensors(0.5), [], 0).version == 42
    publisher.close()


def test_a_second_trainer_fences_the_first(new_shop: NewShop) -> None:
    # Given a trainer that publishes
    shop = new_shop()
    first = Publisher(shop.settings)
    first.publish(tensors(0.1), [], 0)
    # When another one opens
    second = Publisher(shop.settings)
    # Then the first is told, and what it wanted to say is not in the log
    with pytest.raises(Fenced, match="another trainer of group"):
        first.publish(tensors(0.2), [], 0)
    assert second.publish(tensors(0.3), [], 0).version == 2
    first.close()
    second.close()
    latest = read_latest(shop.settings)
    assert latest is not None
    assert bits(dict(latest[0])) == bits(tensors(0.3))
    assert latest[1].epoch == 2


@pytest.fixture(params=["embedded", "apache"])
def own_broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Broker]:
    """A broker that a test may disturb."""
    made: Broker = (
        EmbeddedBroker(tmp_path / "broker")
        if request.param == "embedded"
        else ApacheBroker(require_apache(), tmp_path / "broker")
    )
    with made:
        yield made


def test_a_version_that_is_not_confirmed_is_sent_again_the_same(own_broker: Broker, tmp_path: Path) -> None:
    # Given a broker that stops answering
    shop = LiveShop(own_broker, tmp_path)
    publisher = Publisher(shop.settings, timeout_s=2.0)
    publisher.publish(tensors(0.1), [], 0)
    assert own_broker.pid is not None
    os.kill(own_broker.pid, signal.SIGSTOP)
    # When a version is published
    with pytest.raises(BrokerError):
        publisher.publish(tensors(0.2, "head/new/weight"), [5], 7)
    assert publisher.is_waiting
    assert publisher.version == 1
    os.kill(own_broker.pid, signal.SIGCONT)
    # Then it is confirmed as soon as the broker answers, with everything in it
    for _ in range(30):
        try:
            version = publisher.retry()
            break
        except BrokerError:
            continue
    assert version.version == publisher.version == 2
    assert not publisher.is_waiting
    assert publisher.publish(tensors(0.3, "head/new/weight"), [], 8).version == 3
    publisher.close()
    # And no reader ever saw another version 2
    assembler, markers = shop.versions()
    assert assembler.current is not None
    assert bits(dict(assembler.current)) == bits(tensors(0.3, "head/new/weight"))
    assert assembler.torn == 0
    second = [marker for marker in markers if marker.version == 2]
    assert len(set(map(repr, second))) == 1
    assert second[0].feedback_ms == (5,)


def test_versions_survive_a_broker_that_is_killed_and_started_again(tmp_path: Path) -> None:
    # Given a broker that keeps its topics, killed while a version waits
    with ApacheBroker(require_apache(), tmp_path / "broker") as broker:
        shop = LiveShop(broker, tmp_path)
        publisher = Publisher(shop.settings, timeout_s=2.0)
        publisher.publish(tensors(0.1), [], 0)
        broker.kill()
        with pytest.raises(BrokerError):
            publisher.publish(tensors(0.2), [], 0)
        # When it is back
        broker.start()
        for _ in range(30):
            try:
                publisher.retry()
                break
            except BrokerError:
                continue
        publisher.close()
        # Then the version is there
        latest = read_latest(shop.settings)
        assert latest is not None
        assert latest[1].version == 2
        assert bits(dict(latest[0])) == bits(tensors(0.2))


def test_a_version_that_the_broker_refuses_is_not_published(apache_broker: Broker, tmp_path: Path) -> None:
    # Given a log that takes small records only
    shop = LiveShop(apache_broker, tmp_path)
    topic = shop.settings.topics.parameters
    limit = ConfigEntry("max.message.bytes", "2000", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[limit])
    admin = AdminClient(client_config(shop.settings))
    admin.incremental_alter_configs([resource])[resource].result(30)
    publisher = Publisher(shop.settings)
    publisher.publish(tensors(0.1), [], 0)
    # When a version has a larger one among its records
    with pytest.raises(BrokerError, match="too large"):
        publisher.publish({**tensors(0.2), "head/large/weight": np.ones(5000)}, [], 0)
    # Then it waits, and the log has the one before
    assert publisher.is_waiting
    assert publisher.version == 1
    publisher.close()
    latest = read_latest(shop.settings)
    assert latest is not None
    assert bits(dict(latest[0])) == bits(tensors(0.1))
