"""The trainer's own copy of the rows, advanced by the same engine as the workers'.

A row belongs to a client in a partition, by its whole key. Memory is bounded by `memory_rows`: rows that were
not used lately leave it after a checkpoint and are read back from the database when needed; while too many
rows have changed since the last checkpoint, `is_full` asks for one.

Guaranteed: a row in the database is of a checkpoint's instant, never newer. Rows past their time to live
start from nothing when their client returns, and leave the disk in bounded slices (`sweep`). Where events of different
modalities keep rows for different times, a row lives as long as it does in a worker.

Not guaranteed: what `store.max_rows` does in a worker. A client that was put out there by that cap starts
anew in the worker and goes on here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numba import njit
from numpy.typing import NDArray

from stream.errors import StoreError
from trainer.checkpoint import Changes, Database

__all__ = ["Beside", "Replica", "late_events"]

_PREFIX = b"r"
_HEADER_BYTES = 24
#: After the floats, where modalities differ.
_DEADLINE_BYTES = 8
#: Milliseconds that never pass.
_FOR_EVER = 2**61
_FIRST_ROWS = 1024
#: Rows looked at for their time to live in one sweep.
_SWEEP_ROWS = 5_000


class Beside(Protocol):
    """What lies under the same slots as rows and lives as long; keys are those of rows."""

    def grow(self, rows: int) -> None: ...
    def reset(self, slot: int) -> None: ...
    def read(self, keys: Sequence[bytes], slots: Sequence[int]) -> None: ...
    def save(self, keys: Sequence[bytes], slots: Sequence[int], changes: Changes) -> None: ...
    def end(self, key: bytes, changes: Changes) -> None: ...


class Replica:
    """Rows by slot; the arrays are reached through the attributes anew after each `slots`, as growth moves
    them.

    Parameters
    ----------
    database: where rows of earlier checkpoints are.
    width: floats in a row.
    memory_rows: rows kept in memory between checkpoints.
    ttl_ms: time to live in event time against the partition's watermark; None: for ever.
    event_ttls_ms: the same of events of each modality, where they differ.
    beside: goes with the rows.
    """

    def __init__(
        self,
        database: Database,
        width: int,
        memory_rows: int,
        ttl_ms: int | None,
        event_ttls_ms: Sequence[int | None] = (),
        beside: Beside | None = None,
    ) -> None:
        self._database = database
        self._width = width
        self._beside = beside
        self._limit = memory_rows
        self._default_ms = _FOR_EVER if ttl_ms is None else ttl_ms
        self._event_ms = np.array([_FOR_EVER if ttl is None else ttl for ttl in event_ttls_ms], np.int64)
        every = [self._default_ms, *self._event_ms.tolist()]
        self._shortest_ms, self._longest_ms = min(every), max(every)
        self._ends = self._shortest_ms < _FOR_EVER
        self._slot: dict[bytes, int] = {}
        self._free: list[int] = []
        self._key: list[bytes] = []
        self._dirty = np.zeros(0, np.bool_)
        self._used = np.zeros(0, np.int64)
        self._tick = 0
        self._expired: set[bytes] = set()
        self._cursor: bytes | None = None
        # Event time at which each row is expired; kept where modalities differ.
        self._deadline_ms = np.zeros(0, np.int64)
        self.vectors = np.zeros((0, width), np.float32)
        self.events_seen = np.zeros(0, np.int64)
        self.last_event_ms = np.zeros(0, np.int64)
        self.applied_offset = np.zeros(0, np.int64)
        self._grow(_FIRST_ROWS)

    def __len__(self) -> int:
        """Rows in memory."""
        return len(self._slot)

    @property
    def is_full(self) -> bool:
        """True when a checkpoint is due so that rows can leave memory."""
        return len(self._slot) >= self._limit

    def slots(
        self, clients: Sequence[bytes], partitions: Sequence[int], watermarks: dict[int, int]
    ) -> NDArray[np.int64]:
        """(n,) slot of each client's row, read back or made new where needed, and marked as changed."""
        found = self._find(clients, partitions)
        for slot in np.unique(found[self._over(found, partitions, watermarks)]).tolist():
            self._reset(slot)
        self._dirty[found] = True
        return found

    def look(
        self, clients: Sequence[bytes], partitions: Sequence[int], watermarks: dict[int, int]
    ) -> NDArray[np.int64]:
        """(n,) slot of each client's row as it is, -1 where it has none or that has expired."""
        found = self._find(clients, partitions)
        alive = (self.events_seen[found] > 0) & ~self._over(found, partitions, watermarks)
        return np.where(alive, found, -1)

    def _find(self, clients: Sequence[bytes], partitions: Sequence[int]) -> NDArray[np.int64]:
        prefixes = {p: _prefix(p) for p in set(partitions)}
        keys = [prefixes[p] + client for client, p in zip(clients, partitions, strict=True)]
        get = self._slot.get
        found = np.array([get(key, -1) for key in keys], np.int64)
        missing = np.flatnonzero(found < 0)
        if len(missing):
            self._admit(list(dict.fromkeys(keys[i] for i in missing)))
            for i in missing.tolist():
                found[i] = self._slot[keys[i]]
        self._tick += 1
        self._used[found] = self._tick
        return found

    def _admit(self, keys: list[bytes]) -> None:
        while len(self._free) < len(keys):
            self._grow(2 * len(self._dirty))
        stored = self._database.get_many(keys)
        for key, row in zip(keys, stored, strict=True):
            slot = self._free.pop()
            self._slot[key] = slot
            self._key[slot] = key
            if row is None:
                self._reset(slot)
            else:
                self._decode(slot, row)
        if self._beside is not None:
            there = [key for key, row in zip(keys, stored, strict=True) if row is not None]
            self._beside.read(there, [self._slot[key] for key in there])

    def _over(
        self, slots: NDArray[np.int64], partitions: Sequence[int], watermarks: dict[int, int]
    ) -> NDArray[np.bool_]:
        """(n,) whether the row there is past its time to live."""
        if not self._ends:
            return np.zeros(len(slots), np.bool_)
        now = np.array([watermarks.get(p, 0) for p in partitions], np.int64)
        deadline = self._deadline_ms[slots] if len(self._event_ms) else self.last_event_ms[slots] + self._default_ms
        return (self.events_seen[slots] > 0) & (deadline <= now)

    def prolong(
        self,
        slots: NDArray[np.int64],
        timestamp_ms: NDArray[np.int64],
        offsets: NDArray[np.int64],
        modality: NDArray[np.int32],
    ) -> None:
        """Before events are applied, each (n,): let them keep their rows for as long as their modality says."""
        if not len(self._event_ms):
            return
        at = np.flatnonzero(slots >= 0)
        at = at[offsets[at] > self.applied_offset[slots[at]]]
        np.maximum.at(self._deadline_ms, slots[at], timestamp_ms[at] + self._event_ms[modality[at]])

    def _deadline_of(self, row: bytes) -> int:
        """When a row of the database is expired."""
        (last_ms,) = struct.unpack_from("<q", row, 8)
        life_ms = self._default_ms
        if len(self._event_ms) and len(row) == self._row_bytes + _DEADLINE_BYTES:
            # As in a worker, what settings of before allowed is bounded by what these do.
            (deadline_ms,) = struct.unpack_from("<q", row, self._row_bytes)
            life_ms = min(max(deadline_ms - last_ms, self._shortest_ms), self._longest_ms)
        return int(last_ms) + life_ms

    @property
    def _row_bytes(self) -> int:
        return _HEADER_BYTES + 4 * self._width

    def _reset(self, slot: int) -> None:
        if self._beside is not None:
            self._beside.reset(slot)
        self._deadline_ms[slot] = 0
        self.vectors[slot] = 0.0
        self.events_seen[slot] = 0
        self.last_event_ms[slot] = 0
        self.applied_offset[slot] = -1

    def _decode(self, slot: int, row: bytes) -> None:
        if len(row) not in (self._row_bytes, self._row_bytes + _DEADLINE_BYTES):
            raise StoreError(
                f"a row of {self._database.path} has {len(row)} bytes: expected {self._row_bytes}, or "
                f"{_DEADLINE_BYTES} more; its settings were others"
            )
        seen, last_ms, offset = struct.unpack_from("<qqq", row)
        self.events_seen[slot], self.last_event_ms[slot], self.applied_offset[slot] = seen, last_ms, offset
        self.vectors[slot] = np.frombuffer(row, np.float32, self._width, _HEADER_BYTES)
        self._deadline_ms[slot] = self._deadline_of(row)

    def _grow(self, rows: int) -> None:
        before = len(self._dirty)
        added = rows - before
        self.vectors = np.concatenate([self.vectors, np.zeros((added, self._width), np.float32)])
        self.events_seen = np.concatenate([self.events_seen, np.zeros(added, np.int64)])
        self.last_event_ms = np.concatenate([self.last_event_ms, np.zeros(added, np.int64)])
        self.applied_offset = np.concatenate([self.applied_offset, np.full(added, -1, np.int64)])
        self._deadline_ms = np.concatenate([self._deadline_ms, np.zeros(added, np.int64)])
        self._dirty = np.concatenate([self._dirty, np.zeros(added, np.bool_)])
        self._used = np.concatenate([self._used, np.zeros(added, np.int64)])
        if self._beside is not None:
            self._beside.grow(rows)
        self._key += [b""] * added
        self._free += range(rows - 1, before - 1, -1)

    def sweep(self, watermarks: dict[int, int]) -> None:
        """Find the next slice of rows past their time to live on disk; the next checkpoint drops them."""
        if not self._ends:
            return
        looked, last = 0, None
        for key, row in self._database.scan(_PREFIX, self._cursor):
            looked, last = looked + 1, key
            (partition,) = struct.unpack_from(">I", key, 1)
            if key not in self._slot and self._deadline_of(row) <= watermarks.get(partition, 0):
                self._expired.add(key)
            if looked >= _SWEEP_ROWS:
                break
        self._cursor = last + b"\0" if last is not None and looked >= _SWEEP_ROWS else None

    def save(self, changes: Changes) -> None:
        """Add every row that changed since the last checkpoint, and the expired ones."""
        for key in self._expired:
            if key not in self._slot:
                changes[key] = None
                if self._beside is not None:
                    self._beside.end(key, changes)
        dirty = np.flatnonzero(self._dirty)
        header = np.stack([self.events_seen[dirty], self.last_event_ms[dirty], self.applied_offset[dirty]], axis=1)
        parts = [header.view(np.uint8).reshape(len(dirty), _HEADER_BYTES), self.vectors[dirty].view(np.uint8)]
        if len(self._event_ms):
            parts.append(self._deadline_ms[dirty].view(np.uint8).reshape(len(dirty), _DEADLINE_BYTES))
        encoded = np.concatenate(parts, axis=1)
        size = encoded.shape[1]
        data = encoded.tobytes()
        for i, slot in enumerate(dirty.tolist()):
            changes[self._key[slot]] = data[i * size : (i + 1) * size]
        if self._beside is not None:
            slots = dirty.tolist()
            self._beside.save([self._key[slot] for slot in slots], slots, changes)

    def saved(self) -> None:
        """The checkpoint is written: nothing is owed, and rows beyond the limit may leave memory."""
        self._expired.clear()
        self._dirty[:] = False
        if len(self._slot) < self._limit:
            return
        slots = np.fromiter(self._slot.values(), np.int64, len(self._slot))
        leave = len(slots) - self._limit * 3 // 4
        for slot in slots[np.argpartition(self._used[slots], leave - 1)[:leave]].tolist():
            del self._slot[self._key[slot]]
            self._key[slot] = b""
            self._free.append(slot)


