"""Compiled index of a table: find, insert and remove slots by whole key, in batches.

Guarantees: whole keys are compared, whatever the hashes; equal results on every machine. Does not lock and does
not grow anything: an insertion that runs out of room says how far it came. See layout for the data.
"""

# mypy: disable-error-code="import-untyped,import-not-found,untyped-decorator,no-untyped-call"
from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from stream.store.hashing import load_tail, load_word, prefetch
from stream.store.layout import (
    ALLOCATED,
    FREE_HEAD,
    INLINE_BYTES,
    LENGTH_BITS,
    LIVE,
    OVERFLOW_FREE,
    OVERFLOW_TOP,
    RECORD_WORDS,
    UNSAVED,
    UNSAVED_ROWS,
)
from stream.store.lives import with_lag

__all__ = ["compact_overflow", "copy_keys", "expand", "find", "insert", "key_lengths", "remove", "sort_words"]

_LENGTH = np.uint64(LENGTH_BITS)
_M32 = np.uint64(0xFFFFFFFF)
_S32 = np.uint64(32)
_ZERO = np.uint64(0)
_AHEAD = 8


@njit(cache=True, nogil=True, inline="always")
def _home(tag: Any, size: Any) -> Any:
    return np.int64((tag * np.uint64(size)) >> _S32)


@njit(cache=True, nogil=True, inline="always")
def _word(buffer: Any, start: Any, stop: Any) -> Any:
    if stop - start >= 8:
        return load_word(buffer, start)
    if stop <= start:
        return _ZERO
    return load_tail(buffer, start, stop - start)


@njit(cache=True, nogil=True, inline="always")
def _same_key(records: Any, overflow: Any, slot: Any, buffer: Any, start: Any, stop: Any) -> Any:
    length = stop - start
    if np.int64(records[slot, 5] & _LENGTH) != length:
        return False
    if records[slot, 0] != _word(buffer, start, stop):
        return False
    if length <= INLINE_BYTES:
        return records[slot, 1] == _word(buffer, start + 8, stop)
    at = np.int64(records[slot, 1]) + 1
    position = start + 8
    while position < stop:
        if overflow[at] != _word(buffer, position, stop):
            return False
        at += 1
        position += 8
    return True


@njit(cache=True, nogil=True)
def _probe(entries: Any, records: Any, overflow: Any, buffer: Any, start: Any, stop: Any, tag: Any, place: Any) -> Any:
    """Slot of the key, -1 where absent, searching from entry `place` on."""
    size = entries.shape[0]
    while True:
        entry = entries[place]
        if entry == _ZERO:
            return np.int64(-1)
        if (entry & _M32) == tag:
            slot = np.int64(entry >> _S32) - 1
            if _same_key(records, overflow, slot, buffer, start, stop):
                return slot
        place += 1
        if place == size:
            place = 0


@njit(cache=True, nogil=True)
def find(entries: Any, records: Any, overflow: Any, buffer: Any, offsets: Any, hashes: Any, slots: Any) -> int:
    """Write each key's slot, or -1, into slots (int64[n]); returns the number of keys not found.

    Three passes over the batch, so that the cache misses of different keys overlap.
    """
    n = hashes.shape[0]
    size = entries.shape[0]
    places = np.empty(n, np.int64)
    for i in range(n):
        place = _home(hashes[i] >> _S32, size)
        places[i] = place
        prefetch(entries, place)
    for i in range(n):
        tag = hashes[i] >> _S32
        place = places[i]
        slot = np.int64(-1)
        while True:
            entry = entries[place]
            if entry == _ZERO:
                break
            if (entry & _M32) == tag:
                slot = np.int64(entry >> _S32) - 1
                prefetch(records, slot * RECORD_WORDS)
                prefetch(records, slot * RECORD_WORDS + 5)
                break
            place += 1
            if place == size:
                place = 0
        slots[i] = slot
        places[i] = place
    missing = 0
    for i in range(n):
        if i + _AHEAD < n and slots[i + _AHEAD] >= 0:
            ahead = slots[i + _AHEAD]
            if offsets[i + _AHEAD + 1] - offsets[i + _AHEAD] > INLINE_BYTES:
                # Of another length the key is not the one, and word 1 may then be key bytes: any place will do.
                prefetch(overflow, np.int64(records[ahead, 1] & _M32))
        slot = slots[i]
        if slot >= 0 and not _same_key(records, overflow, slot, buffer, offsets[i], offsets[i + 1]):
            place = places[i] + 1
            if place == size:
                place = 0
            slot = _probe(entries, records, overflow, buffer, offsets[i], offsets[i + 1], hashes[i] >> _S32, place)
            slots[i] = slot
        if slot < 0:
            missing += 1
    return missing


