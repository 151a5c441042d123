"""A rolling deployment: workers are replaced one after another while events flow."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from stream.broker import Broker
from tests.fault.play import finish
from tests.fault.site import SESSION_TIMEOUT_S, STOP_TIMEOUT_S, Site
from tests.fault.source import Publisher, Source
from tests.fault.verifier import verify


@pytest.mark.timeout(240)
def test_replacing_three_workers_one_by_one_loses_and_doubles_nothing(
    apache_broker: Broker, new_site: Callable[..., Site]
) -> None:
    # Given three workers and events that keep coming
    site = new_site(apache_broker)
    publisher = Publisher(site.settings, Source(7), 400)
    for name in ("a", "b", "c"):
        site.worker(name).start()
    site.await_ready()
    publisher.start()
    site.await_applied()
    # When each is told to stop, and started again once it has
    for name in ("a", "b", "c"):
        took = site.worker(name).stop()
        # Then it ends with 0 within the time a stop may take: the last checkpoints and the confirmations
        assert took < STOP_TIMEOUT_S + SESSION_TIMEOUT_S
        site.worker(name).start()
        site.await_ready()
        site.await_applied()
    publisher.stop()
    finish(site)
    # And no worker ended by itself, and nothing was lost or doubled
    assert not site.exits
    report = verify(site, aborted_are_hidden=True)
    assert not report.problems
    assert report.events + report.bad_records == publisher.published
    assert report.predictions_missing == 0
