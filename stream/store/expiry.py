"""Ending rows that are too old or too many: the sweep and the cap.

Guarantees: the sweep ends every expired row sooner or later and nothing else, and stops when its time is up; the
cap ends those that would expire first (with one time to live, those with the smallest last_event_ms), wherever they
are, before the operation that made one too many returns. Both leave tombstones for the next checkpoint. Disk is
searched through its queue of ages, in which an entry may be older than its row but never younger; entries met on the
way are put right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stream.errors import StoreError
from stream.store import kernels, layout, rows
from stream.store.core import NO_HORIZON, Core
from stream.store.disk import age_key, split_age_key
from stream.store.keys import PackedKeys

__all__ = ["Cap", "Sweep"]

Int64 = npt.NDArray[np.int64]

_SCAN_SLOTS = 16_384
_KILL_ROWS = 512
_WALK_ROWS = 32
_CAP_ROWS = 4096
_NOT_LIVE = layout.DEAD | layout.WAITING


class Aged(NamedTuple):
    """A key on disk: its place in the queue, whether it is a row or a waiting key, and its account."""

    ms: int
    key: bytes
    is_row: bool
    account: tuple[int, ...]


class Ages:
    """A walk through disk's queue of ages, oldest first, that puts stale entries right."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._cursor = b""
        self._passed: tuple[int, bytes] | None = None
        # Before this there is no entry. To seek from further ahead would cost a read of all that was ever removed.
        self._first = b""
        self._kept: tuple[int, bytes] | None = None

    def rewind(self) -> None:
        """Start from the oldest entry again."""
        self._first = self._cursor if self._kept is None else min(age_key(*self._kept), self._cursor)
        self._cursor = self._first
        self._passed = None
        self._kept = None

    def back_to(self, ms: int, key: bytes = b"") -> None:
        """Let the walk go on at this entry, if it is past it."""
        self._cursor = min(self._cursor, age_key(ms, key))

    def back_to_rows(self) -> None:
        """Let the walk go on at the first entry it passed because its row was in memory: it may have left."""
        if self._passed is not None:
            self.back_to(*self._passed)
            self._passed = None

    def step(self, latest_ms: int, limit: int, *, end: bool = False) -> tuple[list[Aged], bool]:
        """Walk up to `limit` entries of at most latest_ms.

        Returns what disk alone holds of the keys met, oldest first, and whether the walk came to the end. Keys
        in memory are left to their slots. end: what is returned ends, in the same write.
        """
        core, disk = self._core, self._core.disk
        assert disk is not None
        iterator = disk.iterate("ages")
        iterator.seek(self._cursor)
        entries = [split_age_key(key) for key, _ in disk.walk(iterator, limit)]
        within = [(ms, key) for ms, key in entries if ms <= latest_ms]
        done = len(within) < limit
        if not within:
            return [], done
        self._cursor = age_key(within[-1][0], within[-1][1] + b"\0")
        keys = PackedKeys.from_list([key for _, key in within])
        slots, _ = core.table.find(keys, core.table.hashes(keys))
        times = core.table.aged(np.maximum(slots, 0))
        absent = np.flatnonzero(slots < 0).tolist()
        values = disk.get([within[i][1] for i in absent])
        present = [(i, value) for i, value in zip(absent, values, strict=True) if value is not None]
        read = rows.read_headers([value for _, value in present], core.origin)
        accounts = map(tuple, rows.accounts(read).tolist())
        columns = zip(read["kind"].tolist(), core.aged_of(read).tolist(), accounts, strict=True)
        headers = dict(zip([i for i, _ in present], columns, strict=True))
        batch = disk.batch()
        found: list[Aged] = []
        for i, ((ms, key), slot) in enumerate(zip(within, slots.tolist(), strict=True)):
            if slot >= 0:
                # The entry of a dead row must outlive it: only its commit makes the row's end certain.
                dead = core.table.flags[slot] & layout.DEAD
                actual = ms if dead else int(times[i])
                if not dead:
                    self._passed = min(self._passed or (actual, key), (actual, key))
            elif i not in headers:
                batch.delete("ages", age_key(ms, key))
                continue
            else:
                kind, actual, account = headers[i]
                if kind == rows.TOMBSTONE:
                    actual = ms
                elif (actual, key) <= within[-1]:
                    found.append(Aged(actual, key, kind == rows.ROW, account))
                elif actual <= latest_ms:
                    # Its entry moves to where this walk has yet to come.
                    done = False
            self._kept = min(self._kept or (actual, key), (actual, key))
            if actual != ms:
                batch.delete("ages", age_key(ms, key))
                batch.put("ages", age_key(actual, key), b"")
        found = sorted(set(found))
        if end and found:
            ends = np.array([aged.account for aged in found], np.int64)
            core.end_on_disk(batch, [aged.key for aged in found], ends, sum(aged.is_row for aged in found))
        elif len(batch):
            disk.write(batch)
        return found, done


