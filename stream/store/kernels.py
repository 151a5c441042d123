"""Compiled batch operations on a table's rows and records. See layout for the data.

Guarantees: equal results on every machine, rows handled in the order given. Does not lock and does not know
what is on disk beyond the flags it is told.
"""

# mypy: disable-error-code="import-untyped,import-not-found,untyped-decorator,no-untyped-call"
from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from stream.store.hashing import prefetch
from stream.store.layout import AGED, DEAD, LENGTH_BITS, PINNED, RECENT, UNSAVED, UNSAVED_ROWS, WAITING
from stream.store.lives import aged_of, lag_of, prolonged, with_lag

__all__ = [
    "accounts",
    "aged",
    "clean",
    "clear_bits",
    "evict",
    "expired_scan",
    "gather",
    "initialise",
    "mark",
    "next_set",
    "renew",
    "scatter",
    "take_keys",
    "zero_rows",
]

_LENGTH = np.uint64(LENGTH_BITS)
_ONE = np.uint64(1)
_ZERO = np.uint64(0)
_CLOCK_SHIFT = np.uint64(24)
_CLOCK_MASK = np.uint64(0xFF << 24)
_NOT_CLOCK = np.uint64(0xFFFFFFFF00FFFFFF)
_NOT_LIVE = np.uint64((DEAD | WAITING) << 16)
_MAX_CLOCK = np.uint64(RECENT)
_AHEAD = 16


@njit(cache=True, nogil=True)
def mark(records: Any, counters: Any, dirty: Any, slots: Any) -> None:
    """Make slots (int64[n]; -1 is passed over) dirty, unsaved and recently used."""
    bits = np.uint64(UNSAVED << 16) | (_MAX_CLOCK << _CLOCK_SHIFT)
    for i in range(slots.shape[0]):
        slot = slots[i]
        if slot >= 0:
            word = records[slot, 5]
            if (word & np.uint64(UNSAVED << 16)) == _ZERO:
                counters[UNSAVED_ROWS] += 1
            records[slot, 5] = word | bits
            dirty[slot >> 6] |= _ONE << np.uint64(slot & 63)


@njit(cache=True, nogil=True)
def accounts(records: Any, slots: Any, mask: Any, out: Any) -> None:
    """Write events_seen, last_event_ms, applied_offset and lag of each slot into out (int64[n, 4]).

    A slot of -1 gives those of some row. mask: of lags; 0 gives lags of 0.
    """
    n = slots.shape[0]
    for i in range(n):
        if i + _AHEAD < n:
            prefetch(records, slots[i + _AHEAD] * records.shape[1] + 2)
        slot = slots[i]
        for k in range(3):
            out[i, k] = np.int64(records[slot, 2 + k])
        out[i, 3] = lag_of(records[slot, 5], mask) if mask != _ZERO else 0


@njit(cache=True, nogil=True)
def take_keys(buffer: Any, offsets: Any, index: Any) -> Any:
    """Keys of a buffer (uint8) with offsets (int64[n + 1]) at index (int64[m]): a buffer and offsets of their own.

    The first position in index that no key has, or -1, comes with them; then they are not to be used.
    """
    n, m = offsets.shape[0] - 1, index.shape[0]
    out_offsets = np.zeros(m + 1, np.int64)
    for i in range(m):
        if not 0 <= index[i] < n:
            return np.empty(0, np.uint8), out_offsets, i
        out_offsets[i + 1] = out_offsets[i] + offsets[index[i] + 1] - offsets[index[i]]
    out = np.empty(out_offsets[m], np.uint8)
    for i in range(m):
        shift = offsets[index[i]] - out_offsets[i]
        for at in range(out_offsets[i], out_offsets[i + 1]):
            out[at] = buffer[at + shift]
    return out, out_offsets, -1


@njit(cache=True, nogil=True)
def clean(records: Any, counters: Any, slots: Any) -> None:
    """Take UNSAVED from slots (int64[n])."""
    for i in range(slots.shape[0]):
        word = records[slots[i], 5]
        if (word & np.uint64(UNSAVED << 16)) != _ZERO:
            counters[UNSAVED_ROWS] -= 1
            records[slots[i], 5] = word & ~np.uint64(UNSAVED << 16)


@njit(cache=True, nogil=True)
def clear_bits(bits: Any, slots: Any) -> None:
    """Clear the bits of slots (int64[n])."""
    for i in range(slots.shape[0]):
        bits[slots[i] >> 6] &= ~(_ONE << np.uint64(slots[i] & 63))


@njit(cache=True, nogil=True)
def aged(records: Any, slots: Any, mask: Any, out: Any) -> None:
    """What the rows at slots are ended and ordered by, into out (int64[n]); see lives."""
    for i in range(slots.shape[0]):
        out[i] = aged_of(np.int64(records[slots[i], 3]), records[slots[i], 5], mask)


