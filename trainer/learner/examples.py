"""Answered examples of one task to learn from again: the newest ones, in memory and in the trainer's database.

Guaranteed: what was added last, up to the capacity, is there, after a crash as of the last checkpoint; a checkpoint
writes only what came since the one before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stream.errors import StoreError
from trainer.checkpoint import Changes
from trainer.learner.part import Labelled

__all__ = ["Batch", "Examples"]

#: Examples written under one key.
_CHUNK = 256


@dataclass(frozen=True)
class Batch:
    """Examples: `inputs` (n, F), `target`, `weight`, `offset` (n,)."""

    inputs: NDArray[np.float32]
    target: NDArray[np.float64]
    weight: NDArray[np.float64]
    offset: NDArray[np.float64]


class Examples:
    """The last `capacity` examples by number, the first ever being 0.

    Parameters
    ----------
    slack: so many more stay readable, for what was begun that much earlier.
    """

    def __init__(self, width: int, capacity: int, slack: int) -> None:
        self.capacity = capacity
        self.slack = slack
        self.count = 0
        #: Examples before this number are not there any more, though they are within the capacity.
        self.lowest = 0
        self._room = -(-(capacity + slack) // _CHUNK) * _CHUNK
        self._inputs = np.zeros((_CHUNK, width), np.float32)
        #: Target, weight and offset.
        self._about = np.zeros((_CHUNK, 3))
        self._changed: set[int] = set()

    def add(self, one: Labelled) -> None:
        """Keep one more."""
        at = self.count % self._room
        while at >= len(self._inputs):
            self._grow(2 * len(self._inputs))
        self._inputs[at] = one.inputs
        self._about[at] = one.target, one.weight, one.log_odds_offset
        self._changed.add(at // _CHUNK)
        self.count += 1

    def first(self, until: int) -> int:
        """Number of the oldest example within the capacity before number `until`."""
        return max(0, until - self.capacity, min(self.lowest, until))

    def forget_since(self, count: int) -> None:
        """Go back to when there were so many. Of those, the ones that later ones were written over are gone."""
        self.lowest = max(self.lowest, self.count - self._room)
        self.count = count

    def clear(self) -> None:
        """Begin anew with the first one."""
        self.count = self.lowest = 0

    def take(self, numbers: NDArray[np.int64]) -> Batch:
        """Examples by number."""
        at = numbers % self._room
        about = self._about[at]
        return Batch(self._inputs[at], about[:, 0], about[:, 1], about[:, 2])

    def _grow(self, length: int) -> None:
        length = min(length, self._room)
        inputs = np.zeros((length, self._inputs.shape[1]), np.float32)
        about = np.zeros((length, 3))
        inputs[: len(self._inputs)], about[: len(self._about)] = self._inputs, self._about
        self._inputs, self._about = inputs, about

    def save(self, changes: Changes, prefix: bytes) -> None:
        """Add what came since the last checkpoint."""
        for chunk in self._changed:
            rows = slice(chunk * _CHUNK, (chunk + 1) * _CHUNK)
            changes[prefix + b"%06d" % chunk] = self._about[rows].tobytes() + self._inputs[rows].tobytes()

    def saved(self) -> None:
        """The checkpoint is written."""
        self._changed.clear()

    def load(self, count: int, lowest: int, chunks: Iterable[tuple[bytes, bytes]]) -> None:
        """Take over what checkpoints wrote.

        Raises
        ------
        StoreError: a chunk is of another width, or they are fewer than `count` says.
        """
        self.count, self.lowest = count, lowest
        width = self._inputs.shape[1]
        about_bytes = _CHUNK * 3 * 8
        found = 0
        for key, value in chunks:
            chunk = int(key[-6:])
            if len(value) != about_bytes + _CHUNK * width * 4:
                raise StoreError(f"a chunk of kept examples has {len(value)} bytes: {width} inputs need others")
            rows = slice(chunk * _CHUNK, (chunk + 1) * _CHUNK)
            while rows.stop > len(self._inputs):
                self._grow(2 * len(self._inputs))
            self._about[rows] = np.frombuffer(value, np.float64, _CHUNK * 3).reshape(_CHUNK, 3)
            self._inputs[rows] = np.frombuffer(value, np.float32, offset=about_bytes).reshape(_CHUNK, width)
            found += 1
        if found * _CHUNK < min(count, self._room):
            raise StoreError(f"{found} chunks of kept examples are there: {count} examples were kept")
