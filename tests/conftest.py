"""Fixtures that every part of the suite may use: real brokers and ports nobody else uses."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from stream import ports
from stream.broker import ApacheBroker, Broker, EmbeddedBroker
from tests.support.brokers import require_apache

# As worker and trainer do: on few cores, threads of matrix products wait for each other.
torch.set_num_threads(1)

# How long an example takes says how busy the machine is; speed is measured in tests/bench.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `make faults` turns up."""
    parser.addoption("--seed", type=int, default=11, help="of the random moments at which a trainer is killed")
    parser.addoption("--broker-away", type=float, default=4.0, help="seconds a broker is away from a trainer")


@pytest.fixture(scope="session")
def embedded_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One running embedded broker for the session; tests take topics of their own."""
    with EmbeddedBroker(tmp_path_factory.mktemp("embedded")) as broker:
        yield broker


@pytest.fixture(scope="session")
def apache_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One running Apache Kafka node for the session; tests take topics of their own."""
    with ApacheBroker(
        require_apache(),
        tmp_path_factory.mktemp("apache"),
        # Tests kill workers: nobody should wait long until the group notices.
        properties={"group.min.session.timeout.ms": "1000"},
    ) as broker:
        yield broker


@pytest.fixture(params=["embedded", "apache"])
def broker(request: pytest.FixtureRequest) -> Broker:
    """Each kind of broker in turn."""
    running: Broker = request.getfixturevalue(f"{request.param}_broker")
    return running


@pytest.fixture
def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    return ports.free_port()
