"""Kernels that read one MessagePack item at a position of a buffer.

Every function takes the buffer, a position and the end of the record, and reads nothing at or beyond that
end. What is not of the asked kind, or not whole, gives a negative length or position; nothing raises.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

from typing import Any

import numpy as np

from stream.borrowing import borrowing

__all__ = [
    "hash_range",
    "is_utf8",
    "read_array_header",
    "read_integer",
    "read_map_header",
    "read_number",
    "read_text",
    "same_bytes",
    "skip_scalar",
    "write_decimal",
]

_FNV_BASIS = np.uint64(0xCBF29CE484222325)
_FNV_PRIME = np.uint64(0x100000001B3)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_EXACT = 2**53
_INT64_MAX = np.uint64(2**63 - 1)


@borrowing(forceinline=True)
def _load(buffer: Any, position: Any, width: Any) -> Any:
    """`width` bytes, big-endian, as uint64."""
    value = np.uint64(0)
    for i in range(width):
        value = (value << np.uint64(8)) | np.uint64(buffer[position + i])
    return value


@borrowing(forceinline=True)
def same_bytes(left: Any, left_start: Any, right: Any, right_start: Any, length: Any) -> Any:
    for i in range(length):  # noqa: SIM110, a generator is slower once compiled
        if left[left_start + i] != right[right_start + i]:
            return False
    return True


@borrowing(forceinline=True)
def is_utf8(buffer: Any, start: Any, length: Any) -> Any:
    """Whether the bytes are UTF-8 by RFC 3629: nothing overlong, no surrogates, nothing above U+10FFFF."""
    any_high = np.uint8(0)
    for i in range(start, start + length):
        any_high |= buffer[i]
    if any_high < 0x80:
        return True
    i = start
    end = start + length
    while i < end:
        lead = buffer[i]
        if lead < 0x80:
            i += 1
            continue
        low, high = 0x80, 0xBF
        if 0xC2 <= lead <= 0xDF:
            more = 1
        elif 0xE0 <= lead <= 0xEF:
            more = 2
            if lead == 0xE0:
                low = 0xA0
            elif lead == 0xED:
                high = 0x9F
        elif 0xF0 <= lead <= 0xF4:
            more = 3
            if lead == 0xF0:
                low = 0x90
            elif lead == 0xF4:
                high = 0x8F
        else:
            return False
        if i + more >= end:
            return False
        if buffer[i + 1] < low or buffer[i + 1] > high:
            return False
        for j in range(2, more + 1):
            if buffer[i + j] < 0x80 or buffer[i + j] > 0xBF:
                return False
        i += more + 1
    return True


@borrowing(forceinline=True)
def hash_range(buffer: Any, start: Any, length: Any) -> Any:
    """`stream.wire.hashing.hash_bytes` of a range."""
    h = _FNV_BASIS
    for i in range(start, start + length):
        h = (h ^ np.uint64(buffer[i])) * _FNV_PRIME
    h = (h ^ (h >> np.uint64(30))) * _MIX_1
    h = (h ^ (h >> np.uint64(27))) * _MIX_2
    return h ^ (h >> np.uint64(31))


@borrowing(forceinline=True)
def read_map_header(buffer: Any, position: Any, end: Any) -> Any:
    """(number of pairs, position after the header); the number is -1 for anything but a map."""
    if position >= end:
        return -1, position
    tag = buffer[position]
    if 0x80 <= tag <= 0x8F:
        return np.int64(tag & 0x0F), position + 1
    if tag == 0xDE and position + 3 <= end:
        return np.int64(_load(buffer, position + 1, 2)), position + 3
    if tag == 0xDF and position + 5 <= end:
        return np.int64(_load(buffer, position + 1, 4)), position + 5
    return -1, position


@borrowing(forceinline=True)
def read_array_header(buffer: Any, position: Any, end: Any) -> Any:
    """(number of members, position after the header); the number is -1 for anything but an array."""
    if position >= end:
        return -1, position
    tag = buffer[position]
    if 0x90 <= tag <= 0x9F:
        return np.int64(tag & 0x0F), position + 1
    if tag == 0xDC and position + 3 <= end:
        return np.int64(_load(buffer, position + 1, 2)), position + 3
    if tag == 0xDD and position + 5 <= end:
        return np.int64(_load(buffer, position + 1, 4)), position + 5
    return -1, position


@borrowing(forceinline=True)
def read_text(buffer: Any, position: Any, end: Any) -> Any:
    """(start, bytes) of a text that lies wholly before `end`; -1 bytes for anything else."""
    if position >= end:
        return position, -1
    tag = buffer[position]
    start = position + 1
    length = np.int64(-1)
    if 0xA0 <= tag <= 0xBF:
        length = np.int64(tag & 0x1F)
    elif tag == 0xD9 and position + 2 <= end:
        start = position + 2
        length = np.int64(buffer[position + 1])
    elif tag == 0xDA and position + 3 <= end:
        start = position + 3
        length = np.int64(_load(buffer, position + 1, 2))
    elif tag == 0xDB and position + 5 <= end:
        start = position + 5
        length = np.int64(_load(buffer, position + 1, 4))
    if length > end - start:
        length = np.int64(-1)
    return start, length


@borrowing(forceinline=True)
def read_integer(buffer: Any, position: Any, end: Any) -> Any:
    """(value, position after it) of an integer that fits int64; the position is -1 for anything else."""
    if position >= end:
        return np.int64(0), -1
    tag = np.int64(buffer[position])
    if tag < 0x80:
        return tag, position + 1
    if tag >= 0xE0:
        return tag - 0x100, position + 1
    if tag < 0xCC or tag > 0xD3:
        return np.int64(0), -1
    width = 1 << (tag & 3)
    if position + 1 + width > end:
        return np.int64(0), -1
    raw = _load(buffer, position + 1, width)
    if tag <= 0xCF:
        if raw > _INT64_MAX:
            return np.int64(0), -1
        return np.int64(raw), position + 1 + width
    unused = np.uint64(64 - 8 * width)
    return np.int64(raw << unused) >> np.int64(unused), position + 1 + width


@borrowing(forceinline=True)
def read_number(buffer: Any, position: Any, end: Any) -> Any:
    """(value, position after it) of a finite float or an exact integer; else position -1."""
    if position >= end:
        return 0.0, -1
    tag = buffer[position]
    if tag == 0xCB:
        if position + 9 > end:
            return 0.0, -1
        value = np.uint64(_load(buffer, position + 1, 8)).view(np.float64)
        if value - value != 0.0:
            return 0.0, -1
        return value, position + 9
    if tag == 0xCA:
        if position + 5 > end:
            return 0.0, -1
        value = np.float64(np.uint32(_load(buffer, position + 1, 4)).view(np.float32))
        if value - value != 0.0:
            return 0.0, -1
        return value, position + 5
    integer, after = read_integer(buffer, position, end)
    if after < 0 or integer > _EXACT or integer < -_EXACT:
        return 0.0, -1
    return np.float64(integer), after


@borrowing(forceinline=True)
def skip_scalar(buffer: Any, position: Any, end: Any) -> Any:
    """The position after a text, number, boolean or null; -1 for anything else."""
    if position >= end:
        return -1
    tag = buffer[position]
    start, length = read_text(buffer, position, end)
    if length >= 0:
        return start + length
    if tag == 0xC0 or tag == 0xC2 or tag == 0xC3:
        return position + 1
    if tag == 0xCA or tag == 0xCB:
        after = position + (5 if tag == 0xCA else 9)
        return after if after <= end else -1
    _, after = read_integer(buffer, position, end)
    return after


@borrowing(forceinline=True)
def write_decimal(value: Any, out: Any, position: Any) -> Any:
    """Write an int64 as decimal text; the position after it. At most 20 bytes."""
    magnitude = np.uint64(value)
    if value < 0:
        out[position] = 0x2D
        position += 1
        magnitude = np.uint64(0) - magnitude
    digits = 1
    rest = magnitude // np.uint64(10)
    while rest > np.uint64(0):
        digits += 1
        rest = rest // np.uint64(10)
    for i in range(digits):
        out[position + digits - 1 - i] = np.uint8(np.uint64(0x30) + magnitude % np.uint64(10))
        magnitude = magnitude // np.uint64(10)
    return position + digits