@njit(cache=True, nogil=True)
def _overflow_take(overflow: Any, counters: Any, classes: Any, words: Any) -> Any:
    """Place of a block of `words` words, -1 where there is no room."""
    head = classes[words]
    if head >= 0:
        classes[words] = np.int64(overflow[head]) - 1
        counters[OVERFLOW_FREE] -= words
        return head
    top = counters[OVERFLOW_TOP]
    if top + words > overflow.shape[0]:
        return np.int64(-1)
    counters[OVERFLOW_TOP] = top + words
    return top


@njit(cache=True, nogil=True)
def insert(
    entries: Any,
    records: Any,
    overflow: Any,
    counters: Any,
    classes: Any,
    buffer: Any,
    offsets: Any,
    hashes: Any,
    slots: Any,
    created: Any,
    done: Any,
    begin: Any,
    mask: Any,
    lag: Any,
) -> Any:
    """Give each key whose slot is -1 a slot, from key `begin` on; duplicates share one.

    created (int64[n]) takes the positions of first occurrences from index `done` on. Returns (position reached,
    number created); a position below n means that records (when they are all in use) or overflow ran out.
    The index must have a free entry for every key. mask, lag: of records where rows live differently long, and of
    new ones; otherwise the mask is 0, and records keep the tag.
    """
    n = hashes.shape[0]
    size = entries.shape[0]
    capacity = records.shape[0]
    for i in range(begin, n):
        if slots[i] < 0:
            prefetch(entries, _home(hashes[i] >> _S32, size))
    for i in range(begin, n):
        if slots[i] >= 0:
            continue
        start = offsets[i]
        stop = offsets[i + 1]
        tag = hashes[i] >> _S32
        place = _home(tag, size)
        found = np.int64(-1)
        while True:
            entry = entries[place]
            if entry == _ZERO:
                break
            if (entry & _M32) == tag:
                slot = np.int64(entry >> _S32) - 1
                if _same_key(records, overflow, slot, buffer, start, stop):
                    found = slot
                    break
            place += 1
            if place == size:
                place = 0
        if found >= 0:
            slots[i] = found
            continue
        slot = counters[FREE_HEAD]
        if slot < 0 and counters[ALLOCATED] >= capacity:
            return i, done
        length = stop - start
        second = _word(buffer, start + 8, stop)
        if length > INLINE_BYTES:
            words = (length + 7) >> 3
            at = _overflow_take(overflow, counters, classes, words)
            if at < 0:
                return i, done
            for w in range(words):
                overflow[at + w] = _word(buffer, start + 8 * w, stop)
            second = np.uint64(at)
        if slot >= 0:
            counters[FREE_HEAD] = np.int64(records[slot, 4])
        else:
            slot = counters[ALLOCATED]
            counters[ALLOCATED] = slot + 1
        counters[LIVE] += 1
        records[slot, 0] = _word(buffer, start, stop)
        records[slot, 1] = second
        records[slot, 2] = _ZERO
        records[slot, 3] = _ZERO
        records[slot, 4] = ~_ZERO
        records[slot, 5] = np.uint64(length) | tag << _S32 if mask == _ZERO else with_lag(np.uint64(length), lag)
        entries[place] = (np.uint64(slot + 1) << _S32) | tag
        slots[i] = slot
        created[done] = i
        done += 1
    return n, done


@njit(cache=True, nogil=True)
def remove(entries: Any, records: Any, overflow: Any, counters: Any, classes: Any, slots: Any, hashes: Any) -> None:
    """Free the slots (int64[n], in use, distinct) and take their keys out of the index.

    hashes: uint64[n] of their keys, or uint64[0] where records keep the tag.
    """
    size = entries.shape[0]
    for i in range(slots.shape[0]):
        slot = slots[i]
        tag = (hashes[i] if hashes.shape[0] else records[slot, 5]) >> _S32
        wanted = (np.uint64(slot + 1) << _S32) | tag
        hole = _home(tag, size)
        while entries[hole] != wanted:
            hole += 1
            if hole == size:
                hole = 0
        place = hole
        while True:
            place += 1
            if place == size:
                place = 0
            entry = entries[place]
            if entry == _ZERO:
                break
            home = _home(entry & _M32, size)
            # The entry may move back only if its home is not cyclically after the hole.
            stays = (hole < home and home <= place) if hole <= place else (hole < home or home <= place)
            if not stays:
                entries[hole] = entry
                hole = place
        entries[hole] = _ZERO
        if (records[slot, 5] & np.uint64(UNSAVED << 16)) != _ZERO:
            counters[UNSAVED_ROWS] -= 1
        length = np.int64(records[slot, 5] & _LENGTH)
        if length > INLINE_BYTES:
            words = (length + 7) >> 3
            at = np.int64(records[slot, 1])
            overflow[at] = np.uint64(classes[words] + 1)
            classes[words] = at
            counters[OVERFLOW_FREE] += words
        records[slot, 5] = _ZERO
        records[slot, 4] = np.uint64(counters[FREE_HEAD])
        counters[FREE_HEAD] = slot
        counters[LIVE] -= 1