@njit(cache=True, nogil=True)
def next_set(bits: Any, cursor: Any, out: Any) -> Any:
    """Slots of the set bits from slot `cursor` on, into out; returns (next cursor, count)."""
    count = 0
    limit = out.shape[0]
    word = cursor >> 6
    if word >= bits.shape[0]:
        return cursor, count
    current = bits[word] & (~_ZERO << np.uint64(cursor & 63))
    while True:
        while current != _ZERO:
            if count == limit:
                return out[count - 1] + 1, count
            low = current & (~current + _ONE)
            position = 0
            for shift in (32, 16, 8, 4, 2, 1):
                if (low >> np.uint64(position + shift)) != _ZERO:
                    position += shift
            out[count] = (word << 6) + position
            count += 1
            current ^= low
        word += 1
        if word >= bits.shape[0]:
            return word << 6, count
        current = bits[word]


@njit(cache=True, nogil=True)
def renew(records: Any, rows: Any, slots: Any, horizon: Any, threshold: Any, mask: Any, lag: Any, renewed: Any) -> Any:
    """Make every slot of slots (int64[n]; -1 is passed over) a live row.

    A row that is dead or expired starts from zero, keeping applied_offset; a waiting key that has occurred
    `threshold` times becomes a new row; where neither may be, the entry of slots becomes -1. renewed (bool[n]) is
    set at first occurrences. mask, lag: of the table, and of a new row, where rows live differently long. Returns
    (rows that were not live before, newly admitted, expired).
    """
    revived = 0
    admitted = 0
    expired = 0
    for i in range(slots.shape[0]):
        slot = slots[i]
        if slot < 0:
            continue
        word = records[slot, 5]
        if (word & np.uint64(WAITING << 16)) != _ZERO:
            if np.int64(records[slot, 2]) < threshold:
                slots[i] = -1
                continue
            # The held events are applied next, so nothing counts as applied yet.
            records[slot, 4] = ~_ZERO
            revived += 1
            admitted += 1
        elif (word & np.uint64(DEAD << 16)) != _ZERO:
            if threshold > 1:
                slots[i] = -1
                continue
            revived += 1
        elif aged_of(np.int64(records[slot, 3]), word, mask) <= horizon and (
            records[slot, 2] != _ZERO or records[slot, 3] != _ZERO
        ):
            if threshold > 1:
                slots[i] = -1
                continue
            expired += 1
        else:
            continue
        renewed[i] = True
        if (word & _NOT_LIVE) != _ZERO:
            # A walk through disk's queue of ages may have passed the old entry; the new row gets its own.
            word &= ~np.uint64(AGED << 16)
        if mask != _ZERO:
            word = with_lag(word, lag)
        records[slot, 5] = word & ~_NOT_LIVE
        records[slot, 2] = _ZERO
        records[slot, 3] = _ZERO
        for j in range(rows.shape[1]):
            rows[slot, j] = np.float32(0.0)
    return revived, admitted, expired


@njit(cache=True, nogil=True)
def gather(
    records: Any,
    rows: Any,
    slots: Any,
    horizon: Any,
    mask: Any,
    default: Any,
    out: Any,
    found: Any,
    meta: Any,
    limit: Any,
) -> Any:
    """Copy live rows into out (float32[n, width]), the default row where there is none; returns the misses.

    meta: int64[n, 3] or int64[0, 3] where it is not wanted. A row counts as found only if it is neither dead nor
    expired (by horizon and mask, see lives). Recency goes up by one, to at most `limit`.
    """
    n = slots.shape[0]
    width = out.shape[1]
    stride = rows.shape[1]
    with_meta = meta.shape[0] == n
    most = np.uint64(limit)
    misses = 0
    for i in range(n):
        if i + _AHEAD < n:
            ahead = slots[i + _AHEAD]
            if ahead >= 0:
                for j in range(0, width, 16):
                    prefetch(rows, ahead * stride + j)
        slot = slots[i]
        live = slot >= 0
        if live:
            word = records[slot, 5]
            at = np.int64(records[slot, 3])
            if mask != _ZERO:
                at = aged_of(at, word, mask)
            live = (word & _NOT_LIVE) == _ZERO and at > horizon
        found[i] = live
        if live:
            clock = (word & _CLOCK_MASK) >> _CLOCK_SHIFT
            if clock < most:
                records[slot, 5] = (word & _NOT_CLOCK) | ((clock + _ONE) << _CLOCK_SHIFT)
            for j in range(width):
                out[i, j] = rows[slot, j]
            if with_meta:
                meta[i, 0] = np.int64(records[slot, 2])
                meta[i, 1] = np.int64(records[slot, 3])
                meta[i, 2] = np.int64(records[slot, 4])
        else:
            misses += 1
            for j in range(width):
                out[i, j] = default[j]
            if with_meta:
                meta[i, 0] = 0
                meta[i, 1] = 0
                meta[i, 2] = -1
    return misses


