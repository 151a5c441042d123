"""Versions on a real broker: whole, rising, never lost, and from one trainer at a time."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from stream.broker import ApacheBroker, Broker, EmbeddedBroker
from stream.errors import BrokerError, Fenced
from stream.kafka import client_config
from stream.model.parameters import ParameterSet, Tensor
from stream.parameter_log import MARKER_KEY, ParameterReader, encode_marker
from stream.parameter_records import Headers
from tests.support.brokers import require_apache
from tests.support.processes import wait_for
from trainer.publisher import Publisher, TableRows, read_latest
from trainer.timeline import Record

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


def rows(**changed: float | None) -> TableRows:
    """Rows of one float; None takes one away."""
    return TableRows(1, {k.encode(): None if v is None else np.float32([v]).tobytes() for k, v in changed.items()})


def contents(parameters: ParameterSet) -> dict[str, dict[str, float]]:
    return {
        name: {key.decode(): float(np.frombuffer(row, np.float32)[0]) for key, row in table.items()}
        for name, table in parameters.tables.items()
    }


def test_rows_that_changed_are_written_and_all_are_read_back(new_shop: NewShop) -> None:
    # Given a version with a table
    shop = new_shop()
    topic = shop.settings.topics.parameters
    publisher = Publisher(shop.settings)
    publisher.publish(tensors(0.5), [], 0, {"t.a": rows(x=1, y=2, z=3)})
    before = len(shop.read(topic))
    # When one row changes, one goes, one comes and one stays what it is
    publisher.publish(tensors(0.5), [], 0, {"t.a": rows(x=1, y=7, z=None, w=4)})
    # Then those and the marker are written
    written = {message.key(): message.value() is None for message in shop.read(topic)[before:]}
    assert written == {b"row/t.a/y": False, b"row/t.a/z": True, b"row/t.a/w": False, MARKER_KEY: False}
    # And a reader has the whole table
    latest = read_latest(shop.settings)
    assert latest is not None
    assert contents(latest[0]) == {"t.a": {"x": 1, "y": 7, "w": 4}}
    publisher.close()
    # And so does the next publisher, which writes what is left of it, of another width too, and takes it away
    publisher = Publisher(shop.settings)
    assert publisher.current is not None
    assert contents(publisher.current) == contents(latest[0])
    publisher.publish(tensors(0.5), [], 0, {"t.a": rows(y=8), "t.b": rows(x=1)})
    publisher.publish(tensors(0.5), [], 0, {"t.a": TableRows(2, {b"y": bytes(8)})})
    publisher.close()
    latest = read_latest(shop.settings)
    assert latest is not None
    assert {name: dict(table.items()) for name, table in latest[0].tables.items()} == {"t.a": {b"y": bytes(8)}}
    assembler, markers = shop.versions()
    assert assembler.torn == 0
    assert [sum(table.rows for table in marker.tables.values()) for marker in markers] == [3, 3, 4, 1]


class Forgetful(ParameterReader):
    """Loses the first row that it reads once `loses` is set."""

    loses = False

    def _take(self, key: bytes | None, value: bytes | None, headers: Headers) -> None:
        if self.loses and key is not None and key.startswith(b"row/"):
            self.loses = False
            return
        super()._take(key, value, headers)


def test_a_reader_that_missed_a_row_starts_over_from_the_log(new_shop: NewShop) -> None:
    # Given a worker that follows the log
    shop = new_shop()
    publisher = Publisher(shop.settings)
    publisher.publish(tensors(0.1), [], 0, {"t.a": rows(x=1, y=2)})
    served: list[dict[str, dict[str, float]]] = []
    reader = Forgetful(shop.settings, lambda parameters, _: served.append(contents(parameters)))
    reader.start()
    try:
        wait_for(lambda: len(served) == 1, 30, "the first version")
        # When it misses a row of the next version
        reader.loses = True
        publisher.publish(tensors(0.2), [], 0, {"t.a": rows(x=3)})
        # Then it never serves that version without it, and has it all the same
        wait_for(lambda: len(served) == 2, 30, "the second version")
        publisher.publish(tensors(0.3), [], 0, {"t.a": rows(y=4)})
        wait_for(lambda: len(served) == 3, 30, "the third version")
    finally:
        reader.stop()
        publisher.close()
    assert served == [{"t.a": {"x": 1, "y": 2}}, {"t.a": {"x": 3, "y": 2}}, {"t.a": {"x": 3, "y": 4}}]
    assert reader.torn == 1


def test_a_log_whose_last_version_is_not_whole_is_written_anew(new_shop: NewShop) -> None:
    # Given a log that lost a row for good, so that no marker closes any more
    shop = new_shop()
    publisher = Publisher(shop.settings)
    publisher.publish(tensors(0.1), [], 0, {"t.a": rows(x=1, y=2)})
    publisher.close()
    marker = shop.versions()[1][0]
    torn = replace(marker, version=9, tables={"t.a": replace(marker.tables["t.a"], since=9, checksum=1)})
    shop.publish(shop.settings.topics.parameters, [Record(0, 0, 0, MARKER_KEY, encode_marker(torn), ())])
    # When a trainer opens it and publishes all that it has
    publisher = Publisher(shop.settings)
    publisher.publish(tensors(0.2), [], 0, {"t.a": rows(x=5, y=2)})
    publisher.close()
    # Then the version is later than the torn one, and whole
    latest = read_latest(shop.settings)
    assert latest is not None
    assert (latest[1].version, latest[1].epoch) == (10, 2)
    assert contents(latest[0]) == {"t.a": {"x": 5, "y": 2}}


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
        publisher.publish(tensors(0.2, "head/new/weight"), [5], 7, {"t.a": rows(x=1)})
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
    assert publisher.publish(tensors(0.3, "head/new/weight"), [], 8, {"t.a": rows(y=2)}).version == 3
    publisher.close()
    # And no reader ever saw another version 2
    assembler, markers = shop.versions()
    assert assembler.current is not None
    assert bits(dict(assembler.current)) == bits(tensors(0.3, "head/new/weight"))
    assert contents(assembler.current) == {"t.a": {"x": 1, "y": 2}}
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
