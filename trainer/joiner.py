"""Joins delayed feedback with what was known when the prediction was made.

An example is captured at the event that asks for the prediction, from the row as it was right after that
event, and waits under (task, client, time of the prediction). Feedback is matched to it by these three;
nothing is read from the row again, so nothing that came later can be in an example. An event that comes after
a newer one of its client is no example: its row knows things from after its time.

Every feedback record has exactly one outcome, counted when it is decided:

- `joined`: its prediction was waiting.
- `early`: it came before its event and was joined when that came.
- `corrected`: a positive, after its prediction had been learned as negative; it is learned as well.
- `unmatched`: there is no such prediction: the partition's watermark is past its time by more than the grace.
- `late`: it came more than `feedback_ttl_s` after its prediction, by its own time or by the watermark.
- `duplicate`: the prediction has been answered, or feedback for it waits, with the same label.
- `contradicting`: the same with another label; the first one stays.

Guaranteed: an example is learned from once, or as negative and then, corrected, as positive. Bounded: examples and
answered predictions are forgotten, in slices, when `feedback_ttl_s` has passed; feedback that waits for its event is at
most `pending_limit` a partition, as long as the caller stops at `is_full`. Changes are held in memory until the next
checkpoint (`save`, `saved`).

Not guaranteed: that two predictions for one client, task and millisecond can be told apart: the later
replaces the earlier while it is unanswered.

When the label of a joined example is learned is `trainer.finality`'s to say: some are held until then. Held labels are
part of the checkpoint and bounded by `held_limit` a partition, as long as the caller stops at `is_full`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Mapping

import msgpack

from stream.wire import FeedbackRecord
from trainer.checkpoint import Changes, Database, Overlay
from trainer.delays import Delays
from trainer.examples import (
    ANSWERED,
    EXAMPLE,
    WAITING,
    Answer,
    Example,
    Joined,
    as_of_ms,
    key_of,
    pack_example,
    partition_of,
    prefix_of,
    task_of,
    unpack_answered,
    unpack_example,
)
from trainer.finality import Finality

__all__ = ["OUTCOMES", "Example", "Joined", "Joiner"]

OUTCOMES = ("joined", "early", "corrected", "unmatched", "late", "duplicate", "contradicting")

_PENDING = b"f"
#: How far the watermark must be past a prediction's time before its event is taken for missing, in event
#: time.
GRACE_MS = 3_600_000
PENDING_LIMIT = 100_000
HELD_LIMIT = 500_000
#: Changes held in memory before a checkpoint is asked for.
_CHANGES_LIMIT = 50_000
_SWEEP_EXAMPLES = 2_000


class Joiner:
    """Examples waiting for feedback, and feedback waiting for its event.

    Parameters
    ----------
    database: what earlier checkpoints hold.
    ttl_ms: of each task.
    count: called with (task, outcome) for each decided feedback record.
    closed: tasks whose labels wait until their window has closed.
    delays: of the tasks whose labels wait until they are final, which may be sooner.
    grace_ms, pending_limit, held_limit: see the module.
    """

    def __init__(
        self,
        database: Database,
        ttl_ms: Mapping[str, int],
        count: Callable[[str, str], None],
        closed: Collection[str] = (),
        delays: Mapping[str, Delays] | None = None,
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
        #: Examples and held labels, by key.
        self._kept = Overlay(database)
        self.finality = Finality(self._kept, closed, delays or {})
        self._pending: dict[bytes, Answer] = {}
        self._pending_changed: set[bytes] = set()
        self._pending_by_time: dict[int, list[tuple[int, bytes]]] = {}
        self._pending_count: dict[int, int] = {}
        self.watermarks: dict[int, int] = {}
        self.waiting = 0
        for key, value in database.scan(_PENDING):
            self._wait(key[1:], Answer(*msgpack.unpackb(value)))

    @property
    def pending(self) -> int:
        """Feedback records that wait for their event."""
        return len(self._pending)

    @property
    def needs_checkpoint(self) -> bool:
        """True when the changes held in memory are many."""
        return len(self._kept) >= _CHANGES_LIMIT

    def is_full(self, partition: int) -> bool:
        """True when no more feedback of the partition should be given."""
        return (
            self._pending_count.get(partition, 0) >= self._pending_limit
            or self.finality.windows(partition) >= self._held_limit
        )

    def capture(self, partition: int, example: Example) -> Joined | None:
        """Keep an example until its feedback comes; returns it joined when that is here already and final."""
        key = key_of(partition, example.task, example.as_of_ms, example.client_id)
        before = self._kept.get(EXAMPLE + key)
        if before is not None and before[:1] != WAITING:
            return None
        self.finality.captured(key, example)
        pending = self._release(key)
        if pending is not None:
            self._count(example.task, "early")
            self.waiting -= before is not None
            return self.finality.answered(key, example, pending, self.watermarks.get(partition, 0))
        self.waiting += before is None
        self._kept.put(EXAMPLE + key, WAITING + pack_example(example))
        return None

    def feedback(self, partition: int, record: FeedbackRecord, published_ms: int) -> Joined | None:
        """Match one valid feedback record; returns the example it answers, if that is here and the label final.

        Parameters
        ----------
        published_ms: Kafka's timestamp of the record.
        """
        task, client = record.task, record.client_id.encode()
        key = key_of(partition, task, record.as_of_ms, client)
        found = self._kept.get(EXAMPLE + key)
        held = self._pending.get(key)
        watermark = self.watermarks.get(partition, 0)
        answer = Answer(record.label, record.weight, record.timestamp_ms, published_ms, record.window_end_ms)
        given = None
        if found is not None and found[:1] == ANSWERED:
            given = unpack_answered(found)[0]
        elif held is not None:
            given = held.label
        if given is not None:
            self._count(task, "duplicate" if given == record.label else "contradicting")
        elif max(record.timestamp_ms, watermark) - record.as_of_ms > self._ttl_ms[task]:
            self._count(task, "late")
        elif found is not None:
            self.waiting -= 1
            example = unpack_example(key, found[1:])
            if found[:1] == WAITING:
                self._count(task, "joined")
                return self.finality.answered(key, example, answer, watermark)
            self._count(task, "corrected" if record.label else "joined")
            return self.finality.corrected(key, example, answer, watermark)
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
                self._count(task_of(key), "unmatched")

    def sweep(self) -> None:
        """Forget the next slice of examples and answers that are past their time to live."""
        for partition, watermark in self.watermarks.items():
            for task, ttl_ms in self._ttl_ms.items():
                prefix = EXAMPLE + prefix_of(partition, task)
                limit = watermark - ttl_ms
                for looked, (key, value) in enumerate(self._database.scan(prefix)):
                    if as_of_ms(key[1:]) >= limit or looked >= _SWEEP_EXAMPLES:
                        break
                    now = self._kept.changed(key, value)
                    if now is not None:
                        self.waiting -= now[:1] != ANSWERED
                        self._kept.put(key, None)

    def save(self, changes: Changes) -> None:
        """Add everything that changed since the last checkpoint."""
        self._kept.save(changes)
        self.finality.save(changes)
        for key in self._pending_changed:
            held = self._pending.get(key)
            changes[_PENDING + key] = (
                None
                if held is None
                else msgpack.packb([held.label, held.weight, held.known_ms, held.published_ms, held.window_end_ms])
            )

    def saved(self) -> None:
        """The checkpoint is written."""
        self._kept.saved()
        self.finality.saved()
        self._pending_changed = set()

    def _wait(self, key: bytes, held: Answer) -> None:
        partition = partition_of(key)
        self._pending[key] = held
        self._pending_count[partition] = self._pending_count.get(partition, 0) + 1
        heapq.heappush(self._pending_by_time.setdefault(partition, []), (as_of_ms(key), key))

    def _release(self, key: bytes) -> Answer | None:
        held = self._pending.pop(key, None)
        if held is not None:
            self._pending_count[partition_of(key)] -= 1
            self._pending_changed.add(key)
        return held
