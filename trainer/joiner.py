"""Joins delayed feedback with what was known when the prediction was made.

An example is captured at the event that asks for the prediction, from the row as it was right after that
event, and waits under (task, client, time of the prediction). Feedback is matched to it by these three;
nothing is read from the row again, so nothing that came later can be in an example. An event that comes after
a newer one of its client is no example: its row knows things from after its time.

Every feedback record has exactly one outcome, counted when it is decided:

- `joined`: its prediction was waiting.
- `early`: it came before its event and was joined when that came.
- `unmatched`: there is no such prediction: the partition's watermark is past its time by more than the grace.
- `late`: it came more than `feedback_ttl_s` after its prediction, by its own time or by the watermark.
- `duplicate`: the prediction has been answered, or feedback for it waits, with the same label.
- `contradicting`: the same with another label; the first one stays.

Guaranteed: an example is learned from once. Bounded: examples and answered predictions are forgotten, in
slices, when `feedback_ttl_s` has passed; feedback that waits for its event is at most `pending_limit` a
partition, as long as the caller stops at `is_full`. Changes are held in memory until the next checkpoint
(`save`, `saved`).

Not guaranteed: that two predictions for one client, task and millisecond can be told apart: the later
replaces the earlier while it is unanswered.

Of a task whose labels are learned `closed`, a label that is joined while its window is open is held: answers
that come early are a biased sample of all. It is released when the partition's watermark is past the window's
end, in the order of these ends, then of when labels became known. Held labels are part of the checkpoint and
bounded by `held_limit` a partition, as long as the caller stops at `is_full`. A partition whose events stop
releases nothing: its time stands still.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import msgpack
import numpy as np
from numpy.typing import NDArray

from stream.wire import FeedbackRecord
from trainer.checkpoint import Changes, Database

__all__ = ["OUTCOMES", "Example", "Joined", "Joiner"]

OUTCOMES = ("joined", "early", "unmatched", "late", "duplicate", "contradicting")

_EXAMPLE, _PENDING, _HELD = b"e", b"f", b"h"
_WAITING, _ANSWERED = b"w", b"a"
_HEAD = struct.Struct("<fq")
#: How far the watermark must be past a prediction's time before its event is taken for missing, in event
#: time.
GRACE_MS = 3_600_000
PENDING_LIMIT = 100_000
HELD_LIMIT = 500_000
#: Changes held in memory before a checkpoint is asked for.
_CHANGES_LIMIT = 50_000
_SWEEP_EXAMPLES = 2_000


@dataclass(frozen=True)
class Example:
    """One prediction as it was made.

    `inputs` (F,) of the head; `prediction` its probability, NaN where there was no head yet; `version` of the
    parameters that made it.
    """

    task: str
    client_id: bytes
    as_of_ms: int
    inputs: NDArray[np.float32]
    prediction: float
    version: int


@dataclass(frozen=True)
class Joined:
    """An example and its label.

    `known_ms`: when the label became known; `final_ms`: when its window had closed too, where the task waits
    for that; `published_ms`: Kafka's time of the feedback record, or of the event that released it.
    """

    example: Example
    label: bool
    weight: float
    known_ms: int
    published_ms: int
    final_ms: int


@dataclass(frozen=True)
class _Pending:
    label: bool
    weight: float
    known_ms: int
    published_ms: int
    window_end_ms: int | None


class Joiner:
    """Examples waiting for feedback, and feedback waiting for its event.

    Parameters
    ----------
    database: what earlier checkpoints hold.
    ttl_ms: of each task.
    count: called with (task, outcome) for each decided feedback record.
    closed: tasks whose labels wait until their window has closed.
    grace_ms, pending_limit, held_limit: see the module.
    """

    def __init__(
        self,
        database: Database,
        ttl_ms: Mapping[str, int],
        count: Callable[[str, str], None],
        closed: Collection[str] = (),
        grace_ms: int = GRACE_MS,
        pending_limit: int = PENDING_LIMIT,
        held_limit: int = HELD_LIMIT,
    ) -> None:
        self._database = database
        self._ttl_ms = dict(ttl_ms)
        self._count = count
        self._grace_ms = grace_ms
        self._pending_limit = pending_limit
        self._held_limit = held_limit
        self._closed = frozenset(closed)
        #: Examples and held labels since the last checkpoint, by key.
        self._changed: Changes = {}
        #: Of each partition, (end of the window, when known, key) of its held labels, least first.
        self._held: dict[int, list[tuple[int, int, bytes]]] = {}
        self._pending: dict[bytes, _Pending] = {}
        self._pending_changed: set[bytes] = set()
        self._pending_by_time: dict[int, list[tuple[int, bytes]]] = {}
        self._pending_count: dict[int, int] = {}
        self.watermarks: dict[int, int] = {}
        self.waiting = 0
        for key, value in database.scan(_PENDING):
            self._wait(key[1:], _Pending(*msgpack.unpackb(value)))
        for key, value in database.scan(_HELD):
            joined = _unpack(key[1:], value)
            heapq.heappush(self._held.setdefault(_partition(key[1:]), []), (joined.final_ms, joined.known_ms, key[1:]))

    @property
    def held(self) -> int:
        """Labels that wait for the end of their window."""
        return sum(map(len, self._held.values()))

    @property
    def pending(self) -> int:
        """Feedback records that wait for their event."""
        return len(self._pending)

    @property
    def needs_checkpoint(self) -> bool:
        """True when the changes held in memory are many."""
        return len(self._changed) >= _CHANGES_LIMIT

    def is_full(self, partition: int) -> bool:
        """True when no more feedback of the partition should be given."""
        return (
            self._pending_count.get(partition, 0) >= self._pending_limit
            or len(self._held.get(partition, ())) >= self._held_limit
        )

    def capture(self, partition: int, example: Example) -> Joined | None:
        """Keep an example until its feedback comes; returns it joined when that is here already and final."""
        key = _key(partition, example.task, example.as_of_ms, example.client_id)
        before = self._get(key)
        if before is not None and before[:1] == _ANSWERED:
            return None
        pending = self._release(key)
        if pending is not None:
            self._count(example.task, "early")
            self._answer(key, before, pending.label)
            return self._settle(partition, key, example, pending)
        if before is None:
            self.waiting += 1
        self._changed[_EXAMPLE + key] = (
            _WAITING + _HEAD.pack(example.prediction, example.version) + example.inputs.tobytes()
        )
        return None

    def feedback(self, partition: int, record: FeedbackRecord, published_ms: int) -> Joined | None:
        """Match one valid feedback record; returns the example it answers, if that is here and the label final.

        Parameters
        ----------
        published_ms: Kafka's timestamp of the record.
        """
        task, client = record.task, record.client_id.encode()
        key = _key(partition, task, record.as_of_ms, client)
        found = self._get(key)
        held = self._pending.get(key)
        watermark = self.watermarks.get(partition, 0)
        answer = _Pending(record.label, record.weight, record.timestamp_ms, published_ms, record.window_end_ms)
        given = None
        if found is not None and found[:1] == _ANSWERED:
            given = found[1:2] == b"\1"
        elif held is not None:
            given = held.label
        if given is not None:
            self._count(task, "duplicate" if given == record.label else "contradicting")
        elif max(record.timestamp_ms, watermark) - record.as_of_ms > self._ttl_ms[task]:
            self._count(task, "late")
        elif found is not None:
            self._count(task, "joined")
            self._answer(key, found, record.label)
            prediction, version = _HEAD.unpack_from(found, 1)
            inputs = np.frombuffer(found, np.float32, offset=1 + _HEAD.size)
            example = Example(task, client, record.as_of_ms, inputs, prediction, version)
            return self._settle(partition, key, example, answer)
        elif watermark - record.as_of_ms > self._grace_ms:
            self._count(task, "unmatched")
        else:
            self._wait(key, answer)
            self._pending_changed.add(key)
        return None

    def advance(self, partition: int, watermark_ms: int) -> None:
        """Raise the partition's watermark; feedback whose event should have come by then is unmatched."""
        watermark = max(watermark_ms, self.watermarks.get(partition, 0))
        self.watermarks[partition] = watermark
        queue = self._pending_by_time.get(partition, [])
        while queue and watermark - queue[0][0] > self._grace_ms:
            _, key = heapq.heappop(queue)
            if self._release(key) is not None:
                self._count(_task(key), "unmatched")

    def next_release_ms(self, partition: int) -> int | None:
        """The watermark that the partition must pass to release its next held label; None: there is none."""
        held = self._held.get(partition)
        return held[0][0] if held else None

    def release(self, partition: int, watermark_ms: int, released_ms: int) -> list[Joined]:
        """Held labels whose window ended before `watermark_ms`, in order; they are no longer held.

        Parameters
        ----------
        released_ms: Kafka's time of the event that brought the watermark there.
        """
        held = self._held.get(partition, [])
        released = []
        while held and held[0][0] < watermark_ms:
            _, _, key = heapq.heappop(held)
            value = self._stored(_HELD + key)
            assert value is not None
            self._changed[_HELD + key] = None
            joined = _unpack(key, value)
            released.append(replace(joined, published_ms=max(joined.published_ms, released_ms)))
        return released

    def sweep(self) -> None:
        """Forget the next slice of examples and answers that are past their time to live."""
        for partition, watermark in self.watermarks.items():
            for task, ttl_ms in self._ttl_ms.items():
                prefix = _EXAMPLE + _prefix(partition, task)
                limit = watermark - ttl_ms
                for looked, (key, value) in enumerate(self._database.scan(prefix)):
                    (as_of_ms,) = struct.unpack_from(">q", key, len(prefix))
                    if as_of_ms >= limit or looked >= _SWEEP_EXAMPLES:
                        break
                    now = self._changed.get(key, value)
                    if now is not None:
                        self.waiting -= now[:1] == _WAITING
                        self._changed[key] = None

    def save(self, changes: Changes) -> None:
        """Add everything that changed since the last checkpoint."""
        changes.update(self._changed)
        for key in self._pending_changed:
            held = self._pending.get(key)
            changes[_PENDING + key] = (
                None
                if held is None
                else msgpack.packb([held.label, held.weight, held.known_ms, held.published_ms, held.window_end_ms])
            )

    def saved(self) -> None:
        """The checkpoint is written."""
        self._changed = {}
        self._pending_changed = set()

    def _get(self, key: bytes) -> bytes | None:
        return self._stored(_EXAMPLE + key)

    def _stored(self, full: bytes) -> bytes | None:
        if full in self._changed:
            return self._changed[full]
        return self._database.get(full)

    def _settle(self, partition: int, key: bytes, example: Example, answer: _Pending) -> Joined | None:
        """The joined example, or None and it is held, as its window is open."""
        end_ms = answer.window_end_ms if example.task in self._closed else None
        final_ms = answer.known_ms if end_ms is None else max(answer.known_ms, end_ms)
        joined = Joined(example, answer.label, answer.weight, answer.known_ms, answer.published_ms, final_ms)
        if end_ms is None or end_ms < self.watermarks.get(partition, 0):
            return joined
        self._changed[_HELD + key] = _pack(joined)
        heapq.heappush(self._held.setdefault(partition, []), (final_ms, joined.known_ms, key))
        return None

    def _answer(self, key: bytes, before: bytes | None, label: bool) -> None:
        if before is not None:
            self.waiting -= 1
        self._changed[_EXAMPLE + key] = _ANSWERED + (b"\1" if label else b"\0")

    def _wait(self, key: bytes, held: _Pending) -> None:
        partition, as_of_ms = _partition(key), _as_of_ms(key)
        self._pending[key] = held
        self._pending_count[partition] = self._pending_count.get(partition, 0) + 1
        heapq.heappush(self._pending_by_time.setdefault(partition, []), (as_of_ms, key))

    def _release(self, key: bytes) -> _Pending | None:
        held = self._pending.pop(key, None)
        if held is not None:
            self._pending_count[_partition(key)] -= 1
            self._pending_changed.add(key)
        return held