class Sweep:
    """Finds expired rows, in slices."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._ages = Ages(core)
        self._slot = 0
        self._on_disk = False
        self._target = NO_HORIZON
        # Also what had expired when the table was closed: its rows may not have been ended, or not for certain.
        self._done = NO_HORIZON

    def run(self, budget_ms: float, clock: Callable[[], float]) -> list[bytes]:
        """Sweep until budget_ms is over or a pass is complete; returns the keys of rows that ended."""
        core = self._core
        ended: list[bytes] = []
        began = clock()
        until = began + budget_ms / 1000.0
        longest = 0.0
        with core.lock:
            core.check_idle()
            ended += self._unreported()
        while True:
            with core.lock:
                core.check_idle()
                # A row that ends while its state is being given out would be missing from the checkpoint.
                if core.open_checkpoint is not None or not (self._slice(ended) or core.floor.step()):
                    return ended
            now = clock()
            longest, began = max(longest, now - began), now
            # Not begun if it may well end late.
            if now + longest > until:
                return ended

    def _unreported(self) -> list[bytes]:
        """Keys of rows that ended elsewhere, without those that have a row again."""
        core = self._core
        keys = list(dict.fromkeys(core.unreported))
        core.unreported = []
        if not keys:
            return []
        slots = core.bring_in(PackedKeys.from_list(keys))
        live = slots >= 0
        live[live] = (core.table.flags[slots[live]] & _NOT_LIVE) == 0
        core.make_room()
        return [key for key, is_live in zip(keys, live.tolist(), strict=True) if not is_live]

    def _slice(self, ended: list[bytes]) -> bool:
        core = self._core
        if self._slot == 0 and not self._on_disk:
            if self._done >= core.horizon:
                return False
            self._target = core.horizon
        if not self._on_disk:
            out = np.empty(_KILL_ROWS, np.int64)
            end = min(self._slot + _SCAN_SLOTS, core.table.allocated)
            self._slot, count = kernels.expired_scan(
                core.table.records, self._slot, end, self._target, core.lives.mask, out
            )
            self._end(out[:count], ended)
            if self._slot < core.table.allocated:
                return True
            self._slot = 0
            self._on_disk = core.disk is not None
            self._ages.rewind()
            # A row that came late has its entry where the last walk has been.
            self._ages.back_to(core.lowest_unswept_ms)
            core.lowest_unswept_ms = 2**62
        else:
            found, done = self._ages.step(self._target, _WALK_ROWS, end=True)
            ended += [aged.key for aged in found if aged.is_row]
            self._on_disk = not done
        if not self._on_disk:
            self._done = self._target
        return True

    def _end(self, slots: Int64, ended: list[bytes]) -> None:
        core = self._core
        if slots.shape[0]:
            admitted = slots[(core.table.flags[slots] & layout.WAITING) == 0]
            ended += core.table.keys(admitted).to_list()
            core.expired += int(admitted.shape[0])
            core.kill(slots)


class Cap:
    """Keeps the number of live rows at max_rows."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._ages = Ages(core)
        self._commits = -1
        self._queue: Int64 = np.empty(0, np.int64)
        self._times: Int64 = np.empty(0, np.int64)
        self._at = 0
        # Kept only for a caller who asks for it, or it would grow without limit.
        self.ended: list[bytes] | None = None

    def touched(self, slots: Int64) -> None:
        """Told of slots that were changed: a row older than what the queue holds makes it incomplete."""
        if self._at < self._queue.shape[0]:
            known = slots[slots >= 0]
            if known.shape[0] and self._core.table.aged(known).min() < self._times[-1]:
                self._queue = self._queue[:0]
                self._at = 0

    def enforce(self) -> None:
        """End the oldest rows until there are max_rows."""
        core = self._core
        limit = core.options.max_rows
        while limit is not None and core.rows > limit:
            wanted = min(core.rows - limit, _CAP_ROWS)
            slots, times = self._oldest_in_memory(wanted)
            if core.disk is not None:
                slots = self._merge_disk(wanted, slots, times)
            if not slots.shape[0]:
                raise StoreError(f"{core.origin}: {core.rows} rows counted and none found; restore the table")
            if self.ended is not None:
                self.ended += core.table.keys(slots).to_list()
            core.capped += int(slots.shape[0])
            core.kill(slots)

    def _merge_disk(self, wanted: int, slots: Int64, times: Int64) -> Int64:
        core = self._core
        if self._commits != core.commits:
            # Entries of rows that ended can be dropped only after the commit that made their end certain.
            self._commits = core.commits
            self._ages.rewind()
        self._ages.back_to_rows()
        self._ages.back_to(core.lowest_age_ms)
        core.lowest_age_ms = 2**62
        latest = int(times[-1]) if slots.shape[0] == wanted else 2**62
        found: list[Aged] = []
        done = False
        while len(found) < wanted and not done:
            more, done = self._ages.step(latest, max(wanted, _WALK_ROWS))
            found += [aged for aged in more if aged.is_row]
        if not found:
            return slots
        every = np.concatenate([times, np.array([aged.ms for aged in found], np.int64)])
        chosen = np.sort(np.argsort(every, kind="stable")[:wanted])
        mine = chosen[chosen < slots.shape[0]]
        taken = chosen.shape[0] - mine.shape[0]
        if taken < len(found):
            self._ages.back_to(found[taken].ms, found[taken].key)
        if not taken:
            kept: Int64 = slots[mine]
            return kept
        brought = core.bring_in(PackedKeys.from_list([aged.key for aged in found[:taken]]))
        return np.concatenate([slots[mine], brought])

    def _oldest_in_memory(self, wanted: int) -> tuple[Int64, Int64]:
        """Up to `wanted` live slots, oldest first. The queue is a sorted part of all rows, consumed from the front.

        Rows updated since it was made have moved behind it, so what is left of it is still the oldest.
        """
        found = self._take(wanted)
        if found.shape[0] < wanted:
            self._refill(wanted)
            found = self._take(wanted)
        return self._queue[found], self._times[found]

    def _take(self, wanted: int) -> Int64:
        """Positions in the queue of its first `wanted` rows that still are as they were."""
        table = self._core.table
        parts: list[Int64] = []
        have, at = 0, self._at
        while have < wanted and at < self._queue.shape[0]:
            stop = min(at + 2 * wanted + 64, self._queue.shape[0])
            slots = self._queue[at:stop]
            live = table.in_use[slots] != 0
            live &= (table.flags[slots] & _NOT_LIVE) == 0
            live &= table.aged(slots) == self._times[at:stop]
            part = np.flatnonzero(live)[: wanted - have] + at
            if not have:
                self._at = int(part[0]) if part.shape[0] else stop
            parts.append(part)
            have += part.shape[0]
            at = stop
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _refill(self, wanted: int) -> None:
        used = self._core.live_slots()
        last = self._core.table.aged(used)
        size = min(used.shape[0], max(wanted, used.shape[0] // 16))
        if 0 < size < used.shape[0]:
            part = np.argpartition(last, size - 1)[:size]
            used, last = used[part], last[part]
        order = np.lexsort((used, last))
        self._queue, self._times, self._at = used[order], last[order], 0
