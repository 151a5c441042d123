"""The latest events of each client, as the encoder wrote them, and the hidden state just before them.

A window lies under the same slot as its client's row and shares its life: read back with it, started anew where it
expires, written where it changes, out of memory when it leaves. So windows are bounded by `length` events a client,
by the time to live, and by `memory_rows`.

The state before the window is moved on by an event when that leaves the window, by the cell as it is then: replayed
from there under one trunk, a window's events lead to the row's state, bit for bit.

Guaranteed: what is in a window depends on the client's events and their order alone, wherever batches are cut.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stream.errors import StoreError
from stream.model.engine import Encoded, Engine
from stream.model.layout import Layout
from trainer.checkpoint import Changes, Database

__all__ = ["Sequences", "Windows"]

_PREFIX = b"w"
_TOTAL = struct.Struct("<q")

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Sequences:
    """Whole windows of n clients, oldest event first, filled up with zeros and -1.

    `first` (n, H) states before them; `dense` (n, t, dense inputs); `codes` (n, t, fields); `length` (n,) events;
    `whole` (n,) whether it is all that the client ever did, so that `first` is zero and owes nothing to any trunk.
    """

    first: NDArray[np.float32]
    dense: NDArray[np.float32]
    codes: NDArray[np.int32]
    length: Indices
    whole: NDArray[np.bool_]

    def take(self, chosen: Indices) -> Sequences:
        """Some of them."""
        return Sequences(
            self.first[chosen], self.dense[chosen], self.codes[chosen], self.length[chosen], self.whole[chosen]
        )


class Windows:
    """Windows by slot; kept beside the rows of a `trainer.replica.Replica`.

    Parameters
    ----------
    database: holds those of earlier checkpoints.
    length: most events of a client.
    """

    def __init__(self, layout: Layout, database: Database, length: int) -> None:
        self._database = database
        self._length = length
        self._modalities = len(layout.schema.modalities)
        self._hidden = np.zeros((0, layout.hidden), np.float32)
        #: Events of each client since its row began; event i of them lies at i % length.
        self._total = np.zeros(0, np.int64)
        self._time_ms = np.zeros((0, length), np.int64)
        self._dense = np.zeros((0, length, layout.dense_inputs), np.float32)
        self._codes = np.zeros((0, length, len(layout.embedded)), np.int32)

    # ---------------------------------------------------------------- beside a row

    def grow(self, rows: int) -> None:
        """Make room for so many slots."""
        added = rows - len(self._total)

        def longer(array: NDArray[np.generic]) -> NDArray[np.generic]:
            return np.concatenate([array, np.zeros((added, *array.shape[1:]), array.dtype)])

        for name in ("_hidden", "_total", "_time_ms", "_dense", "_codes"):
            setattr(self, name, longer(getattr(self, name)))

    def reset(self, slot: int) -> None:
        """A row begins anew."""
        self._hidden[slot] = 0.0
        self._total[slot] = 0

    def read(self, keys: Sequence[bytes], slots: Sequence[int]) -> None:
        """Rows were read back.

        Raises
        ------
        StoreError: a window is not there, or was written under another `model.online.length`.
        """
        values = self._database.get_many([_key(key) for key in keys])
        for slot, value in zip(slots, values, strict=True):
            self._decode(slot, value or b"")

    def save(self, keys: Sequence[bytes], slots: Sequence[int], changes: Changes) -> None:
        """Rows have changed."""
        for key, slot in zip(keys, slots, strict=True):
            total = int(self._total[slot])
            kept = min(total, self._length)
            changes[_key(key)] = b"".join(
                (
                    _TOTAL.pack(total), self._hidden[slot].tobytes(), self._time_ms[slot, :kept].tobytes(),
                    self._dense[slot, :kept].tobytes(), self._codes[slot, :kept].tobytes(),
                )
            )  # fmt: skip

    def end(self, key: bytes, changes: Changes) -> None:
        """A row is gone from the disk."""
        changes[_key(key)] = None

    def _decode(self, slot: int, value: bytes) -> None:
        total = _TOTAL.unpack_from(value)[0] if len(value) >= _TOTAL.size else 0
        kept = min(total, self._length)
        parts = (
            (self._hidden[slot], np.float32), (self._time_ms[slot, :kept], np.int64),
            (self._dense[slot, :kept], np.float32), (self._codes[slot, :kept], np.int32),
        )  # fmt: skip
        if len(value) != _TOTAL.size + sum(part.nbytes for part, _ in parts):
            raise StoreError(
                f"a window of {self._database.path} has {len(value)} bytes, which are not {kept} events: restore "
                f"model.online.length, or use another trainer.data_dir"
            )
        self._total[slot] = total
        at = _TOTAL.size
        for part, kind in parts:
            part[...] = np.frombuffer(value, kind, part.size, at).reshape(part.shape)
            at += part.nbytes

    # ---------------------------------------------------------------- events

    def extend(self, encoded: Encoded, timestamp_ms: Indices, engine: Engine) -> None:
        """Take the events of a batch that the engine has applied.

        Parameters
        ----------
        timestamp_ms: (n,) of the batch's events.
        """
        if not encoded.events:
            return
        codes, time_ms = encoded.codes[encoded.event_at], timestamp_ms[encoded.event_at]
        slots = encoded.slots
        # The last event of a client is in the last wave that has it.
        new = np.searchsorted(encoded.starts, encoded.last, "right").astype(np.int64)
        before = self._total[slots]
        oldest = np.maximum(before - self._length, 0)
        leaving = np.maximum(before + new - self._length, 0) - oldest
        if leaving.any():
            self._leave(encoded, codes, slots, before, oldest, leaving, engine)
        client, number = _ragged(new)
        row = encoded.starts[number] + client
        event = before[client] + number
        stays = event >= (before + new - self._length)[client]
        at = (slots[client[stays]], event[stays] % self._length)
        self._dense[at] = encoded.dense[row[stays]]
        self._codes[at] = codes[row[stays]]
        self._time_ms[at] = time_ms[row[stays]]
        self._total[slots] += new

    def _leave(
        self,
        encoded: Encoded,
        codes: NDArray[np.int32],
        slots: Indices,
        before: Indices,
        oldest: Indices,
        leaving: Indices,
        engine: Engine,
    ) -> None:
        """Move the states before the windows on by the events that leave them, which may be as new as the batch."""
        order = np.argsort(-leaving, kind="stable")
        order = order[leaving[order] > 0]
        lengths = leaving[order]
        waves = np.arange(int(lengths[0]))
        starts = np.concatenate([[0], np.cumsum(np.searchsorted(-lengths, -waves, "left"))]).astype(np.int64)
        rank, number = _ragged(lengths)
        place, client = starts[number] + rank, order[rank]
        event = oldest[client] + number
        given = event >= before[client]
        dense = np.empty((len(place), self._dense.shape[2]), np.float32)
        left = np.empty((len(place), codes.shape[1]), np.int32)
        kept = (slots[client[~given]], event[~given] % self._length)
        dense[place[~given]], left[place[~given]] = self._dense[kept], self._codes[kept]
        row = encoded.starts[(event - before[client])[given]] + client[given]
        dense[place[given]], left[place[given]] = encoded.dense[row], codes[row]
        self._hidden[slots[order]] = engine.step(dense, left, starts, self._hidden[slots[order]])

    # ---------------------------------------------------------------- what is learned from

    def find(self, slots: Indices, as_of_ms: Indices, modality: Indices) -> Indices:
        """(n,) how many events of a window come before the one of this time and modality; -1 where it is not there.

        Of several the last.
        """
        held = np.arange(self._length) < self._total[slots][:, None]
        same = (self._time_ms[slots] == as_of_ms[:, None]) & held
        asked = self._dense[slots][:, :, : self._modalities]
        same &= np.take_along_axis(asked, modality[:, None, None], axis=2)[:, :, 0] == 1.0
        # Places in order of age.
        age = (np.arange(self._length) - self._oldest(slots)[:, None]) % self._length
        found: Indices = np.where(same, age, -1).max(axis=1)
        return found

    def sequences(self, slots: Indices) -> Sequences:
        """The windows of these rows."""
        length = np.minimum(self._total[slots], self._length)
        at = np.arange(int(length.max(initial=0)))
        place = (slots[:, None], (at + self._oldest(slots)[:, None]) % self._length)
        within = at < length[:, None]
        dense = np.where(within[:, :, None], self._dense[place], np.float32(0.0))
        codes = np.where(within[:, :, None], self._codes[place], np.int32(-1))
        return Sequences(self._hidden[slots], dense, codes, length, self._total[slots] <= self._length)

    def _oldest(self, slots: Indices) -> Indices:
        """(n,) places of the oldest events."""
        total = self._total[slots]
        return np.where(total > self._length, total % self._length, 0)


def _key(row: bytes) -> bytes:
    """Where the window of a row lies, by the row's key."""
    return _PREFIX + row[1:]


def _ragged(lengths: Indices) -> tuple[Indices, Indices]:
    """Of lists of these lengths, one after the other: which list each element is in, and its number there."""
    which = np.repeat(np.arange(len(lengths)), lengths)
    ends = np.cumsum(lengths)
    return which, np.arange(len(which)) - (ends - lengths)[which]
