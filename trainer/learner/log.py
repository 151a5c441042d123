"""The labels of one task, kept until its inputs have the scale that stays, to be learned again under each new one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np

from trainer.checkpoint import Changes, Database
from trainer.learner.part import Labelled

__all__ = ["LabelLog", "Stretches"]

#: Of the log, which labels are learned: from the one number up to before the other, one stretch after the other.
Stretches = list[tuple[int, int]]


class LabelLog:
    """Every label that came, in order, and which of them are those of the present state.

    A state that is gone back to names its labels by their numbers in the log. The ones that are given up stay in it: a
    state from after them may be gone back to as well.

    Guaranteed: resumes as of the last checkpoint; a checkpoint writes only what came since the one before. Bounded: a
    prediction has one label, or two where a negative turns out positive, so there are at most twice as many as examples
    by the last size of `standardise_again`; `close` then drops them all.

    Parameters
    ----------
    prefix: of its keys in the database.
    """

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix
        self._labels: list[Labelled] = []
        self._stretches: Stretches | None = []
        #: How many are in the database, and which keys must go from there.
        self._written = 0
        self._gone: list[bytes] = []

    @property
    def is_open(self) -> bool:
        """Whether every label of the present state is here."""
        return self._stretches is not None

    @property
    def stretches(self) -> Stretches | None:
        """Which labels are those of the present state, for `go_back`; None once it is closed."""
        return None if self._stretches is None else list(self._stretches)

    def __len__(self) -> int:
        return sum(end - first for first, end in self._stretches or ())

    def __iter__(self) -> Iterator[Labelled]:
        """The labels of the present state, in the order they came."""
        for first, end in self._stretches or ():
            yield from self._labels[first:end]

    def add(self, one: Labelled) -> None:
        """Keep one more, while it is open."""
        if self._stretches is None:
            return
        number = len(self._labels)
        self._labels.append(one)
        if self._stretches and self._stretches[-1][1] == number:
            self._stretches[-1] = (self._stretches[-1][0], number + 1)
        else:
            self._stretches.append((number, number + 1))

    def go_back(self, stretches: Stretches | None) -> None:
        """Take another state's labels for those of the present one; None, where they are not known, closes it."""
        if stretches is None:
            self.close()
        elif self._stretches is not None:
            self._stretches = [(first, end) for first, end in stretches]

    def close(self) -> None:
        """Drop all labels: none will be learned again."""
        self._gone += [self._key(number) for number in range(self._written)]
        self._labels, self._stretches, self._written = [], None, 0

    def save(self, changes: Changes) -> None:
        """Add what changed since the last checkpoint."""
        changes.update(dict.fromkeys(self._gone))
        changes[self._prefix + b"learned"] = msgpack.packb(self._stretches)
        for number in range(self._written, len(self._labels)):
            changes[self._key(number)] = _pack(self._labels[number])

    def saved(self) -> None:
        """The checkpoint is written."""
        self._gone.clear()
        self._written = len(self._labels)

    def load(self, database: Database) -> bool:
        """Take over what the last checkpoint holds; False where an earlier trainer wrote it, without a log."""
        stretches = database.get(self._prefix + b"learned")
        if stretches is None:
            return False
        found = msgpack.unpackb(stretches)
        self._stretches = None if found is None else [(first, end) for first, end in found]
        self._labels = [_unpack(value) for _, value in database.scan(self._prefix + b"#")]
        self._written = len(self._labels)
        return True

    def load_queue(self, key: bytes, queue: bytes) -> None:
        """Take over the labels that waited in an earlier trainer, which had them all under one key."""
        self._gone.append(key)
        for packed in msgpack.unpackb(queue):
            self.add(_unpacked(packed))

    def _key(self, number: int) -> bytes:
        return self._prefix + b"#%010d" % number


def _pack(one: Labelled) -> bytes:
    packed: bytes = msgpack.packb(
        [one.inputs.tobytes(), one.target, one.weight, one.published_ms, one.final_ms, one.log_odds_offset, one.keys]
    )
    return packed


def _unpack(value: bytes) -> Labelled:
    return _unpacked(msgpack.unpackb(value))


def _unpacked(packed: list[Any]) -> Labelled:
    inputs, target, weight, published_ms, final_ms, offset, keys = packed
    return Labelled(np.frombuffer(inputs, np.float32), target, weight, published_ms, final_ms, offset, tuple(keys))
