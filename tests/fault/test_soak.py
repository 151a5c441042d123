"""Short schedules of random faults while events flow; `make soak` plays longer ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from stream.broker import Broker
from tests.fault.play import Outcome, play
from tests.fault.schedule import EMBEDDED_KINDS, KINDS, draw
from tests.fault.site import Site


def _check(outcome: Outcome, faults: int) -> None:
    print(outcome.figures())
    # Then every event was applied exactly once and in order, whoever was killed, and no partition was left alone
    assert not outcome.problems
    assert sum(outcome.faults.values()) == faults
    # And there was something to get wrong
    report = outcome.report
    assert report.events + report.bad_records == outcome.published
    assert report.bad_records > 50
    assert report.expired > 0
    assert report.predictions > 500
    assert report.disk_rows > 0


@pytest.mark.timeout(240)
def test_faults_on_apache_kafka_lose_and_double_nothing(mortal_broker: Broker, new_site: Callable[..., Site]) -> None:
    # Given two workers and events that keep coming
    site = new_site(mortal_broker)
    # When one is paused, one is killed, a third one joins, the broker is killed, …
    schedule = draw(11, 6, KINDS)
    assert {"broker", "freeze", "join", "kill", "leave", "wipe"} == {fault.kind for fault in schedule}
    _check(play(site, schedule, seed=11, per_second=500), 6)


@pytest.mark.timeout(240)
def test_faults_on_the_embedded_broker_lose_and_double_nothing(
    embedded_broker: Broker, new_site: Callable[..., Site]
) -> None:
    # Given two workers and events that keep coming
    site = new_site(embedded_broker)
    # When one loses its disk, is killed, is paused, is slow, versions are swapped, one leaves
    schedule = draw(16, 6, EMBEDDED_KINDS)
    assert {"wipe", "kill", "freeze", "version", "slow", "leave"} == {fault.kind for fault in schedule}
    _check(play(site, schedule, seed=16, per_second=500), 6)
