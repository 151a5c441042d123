"""Plays a schedule of faults on a site while events flow, and has the verifier judge what is left.

Guaranteed: at the end everything published was applied, expired embeddings were deleted, and every worker was
told to stop and ended with 0; otherwise an AssertionError says what did not happen.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from confluent_kafka import Consumer

from stream.broker import EmbeddedBroker
from stream.kafka import client_config, log_range
from tests.fault.schedule import FIRST, Fault
from tests.fault.site import SESSION_TIMEOUT_S, Site
from tests.fault.source import Publisher, Source
from tests.fault.verifier import Report, verify
from tests.fault.watch import Silence, Watch, longest
from tests.support.processes import wait_for

__all__ = ["RESTORE_S", "Outcome", "finish", "play"]

#: What a partition may be without an owner for, beyond the session timeout: a process starts, joins and restores.
RESTORE_S = 15.0


@dataclass(frozen=True)
class Outcome:
    """What a schedule has led to: `longest_…` in seconds, `exits` of workers that ended by themselves, by code."""

    faults: dict[str, int]
    published: int
    longest_unowned_s: float
    longest_stalled_s: float
    exits: dict[int, int]
    seconds: float
    report: Report
    problems: list[str]

    def figures(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "ok": not self.problems,
            "faults": self.faults,
            "events": self.published,
            "longest_unowned_s": round(self.longest_unowned_s, 1),
            "longest_stalled_s": round(self.longest_stalled_s, 1),
            "exits": self.exits,
            "seconds": round(self.seconds, 1),
            **self.report.figures(),
        }


def play(
    site: Site, schedule: Sequence[Fault], *, seed: int, per_second: float, log: Callable[[str], None] = print
) -> Outcome:
    """Run the schedule and verify."""
    began = time.monotonic()
    publisher = Publisher(site.settings, Source(seed), per_second)
    watch = Watch(site)
    for name in FIRST:
        site.worker(name).start()
    site.await_ready()
    publisher.start()
    watch.events_flow.set()
    watch.start()
    times: list[float] = []
    try:
        for number, fault in enumerate(schedule, 1):
            _await_events(site, publisher, publisher.published + fault.after_events)
            times.append(time.monotonic())
            log(
                f"{times[-1] - began:7.1f} s  fault {number}: {fault.kind} {fault.worker}"
                + (f" for {fault.seconds:g} s" if fault.seconds else "")
                + (", then settle" if fault.settles else "")
            )
            _inflict(site, fault)
            site.supervise()
            if fault.settles:
                site.await_ready()
                site.await_applied()
    finally:
        watch.events_flow.clear()
        publisher.stop()
    watch_for_problems = _finish_watch(site, watch, times)
    finish(site)
    report = verify(site, aborted_are_hidden=not isinstance(site.broker, EmbeddedBroker))
    return Outcome(
        dict(sorted(Counter(fault.kind for fault in schedule).items())),
        publisher.published,
        longest(watch.unowned),
        longest(watch.stalled),
        dict(site.exits),
        time.monotonic() - began,
        report,
        watch_for_problems + report.problems,
    )


def _finish_watch(site: Site, watch: Watch, times: list[float]) -> list[str]:
    site.await_ready()
    site.await_applied()
    watch.stop()
    return [
        f"partition {silence.partition} was not served for {silence.seconds:.1f} s; "
        f"{_allowed(silence, times):g} s are allowed for the faults of that time"
        for silence in watch.unowned
        if silence.seconds > _allowed(silence, times)
    ]


def _allowed(silence: Silence, times: list[float]) -> float:
    """Session timeout and restore once for each fault that may have had a part in it."""
    once = SESSION_TIMEOUT_S + RESTORE_S
    began = silence.ended - silence.seconds - once
    return once * max(1, sum(began <= at <= silence.ended for at in times))


def _await_events(site: Site, publisher: Publisher, count: int) -> None:
    def are_published() -> bool:
        site.supervise()
        return publisher.published >= count

    wait_for(are_published, 60, f"{count} events are published")


def _inflict(site: Site, fault: Fault) -> None:
    worker = site.worker(fault.worker) if fault.worker else None
    if fault.kind == "broker":
        site.restart_broker(fault.seconds)
    elif fault.kind == "version":
        site.publish_version()
    else:
        assert worker is not None
        if fault.kind in ("kill", "wipe"):
            worker.kill()
            if fault.kind == "wipe":
                worker.wipe()
            time.sleep(fault.seconds)
            worker.start()
        elif fault.kind in ("freeze", "slow"):
            worker.freeze()
            time.sleep(fault.seconds)
            worker.thaw()
        elif fault.kind == "join":
            worker.start()
        else:
            site.await_staying([worker])
            worker.stop()


def finish(site: Site) -> None:
    """Wait until everything is applied and deleted, then stop every worker in order."""
    site.await_ready()
    site.await_applied()
    _await_deletions(site)
    site.stop_all()


def _await_deletions(site: Site) -> None:
    """Workers end expired rows in slices: wait until embeddings stop changing."""
    topics = site.settings.topics
    consumer = Consumer(client_config(site.settings, group_id="deletions", enable_auto_commit=False))
    try:
        quiet_since = time.monotonic()
        ends: list[int] = []

        def is_quiet() -> bool:
            nonlocal quiet_since, ends
            site.supervise()
            now = [log_range(consumer, topics.embeddings, p)[1] for p in range(topics.partitions)]
            if now != ends:
                ends, quiet_since = now, time.monotonic()
            return time.monotonic() - quiet_since > 1.5

        wait_for(is_quiet, 30, "no more embeddings are written")
    finally:
        consumer.close()
