"""Where, in a batch of events, labels become final.

Guaranteed: that is found at the event itself whose time passes what the joiner waits for, wherever batches are cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stream.wire import EventColumns
from trainer.joiner import Joiner
from trainer.timeline import Record

__all__ = ["Crossing", "Crossings"]


@dataclass(frozen=True)
class Crossing:
    """An event that brings its partition's watermark past what the joiner waits for.

    `event`: its index in the batch; `watermark_ms`: of its partition right after it; `released_ms`: Kafka's time of it.
    """

    event: int
    partition: int
    watermark_ms: int
    released_ms: int


class Crossings:
    """Finds, in a batch, where watermarks pass what the joiner waits for.

    Parameters
    ----------
    records: the batch, of any partitions; columns: the same, decoded.
    watermark_before: (n,) each event's partition's watermark just before it, UTC milliseconds.
    """

    def __init__(
        self,
        joiner: Joiner,
        records: Sequence[Record],
        columns: EventColumns,
        watermark_before: NDArray[np.int64],
    ) -> None:
        self._joiner = joiner
        self._records = records
        self._passed = 0
        accepted = np.flatnonzero(columns.accepted)
        partitions = np.array([records[i].partition for i in accepted.tolist()], np.int64)
        self._events = {p: accepted[partitions == p] for p in np.unique(partitions).tolist()}
        self._watermarks = {
            p: np.maximum(watermark_before[own], columns.timestamp_ms[own]) for p, own in self._events.items()
        }

    def pass_by(self, event: int) -> None:
        """Nothing is found before this event from now on: what falls due later is due there."""
        self._passed = event

    @property
    def passed_ms(self) -> int:
        """Kafka's time of the event passed last."""
        return self._records[self._passed].timestamp_ms

    def watermarks(self) -> dict[int, int]:
        """Each partition's watermark right after the event passed last."""
        found = dict(self._joiner.watermarks)
        for partition, events in self._events.items():
            at = int(np.searchsorted(events, self._passed, "right"))
            if at:
                found[partition] = int(self._watermarks[partition][at - 1])
        return found

    def first(self) -> Crossing | None:
        """The first event of the batch that makes final something of what is waited for now."""
        found: Crossing | None = None
        for partition, events in self._events.items():
            end_ms = self._joiner.finality.next_release_ms(partition)
            if end_ms is None:
                continue
            watermarks = self._watermarks[partition]
            at = int(np.searchsorted(watermarks, end_ms, "right"))
            if at == len(events):
                continue
            event = max(int(events[at]), self._passed)
            if found is None or event < found.event:
                at = int(np.searchsorted(events, event, "right")) - 1
                found = Crossing(event, partition, int(watermarks[at]), self._records[event].timestamp_ms)
        return found
