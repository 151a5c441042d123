"""The guard: what a task learned is not published while it proves worse than a good state from before, and is given up.

Of every task a good state is kept: what its learner was some labels ago. Each answered example is predicted twice, by
what the learner is now and by the good state, and the two losses are compared as `trainer.evidence` says. (Of labels
that are one update, see `trainer.learner.logistic`, the others of that moment do not count for what it is now: none was
known when they were predicted.) Where
the present one is worse by more than the tolerance, the task's part of a version is held back; where the proof grows a
hundred times stronger still, the learner goes back to the good state and learns on from there. Every `guard_labels`
labels the good state is replaced by what the learner was that many labels ago, which has stood the test since.

What it finds: a learner that a stretch of wrong labels has led astray, once right ones come again; one that diverges.
What it cannot find: wrong labels while they come, as to learn them is then to predict better, which is also how a world
that has changed looks; a stretch of more than `guard_labels` labels, after which the good state has learned them too;
a good state and a present one that are wrong alike; a difference below the tolerance.

Guaranteed: everything rests on the labels and their order alone, and is part of the trainer's checkpoint: a replay
decides the same at the same label. (So good states are taken by number of labels; kept versions, which lie seconds
apart, would make what is learned depend on the clock.) Memory is bounded: two states of the learner, one head, and
`CHUNK` examples. Numbers that are not finite give a learner up at once, whatever it is compared with.

Not guaranteed: anything before the first `guard_labels` labels, but for numbers that are not finite.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgpack
import numpy as np
from numpy.typing import NDArray

from stream.model.heads import Head
from stream.model.parameters import ParameterSet, Tensor
from stream.model.rows import RARE_KEY, RowTable
from stream.settings import Task, Trainer
from stream.store import PackedKeys
from trainer.checkpoint import Changes, Database, pack_array, unpack_array
from trainer.evidence import Evidence
from trainer.learner import TaskLearner
from trainer.tables import rows_in

__all__ = ["CHUNK", "Guard", "is_finite"]

logger = logging.getLogger(__name__)

#: Labels that are looked at together, with the head as it was before the first of them and before its moment.
CHUNK = 64
#: A learner goes back when the evidence is so many times what holds it back.
_STRONGER = 100.0
#: Logarithm of evidence that is next to none.
_FEW = math.log(10.0)
#: Probabilities nearer to 0 or 1 count as this near: one wrong certainty is not all the evidence there is.
_LEAST = 1e-3
#: Of a regression, an error above so many mean squared errors of the good state counts as that many.
_MOST_ERRORS = 20.0
#: That mean is the median of the means of so many chunks, the last ones.
_SCALE_CHUNKS = 9
#: Values and predictions beyond this count as this: their squares are still numbers.
_LARGEST = 1e150
#: An error this small a share of the value is none.
_NO_ERROR = 1e-6


@dataclass(frozen=True)
class _Good:
    """A state of the learner, how many labels it had, and the tensors it served."""

    labels: int
    state: bytes
    tensors: dict[str, Tensor]

    def pack(self) -> bytes:
        packed: bytes = msgpack.packb([self.labels, self.state, _pack_tensors(self.tensors)])
        return packed

    @classmethod
    def unpack(cls, value: bytes) -> _Good:
        labels, state, tensors = msgpack.unpackb(value)
        return cls(labels, state, _unpack_tensors(tensors))


class Guard:
    """Of one task.

    Parameters
    ----------
    learner: what is guarded; the guard takes it back where that must be.
    task, settings: of the task, and of the trainer.

    `is_holding`: what was learned must not be published. `returns`: how often the learner went back since the program
    started.
    """

    def __init__(self, learner: TaskLearner, task: Task, settings: Trainer) -> None:
        self._learner = learner
        self._task = task
        self._every = settings.guard_labels
        self._hold_at = math.log(settings.guard_false_alarm_labels)
        self._is_regression = task.kind == "regression"
        limit = _MOST_ERRORS if self._is_regression else -math.log(_LEAST)
        self._evidence = Evidence(settings.guard_tolerance, limit)
        self.is_holding = False
        self.returns = 0
        self._chunk = _Chunk(learner.width, len(learner.tables))
        self._present: dict[str, Tensor] = {}
        self._present_head: Head | None = None
        self._present_rows = {table.name: RowTable(table.width) for table in learner.tables}
        self._good: _Good | None = None
        self._next: _Good | None = None
        self._good_head: Head | None = None
        self._unsaved: set[str] = set()
        self._restart()

    def _restart(self) -> None:
        self._evidence.forget()
        self.is_holding = False
        self._present = {}
        self._chunk.clear()
        self._since = 0
        #: A regression's mean squared errors of the good state, of the last chunks.
        self._errors: list[float] = []
        #: While there is evidence: labels, and both sums of losses.
        self._run = [0.0, 0.0, 0.0]

    @property
    def log10_evidence(self) -> float:
        """Decimal logarithm of how much speaks for being worse; see `trainer.evidence`."""
        return self._evidence.log / math.log(10.0)

    def take(self, inputs: NDArray[np.float32], target: float, keys: Sequence[bytes]) -> None:
        """An answered example, before it is learned from; see `TaskLearner.learn`."""
        if not np.isfinite(inputs).all():
            return
        if not self._present:
            self._open(self._learner.head(settled=True))
        if not self._present:
            return
        rows = [table.read(key) for table, key in zip(self._learner.tables, keys, strict=True)]
        self._chunk.add(inputs, target, keys, [(key, row[:, 0].astype(np.float32).tobytes()) for key, row in rows])

    def _open(self, tensors: dict[str, Tensor]) -> None:
        """Let a chunk begin with the head as it is."""
        before = self._present
        # Where a tensor stays the same object, what was made of it is not made again.
        self._present = {name: before[name] if _same(before.get(name), one) else one for name, one in tensors.items()}
        rare = [table.read(RARE_KEY)[1][:, 0].astype(np.float32).tobytes() for table in self._learner.tables]
        self._chunk.clear(rare)

    def judge(self) -> bool:
        """Decide, where enough was taken, after it was learned from; True where the learner went back."""
        if not self._chunk.is_full:
            return False
        present = self._learner.head(settled=True)
        if not is_finite(present):
            self._go_back("what it would serve is not finite")
            return True
        was_holding = self.is_holding
        self._compare()
        found = self._evidence.log
        if found >= self._hold_at + math.log(_STRONGER):
            self._go_back(self._figures())
            return True
        self.is_holding = found >= self._hold_at
        if self.is_holding != was_holding:
            what = "versions are held back" if self.is_holding else "versions are no longer held back"
            logger.warning("task %r: %s: %s", self._task_name, what, self._figures())
        self._since += CHUNK
        # Not while something speaks against the present: it may be in what would be the good state next.
        if self._since >= self._every and found < self._hold_at / 2.0:
            self._renew(self._learner.head())
        self._open(present)
        return False

    @property
    def _task_name(self) -> str:
        return self._learner.task

    def _figures(self) -> str:
        labels, later, earlier = self._run
        assert self._good is not None
        which = "squared error, in mean ones of the good state," if self._is_regression else "log loss"
        return (
            f"over the last {labels:.0f} labels the mean {which} is {later / max(1.0, labels):.4g}, of the good state "
            f"at {self._good.labels} labels {earlier / max(1.0, labels):.4g}; evidence 10^{self.log10_evidence:.1f}, "
            f"held back from 10^{self._hold_at / math.log(10.0):.1f} on"
        )

    def _compare(self) -> None:
        if self._good is None:
            return
        if self._good_head is None:
            rows = {}
            for name, found in zip(self._present_rows, _table_rows(self._good.state), strict=True):
                rows[name] = RowTable(self._present_rows[name].width)
                rows[name].stage(found, (0, 0))
            self._good_head = self._head(self._good.tensors, rows, None)
        chunk = self._chunk
        for table, own in zip(self._present_rows.values(), chunk.rows, strict=True):
            table.stage(own, (0, 0))
            table.settle()
        self._present_head = self._head(self._present, self._present_rows, self._present_head)
        keys = [PackedKeys.from_list(column) for column in chunk.keys]
        targets = np.array(chunk.targets)
        # The serving path of both, so that what is compared is what would be served.
        later = self._losses(self._present_head.predict(chunk.inputs, keys), targets)
        earlier = self._losses(self._good_head.predict(chunk.inputs, keys), targets)
        for table, own in zip(self._present_rows.values(), chunk.rows, strict=True):
            table.stage(dict.fromkeys(own), (0, 0))
            table.settle()
        if self._is_regression:
            # Known before this chunk, as the gambler's stakes must be.
            scale = float(np.median(self._errors)) if self._errors else 0.0
            mean = float((earlier + _NO_ERROR * np.square(np.clip(targets, -_LARGEST, _LARGEST))).mean())
            self._errors = [*self._errors, mean][-_SCALE_CHUNKS:]
            if not scale > 0.0:
                return
            later, earlier = (np.minimum(one / scale, _MOST_ERRORS) for one in (later, earlier))
        self._evidence.add(later, earlier)
        self._run = [a + b for a, b in zip(self._run, (CHUNK, float(later.sum()), float(earlier.sum())), strict=True)]
        if self._evidence.log <= _FEW and later.sum() <= earlier.sum():
            self._run = [0.0, 0.0, 0.0]

    def _head(self, tensors: dict[str, Tensor], rows: dict[str, RowTable], before: Head | None) -> Head:
        return Head(self._task_name, self._task, ParameterSet(tensors, 0, rows), self._learner.is_number, before)

    def _losses(self, said: NDArray[np.float32], targets: NDArray[np.float64]) -> NDArray[np.float64]:
        outputs = said.astype(np.float64)
        if self._is_regression:
            error = np.clip(outputs[:, 0], -_LARGEST, _LARGEST) - np.clip(targets, -_LARGEST, _LARGEST)
            # What is no number is as wrong as can be.
            return np.nan_to_num(np.square(error), nan=_LARGEST**2)
        if self._task.kind == "multiclass":
            chance = outputs[np.arange(len(targets)), targets.astype(np.int64)]
        else:
            chance = np.where(targets > 0.5, outputs[:, 0], 1.0 - outputs[:, 0])
        return -np.log(np.clip(np.nan_to_num(chance, nan=0.0), _LEAST, 1.0 - _LEAST))

    def _renew(self, present: dict[str, Tensor]) -> None:
        now = _Good(self._learner.labels, self._learner.state(), present)
        self._good = self._next or now
        self._next = now
        self._good_head = None
        self._since = 0
        self._unsaved |= {"good", "next"}

    def _go_back(self, why: str) -> None:
        had = self._learner.labels
        good = self._good
        self._learner.restore(good.state if good is not None else None)
        logger.warning(
            "task %r: what was learned from %d labels on is given up and learning goes on from there: %s",
            self._task_name, self._learner.labels, f"{had} labels; {why}",
        )  # fmt: skip
        self.returns += 1
        self._next = good
        self._unsaved.add("next")
        self._restart()

    def trust(self) -> None:
        """Somebody else has changed the learner's state and vouches for it: begin anew with that."""
        self._good = self._next = self._good_head = None
        self._unsaved |= {"good", "next"}
        self._restart()
        head = self._learner.head()
        if head:
            self._renew(head)

    def save(self, changes: Changes) -> None:
        """Add what changed since the last checkpoint."""
        changes[self._name("about")] = msgpack.packb(
            [self._evidence.save(), self.is_holding, self._since, self._errors, self._run]
        )
        changes[self._name("chunk")] = msgpack.packb([_pack_tensors(self._present), self._chunk.save()])
        for name, one in (("good", self._good), ("next", self._next)):
            if name in self._unsaved:
                changes[self._name(name)] = one.pack() if one is not None else None

    def saved(self) -> None:
        """The checkpoint is written."""
        self._unsaved.clear()

    def load(self, database: Database) -> None:
        """Take over what the last checkpoint holds, if it holds anything."""
        about, chunk = database.get(self._name("about")), database.get(self._name("chunk"))
        if about is None or chunk is None:
            return
        evidence, self.is_holding, self._since, self._errors, self._run = msgpack.unpackb(about)
        self._evidence.load(evidence)
        present, taken = msgpack.unpackb(chunk)
        self._present = _unpack_tensors(present)
        self._chunk.load(taken)
        good, following = database.get(self._name("good")), database.get(self._name("next"))
        self._good = None if good is None else _Good.unpack(good)
        self._next = None if following is None else _Good.unpack(following)

    def _name(self, part: str) -> bytes:
        return f"g/{self._task_name}/{part}".encode()


