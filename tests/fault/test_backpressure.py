"""More than a worker can take at once: it stays bounded, says how far behind it is, and catches up."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from stream.broker import Broker
from tests.fault.play import finish
from tests.fault.site import Site, Worker
from tests.fault.source import Publisher, Source
from tests.fault.verifier import verify
from tests.support.processes import http_get, rss_bytes, wait_for

BACKLOG = 100_000
BATCH = 2000


def _buckets(worker: Worker, name: str) -> dict[float, float]:
    """Observations of a histogram at or below each bound."""
    found = {}
    for line in http_get(worker.port, "/metrics")[1].splitlines():
        if line.startswith(f"{name}_bucket{{"):
            found[float(line.split('le="')[1].split('"')[0])] = float(line.rsplit(" ", 1)[1])
    return found


@pytest.mark.timeout(240)
def test_a_backlog_shows_as_lag_and_is_worked_off_in_bounded_batches(
    apache_broker: Broker, new_site: Callable[..., Site]
) -> None:
    # Given a hundred thousand events that nobody has read
    site = new_site(apache_broker, WORKER__BATCH_RECORDS=str(BATCH))
    publisher = Publisher(site.settings, Source(8), 0.0)
    publisher.publish(BACKLOG)
    worker = site.worker("a")
    # When a worker starts
    worker.start()
    lags: list[float] = []

    def is_worked_off() -> bool:
        lags.append(worker.metric("livestate_lag_events"))
        applied = worker.metric("livestate_events_applied_total") + worker.metric("livestate_dead_letters_total")
        return applied >= BACKLOG

    wait_for(is_worked_off, 120, "the backlog is worked off")
    site.await_applied()
    # Then it said how far behind it was, and at last that it is not
    assert max(lags) > 0
    wait_for(lambda: worker.metric("livestate_lag_events") == 0, 30, "no lag is left")
    # And no batch was larger than the setting, so none took long, however long the queue was
    sizes = _buckets(worker, "livestate_batch_events")
    assert sizes[4096.0] == sizes[float("inf")] > BACKLOG / BATCH
    seconds = _buckets(worker, "livestate_batch_seconds")
    assert seconds[10.0] == seconds[float("inf")]
    assert seconds[1.0] >= 0.9 * seconds[float("inf")]
    finish(site)
    assert not verify(site, aborted_are_hidden=True).problems


@pytest.mark.timeout(240)
def test_a_broker_that_stands_still_bounds_memory_and_is_waited_for(
    apache_broker: Broker, new_site: Callable[..., Site]
) -> None:
    # Given a worker in the middle of a backlog
    site = new_site(apache_broker)
    publisher = Publisher(site.settings, Source(9), 0.0)
    publisher.publish(30_000)
    worker = site.worker("a")
    worker.start()
    wait_for(lambda: worker.metric("livestate_events_applied_total") > 2000, 90, "it works")
    before = worker.process.rss_bytes()
    # When the broker stands still for several seconds
    pid = apache_broker.pid
    assert pid is not None
    largest = 0
    os.kill(pid, signal.SIGSTOP)
    try:
        until = time.monotonic() + 5.0
        while time.monotonic() < until:
            largest = max(largest, rss_bytes(worker.process.process.pid))
            time.sleep(0.1)
    finally:
        os.kill(pid, signal.SIGCONT)
    # Then the worker holds hardly more than before, goes on when the broker does, and loses nothing
    assert largest < before + 128 * 1024 * 1024
    publisher.publish(2000)
    finish(site)
    assert not site.exits
    report = verify(site, aborted_are_hidden=True)
    assert not report.problems
    assert report.events + report.bad_records == publisher.published
    assert report.predictions_missing == 0
