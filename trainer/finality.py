"""When a label is learned: at once, when its window closes, or once most positives of its age have come.

Answers that come early are a biased sample of all. So of a task whose labels are learned `closed` or `final`, a label
that is joined while its window is open is held. It is released when the partition's watermark is past the window's end.
Where a task learns labels when they are `final`, that may be sooner: when the prediction is older than the age by which
most positives have come (`trainer.delays`). At that age its label is learned if it is known, and otherwise the
prediction is learned as negative; so positives and negatives of one age become final together. A positive that comes
after that is learned as well, at once.

Both happen in the order of these times, windows first, each at the event whose time passes it, however events are cut
into batches; at one time in the order of task, prediction and client, never of labels or of when they became known: a
head that is taught all positives of a campaign before its negatives learns another thing. Guaranteed: the same order
for the same records in the same order, over restarts too. Not guaranteed: progress in a partition whose events stop;
its time stands still.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import msgpack

from stream.wire import Label
from trainer.ages import Ages
from trainer.checkpoint import Changes, Overlay
from trainer.delays import Delays
from trainer.examples import (
    ASSUMED,
    EXAMPLE,
    WAITING,
    Answer,
    Example,
    Joined,
    as_of_ms,
    pack_answered,
    pack_joined,
    partition_of,
    prefix_of,
    stratum_of,
    task_of,
    unpack_answered,
    unpack_example,
    unpack_joined,
)

__all__ = ["Finality"]

_HELD, _DELAYS = b"h", b"d/"
#: What is kept until a window closes: a label, or when a positive was known that was learned before.
_HELD_LABEL, _LEARNED = b"u", b"l"


@dataclass(frozen=True)
class _Due:
    """What is final when the watermark is past `at_ms`: a prediction that comes of age, or the first window."""

    at_ms: int
    key: bytes = b""
    ages: Ages | None = None


class Finality:
    """Labels that are held, and predictions that come of age without one.

    Parameters
    ----------
    kept: predictions by key, which this marks as answered or learned; held labels are kept beside them.
    closed: tasks whose labels wait until their window has closed.
    delays: of the tasks whose labels wait until they are final, which may be sooner.
    """

    def __init__(self, kept: Overlay, closed: Collection[str], delays: Mapping[str, Delays]) -> None:
        self._kept = kept
        self._delays = dict(delays)
        self._waits = frozenset(closed) | frozenset(self._delays)
        #: Of each partition, (end of the window, key) of held labels, and of positives that were learned before, least
        #: first.
        self._windows: dict[int, list[tuple[int, bytes]]] = {}
        self._ages: dict[tuple[int, str, int], Ages] = {}
        #: What `_next` found last, until something changes.
        self._found: dict[int, _Due | None] = {}
        self._delays_changed: set[str] = set()
        #: True from when the delays say something else until nothing is overdue because of it.
        self.is_unsettled = False
        #: Labels that wait until they are final.
        self.held = 0
        for full, value in kept.database.scan(_HELD):
            key = full[1:]
            if value[:1] == _LEARNED:
                end_ms = msgpack.unpackb(value[1:])[0]
            else:
                joined = unpack_joined(key, value[1:])
                end_ms = joined.final_ms
                self.held += 1
            self._hold(end_ms, key)
        for task, one in self._delays.items():
            saved = kept.database.get(_DELAYS + task.encode())
            if saved is not None:
                one.load(saved, task)

    def windows(self, partition: int) -> int:
        """How many windows of the partition are waited for; at least as many as labels are held there."""
        return len(self._windows.get(partition, ()))

    def captured(self, key: bytes, example: Example) -> None:
        """A prediction was made."""
        if example.task in self._delays:
            self._ages_of(partition_of(key), example.task, example.stratum).add(key)
            self._found.pop(partition_of(key), None)

    def answered(self, key: bytes, example: Example, answer: Answer, watermark: int) -> Joined | None:
        """A waiting prediction is answered; returns it with its label, or None and that is held until it is final."""
        task, end_ms = example.task, answer.window_end_ms
        joined = answer.to(example)
        self._mark(key, answer.label)
        if end_ms is None or task not in self._waits:
            return joined
        closed_ms = max(answer.known_ms, end_ms)
        if end_ms < watermark:
            return self._learned(key, replace(joined, final_ms=closed_ms), end_ms, watermark)
        delays = self._delays.get(task)
        age_ms = delays.age_ms(example.stratum) if delays is not None else None
        if age_ms is not None and example.as_of_ms + age_ms < watermark:
            final_ms = max(answer.known_ms, example.as_of_ms + age_ms)
            return self._learned(key, replace(joined, final_ms=final_ms, early=True), end_ms, watermark)
        if delays is not None:
            self._mark(key, answer.label, example.stratum)
        self._kept.put(_HELD + key, _HELD_LABEL + pack_joined(replace(joined, final_ms=closed_ms)))
        self._hold(closed_ms, key)
        self.held += 1
        return None

    def corrected(self, key: bytes, example: Example, answer: Answer, watermark: int) -> Joined | None:
        """A prediction that was learned as negative is answered; returns it with its label if that is positive."""
        self._mark(key, answer.label)
        if not answer.label:
            return None
        return self._learned(key, answer.to(example), answer.window_end_ms, watermark)

    def next_release_ms(self, partition: int) -> int | None:
        """The watermark that the partition must pass for its next label to be final; None: there is none."""
        due = self._next(partition)
        return due.at_ms if due is not None else None

    def release(self, partition: int, watermark_ms: int, released_ms: int) -> list[Joined]:
        """Labels that are final at `watermark_ms`, in order; they are no longer held.

        What a closed window tells about delays may make others final, here and in other partitions.

        Parameters
        ----------
        released_ms: Kafka's time of the record that brought the watermark there.
        """
        released = []
        while (due := self._next(partition)) is not None and due.at_ms < watermark_ms:
            self._found.pop(partition, None)
            joined = self._close(partition) if due.ages is None else self._come_of_age(due)
            if joined is not None:
                released.append(replace(joined, published_ms=max(joined.published_ms, released_ms)))
        return released

    def settle(self, watermarks: Mapping[int, int], released_ms: int) -> list[Joined]:
        """Labels that are final because of what was learned about delays, in order; see `release`.

        Parameters
        ----------
        watermarks: of each partition that has one.
        """
        released: list[Joined] = []
        while self.is_unsettled:
            self.is_unsettled = False
            for partition in sorted(watermarks):
                released += self.release(partition, watermarks[partition], released_ms)
        return released

    def save(self, changes: Changes) -> None:
        """Add the delays to a checkpoint, where they changed."""
        for task in self._delays_changed:
            changes[_DELAYS + task.encode()] = self._delays[task].save()

    def saved(self) -> None:
        """The checkpoint is written."""
        self._delays_changed.clear()

    def _learned(self, key: bytes, joined: Joined, end_ms: int | None, watermark: int) -> Joined:
        """The label is final; a positive's delay is counted when its window has closed."""
        example = joined.example
        if end_ms is None or not joined.label or example.task not in self._delays:
            return joined
        if end_ms < watermark:
            self._count_delay(example.task, example.stratum, joined.known_ms - example.as_of_ms)
        else:
            self._kept.put(_HELD + key, _LEARNED + msgpack.packb([end_ms, joined.known_ms, example.stratum]))
            self._hold(end_ms, key)
        return joined

    def _next(self, partition: int) -> _Due | None:
        """What of the partition is final next."""
        if partition in self._found:
            return self._found[partition]
        held = self._windows.get(partition)
        found = _Due(held[0][0]) if held else None
        for task, delays in self._delays.items():
            for stratum in range(delays.strata):
                age_ms = delays.age_ms(stratum)
                if age_ms is None:
                    continue
                ages = self._ages_of(partition, task, stratum)
                key = ages.first()
                if key is not None and (found is None or as_of_ms(key) + age_ms < found.at_ms):
                    found = _Due(as_of_ms(key) + age_ms, key, ages)
        self._found[partition] = found
        return found

    def _close(self, partition: int) -> Joined | None:
        """The first window of the partition has closed; its label, if that was held until now."""
        _, key = heapq.heappop(self._windows[partition])
        value = self._kept.get(_HELD + key)
        if value is None:
            return None
        self._kept.put(_HELD + key, None)
        task = task_of(key)
        if value[:1] == _LEARNED:
            _, known_ms, stratum = msgpack.unpackb(value[1:])
            self._count_delay(task, stratum, known_ms - as_of_ms(key))
            return None
        joined = unpack_joined(key, value[1:])
        self.held -= 1
        if task in self._delays:
            if self._kept.get(EXAMPLE + key) is not None:
                self._mark(key, joined.label)
            if joined.label:
                self._count_delay(task, joined.example.stratum, joined.known_ms - as_of_ms(key))
        return joined

    def _come_of_age(self, due: _Due) -> Joined | None:
        """A prediction has come of age: its label if it is held, or a negative if there is none."""
        assert due.ages is not None
        due.ages.pop()
        key = due.key
        value = self._kept.get(EXAMPLE + key)
        if value is None:
            return None
        if value[:1] == WAITING:
            self._kept.put(EXAMPLE + key, ASSUMED + value[1:])
            return Joined(unpack_example(key, value[1:]), False, 1.0, due.at_ms, 0, due.at_ms, early=True)
        held = self._kept.get(_HELD + key)
        if value[:1] == ASSUMED or held is None or held[:1] == _LEARNED:
            return None
        joined = unpack_joined(key, held[1:])
        self.held -= 1
        self._mark(key, joined.label)
        end_ms, final_ms = joined.final_ms, max(joined.known_ms, due.at_ms)
        # Its place among the windows is taken already, and is left empty for a negative.
        learned = _LEARNED + msgpack.packb([end_ms, joined.known_ms, joined.example.stratum]) if joined.label else None
        self._kept.put(_HELD + key, learned)
        return replace(joined, final_ms=final_ms, early=True)

    def _ages_of(self, partition: int, task: str, stratum: int) -> Ages:
        place = partition, task, min(stratum, self._delays[task].strata - 1)
        found = self._ages.get(place)
        if found is None:
            found = self._ages[place] = Ages(
                lambda start, limit: self._scan(place, start, limit), prefix_of(*place[:2])
            )
        return found

    def _scan(self, place: tuple[int, str, int], start: bytes, limit: int) -> tuple[list[bytes], bytes | None]:
        """Keys of predictions that may come of age; see `trainer.ages`."""
        partition, task, stratum = place
        found: list[bytes] = []
        for key, value in self._kept.scan(EXAMPLE + prefix_of(partition, task), EXAMPLE + start):
            own = _aging_stratum(value)
            if own is not None and min(own, self._delays[task].strata - 1) == stratum:
                if len(found) == limit:
                    return found, key[1:]
                found.append(key[1:])
        return found, None

    def _count_delay(self, task: str, stratum: int, delay_ms: int) -> None:
        self._delays[task].add(stratum, delay_ms)
        self._delays_changed.add(task)
        self._found.clear()
        self.is_unsettled = True

    def _hold(self, end_ms: int, key: bytes) -> None:
        partition = partition_of(key)
        heapq.heappush(self._windows.setdefault(partition, []), (end_ms, key))
        self._found.pop(partition, None)

    def _mark(self, key: bytes, label: Label, stratum: int | None = None) -> None:
        self._kept.put(EXAMPLE + key, pack_answered(label, stratum))


def _aging_stratum(value: bytes) -> int | None:
    """The stratum of a prediction that may come of age; None: it may not."""
    if value[:1] == ASSUMED:
        return None
    return stratum_of(value[1:]) if value[:1] == WAITING else unpack_answered(value)[1]