class _Chunk:
    """Examples that are judged together, and of the rows that they use what these were at first."""

    def __init__(self, width: int, tables: int) -> None:
        self.inputs = np.zeros((CHUNK, width), np.float32)
        self._tables = tables
        self.clear()

    @property
    def is_full(self) -> bool:
        return len(self.targets) == CHUNK

    def clear(self, rare: Sequence[bytes] = ()) -> None:
        """Begin anew, with the rare rows as they are."""
        self.targets: list[float] = []
        self.keys: list[list[bytes]] = [[] for _ in range(self._tables)]
        #: Of each table, by key; None where a value has none of its own.
        self.rows: list[dict[bytes, bytes | None]] = [{RARE_KEY: row} for row in rare]

    def add(
        self, inputs: NDArray[np.float32], target: float, keys: Sequence[bytes], read: Sequence[tuple[bytes, bytes]]
    ) -> None:
        self.inputs[len(self.targets)] = inputs
        self.targets.append(target)
        for column, own, key, (used, row) in zip(self.keys, self.rows, keys, read, strict=True):
            column.append(key)
            own.setdefault(key, row if used == key else None)

    def save(self) -> list[object]:
        return [self.inputs[: len(self.targets)].tobytes(), self.targets, self.keys, self.rows]

    def load(self, saved: list[object]) -> None:
        inputs, self.targets, self.keys, self.rows = saved  # type: ignore[assignment]
        n = len(self.targets)
        self.inputs[:n] = np.frombuffer(inputs, np.float32).reshape(n, self.inputs.shape[1])  # type: ignore[call-overload]


def is_finite(tensors: dict[str, Tensor]) -> bool:
    """Whether every number in them is."""
    return all(bool(np.isfinite(one).all()) for one in tensors.values() if one.dtype.kind == "f")


def _same(old: Tensor | None, new: Tensor) -> bool:
    return old is not None and old.dtype == new.dtype and old.shape == new.shape and old.tobytes() == new.tobytes()


def _table_rows(state: bytes) -> list[dict[bytes, bytes | None]]:
    """Of each of a learner's tables, the rows in one of its states."""
    return [rows_in(table) for table in msgpack.unpackb(state)[4]]


def _pack_tensors(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: pack_array(one) for name, one in tensors.items()}


def _unpack_tensors(packed: dict[str, bytes]) -> dict[str, Tensor]:
    tensors = {name: unpack_array(one) for name, one in packed.items()}
    for one in tensors.values():
        # A parameter set copies what could change, and trees are read again where their text is another object.
        one.setflags(write=False)
    return tensors
