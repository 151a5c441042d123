"""Category tables that heads read: one learned row for each value of a field of a task's events.

Every value has its row by its exact bytes, once it has occurred often enough; until then, and where the field is
absent, it uses the table's `rare` row, from which it starts. A row is a mean and a variance for each output of the
task: the Gaussian posterior of what the value adds to the scores.

Guaranteed: rows, variances and counts are part of the trainer's checkpoint and resume bit for bit. What has changed is
`touched` until a version with it is confirmed: a row that changes again meanwhile stays touched. A row that expires,
or that `max_rows` ends, is touched too, and published as a null.

Not guaranteed: bounded memory for values that occur too seldom to be admitted; they are counted exactly, and forgotten
once they have not occurred for the time to live.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgpack
import numpy as np
from numpy.typing import NDArray

from stream.model.rows import RARE_KEY, RowTable
from stream.settings import Task
from stream.store import Checkpoint, EmbeddingStore, PackedKeys, StoreOptions
from trainer.checkpoint import Changes, Database

__all__ = ["CategoryTable", "read_effects", "rows_in", "write_effects"]

_SLICE_ROWS = 4096
_SWEEP_MS = 2.0
_RESERVED_ROWS = 1 << 12


class CategoryTable:
    """The rows of one field for one task.

    Parameters
    ----------
    name: of the table in the parameter log.
    width: outputs of the task.
    settings: of the task.
    """

    def __init__(self, name: str, width: int, settings: Task) -> None:
        self.name = name
        self.width = width
        self._prior = settings.table_prior_variance
        options = StoreOptions(
            # Of each output the mean, which is published, and the variance, which is not.
            width=2 * width,
            ttl_ms=None if settings.table_ttl_s is None else int(settings.table_ttl_s * 1000),
            max_rows=settings.table_max_rows,
            admission_threshold=settings.table_admission,
            changelog=True,
            reserve_rows=_RESERVED_ROWS,
        )
        self._store = EmbeddingStore.open(None, options)
        # The first call starts the record of rows that `max_rows` ends.
        self._store.take_capped()
        self._rare = np.stack([np.zeros(width), np.full(width, self._prior)], axis=-1).astype(np.float32)
        self._touched: dict[bytes, int] = {}
        self._tick = 0
        self._open: Checkpoint | None = None

    def __len__(self) -> int:
        """Values with a row of their own."""
        return len(self._store)

    @property
    def has_touched(self) -> bool:
        """Whether some row has changed since the last confirmed version."""
        return bool(self._touched)

    def observe(self, key: bytes, event_ms: int) -> None:
        """Count an occurrence of a value at an event; it gets its row where that is enough."""
        store = self._store
        store.advance_watermark(event_ms)
        if key == RARE_KEY:
            return
        seen = store.observe([key], event_ms=event_ms)
        self._touch(seen.gone)
        if not seen.admitted[0]:
            return
        with store.update([key]) as slots:
            slot = int(slots[0])
            if store.events_seen[slot] == 0:
                store.vectors[slot, ::2] = self._rare[:, 0]
                store.vectors[slot, 1::2] = self._prior
                self._touch([key])
            store.events_seen[slot] += 1
            store.last_event_ms[slot] = max(int(store.last_event_ms[slot]), event_ms)

    def read(self, key: bytes) -> tuple[bytes, NDArray[np.float64]]:
        """The key of the row that a value uses, its own or the rare one's, and its mean and variance (width, 2)."""
        found = self._store.lookup([key])
        if not found.found[0]:
            return RARE_KEY, self._rare.astype(np.float64)
        return key, found.vectors.reshape(self.width, 2).astype(np.float64)

    def write(self, key: bytes, effect: NDArray[np.float64]) -> None:
        """Replace what `read` gave, under the key that it gave."""
        if key == RARE_KEY:
            self._rare[:] = effect
        else:
            with self._store.update([key]) as slots:
                self._store.vectors[slots[0]] = effect.reshape(-1)
        self._touch([key])

    def _touch(self, keys: Iterable[bytes]) -> None:
        self._tick += 1
        for key in keys:
            self._touched[key] = self._tick

    def sweep(self) -> None:
        """End some rows that are past their time."""
        self._touch(self._store.sweep(_SWEEP_MS) + self._store.take_capped())

    def touched(self) -> tuple[dict[bytes, bytes | None], int]:
        """Rows that have changed, as they are now (None: gone), and what to give to `confirm`."""
        self.sweep()
        keys = list(self._touched)
        own = [key for key in keys if key != RARE_KEY]
        rows: dict[bytes, bytes | None] = {}
        if own:
            found = self._store.lookup(own)
            for key, vector, there in zip(own, found.vectors, found.found.tolist(), strict=True):
                rows[key] = vector[::2].tobytes() if there else None
        if RARE_KEY in self._touched:
            rows[RARE_KEY] = self._rare[:, 0].tobytes()
        return rows, self._tick

    def confirm(self, tick: int) -> None:
        """A version with the rows that `touched` gave with this number is confirmed."""
        self._touched = {key: at for key, at in self._touched.items() if at > tick}

    def compare(self, published: RowTable | None) -> None:
        """Touch every row that differs from what is published, and every one that is published and no more."""
        before = dict(published.items()) if published is not None else {}
        current = {RARE_KEY: self._rare[:, 0].tobytes()}
        for keys, found in self._store.scan():
            current.update((key, vector[::2].tobytes()) for key, vector in zip(keys, found.vectors, strict=True))
        self._touch(key for key in current.keys() | before.keys() if current.get(key) != before.get(key))

    def state(self) -> bytes:
        """What was learned, for `restore`: every row."""
        parts = list(self._store.scan())
        keys = PackedKeys.concatenate([keys for keys, _ in parts])
        vectors = [found.vectors.tobytes() for _, found in parts]
        packed: bytes = msgpack.packb(
            [self._rare.tobytes(), keys.buffer.tobytes(), keys.offsets.tobytes(), b"".join(vectors)]
        )
        return packed

    def restore(self, state: bytes | None) -> None:
        """Go back to what `state` wrote; None: to having learned nothing. Which values have a row stays as it is; one
        that had none then is as if it had just been given it."""
        rare = np.stack([np.zeros(self.width), np.full(self.width, self._prior)], axis=-1).astype(np.float32)
        then: dict[bytes, NDArray[np.float32]] = {}
        if state is not None:
            rare, then = _unpacked(state)
        self._rare = rare
        new = np.stack([rare[:, 0], np.full(self.width, self._prior, np.float32)], axis=-1).reshape(-1)
        self._touch([RARE_KEY])
        for keys, _ in list(self._store.scan()):
            with self._store.update(keys) as slots:
                self._store.vectors[slots] = np.stack([then.get(key, new) for key in keys])
            self._touch(keys)

    def save(self, changes: Changes) -> None:
        """Add everything that changed since the last checkpoint."""
        if self._open is not None:
            # The disk refused it.
            self._open.abandon()
        self._open = self._store.checkpoint()
        for keys, rows in self._open.slices(_SLICE_ROWS):
            changes.update((self._row_key(key), row) for key, row in zip(keys, rows, strict=True))
        changes[self._about_key] = msgpack.packb([self.width, self._store.watermark_ms, self._rare.tobytes()])

    def saved(self) -> None:
        """The checkpoint is written."""
        if self._open is not None:
            self._open.commit()
            self._open = None

    def load(self, database: Database) -> None:
        """Take over what the last checkpoint holds, if it holds anything.

        Raises
        ------
        StoreError: the table was made with another width.
        """
        about = database.get(self._about_key)
        if about is None:
            return
        width, watermark_ms, rare = msgpack.unpackb(about)
        prefix = self._row_key(b"")
        pairs = [(key[len(prefix) :], row) for key, row in database.scan(prefix)]
        self._store.restore([key for key, _ in pairs], [row for _, row in pairs])
        self._store.advance_watermark(watermark_ms)
        self._rare = np.frombuffer(rare, np.float32).reshape(width, 2).copy()

    def _row_key(self, key: bytes) -> bytes:
        return b"c/" + self.name.encode() + b"/" + key

    @property
    def _about_key(self) -> bytes:
        return b"a/" + self.name.encode()