@njit(cache=True, nogil=True)
def initialise(rows: Any, width: Any, slots: Any, hashes: Any, scale: Any) -> None:
    """Fill the vectors at slots with numbers uniform in [-scale, scale) that depend on hashes alone.

    The generator is splitmix64 (Steele, Lea, Flood 2014), one stream per key.
    """
    for i in range(slots.shape[0]):
        state = hashes[i]
        for j in range(width):
            state += np.uint64(0x9E3779B97F4A7C15)
            z = state
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z ^= z >> np.uint64(31)
            unit = np.float64(z >> np.uint64(40)) / 16777216.0
            rows[slots[i], j] = np.float32((2.0 * unit - 1.0) * scale)


@njit(cache=True, nogil=True)
def zero_rows(rows: Any, slots: Any) -> None:
    """Set the rows at slots to zero."""
    for i in range(slots.shape[0]):
        for j in range(rows.shape[1]):
            rows[slots[i], j] = np.float32(0.0)


@njit(cache=True, nogil=True)
def scatter(
    records: Any,
    rows: Any,
    slots: Any,
    values: Any,
    when: Any,
    applied: Any,
    lags: Any,
    horizon: Any,
    mask: Any,
) -> Any:
    """Write values (float32[n, width]) to slots in order, counting events; times and offsets never go back.

    A row whose only updates in this batch came so late that it is expired starts anew. Returns how many did.
    lags: int64[n] of the events where rows live differently long.
    """
    n = slots.shape[0]
    expired = 0
    stride = rows.shape[1]
    for i in range(n):
        if i + _AHEAD < n and slots[i + _AHEAD] >= 0:
            for j in range(0, stride, 16):
                prefetch(rows, slots[i + _AHEAD] * stride + j)
        slot = slots[i]
        if slot < 0:
            continue
        word = records[slot, 5]
        if records[slot, 2] != _ZERO and aged_of(np.int64(records[slot, 3]), word, mask) <= horizon:
            expired += 1
            records[slot, 2] = _ZERO
            records[slot, 3] = _ZERO
            for j in range(values.shape[1], stride):
                rows[slot, j] = np.float32(0.0)
        for j in range(values.shape[1]):
            rows[slot, j] = values[i, j]
        if mask != _ZERO:
            last = np.int64(records[slot, 3])
            is_new = records[slot, 2] == _ZERO and last == 0
            records[slot, 5] = with_lag(word, prolonged(last, lag_of(word, mask), is_new, when[i], lags[i]))
        records[slot, 2] += _ONE
        if when[i] > np.int64(records[slot, 3]):
            records[slot, 3] = np.uint64(when[i])
        if applied[i] > np.int64(records[slot, 4]):
            records[slot, 4] = np.uint64(applied[i])
    return expired


@njit(cache=True, nogil=True)
def expired_scan(records: Any, begin: Any, end: Any, horizon: Any, mask: Any, out: Any) -> Any:
    """Slots in [begin, end) that are in use, not dead and expired, into out; returns (next slot, count)."""
    count = 0
    limit = out.shape[0]
    for slot in range(begin, end):
        word = records[slot, 5]
        kept = (word & _LENGTH) == _ZERO or (word & np.uint64(DEAD << 16)) != _ZERO
        if kept or aged_of(np.int64(records[slot, 3]), word, mask) > horizon:
            continue
        if count == limit:
            return slot, count
        out[count] = slot
        count += 1
    return end, count


@njit(cache=True, nogil=True)
def evict(records: Any, hand: Any, allocated: Any, wanted: Any, spill: Any, out: Any) -> Any:
    """Choose up to `wanted` slots to leave memory, by the clock from slot `hand` on, into out.

    Rows whose current copy is on disk, or, where spill is true, those without one; never pinned ones. Passing over a
    row lowers its recency; rows at zero go. Returns (hand, count) after at most ten rounds.
    """
    unsaved = np.uint64(UNSAVED << 16)
    pinned = np.uint64(PINNED << 16)
    count = 0
    if allocated == 0:
        return np.int64(0), count
    for _ in range(10 * allocated):
        if count == wanted:
            break
        if hand >= allocated:
            hand = 0
        slot = hand
        hand += 1
        word = records[slot, 5]
        if (word & _LENGTH) == _ZERO:
            continue
        if ((word & unsaved) != _ZERO) != spill or (word & pinned) != _ZERO:
            continue
        clock = (word & _CLOCK_MASK) >> _CLOCK_SHIFT
        if clock > _ZERO:
            records[slot, 5] = (word & _NOT_CLOCK) | ((clock - _ONE) << _CLOCK_SHIFT)
        else:
            # Full recency keeps a later round from choosing the slot twice.
            records[slot, 5] = (word & _NOT_CLOCK) | (np.uint64(0xFF) << _CLOCK_SHIFT)
            out[count] = slot
            count += 1
    for i in range(count):
        records[out[i], 5] &= _NOT_CLOCK
    return hand, count
