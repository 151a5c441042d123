"""The embedding store: one table of rows found by whole key, in memory and on disk.

Guarantees: a lookup, from any thread, sees whole rows and never an expired or deleted one; a row is found
wherever it is; what the changelog has not seen is remembered through a crash; a failed update changes nothing.
One thread writes. Two that do are serialised, in no stated order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from stream.errors import StoreError
from stream.store import kernels, layout, rows
from stream.store.access import Lookup, Stats, Update
from stream.store.admission import Admission, observe
from stream.store.checkpoint import Checkpoint
from stream.store.core import Core
from stream.store.disk import Disk
from stream.store.expiry import Cap, Sweep
from stream.store.keys import PackedKeys
from stream.store.options import StoreOptions
from stream.store.reading import read_tiers
from stream.store.restoring import load_snapshot, restore
from stream.store.snapshot import Snapshot
from stream.store.table import Hasher

__all__ = ["EmbeddingStore", "Keys"]

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]
Keys = PackedKeys | Sequence[bytes]


def _packed(keys: Keys) -> PackedKeys:
    return keys if isinstance(keys, PackedKeys) else PackedKeys.from_list(keys)


class EmbeddingStore:
    """A table. Made by EmbeddingStore.open(path, options); a context manager that closes it."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._cap = Cap(core)
        self._sweep = Sweep(core)
        self._default = np.zeros(core.options.width, np.float32)

    @classmethod
    def open(cls, path: Path | str | None, options: StoreOptions, *, hasher: Hasher | None = None) -> Self:
        """Open the table at path, made if it is not there; None keeps it in memory only.

        hasher: PackedKeys to uint64[n], in place of the store's own hash; any function does, a poor one is slow.
        Raises StoreError, or its StoreLocked, StoreCorrupt, StoreFull, StoreReadOnly, naming the path.
        """
        if path is None:
            if options.memory_rows is not None:
                raise StoreError(
                    f"store.memory_rows: {options.memory_rows} without a path to keep the other rows at; give a "
                    "path, or max_rows instead"
                )
            return cls(Core(None, options, hasher))
        disk = Disk(
            Path(path),
            options.width,
            options.state_width,
            sync=options.sync,
            block_cache_bytes=options.block_cache_bytes,
        )
        try:
            return cls(Core(disk, options, hasher))
        except BaseException:
            disk.close()
            raise

    def close(self) -> None:
        """Let go of the directory. Rows changed since the last commit are not written: their events replay."""
        core = self._core
        with core.lock:
            if core.is_open:
                if core.open_checkpoint is not None:
                    core.open_checkpoint.abandon()
                if core.snapshot is not None:
                    core.snapshot.close()
                core.is_open = False
                if core.cold is not None:
                    core.cold.close()
                    core.cold = None
                if core.disk is not None:
                    core.disk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- views ---------------------------------------------------------------------------------------------

    @property
    def options(self) -> StoreOptions:
        """What the table was opened with."""
        return self._core.options

    @property
    def lock(self) -> threading.RLock:
        """Held by every operation; hold it to make several of them one."""
        return self._core.lock

    @property
    def vectors(self) -> Float32:
        """float32[capacity, width], by slot. Read it anew after every update() begins: it moves when it grows."""
        return self._core.table.rows[:, : self._core.options.width]

    @property
    def rows(self) -> Float32:
        """float32[capacity, width + state_width], by slot: vectors and state side by side; moves as they do."""
        return self._core.table.rows

    @property
    def state(self) -> Float32:
        """float32[capacity, state_width] of optimizer state, by slot; moves as `vectors` does."""
        return self._core.table.rows[:, self._core.options.width :]

    @property
    def events_seen(self) -> Int64:
        """int64[capacity], by slot; strided; moves as `vectors` does."""
        return self._core.table.events_seen

    @property
    def last_event_ms(self) -> Int64:
        """int64[capacity], by slot; strided; moves as `vectors` does."""
        return self._core.table.last_event_ms

    @property
    def applied_offset(self) -> Int64:
        """int64[capacity], by slot, -1 for none; strided; moves as `vectors` does."""
        return self._core.table.applied_offset

    def __len__(self) -> int:
        """Live rows in memory and on disk, expired ones included until they are swept or met."""
        return self._core.rows

    @property
    def stats(self) -> Stats:
        """Sizes and counts."""
        core = self._core
        with core.lock:
            return Stats(
                core.rows,
                len(core.table),
                core.table.unsaved,
                core.admitted,
                core.expired,
                core.capped,
                core.evicted,
                core.spilled,
                core.disk_reads,
                core.held_dropped,
                core.table.overhead_bytes,
                0 if core.cold is None else len(core.cold),
                0 if core.cold is None else core.cold.nbytes,
            )

    @property
    def watermark_ms(self) -> int:
        """The latest event time the table was told of; -2**62 before the first."""
        return self._core.watermark

    @property
    def horizon_ms(self) -> int:
        """Rows last updated at or before this are expired: watermark less ttl, held back by min_rows over all rows.

        With event_ttls_ms, rows whose deadline less the longest ttl is at or before this.
        """
        return self._core.horizon

    def advance_watermark(self, ms: int) -> None:
        """Move event time forward; an earlier time changes nothing."""
        with self._core.lock:
            self._core.advance(ms)

    # -- reading -------------------------------------------------------------------------------------------

    def lookup(self, keys: Keys, default: npt.ArrayLike | None = None) -> Lookup:
        """Rows of the keys, from memory or disk; from any thread. Never makes a row.

        default: float32[width] for keys that have no row; zeros if not given.
        """
        core = self._core
        packed = _packed(keys)
        n = len(packed)
        base = self._default
        if default is not None:
            base = np.ascontiguousarray(default, np.float32)
            if base.shape != self._default.shape:
                raise StoreError(f"lookup default: shape {base.shape}; {self._default.shape} is needed")
        vectors = np.empty((n, base.shape[0]), np.float32)
        found = np.empty(n, np.bool_)
        meta = np.empty((n, 3), np.int64)
        hashes = core.table.hashes(packed)
        with core.lock:
            core.check()
            slots, missing = core.table.find(packed, hashes)
            table = core.table
            kernels.gather(
                table.records,
                table.rows,
                slots,
                core.horizon,
                core.lives.mask,
                base,
                vectors,
                found,
                meta,
                layout.RECENT,
            )
            if missing and core.disk is not None:
                read_tiers(core, packed, hashes, np.flatnonzero(slots < 0), vectors, found, meta)
        return Lookup(vectors, found, meta[:, 0], meta[:, 1], meta[:, 2])

    def scan(self, chunk_rows: int = 4096) -> Iterator[tuple[PackedKeys, Lookup]]:
        """All live rows, in chunks, while writing goes on: each key once, as it is when its chunk is read.

        Rows made after the start may be missing, rows deleted meanwhile are left out. For one instant's rows
        take a snapshot.
        """
        core = self._core
        with core.lock:
            core.check()
            used = core.table.used_slots()
            only_here = used[(core.table.flags[used] & layout.ON_DISK) == 0]
            in_memory = core.table.keys(only_here)
            iterator = core.disk.iterate("rows") if core.disk is not None else None
            if iterator is not None:
                iterator.seek_to_first()
        for start in range(0, len(in_memory), chunk_rows):
            yield from self._visit(in_memory.take(np.arange(start, min(start + chunk_rows, len(in_memory)))))
        while iterator is not None and core.disk is not None:
            with core.lock:
                core.check()
                entries = core.disk.walk(iterator, chunk_rows)
            if not entries:
                return
            # A waiting key's record here may belong to a row of the first part.
            yield from self._visit(PackedKeys.from_list([key for key, value in entries if value[1] == rows.ROW]))

    def _visit(self, keys: PackedKeys) -> Iterator[tuple[PackedKeys, Lookup]]:
        with self._core.lock:
            was, self._core.updating = self._core.updating, True
            try:
                found = self.lookup(keys)
            finally:
                self._core.updating = was
        if found.found.any():
            at = np.flatnonzero(found.found)
            yield keys.take(at), found.take(at)

    # -- admission -------------------------------------------------------------------------------------------

    def observe(
        self,
        keys: Keys,
        offsets: npt.ArrayLike | None = None,
        event_ms: npt.ArrayLike | None = None,
        payloads: Sequence[bytes] | None = None,
        ttl_ms: npt.ArrayLike | None = None,
    ) -> Admission:
        """Count occurrences of keys, before update(); needed where admission_threshold is above 1.

        offsets: int64[n]; an occurrence whose offset was counted before is not counted again; without them each
        counts. event_ms: int64[n] or one for all, the watermark if not given. payloads: the events themselves, to
        be held with keys that are not admitted yet. ttl_ms: int64[n] or one for all, as for prolong().
        Held are at most max_held_bytes a key. Each occurrence moves event time first, which began at the watermark,
        and is then judged by it; see Admission.stop for where a batch has to be cut, and the README for
        the whole of a caller. Raises StoreError where a table in sketch mode is given payloads.
        """
        core = self._core
        packed = _packed(keys)
        when = np.empty(len(packed), np.int64)
        when[:] = max(core.watermark, 0) if event_ms is None else event_ms
        applied = None if offsets is None else np.array(offsets, np.int64)
        with core.lock:
            core.check_idle()
            return observe(core, packed, applied, when, payloads, self._lives_of(ttl_ms, len(packed)))

    # -- changing ------------------------------------------------------------------------------------------

    def update(self, keys: Keys, now_ms: int | None = None, *, written_last: int = 0) -> Update:
        """A context in which the rows of keys may be changed in place: `with store.update(keys) as slots`.

        slots: int64[n]; duplicates share one, -1 where a key is not admitted yet. A key without a row has a new
        one (zero vector, or drawn from the key where init_scale is set; events_seen 0, last_event_ms 0,
        applied_offset -1); an expired or deleted row starts anew but keeps its applied_offset. now_ms: event time
        to advance the watermark to first. Leaving makes the rows dirty; leaving with an exception puts every row
        back as it was. Not to be nested; other threads wait meanwhile.

        written_last: so many floats of each row, the first ones, are not kept for that: the caller writes them when
        nothing can fail any more, and calls nothing that does. A copy of every row costs as much as writing it.
        """
        return Update(self._core, self._cap, _packed(keys), now_ms, written_last)

    def reset_expired(self, slots: Int64, watermarks_ms: Int64) -> Bool:
        """Inside update(): start anew the rows that are expired against their own watermark, int64[n].

        For a batch whose events each move event time, so that the result is that of one event at a time. The floor
        has no say here. Not for tables with exact admission, where observe() has judged. slots are distinct.
        Returns bool[n], true where a row started anew.
        """
        core, table = self._core, self._core.table
        ttl = core.lives.longest_ms
        if ttl is None:
            return np.zeros(slots.shape[0], np.bool_)
        used = (table.last_event_ms[slots] != 0) | (table.events_seen[slots] != 0)
        reset: Bool = used & (table.aged(slots) <= watermarks_ms - ttl) & (slots >= 0)
        at = slots[reset]
        if at.shape[0]:
            table.events_seen[at] = 0
            table.last_event_ms[at] = 0
            core.lives.write(table.records, at, np.full(at.shape[0], core.lives.default_lag))
            kernels.zero_rows(table.rows, at)
            core.initialise(table.keys(at), np.arange(at.shape[0]), at)
            core.expired += int(at.shape[0])
        return reset

    def prolong(self, slots: Int64, event_ms: Int64, ttl_ms: Int64) -> None:
        """Inside update(), before events change the rows at slots: let each keep its row alive for a time of its own.

        slots, event_ms, ttl_ms: int64[n], one of each an event that will be applied; duplicates are allowed. Where
        that is later, a row's deadline becomes event_ms + ttl_ms; ttl_ms is FOR_EVER, or between the shortest and the
        longest of the options' ttls. The caller then sets last_event_ms to event_ms where that is later. A row that
        is updated without this lives as long after its last_event_ms as it did before, a new one for options.ttl_ms.
        Does nothing in a table without event_ttls_ms.
        """
        lives, table = self._core.lives, self._core.table
        lives.prolong(table.records, slots, event_ms, lives.checked(ttl_ms))

    def aged(self, slots: Int64) -> Int64:
        """int64[n] for rows at slots: compared with horizon_ms it says whether they are expired.

        Deadline less the longest ttl; last_event_ms where all rows live equally long.
        """
        return self._core.table.aged(slots)

    def aged_at(self, event_ms: Int64, ttl_ms: Int64) -> Int64:
        """int64[n], what aged() is of rows that have had these events alone."""
        lives = self._core.lives
        return lives.aged(event_ms, lives.checked(ttl_ms))

    @property
    def longest_ttl_ms(self) -> int | None:
        """The longest time to live that ends; None where all rows live for ever."""
        return self._core.lives.longest_ms

    def _lives_of(self, ttl_ms: npt.ArrayLike | None, n: int) -> Int64:
        life = np.zeros(n, np.int64)
        if ttl_ms is not None:
            life[:] = self._core.lives.checked(np.asarray(ttl_ms, np.int64))
        return life

    def upsert(
        self,
        keys: Keys,
        vectors: npt.ArrayLike,
        event_ms: npt.ArrayLike | None = None,
        offsets: npt.ArrayLike | None = None,
        ttl_ms: npt.ArrayLike | None = None,
    ) -> None:
        """Set the vectors (float32[n, width]) of keys; of duplicates the last one stays.

        Per occurrence events_seen goes up by one, and last_event_ms and applied_offset to event_ms and offsets
        (each int64[n] or one for all) where that is later. Without event_ms the watermark is taken. ttl_ms: int64[n]
        or one for all, how long each keeps its row alive, as for prolong(); options.ttl_ms if not given.
        """
        core = self._core
        packed = _packed(keys)
        n = len(packed)
        values = np.ascontiguousarray(vectors, np.float32)
        if values.shape != (n, core.options.width):
            raise StoreError(f"upsert vectors: shape {values.shape}; ({n}, {core.options.width}) is needed")
        when = np.empty(n, np.int64)
        when[:] = max(core.watermark, 0) if event_ms is None else event_ms
        applied = np.full(n, -1, np.int64)
        if offsets is not None:
            applied[:] = offsets
        life = None if ttl_ms is None else self._lives_of(ttl_ms, n)
        with core.lock:
            slots, _ = core.begin(packed)
            core.expired += core.table.scatter(slots, values, when, applied, life, core.horizon)
            core.table.mark(slots)
            self._cap.touched(slots)
            core.floor.touched(slots)
            self._cap.enforce()
            core.make_room()

    def delete(self, keys: Keys, offsets: npt.ArrayLike | None = None) -> Bool:
        """Delete the rows of keys, and what is known of keys that wait for admission.

        Served no more from now on; durable from the next commit on, as every change. A crash before it undoes the
        deletion, and only a deletion that stands in the input comes again with the replay.

        offsets: int64[n] or one for all, the positions that asked for it: a row with a larger applied_offset
        stays, so that a replayed deletion takes nothing that came after it. Returns bool[n], true at the first
        occurrence of each key whose row was deleted.
        """
        core = self._core
        packed = _packed(keys)
        had = np.zeros(len(packed), np.bool_)
        asked = np.full(len(packed), np.iinfo(np.int64).max, np.int64)
        if offsets is not None:
            asked[:] = offsets
        with core.lock:
            core.check_idle()
            table = core.table
            slots = core.bring_in(packed)
            present = np.flatnonzero(slots >= 0)
            _, first = np.unique(slots[present], return_index=True)
            at = present[first]
            at = at[(table.flags[slots[at]] & layout.DEAD) == 0]
            at = at[table.applied_offset[slots[at]] <= asked[at]]
            is_row = (table.flags[slots[at]] & layout.WAITING) == 0
            had[at] = is_row & (table.aged(slots[at]) > core.horizon)
            core.expired += int(is_row.sum() - had.sum())
            if offsets is not None:
                table.applied_offset[slots[at]] = asked[at]
            core.kill(slots[at])
            core.make_room()
        return had

    def sweep(self, budget_ms: float = 5.0, clock: Callable[[], float] = time.perf_counter) -> list[bytes]:
        """End expired rows for at most budget_ms; returns their keys. Their tombstones come with the next checkpoint.

        Works in pieces of some tenths of a millisecond and stops before one that may not fit; being kept from the
        processor or the disk comes on top. Does nothing while a checkpoint is open, or after a whole pass until time
        moves on. clock: in seconds.
        """
        return self._sweep.run(budget_ms, clock)

    def take_capped(self) -> list[bytes]:
        """Keys that max_rows ended since the last call; the first call starts the keeping of them."""
        with self._core.lock:
            ended, self._cap.ended = self._cap.ended, []
            return ended or []

    # -- checkpoints ---------------------------------------------------------------------------------------

    def checkpoint(self, *, atomic: bool = False) -> Checkpoint:
        """Freeze what is owed to the changelog now.

        atomic: commit in one write, rather than slice by slice; for a table that no changelog can repair.
        Raises StoreError while another checkpoint is open.
        """
        core = self._core
        with core.lock:
            core.check_idle()
            if core.disk is None and not core.options.changelog:
                raise StoreError("store.changelog: False in a table without a path; checkpoints need one of the two")
            if core.open_checkpoint is not None:
                raise StoreError(f"{core.origin}: a checkpoint is open already; commit or abandon it first")
            core.open_checkpoint = Checkpoint(core, atomic)
            return core.open_checkpoint

    def flush(self, meta: Mapping[str, bytes] | None = None, slice_rows: int = 4096) -> int:
        """Write everything to disk in one atomic commit; returns the number of rows and tombstones.

        A checkpoint that no changelog waits for. Without a path and a changelog there is nothing to write to.
        """
        if self._core.disk is None and not self._core.options.changelog:
            return 0
        checkpoint = self.checkpoint(atomic=True)
        try:
            for _ in checkpoint.slices(slice_rows):
                pass
            checkpoint.commit(meta)
        except BaseException:
            checkpoint.abandon()
            raise
        return checkpoint.rows + checkpoint.tombstones

    # -- snapshots -----------------------------------------------------------------------------------------

    def snapshot(self, meta: Mapping[str, bytes] | None = None) -> Snapshot:
        """Fix the table as it is now, with meta (an input offset, say), for writing out while changes go on.

        Raises StoreError while another snapshot is being written.
        """
        core = self._core
        with core.lock:
            core.check_idle()
            if core.snapshot is not None:
                raise StoreError(f"{core.origin}: a snapshot is being written already; close it first")
            core.snapshot = Snapshot(core, meta or {})
            return core.snapshot

    def load(
        self,
        snapshots: Sequence[Path | str],
        keep: Callable[[PackedKeys], Bool] | None = None,
        *,
        forget_offsets: bool = False,
    ) -> list[dict[str, bytes]]:
        """Fill this empty table from snapshots of one or more; returns the meta that each was taken with.

        keep: PackedKeys to bool[n], the keys that belong here; for another number of partitions give all old
        partitions' snapshots, and forget_offsets, since offsets mean nothing in another partition. The watermark
        becomes the latest of theirs. Raises StoreError if the table holds anything, or has other widths;
        StoreCorrupt if a snapshot is damaged. After an error the table is to be thrown away.
        """
        core = self._core
        with core.lock:
            core.check_idle()
            if core.rows or len(core.table) or core.commits:
                raise StoreError(f"{core.origin}: load into a table in use; open an empty one")
            metas = [load_snapshot(core, directory, keep, forget_offsets) for directory in snapshots]
            if core.disk is not None:
                self.flush()
            return metas

    def meta(self, name: str) -> bytes | None:
        """What the last commit or restore wrote under this name."""
        return self._core.metas.get("user." + name)

    def restore(
        self, keys: Sequence[bytes], values: Sequence[bytes | None], meta: Mapping[str, bytes] | None = None
    ) -> int:
        """Apply changelog records in their order, with meta, in one atomic write; returns how many took effect.

        A None deletes; a row whose applied_offset is below that of the row here is passed over. Rows go to disk,
        not to memory. Raises StoreError for a record this store did not write, and while a checkpoint is open.
        """
        core = self._core
        with core.lock:
            core.check_idle()
            if core.open_checkpoint is not None:
                raise StoreError(f"{core.origin}: restore while a checkpoint is open; commit or abandon it first")
            return restore(core, keys, values, meta or {})
