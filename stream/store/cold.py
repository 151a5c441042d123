"""Copies of rows that left memory, in a scratch file: a faster way to them than through RocksDB.

Guarantees: a copy equals what RocksDB holds; a key that is brought into memory, or changed, has no copy. The file
is never read by another process or after a restart, and has no name. Its pages are the system's to keep or drop:
it costs disk and page cache, not the process's own memory. A file that cannot grow stops growing, or ends with its
copies; nothing but speed rests on them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from stream.store import arena, kernels, layout
from stream.store.faults import explain
from stream.store.keys import PackedKeys
from stream.store.lives import Lives
from stream.store.table import Hasher, Table

__all__ = ["Cold"]

Int64 = npt.NDArray[np.int64]
Uint64 = npt.NDArray[np.uint64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

# Reads that earn a row its place in memory: moving one costs about as much as four reads.
_OFTEN = 8


# Taken at a time, so that no single call waits for much of it.
_ROOM_BYTES = 8 << 20
# A file that grows by itself leaves this share of the file system to others.
_LEFT_FREE = 0.1


class Cold:
    """Up to `rows` copies; the least recently read make room for others.

    seed, hasher, lives: of the table whose rows they are. growing: take room as copies come, while a tenth of the file
    system stays free. Otherwise room for all `rows` is taken at once; raises StoreError naming the folder where there
    is none.
    """

    def __init__(
        self, folder: Path, floats: int, rows: int, seed: int, hasher: Hasher | None, lives: Lives, *, growing: bool
    ) -> None:
        self._hasher = hasher
        self._lives = lives
        self._rows = rows
        self._room = 0
        self._growing = growing
        try:
            self._scratch = arena.Scratch(folder / "cold.scratch")
            self._table: Table | None = None
            if not growing:
                self._table = self._make(floats, seed)
                self._take_room(rows)
        except OSError as error:
            raise explain(folder, "taking room for cold_rows", error) from error
        self._floats = floats
        self._seed = seed

    def __len__(self) -> int:
        return 0 if self._table is None else len(self._table)

    @property
    def nbytes(self) -> int:
        """Disk in use by the file."""
        return self._scratch.taken_bytes

    def _make(self, floats: int, seed: int) -> Table:
        return Table(floats, self._rows, seed, self._hasher, self._scratch.make, self._lives)

    def _take_room(self, rows: int) -> None:
        assert self._table is not None
        for array in (self._table.rows, self._table.records):
            self._scratch.take(array, self._room, rows)
        self._room = rows

    def _grow(self, rows: int) -> None:
        """Have room for so many rows, or as many as there may be."""
        step = max(_ROOM_BYTES // (4 * self._floats + 8 * layout.RECORD_WORDS), 1)
        try:
            while self._room < rows:
                if self._scratch.free_share() < _LEFT_FREE:
                    raise OSError("the file system is nearly full")
                if self._table is None:
                    self._table = self._make(self._floats, self._seed)
                self._take_room(min(self._room + step, self._rows))
        except OSError:
            self._rows = self._room
            self._growing = False

    def put(self, keys: PackedKeys, hashes: Uint64, account: Int64, floats: Float32) -> None:
        """Keep copies of rows, with account int64[n, 4], whose keys have none, as far as they fit."""
        needed = min(len(self) + len(keys), self._rows)
        if self._growing and needed > self._room:
            self._grow(needed)
        table = self._table
        if table is None or len(keys) > self._rows:
            return
        excess = len(table) + len(keys) - self._rows
        if excess > 0:
            table.remove(table.choose_victims(excess, spill=False))
        slots = np.full(len(keys), -1, np.int64)
        try:
            created = table.insert(keys, hashes, slots, len(keys))
        except OSError:
            # No room for long keys: an insert that broke off leaves copies without contents, so all of them end.
            self._table = None
            self._rows = 0
            self._growing = False
            return
        table.set_account(slots[created], account[created])
        table.rows[slots[created]] = floats[created]

    def read(
        self, keys: PackedKeys, hashes: Uint64, horizon: int, vectors: Float32, meta: Int64
    ) -> tuple[Bool, Bool, Bool]:
        """Fill vectors (float32[n, width]) and meta (int64[n, 3]) with live copies.

        Returns which keys have a copy, expired or not, which of them were found live, and which live ones are
        read often enough to belong in memory.
        """
        table = self._table
        assert table is not None
        slots, _ = table.find(keys, hashes)
        found = np.empty(len(keys), np.bool_)
        blank = np.zeros(vectors.shape[1], np.float32)
        kernels.gather(table.records, table.rows, slots, horizon, table.lives.mask, blank, vectors, found, meta, _OFTEN)
        often = found & (table.recency[slots] >= _OFTEN)
        return slots >= 0, found, often

    def take(self, keys: PackedKeys, hashes: Uint64) -> tuple[Int64, Int64, Float32]:
        """Remove copies and return them: positions int64[m], account int64[m, 4], floats float32[m, ...]."""
        table = self._table
        assert table is not None
        slots, _ = table.find(keys, hashes)
        at = np.flatnonzero(slots >= 0)
        _, first = np.unique(slots[at], return_index=True)
        at = at[np.sort(first)]
        account, floats = table.account(slots[at]), table.rows[slots[at]]
        table.remove(slots[at])
        return at, account, floats

    def drop(self, keys: PackedKeys, hashes: Uint64) -> None:
        """Remove the copies of distinct keys."""
        assert self._table is not None
        slots, _ = self._table.find(keys, hashes)
        self._table.remove(slots[slots >= 0])

    def close(self) -> None:
        """Let go of the file."""
        self._scratch.close()
