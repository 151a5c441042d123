"""What the store hands out: looked-up rows, counts, and the context in which rows are changed in place.

Guarantees: an update that ends with an exception leaves every row, and every waiting key, as it was.
"""

from __future__ import annotations

from types import TracebackType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stream.store import layout
from stream.store.core import Core
from stream.store.expiry import Cap
from stream.store.keys import PackedKeys

__all__ = ["Lookup", "Stats", "Update"]

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]


class Lookup(NamedTuple):
    """What a lookup found, in the order of its keys.

    vectors: float32[n, width], the default where nothing was found. found: bool[n]. events_seen, last_event_ms,
    applied_offset: int64[n]; 0, 0 and -1 where nothing was found.
    """

    vectors: Float32
    found: Bool
    events_seen: Int64
    last_event_ms: Int64
    applied_offset: Int64

    def take(self, indices: Int64) -> Lookup:
        """The rows at indices."""
        return Lookup(
            self.vectors[indices],
            self.found[indices],
            self.events_seen[indices],
            self.last_event_ms[indices],
            self.applied_offset[indices],
        )


class Stats(NamedTuple):
    """Sizes now, and counts since the store was opened.

    cold_rows, cold_bytes: copies in the scratch file of rows that left memory, and the disk it takes.
    """

    rows: int
    memory_rows: int
    unsaved_rows: int
    admitted: int
    expired: int
    capped: int
    evicted: int
    spilled: int
    disk_reads: int
    held_dropped: int
    overhead_bytes: int
    cold_rows: int
    cold_bytes: int


class Update:
    """The context of EmbeddingStore.update()."""

    def __init__(self, core: Core, cap: Cap, keys: PackedKeys, now_ms: int | None, written_last: int) -> None:
        self._core = core
        self._written_last = written_last
        self._cap = cap
        self._keys = keys
        self._now_ms = now_ms

    def __enter__(self) -> Int64:
        core = self._core
        core.lock.acquire()
        try:
            core.check_idle()
            if self._now_ms is not None:
                core.advance(self._now_ms)
            self._slots, self._made = core.begin(self._keys)
            core.updating = True
            self._accounts = core.table.account(self._slots)
            # -1 gives some row, which is never put back.
            rows, begin = core.table.rows, self._written_last
            self._rows = rows[self._slots, begin:] if begin else rows.take(self._slots, axis=0, mode="clip")
        except BaseException:
            core.lock.release()
            raise
        return self._slots

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        core = self._core
        try:
            core.updating = False
            core.check()
            if kind is None:
                core.end_untouched()
                core.table.mark(self._slots)
                self._cap.touched(self._slots)
                core.floor.touched(self._slots)
                self._cap.enforce()
            else:
                self._put_back()
            core.make_room()
        finally:
            core.lock.release()

    def _put_back(self) -> None:
        core, slots = self._core, self._slots
        known = slots >= 0
        core.table.set_account(slots[known], self._accounts[known])
        core.table.rows[slots[known], self._written_last :] = self._rows[known]
        # A row that entry itself made, or started anew, ends again: nothing of it was visible before.
        begun = np.unique(slots[known & (self._accounts[:, 0] == 0) & (self._accounts[:, 1] == 0)])
        waiting = np.array(list(core.undo_waiting), np.int64)
        ended = np.setdiff1d(begun, np.concatenate([self._made, waiting]))
        # Some may have been dead before, and told; to be told twice harms nobody.
        core.unreported += core.table.keys(ended).to_list()
        core.kill(ended)
        admitted = np.intersect1d(begun, waiting)
        core.table.flags[admitted] |= layout.WAITING
        for slot in admitted.tolist():
            account, core.table.held[slot] = core.undo_waiting[slot]
            core.table.set_account(np.array([slot]), account)
        undone = int(self._made.shape[0] + admitted.shape[0])
        core.admitted -= undone
        core.rows -= undone
        core.release(self._made)
