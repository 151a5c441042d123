"""Frequency filtering: a key gets its row on its n-th occurrence.

Guarantees, exact mode: on exactly the n-th occurrence for any n, counted once per offset, through restarts,
restores and snapshots; events before it are held with the key, in order, and handed out when it is admitted, so
that the row becomes what it had become without a filter. A key that expires starts counting from zero.
Sketch mode: fixed memory; never later than the n-th occurrence; earlier with a small probability (see Sketch).
Does not hold events in sketch mode; there an occurrence that is replayed counts again, and a key that expired
after its admission is admitted at once when it returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stream.errors import StoreError
from stream.store import counting, layout
from stream.store.core import Core
from stream.store.keys import PackedKeys

__all__ = ["Admission", "observe"]

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
_NOT_LIVE = layout.DEAD | layout.WAITING


class Admission(NamedTuple):
    """What observe() decided about the first `stop` of n occurrences; the others are to be observed again.

    admitted: bool[n]; an event whose entry is false was counted, and held where its payload was given, or had
    been counted before. released: (i, payloads) for each key whose admission rests on occurrence i: its held
    events, in order, which come before event i. stop: n, or the first occurrence whose key expires through event
    time that the batch itself brought, after the batch's own events made it what it is: update the rows, advance
    the watermark, and observe the rest. gone: keys, each once, that have no row but may be known to have one: rows
    found expired, and waiting keys of replayed events. The next sweep() hands them out too, but for those that have
    a row again by then.
    """

    admitted: Bool
    released: list[tuple[int, list[bytes]]]
    stop: int
    gone: list[bytes]


def observe(
    core: Core,
    keys: PackedKeys,
    offsets: Int64 | None,
    event_ms: Int64,
    payloads: Sequence[bytes] | None,
    life_ms: Int64,
) -> Admission:
    """EmbeddingStore.observe, under the lock."""
    n = len(keys)
    if core.options.admission_threshold == 1:
        return Admission(np.ones(n, np.bool_), [], n, [])
    if core.sketch is not None:
        return _observe_sketch(core, keys, payloads)
    table = core.table
    slots = core.bring_in(keys)
    core.touch(slots)
    missing = int((slots < 0).sum())
    if missing:
        hashes = table.hashes(keys)
        created = table.insert(keys, hashes, slots, missing)
        table.flags[slots[created]] |= layout.WAITING
    clients = newest = np.empty(0, np.int64)
    ttl = core.lives.longest_ms
    if ttl is not None and n:
        # Only then can a key expire through the batch's own event time.
        latest = max(core.watermark, int(event_ms.max())) - ttl
        at = table.aged(slots)
        if int(core.lives.aged(event_ms, life_ms).min()) <= latest or bool(
            ((at <= latest) & ((table.events_seen[slots] != 0) | (at != 0))).any()
        ):
            distinct, clients = np.unique(slots, return_inverse=True)
            newest = np.empty(distinct.shape[0], np.int64)
    actions = np.zeros(n, np.uint8)
    stop, ended = counting.count(
        table.records,
        slots,
        np.empty(0, np.int64) if offsets is None else offsets,
        event_ms,
        core.options.admission_threshold,
        core.horizon,
        core.watermark,
        ttl or 0,
        clients,
        newest,
        actions,
        core.lives.lags(life_ms),
        core.lives.mask,
        # Whatever a key that counts from zero has: its first occurrence says how long it waits. One that only
        # occurrences from before its end come to is left with it, and ends again.
        core.lives.shortest_lag,
    )
    core.rows -= ended
    core.expired += ended
    released = _settle_held(core, slots, actions, payloads)
    table.mark(slots[(actions & (counting.HOLD | counting.RELEASE | counting.RESTART)) != 0])
    admitted = (actions & counting.ADMIT) != 0
    gone: list[bytes] = []
    missed = np.flatnonzero(actions & counting.GONE)
    if missed.shape[0]:
        missed = missed[~np.isin(slots[missed], slots[admitted])]
        gone = list(dict.fromkeys(keys.take(missed).to_list()))
        if ttl is not None:
            core.unreported += gone
    core.make_room()
    return Admission(admitted, released, stop, gone)


def _settle_held(
    core: Core, slots: Int64, actions: npt.NDArray[np.uint8], payloads: Sequence[bytes] | None
) -> list[tuple[int, list[bytes]]]:
    """Drop, keep and hand out held events as the occurrences ask for, in order; returns what is handed out."""
    held = core.table.held
    released: list[tuple[int, list[bytes]]] = []
    at = np.flatnonzero(actions & (counting.HOLD | counting.RELEASE | counting.RESTART))
    for i, slot, action in zip(at.tolist(), slots[at].tolist(), actions[at].tolist(), strict=True):
        if action & counting.RESTART:
            held.pop(slot, None)
        if action & counting.HOLD and payloads is not None:
            events = held.setdefault(slot, [])
            events.append(payloads[i])
            _bound(core, events)
        elif action & counting.RELEASE:
            released.append((i, list(held.get(slot, ()))))
    return released


def _restart(core: Core, slots: Int64) -> None:
    """Let keys whose row is dead or expired, or that waited too long, count from zero."""
    table = core.table
    flags = table.flags[slots]
    used = (table.events_seen[slots] != 0) | (table.last_event_ms[slots] != 0)
    over = ((flags & layout.DEAD) != 0) | (used & (table.aged(slots) <= core.horizon))
    at = np.unique(slots[over])
    if not at.shape[0]:
        return
    was_row = (table.flags[at] & _NOT_LIVE) == 0
    core.rows -= int(was_row.sum())
    core.expired += int(was_row.sum())
    table.events_seen[at] = 0
    table.last_event_ms[at] = 0
    core.lives.write(table.records, at, np.full(at.shape[0], core.lives.default_lag))
    table.flags[at] = (table.flags[at] & np.uint8(0xFF ^ layout.DEAD)) | layout.WAITING
    for slot in at.tolist():
        table.held.pop(slot, None)
    table.mark(at)


def _bound(core: Core, held: list[bytes]) -> None:
    limit = core.options.max_held_bytes
    size = sum(map(len, held))
    while size > limit and held:
        size -= len(held.pop(0))
        core.held_dropped += 1


def _observe_sketch(core: Core, keys: PackedKeys, payloads: Sequence[bytes] | None) -> Admission:
    assert core.sketch is not None
    if payloads is not None:
        raise StoreError('store.admission_mode: "sketch" cannot hold events; use "exact", or give no payloads')
    table = core.table
    slots = core.bring_in(keys)
    known = slots >= 0
    live = np.zeros(len(keys), np.bool_)
    live[known] = (table.flags[slots[known]] & _NOT_LIVE) == 0
    live[known] &= table.aged(slots[known]) > core.horizon
    rest = np.flatnonzero(~live)
    sub = keys.take(rest)
    reached = core.sketch.count(sub)
    admitted = live
    admitted[rest] = reached
    if reached.any():
        # A reached key waits as a key that has occurred often enough; update() makes it a row.
        at = rest[reached]
        chosen = keys.take(at)
        hashes = table.hashes(chosen)
        new, missing = table.find(chosen, hashes)
        if missing:
            created = table.insert(chosen, hashes, new, missing)
            table.flags[new[created]] |= layout.WAITING
        core.touch(new)
        _restart(core, new)
        table.events_seen[new] = core.options.admission_threshold
        table.last_event_ms[new] = max(core.watermark, 0)
        table.mark(new)
    core.make_room()
    return Admission(admitted, [], len(keys), [])
