"""A task learned again from its record: what its own head would have said had it been published otherwise.

Guaranteed: the head has all the parts that the settings name, and learns the recorded examples in the recorded order
with the trainer's own learner, on the inputs as they were, under the recorded scales, each from where it was in force,
of sampled negatives (`negative_rate`) the same ones. So it is, bit for bit, the head that the trainer had after these
labels. (Labels from before the first scale are learned when they come, not when that is there.)

Not guaranteed: that of a task with `tables`, whose rows are left out, as a record does not say which ones an example
used; nor that of a trainer which went back to an earlier state, by its guard or by `livestate rollback`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from stream.errors import DataError
from stream.model.heads import Head, TaskQuestion
from stream.model.parameters import ParameterSet, Tensor
from stream.settings import Settings, Task
from trainer.learner import TaskLearner
from trainer.record import AnsweredExamples, Scale
from trainer.sampling import NegativeSampling

__all__ = ["Again"]

Floats = NDArray[np.float64]
Passed = Callable[[float], None]
_END_MS = 2**62


def _unheard(_: float) -> None:
    pass


@dataclass(frozen=True)
class Again:
    """A task to be learned again.

    Parameters
    ----------
    is_state: (F,) which inputs are hidden state or sketch.
    is_number: (F,) which are numbers that say something alone.
    groups: (F,) which group each input belongs to; see `stream.model.readout.group_names`.
    seed: that of the trainer's settings.
    """

    task: str
    settings: Task
    is_state: NDArray[np.bool_]
    is_number: NDArray[np.bool_]
    groups: NDArray[np.str_]
    seed: int
    examples: AnsweredExamples

    @classmethod
    def of(cls, settings: Settings, question: TaskQuestion, examples: AnsweredExamples) -> Again:
        """The task as the settings have it, without `tables`.

        Raises
        ------
        DataError: there was no head, as the standardiser was never fixed.
        """
        if not examples.scales:
            raise DataError(
                f"task {question.task!r}: the record has no standardiser: fewer examples were seen than "
                f"tasks.{question.task}.standardise_after says"
            )
        own = msgspec.structs.replace(question.settings, tables=[])
        return cls(
            question.task, own, question.is_state, question.is_number, question.groups, settings.model.seed, examples
        )

    @property
    def outputs(self) -> int:
        """Values of each prediction."""
        return max(1, len(self.settings.classes))

    def targets(self) -> Floats:
        """(n,) the labels as numbers: 0 or 1, the index of a class, or the value."""
        index = {name: float(number) for number, name in enumerate(self.settings.classes)}
        label = self.examples.label
        return np.array([index[one] for one in label.tolist()]) if index else label.astype(np.float64)

    def seeing(self, inputs: NDArray[np.bool_]) -> Again:
        """The same with those of the inputs alone; bool[F]."""
        one = self.examples
        scales = tuple(replace(each, center=each.center[inputs], scale=each.scale[inputs]) for each in one.scales)
        part = replace(one, inputs=one.inputs[:, inputs], scales=scales, names=())
        return replace(
            self,
            is_state=self.is_state[inputs],
            is_number=self.is_number[inputs],
            groups=self.groups[inputs],
            examples=part,
        )

    def frozen_at(self, at_ms: int, passed: Passed = _unheard) -> Floats:
        """(n, outputs) what the head that stopped learning at `at_ms` says of every example, before and after; it has
        learned the labels that were final before, and keeps the scale of that moment. NaN where it served nothing
        yet."""
        walk = _Walk(self, self.examples.scale_at(at_ms))
        known = np.flatnonzero(self.examples.final_ms < at_ms)
        try:
            for done, i in enumerate(known.tolist()):
                walk.learn(i)
                if not done % 1024:
                    passed(done / len(known))
            everything = np.arange(len(self.examples))
            out = np.full((len(everything), self.outputs), np.nan)
            walk.say(everything, out)
        finally:
            walk.close()
        return out

    def published_every(
        self, interval_ms: Sequence[int], from_ms: int, passed: Passed = _unheard
    ) -> tuple[list[Floats], tuple[str, ...]]:
        """For each interval, (n, outputs) what was said of each example from `from_ms` on, NaN before; and which parts
        of the head served in the end.

        A head serves from the next multiple of its interval on, in stream time, and has learned what was final before.
        (Monolith, arXiv 2209.07663, section 4.2.)
        """
        examples = self.examples
        out = [np.full((len(examples), self.outputs), np.nan) for _ in interval_ms]
        by_time = np.argsort(examples.as_of_ms, kind="stable")
        by_time = by_time[examples.as_of_ms[by_time] >= from_ms]
        #: When the head that answers each of them was published.
        served_ms = [examples.as_of_ms[by_time] // interval * interval for interval in interval_ms]
        said = [0] * len(interval_ms)
        first, *later = examples.scales
        walk = _Walk(self, first)

        def say_until(now_ms: int) -> None:
            for which, moments in enumerate(served_ms):
                until = int(np.searchsorted(moments, now_ms, "right"))
                walk.say(by_time[said[which] : until], out[which])
                said[which] = max(said[which], until)

        ends = np.flatnonzero(np.diff(examples.final_ms, append=_END_MS)).tolist()
        start = 0
        try:
            for end in [*ends, None]:
                while later and later[0].after <= start:
                    say_until(later[0].as_of_ms)
                    walk.learn_again(later.pop(0), start)
                say_until(int(examples.final_ms[end]) if end is not None else _END_MS)
                if min(said) == len(by_time) or end is None:
                    break
                for i in range(start, end + 1):
                    walk.learn(i)
                start = end + 1
                passed(start / len(examples))
            return out, walk.parts
        finally:
            walk.close()


class _Walk:
    """A learner on its way along the record, and the head that it would publish now."""

    def __init__(self, again: Again, scale: Scale) -> None:
        self._again = again
        self._learner = self._learner_of(scale)
        self._sampling = NegativeSampling(again.task, again.settings.negative_rate, again.seed)
        self._tensors: dict[str, Tensor] = {}
        self._head: Head | None = None
        self._has_learned = False

    def _learner_of(self, scale: Scale) -> TaskLearner:
        again = self._again
        learner = TaskLearner(again.task, again.is_state, again.settings, again.seed, again.groups, again.is_number)
        learner.keep_scale(scale.center, scale.scale)
        return learner

    @property
    def parts(self) -> tuple[str, ...]:
        """Those that the head has now."""
        return () if self._head is None else tuple(self._head.parts)

    def learn_again(self, scale: Scale, count: int) -> None:
        """Learn the first `count` examples again, under another scale."""
        self._learner.close()
        self._learner = self._learner_of(scale)
        for i in range(count):
            self.learn(i)

    def learn(self, i: int) -> None:
        """Learn the i-th example, unless the trainer left it out."""
        examples, sampling = self._again.examples, self._sampling
        label = examples.label[i].item()
        if label is False and not sampling.keeps(examples.client_id[i], int(examples.as_of_ms[i])):
            return
        self._learner.learn(
            examples.inputs[i], label, float(examples.weight[i]), float("nan"), 0,
            log_odds_offset=sampling.log_odds_offset, final_ms=int(examples.final_ms[i]),
        )  # fmt: skip
        self._has_learned = True

    def say(self, which: NDArray[np.int64], out: Floats) -> None:
        """Predict those examples."""
        if not len(which):
            return
        if self._has_learned:
            self._has_learned = False
            self._publish()
        if self._head is not None:
            out[which] = self._head.predict(self._again.examples.inputs[which])

    def _publish(self) -> None:
        now = self._learner.head()
        # What did not change stays the same object: reading trees takes longer than comparing them.
        self._tensors = {name: _same(self._tensors.get(name), tensor) for name, tensor in now.items()}
        again = self._again
        head = Head(again.task, again.settings, ParameterSet(self._tensors), again.is_number, self._head)
        self._head = head if head.parts else None

    def close(self) -> None:
        self._learner.close()


def _same(before: Tensor | None, now: Tensor) -> Tensor:
    return before if before is not None and np.array_equal(before, now) else now
