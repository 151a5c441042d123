"""What one task learns: its inputs' scale, the parts of its head, and how good each one's predictions were.

A kind of part plugs in here with what learns it; how it serves is in `stream.model.heads`.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgpack
import numpy as np
from numpy.typing import ArrayLike, NDArray

from stream.errors import StoreError
from stream.model.heads import standardise, table_names
from stream.model.parameters import Tensor
from stream.settings import Task
from stream.wire import Label
from trainer.checkpoint import Changes, Database, unpack_array
from trainer.learner.examples import Examples
from trainer.learner.log import LabelLog, Stretches
from trainer.learner.logistic import LinearLearner, LogisticLearner
from trainer.learner.mlp import MlpLearner
from trainer.learner.part import Labelled, PartLearner, seen_by
from trainer.learner.prequential import Prequential
from trainer.learner.standardiser import Standardiser
from trainer.learner.trees import TreesLearner
from trainer.tables import CategoryTable

__all__ = ["AVERAGE", "TaskLearner"]

#: How the average of several parts is called in metrics.
AVERAGE = "average"
#: Labels that may come while a fit is made of earlier ones.
_SLACK = 16_384
#: Most times of feedback that one version reports.
_REPORTED = 1_000


class TaskLearner:
    """What one task learns: standardiser, parts, and the labels that wait for the next scale.

    Whenever the standardiser is renewed, all labels are learned again, in the order they came, and the learner is what
    it would be had it waited for that scale.

    Parameters
    ----------
    is_state: (F,) which of the head's inputs are hidden state or sketch.
    seed: of every random choice.
    groups: (F,) which group each input belongs to; needed where a part leaves some out.
    is_number: (F,) which inputs are numbers that say something alone; by default all.

    `learned` and `dropped` count since the program started; `included` lists Kafka's times of the feedback
    that some part has and no published version has yet.
    """

    def __init__(
        self,
        task: str,
        is_state: NDArray[np.bool_],
        settings: Task,
        seed: int = 0,
        groups: NDArray[np.str_] | None = None,
        is_number: NDArray[np.bool_] | None = None,
    ) -> None:
        self.task = task
        self.kind = settings.kind
        self.width = len(is_state)
        self.is_number = np.ones(self.width, np.bool_) if is_number is None else is_number
        self._settings = settings
        self._outputs = max(1, len(settings.classes))
        self.standardiser = Standardiser(self.width, settings.standardise_after, settings.standardise_again)
        wants_examples = not {"mlp", "gbdt"}.isdisjoint(settings.parts)
        self.examples = Examples(self.width, settings.keep_examples, _SLACK) if wants_examples else None
        # Each task draws for itself, whatever others there are.
        self.tables = tuple(CategoryTable(name, self._outputs, settings) for name in table_names(task, settings))
        own_seed = (seed + zlib.crc32(task.encode())) % 2**31
        self._new_parts: Callable[[], dict[str, PartLearner]] = lambda: {
            name: self._part(name, settings, is_state, groups, own_seed) for name in settings.parts
        }
        self.parts = self._new_parts()
        several = [AVERAGE] if len(self.parts) > 1 else []
        #: Of what was served, first, and, where there are several, of each part alone.
        self.quality = {name: Prequential(settings.kind) for name in [*several, *self.parts]}
        self.learned = 0
        self.dropped = 0
        self.included: list[int] = []
        self._waiting: deque[int] = deque()
        self._labels = 0
        self._log = LabelLog(self._name("label/"))
        self._changed = True

    def _part(
        self, name: str, settings: Task, is_state: NDArray[np.bool_], groups: NDArray[np.str_] | None, seed: int
    ) -> PartLearner:
        sees = seen_by(name, settings, groups, self.width)
        if name == "logistic":
            return LogisticLearner(self.task, settings, is_state, self.tables, sees)
        if name == "linear":
            return LinearLearner(self.task, settings, is_state, self.tables, sees)
        assert self.examples is not None
        if name == "mlp":
            return MlpLearner(self.task, settings, sees, self.is_number, self.standardiser, self.examples, seed)
        return TreesLearner(self.task, settings, sees, self.examples, seed)

    @property
    def pieces(self) -> int:
        """In how many pieces the part `mlp` reads each number."""
        return self._settings.mlp.pieces

    @property
    def labels(self) -> int:
        """Labels learned from."""
        return self._labels

    @property
    def queued(self) -> int:
        """Labels that wait until the standardiser is fixed."""
        return len(self._log) if self.standardiser.center is None else 0

    @property
    def prequential(self) -> Prequential:
        """Quality of what was served."""
        return next(iter(self.quality.values()))

    def loss(self) -> float:
        """Mean log loss, of a regression the mean squared error, of what was served; NaN where nothing was answered."""
        return self.prequential.squared_error() if self.kind == "regression" else self.prequential.log_loss()

    def observe(self, inputs: NDArray[np.float32], keys: Sequence[bytes] = (), event_ms: int = 0) -> bool:
        """Take the inputs (F,) of a new example, and at its event's time the keys of rows that it uses; True when the
        standardiser is another because of them. Labels that waited for that are then learned, in the order they came,
        and those that were learned before are learned again.

        A learner that does not have all of these labels any more, as its checkpoint or state is of an earlier trainer
        or of settings without renewals, keeps the scale it has.
        """
        for table, key in zip(self.tables, keys, strict=True):
            table.observe(key, event_ms)
        if not self._log.is_open or not np.isfinite(inputs).all():
            return False
        is_first = self.standardiser.center is None
        if not self.standardiser.observe(inputs):
            return False
        if is_first:
            for one in self._log:
                self._learn(one)
        else:
            self._learn_again()
        if self.standardiser.is_final:
            self._log.close()
        return True

    def keep_scale(self, center: NDArray[np.float64], scale: NDArray[np.float64]) -> None:
        """Standardise by these (F,) for good, whatever examples come; before any label."""
        self.standardiser.center, self.standardiser.scale = center, scale
        self._log.close()

    def learn(
        self,
        inputs: NDArray[np.float32],
        label: Label,
        weight: float,
        prediction: float,
        published_ms: int,
        log_odds_offset: float = 0.0,
        others: ArrayLike = (),
        final_ms: int = 0,
        keys: Sequence[bytes] = (),
    ) -> None:
        """Take one answered example, with the prediction that was made for it.

        Parameters
        ----------
        log_odds_offset: of a binary task: known log-odds that are added to the head's for this label alone, as where
            negatives are a sample.
        others: what else was said; see `Example`.
        final_ms: stream time at which the label may be learned.
        keys: of the rows that it uses.
        """
        self.judge(label, prediction, others)
        target = self.target(label)
        one = Labelled(inputs, target, weight, published_ms, final_ms, log_odds_offset, tuple(keys))
        if not (np.isfinite(inputs).all() and math.isfinite(weight) and math.isfinite(log_odds_offset)):
            self.dropped += 1
            return
        self._log.add(one)
        if self.standardiser.center is not None:
            self._learn(one)

    def judge(self, label: Label, prediction: float, others: ArrayLike = ()) -> None:
        """Take how good a prediction was, and learn nothing; see `learn`."""
        self._judge(np.append(np.float64(prediction), np.asarray(others, np.float64)), self.target(label))
        self._changed = True

    def target(self, label: Label) -> float:
        """A label as a number: 0 or 1, the index of a class, or the value."""
        return float(self._settings.classes.index(label)) if isinstance(label, str) else float(label)

    def _judge(self, said: NDArray[np.float64], target: float) -> None:
        for i, quality in enumerate(self.quality.values()):
            outputs = said[i * self._outputs : (i + 1) * self._outputs]
            if len(outputs) == self._outputs:
                quality.add(outputs, target)

    def _learn(self, one: Labelled) -> None:
        dropped = self._teach(one)
        self.dropped += dropped
        self.learned += max(0, 1 - dropped)
        if not dropped:
            self._waiting.append(one.published_ms)
        self._include()

    def _learn_again(self) -> None:
        """Forget what was learned, and learn the same labels. They were counted, and judged, when they came."""
        self.close()
        self.parts = self._new_parts()
        self._labels = 0
        if self.examples is not None:
            self.examples.clear()
        for table in self.tables:
            table.restore(None)
        for one in self._log:
            self._teach(one)
        self._include()

    def _teach(self, one: Labelled) -> int:
        """Give one label to all parts; returns how many had to be dropped."""
        x = standardise(one.inputs[None, :], *self.standardiser.fixed)[0]
        if self.examples is not None:
            self.examples.add(one)
        dropped = max(part.learn(one, x) for part in self.parts.values())
        self._labels += max(0, 1 - dropped)
        self._changed = True
        return dropped

    def _include(self) -> None:
        """Note which of the labels that waited all parts have by now."""
        behind = min(part.behind for part in self.parts.values())
        ready = len(self._waiting) - behind
        if ready > 0:
            served = [self._waiting.popleft() for _ in range(ready)]
            self.included += served[-_REPORTED:]

    def head(self, *, settled: bool = False) -> dict[str, Tensor]:
        """The tensors to serve; none before the first label is learned.

        settled: without the labels of a moment that others may still come of, where those of a moment are one update:
        that costs nothing, and the update does.
        """
        if self.standardiser.center is None or not self._labels:
            return {}
        center, scale = self.standardiser.fixed
        tensors: dict[str, Tensor] = {}
        for part in self.parts.values():
            tensors |= part.tensors(center, scale, settled=settled)
        return tensors

    def state(self) -> bytes:
        """What was learned, as bytes, and under which scale; for `restore`."""
        parts = {name: value for part in self.parts.values() for name, value in part.save().items()}
        kept = self.examples.count if self.examples is not None else 0
        tables = [table.state() for table in self.tables]
        scale = None if self.standardiser.center is None else [one.tobytes() for one in self.standardiser.fixed]
        packed: bytes = msgpack.packb(
            [self._labels, list(self._waiting), kept, parts, tables, scale, self._log.stretches]
        )
        return packed

    def restore(self, state: bytes | None) -> None:
        """Go back to what `state` wrote; None: to having learned nothing. What was learned since is forgotten.

        The scale is then that of the state, until the next renewal, if one is left, which learns the state's labels
        and those that come after again. A state of an earlier trainer does not say its scale: the present one stays.
        Labels that wait for the first scale were not learned, and go on waiting.
        """
        tables: list[bytes | None] = [None] * len(self.tables)
        labels, waiting, kept, parts = (0, [], 0, None)
        about: list[Any] = [None, []]
        if state is not None:
            labels, waiting, kept, parts, tables, *about = msgpack.unpackb(state)
        self._go_back(*(about or (None, None)))
        self.close()
        self.parts = self._new_parts()
        if self.examples is not None:
            self.examples.forget_since(kept)
        if parts is not None:
            for part in self.parts.values():
                part.load(parts.__getitem__)
        for table, then in zip(self.tables, tables, strict=True):
            table.restore(then)
        self._labels, self._waiting = labels, deque(waiting)
        self.included.clear()
        self._changed = True

    def _go_back(self, scale: list[bytes] | None, stretches: Stretches | None) -> None:
        """Take a state's scale and labels; one from before there was a scale had learned none."""
        if scale is not None:
            self.standardiser.center, self.standardiser.scale = (np.frombuffer(one).copy() for one in scale)
            self._log.go_back(stretches)
        elif self.standardiser.center is not None:
            self._log.go_back(None if stretches is None else [])

    def save(self, changes: Changes) -> None:
        """Add everything to a checkpoint; the parts only where a label came."""
        changes[self._name("standardiser")] = self.standardiser.save()
        self._log.save(changes)
        changes[self._name("left-out")] = msgpack.packb(self._left_out())
        changes[self._name("tables")] = msgpack.packb(list(self._settings.tables))
        for table in self.tables:
            table.save(changes)
        if not self._changed:
            return
        for part in self.parts.values():
            for name, value in part.save().items():
                changes[self._name(name)] = value
        for name, quality in self.quality.items():
            changes[self._name(f"prequential/{name}")] = quality.save()
        if self.examples is not None:
            self.examples.save(changes, self._name("x/"))
        kept = [self.examples.count, self.examples.lowest] if self.examples is not None else [0, 0]
        changes[self._name("counts")] = msgpack.packb(
            [list(self.parts), self._labels, self.included, list(self._waiting), kept]
        )

    def saved(self) -> None:
        """The checkpoint is written."""
        self._changed = False
        self._log.saved()
        for table in self.tables:
            table.saved()
        if self.examples is not None:
            self.examples.saved()

    def load(self, database: Database) -> None:
        """Take over what the last checkpoint holds, if it holds anything.

        Raises
        ------
        StoreError: the checkpoint was made with other inputs of the task, or another head.
        """
        standardiser = database.get(self._name("standardiser"))
        if standardiser is None:
            return
        advice = "restore the task's settings, or use another trainer.data_dir"
        if unpack_array(standardiser).shape[1] != self.width:
            raise StoreError(
                f"task {self.task!r} has {self.width} inputs, but the checkpoint in {str(database.path)!r} was "
                f"made with {unpack_array(standardiser).shape[1]}: {advice}"
            )

        def load(part: str) -> bytes:
            found = database.get(self._name(part))
            if found is None:
                raise StoreError(f"the checkpoint in {str(database.path)!r} lacks {part!r} of task {self.task!r}")
            return found

        parts, self._labels, self.included, waiting, kept = msgpack.unpackb(load("counts"))
        if parts != list(self.parts):
            raise StoreError(
                f"task {self.task!r} has the head {', '.join(self.parts)}, but the checkpoint in "
                f"{str(database.path)!r} was made with {', '.join(parts)}: {advice}"
            )
        # A checkpoint that does not say is of a time when parts saw everything.
        packed = database.get(self._name("left-out"))
        then = msgpack.unpackb(packed) if packed is not None else {}
        for name, left in self._left_out().items():
            if left != then.get(name, []):
                raise StoreError(
                    f"task {self.task!r}: its head {name} leaves out {', '.join(left) or 'nothing'}, but the "
                    f"checkpoint in {str(database.path)!r} was made with it leaving out "
                    f"{', '.join(then.get(name, [])) or 'nothing'}: {advice}"
                )
        tables = msgpack.unpackb(load("tables"))
        if tables != list(self._settings.tables):
            raise StoreError(
                f"task {self.task!r} has tables of {', '.join(self._settings.tables) or 'nothing'}, but the checkpoint "
                f"in {str(database.path)!r} was made with {', '.join(tables) or 'none'}: {advice}"
            )
        for table in self.tables:
            table.load(database)
        self.standardiser.load(standardiser)
        self._waiting = deque(waiting)
        if self.examples is not None:
            self.examples.load(kept[0], kept[1], database.scan(self._name("x/")))
        for name, quality in self.quality.items():
            quality.load(load(f"prequential/{name}"))
        for part in self.parts.values():
            part.load(load)
        # An earlier trainer kept labels only while they waited.
        is_earlier = not self._log.load(database)
        if is_earlier:
            self._log.load_queue(self._name("queue"), load("queue"))
        if self.standardiser.center is not None and (is_earlier or self.standardiser.is_final):
            self._log.close()
        self._changed = False

    def _left_out(self) -> dict[str, list[str]]:
        return {part: sorted(self._settings.leave_out.get(part, [])) for part in self.parts}

    def confirm(self, included: int) -> None:
        """The first `included` entries of `included` are in a version that is confirmed."""
        del self.included[:included]
        self._changed = self._changed or included > 0

    def close(self) -> None:
        """End what the parts started."""
        for part in self.parts.values():
            part.close()

    def _name(self, part: str) -> bytes:
        return f"t/{self.task}/{part}".encode()