def _prefix(partition: int) -> bytes:
    return _PREFIX + struct.pack(">I", partition)


@njit(cache=True, nogil=True)
def _mark_late(client, timestamp_ms, newest, late):  # type: ignore[no-untyped-def]
    for i in range(client.shape[0]):
        if timestamp_ms[i] < newest[client[i]]:
            late[i] = True
        else:
            newest[client[i]] = timestamp_ms[i]


def late_events(
    slots: NDArray[np.int64],
    timestamp_ms: NDArray[np.int64],
    offsets: NDArray[np.int64],
    replica: Replica,
) -> NDArray[np.bool_]:
    """(n,) True where an event is older than one that its row has seen before it.

    Parameters
    ----------
    slots: (n,) rows before the events are applied; -1 for events that are left out.
    """
    late = np.zeros(len(slots), np.bool_)
    chosen = np.flatnonzero(slots >= 0)
    chosen = chosen[offsets[chosen] > replica.applied_offset[slots[chosen]]]
    unique, client = np.unique(slots[chosen], return_inverse=True)
    newest = np.where(replica.events_seen[unique] > 0, replica.last_event_ms[unique], np.int64(-1))
    marked = np.zeros(len(chosen), np.bool_)
    _mark_late(client.astype(np.int64), timestamp_ms[chosen], newest, marked)
    late[chosen] = marked
    return late
