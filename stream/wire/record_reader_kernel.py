"""The kernels that read Kafka record batches: where batches lie, where records lie in them, and records into arrays.

Nothing at or beyond the given end is read, whatever the bytes are; what does not fit there is reported by a
negative position or a `FAULTS` number, never raised. Layout: Kafka's protocol guide, "Record Batch" and "Record".
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from stream.borrowing import borrowing
from stream.wire.checksum import crc32c
from stream.wire.copying import copy_bytes

__all__ = [
    "CHECKED_FROM",
    "CODEC",
    "CONTROL",
    "FAULTS",
    "HEADER_BYTES",
    "LEAST_RECORD_BYTES",
    "MOST_OFFSET",
    "TRANSACTIONAL",
    "count_undamaged",
    "pack_records",
    "plan_batches",
    "read_batches",
    "read_headers",
    "read_records",
]

#: Offset and length: what stands before the bytes that the length counts.
_LOG_OVERHEAD = 12
#: A batch of format 2 up to its first record.
HEADER_BYTES = 61
#: The checksum of format 2 covers a batch from its attributes on.
CHECKED_FROM = 21
#: The shortest message of formats 0 and 1 after offset and length.
_LEAST_LEGACY = 14
#: One byte each for length, attributes, time, offset, key, value and headers.
LEAST_RECORD_BYTES = 7
#: Bits of a batch's attributes.
CODEC = 0x07
APPEND_TIME = 0x08
TRANSACTIONAL = 0x10
CONTROL = 0x20
#: No log is so long; sums with what a batch may add stay within 64 bits.
MOST_OFFSET = 2**62
#: Offsets in a batch are 32 bits wide.
_MOST_DELTA = 2**31

#: What `read_records` reports, by number; 0 is none.
FAULTS = (
    "",
    "a record's length does not fit into the batch",
    "a record's time or offset is not a number that may stand there",
    "a record's key does not fit into the record",
    "a record's value does not fit into the record",
    "a record's headers do not fit into the record",
    "a record is shorter or longer than its length says",
    "bytes are left over after the last record",
)


@borrowing(forceinline=True)
def _varint(buffer: Any, position: Any, end: Any) -> Any:
    """A zigzag varint of up to 64 bits and the position after it; that is -1 if the varint is not whole."""
    value = np.uint64(0)
    shift = np.uint64(0)
    while position < end and shift < np.uint64(64):
        byte = np.uint64(buffer[position])
        position += 1
        value |= (byte & np.uint64(0x7F)) << shift
        if byte < np.uint64(0x80):
            return np.int64(value >> np.uint64(1)) ^ -np.int64(value & np.uint64(1)), position
        shift += np.uint64(7)
    return np.int64(0), np.int64(-1)


@borrowing(forceinline=True)
def _big_endian(buffer: Any, position: Any, width: Any) -> Any:
    """A signed big-endian integer of `width` bytes."""
    value = np.uint64(0)
    for i in range(width):
        value = (value << np.uint64(8)) | np.uint64(buffer[position + i])
    unused = np.uint64(64 - 8 * width)
    return np.int64(value << unused) >> np.int64(unused)


@njit(cache=True, nogil=True)
def read_batches(buffer: Any) -> Any:
    """Where the whole batches of a fetch lie, and what their headers say.

    Returns int64[n, 12]: begin and end in `buffer`, format (-1: too short to tell), whether it is long enough for its
    header, base offset, and for format 2 also checksum, attributes, last offset delta, first and greatest time,
    producer id, number of records. Only the last batch may not be long enough; one that the end of the fetch cuts
    off is left out.
    """
    size = len(buffer)
    count = 0
    for fill in (False, True):
        rows = np.zeros((count if fill else 0, 12), np.int64)
        position = 0
        count = 0
        while size - position >= _LOG_OVERHEAD:
            length = _big_endian(buffer, position + 8, 4)
            end = position + _LOG_OVERHEAD + length
            if length >= _LEAST_LEGACY and end > size:
                break
            count += 1
            magic = np.int64(buffer[position + 16]) if length >= _LEAST_LEGACY else np.int64(-1)
            whole = magic == 0 or magic == 1 or end - position >= HEADER_BYTES
            if fill:
                row = rows[count - 1]
                row[0] = position
                row[1] = end
                row[2] = magic
                row[3] = whole
                row[4] = _big_endian(buffer, position, 8)
                if magic >= 2 and whole:
                    row[5] = _big_endian(buffer, position + 17, 4) & 0xFFFFFFFF
                    row[6] = _big_endian(buffer, position + 21, 2)
                    row[7] = _big_endian(buffer, position + 23, 4)
                    row[8] = _big_endian(buffer, position + 27, 8)
                    row[9] = _big_endian(buffer, position + 35, 8)
                    row[10] = _big_endian(buffer, position + 43, 8)
                    row[11] = _big_endian(buffer, position + 57, 4)
            if not whole:
                break
            position = end
    return rows


@njit(cache=True, nogil=True)
def plan_batches(batches: Any, committed: Any) -> Any:
    """What to read of the rows of `read_batches`.

    A batch is plain if its records lie there uncompressed and no transaction decides whether they are given out.
    committed: whether transactions do. A control batch holds no records to give out.

    Returns (`read_records`' rows of all batches; those of batches that are not plain lack where their records lie,
    where the run of plain batches that a batch is in ends: its own number if it is not plain,
    records before each batch and after the last, by their headers).
    """
    n = len(batches)
    regions = np.empty((n, 7), np.int64)
    run_end = np.empty(n, np.int64)
    before = np.zeros(n + 1, np.int64)
    unsure = CODEC | TRANSACTIONAL | CONTROL if committed else CODEC
    for b in range(n):
        begin, end, magic, whole, base = batches[b, 0], batches[b, 1], batches[b, 2], batches[b, 3], batches[b, 4]
        attributes, last_delta, count = batches[b, 6], batches[b, 7], batches[b, 11]
        control = attributes & CONTROL != 0
        is_plain = whole != 0 and magic == 2 and attributes & unsure == 0
        is_plain &= 0 <= base < MOST_OFFSET and last_delta >= -1
        is_plain &= 0 <= count <= (end - begin - HEADER_BYTES) // LEAST_RECORD_BYTES
        run_end[b] = n if is_plain else b
        given = max(count, 0) if magic == 2 and not control else 0
        before[b + 1] = before[b] + given
        regions[b, 0] = end if control else begin + HEADER_BYTES
        regions[b, 1] = end
        regions[b, 2] = given
        regions[b, 3] = base
        regions[b, 4] = base + last_delta + 1
        regions[b, 5] = batches[b, 8]
        regions[b, 6] = batches[b, 9] if attributes & APPEND_TIME else -1
    for b in range(n - 2, -1, -1):
        run_end[b] = min(run_end[b], run_end[b + 1])
    return regions, run_end, before


@borrowing()
def count_undamaged(buffer: Any, batches: Any) -> Any:
    """How many rows of `read_batches` (format 2, long enough) come before the first with a wrong checksum."""
    for b in range(len(batches)):
        state = crc32c(np.uint32(0xFFFFFFFF), buffer, batches[b, 0] + CHECKED_FROM, batches[b, 1])
        if np.int64(state ^ np.uint32(0xFFFFFFFF)) != batches[b, 5]:
            return b
    return len(batches)


@borrowing()
def read_records(text: Any, batches: Any, floor: Any, offsets: Any, timestamps_ms: Any, spans: Any) -> Any:
    """Find the records of uncompressed batches.

    Parameters
    ----------
    text: uint8.
    batches: int64[b, 7]: begin and end of the records in `text`, how many there are, base offset, next offset after
        the batch, time that record times count from, and that time for all of them or -1.
    floor: records at lower offsets are passed over.
    offsets, timestamps_ms: int64 out, one entry a record.
    spans: int64[n, 5] out: start and length of key and of value (length -1 for null), start of the headers or -1.

    Returns (records found, next offset, faulty batch or b, its `FAULTS` number, where in `text`). The records of
    batches before the faulty one are found.
    """
    found = 0
    for b in range(len(batches)):
        position, end, count = batches[b, 0], batches[b, 1], batches[b, 2]
        base, next_offset, first_ms, append_ms = batches[b, 3], batches[b, 4], batches[b, 5], batches[b, 6]
        before, floor_before = found, floor
        for _ in range(count):
            length, position = _varint(text, position, end)
            if position < 0 or length < 0 or length > end - position:
                return before, floor_before, b, 1, position
            stop = position + length
            # Attributes: a byte that has no meaning yet.
            delta_ms, position = _varint(text, position + 1, stop)
            if position < 0:
                return before, floor_before, b, 2, position
            delta, position = _varint(text, position, stop)
            if position < 0 or abs(delta) > _MOST_DELTA:
                return before, floor_before, b, 2, position
            key_length, position = _varint(text, position, stop)
            if position < 0 or key_length > stop - position:
                return before, floor_before, b, 3, position
            key_start = position
            position += max(key_length, 0)
            value_length, position = _varint(text, position, stop)
            if position < 0 or value_length > stop - position:
                return before, floor_before, b, 4, position
            value_start = position
            position += max(value_length, 0)
            headers = position
            header_count, position = _varint(text, position, stop)
            if position < 0 or header_count < 0 or header_count > stop - position:
                return before, floor_before, b, 5, position
            for _header in range(header_count):
                name_length, position = _varint(text, position, stop)
                if position < 0 or name_length < 0 or name_length > stop - position:
                    return before, floor_before, b, 5, position
                header_length, position = _varint(text, position + name_length, stop)
                if position < 0 or header_length > stop - position:
                    return before, floor_before, b, 5, position
                position += max(header_length, 0)
            if position != stop:
                return before, floor_before, b, 6, position
            offset = base + delta
            if offset < floor:
                continue
            floor = offset + 1
            offsets[found] = offset
            timestamps_ms[found] = first_ms + delta_ms if append_ms < 0 else append_ms
            spans[found, 0] = key_start
            spans[found, 1] = max(key_length, -1)
            spans[found, 2] = value_start
            spans[found, 3] = max(value_length, -1)
            spans[found, 4] = headers if header_count else -1
            found += 1
        if position != end:
            return before, floor_before, b, 7, position
        # The last record of a batch may have been compacted away; the batch still says where the next one begins.
        floor = max(floor, next_offset)
    return found, floor, len(batches), 0, 0


@njit(cache=True, nogil=True)
def read_headers(text: Any, starts: Any) -> Any:
    """Find headers that `read_records` has read over.

    Returns (number of headers at each start, int64[h, 4]: start and length of name and of value, -1 for null).
    """
    size = len(text)
    counts = np.empty(len(starts), np.int64)
    for i in range(len(starts)):
        counts[i] = _varint(text, starts[i], size)[0]
    spans = np.empty((counts.sum(), 4), np.int64)
    found = 0
    for i in range(len(starts)):
        _, position = _varint(text, starts[i], size)
        for _header in range(counts[i]):
            length, position = _varint(text, position, size)
            spans[found, 0] = position
            spans[found, 1] = length
            length, position = _varint(text, position + length, size)
            spans[found, 2] = position
            spans[found, 3] = max(length, -1)
            position += max(length, 0)
            found += 1
    return counts, spans


@njit(cache=True, nogil=True)
def pack_records(text: Any, spans: Any) -> Any:
    """Keys and values end to end: (key bytes, key offsets, key is null), the same of values, and how many records have
    headers."""
    n = len(spans)
    key_offsets = np.zeros(n + 1, np.int64)
    value_offsets = np.zeros(n + 1, np.int64)
    key_is_null = np.zeros(n, np.bool_)
    value_is_null = np.zeros(n, np.bool_)
    with_headers = 0
    for i in range(n):
        with_headers += spans[i, 4] >= 0
        key_is_null[i] = spans[i, 1] < 0
        value_is_null[i] = spans[i, 3] < 0
        key_offsets[i + 1] = key_offsets[i] + max(spans[i, 1], 0)
        value_offsets[i + 1] = value_offsets[i] + max(spans[i, 3], 0)
    keys = np.empty(key_offsets[n], np.uint8)
    values = np.empty(value_offsets[n], np.uint8)
    for i in range(n):
        copy_bytes(text, spans[i, 0], key_offsets[i + 1] - key_offsets[i], keys, key_offsets[i])
        copy_bytes(text, spans[i, 2], value_offsets[i + 1] - value_offsets[i], values, value_offsets[i])
    return (keys, key_offsets, key_is_null), (values, value_offsets, value_is_null), with_headers
