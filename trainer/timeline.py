"""The one order in which the trainer takes the records of all its input partitions.

Records are ordered by the time Kafka gave them: by cell of `CELL_MS`, in a cell events before feedback, then
by time, partition and offset. A record is handed out when no record that belongs before it can still come:
when every other partition is past it or has been read to its end. So feedback rarely meets a missing event, a
backlog is learned in the order in which it happened, and reading the same backlog again gives the same order,
however it is cut into fetches.

Guaranteed: the records of one partition keep their order; nothing is handed out twice or left out. Not
guaranteed: the order at the live edge, where all partitions have been read to their end: there it is the
order of arrival, in cells. A record's time never falls behind the one before it in its partition, nor ahead
of the clock when it was fetched, so a wrong clock at a publisher cannot hold the others back.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from stream.wire import RecordBlock
from stream.wire.block import Headers

__all__ = ["CELL_MS", "EVENTS", "FEEDBACK", "Record", "Slice", "Timeline", "block_of"]

CELL_MS = 100
#: Kinds of input, in the order in which a cell takes them.
EVENTS, FEEDBACK = 0, 1

_Place = tuple[float, int, float, int]


@dataclass(frozen=True, slots=True)
class Record:
    """One record as fetched; `timestamp_ms` is Kafka's."""

    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers


@dataclass(frozen=True)
class Slice:
    """What comes next: events, and after them feedback, each in order."""

    events: list[Record]
    feedback: list[Record]

    def __bool__(self) -> bool:
        return bool(self.events or self.feedback)


class _Buffer:
    """Fetched records of one partition of one kind, with times that never fall."""

    def __init__(self, kind: int, partition: int) -> None:
        self.kind = kind
        self.partition = partition
        self.times: list[int] = []
        self.records: list[Record] = []
        self.start = 0
        self.newest = -1
        self.seen = False
        self.ended = False

    def __len__(self) -> int:
        return len(self.records) - self.start

    def frontier(self) -> _Place:
        """No record that is still to come belongs before this."""
        if self.ended:
            return (math.inf, self.kind, math.inf, self.partition)
        if not self.seen:
            return (-math.inf, 0, -math.inf, 0)
        return (self.newest // CELL_MS, self.kind, self.newest, self.partition)

    def ready(self, bound: _Place) -> int:
        """Index after the last record that belongs at or before `bound`."""
        cell, kind, time, partition = bound
        if math.isinf(cell):
            return len(self.records) if cell > 0 else self.start
        if self.kind == kind:
            at = bisect_right if self.partition <= partition else bisect_left
            return at(self.times, time, self.start)
        # All of a cell's events come before its feedback; none of its feedback before its events.
        whole = (cell + 1 if self.kind == EVENTS else cell) * CELL_MS
        return bisect_left(self.times, whole, self.start)

    def take(self, end: int) -> tuple[list[Record], list[int]]:
        records, times = self.records[self.start : end], self.times[self.start : end]
        self.start = end
        if self.start == len(self.records):
            self.records, self.times, self.start = [], [], 0
        elif self.start > 4096 and 2 * self.start > len(self.records):
            self.records, self.times = self.records[self.start :], self.times[self.start :]
            self.start = 0
        return records, times


class Timeline:
    """Merges `partitions` partitions of events and as many of feedback."""

    def __init__(self, partitions: int) -> None:
        self._buffers = {(kind, p): _Buffer(kind, p) for kind in (EVENTS, FEEDBACK) for p in range(partitions)}

    def add(self, kind: int, partition: int, records: Sequence[Record], now_ms: int) -> None:
        """Take what a fetch brought, in order."""
        buffer = self._buffers[kind, partition]
        for record in records:
            buffer.newest = max(buffer.newest, min(record.timestamp_ms, now_ms))
            buffer.times.append(buffer.newest)
        buffer.records += records
        buffer.seen = True
        buffer.ended = False

    def end(self, kind: int, partition: int) -> None:
        """The partition has been read to its end, for now."""
        self._buffers[kind, partition].ended = True

    def buffered(self, kind: int, partition: int) -> int:
        """Records of a partition that were not handed out yet."""
        return len(self._buffers[kind, partition])

    def is_drained(self, kind: int, partition: int) -> bool:
        """True when the partition has been read to its end, and all of it was handed out."""
        buffer = self._buffers[kind, partition]
        return buffer.ended and not len(buffer)

    @property
    def oldest_ms(self) -> int | None:
        """Kafka's time of the oldest record that was not handed out yet; None: there is none."""
        return min((buffer.times[buffer.start] for buffer in self._buffers.values() if len(buffer)), default=None)

    @property
    def is_empty(self) -> bool:
        """True when everything that was added has been handed out."""
        return not any(len(buffer) for buffer in self._buffers.values())

    def stop_waiting(self) -> list[tuple[int, int]]:
        """Go on without the partitions that hold the others up until they bring something; returns them."""
        bound = min(buffer.frontier() for buffer in self._buffers.values())
        held_up = [
            place
            for place, buffer in self._buffers.items()
            if not buffer.ended and not len(buffer) and buffer.frontier() <= bound
        ]
        for place in held_up:
            self._buffers[place].ended = True
        return held_up

    def take(self, blocked: Collection[int] = ()) -> Slice:
        """What comes next: events up to and including the first cell that has feedback, and that feedback.

        Parameters
        ----------
        blocked: partitions whose feedback is left where it is; the rest goes on without it.
        """
        used = [buffer for buffer in self._buffers.values() if buffer.kind == EVENTS or buffer.partition not in blocked]
        bound = min(buffer.frontier() for buffer in used)
        ready = {id(buffer): buffer.ready(bound) for buffer in used}
        first = min(
            (
                buffer.times[buffer.start] // CELL_MS
                for buffer in used
                if buffer.kind == FEEDBACK and ready[id(buffer)] > buffer.start
            ),
            default=None,
        )
        taken: tuple[list[Record], list[Record]] = ([], [])
        times: tuple[list[int], list[int]] = ([], [])
        for buffer in used:
            end = ready[id(buffer)]
            if first is not None:
                end = min(end, bisect_left(buffer.times, (first + 1) * CELL_MS, buffer.start))
            if end > buffer.start:
                records, at = buffer.take(end)
                taken[buffer.kind].extend(records)
                times[buffer.kind].extend(at)
        return Slice(_ordered(taken[EVENTS], times[EVENTS]), _ordered(taken[FEEDBACK], times[FEEDBACK]))


def _ordered(records: list[Record], times: list[int]) -> list[Record]:
    """By time, then partition; those of one partition came in order and stay so, as the sort is stable."""
    if len(records) < 2:
        return records
    partitions = np.fromiter((record.partition for record in records), np.int64, len(records))
    order = np.lexsort((partitions, np.array(times, np.int64)))
    return [records[i] for i in order.tolist()]


def block_of(records: Sequence[Record]) -> RecordBlock:
    """The records as arrays, in their order, whatever their partitions."""
    headers = [record.headers for record in records]
    return RecordBlock.from_lists(
        [record.key for record in records],
        [record.value for record in records],
        [record.offset for record in records],
        [record.timestamp_ms for record in records],
        headers if any(headers) else None,
    )
