"""Record batches between the thread that fills them and the one that sends them.

Guaranteed: batches of a partition come out in the order in which their records went in, one at a time until it is
confirmed or given back; a batch given back comes out again, the same bytes, before any other of its partition.
Bytes put in and not confirmed are bounded: `put` waits. After `fail` or `close` every call that waits, or would,
raises.

A batch stays open until it is taken, so those that wait for a slow broker go on growing up to their limit.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from stream.errors import BrokerError
from stream.store.keys import PackedKeys
from stream.wire.record_batch import Codec, RecordBatch
from stream.wire.values import PackedValues

__all__ = ["BatchQueue", "QueuedBatch"]

_SEQUENCE_MASK = 0x7FFFFFFF


@dataclass(eq=False)
class QueuedBatch:
    """A batch from its first record until it is confirmed."""

    serial: int
    partition: int
    records: RecordBatch
    opened_at: float
    #: Of its first record, among those of the partition that this queue has given out.
    sequence: int = 0
    #: How often it was given out.
    attempts: int = 0
    _sealed: bytes | None = None

    def sealed(self, codec: Codec, producer_id: int, producer_epoch: int) -> bytes:
        """The bytes to send: the same, however often they are asked for."""
        if self._sealed is None:
            self._sealed = self.records.seal(codec, producer_id, producer_epoch, self.sequence)
        return self._sealed


@dataclass(eq=False)
class _Lane:
    """One partition."""

    #: The last one is open.
    waiting: deque[QueuedBatch] = field(default_factory=deque)
    is_under_way: bool = False
    next_sequence: int = 0


class BatchQueue:
    """See the module. `put` is for one thread at a time, as are `take`, `confirm` and `give_back`.

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
        self._lanes: dict[int, _Lane] = {}
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

    def put(self, partition: int, keys: PackedKeys, values: PackedValues | None) -> None:
        """Add one record for each key, a tombstone where `values` is None; waits while too much is unconfirmed.

        Raises
        ------
        BrokerError: something was refused, or this is closed.
        """
        with self._changed:
            self._check()
            while self._bytes >= self._limit:
                self._changed.wait()
                self._check()
            lane = self._lanes.setdefault(partition, _Lane())
            now_ms = int(self._wall_clock() * 1000)
            row = 0
            while row < len(keys):
                if not lane.waiting:
                    self._open(lane, partition)
                records = lane.waiting[-1].records
                before = records.size
                row = records.add(keys, values, row, now_ms)
                self._bytes += records.size - before
                if row < len(keys):
                    self._open(lane, partition)

    def wait_confirmed(self, timeout_s: float) -> None:
        """Wait until everything put in before this call is confirmed.

        Raises
        ------
        BrokerError: something was refused, or is not confirmed within `timeout_s`.
        """
        deadline = self._clock() + timeout_s
        with self._changed:
            last = self._serial
            while True:
                self._check()
                left = sum(batch.records.count for serial, batch in self._unconfirmed.items() if serial <= last)
                if not left:
                    return
                remaining = deadline - self._clock()
                if remaining <= 0:
                    raise BrokerError(f"{left} {self._name} were not confirmed within {timeout_s:g} s")
                self._changed.wait(remaining)

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

    def _open(self, lane: _Lane, partition: int) -> None:
        self._serial += 1
        batch = QueuedBatch(self._serial, partition, RecordBatch(self._batch_bytes), self._clock())
        self._unconfirmed[self._serial] = batch
        self._bytes += batch.records.size
        lane.waiting.append(batch)

    # ---------------------------------------------------------------- for the thread that sends

    def ready(self) -> list[int]:
        """Partitions that have a batch to take."""
        with self._changed:
            return [number for number, lane in self._lanes.items() if lane.waiting and not lane.is_under_way]

    def take(self, partition: int) -> QueuedBatch:
        """The next batch of a partition that is ready; nothing is added to it any more."""
        with self._changed:
            lane = self._lanes[partition]
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
            if self._failure is not None:
                return
            self._lanes[batch.partition].is_under_way = False
            del self._unconfirmed[batch.serial]
            self._bytes -= batch.records.size
            self._changed.notify_all()

    def give_back(self, batch: QueuedBatch) -> None:
        """It is to be sent again."""
        with self._changed:
            if self._failure is not None:
                return
            lane = self._lanes[batch.partition]
            lane.waiting.appendleft(batch)
            lane.is_under_way = False

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
