"""Packed keys: n byte strings in one buffer, the form in which every batch operation takes its keys.

Guarantees: each key is 1 to 1,024 bytes, order and duplicates are kept, int64 values map without loss.
Does not copy on construction from a caller's own buffer; the caller leaves that buffer alone afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from stream.borrowing import read_only
from stream.errors import StoreError
from stream.store import kernels

__all__ = ["MAX_KEY_BYTES", "PackedKeys"]

MAX_KEY_BYTES = 1024


class PackedKeys:
    """n keys in one buffer.

    buffer: uint8[total], offsets: int64[n + 1]; key i is buffer[offsets[i]:offsets[i + 1]].
    Raises StoreError where a key is empty or longer than 1,024 bytes, naming its position.
    """

    __slots__ = ("buffer", "offsets")

    def __init__(self, buffer: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> None:
        if offsets.ndim != 1 or offsets.shape[0] < 1 or offsets[0] < 0 or offsets[-1] > buffer.shape[0]:
            raise StoreError(
                f"keys.offsets: shape {offsets.shape} over a buffer of {buffer.shape[0]} bytes; "
                "n + 1 ascending positions inside the buffer are needed"
            )
        lengths = np.diff(offsets)
        if lengths.shape[0] and (int(lengths.min()) < 1 or int(lengths.max()) > MAX_KEY_BYTES):
            at = int(np.flatnonzero((lengths < 1) | (lengths > MAX_KEY_BYTES))[0])
            raise StoreError(f"key {at}: {int(lengths[at])} bytes long; a key has 1 to {MAX_KEY_BYTES} bytes")
        self.buffer = buffer
        self.offsets = offsets

    @classmethod
    def from_list(cls, keys: Sequence[bytes]) -> PackedKeys:
        """Pack a sequence of bytes objects."""
        n = len(keys)
        offsets = np.zeros(n + 1, np.int64)
        np.cumsum(np.fromiter(map(len, keys), np.int64, n), out=offsets[1:])
        return cls(np.frombuffer(bytearray().join(keys), np.uint8), offsets)

    @classmethod
    def from_int64(cls, values: npt.ArrayLike) -> PackedKeys:
        """Pack integers as eight big-endian bytes each, so that equal keys mean equal integers.

        Raises StoreError where a value does not fit int64.
        """
        array = np.asarray(values)
        if array.dtype.kind not in "iu" or (array.dtype.kind == "u" and array.size and array.max() > 2**63 - 1):
            raise StoreError(f"integer keys: dtype {array.dtype}; values of the int64 range are needed")
        packed = array.astype(">i8").reshape(-1)
        return cls(packed.view(np.uint8), np.arange(packed.shape[0] + 1, dtype=np.int64) * 8)

    @classmethod
    def concatenate(cls, parts: Sequence[PackedKeys]) -> PackedKeys:
        """The keys of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        buffers = [part.buffer[part.offsets[0] : part.offsets[-1]] for part in parts]
        lengths = [np.diff(part.offsets) for part in parts]
        offsets = np.zeros(sum(len(part) for part in parts) + 1, np.int64)
        if parts:
            np.cumsum(np.concatenate(lengths), out=offsets[1:])
        return cls.checked(np.concatenate([*buffers, np.empty(0, np.uint8)]), offsets)

    def __len__(self) -> int:
        return int(self.offsets.shape[0]) - 1

    def __getitem__(self, i: int) -> bytes:
        if not -len(self) <= i < len(self):
            raise IndexError(f"key {i} of {len(self)}")
        i %= len(self)
        return self.buffer[self.offsets[i] : self.offsets[i + 1]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.to_list())

    def __repr__(self) -> str:
        return f"PackedKeys(n={len(self)}, bytes={int(self.offsets[-1] - self.offsets[0])})"

    def take(self, indices: npt.ArrayLike) -> PackedKeys:
        """The keys at `indices` (int64[m], from 0), in that order.

        Raises
        ------
        IndexError: there is no key at one of them.
        """
        index = read_only(indices, np.int64)
        buffer, offsets, missing = kernels.take_keys(read_only(self.buffer), read_only(self.offsets), index)
        if missing >= 0:
            raise IndexError(f"key {index[missing]} of {len(self)}")
        return self.checked(buffer, offsets)

    @classmethod
    def checked(cls, buffer: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> PackedKeys:
        """Keys that are known to be keys: nothing is looked at."""
        keys = cls.__new__(cls)
        keys.buffer, keys.offsets = buffer, offsets
        return keys

    def to_list(self) -> list[bytes]:
        """The keys as bytes objects."""
        data = self.buffer.tobytes()
        edges = self.offsets.tolist()
        return [data[a:b] for a, b in pairwise(edges)]
