"""What each group of a head's inputs contributes: the head learned again along the record without it.

Guaranteed: it learns and predicts on the way, so it knows no label that was not final; all are judged on the same
examples; what learned is said. That is the task's own head, with LightGBM refitted a few times at most, or a Bayesian
one in its stead where its own would take too long, or has too few examples to begin with.
Not guaranteed: that a group which contributes nothing here is useless: another may stand in for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from trainer.evaluation import interval
from trainer.record import AnsweredExamples
from trainer.report.again import Again
from trainer.report.measures import ROUNDS, Judge
from trainer.report.rows import BAYESIAN

__all__ = ["MOST_LEARNED", "Contributions", "Group", "contributions"]

Floats = NDArray[np.float64]
Progress = Callable[[float, str], None]

#: Examples that networks and trees learn in all for these figures; more would take the better part of an hour.
MOST_LEARNED = 400_000
_REFITS = 8
#: Networks and trees are published so often over the record's time.
_PUBLISHED = 1_000


@dataclass(frozen=True)
class Group:
    """What the head loses of the measure that counts, with its 95 % interval over clients, where it does not see a
    group of inputs."""

    name: str
    inputs: int
    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Contributions:
    """What groups contribute, the largest loss first; `head`: what learned, `is_own`: whether that is the task's own
    head; on how many examples it learned, and on how many of them it was judged."""

    head: str
    is_own: bool
    examples: int
    evaluated: int
    groups: list[Group]


def contributions(
    again: Again,
    judge: Judge,
    judged: NDArray[np.bool_],
    split_ms: int,
    *,
    most: int,
    most_learned: int = MOST_LEARNED,
    generator: np.random.Generator,
    progress: Progress = lambda share, text: None,
) -> Contributions:
    """Leave each group out once.

    Parameters
    ----------
    judged: (n,) on which examples.
    most: learned are the examples of so many clients drawn at random that there are no more.
    most_learned: examples that networks and trees may learn in all; above, a Bayesian head stands in.
    generator: of that draw, and of intervals.
    """
    drawn = _of_some_clients(again.examples, most, generator)
    part = replace(again, examples=again.examples.taken(drawn))
    group_of = again.groups
    groups = list(dict.fromkeys(group_of.tolist()))
    each = 1.0 / (len(groups) + 1)

    def all_inputs(share: float) -> None:
        progress(each * share, "all inputs")

    for name, learner in _heads(part, most_learned // (len(groups) + 1)):
        head, is_own, learned = name, learner.settings.parts == again.settings.parts, _Learned(learner, split_ms)
        whole = learned.said(np.ones(len(group_of), np.bool_), all_inputs)
        there = judged[drawn] & np.isfinite(whole).all(axis=1)
        # A part that never served leaves another head than the task's own.
        if learned.parts == learner.settings.parts and judge.is_enough(part.targets()[there]):
            break
    else:
        return Contributions(head, is_own, len(drawn), int(there.sum()), [])
    without = {}
    for at, name in enumerate(groups):
        begin, text = each * (at + 1), f"without {name}"

        def passed(share: float, begin: float = begin, text: str = text) -> None:
            progress(begin + each * share, text)

        without[name] = learned.said(group_of != name, passed)
        there &= np.isfinite(without[name]).all(axis=1)
    target, client = part.targets()[there], part.examples.clients()[there]
    ours = judge.chief_of(target, whole[there])
    found = []
    for name, said in without.items():
        loss = interval(client, len(target), ours, judge.chief_of(target, said[there]), generator, ROUNDS)
        found.append(Group(name, int((group_of == name).sum()), loss.value, loss.low, loss.high))
    found.sort(key=lambda group: -group.loss)
    return Contributions(head, is_own, len(drawn), int(there.sum()), found)


def _heads(again: Again, most: int) -> list[tuple[str, Again]]:
    """What may learn, the best first, with how it is called; networks and trees of at most so many examples."""
    settings = again.settings
    own = "the task's own head: " + " + ".join(settings.parts)
    if BAYESIAN.issuperset(settings.parts):
        return [(own, again)]
    name = "linear" if settings.kind == "regression" else "logistic"
    stands_in = replace(again, settings=msgspec.structs.replace(settings, head=name))
    if len(again.examples) > most:
        return [
            (f"{name}, which stands in: the task's own head would take too long with over {most:,} examples", stands_in)
        ]
    gbdt = settings.gbdt
    seldom = max(gbdt.refit_interval_s, again.examples.span_ms / 1000.0 / _REFITS)
    slower = msgspec.structs.replace(settings, gbdt=msgspec.structs.replace(gbdt, refit_interval_s=seldom))
    return [
        (own, replace(again, settings=slower)),
        (f"{name}, which stands in: the task's own head needs more examples", stands_in),
    ]


class _Learned:
    """A head that learns along the record and is asked after the split; `parts`: those that served in the end."""

    def __init__(self, again: Again, split_ms: int) -> None:
        self._again = again
        self._split_ms = split_ms
        own = BAYESIAN.issuperset(again.settings.parts)
        self._interval_ms = 1 if own else max(1, again.examples.span_ms // _PUBLISHED)
        self.parts: tuple[str, ...] = ()

    def said(self, inputs: NDArray[np.bool_], passed: Callable[[float], None]) -> Floats:
        """(n, outputs) what it says where it sees those inputs alone, bool[F]."""
        again = self._again.seeing(inputs)
        (said,), self.parts = again.published_every([self._interval_ms], self._split_ms, passed)
        return said


def _of_some_clients(examples: AnsweredExamples, most: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Examples of clients drawn at random, all of each, at most so many; in their order."""
    if len(examples) <= most:
        return np.arange(len(examples))
    client = examples.clients()
    counts = np.bincount(client)
    drawn = generator.permutation(len(counts))
    kept = drawn[: max(1, int(np.searchsorted(np.cumsum(counts[drawn]), most, "right")))]
    return np.flatnonzero(np.isin(client, kept))
