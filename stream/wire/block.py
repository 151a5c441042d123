"""One partition's slice of a topic as arrays.

Guarantees: keys and values lie end to end in one read-only buffer each, with n + 1 offsets; a null is told
from an empty one by a mask. Nothing is decoded here, and the buffers are not copied again by whoever decodes
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.borrowing import read_only

__all__ = ["Headers", "RecordBlock"]

#: Kafka record headers as clients hand them out.
Headers = Sequence[tuple[str, bytes | None]]


@dataclass(frozen=True, slots=True, eq=False)
class RecordBlock:
    """n records of one partition.

    Parameters
    ----------
    key_bytes, value_bytes: uint8 buffers.
    key_offsets, value_offsets: int64[n + 1]; record i lies from offset i to offset i + 1.
    key_is_null, value_is_null: bool[n].
    offsets: int64[n], the records' offsets in the partition.
    timestamps_ms: int64[n], the records' own Kafka timestamps, UTC milliseconds; 0 or less where there is
        none.
    headers: one sequence (or None) a record; None when no record has headers.

    Raises
    ------
    ValueError: the arrays do not agree on n, or an offset points outside its buffer.
    """

    key_bytes: NDArray[np.uint8]
    key_offsets: NDArray[np.int64]
    key_is_null: NDArray[np.bool_]
    value_bytes: NDArray[np.uint8]
    value_offsets: NDArray[np.int64]
    value_is_null: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    timestamps_ms: NDArray[np.int64]
    headers: Sequence[Headers | None] | None = None

    def __post_init__(self) -> None:
        n = len(self.offsets)
        for name, offsets, buffer in (
            ("key_offsets", self.key_offsets, self.key_bytes),
            ("value_offsets", self.value_offsets, self.value_bytes),
        ):
            if len(offsets) != n + 1:
                raise ValueError(f"{name} has {len(offsets)} entries: expected {n + 1}, one more than offsets")
            # The kernels read without bounds checks: wrong offsets would read foreign memory.
            if offsets[0] < 0 or offsets[-1] > len(buffer) or bool((offsets[1:] < offsets[:-1]).any()):
                raise ValueError(f"{name} must rise from 0 to at most {len(buffer)}, the length of its buffer")
        for name in ("key_is_null", "value_is_null", "timestamps_ms", "headers"):
            column: Any = getattr(self, name)
            if column is not None and len(column) != n:
                raise ValueError(f"{name} has {len(column)} entries: expected {n}, as offsets")
        for name, kind in _KINDS.items():
            # One memory layout and no write access for all blocks: one compiled kernel serves them all.
            object.__setattr__(self, name, read_only(getattr(self, name), kind))

    @classmethod
    def checked(
        cls,
        keys: tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]],
        values: tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]],
        offsets: NDArray[np.int64],
        timestamps_ms: NDArray[np.int64],
        headers: Sequence[Headers | None] | None,
    ) -> RecordBlock:
        """A block of arrays that are known to agree, of these types and end to end: nothing is looked at.

        keys, values: bytes, offsets and which are null. All arrays are made read-only, not copied.
        """
        block = cls.__new__(cls)
        arrays: tuple[NDArray[Any], ...] = (*keys, *values, offsets, timestamps_ms)
        for name, array in zip(_KINDS, arrays, strict=True):
            array.setflags(write=False)
            object.__setattr__(block, name, array)
        object.__setattr__(block, "headers", headers)
        return block

    @classmethod
    def from_lists(
        cls,
        keys: Sequence[bytes | None],
        values: Sequence[bytes | None],
        offsets: Sequence[int] | NDArray[np.int64],
        timestamps_ms: Sequence[int] | NDArray[np.int64],
        headers: Sequence[Headers | None] | None = None,
    ) -> RecordBlock:
        """A block from what a client library hands out, one entry a record in every argument."""
        key_bytes, key_offsets, key_is_null = _pack(keys)
        value_bytes, value_offsets, value_is_null = _pack(values)
        return cls(
            key_bytes=key_bytes,
            key_offsets=key_offsets,
            key_is_null=key_is_null,
            value_bytes=value_bytes,
            value_offsets=value_offsets,
            value_is_null=value_is_null,
            offsets=np.asarray(offsets, dtype=np.int64),
            timestamps_ms=np.asarray(timestamps_ms, dtype=np.int64),
            headers=headers if headers is not None and any(headers) else None,
        )

    def __len__(self) -> int:
        return len(self.offsets)

    def first(self, n: int) -> RecordBlock:
        """The first n records."""
        return RecordBlock(
            key_bytes=self.key_bytes,
            key_offsets=self.key_offsets[: n + 1],
            key_is_null=self.key_is_null[:n],
            value_bytes=self.value_bytes,
            value_offsets=self.value_offsets[: n + 1],
            value_is_null=self.value_is_null[:n],
            offsets=self.offsets[:n],
            timestamps_ms=self.timestamps_ms[:n],
            headers=self.headers[:n] if self.headers is not None else None,
        )

    def key(self, index: int) -> bytes | None:
        """The key of one record, as received."""
        if self.key_is_null[index]:
            return None
        return self.key_bytes[self.key_offsets[index] : self.key_offsets[index + 1]].tobytes()

    def value(self, index: int) -> bytes | None:
        """The value of one record, as received."""
        if self.value_is_null[index]:
            return None
        return self.value_bytes[self.value_offsets[index] : self.value_offsets[index + 1]].tobytes()

    def headers_of(self, index: int) -> Headers:
        """The headers of one record, as received; empty when it has none."""
        return (self.headers[index] or ()) if self.headers is not None else ()


#: The arrays of a block, in the order of its fields.
_KINDS = {
    "key_bytes": np.uint8,
    "key_offsets": np.int64,
    "key_is_null": np.bool_,
    "value_bytes": np.uint8,
    "value_offsets": np.int64,
    "value_is_null": np.bool_,
    "offsets": np.int64,
    "timestamps_ms": np.int64,
}


def _pack(
    items: Sequence[bytes | None],
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]:
    is_null = np.zeros(len(items), dtype=np.bool_)
    if None in items:
        is_null[:] = [item is None for item in items]
        items = [item or b"" for item in items]
    present: Any = items
    offsets = np.zeros(len(items) + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, present), dtype=np.int64, count=len(items)), out=offsets[1:])
    return np.frombuffer(b"".join(present), dtype=np.uint8), offsets, is_null
