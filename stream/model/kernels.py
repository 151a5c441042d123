"""The loops of a micro-batch over arrays, compiled by numba.

Everything here is scalar arithmetic in a fixed order, one event after the other, so the result for a row cannot
depend on what else is in the batch.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from stream.borrowing import borrowing
from stream.store.hashing import LINE, prefetch

__all__ = ["advance", "assemble", "expiry_parts", "plan", "ring_code", "scatter_hidden", "tally_bins"]

_TIME_BASE = 16777216.0  # 2**24: the largest power below which float32 holds every integer
#: Rows asked for before they are written: memory answers many at a time.
_AHEAD = 16
_LARGEST = 1e15  # a sum of amounts beyond this could overflow float32 and poison its row


@njit(cache=True, nogil=True)
def plan(  # type: ignore[no-untyped-def]
    slots, accepted, offsets, applied_offset, counts, position, event_at, unique, rank_of
):
    """Order the events of a batch into waves.

    The i-th event of each client belongs to wave i. Clients are ranked by their number of events, most first, so
    the clients of a wave are always the first rows of the wave before. `position[i]` is event i's row in that
    order, -1 for an event that is skipped: rejected, or at or below its row's `applied_offset`; `event_at` is the
    inverse.

    Returns (clients, events, wave starts). `counts` is scratch of one zero per slot and is zero again afterwards.
    """
    n = slots.shape[0]
    clients = 0
    events = 0
    deepest = 0
    for i in range(n):
        position[i] = -1
        slot = slots[i]
        if not accepted[i] or slot < 0 or offsets[i] <= applied_offset[slot]:
            continue
        if counts[slot] == 0:
            unique[clients] = slot
            clients += 1
        position[i] = counts[slot]
        counts[slot] += 1
        events += 1
        deepest = max(deepest, counts[slot])
    wave_size = np.zeros(deepest + 1, np.int64)
    for u in range(clients):
        wave_size[counts[unique[u]]] += 1
    # From the number of clients with exactly c events to the number with more than w.
    starts = np.zeros(deepest + 1, np.int64)
    with_more = 0
    place = np.zeros(deepest + 2, np.int64)
    for c in range(deepest, 0, -1):
        place[c] = with_more
        with_more += wave_size[c]
        wave_size[c] = with_more
    for w in range(deepest):
        starts[w + 1] = starts[w] + wave_size[w + 1]
    ranked = np.empty(clients, np.int64)
    for u in range(clients):
        slot = unique[u]
        c = counts[slot]
        rank = place[c]
        place[c] += 1
        rank_of[slot] = rank
        ranked[rank] = slot
    for i in range(n):
        if position[i] >= 0:
            at = starts[position[i]] + rank_of[slots[i]]
            position[i] = at
            event_at[at] = i
    last = np.empty(clients, np.int64)
    for rank in range(clients):
        slot = ranked[rank]
        last[rank] = starts[counts[slot] - 1] + rank
        counts[slot] = 0
        unique[rank] = slot
    return clients, events, starts, last


@borrowing()
def _write_time(row, at, time_ms):  # type: ignore[no-untyped-def]
    high = math.floor(time_ms / _TIME_BASE)
    row[at] = np.float32(high)
    row[at + 1] = np.float32(time_ms - high * _TIME_BASE)


@borrowing()
def _read_time(row, at):  # type: ignore[no-untyped-def]
    return np.float64(row[at]) * _TIME_BASE + np.float64(row[at + 1])


@borrowing()
def _holds(kind, column, threshold, i, numbers, declared):  # type: ignore[no-untyped-def]
    if kind == 0:
        return True
    if kind == 1:
        return numbers[i, column] > threshold
    if kind == 2:
        return numbers[i, column] < threshold
    return declared[i, column] == np.int32(threshold)


@njit(cache=True, nogil=True)
def ring_code(hashed):  # type: ignore[no-untyped-def]
    """48 bits of a hash as two float32 of 24 bits each, never both 0: two values share a code once in 2**48 pairs."""
    high = np.float32(np.int64((hashed >> np.uint64(24)) & np.uint64(0xFFFFFF)))
    low = np.float32(np.int64(hashed & np.uint64(0xFFFFFF)))
    if high == 0.0 and low == 0.0:
        low = np.float32(1.0)
    return high, low


@njit(cache=True, nogil=True)
def tally_bins(hashed, size):  # type: ignore[no-untyped-def]
    """The bin of a value in each of the two rows of a tally of `size` bins."""
    bins = np.uint64(size)
    return np.int64((hashed & np.uint64(0xFFFFFFFF)) % bins), np.int64((hashed >> np.uint64(32)) % bins)


@borrowing()
def _push(memory, at, slots, width):  # type: ignore[no-untyped-def]
    """Make room at the front of a range of `slots` floats; its last `width` are dropped."""
    for k in range(at + slots - 1, at + width - 1, -1):
        memory[k] = memory[k - width]


@borrowing()
def _place_in_top(memory, at, codes, size, high, low):  # type: ignore[no-untyped-def]
    """Where a value is kept or, where it is not, the first place with the smallest count."""
    smallest = 0
    for k in range(size):
        if memory[codes + 2 * k] == high and memory[codes + 2 * k + 1] == low:
            return k
        if memory[at + k] < memory[at + smallest]:
            smallest = k
    return smallest


@borrowing(forceinline=True)
def _remember(  # type: ignore[no-untyped-def]
    memory, i, time_ms, elapsed_ms, late_ms, modality, numbers, hashes, lengths, declared,
    first, operations, constants, decay_half_life_ms, decay_bounds,
):  # fmt: skip
    """Apply event i to the memory of its row (a view of its memory floats)."""
    if elapsed_ms > 0.0:
        for g in range(decay_half_life_ms.shape[0]):
            factor = np.float32(2.0 ** (-elapsed_ms / decay_half_life_ms[g]))
            for k in range(decay_bounds[g], decay_bounds[g + 1]):
                memory[k] *= factor
    for o in range(first[modality], first[modality + 1]):
        kind = operations[o, 0]
        if not _holds(operations[o, 7], operations[o, 8], constants[o, 0], i, numbers, declared):
            continue
        at = operations[o, 1]
        by = operations[o, 6]
        if by >= 0:
            slot = declared[i, by]
            spare = operations[o, 2] - 1
            if slot < 0 or slot > spare:
                slot = spare
            at += slot * (2 if kind == 3 or kind == 5 else 1)
        # A late event counts as much as it would have left by now, and moves no time back.
        weight = 1.0 if late_ms == 0.0 else 2.0 ** (-late_ms / constants[o, 1])
        if kind == 0:
            memory[at] += np.float32(weight)
        elif kind == 1:
            amount = numbers[i, operations[o, 4]]
            if not math.isnan(amount):
                amount = min(max(amount, -_LARGEST), _LARGEST)
                memory[at] += np.float32(amount * weight)
        elif kind == 2:
            previous = _read_time(memory, operations[o, 3])
            if previous == 0.0 or time_ms - previous > constants[o, 2]:
                memory[at] += np.float32(weight)
            if time_ms > previous:
                _write_time(memory, operations[o, 3], time_ms)
        elif kind == 3:
            if time_ms > _read_time(memory, at):
                _write_time(memory, at, time_ms)
        elif kind == 5:
            earliest = _read_time(memory, at)
            if earliest == 0.0 or time_ms < earliest:
                _write_time(memory, at, time_ms)
        elif kind == 6:
            amount = numbers[i, operations[o, 4]]
            if not math.isnan(amount):
                kept = operations[o, 2] - 1
                _push(memory, at, kept, 1)
                memory[at] = np.float32(min(max(amount, -_LARGEST), _LARGEST))
                memory[at + kept] = min(memory[at + kept] + np.float32(1.0), np.float32(kept))
        elif kind == 7:
            column = operations[o, 5]
            if lengths[i, column] >= 0:
                value = declared[i, column]
                if value < 0 or value > operations[o, 9]:
                    value = operations[o, 9]
                _push(memory, at, operations[o, 2], 1)
                memory[at] = np.float32(value + 1)
        elif kind == 8:
            column = operations[o, 5]
            if lengths[i, column] >= 0:
                _push(memory, at, operations[o, 2], 2)
                high, low = ring_code(hashes[i, column])
                memory[at] = high
                memory[at + 1] = low
        elif kind == 10:
            column = operations[o, 5]
            if lengths[i, column] >= 0:
                codes = operations[o, 3]
                high, low = ring_code(hashes[i, column])
                place = _place_in_top(memory, at, codes, operations[o, 2], high, low)
                if memory[codes + 2 * place] != high or memory[codes + 2 * place + 1] != low:
                    memory[codes + 2 * place] = high
                    memory[codes + 2 * place + 1] = low
                    memory[at + place] = np.float32(0.0)
                memory[at + place] += np.float32(weight)
        elif kind == 9:
            column = operations[o, 5]
            if lengths[i, column] >= 0:
                size = operations[o, 2] // 2
                one, other = tally_bins(hashes[i, column], size)
                memory[at + one] += np.float32(weight)
                memory[at + size + other] += np.float32(weight)
        else:
            column = operations[o, 5]
            if lengths[i, column] >= 0:
                bits = hashes[i, column] ^ np.uint64(0x9E3779B97F4A7C15)
                bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                bits ^= bits >> np.uint64(31)
                amount32 = np.float32(weight)
                for d in range(operations[o, 2]):
                    if bits & np.uint64(1):
                        memory[at + d] += amount32
                    else:
                        memory[at + d] -= amount32
                    bits >>= np.uint64(1)


@borrowing()
def advance(  # type: ignore[no-untyped-def]
    slots, position, offsets, timestamps, modality, numbers, hashes, lengths, declared,
    vectors, hidden, events_seen, last_event_ms, applied_offset,
    first, operations, constants, decay_half_life_ms, decay_bounds,
    number_inputs, scale, dense_inputs, out, is_trigger, trigger_event, trigger_seen, trigger_memory, modalities,
):  # fmt: skip
    """Apply every planned event, in order, to memory and metadata, and write its dense inputs at its position in `out`.

    `is_trigger[m]` says that modality m asks for a prediction; the memory right after such an event is copied
    to `trigger_memory`. Returns the number of triggers.
    """
    triggers = 0
    time_column = dense_inputs - 6
    width = out.shape[1]
    for i in range(slots.shape[0]):
        if i + _AHEAD < slots.shape[0] and position[i + _AHEAD] >= 0:
            for k in range(0, dense_inputs, LINE):
                prefetch(out, position[i + _AHEAD] * width + k)
            for k in range(hidden, vectors.shape[1], LINE):
                prefetch(vectors, slots[i + _AHEAD] * vectors.shape[1] + k)
        at = position[i]
        if at < 0:
            continue
        slot = slots[i]
        kind = modality[i]
        time_ms = timestamps[i]
        elapsed_ms = 0.0
        late_ms = 0.0
        is_first = events_seen[slot] == 0
        if not is_first:
            difference = np.float64(time_ms - last_event_ms[slot])
            if difference >= 0.0:
                elapsed_ms = difference
            else:
                late_ms = -difference
        row = vectors[slot, hidden:]
        _remember(
            row, i, np.float64(time_ms), elapsed_ms, late_ms, kind, numbers, hashes, lengths, declared,
            first, operations, constants, decay_half_life_ms, decay_bounds,
        )  # fmt: skip
        events_seen[slot] += 1
        if is_first or time_ms > last_event_ms[slot]:
            last_event_ms[slot] = time_ms
        applied_offset[slot] = offsets[i]

        inputs = out[at]
        for k in range(dense_inputs):
            inputs[k] = 0.0
        inputs[kind] = 1.0
        for column in range(number_inputs.shape[1]):
            target = number_inputs[kind, column]
            if target >= 0:
                value = numbers[i, column]
                if not math.isnan(value):
                    squashed = math.copysign(math.log1p(abs(value)), value)
                    number = target - modalities
                    inputs[target] = np.float32((squashed - scale[0, number]) / scale[1, number])
        inputs[time_column] = np.float32(math.log1p(elapsed_ms / 1000.0) / 10.0)
        inputs[time_column + 1] = 1.0 if is_first else 0.0
        hour = (time_ms % 86400000) / 86400000.0 * 2.0 * math.pi
        day = (time_ms % 604800000) / 604800000.0 * 2.0 * math.pi
        inputs[time_column + 2] = np.float32(math.sin(hour))
        inputs[time_column + 3] = np.float32(math.cos(hour))
        inputs[time_column + 4] = np.float32(math.sin(day))
        inputs[time_column + 5] = np.float32(math.cos(day))
        if is_trigger[kind]:
            trigger_event[triggers] = i
            trigger_seen[triggers] = events_seen[slot]
            for k in range(row.shape[0]):
                trigger_memory[triggers, k] = row[k]
            triggers += 1
    return triggers


@borrowing()
def assemble(event_at, codes, tables, table_start, table_width, table_column, out):  # type: ignore[no-untyped-def]
    """Write the embedding of each category field, zeros where it is absent, beside the dense inputs.

    `event_at` (events,) is the row of `codes` of each row of `out`.
    """
    for at in range(event_at.shape[0]):
        i = event_at[at]
        for f in range(codes.shape[1]):
            column = table_column[f]
            code = codes[i, f]
            if code < 0:
                for k in range(table_width[f]):
                    out[at, column + k] = 0.0
            else:
                begin = table_start[f] + np.int64(code) * table_width[f]
                for k in range(table_width[f]):
                    out[at, column + k] = tables[begin + k]


@borrowing()
def scatter_hidden(source, slots, vectors):  # type: ignore[no-untyped-def]
    """vectors[slots[i], :columns] = source[i], which has so many columns."""
    columns = source.shape[1]
    width = vectors.shape[1]
    for i in range(slots.shape[0]):
        if i + _AHEAD < slots.shape[0]:
            for k in range(0, columns, LINE):
                prefetch(vectors, slots[i + _AHEAD] * width + k)
        for k in range(columns):
            vectors[slots[i], k] = source[i, k]


@njit(cache=True, nogil=True)
def expiry_parts(client, timestamps, kept, is_new, seen, aged, watermark_ms, ttl_ms):  # type: ignore[no-untyped-def]
    """Where rows expire within a batch, as if its events came one at a time.

    `client` (n,) numbers the clients of the batch; `is_new` (n,) is false for events their rows have applied;
    `seen` and `aged` are the rows' as they are before the batch: by the latter they are expired `ttl_ms` later. An
    event at `timestamps` moves the watermark first, then its row may be found expired, then `aged` becomes `kept` of
    the event where that is later. Where all events keep rows alive for equally long these are times of events.

    Returns (n,) arrays: the part of the batch each event belongs to (a part ends where a row expires that has an
    earlier event in it), whether the event's row expires right before it, and the watermark then.
    """
    n = client.shape[0]
    part = np.zeros(n, np.int64)
    expires = np.zeros(n, np.bool_)
    watermark = np.empty(n, np.int64)
    alive = seen.copy()
    last = aged.copy()
    last_part = np.full(seen.shape[0], -1, np.int64)
    current = 0
    for i in range(n):
        watermark_ms = max(watermark_ms, timestamps[i])
        watermark[i] = watermark_ms
        c = client[i]
        if is_new[i]:
            if alive[c] and watermark_ms - last[c] >= ttl_ms:
                expires[i] = True
                if last_part[c] == current:
                    current += 1
                last[c] = kept[i]
            elif not alive[c] or kept[i] > last[c]:
                last[c] = kept[i]
            alive[c] = True
            last_part[c] = current
        part[i] = current
    return part, expires, watermark
