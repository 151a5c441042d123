"""Rows in memory: a float arena, records beside it, and the index that finds a slot by whole key.

Guarantees: two keys never share a slot; a freed slot is reused, and cleared before it is; the index never
degrades through deletions. Does not lock, knows nothing of disk or expiry, and may move its arrays whenever
slots are added: read `vectors` and the other views anew after that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from stream.errors import StoreError
from stream.store import arena, kernels, layout, probing
from stream.store.hashing import hash_keys
from stream.store.keys import MAX_KEY_BYTES, PackedKeys
from stream.store.lives import Lives

__all__ = ["Hasher", "Maker", "Table"]

Int64 = npt.NDArray[np.int64]
Uint64 = npt.NDArray[np.uint64]
Hasher = Callable[[PackedKeys], Uint64]
Maker = Callable[[int, int, npt.DTypeLike, int], npt.NDArray[Any]]

_MAX_LOAD = 0.85
_NO_HASHES = np.empty(0, np.uint64)


class Table:
    """Slots 0 to capacity - 1, each with `floats` float32 values and a record.

    reserve: rows to make room for at once; that memory is only used once rows are. hasher: replaces the hash,
    uint64[n] for n keys (tests make all hashes equal). make: where arrays come from, by rows, columns, type and the
    rows to have room for; zeros are needed of it. The table is then not to outgrow `reserve`, and its owner sees to
    the room for rows and records. lives: how long rows live; if not given, all equally long.
    """

    def __init__(
        self,
        floats: int,
        reserve: int,
        seed: int,
        hasher: Hasher | None = None,
        make: Maker | None = None,
        lives: Lives | None = None,
    ) -> None:
        self.lives = lives if lives is not None else Lives()
        self._seed = np.uint64(seed)
        self._hasher = hasher
        self._make = make
        if make is None:
            self.rows: npt.NDArray[np.float32] = arena.reserve(reserve, floats, np.float32)
            self.records: Uint64 = arena.reserve(reserve, layout.RECORD_WORDS, np.uint64)
            self._index: Uint64 = arena.reserve(int(reserve / _MAX_LOAD) + 64, 1, np.uint64).reshape(-1)
            self._entries: Uint64 = self._index[:64]
        else:
            self.rows = make(reserve, floats, np.float32, 0)
            self.records = make(reserve, layout.RECORD_WORDS, np.uint64, 0)
            size = int(reserve / _MAX_LOAD) + 64
            self._entries = self._index = make(size, 1, np.uint64, size).reshape(-1)
        self._overflow = np.empty(0, np.uint64)
        self._counters = np.zeros(layout.COUNTERS, np.int64)
        self._counters[layout.FREE_HEAD] = -1
        self._classes = np.full(MAX_KEY_BYTES // 8 + 1, -1, np.int64)
        self._hand = 0
        # Events held for slots that wait for admission; empty in most tables.
        self.held: dict[int, list[bytes]] = {}
        # One bit a slot: changed since the last checkpoint froze, and part of the one being taken.
        self.dirty = np.zeros(reserve // 64 + 1, np.uint64)
        self.pending = np.zeros(reserve // 64 + 1, np.uint64)
        self._view()

    def _view(self) -> None:
        words = self.records.view(np.int64)
        self.meta: Int64 = words[:, 2:5]
        self.events_seen: Int64 = words[:, 2]
        self.last_event_ms: Int64 = words[:, 3]
        self.applied_offset: Int64 = words[:, 4]
        self.flags: npt.NDArray[np.uint8] = self.records.view(np.uint8)[:, 42]
        self.recency: npt.NDArray[np.uint8] = self.records.view(np.uint8)[:, 43]
        self.in_use: npt.NDArray[np.uint16] = self.records.view(np.uint16)[:, 20]

    @property
    def capacity(self) -> int:
        """Slots there is room for now."""
        return int(self.rows.shape[0])

    @property
    def allocated(self) -> int:
        """One above the highest slot ever used."""
        return int(self._counters[layout.ALLOCATED])

    def __len__(self) -> int:
        return int(self._counters[layout.LIVE])

    @property
    def overhead_bytes(self) -> int:
        """Bytes in use beyond the float arena."""
        used = self.allocated * layout.RECORD_WORDS * 8
        return used + self._entries.nbytes + int(self._counters[layout.OVERFLOW_TOP]) * 8

    def hashes(self, keys: PackedKeys) -> Uint64:
        """64-bit hashes of the keys."""
        if self._hasher is not None:
            return self._hasher(keys)
        hashed: Uint64 = hash_keys(keys.buffer, keys.offsets, self._seed)
        return hashed

    def find(self, keys: PackedKeys, hashes: Uint64) -> tuple[Int64, int]:
        """Slots int64[n], -1 where absent, and the number absent."""
        slots = np.empty(len(keys), np.int64)
        missing = probing.find(self._entries, self.records, self._overflow, keys.buffer, keys.offsets, hashes, slots)
        return slots, missing

    def insert(self, keys: PackedKeys, hashes: Uint64, slots: Int64, missing: int) -> Int64:
        """Fill slots that are -1 in place; duplicates share a slot. Returns the positions of first occurrences.

        New slots have events_seen 0, last_event_ms 0, applied_offset -1 and no flags; their floats are zero.
        """
        n = len(keys)
        self._make_index_room(missing)
        created = np.empty(missing, np.int64)
        # Slots from here on were never used, so their floats are zeros, and need no memory yet.
        fresh = self.allocated
        position, done = 0, 0
        while True:
            position, done = probing.insert(
                self._entries,
                self.records,
                self._overflow,
                self._counters,
                self._classes,
                keys.buffer,
                keys.offsets,
                hashes,
                slots,
                created,
                done,
                position,
                self.lives.mask,
                self.lives.default_lag,
            )
            if position == n:
                break
            if self._counters[layout.FREE_HEAD] < 0 and self.allocated >= self.capacity:
                self._grow(min(missing - done, n - position))
            else:
                self._make_overflow_room(keys, position)
        created = created[:done]
        new = slots[created]
        kernels.zero_rows(self.rows, new[new < fresh])
        return created

    def remove(self, slots: Int64) -> None:
        """Free distinct slots in use."""
        self.clear_bits(self.dirty, slots)
        self.clear_bits(self.pending, slots)
        if self.held:
            for slot in slots.tolist():
                self.held.pop(slot, None)
        # Where records keep lags they do not keep tags.
        hashes = self.hashes(self.keys(slots)) if self.lives.several else _NO_HASHES
        probing.remove(self._entries, self.records, self._overflow, self._counters, self._classes, slots, hashes)

    def keys(self, slots: Int64) -> PackedKeys:
        """The keys at slots in use."""
        lengths = np.empty(slots.shape[0], np.int64)
        probing.key_lengths(self.records, slots, lengths)
        offsets = np.zeros(slots.shape[0] + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        buffer = np.empty(int(offsets[-1]), np.uint8)
        probing.copy_keys(self.records, self._overflow, slots, offsets, buffer)
        return PackedKeys(buffer, offsets)

    def by_key(self, slots: Int64) -> Int64:
        """Slots in use in about the order of their keys: by eight bytes, see probing.sort_words."""
        words = np.empty(slots.shape[0], np.uint64)
        probing.sort_words(self.records, self._overflow, slots, words)
        return slots[np.argsort(words)]

    @property
    def unsaved(self) -> int:
        """Slots whose row disk does not hold as it is."""
        return int(self._counters[layout.UNSAVED_ROWS])

    def mark(self, slots: Int64) -> None:
        """Make slots dirty and recently used; -1 is passed over."""
        kernels.mark(self.records, self._counters, self.dirty, slots)

    def clean(self, slots: Int64) -> None:
        """Note that disk holds the rows at slots as they are."""
        kernels.clean(self.records, self._counters, slots)

    @staticmethod
    def test_bits(bits: Uint64, slots: Int64) -> npt.NDArray[np.bool_]:
        """Which of the slots have their bit set."""
        hit: npt.NDArray[np.bool_] = ((bits[slots >> 6] >> (slots & 63).astype(np.uint64)) & np.uint64(1)) != 0
        return hit

    @staticmethod
    def set_bits(bits: Uint64, slots: Int64) -> None:
        """Set the bits of slots."""
        np.bitwise_or.at(bits, slots >> 6, np.uint64(1) << (slots & 63).astype(np.uint64))

    @staticmethod
    def clear_bits(bits: Uint64, slots: Int64) -> None:
        """Clear the bits of slots."""
        kernels.clear_bits(bits, slots)

    def scatter(
        self,
        slots: Int64,
        values: npt.NDArray[np.float32],
        when: Int64,
        applied: Int64,
        life_ms: Int64 | None,
        horizon: int,
    ) -> int:
        """Write vectors to slots in order; returns how many rows expired meanwhile. See kernels.scatter."""
        lags = when
        if self.lives.several:
            lags = self.lives.lags(np.zeros_like(when) if life_ms is None else life_ms)
        return int(
            kernels.scatter(self.records, self.rows, slots, values, when, applied, lags, horizon, self.lives.mask)
        )

    def aged(self, slots: Int64) -> Int64:
        """What the rows at slots are ended and ordered by: last_event_ms where all live equally long. See lives."""
        if not self.lives.several:
            last: Int64 = self.last_event_ms[slots]
            return last
        out = np.empty(slots.shape[0], np.int64)
        kernels.aged(self.records, slots, self.lives.mask, out)
        return out

    def account(self, slots: Int64) -> Int64:
        """All of the rows at slots but their floats, int64[n, 4]: `meta`, and how long they live after it."""
        out = np.empty((slots.shape[0], 4), np.int64)
        kernels.accounts(self.records, slots, self.lives.mask, out)
        if self.lives.several:
            out[:, 3] = self.lives.life_ms(out[:, 3])
        return out

    def set_account(self, slots: Int64, account: Int64) -> None:
        """Set what account() gives."""
        self.meta[slots] = account[:, :3]
        if self.lives.several:
            self.lives.write(self.records, slots, self.lives.lags(account[:, 3]))

    def used_slots(self) -> Int64:
        """All slots in use, ascending."""
        return np.flatnonzero(self.in_use[: self.allocated])

    def choose_victims(self, wanted: int, *, spill: bool) -> Int64:
        """Up to `wanted` slots in use that may leave memory, least recently used first."""
        out = np.empty(wanted, np.int64)
        self._hand, count = kernels.evict(self.records, self._hand, self.allocated, wanted, spill, out)
        return out[:count]

    def _make_index_room(self, more: int) -> None:
        size = self._entries.shape[0]
        need = int((len(self) + more) / _MAX_LOAD) + 1
        if need <= size:
            return
        larger = max(need, int(size * 1.25))
        if larger > self._index.shape[0]:
            self._index = arena.reserve(2 * larger, 1, np.uint64).reshape(-1)
            self._index[:size] = self._entries
        probing.expand(self._index[:larger], size)
        self._entries = self._index[:larger]

    def _grow(self, more: int) -> None:
        capacity = self.capacity + max(more, self.capacity, 64)
        if capacity >= 2**32 - 1:
            raise StoreError(f"store: {capacity} rows in one table; at most {2**32 - 2} fit, use more partitions")
        used = self.allocated
        for name in ("rows", "records"):
            old = getattr(self, name)
            new = arena.reserve(capacity, old.shape[1], old.dtype)
            new[:used] = old[:used]
            setattr(self, name, new)
        for name in ("dirty", "pending"):
            bits = np.zeros(capacity // 64 + 1, np.uint64)
            bits[: getattr(self, name).shape[0]] = getattr(self, name)
            setattr(self, name, bits)
        self._view()

    def _make_overflow_room(self, keys: PackedKeys, position: int) -> None:
        need = int(keys.offsets[-1] - keys.offsets[position]) // 8 + len(keys) - position
        used = int(self._counters[layout.OVERFLOW_TOP])
        free = int(self._counters[layout.OVERFLOW_FREE])
        # Compacting costs a pass over all records, so it must win back a fair share to be worth it.
        kept = used - free if free * 4 >= used else used
        size = max(kept + need, int(kept * 1.5))
        target: Uint64 = np.empty(size, np.uint64)
        if self._make is not None:
            target = self._make(size, 1, np.uint64, size).reshape(-1)
        if kept == used:
            target[:used] = self._overflow[:used]
        else:
            probing.compact_overflow(self.records, self._overflow, target, self._counters, self._classes)
        self._overflow = target
