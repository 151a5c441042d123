"""Measures of predicted probabilities: exact, over time, and with intervals over clients.

Guarantees: the area under the ROC curve counts a tie as a half and equals the share of (positive, negative)
pairs in the right order; nothing depends on the order of the examples. All arrays are one-dimensional and of
one length.

Not decided here: which predictions may be compared. Prequential figures are prequential because every score
handed in was made before its label was known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Interval",
    "auc",
    "auc_difference_interval",
    "auc_interval",
    "cumulative_auc",
    "expected_calibration_error",
    "log_loss",
    "rolling_auc",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


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
    ranked = np.sort(chance)
    edges = np.unique(ranked[np.linspace(0, len(ranked) - 1, bins + 1).astype(np.int64)[1:-1]])
    group = np.searchsorted(edges, chance, side="left")
    predicted = np.bincount(group, chance, minlength=len(edges) + 1)
    observed = np.bincount(group, truth.astype(np.float64), minlength=len(edges) + 1)
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
    ranking = _Ranking(truth, score)
    drawn = [ranking.auc(weights) for weights in _draws(clients, len(truth), generator, rounds)]
    return _interval(ranking.auc(), drawn, level)


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
    n = len(np.asarray(labels))
    drawn = [ours.auc(weights) - theirs.auc(weights) for weights in _draws(clients, n, generator, rounds)]
    return _interval(ours.auc() - theirs.auc(), drawn, level)


def _draws(clients: ArrayLike, n: int, generator: np.random.Generator, rounds: int) -> list[Floats]:
    names, client = np.unique(np.asarray(clients), return_inverse=True)
    if len(client) != n:
        raise ValueError(f"clients has length {len(client)}, expected {n}")
    if not n:
        return []
    draws = (generator.integers(0, len(names), len(names)) for _ in range(rounds))
    return [np.bincount(drawn, minlength=len(names)).astype(np.float64)[client] for drawn in draws]


def _interval(value: float, drawn: list[float], level: float) -> Interval:
    # A draw without one of the classes has no AUC.
    known = [one for one in drawn if not np.isnan(one)]
    if not known:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(known, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(value, float(low), float(high))


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
