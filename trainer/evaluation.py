"""Measures of predicted probabilities: exact, over time, and with intervals over clients.

Guarantees: the area under the ROC curve counts a tie as a half and equals the share of (positive, negative)
pairs in the right order; nothing depends on the order of the examples. All arrays are one-dimensional and of
one length.

Not decided here: which predictions may be compared. Prequential figures are prequential because every score
handed in was made before its label was known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Interval",
    "Measure",
    "auc",
    "auc_difference_interval",
    "auc_interval",
    "class_log_loss",
    "cumulative_auc",
    "expected_calibration_error",
    "interval",
    "log_loss",
    "mean_calibration_error",
    "measure_of_auc",
    "measure_of_class_auc",
    "measure_of_r2",
    "rolling_auc",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
#: A figure of some examples under weights (n,) of them; None: all 1. NaN where it is not defined.
Measure = Callable[[Floats | None], float]


@dataclass(frozen=True)
class Interval:
    """A value and the bounds of its bootstrap interval."""

    value: float
    low: float
    high: float


class _Ranking:
    """Scores sorted once; the area under the curve for any weights of the examples."""

    def __init__(self, labels: NDArray[np.bool_], scores: Floats) -> None:
        self._order = np.argsort(scores, kind="stable")
        ranked = scores[self._order]
        self._positive = labels[self._order]
        new = np.ones(len(ranked), dtype=bool)
        new[1:] = ranked[1:] != ranked[:-1]
        self._starts = np.flatnonzero(new)

    def auc(self, weights: Floats | None = None) -> float:
        """Area under the ROC curve; NaN where there are not both kinds of labels.

        Parameters
        ----------
        weights: (n,) of the examples, in their original order; all 1 if not given.
        """
        if not len(self._positive):
            return float("nan")
        weight = np.ones(len(self._positive)) if weights is None else weights[self._order]
        positive = np.add.reduceat(np.where(self._positive, weight, 0.0), self._starts)
        negative = np.add.reduceat(np.where(self._positive, 0.0, weight), self._starts)
        pairs = positive.sum() * negative.sum()
        if pairs == 0.0:
            return float("nan")
        below = np.cumsum(negative) - negative
        return float((positive * (below + 0.5 * negative)).sum() / pairs)


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve; NaN where one class is missing.

    Parameters
    ----------
    labels: bool or 0/1, n. scores: any real numbers, n; higher means more likely.

    Raises
    ------
    ValueError: lengths differ, a label is neither 0 nor 1, or a score is NaN.
    """
    return _Ranking(*_checked(labels, scores)).auc()


def measure_of_auc(labels: ArrayLike, scores: ArrayLike) -> Measure:
    """`auc` of these examples, for any weights of them."""
    return _Ranking(*_checked(labels, scores)).auc


def measure_of_class_auc(classes: ArrayLike, chances: ArrayLike) -> Measure:
    """AUC of each class against the rest, and of these the mean, each weighted by its class's share of the examples;
    classes without an example, or without another's, are left out (F. Provost, P. Domingos, Tree induction for
    probability-based ranking, Machine Learning 52, 2003).

    Parameters
    ----------
    classes: (n,) numbers from 0. chances: (n, k) of each class.
    """
    true, said = np.asarray(classes, np.int64), np.asarray(chances, np.float64)
    each = [_Ranking(*_checked(true == one, said[:, one])) for one in range(said.shape[1])]

    def measure(weights: Floats | None = None) -> float:
        share = np.bincount(true, weights, len(each))
        values = np.array([ranking.auc(weights) for ranking in each])
        known = np.isfinite(values) & (share > 0)
        return float(np.average(values[known], weights=share[known])) if known.any() else float("nan")

    return measure


def measure_of_r2(labels: ArrayLike, predictions: ArrayLike) -> Measure:
    """The share of the labels' variance that predictions explain: 1 less the mean squared error over the variance.

    0 for who always says the labels' mean, below 0 for who does worse; NaN where all labels are the same.
    """
    truth, said = np.asarray(labels, np.float64), np.asarray(predictions, np.float64)
    errors = np.square(truth - said)

    def measure(weights: Floats | None = None) -> float:
        weight = np.ones(len(truth)) if weights is None else weights
        total = float(weight.sum())
        if not total:
            return float("nan")
        spread = float(weight @ np.square(truth - weight @ truth / total))
        return 1.0 - float(weight @ errors) / spread if spread > 0.0 else float("nan")

    return measure


def class_log_loss(classes: ArrayLike, chances: ArrayLike) -> float:
    """`log_loss` of several classes: (n,) numbers from 0, and the chances (n, k) of each."""
    true, said = np.asarray(classes, np.int64), np.asarray(chances, np.float64)
    return float(-np.log(np.clip(said[np.arange(len(true)), true], 1e-12, 1.0)).mean()) if len(true) else float("nan")