# A key is partition (4 bytes), task, 0, time (8 bytes), client: in order of time within a partition and task.


def _prefix(partition: int, task: str) -> bytes:
    return struct.pack(">I", partition) + task.encode() + b"\0"


def _key(partition: int, task: str, as_of_ms: int, client: bytes) -> bytes:
    return _prefix(partition, task) + struct.pack(">q", as_of_ms) + client


def _partition(key: bytes) -> int:
    partition: int = struct.unpack_from(">I", key)[0]
    return partition


def _task(key: bytes) -> str:
    return key[4 : key.index(b"\0", 4)].decode()


def _client(key: bytes) -> bytes:
    return key[key.index(b"\0", 4) + 9 :]


def _as_of_ms(key: bytes) -> int:
    as_of_ms: int = struct.unpack_from(">q", key, key.index(b"\0", 4) + 1)[0]
    return as_of_ms


def _pack(joined: Joined) -> bytes:
    example = joined.example
    packed: bytes = msgpack.packb(
        [
            joined.label, joined.weight, joined.known_ms, joined.published_ms, joined.final_ms,
            example.prediction, example.version, example.inputs.tobytes(),
        ]
    )  # fmt: skip
    return packed


def _unpack(key: bytes, value: bytes) -> Joined:
    label, weight, known_ms, published_ms, final_ms, prediction, version, inputs = msgpack.unpackb(value)
    example = Example(_task(key), _client(key), _as_of_ms(key), np.frombuffer(inputs, np.float32), prediction, version)
    return Joined(example, label, weight, known_ms, published_ms, final_ms)
