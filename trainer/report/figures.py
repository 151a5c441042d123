"""The figures of a report: each way of learning beside the others, over time, and what groups of inputs contribute.

Guarantees: ways are compared on the same examples, all after the split; intervals are bootstrapped over clients; what
cannot be measured, for want of both outcomes, is not a number (`null` in JSON), never 0.
Not guaranteed: that a group which contributes nothing here is useless: another may stand in for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.errors import DataError
from stream.model.heads import Questions
from stream.model.layout import Layout
from stream.settings import Settings
from stream.wire import Schema
from trainer.evaluation import auc, auc_difference_interval, auc_interval, expected_calibration_error, log_loss
from trainer.learner import BayesianLogistic
from trainer.record import AnsweredExamples, frozen_predictions
from trainer.report.rows import learned_on_the_way, refitted

__all__ = ["MEASURES", "Bin", "Group", "Quality", "TaskReport", "report_on"]

Floats = NDArray[np.float64]

#: Measure of a curve over time -> its name for people.
MEASURES = {"auc": "AUC", "log_loss": "log loss (nats)", "calibration_error": "calibration error"}
LIVE, FROZEN, REFITTED = "live", "frozen at the split", "fitted anew"
#: Of fewer predictions of either outcome a curve would show noise.
LEAST_OF_EACH_CLASS = 10
_POINTS = 80
_REFITS = 12
_ROUNDS = 300
_BINS = 10


@dataclass(frozen=True)
class Quality:
    """One way of learning on the evaluated examples; `gain` is its AUC above that of the frozen head."""

    auc: float
    auc_low: float
    auc_high: float
    log_loss: float
    calibration_error: float
    gain: float
    gain_low: float
    gain_high: float


@dataclass(frozen=True)
class Bin:
    """Examples of similar predictions: the mean, the share that came true with its 95 % interval (Wilson), how many."""

    predicted: float
    observed: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Group:
    """What the head loses in AUC, with its interval, where it does not see a group of inputs."""

    name: str
    inputs: int
    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class TaskReport:
    """All figures of one task.

    `times_ms` (t,) ends of windows of `window_ms`; one that would begin before the split and ends after it begins at
    the split, so that all ways are judged on the same predictions. `over_time` way -> measure -> (t,); `rows` in the
    order to be shown. `group_examples`: on how many the groups were measured.
    """

    task: str
    examples: int
    clients: int
    positives: int
    split_ms: int
    evaluated: int
    evaluated_positives: int
    rows: dict[str, Quality]
    window_ms: int
    times_ms: list[int]
    over_time: dict[str, dict[str, list[float]]]
    reliability: dict[str, list[Bin]]
    group_examples: int
    groups: list[Group]

    def as_json(self) -> dict[str, Any]:
        """A map of plain values; NaN stands for what could not be measured."""
        return asdict(self)


def report_on(
    settings: Settings,
    task: str,
    examples: AnsweredExamples,
    *,
    split_ms: int | None = None,
    most_for_groups: int = 20_000,
    generator: np.random.Generator,
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> TaskReport:
    """Measure one task.

    Parameters
    ----------
    examples: as recorded by a trainer with these settings.
    split_ms: from where ways are compared, and where the frozen one stopped learning; by default the middle of the
        recorded time.
    most_for_groups: groups are measured on the examples of so many clients drawn at random that there are no more.
    generator: of intervals and of that draw.
    progress: told how far it is, 0 to 1, and with what.

    Raises
    ------
    DataError: the record is of other settings, or has nothing on one side of the split.
    """
    question = Questions(Layout.compile(settings, Schema.compile(settings))).by_task[task]
    _check(task, examples, question.width)
    if split_ms is None:
        split_ms = int((examples.as_of_ms.min() + examples.as_of_ms.max()) // 2)
    later = examples.as_of_ms >= split_ms
    if later.all() or not later.any():
        side = "before" if later.all() else "after"
        raise DataError(f"task {task!r}: the record has no example {side} the split: choose another with --split")

    def prior(inputs: NDArray[np.bool_] | None = None) -> BayesianLogistic:
        is_state = question.is_state if inputs is None else question.is_state[inputs]
        return BayesianLogistic.of_task(settings.tasks[task], is_state)

    progress(0.0, f"{task}: frozen")
    frozen = np.where(later, frozen_predictions(examples, split_ms, prior()), np.nan)
    progress(0.1, f"{task}: fitted anew")
    refits = np.linspace(split_ms, int(examples.as_of_ms.max()), _REFITS, endpoint=False).astype(np.int64)
    scores = {
        LIVE: examples.prediction.astype(np.float64),
        FROZEN: frozen,
        REFITTED: refitted(examples, prior(), refits),
    }
    judged = later & np.all([np.isfinite(values) for values in scores.values()], axis=0)
    rows = {name: _quality(examples, judged, values, frozen, generator) for name, values in scores.items()}
    span_ms = int(examples.as_of_ms.max() - examples.as_of_ms.min())
    window_ms = max(1, span_ms // 6)
    times = np.linspace(int(examples.as_of_ms.min()), int(examples.as_of_ms.max()), _POINTS).astype(np.int64)
    over_time = {name: _over_time(examples, values, times, window_ms, split_ms) for name, values in scores.items()}
    groups, measured = _groups(examples, question.names, prior, later, most_for_groups, generator, progress, task)
    return TaskReport(
        task=task,
        examples=len(examples),
        clients=len(set(examples.client_id)),
        positives=int(examples.label.sum()),
        split_ms=split_ms,
        evaluated=int(judged.sum()),
        evaluated_positives=int(examples.label[judged].sum()),
        rows=rows,
        window_ms=window_ms,
        times_ms=times.tolist(),
        over_time=over_time,
        reliability={name: _bins(examples.label[judged], values[judged]) for name, values in scores.items()},
        group_examples=measured,
        groups=groups,
    )


def _check(task: str, examples: AnsweredExamples, width: int) -> None:
    if examples.inputs.shape[1] != width:
        raise DataError(
            f"task {task!r}: the record has {examples.inputs.shape[1]} inputs, the settings describe {width}: give the "
            f"settings that the trainer had"
        )
    if not len(examples.center):
        raise DataError(
            f"task {task!r}: the record has no standardiser: fewer examples were seen than "
            f"tasks.{task}.standardise_after says"
        )


def _quality(
    examples: AnsweredExamples,
    judged: NDArray[np.bool_],
    scores: Floats,
    frozen: Floats,
    generator: np.random.Generator,
) -> Quality:
    label, score = examples.label[judged], scores[judged]
    clients = np.array(examples.client_id, object)[judged].astype(bytes)
    own = auc_interval(clients, label, score, generator, _ROUNDS)
    gain = auc_difference_interval(clients, label, score, frozen[judged], generator, _ROUNDS)
    return Quality(
        own.value, own.low, own.high, log_loss(label, score), expected_calibration_error(label, score), gain.value,
        gain.low, gain.high,
    )  # fmt: skip


def _over_time(
    examples: AnsweredExamples, scores: Floats, ends: NDArray[np.int64], window_ms: int, split_ms: int
) -> dict[str, list[float]]:
    there = np.isfinite(scores)
    order = np.argsort(examples.as_of_ms[there], kind="stable")
    times, label, score = (part[there][order] for part in (examples.as_of_ms, examples.label, scores))
    curves: dict[str, list[float]] = {name: [] for name in MEASURES}
    for end in ends.tolist():
        after = max(end - window_ms, split_ms - 1) if end >= split_ms else end - window_ms
        inside = slice(np.searchsorted(times, after, "right"), np.searchsorted(times, end, "right"))
        y, p = label[inside], score[inside]
        if min(int(y.sum()), len(y) - int(y.sum())) < LEAST_OF_EACH_CLASS:
            values = (math.nan, math.nan, math.nan)
        else:
            values = (auc(y, p), log_loss(y, p), expected_calibration_error(y, p))
        for name, value in zip(MEASURES, values, strict=True):
            curves[name].append(value)
    return curves


def _bins(label: NDArray[np.bool_], score: Floats) -> list[Bin]:
    """Groups of equally many examples, by rising prediction."""
    bins = []
    for part in np.array_split(np.argsort(score, kind="stable"), _BINS):
        n = len(part)
        if n:
            share = float(label[part].mean())
            low, high = _wilson(share, n)
            bins.append(Bin(float(score[part].mean()), share, low, high, n))
    return bins


def _wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Interval of a share (E. B. Wilson, JASA 22, 1927)."""
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def _groups(
    examples: AnsweredExamples,
    names: Sequence[str],
    prior: Callable[[NDArray[np.bool_] | None], BayesianLogistic],
    later: NDArray[np.bool_],
    most: int,
    generator: np.random.Generator,
    progress: Callable[[float, str], None],
    task: str,
) -> tuple[list[Group], int]:
    drawn = _of_some_clients(examples, most, generator)
    part = _taken(examples, drawn)
    judged = later[drawn]
    # Named before the first bracket, point or equals sign.
    group_of = np.array([re.split(r"[\[.=]", name, maxsplit=1)[0] for name in names])
    group_names = list(dict.fromkeys(group_of.tolist()))
    each = 0.8 / (len(group_names) + 1)

    def learn(inputs: NDArray[np.bool_] | None, begin: float, text: str) -> Floats:
        return learned_on_the_way(part, prior(inputs), inputs, lambda share: progress(begin + each * share, text))

    whole = learn(None, 0.2, f"{task}: all inputs")
    label = part.label[judged]
    clients = np.array(part.client_id, object)[judged].astype(bytes)
    groups = []
    for at, name in enumerate(group_names):
        without = learn(group_of != name, 0.2 + each * (at + 1), f"{task}: without {name}")
        loss = auc_difference_interval(clients, label, whole[judged], without[judged], generator, _ROUNDS)
        groups.append(Group(name, int((group_of == name).sum()), loss.value, loss.low, loss.high))
    return sorted(groups, key=lambda group: -group.loss), len(part)


def _of_some_clients(examples: AnsweredExamples, most: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Examples of clients drawn at random, all of each, at most so many; in their order."""
    if len(examples) <= most:
        return np.arange(len(examples))
    names, client, counts = np.unique(np.array(examples.client_id), return_inverse=True, return_counts=True)
    drawn = generator.permutation(len(names))
    kept = drawn[: max(1, int(np.searchsorted(np.cumsum(counts[drawn]), most, "right")))]
    return np.flatnonzero(np.isin(client, kept))


def _taken(examples: AnsweredExamples, at: NDArray[np.int64]) -> AnsweredExamples:
    return AnsweredExamples(
        client_id=[examples.client_id[i] for i in at.tolist()],
        as_of_ms=examples.as_of_ms[at],
        label=examples.label[at],
        weight=examples.weight[at],
        known_ms=examples.known_ms[at],
        final_ms=examples.final_ms[at],
        inputs=examples.inputs[at],
        prediction=examples.prediction[at],
        center=examples.center,
        scale=examples.scale,
    )
