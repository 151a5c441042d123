"""The kernel that writes Kafka records.

A record of format 2 is: length, attributes (0), time since the batch's first record, offset since the batch's first
record, key, value (length -1 is a tombstone), number of headers (0); all but the attributes are zigzag varints
before the bytes they count. Source: Kafka's protocol guide, "Record Batch" and "Record".

Nothing is checked here: `record_bound` bytes for each record, keys and values included, must be there.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

from typing import Any

import numpy as np

from stream.borrowing import borrowing
from stream.wire.copying import copy_bytes

__all__ = ["RECORD_OVERHEAD", "write_records"]

#: The most bytes a record takes beyond its key and value: five varints of 32 bits, one of 64, attributes, headers.
RECORD_OVERHEAD = 5 + 1 + 10 + 5 + 5 + 5 + 1


@borrowing(forceinline=True)
def _varint_bytes(value: Any) -> Any:
    zigzag = np.uint64((value << 1) ^ (value >> 63))
    size = 1
    while zigzag >= np.uint64(0x80):
        zigzag >>= np.uint64(7)
        size += 1
    return size


@borrowing(forceinline=True)
def _put_varint(value: Any, out: Any, position: Any) -> Any:
    zigzag = np.uint64((value << 1) ^ (value >> 63))
    while zigzag >= np.uint64(0x80):
        out[position] = np.uint8(zigzag & np.uint64(0x7F)) | np.uint8(0x80)
        zigzag >>= np.uint64(7)
        position += 1
    out[position] = np.uint8(zigzag)
    return position + 1


@borrowing()
def write_records(
    keys: Any,
    key_offsets: Any,
    values: Any,
    value_offsets: Any,
    has_values: Any,
    first: Any,
    offset_delta: Any,
    time_delta_ms: Any,
    limit: Any,
    out: Any,
) -> Any:
    """Write records from row `first` on to `out` (uint8) as long as they fit into `limit` bytes.

    keys, values: uint8; key_offsets, value_offsets: int64[n + 1]. has_values: False writes tombstones and reads no
    values. offset_delta: of the first record written, from the batch's first.

    Returns (the row after the last one written, bytes written).
    """
    position = 0
    time_bytes = _varint_bytes(time_delta_ms)
    row = first
    rows = len(key_offsets) - 1
    while row < rows:
        key_length = key_offsets[row + 1] - key_offsets[row]
        value_length = np.int64(-1)
        if has_values:
            value_length = value_offsets[row + 1] - value_offsets[row]
        delta = np.int64(offset_delta + row - first)
        body = (
            2
            + time_bytes
            + _varint_bytes(delta)
            + _varint_bytes(key_length)
            + key_length
            + _varint_bytes(value_length)
            + max(value_length, np.int64(0))
        )
        if position + _varint_bytes(body) + body > limit:
            break
        position = _put_varint(body, out, position)
        out[position] = 0
        position = _put_varint(time_delta_ms, out, position + 1)
        position = _put_varint(delta, out, position)
        position = _put_varint(key_length, out, position)
        position = copy_bytes(keys, key_offsets[row], key_length, out, position)
        position = _put_varint(value_length, out, position)
        if has_values:
            position = copy_bytes(values, value_offsets[row], value_length, out, position)
        out[position] = 0
        position += 1
        row += 1
    return row, position