def _unpacked(state: bytes) -> tuple[NDArray[np.float32], dict[bytes, NDArray[np.float32]]]:
    """The rare row (width, 2) and the others (2 width,) of `CategoryTable.state`."""
    rare, buffer, offsets, vectors = msgpack.unpackb(state)
    keys = PackedKeys(np.frombuffer(buffer, np.uint8), np.frombuffer(offsets, np.int64))
    rows = np.frombuffer(vectors, np.float32).reshape(len(keys), len(rare) // 4)
    return np.frombuffer(rare, np.float32).reshape(-1, 2).copy(), dict(zip(keys, rows, strict=True))


def rows_in(state: bytes) -> dict[bytes, bytes | None]:
    """The rows that `CategoryTable.state` says were served, by key."""
    rare, rows = _unpacked(state)
    served: dict[bytes, bytes | None] = {key: row[::2].tobytes() for key, row in rows.items()}
    return served | {RARE_KEY: rare[:, 0].tobytes()}


def read_effects(
    tables: Sequence[CategoryTable], keys: Sequence[bytes], outputs: int
) -> tuple[list[bytes], NDArray[np.float64]]:
    """The keys of the rows that one example uses, and their means and variances (tables, outputs, 2)."""
    found = [table.read(key) for table, key in zip(tables, keys, strict=True)]
    effects = np.stack([effect for _, effect in found]) if found else np.zeros((0, outputs, 2))
    return [key for key, _ in found], effects


def write_effects(tables: Sequence[CategoryTable], keys: Sequence[bytes], effects: NDArray[np.float64]) -> None:
    """Replace what `read_effects` gave."""
    for table, key, effect in zip(tables, keys, effects, strict=True):
        table.write(key, effect)
