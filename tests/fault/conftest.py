"""Sites under faults, each in a directory of its own; their workers end with the test."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from stream.broker import ApacheBroker, Broker
from tests.fault.site import Site
from tests.support.brokers import require_apache


@pytest.fixture
def mortal_broker(tmp_path: Path) -> Iterator[Broker]:
    """An Apache Kafka node that the test may kill and start again."""
    with ApacheBroker(require_apache(), tmp_path / "broker") as broker:
        yield broker


@pytest.fixture
def new_site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Makes sites: `new_site(broker, STORE__TTL_S="60", …)`."""
    with ExitStack() as stack:

        def make(broker: Broker, **overrides: str) -> Site:
            return stack.enter_context(Site(broker, tmp_path / uuid.uuid4().hex[:6], **overrides))

        yield make
