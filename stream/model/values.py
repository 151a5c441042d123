"""Exact lookup of category values: bytes to row number, in arrays.

Guaranteed: a value is found by all of its bytes, so two different values never share a row. Read-only once
built.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit
from numpy.typing import NDArray

from stream.wire import hash_bytes

__all__ = ["ValueTable"]


@njit(cache=True, nogil=True)
def _lookup(  # type: ignore[no-untyped-def]
    modality,
    wanted,
    column,
    text,
    starts,
    lengths,
    hashes,
    table,
    table_hash,
    value_bytes,
    value_offsets,
    missing,
    base,
    out,
    out_column,
):
    mask = table.shape[0] - 1
    for i in range(modality.shape[0]):
        if modality[i] != wanted:
            continue
        length = lengths[i, column]
        if length < 0:
            out[i, out_column] = -1
            continue
        out[i, out_column] = missing
        hashed = hashes[i, column]
        at = np.int64(hashed & np.uint64(mask))
        while table[at] >= 0:
            if table_hash[at] == hashed:
                value = table[at]
                begin = value_offsets[value]
                if value_offsets[value + 1] - begin == length:
                    start = starts[i, column]
                    same = True
                    for k in range(length):
                        if value_bytes[begin + k] != text[start + k]:
                            same = False
                            break
                    if same:
                        out[i, out_column] = value + base
                        break
            at = (at + 1) & mask


class ValueTable:
    """Category values numbered 0, 1, 2, … in the order given.

    Parameters
    ----------
    values: distinct byte strings.
    """

    def __init__(self, values: Sequence[bytes]) -> None:
        size = 8
        while size < 2 * len(values) + 2:
            size *= 2
        self.values = tuple(values)
        self._table = np.full(size, -1, np.int32)
        self._hash = np.zeros(size, np.uint64)
        self._bytes = np.frombuffer(b"".join(values) or b"\0", np.uint8).copy()
        self._offsets = np.concatenate([[0], np.cumsum([len(v) for v in values])]).astype(np.int64)
        for number, value in enumerate(values):
            hashed = hash_bytes(value)
            at = hashed & (size - 1)
            while self._table[at] >= 0:
                at = (at + 1) & (size - 1)
            self._table[at] = number
            self._hash[at] = hashed

    def __len__(self) -> int:
        return len(self.values)

    def lookup(
        self,
        modality: NDArray[np.int32],
        wanted: int,
        column: int,
        text: NDArray[np.uint8],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int32],
        hashes: NDArray[np.uint64],
        missing: int,
        base: int,
        out: NDArray[np.int32],
        out_column: int,
    ) -> None:
        """Write the number of each event's value, and `base` more, into a column of `out` (n, columns).

        For events of modality `wanted` only. `missing` stands for a value that is not in the table, -1 for an absent
        field.
        """
        _lookup(
            modality, wanted, column, text, starts, lengths, hashes,
            self._table, self._hash, self._bytes, self._offsets, missing, base, out, out_column,
        )  # fmt: skip
