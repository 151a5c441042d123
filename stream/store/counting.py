"""The compiled loop of exact admission: what each occurrence of a key leads to.

Guarantees: occurrences are taken in order, each moves event time and is then judged by it; an offset that was counted
is not counted again; it stops before the first occurrence that needs what an earlier one's update will write. Does
not know the events that are held: it says what is to be done with them.
"""

# mypy: disable-error-code="import-untyped,import-not-found,untyped-decorator,no-untyped-call"
from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from stream.store.layout import DEAD, MET, WAITING
from stream.store.lives import aged_by, aged_of, lag_of, prolonged, with_lag

__all__ = ["ADMIT", "GONE", "HOLD", "RELEASE", "RESTART", "count"]

# What an occurrence leads to, as bits.
HOLD = 1  # counted; the event is kept with its key
ADMIT = 2  # the key has a row, now at the latest
RELEASE = 4  # the first occurrence of this call that its key's admission rests on: hand out what is held
RESTART = 8  # the key starts counting from zero, before this occurrence is counted
GONE = 16  # the key has no row, and was or may have been known to have one

_ZERO = np.uint64(0)
_MET = np.uint64(MET << 16)
_DEAD = np.uint64(DEAD << 16)
_WAITING = np.uint64(WAITING << 16)


@njit(cache=True, nogil=True)
def count(
    records: Any,
    slots: Any,
    offsets: Any,
    event_ms: Any,
    threshold: Any,
    horizon: Any,
    watermark: Any,
    ttl: Any,
    clients: Any,
    newest: Any,
    actions: Any,
    lags: Any,
    mask: Any,
    first_lag: Any,
) -> Any:
    """Set actions (uint8[n]) of the occurrences of the keys at slots (int64[n]); returns (done, rows that ended).

    offsets: int64[n], or int64[0] where each occurrence counts. clients: int64[n], a number for each distinct slot,
    where rows can expire by the times in event_ms; newest (int64 per client) is then scratch room. int64[0] otherwise.
    lags: int64[n] of the events, as in lives, like mask; first_lag: of a key that counts from zero.
    """
    n = slots.shape[0]
    moving = clients.shape[0] == n
    ended = 0
    done = n
    for i in range(n):
        slot = slots[i]
        word = records[slot, 5]
        met = (word & _MET) != _ZERO
        waits = (word & _WAITING) != _ZERO
        dead = (word & _DEAD) != _ZERO
        at = aged_of(np.int64(records[slot, 3]), word, mask)
        applied = np.int64(records[slot, 4])
        offset = applied + 1
        if offsets.shape[0] == n:
            offset = offsets[i]
        ms = event_ms[i]
        kept = aged_by(ms, lags[i])
        watermark = max(watermark, ms)
        limit = horizon
        if moving:
            # An event that was applied or counted before is not there to judge its row again.
            if offset > applied:
                limit = max(horizon, watermark - ttl)
            if met:
                at = newest[clients[i]]
        used = met or records[slot, 2] != _ZERO or records[slot, 3] != _ZERO
        over = used and at <= limit
        if over and met:
            # The row that expires here is one that the caller has yet to write.
            done = i
            break
        action = 0
        if dead or over:
            if not dead and not waits:
                action |= GONE
                ended += 1
            action |= RESTART
            records[slot, 2] = _ZERO
            records[slot, 3] = _ZERO
            at = np.int64(0)
            word = (word & ~_DEAD) | _WAITING
            if mask != _ZERO:
                word = with_lag(word, first_lag)
            waits = True
        if waits:
            seen = np.int64(records[slot, 2])
            if seen < threshold and offset > applied:
                seen += 1
                applied = offset
                last = np.int64(records[slot, 3])
                if mask != _ZERO:
                    is_new = seen == 1 and last == 0
                    word = with_lag(word, prolonged(last, lag_of(word, mask), is_new, ms, lags[i]))
                last = max(last, ms)
                at = aged_of(last, word, mask)
                records[slot, 2] = np.uint64(seen)
                records[slot, 3] = np.uint64(last)
                records[slot, 4] = np.uint64(offset)
                if seen < threshold:
                    action |= HOLD
            elif offset <= applied:
                action |= GONE
            # From the n-th occurrence on; again so where the update that should have followed failed.
            if seen >= threshold and offset >= applied:
                action = (action | ADMIT) & ~GONE
                if not met:
                    action |= RELEASE
        else:
            action |= ADMIT
        if (action & ADMIT) != 0:
            word |= _MET
            if moving:
                newest[clients[i]] = max(at, kept) if waits or offset > applied else at
        records[slot, 5] = word
        actions[i] = action
    for i in range(done):
        records[slots[i], 5] &= ~_MET
    return done, ended