@njit(cache=True, nogil=True)
def _put(entries: Any, entry: Any) -> None:
    size = entries.shape[0]
    place = _home(entry & _M32, size)
    while entries[place] != _ZERO:
        place += 1
        if place == size:
            place = 0
    entries[place] = entry


@njit(cache=True, nogil=True)
def expand(entries: Any, before: Any) -> None:
    """Make an index of the first `before` entries one of all; what the others hold does not matter.

    In place, so that no memory is touched for the first time but what is added. The old entries move to the end, and
    from there, in order, to their new places. Homes grow with tags, by no more than the entries added, so each place
    is at or before the entry it comes from, and what is still to be moved is never met on the way.
    """
    added = entries.shape[0] - before
    first = 0
    while first < before and entries[first] != _ZERO:
        first += 1
    # Entries up to the first gap may have come round from the end: they go last.
    wrapped = entries[:first].copy()
    for i in range(before - 1, first - 1, -1):
        entries[added + i] = entries[i]
    for i in range(added + first):
        entries[i] = _ZERO
    for i in range(added + first, entries.shape[0]):
        entry = entries[i]
        if entry != _ZERO:
            entries[i] = _ZERO
            _put(entries, entry)
    for i in range(first):
        _put(entries, wrapped[i])


@njit(cache=True, nogil=True)
def compact_overflow(records: Any, overflow: Any, target: Any, counters: Any, classes: Any) -> None:
    """Copy the long keys in use into `target` without gaps and forget the free lists."""
    top = np.int64(0)
    for slot in range(counters[ALLOCATED]):
        length = np.int64(records[slot, 5] & _LENGTH)
        if length > INLINE_BYTES:
            words = (length + 7) >> 3
            at = np.int64(records[slot, 1])
            for w in range(words):
                target[top + w] = overflow[at + w]
            records[slot, 1] = np.uint64(top)
            top = top + words
    counters[OVERFLOW_TOP] = top
    counters[OVERFLOW_FREE] = 0
    classes[:] = -1


@njit(cache=True, nogil=True)
def key_lengths(records: Any, slots: Any, out: Any) -> None:
    """Lengths in bytes of the keys at slots, into out (int64[n])."""
    for i in range(slots.shape[0]):
        out[i] = np.int64(records[slots[i], 5] & _LENGTH)


@njit(cache=True, nogil=True)
def copy_keys(records: Any, overflow: Any, slots: Any, offsets: Any, buffer: Any) -> None:
    """Copy the keys at slots into buffer at offsets (int64[n + 1])."""
    for i in range(slots.shape[0]):
        slot = slots[i]
        start = offsets[i]
        length = offsets[i + 1] - start
        at = np.int64(records[slot, 1])
        for j in range(length):
            word = overflow[at + (j >> 3)] if length > INLINE_BYTES else records[slot, j >> 3]
            buffer[start + j] = np.uint8((word >> np.uint64(8 * (j & 7))) & np.uint64(0xFF))


@njit(cache=True, nogil=True, inline="always")
def _big_endian(word: Any) -> Any:
    swapped = _ZERO
    for byte in range(8):
        swapped = (swapped << np.uint64(8)) | ((word >> np.uint64(8 * byte)) & np.uint64(0xFF))
    return swapped


@njit(cache=True, nogil=True)
def sort_words(records: Any, overflow: Any, slots: Any, out: Any) -> None:
    """Numbers that rise with the keys at slots, into out (uint64[n]): the eight bytes after those that all begin with.

    Bytes after the first sixteen do not count; keys that differ there alone may have equal numbers.
    """
    n = slots.shape[0]
    second = np.empty(n, np.uint64)
    differing = _ZERO
    for i in range(n):
        slot = slots[i]
        word = records[slot, 1]
        if np.int64(records[slot, 5] & _LENGTH) > INLINE_BYTES:
            word = overflow[np.int64(word) + 1]
        out[i] = _big_endian(records[slot, 0])
        second[i] = _big_endian(word)
        differing |= out[i] ^ out[0]
    alike = np.uint64(0)
    while alike < np.uint64(64) and (differing << alike) >> np.uint64(56) == _ZERO:
        alike += np.uint64(8)
    for i in range(n):
        if alike == np.uint64(64):
            out[i] = second[i]
        elif alike > _ZERO:
            out[i] = (out[i] << alike) | (second[i] >> (np.uint64(64) - alike))
