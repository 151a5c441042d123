"""The kernel that writes embeddings as MessagePack, many records into one buffer.

Writes no more than the sizes that `record_bound` gives. Strings must be UTF-8 already; nothing is checked
here.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

from typing import Any

import numpy as np

from stream.borrowing import borrowing
from stream.wire.copying import copy_bytes

__all__ = ["encode_embeddings", "record_bound"]

#: In the order of the record; every name with its MessagePack header.
_NAMES = np.frombuffer(
    b"\xa9client_id\xactimestamp_ms\xa6offset\xb1parameter_version\xabevents_seen\xa6vector\xabpredictions",
    dtype=np.uint8,
)
_NAME_OFFSETS = np.cumsum(np.array([0, 10, 13, 7, 18, 12, 7, 12], dtype=np.int64))
_MAP_OF_SEVEN = 0x87


def record_bound(vector_width: int, names_length: int, task_count: int) -> int:
    """The most bytes a record takes beyond its client id.

    names_length: bytes of all task names with their MessagePack headers.
    """
    integers = 4 * 9
    headers = 1 + 5 + 5 + 5
    return headers + len(_NAMES) + integers + 4 * vector_width + names_length + 5 * task_count


@borrowing(forceinline=True)
def _store(value: Any, width: Any, out: Any, position: Any) -> Any:
    """`width` bytes of `value`, big-endian."""
    for i in range(width):
        out[position + i] = np.uint8(value >> np.uint64(8 * (width - 1 - i)))
    return position + width


@borrowing(forceinline=True)
def _name(index: Any, out: Any, position: Any) -> Any:
    start = _NAME_OFFSETS[index]
    return copy_bytes(_NAMES, start, _NAME_OFFSETS[index + 1] - start, out, position)


@borrowing(forceinline=True)
def _integer(value: Any, out: Any, position: Any) -> Any:
    raw = np.uint64(value)
    if value < 0:
        out[position] = 0xD3
        return _store(raw, 8, out, position + 1)
    if value < 0x80:
        out[position] = np.uint8(value)
        return position + 1
    if value < 0x100:
        out[position] = 0xCC
        return _store(raw, 1, out, position + 1)
    if value < 0x10000:
        out[position] = 0xCD
        return _store(raw, 2, out, position + 1)
    if value < 0x100000000:
        out[position] = 0xCE
        return _store(raw, 4, out, position + 1)
    out[position] = 0xCF
    return _store(raw, 8, out, position + 1)


@borrowing(forceinline=True)
def _text_header(length: Any, out: Any, position: Any) -> Any:
    if length < 32:
        out[position] = np.uint8(0xA0 | length)
        return position + 1
    if length < 0x100:
        out[position] = 0xD9
        out[position + 1] = np.uint8(length)
        return position + 2
    out[position] = 0xDA
    return _store(np.uint64(length), 2, out, position + 1)


@borrowing(forceinline=True)
def _is_given(bits: Any) -> Any:
    """Whether these bits of a float32 are a number: beyond infinity, without the sign, they are NaN."""
    return np.uint32(bits & np.uint32(0x7FFFFFFF)) <= np.uint32(0x7F800000)


@borrowing()
def encode_embeddings(
    keys: Any,
    key_offsets: Any,
    timestamp_ms: Any,
    offset: Any,
    parameter_version: Any,
    events_seen: Any,
    vector_bytes: Any,
    vector_width_bytes: Any,
    prediction_bits: Any,
    names: Any,
    name_offsets: Any,
    out: Any,
    starts: Any,
) -> Any:
    """Write n records to `out` (uint8) and where each begins, and the last ends, to `starts` (int64[n + 1]).

    parameter_version: int64[n], or int64[1] for all. vector_bytes: uint8, all vectors end to end, little-endian.
    prediction_bits: uint32[n, T], the bits of float32; NaN is not written. names: uint8, task names with their
        MessagePack headers.
    """
    n = len(timestamp_ms)
    tasks = len(name_offsets) - 1
    position = 0
    for row in range(n):
        starts[row] = position
        out[position] = _MAP_OF_SEVEN
        position = _name(0, out, position + 1)
        key_start = key_offsets[row]
        key_length = key_offsets[row + 1] - key_start
        position = _text_header(key_length, out, position)
        position = copy_bytes(keys, key_start, key_length, out, position)
        position = _integer(timestamp_ms[row], out, _name(1, out, position))
        position = _integer(offset[row], out, _name(2, out, position))
        position = _integer(parameter_version[row if len(parameter_version) > 1 else 0], out, _name(3, out, position))
        position = _integer(events_seen[row], out, _name(4, out, position))
        position = _name(5, out, position)
        if vector_width_bytes < 0x100:
            out[position] = 0xC4
            position = _store(np.uint64(vector_width_bytes), 1, out, position + 1)
        elif vector_width_bytes < 0x10000:
            out[position] = 0xC5
            position = _store(np.uint64(vector_width_bytes), 2, out, position + 1)
        else:
            out[position] = 0xC6
            position = _store(np.uint64(vector_width_bytes), 4, out, position + 1)
        position = copy_bytes(vector_bytes, row * vector_width_bytes, vector_width_bytes, out, position)
        position = _name(6, out, position)
        given = 0
        for task in range(tasks):
            given += _is_given(prediction_bits[row, task])
        if given < 16:
            out[position] = np.uint8(0x80 | given)
            position += 1
        else:
            out[position] = 0xDE
            position = _store(np.uint64(given), 2, out, position + 1)
        for task in range(tasks):
            if _is_given(prediction_bits[row, task]):
                name_start = name_offsets[task]
                position = copy_bytes(names, name_start, name_offsets[task + 1] - name_start, out, position)
                out[position] = 0xCA
                position = _store(np.uint64(prediction_bits[row, task]), 4, out, position + 1)
    starts[n] = position