def log_loss(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean negative log likelihood in nats; NaN for no examples.

    Probabilities are kept 1e-12 away from 0 and 1, so that one wrong certainty does not make it infinite.
    """
    truth, chance = _checked(labels, probabilities)
    if not len(truth):
        return float("nan")
    _check_range(chance)
    chance = np.clip(chance, 1e-12, 1.0 - 1e-12)
    return float(-np.where(truth, np.log(chance), np.log1p(-chance)).mean())


def expected_calibration_error(labels: ArrayLike, probabilities: ArrayLike, bins: int = 10) -> float:
    """Mean distance between predicted and observed rate over `bins` groups of equally many examples.

    Groups of equal size (Nguyen & O'Connor 2015) and not of equal width, as predictions of rare events share
    the lowest width. Examples of one probability stay in one group. NaN for no examples.
    """
    truth, chance = _checked(labels, probabilities)
    if not len(truth):
        return float("nan")
    _check_range(chance)
    return mean_calibration_error(truth, chance, bins)


def mean_calibration_error(labels: ArrayLike, predictions: ArrayLike, bins: int = 10) -> float:
    """The same of any numbers: mean distance between the means of prediction and label, over groups of equally many."""
    truth, said = np.asarray(labels, np.float64), np.asarray(predictions, np.float64)
    if not len(truth):
        return float("nan")
    ranked = np.sort(said)
    edges = np.unique(ranked[np.linspace(0, len(ranked) - 1, bins + 1).astype(np.int64)[1:-1]])
    group = np.searchsorted(edges, said, side="left")
    predicted = np.bincount(group, said, minlength=len(edges) + 1)
    observed = np.bincount(group, truth, minlength=len(edges) + 1)
    return float(np.abs(predicted - observed).sum() / len(truth))


def cumulative_auc(times: ArrayLike, labels: ArrayLike, scores: ArrayLike, at: ArrayLike) -> Floats:
    """float64[len(at)]: AUC over the examples whose time is not after each of `at`; NaN where undefined."""
    when, truth, score = _timed(times, labels, scores)
    return np.asarray([auc(truth[when <= end], score[when <= end]) for end in np.asarray(at)], dtype=np.float64)


def rolling_auc(times: ArrayLike, labels: ArrayLike, scores: ArrayLike, at: ArrayLike, window: float) -> Floats:
    """float64[len(at)]: AUC over the examples in (end - window, end] for each end; NaN where undefined."""
    when, truth, score = _timed(times, labels, scores)
    values = []
    for end in np.asarray(at):
        inside = (when > end - window) & (when <= end)
        values.append(auc(truth[inside], score[inside]))
    return np.asarray(values, dtype=np.float64)


def auc_interval(
    clients: ArrayLike,
    labels: ArrayLike,
    scores: ArrayLike,
    generator: np.random.Generator,
    rounds: int = 1000,
    level: float = 0.95,
) -> Interval:
    """AUC with a percentile bootstrap interval over clients: a client is drawn with all its examples."""
    truth, score = _checked(labels, scores)
    return interval(clients, len(truth), _Ranking(truth, score).auc, None, generator, rounds, level)


def auc_difference_interval(
    clients: ArrayLike,
    labels: ArrayLike,
    scores: ArrayLike,
    reference: ArrayLike,
    generator: np.random.Generator,
    rounds: int = 1000,
    level: float = 0.95,
) -> Interval:
    """AUC of `scores` minus AUC of `reference` on the same examples, with a paired interval over clients."""
    ours = _Ranking(*_checked(labels, scores))
    theirs = _Ranking(*_checked(labels, reference))
    return interval(clients, len(np.asarray(labels)), ours.auc, theirs.auc, generator, rounds, level)


def interval(
    clients: ArrayLike,
    n: int,
    measure: Measure,
    reference: Measure | None,
    generator: np.random.Generator,
    rounds: int = 1000,
    level: float = 0.95,
) -> Interval:
    """A measure of n examples, or how much it is above a reference, with a percentile bootstrap interval over clients:
    a client is drawn with all its examples, the same ones for both."""

    def value(weights: Floats | None) -> float:
        return measure(weights) - (reference(weights) if reference is not None else 0.0)

    # A draw without one of the classes has no AUC.
    drawn = [one for one in map(value, _draws(clients, n, generator, rounds)) if not np.isnan(one)]
    if not drawn:
        return Interval(value(None), float("nan"), float("nan"))
    low, high = np.quantile(drawn, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(value(None), float(low), float(high))


def _draws(clients: ArrayLike, n: int, generator: np.random.Generator, rounds: int) -> Iterator[Floats]:
    names, client = np.unique(np.asarray(clients), return_inverse=True)
    if len(client) != n:
        raise ValueError(f"clients has length {len(client)}, expected {n}")
    for _ in range(rounds if n else 0):
        drawn = generator.integers(0, len(names), len(names))
        yield np.bincount(drawn, minlength=len(names)).astype(np.float64)[client]


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], Floats]:
    truth, score = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if truth.ndim != 1 or score.shape != truth.shape:
        raise ValueError(f"labels {truth.shape} and scores {score.shape}: expected one length")
    if not np.isin(truth, (0, 1)).all():
        raise ValueError("labels: expected 0 and 1 alone")
    if np.isnan(score).any():
        raise ValueError("scores: expected numbers, found NaN")
    return truth.astype(bool), score


def _timed(
    times: ArrayLike, labels: ArrayLike, scores: ArrayLike
) -> tuple[NDArray[np.generic], NDArray[np.bool_], Floats]:
    truth, score = _checked(labels, scores)
    when = np.asarray(times)
    if when.shape != truth.shape:
        raise ValueError(f"times {when.shape} and labels {truth.shape}: expected one length")
    return when, truth, score


def _check_range(probabilities: Floats) -> None:
    if (probabilities < 0.0).any() or (probabilities > 1.0).any():
        raise ValueError("probabilities: expected values from 0 to 1")
