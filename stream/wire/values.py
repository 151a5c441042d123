"""Packed values: n byte strings in one buffer, the form in which records are handed to whoever publishes them.

Guaranteed: order is kept; a value may be empty. Nothing is copied on construction, and nobody writes to the buffer
afterwards. Behaves as a sequence of bytes for those who want one value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["PackedValues"]


class PackedValues:
    """n values in one buffer.

    buffer: uint8[total], offsets: int64[n + 1]; value i is buffer[offsets[i]:offsets[i + 1]].
    """

    __slots__ = ("buffer", "offsets")

    def __init__(self, buffer: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self.buffer = buffer
        self.offsets = offsets

    @classmethod
    def from_list(cls, values: Sequence[bytes]) -> PackedValues:
        """Pack a sequence of bytes objects."""
        offsets = np.zeros(len(values) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, values), np.int64, len(values)), out=offsets[1:])
        return cls(np.frombuffer(bytearray().join(values), np.uint8), offsets)

    @classmethod
    def concatenate(cls, parts: Sequence[PackedValues]) -> PackedValues:
        """The values of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        offsets = np.zeros(sum(map(len, parts)) + 1, np.int64)
        if not parts:
            return cls(np.empty(0, np.uint8), offsets)
        np.cumsum(np.concatenate([np.diff(part.offsets) for part in parts]), out=offsets[1:])
        return cls(np.concatenate([part.buffer[part.offsets[0] : part.offsets[-1]] for part in parts]), offsets)

    def __len__(self) -> int:
        return int(self.offsets.shape[0]) - 1

    def __getitem__(self, i: int) -> bytes:
        if not -len(self) <= i < len(self):
            raise IndexError(f"value {i} of {len(self)}")
        i %= len(self)
        return self.buffer[self.offsets[i] : self.offsets[i + 1]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        first = int(self.offsets[0])
        data = self.buffer[first : self.offsets[-1]].tobytes()
        return iter([data[a - first : b - first] for a, b in pairwise(self.offsets.tolist())])

    def __repr__(self) -> str:
        return f"PackedValues(n={len(self)}, bytes={int(self.offsets[-1] - self.offsets[0])})"
