"""Record batches between the thread that fills them and the one that sends them.

Guaranteed: batches of a partition come out in the order in which their records went in, one at a time until it is
confirmed or given back; a batch given back comes out again, the same bytes, before any other of its partition.
Bytes put in and not confirmed are bounded: `put` waits. After `fail` or `close` every call that waits, or would,
raises. A partition is written from `begin` until it is given up; once it is fenced its records are dropped and
waiting for them raises.

A batch stays open until it is taken, so those that wait for a slow broker go on growing up to their limit.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from stream.errors import BrokerError, Fenced
from stream.store.keys import PackedKeys
from stream.wire.record_batch import Codec, RecordBatch
from stream.wire.values import PackedValues

__all__ = ["BatchQueue", "Lane", "QueuedBatch"]

_SEQUENCE_MASK = 0x7FFFFFFF


@dataclass(eq=False)
class QueuedBatch:
    """A batch from its first record until it is confirmed."""

    serial: int
    lane: Lane
    records: RecordBatch
    opened_at: float
    #: Of its first record, among those of the lane that were given out since it was identified.
    sequence: int = 0
    #: How often it was given out.
    attempts: int = 0
    _sealed: bytes | None = None

    @property
    def partition(self) -> int:
        """Where it belongs."""
        return self.lane.partition

    def sealed(self, codec: Codec) -> bytes:
        """The bytes to send: the same, however often they are asked for."""
        if self._sealed is None:
            assert self.lane.producer is not None, "a batch is taken after its lane was identified"
            self._sealed = self.records.seal(codec, *self.lane.producer, self.sequence)
        return self._sealed


@dataclass(eq=False)
class Lane:
    """One partition, from `begin` until it is given up."""

    partition: int
    #: (id, epoch) that the broker knows its writer by; None before one was granted.
    producer: tuple[int, int] | None = None
    #: When it was granted, by the queue's clock.
    identified_at: float = 0.0
    #: Somebody else writes the partition now.
    is_fenced: bool = False
    #: A batch was taken, or its identity is being asked for.
    is_under_way: bool = False
    next_sequence: int = 0
    #: The last one is open.
    waiting: deque[QueuedBatch] = field(default_factory=deque)


class BatchQueue:
    """See the module. `put` and `give_up` are for one thread at a time, as are those of the thread that sends.

    Parameters
    ----------
    name: what the records are for, in errors.
    batch_bytes: limit of one batch before compression. unconfirmed_bytes: where `put` begins to wait; what one call
        puts in comes on top.
    wall_clock: seconds since 1970, for the records' timestamps. clock: monotonic seconds.
    """

    def __init__(
        self,
        name: str,
        batch_bytes: int,
        unconfirmed_bytes: int,
        wall_clock: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        self._name, self._batch_bytes, self._limit = name, batch_bytes, unconfirmed_bytes
        self._wall_clock, self._clock = wall_clock, clock
        self._changed = threading.Condition()
        self._lanes: dict[int, Lane] = {}
        self._unidentified: list[Lane] = []
        #: By serial, and so from the oldest on.
        self._unconfirmed: dict[int, QueuedBatch] = {}
        self._serial = 0
        self._bytes = 0
        self._failure: BrokerError | None = None
        self._is_closed = False

    # ---------------------------------------------------------------- for the thread that fills

    @property
    def failure(self) -> BrokerError | None:
        """What was refused, if something was."""
        return self._failure

    @property
    def unconfirmed_bytes(self) -> int:
        """Bytes of records, uncompressed, that were put in and are not confirmed."""
        return self._bytes

    def begin(self, partition: int, timeout_s: float, wake: Callable[[], None]) -> None:
        """Become the partition's writer, again if need be: waits until the thread that sends has an identity for it.

        wake: tells that thread.

        Raises
        ------
        BrokerError: something was refused before, or no identity was granted within `timeout_s`.
        """
        deadline = self._clock() + timeout_s
        with self._changed:
            self._check()
            before, lane = self._lanes.get(partition), Lane(partition, is_under_way=True)
            self._lanes[partition] = lane
            self._unidentified.append(lane)
            if before is not None:
                self._drop(before)
            wake()
            while lane.producer is None:
                self._check()
                remaining = deadline - self._clock()
                if remaining <= 0 or self._lanes.get(partition) is not lane:
                    raise BrokerError(f"{self._name}: no producer id for partition {partition} within {timeout_s:g} s")
                self._changed.wait(remaining)

    def put(self, partition: int, keys: PackedKeys, values: PackedValues | None) -> None:
        """Add one record for each key, a tombstone where `values` is None; waits while too much is unconfirmed.

        Those of a fenced partition are dropped.

        Raises
        ------
        BrokerError: something was refused, or this is closed, or the partition was not begun.
        """
        with self._changed:
            self._check()
            while self._bytes >= self._limit:
                self._changed.wait()
                self._check()
            lane = self._lanes.get(partition)
            if lane is None:
                raise BrokerError(f"{self._name}: partition {partition} is not written from here")
            if lane.is_fenced:
                return
            now_ms = int(self._wall_clock() * 1000)
            row = 0
            while row < len(keys):
                if not lane.waiting:
                    self._open(lane)
                records = lane.waiting[-1].records
                before = records.size
                row = records.add(keys, values, row, now_ms)
                self._bytes += records.size - before
                if row < len(keys):
                    self._open(lane)

    def wait_confirmed(self, timeout_s: float, partition: int | None = None) -> None:
        """Wait until everything put in before this call is confirmed; of one partition, or of all.

        Raises
        ------
        Fenced: somebody else writes a partition now.
        BrokerError: something was refused, or given up, or is not confirmed within `timeout_s`.
        """
        deadline = self._clock() + timeout_s
        with self._changed:
            last = self._serial
            lanes = {lane for number, lane in self._lanes.items() if partition in (None, number)}
            while True:
                self._check()
                self._check_lanes(lanes)
                left = sum(
                    batch.records.count
                    for serial, batch in self._unconfirmed.items()
                    if serial <= last and batch.lane in lanes
                )
                if not left:
                    return
                remaining = deadline - self._clock()
                if remaining <= 0:
                    raise BrokerError(f"{left} {self._name} were not confirmed within {timeout_s:g} s")
                self._changed.wait(remaining)

    def give_up(self, partition: int) -> None:
        """Drop what is not confirmed of a partition; what is put in later is of a new writer."""
        with self._changed:
            lane = self._lanes.pop(partition, None)
            if lane is not None:
                self._drop(lane)

    def close(self) -> None:
        """Every later call raises."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._is_closed:
            raise BrokerError(f"the producer of {self._name} is closed")

    def _check_lanes(self, lanes: Collection[Lane]) -> None:
        for lane in lanes:
            if lane.is_fenced:
                raise Fenced(f"{self._name}: another worker writes partition {lane.partition} now")
            if self._lanes.get(lane.partition) is not lane:
                raise BrokerError(f"{self._name}: partition {lane.partition} was given up")

    def _drop(self, lane: Lane) -> None:
        lane.waiting.clear()
        for serial, batch in list(self._unconfirmed.items()):
            if batch.lane is lane:
                del self._unconfirmed[serial]
                self._bytes -= batch.records.size
        self._changed.notify_all()

    def _open(self, lane: Lane) -> None:
        self._serial += 1
        batch = QueuedBatch(self._serial, lane, RecordBatch(self._batch_bytes), self._clock())
        self._unconfirmed[self._serial] = batch
        self._bytes += batch.records.size
        lane.waiting.append(batch)

    # ---------------------------------------------------------------- for the thread that sends

    def ready(self) -> list[Lane]:
        """Partitions that have a batch to take."""
        with self._changed:
            return [lane for lane in self._lanes.values() if lane.waiting and not lane.is_under_way]

    def take_unidentified(self, longest_s: float) -> list[Lane]:
        """Lanes to ask an identity for: those that began, and idle ones whose identity is older than that.

        One with something to send keeps its identity: if its writer was paused, it may have a successor by now.
        """
        with self._changed:
            lanes, self._unidentified = self._unidentified, []
            for lane in self._lanes.values():
                is_idle = not (lane.waiting or lane.is_under_way or lane.is_fenced)
                if is_idle and self._clock() - lane.identified_at > longest_s:
                    lane.is_under_way = True
                    lanes.append(lane)
            return lanes

    def is_current(self, lane: Lane) -> bool:
        """Whether the lane was not given up."""
        with self._changed:
            return self._lanes.get(lane.partition) is lane

    def identify(self, lane: Lane, producer_id: int, producer_epoch: int) -> None:
        """The broker granted an identity to a lane that was taken for it."""
        with self._changed:
            lane.producer, lane.identified_at = (producer_id, producer_epoch), self._clock()
            lane.next_sequence, lane.is_under_way = 0, False
            self._changed.notify_all()

    def take(self, lane: Lane) -> QueuedBatch | None:
        """The next batch of a lane that is ready, to which nothing is added any more; None if it was given up."""
        with self._changed:
            if not lane.waiting:
                return None
            batch = lane.waiting.popleft()
            lane.is_under_way = True
            if not batch.attempts:
                batch.sequence = lane.next_sequence
                lane.next_sequence = (lane.next_sequence + batch.records.count) & _SEQUENCE_MASK
            batch.attempts += 1
            return batch

    def confirm(self, batch: QueuedBatch) -> None:
        """The broker has it."""
        with self._changed:
            batch.lane.is_under_way = False
            # None after a failure, and where it was given up meanwhile.
            if self._unconfirmed.pop(batch.serial, None) is not None:
                self._bytes -= batch.records.size
                self._changed.notify_all()

    def give_back(self, batch: QueuedBatch) -> None:
        """It is to be sent again."""
        with self._changed:
            batch.lane.is_under_way = False
            if batch.serial in self._unconfirmed:
                batch.lane.waiting.appendleft(batch)

    def fence(self, lane: Lane) -> None:
        """Somebody else writes the partition now."""
        with self._changed:
            lane.is_fenced, lane.is_under_way = True, False
            self._drop(lane)

    def oldest_s(self) -> float:
        """Age of the oldest batch that is not confirmed; 0 if there is none."""
        with self._changed:
            oldest = next(iter(self._unconfirmed.values()), None)
            return 0.0 if oldest is None else self._clock() - oldest.opened_at

    def fail(self, error: BrokerError) -> None:
        """Every later call raises the first such error; what is not confirmed is dropped."""
        with self._changed:
            self._failure = self._failure or error
            self._lanes.clear()
            self._unconfirmed.clear()
            self._bytes = 0
            self._changed.notify_all()
