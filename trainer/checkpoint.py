"""The trainer's own database: everything that must resume together, of one instant.

One RocksDB holds rows, waiting examples, answered predictions, pending feedback, posteriors, standardisers,
parameters and the positions of both inputs. Between two checkpoints all changes live in memory; a checkpoint
is one atomic write batch of all of them.

Guaranteed: after a crash at any moment, what is read back is exactly what one checkpoint wrote. So the
positions never run ahead of the rows or behind the learned, and a prediction that was made after the
checkpoint is made again from the same row, because its row went back with the position. (Rows that were ahead
of their position would skip the replayed events, and the examples of those events would be lost; with one
batch that cannot be.)

Not guaranteed: that the last checkpoint survives a power cut. The one before it does, as a whole; the input
is read again from there.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray
from rocksdict import DbClosedError, Options, Rdict, WriteBatch

from stream.errors import StoreError

__all__ = ["Changes", "Database", "Overlay", "pack_array", "unpack_array"]

#: Keys to write (None: to delete).
Changes = dict[bytes, bytes | None]

_FORMAT_KEY = b"m/format"
_FORMAT = b"4"


class Database:
    """Bytes by key, in order, written a checkpoint at a time.

    Parameters
    ----------
    path: directory; made where it is missing.

    Raises
    ------
    StoreError: it is locked by another process, damaged, or of another format; names the path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_keep_log_file_num(2)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._db = Rdict(str(path), options)
        except Exception as error:
            raise StoreError(
                f"the trainer's database {str(path)!r} cannot be opened: {error}; "
                f"only one trainer can use a directory (trainer.data_dir)"
            ) from error
        written = self.get(_FORMAT_KEY)
        if written is None:
            self.write({_FORMAT_KEY: _FORMAT})
        elif written != _FORMAT:
            self.close()
            raise StoreError(
                f"the trainer's database {str(path)!r} has format {written!r}, expected {_FORMAT!r}: "
                f"use the release that wrote it, or another trainer.data_dir"
            )

    def get(self, key: bytes) -> bytes | None:
        """The value under a key, as of the last checkpoint."""
        value: bytes | None = self._db.get(key)
        return value

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Values in the order of the keys."""
        if not keys:
            return []
        values: list[bytes | None] = self._db.get(list(keys))
        return values

    def scan(self, prefix: bytes, start: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Pairs whose key begins with `prefix`, in order of the keys, from `start` on."""
        iterator = self._db.iter()
        iterator.seek(start if start is not None and start > prefix else prefix)
        while iterator.valid():
            key: bytes = iterator.key()
            if not key.startswith(prefix):
                return
            yield key, iterator.value()
            iterator.next()

    def write(self, changes: Changes) -> None:
        """Apply all changes, or none.

        Raises
        ------
        StoreError: the disk refuses; nothing of the changes is there.
        """
        batch = WriteBatch(raw_mode=True)
        for key, value in changes.items():
            if value is None:
                batch.delete(key)
            else:
                batch.put(key, value)
        try:
            self._db.write(batch)
        except Exception as error:
            raise StoreError(
                f"a checkpoint cannot be written to {str(self.path)!r}: {error}; check the free space of its disk"
            ) from error

    def close(self) -> None:
        """Release the directory."""
        try:
            self._db.close()
        except DbClosedError:
            return


class Overlay:
    """A database as it will be after the next checkpoint: what was written, and the changes since, in memory."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._changed: Changes = {}

    def __len__(self) -> int:
        """How many keys have changed since the last checkpoint."""
        return len(self._changed)

    def get(self, key: bytes) -> bytes | None:
        """The value under a key."""
        if key in self._changed:
            return self._changed[key]
        return self.database.get(key)

    def put(self, key: bytes, value: bytes | None) -> None:
        """Change the value under a key; None deletes it."""
        self._changed[key] = value

    def changed(self, key: bytes, value: bytes) -> bytes | None:
        """What has become of a value that the database has."""
        return self._changed.get(key, value)

    def scan(self, prefix: bytes, start: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Pairs whose key begins with `prefix`, in order of the keys, from `start` on. Nothing may be put meanwhile."""
        own = sorted(key for key in self._changed if key.startswith(prefix) and key >= start)
        last = b""
        changed = ((key, self._changed[key]) for key in own)
        for key, value in heapq.merge(changed, self.database.scan(prefix, start), key=lambda pair: pair[0]):
            # Of two, the change comes first.
            if key != last and value is not None:
                yield key, value
            last = key

    def save(self, changes: Changes) -> None:
        """Add every change to a checkpoint."""
        changes.update(self._changed)

    def saved(self) -> None:
        """The checkpoint is written."""
        self._changed.clear()


def pack_array(array: NDArray[Any]) -> bytes:
    """An array as MessagePack: dtype, shape, bytes."""
    packed: bytes = msgpack.packb([array.dtype.str, list(array.shape), array.tobytes()])
    return packed


def unpack_array(data: bytes) -> NDArray[Any]:
    """A writable array from `pack_array`.

    Raises
    ------
    StoreError: the bytes are something else.
    """
    try:
        kind, shape, content = msgpack.unpackb(data)
        return np.frombuffer(content, np.dtype(kind)).reshape(shape).copy()
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise StoreError(f"an array of the checkpoint cannot be read: {error}") from error
