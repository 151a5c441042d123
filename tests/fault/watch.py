"""Who serves each partition, watched from outside over HTTP while faults happen.

Two silences are measured, in seconds, for each partition: for how long no worker said that it serves it
(`unowned`), and for how long nobody got further in it than anybody had before (`stalled`, replays included).
Time in which the broker is down, or no worker runs, does not count: nobody could serve then.

Not guaranteed: a silence shorter than about a tenth of a second is seen.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from tests.fault.site import Site
from tests.support.processes import positions

__all__ = ["Silence", "Watch", "longest"]

_INTERVAL_S = 0.1
_ANSWER_S = 0.5


@dataclass(frozen=True)
class Silence:
    """One silence of one partition: when it ended (time.monotonic) and how long it was."""

    partition: int
    ended: float
    seconds: float


class Watch(threading.Thread):
    """Polls every worker of a site until it is stopped.

    `events_flow`: whether records are being published; set by whoever publishes. Nothing stalls without them.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(name="watch", daemon=True)
        self._site = site
        self._stopping = threading.Event()
        partitions = site.settings.topics.partitions
        self._unowned = dict.fromkeys(range(partitions), 0.0)
        self._stalled = dict.fromkeys(range(partitions), 0.0)
        self._furthest = dict.fromkeys(range(partitions), 0)
        self.events_flow = threading.Event()
        self.unowned: list[Silence] = []
        self.stalled: list[Silence] = []

    def run(self) -> None:
        """Watch until `stop`."""
        before = time.monotonic()
        while not self._stopping.wait(_INTERVAL_S):
            found: dict[int, int] = {}
            possible = self._site.broker_answers
            serving = False
            for worker in list(self._site.workers.values()):
                if worker.answers:
                    serving = True
                    for partition, position in positions(worker.port, _ANSWER_S).items():
                        found[partition] = max(position, found.get(partition, 0))
            now = time.monotonic()
            self._sample(found, now - before if possible and serving else 0.0, now)
            before = now

    def _sample(self, found: dict[int, int], passed: float, now: float) -> None:
        for partition in self._unowned:
            self._unowned[partition] += passed
            if partition in found:
                self._end(self.unowned, self._unowned, partition, now)
            self._stalled[partition] += passed
            if found.get(partition, -1) > self._furthest[partition] or not self.events_flow.is_set():
                self._furthest[partition] = max(self._furthest[partition], found.get(partition, 0))
                self._end(self.stalled, self._stalled, partition, now)

    @staticmethod
    def _end(kept: list[Silence], running: dict[int, float], partition: int, now: float) -> None:
        if running[partition] > 2 * _INTERVAL_S:
            kept.append(Silence(partition, now, running[partition]))
        running[partition] = 0.0

    def stop(self) -> None:
        """Stop watching; silences that last still are ended."""
        self._stopping.set()
        if self.is_alive():
            self.join()
        now = time.monotonic()
        for partition in self._unowned:
            self._end(self.unowned, self._unowned, partition, now)


def longest(silences: list[Silence]) -> float:
    """Seconds of the longest one."""
    return max((silence.seconds for silence in silences), default=0.0)
