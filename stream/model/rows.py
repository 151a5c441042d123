"""Learned rows by key, as they are published and served: the category tables that heads read.

A table proves itself by the number of its rows and the sum, modulo 2^64, of a hash of each: whoever has the same
sum has the same rows, in whatever order they came. (The sum of hashes is the incremental set hash of Bellare and
Micciancio, 1997, at a width that finds faults, not forgers.)

Guaranteed: `gather` sees the rows of one version, the last that was settled, in whatever thread. What is staged is
in `rows`, `checksum` and `items` at once, and served from `settle` on.

Not guaranteed: that several tables are settled together: the caller does that where nothing is gathered.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from stream.errors import ParametersError
from stream.store import MAX_KEY_BYTES, EmbeddingStore, PackedKeys, StoreOptions

__all__ = ["RARE_KEY", "Changes", "RowTable", "row_hash", "value_key"]

#: Rows to write by key, as their bytes; None takes a row away.
Changes = Mapping[bytes, bytes | None]

#: The row of every value that has none of its own.
RARE_KEY = b"*"
_LENGTH = struct.Struct("<I")
_MODULUS = 2**64
#: Address space taken at first; a table that outgrows it is copied once.
_RESERVED_ROWS = 1 << 10


def value_key(value: bytes) -> bytes:
    """The key of a category value's row."""
    return b"=" + value


def row_hash(key: bytes, row: bytes) -> int:
    """64 bits over key and row; an empty row stands for one that was taken away."""
    digest = hashlib.blake2b(_LENGTH.pack(len(key)) + key + row, digest_size=8).digest()
    return int.from_bytes(digest, "little")


class RowTable:
    """Rows of `width` float32 by key of 1 to 1,024 bytes.

    Parameters
    ----------
    width: floats in a row.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._store = EmbeddingStore.open(None, StoreOptions(width=width, reserve_rows=_RESERVED_ROWS))
        self._ahead: dict[bytes, bytes | None] = {}
        self._served = False
        #: How many rows, and the sum of their hashes, what is staged included.
        self.rows = 0
        self.checksum = 0

    def after(self, changes: Changes) -> tuple[int, int]:
        """What `rows` and `checksum` would be with these changes."""
        rows, checksum = self.rows, self.checksum
        keys = list(changes)
        for key, before in zip(keys, self.get(keys), strict=True):
            row = changes[key]
            if before is not None:
                rows, checksum = rows - 1, checksum - row_hash(key, before)
            if row is not None:
                rows, checksum = rows + 1, checksum + row_hash(key, row)
        return rows, checksum % _MODULUS

    def get(self, keys: Iterable[bytes]) -> list[bytes | None]:
        """Rows as bytes, what is staged included; None where there is none."""
        wanted = list(keys)
        if not wanted:
            return []
        found = self._store.lookup(wanted)
        return [
            self._ahead[key] if key in self._ahead else (vector.tobytes() if is_there else None)
            for key, vector, is_there in zip(wanted, found.vectors, found.found.tolist(), strict=True)
        ]

    def accepts(self, changes: Changes) -> bool:
        """Whether every key and row could be in this table."""
        return all(
            1 <= len(key) <= MAX_KEY_BYTES and (row is None or len(row) == 4 * self.width)
            for key, row in changes.items()
        )

    def stage(self, changes: Changes, result: tuple[int, int] | None = None) -> None:
        """Take changes in; they are served from `settle` on, or at once where nothing was settled yet.

        Parameters
        ----------
        result: what `after` says of them, where that is known.

        Raises
        ------
        ParametersError: a key or row could not be in this table, which is unchanged.
        """
        if not self.accepts(changes):
            raise ParametersError(
                f"a table takes keys of 1 to {MAX_KEY_BYTES} bytes and rows of {4 * self.width}: others were given"
            )
        self.rows, self.checksum = result or self.after(changes)
        if self._served:
            self._ahead.update(changes)
        else:
            self._write(changes)

    def settle(self) -> None:
        """Serve what is staged."""
        self._served = True
        ahead, self._ahead = self._ahead, {}
        self._write(ahead)

    def _write(self, changes: Changes) -> None:
        gone = [key for key, row in changes.items() if row is None]
        if gone:
            self._store.delete(gone)
        kept = {key: row for key, row in changes.items() if row is not None}
        if kept:
            vectors = np.frombuffer(b"".join(kept.values()), np.float32).reshape(len(kept), self.width)
            self._store.upsert(list(kept), vectors, event_ms=1)

    def gather(self, keys: PackedKeys) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Settled rows (n, width), zeros where there is none, and which were found (n,)."""
        found = self._store.lookup(keys)
        return found.vectors, found.found

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every key and row, what is staged included; the table must not change meanwhile."""
        for keys, found in self._store.scan():
            for key, vector in zip(keys, found.vectors, strict=True):
                if key not in self._ahead:
                    yield key, vector.tobytes()
        for key, row in self._ahead.items():
            if row is not None:
                yield key, row

    def copy(self) -> RowTable:
        """Another table with the same rows, what is staged included."""
        other = RowTable(self.width)
        other._write(dict(self.items()))
        other.rows, other.checksum = self.rows, self.checksum
        return other
