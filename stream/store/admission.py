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
from stream.store import layout
from stream.store.core import Core
from stream.store.keys import PackedKeys

__all__ = ["Admission", "observe"]

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
_NOT_LIVE = layout.DEAD | layout.WAITING


class Admission(NamedTuple):
    """What observe() decided.

    admitted: bool[n]; an event whose entry is false was counted, and held where its payload was given, or had
    been counted before. released: (i, payloads) for each key that occurrence i admitted: its held events, in
    order, which come before event i.
    """

    admitted: Bool
    released: list[tuple[int, list[bytes]]]


def observe(
    core: Core, keys: PackedKeys, offsets: Int64 | None, event_ms: Int64, payloads: Sequence[bytes] | None
) -> Admission:
    """EmbeddingStore.observe, under the lock."""
    n = len(keys)
    if core.options.admission_threshold == 1:
        return Admission(np.ones(n, np.bool_), [])
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
    admitted = np.zeros(n, np.bool_)
    _restart(core, slots)
    admitted[:] = (table.flags[slots] & _NOT_LIVE) == 0
    released: list[tuple[int, list[bytes]]] = []
    threshold = core.options.admission_threshold
    counted: list[int] = []
    handed: set[int] = set()
    for i in np.flatnonzero(~admitted).tolist():
        slot = int(slots[i])
        seen = int(table.events_seen[slot])
        last = int(table.applied_offset[slot])
        offset = last + 1 if offsets is None else int(offsets[i])
        if seen < threshold and offset > last:
            seen += 1
            last = offset
            table.events_seen[slot] = seen
            table.last_event_ms[slot] = max(int(table.last_event_ms[slot]), int(event_ms[i]))
            table.applied_offset[slot] = offset
            counted.append(slot)
            if seen < threshold and payloads is not None:
                held = table.held.setdefault(slot, [])
                held.append(payloads[i])
                _bound(core, held)
        # Admitted from the n-th occurrence on; again so where the update that should follow had failed.
        if seen >= threshold and offset >= last:
            admitted[i] = True
            if slot not in handed:
                handed.add(slot)
                released.append((i, table.held.get(slot, [])))
    table.mark(np.array(counted, np.int64))
    core.make_room()
    return Admission(admitted, released)


def _restart(core: Core, slots: Int64) -> None:
    """Let keys whose row is dead or expired, or that waited too long, count from zero."""
    table = core.table
    flags = table.flags[slots]
    used = (table.events_seen[slots] != 0) | (table.last_event_ms[slots] != 0)
    over = ((flags & layout.DEAD) != 0) | (used & (table.last_event_ms[slots] <= core.horizon))
    at = np.unique(slots[over])
    if not at.shape[0]:
        return
    was_row = (table.flags[at] & _NOT_LIVE) == 0
    core.rows -= int(was_row.sum())
    core.expired += int(was_row.sum())
    table.events_seen[at] = 0
    table.last_event_ms[at] = 0
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
    live[known] &= table.last_event_ms[slots[known]] > core.horizon
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
    return Admission(admitted, [])
