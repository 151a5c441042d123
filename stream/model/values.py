"""Exact lookup of category values: bytes to numbers, in arrays, for all fields of a batch in one pass.

Guaranteed: a value is found by all of its bytes, so two different values never share a number. Read-only once
built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stream.borrowing import borrowing
from stream.store.hashing import load_word
from stream.wire import EventColumns, hash_bytes
from stream.wire.scanning import same_bytes

__all__ = ["FieldValues", "ValueTables"]


@dataclass(frozen=True)
class FieldValues:
    """The distinct values of a category field, numbered 0, 1, 2, … in the order given.

    modality, column: where the field lies in decoded events. target: the column of its codes.
    """

    modality: int
    column: int
    values: Sequence[bytes]
    target: int


class ValueTables:
    """The values of category fields; a field may have several tables, with a target each.

    Parameters
    ----------
    modalities: how many there are.
    first: the code of a field's first value. missing: the code of a value that is not in its table.
    """

    def __init__(self, fields: Sequence[FieldValues], modalities: int, first: int, missing: int) -> None:
        self._missing = missing
        order = sorted(fields, key=lambda one: one.modality)
        #: The fields of modality m are those at self._first[m] : self._first[m + 1].
        self._first = np.searchsorted([one.modality for one in order], np.arange(modalities + 1)).astype(np.int64)
        #: (fields, 4): column, target, where the field's places begin, and how many they are.
        self._fields = np.empty((len(order), 4), np.int64)
        places: list[NDArray[np.int64]] = []
        text = bytearray()
        begin = 0
        for number, one in enumerate(order):
            hashes = np.array([hash_bytes(value) for value in one.values], np.uint64)
            size, at = _placed(hashes)
            # One line of a cache for each: code, where the value's bytes begin, how many they are, and their hash.
            own = np.full((size, 4), -1, np.int64)
            own[at, 0] = first + np.arange(len(at))
            own[at, 2] = lengths = np.array([len(value) for value in one.values], np.int64)
            own[at, 1] = len(text) + np.cumsum(lengths) - lengths
            own[at, 3] = hashes.view(np.int64)
            self._fields[number] = (one.column, one.target, begin, size)
            places.append(own)
            text += b"".join(one.values)
            begin += size
        self._places = np.concatenate([*places, np.empty((0, 4), np.int64)])
        # Words are read from it, also from the beginning of the last value.
        self._text = np.frombuffer(bytes(text) + bytes(8), np.uint8)

    def codes(self, columns: EventColumns, width: int) -> NDArray[np.int32]:
        """(n, width) the code of each event's value in its field's target; -1 where the event has no such field."""
        out = np.empty((len(columns.modality), width), np.int32)
        _look_up(
            columns.modality, columns.text, columns.category_start, columns.category_length, columns.category_hash,
            self._first, self._fields, self._places, self._text, self._missing, out,
        )  # fmt: skip
        return out


def _placed(hashes: NDArray[np.uint64]) -> tuple[int, NDArray[np.int64]]:
    """A number of places, and (n,) the one of each hash: by its last bits, or the next free one.

    At most a quarter is taken: a processor that guesses wrong how often to look loses as much as a lookup takes.
    """
    size = 8
    while size < 4 * len(hashes):
        size *= 2
    at = (hashes & np.uint64(size - 1)).astype(np.int64)
    taken = np.zeros(size, np.bool_)
    for number in range(len(at)):
        while taken[at[number]]:
            at[number] = (at[number] + 1) % size
        taken[at[number]] = True
    return size, at


@borrowing()
def _look_up(  # type: ignore[no-untyped-def]
    modality, text, starts, lengths, hashes, first, fields, places, value_text, missing, out
):
    for i in range(modality.shape[0]):
        out[i, :] = -1
        kind = modality[i]
        # Of a record that is no event.
        if kind < 0:
            continue
        for f in range(first[kind], first[kind + 1]):
            column, begin, size = fields[f, 0], fields[f, 2], fields[f, 3]
            length = lengths[i, column]
            if length < 0:
                continue
            hashed = np.int64(hashes[i, column])
            code = np.int32(missing)
            at = begin + (hashed & (size - 1))
            while places[at, 0] >= 0:
                if places[at, 3] == hashed and places[at, 2] == length:
                    start, value = starts[i, column], places[at, 1]
                    if 0 < length <= 8 and start + 8 <= text.shape[0]:
                        # Most values: neither a loop nor a call.
                        beyond = np.uint64(64 - 8 * length)
                        same = (load_word(text, start) ^ load_word(value_text, value)) << beyond == np.uint64(0)
                    else:
                        same = same_bytes(text, start, value_text, value, length)
                    if same:
                        code = np.int32(places[at, 0])
                        break
                at = begin + ((at - begin + 1) & (size - 1))
            out[i, fields[f, 1]] = code
