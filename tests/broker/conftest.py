"""Real brokers: the embedded one everywhere, Apache Kafka where a distribution and Java are present."""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from stream.broker import ApacheBroker, Broker, EmbeddedBroker
from stream.settings import Kafka, Settings, parse
from tests.support.brokers import require_apache


@pytest.fixture(params=["embedded", "apache"])
def new_broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Broker]]:
    """Makes brokers of one kind, not started; those still running at the end are killed."""
    made: list[Broker] = []

    def make() -> Broker:
        directory = tmp_path / f"broker-{len(made)}"
        broker: Broker
        broker = EmbeddedBroker(directory) if request.param == "embedded" else ApacheBroker(require_apache(), directory)
        made.append(broker)
        return broker

    if request.param == "apache":
        require_apache()
    yield make
    for broker in made:
        broker.kill()


@pytest.fixture(params=["embedded", "apache"], scope="module")
def shared_broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One running broker of each kind for a whole module; tests take topics of their own."""
    directory = tmp_path_factory.mktemp("broker")
    broker = EmbeddedBroker(directory) if request.param == "embedded" else ApacheBroker(require_apache(), directory)
    with broker:
        yield broker


@pytest.fixture
def settings(shared_broker: Broker, request: pytest.FixtureRequest) -> Settings:
    """Settings for the shared broker whose topics no other test uses."""
    return settings_for(shared_broker, prefix=f"t{abs(hash(request.node.name))}-")


def settings_for(broker: Broker, prefix: str = "", partitions: int = 4) -> Settings:
    plain = parse("[modalities.purchase]\n")
    names = {
        name: prefix + getattr(plain.topics, name)
        for name in ("events", "feedback", "embeddings", "changelog", "parameters", "dead_letters")
    }
    topics = msgspec.structs.replace(plain.topics, partitions=partitions, **names)
    kafka = Kafka(bootstrap_servers=broker.bootstrap_servers, session_timeout_s=6.0)
    return msgspec.structs.replace(plain, topics=topics, kafka=kafka)
