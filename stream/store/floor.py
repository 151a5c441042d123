"""The floor beside the time to live: expiry leaves the `min_rows` most recently updated rows, wherever they are.

Where rows live differently long, the most recent are those that would expire last.

Guarantees: at least min_rows rows stay, of all in memory and on disk, and exactly those that should once it is known
where the newest are. It is, always, in a table without a disk and in one that was empty when it was opened. In one
that was opened with rows, or restored, or that lost many of its newest rows to deletion, more rows may stay until
so many were updated, or the sweep has read the disk once. The newest rows never leave memory.
"""

from __future__ import annotations

from heapq import heappush, heappushpop
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stream.store import layout, rows
from stream.store.keys import PackedKeys

if TYPE_CHECKING:
    from stream.store.core import Core

__all__ = ["Floor"]

Int64 = npt.NDArray[np.int64]

_NEVER = -(2**63)
_UNKNOWN = 2**62
_NOT_LIVE = layout.DEAD | layout.WAITING
_WALK_ROWS = 128
_BRING_ROWS = 32
_SCAN_SLOTS = 4096


class Floor:
    """Knows the newest rows as slots that are pinned to memory, and how new any other row can be at most."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._keep = core.options.min_rows
        # More than are needed, so that not every deletion leaves too few.
        self._size = self._keep + self._keep // 4 + 64
        self._most = 2 * self._size
        if core.options.memory_rows is not None:
            # As much as may be of memory is left to rows that are used.
            self._size = min(self._size, core.options.memory_rows)
            self._most = max(min(self._most, core.options.memory_rows // 2), self._size)
        self._slots: Int64 = np.empty(0, np.int64)
        self._stale = False
        # Times are last_event_ms, or what lives puts in its place. No row that is not pinned has a later one than this.
        self._others = _NEVER
        # So many rows as are to be kept have this time or a later one.
        self._proved = _NEVER
        self._pass: Pass | None = None
        self._wanted = False

    def limit(self, horizon: int) -> int:
        """The horizon, held back so that enough rows stay."""
        if not self._keep or horizon < self._proved:
            return horizon
        least = self._least()
        if least < self._others and self._core.disk is None:
            self._others = _NEVER
            self.touched(self._core.live_slots())
            least = self._least()
        self._wanted = least < self._others
        self._proved = least
        return min(horizon, least - 1) if least > _NEVER else _NEVER

    def _least(self) -> int:
        """Of the pinned rows' times the min_rows-th from the top; _NEVER if no row is beyond the floor."""
        self._purge()
        table = self._core.table
        times = table.aged(self._slots[(table.flags[self._slots] & _NOT_LIVE) == 0])
        count = times.shape[0]
        if count < self._keep or (count == self._keep and self._others == _NEVER):
            return _NEVER
        return int(np.partition(times, -self._keep)[-self._keep])

    # -- to be told ----------------------------------------------------------------------------------------

    def touched(self, slots: Int64) -> None:
        """Of rows that were updated, int64[n], duplicates allowed, -1 passed over."""
        if not self._keep:
            return
        self._purge()
        flags = self._core.table.flags
        slots = slots[slots >= 0]
        slots = np.unique(slots[(flags[slots] & layout.PINNED) == 0])
        flags[slots] |= layout.PINNED
        self._slots = np.concatenate([self._slots, slots])
        if self._slots.shape[0] > self._most:
            self._compact()

    def leaving(self, slots: Int64) -> None:
        """Of slots that are about to be freed, by eviction or because their rows ended."""
        if self._keep and slots.shape[0]:
            flags = self._core.table.flags[slots]
            self._stale |= bool((flags & layout.PINNED).any())
            if self._pass is not None:
                left = self._core.table.aged(slots[(flags & _NOT_LIVE) == 0])
                self._pass.others = max(self._pass.others, int(left.max(initial=_NEVER)))

    def ending(self, slots: Int64) -> None:
        """Of rows that are about to end."""
        if self._keep and int(self._core.table.aged(slots).max(initial=_NEVER)) >= self._proved:
            self._proved = _NEVER

    def stored(self, latest_ms: int) -> None:
        """Of rows that are not pinned, with the latest of their times."""
        self._others = max(self._others, latest_ms)
        if self._pass is not None:
            self._pass.others = max(self._pass.others, latest_ms)

    def unknown(self) -> None:
        """Of a disk that holds rows of whatever age."""
        self.stored(_UNKNOWN)

    def pinned(self) -> tuple[int, int]:
        """How many slots may not leave memory, and how many of these have unsaved rows."""
        if not self._keep:
            return 0, 0
        self._purge()
        unsaved = (self._core.table.flags[self._slots] & layout.UNSAVED) != 0
        return self._slots.shape[0], int(unsaved.sum())

    def _purge(self) -> None:
        if self._stale:
            self._stale = False
            self._slots = self._slots[(self._core.table.flags[self._slots] & layout.PINNED) != 0]

    def _compact(self) -> None:
        """Unpin all but the newest `size`."""
        table = self._core.table
        times = table.aged(self._slots)
        times[(table.flags[self._slots] & _NOT_LIVE) != 0] = _NEVER
        order = np.argpartition(times, -self._size)
        out = order[: -self._size]
        self.stored(int(times[out].max()))
        table.flags[self._slots[out]] &= np.uint8(0xFF ^ layout.PINNED)
        self._slots = self._slots[order[-self._size :]]

    # -- the pass ------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Read a little of the disk to find the newest rows; false where there is nothing to find out."""
        if not self._wanted:
            return False
        core = self._core
        if self._pass is None:
            self._pass = Pass(core, self._size)
        if not self._pass.step():
            others = self._pass.others
            self._pass = None
            self._others = others
            core.hold_horizon()
            # Asked for again only once something has changed.
            self._wanted = False
        return True


class Pass:
    """One reading of all rows, of disk and then of memory, which ends with the newest pinned."""

    def __init__(self, core: Core, size: int) -> None:
        self._core = core
        self._size = size
        self._cursor = b""
        # The newest so far, as a heap with the oldest of them on top.
        self._found: list[tuple[int, bytes]] = []
        self._walking = True
        self._slot = 0
        # Of the rows that are passed over, the latest time.
        self.others = _NEVER

    def step(self) -> bool:
        """Go on a little; false at the end."""
        core = self._core
        if self._walking:
            self._walk()
        elif self._found:
            slots = core.bring_in(PackedKeys.from_list([key for _, key in self._found[-_BRING_ROWS:]]))
            del self._found[-_BRING_ROWS:]
            core.floor.touched(slots)
            core.make_room()
        elif self._slot < core.table.allocated:
            part = slice(self._slot, min(self._slot + _SCAN_SLOTS, core.table.allocated))
            live = (core.table.in_use[part] != 0) & ((core.table.flags[part] & _NOT_LIVE) == 0)
            core.floor.touched(np.flatnonzero(live) + self._slot)
            self._slot = part.stop
        else:
            return False
        return True

    def _walk(self) -> None:
        core, disk = self._core, self._core.disk
        assert disk is not None
        iterator = disk.iterate("rows")
        iterator.seek(self._cursor)
        entries = disk.walk(iterator, _WALK_ROWS)
        if not entries:
            self._walking = False
            return
        self._cursor = entries[-1][0] + b"\0"
        headers = rows.read_headers([value for _, value in entries], core.origin)
        times = core.aged_of(headers)
        for i in np.flatnonzero(headers["kind"] == rows.ROW).tolist():
            row = (int(times[i]), entries[i][0])
            if len(self._found) < self._size:
                heappush(self._found, row)
            else:
                self.others = max(self.others, heappushpop(self._found, row)[0])
