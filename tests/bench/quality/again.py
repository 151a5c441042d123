"""What heads that are published less often would have said, from the trainer's record: Monolith's experiment.

The record has each answered example as it was, in the order in which it was learned, so a head learns here exactly what
it learned there. It serves from the next multiple of the publish interval on, in stream time. (Monolith, arXiv
2209.07663, section 4.2.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stream.model.heads import Head, Questions
from stream.model.layout import Layout
from stream.model.parameters import ParameterSet
from stream.settings import Settings
from stream.wire import Schema
from trainer.learner import TaskLearner
from trainer.record import AnsweredExamples

__all__ = ["published_every"]


def published_every(
    settings: Settings, task: str, examples: AnsweredExamples, from_ms: int, intervals_ms: Sequence[int | None]
) -> dict[int | None, NDArray[np.float64]]:
    """(n,) for each interval: what was said of each example from `from_ms` on, NaN before.

    Parameters
    ----------
    intervals_ms: None: never again from `from_ms` on.
    """
    question = Questions(Layout.compile(settings, Schema.compile(settings))).by_task[task]
    learner = TaskLearner(task, question.is_state, question.settings, settings.model.seed)
    learner.standardiser.center, learner.standardiser.scale = examples.center, examples.scale
    out = {interval: np.full(len(examples), np.nan) for interval in intervals_ms}
    heads: dict[int | None, Head | None] = dict.fromkeys(intervals_ms)
    next_ms = {interval: from_ms if interval is None else 0 for interval in intervals_ms}
    by_time = np.argsort(examples.as_of_ms, kind="stable")
    times = examples.as_of_ms[by_time]
    asked = int(np.searchsorted(times, from_ms))
    head: Head | None = None
    ends = np.flatnonzero(np.diff(examples.final_ms, append=np.int64(2**62)))
    start = 0
    for end in [*ends.tolist(), None]:
        now_ms = int(examples.final_ms[end]) if end is not None else 2**62
        # A head that is due before this label serves from then on; a frozen one is that of `from_ms`.
        for interval in intervals_ms:
            if next_ms[interval] <= now_ms:
                until = int(np.searchsorted(times, next_ms[interval]))
                _say(heads[interval], examples, by_time[asked:until], out[interval])
                heads[interval] = head
                next_ms[interval] = 2**62 if interval is None else (now_ms // interval + 1) * interval
                _say(head, examples, by_time[max(asked, until) : np.searchsorted(times, now_ms)], out[interval])
            else:
                _say(heads[interval], examples, by_time[asked : np.searchsorted(times, now_ms)], out[interval])
        asked = max(asked, int(np.searchsorted(times, now_ms)))
        if end is None:
            break
        for i in range(start, end + 1):
            label = examples.label[i].item()
            weight, at = float(examples.weight[i]), int(examples.final_ms[i])
            learner.learn(examples.inputs[i], label, weight, float("nan"), 0, final_ms=at)
        start = end + 1
        tensors = learner.head()
        if tensors:
            head = Head(task, question.settings, ParameterSet(tensors), question.width, head)
    learner.close()
    return out


def _say(head: Head | None, examples: AnsweredExamples, which: NDArray[np.int64], out: NDArray[np.float64]) -> None:
    if head is not None and len(which):
        out[which] = head.predict(examples.inputs[which])[:, 0]
