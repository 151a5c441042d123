"""Copies of rows that left memory, in a scratch file: a faster way to them than through RocksDB.

Guarantees: a copy equals what RocksDB holds; a key that is brought into memory, or changed, has no copy. The file
is never read by another process or after a restart. Its pages are the system's to keep or drop, so it costs disk
and page cache, not the process's memory.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from stream.store import arena, kernels
from stream.store.faults import explain
from stream.store.keys import PackedKeys
from stream.store.table import Table

__all__ = ["Cold"]

Int64 = npt.NDArray[np.int64]
Uint64 = npt.NDArray[np.uint64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

# Reads that earn a row its place in memory: moving one costs about as much as four reads.
_OFTEN = 8


class Cold:
    """Up to `rows` copies; the least recently read make room for others."""

    def __init__(self, folder: Path, floats: int, rows: int, seed: int) -> None:
        try:
            self._scratch = arena.Scratch(folder / "cold.scratch")
            self._table = Table(floats, rows, seed, make=self._scratch.make)
        except OSError as error:
            raise explain(folder, "taking room for cold_rows", error) from error
        self._rows = rows

    def __len__(self) -> int:
        return len(self._table)

    def put(self, keys: PackedKeys, hashes: Uint64, meta: Int64, floats: Float32) -> None:
        """Keep copies of rows whose keys have none."""
        table = self._table
        if len(keys) > self._rows:
            return
        excess = len(table) + len(keys) - self._rows
        if excess > 0:
            table.remove(table.choose_victims(excess, spill=False))
        slots = np.full(len(keys), -1, np.int64)
        created = table.insert(keys, hashes, slots, len(keys))
        table.meta[slots[created]] = meta[created]
        table.rows[slots[created]] = floats[created]

    def read(
        self, keys: PackedKeys, hashes: Uint64, horizon: int, vectors: Float32, meta: Int64
    ) -> tuple[Bool, Bool, Bool]:
        """Fill vectors (float32[n, width]) and meta (int64[n, 3]) with live copies.

        Returns which keys have a copy, expired or not, which of them were found live, and which live ones are
        read often enough to belong in memory.
        """
        table = self._table
        slots, _ = table.find(keys, hashes)
        found = np.empty(len(keys), np.bool_)
        blank = np.zeros(vectors.shape[1], np.float32)
        kernels.gather(table.records, table.rows, slots, horizon, blank, vectors, found, meta, _OFTEN)
        often = found & (table.recency[slots] >= _OFTEN)
        return slots >= 0, found, often

    def take(self, keys: PackedKeys, hashes: Uint64) -> tuple[Int64, Int64, Float32]:
        """Remove copies and return them: positions int64[m], meta int64[m, 3], floats float32[m, ...]."""
        table = self._table
        slots, _ = table.find(keys, hashes)
        at = np.flatnonzero(slots >= 0)
        _, first = np.unique(slots[at], return_index=True)
        at = at[np.sort(first)]
        meta, floats = table.meta[slots[at]], table.rows[slots[at]]
        table.remove(slots[at])
        return at, meta, floats

    def close(self) -> None:
        """Let go of the file."""
        self._scratch.close()
