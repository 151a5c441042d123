"""A checkpoint of one table: what the changelog is owed, given out in slices, then written to disk.

Guarantees: every row changed, and every key deleted, before the freeze is in the slices or in an earlier
checkpoint; a row in them may be newer than the freeze, which applied_offset makes harmless; commit writes exactly
what the slices gave out and then meta; whatever changed after it was given out is owed to the next checkpoint.
Abandoning, or a crash at any point, leaves everything owed that disk and changelog do not both have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from rocksdict import RdictIter

from stream.errors import StoreError
from stream.store import kernels, layout, rows
from stream.store.disk import Batch, age_key
from stream.store.keys import PackedKeys
from stream.store.sketch import page_key

if TYPE_CHECKING:
    from stream.store.core import Core

__all__ = ["Checkpoint"]

Slice = tuple[list[bytes], list[bytes | None]]

# Rows that are put into the order of their keys together: RocksDB takes them in that order for half the time. More
# would hold the lock for longer than a millisecond.
_SORTED_ROWS = 16_384


class Piece:
    """What is written to disk together: a batch, and the keys and slots that it is about."""

    def __init__(self, batch: Batch | None, number: int) -> None:
        self.batch = batch
        self.number = number
        self.keys: list[bytes] = []
        self.slots: list[npt.NDArray[np.int64]] = []


class Checkpoint:
    """Made by EmbeddingStore.checkpoint(); one at a time. Updates may go on between its calls.

    Use it as: for keys, encoded in checkpoint.slices(1000): send them; then checkpoint.commit(meta).
    """

    def __init__(self, core: Core, atomic: bool) -> None:
        self._core = core
        self._table = core.table
        self._disk = core.disk
        self._atomic = atomic
        self.horizon_ms = core.horizon
        self.watermark_ms = core.watermark
        self._owed: RdictIter | None = None
        if self._disk is not None:
            self._owed = self._disk.iterate("owed")
            self._owed.seek_to_first()
        self._pieces: list[Piece] = []
        # Slots that joined after the freeze, and the piece that each belongs to.
        self._joined: dict[int, int] = {}
        # Frozen keys that left memory before they were given out, and keys spilled since they were.
        self._left: list[bytes] = []
        self.spilled: set[bytes] = set()
        self._table.pending = self._table.dirty
        self._table.dirty = np.zeros_like(self._table.pending)
        # The sketch's counts cannot say which events are in them, so they are taken as they are now.
        self.pages = core.sketch.take_changed() if core.sketch is not None else {}
        self._cursor = 0
        # Slots before the cursor that are still to be given out.
        self._window = np.empty(0, np.int64)
        self._memory_done = False
        self._sliced = False
        self._open = True
        self.rows = 0
        self.tombstones = 0

    def _piece(self) -> Piece:
        if not self._pieces or not self._atomic:
            batch = self._disk.batch() if self._disk is not None else None
            self._pieces.append(Piece(batch, len(self._pieces)))
        return self._pieces[-1]

    def slices(self, max_rows: int) -> Iterator[Slice]:
        """Yield (keys, rows) of at most max_rows each; a row of None is a tombstone. To be walked once, to the end.

        The store is locked only while a slice is made, not while the caller holds it.
        """
        self._check()
        if max_rows < 1:
            raise StoreError(f"checkpoint slices: max_rows {max_rows}; at least 1 is needed")
        if self._sliced:
            raise StoreError("checkpoint: slices were already given out; take a new checkpoint to have them again")
        self._sliced = True
        while True:
            with self._core.lock:
                self._check()
                slots = self._next_slots(max_rows)
                made = self._from_memory(slots, self._piece()) if slots.shape[0] else None
                self._memory_done = made is None
            if made is None:
                break
            yield made
        pages = sorted(self.pages)
        for start in range(0, len(pages), max_rows):
            part = pages[start : start + max_rows]
            yield [page_key(page) for page in part], [self.pages[page] for page in part]
        if self._disk is None:
            return
        assert self._owed is not None
        # A row read back from disk costs about four times one from memory.
        limit = max(1, max_rows // 4)
        while True:
            with self._core.lock:
                self._check()
                found = [key for key, _ in self._disk.walk(self._owed, limit)]
                made = self._from_disk(found) if found else None
            if made is None:
                break
            if made[0]:
                yield made
        while self._left:
            with self._core.lock:
                self._check()
                found = self._left[:limit]
                del self._left[:limit]
                made = self._from_disk(found)
            if made[0]:
                yield made

    def commit(self, meta: Mapping[str, bytes] | None = None) -> None:
        """Write what the slices gave out, and then meta, to disk: all at once if the checkpoint is atomic.

        Otherwise slice by slice, the store being locked for one at a time. A crash in between leaves rows newer than
        meta; restoring the changelog from the position in meta makes them whole, so commit after the changelog
        has them. Raises StoreError if the slices were not walked to the end, or where the disk fails.
        """
        for _ in self.commit_steps(meta):
            pass

    def commit_steps(self, meta: Mapping[str, bytes] | None = None) -> Iterator[None]:
        """commit(), pausing after each write. To be walked to the end."""
        with self._core.lock:
            self._check()
            if not self._memory_done or self._left or (self._owed is not None and self._owed.valid()):
                raise StoreError("checkpoint: commit before every slice was given out; walk slices() to its end")
            self._owed = None
            self._pieces = self._pieces or [self._piece()]
        while True:
            with self._core.lock:
                self._check()
                piece = self._pieces.pop(0)
                last = not self._pieces
                slots = np.concatenate([np.empty(0, np.int64), *piece.slots])
                slots = slots[self._table.test_bits(self._table.pending, slots)]
                if self._joined:
                    here = [self._joined.get(slot, piece.number) == piece.number for slot in slots.tolist()]
                    slots = slots[np.array(here, np.bool_)]
                self._core.settle(self, piece, slots, dict(meta or {}) if last else None)
                if last:
                    self._open = False
                    self._core.open_checkpoint = None
                    return
            yield

    def abandon(self) -> None:
        """Give up: what is not written yet is owed to the next checkpoint."""
        with self._core.lock:
            if self._open:
                self._open = False
                self._table.dirty |= self._table.pending
                self._table.pending[:] = 0
                self._table.flags[: self._table.allocated] &= np.uint8(0xFF ^ layout.TOMB)
                if self._core.sketch is not None:
                    self._core.sketch.changed[list(self.pages)] = True
                self._core.open_checkpoint = None
                self._owed = None
                self._pieces = []

    def leaving(self, slots: npt.NDArray[np.int64]) -> None:
        """Told by the store, under its lock, of slots that are spilled or leave memory."""
        frozen = slots[self._table.test_bits(self._table.pending, slots)]
        self._table.clear_bits(self._table.pending, frozen)
        if not self._memory_done:
            waiting = (frozen >= self._cursor) | np.isin(frozen, self._window)
            self._left += self._table.keys(frozen[waiting]).to_list()

    def _check(self) -> None:
        if not self._open:
            raise StoreError("checkpoint: already committed or abandoned; take a new one")

    def _next_slots(self, max_rows: int) -> npt.NDArray[np.int64]:
        """Up to max_rows frozen slots that were not given out, in about the order of their keys; none at the end."""
        table = self._table
        while True:
            if not self._window.shape[0]:
                window = np.empty(max(_SORTED_ROWS, max_rows), np.int64)
                self._cursor, count = kernels.next_set(table.pending, self._cursor, window)
                if not count:
                    return self._window
                self._window = table.by_key(window[:count])
            slots, self._window = self._window[:max_rows], self._window[max_rows:]
            # Those that left meanwhile are given out from disk.
            slots = slots[table.test_bits(table.pending, slots)]
            if slots.shape[0]:
                return slots

    def _from_memory(self, slots: npt.NDArray[np.int64], piece: Piece) -> Slice:
        table, core = self._table, self._core
        table.clear_bits(table.dirty, slots)
        keys = table.keys(slots).to_list()
        encoded = core.encode(slots)
        flags = table.flags[slots]
        no_row = (flags & (layout.DEAD | layout.WAITING)) != 0
        table.flags[slots] = np.where(no_row, flags | layout.TOMB, flags & np.uint8(0xFF ^ layout.TOMB))
        # From here on the batch is as new as disk; what is spilled later than this is newer again.
        if self.spilled:
            self.spilled.difference_update(keys)
        piece.keys += keys
        piece.slots.append(slots.copy())
        batch = piece.batch
        if batch is not None:
            batch.put_all("rows", keys, encoded)
            if core.aged:
                aged = ((flags & layout.AGED) != 0).tolist()
                for key, row, known, ms in zip(keys, encoded, aged, table.aged(slots).tolist(), strict=True):
                    if row is not None and not known:
                        batch.put("ages", age_key(ms, key), b"")
        self._count(encoded)
        return keys, encoded

    def _from_disk(self, keys: list[bytes]) -> Slice:
        """The slice for keys that disk owes; those in memory are taken from there."""
        piece = self._piece()
        batch = piece.batch
        assert self._disk is not None
        assert batch is not None
        table = self._table
        for key in keys:
            batch.delete("owed", key)
        packed = PackedKeys.from_list(keys)
        slots, _ = table.find(packed, table.hashes(packed))
        absent = np.flatnonzero(slots < 0)
        values = self._disk.get([keys[i] for i in absent.tolist()])
        out_keys: list[bytes] = []
        encoded: list[bytes | None] = []
        for i, value in zip(absent.tolist(), values, strict=True):
            header = None if value is None else rows.read_headers([value], str(self._disk.path))[0]
            if value is None or header is None or header["kind"] == rows.TOMBSTONE:
                batch.delete("rows", keys[i])
                value = None
            else:
                batch.put("rows", keys[i], value)
            self.spilled.discard(keys[i])
            piece.keys.append(keys[i])
            out_keys.append(keys[i])
            encoded.append(value)
        self._count(encoded)
        # This batch ends what all of them owe, also of those that another piece gave out: one that is spilled
        # after that owes again, and settling this piece must know.
        piece.keys += [keys[i] for i in np.flatnonzero(slots >= 0).tolist()]
        # A slot whose pending bit is set was given out already; the others join this checkpoint now.
        held = slots[slots >= 0]
        held = held[~table.test_bits(table.pending, held)]
        if held.size:
            table.set_bits(table.pending, held)
            self._joined.update(dict.fromkeys(held.tolist(), piece.number))
            more_keys, more = self._from_memory(held, piece)
            out_keys += more_keys
            encoded += more
        return out_keys, encoded

    def _count(self, encoded: list[bytes | None]) -> None:
        tombstones = encoded.count(None)
        self.tombstones += tombstones
        self.rows += len(encoded) - tombstones
