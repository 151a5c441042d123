"""What the live system is compared with: models on hand-made aggregates, refitted on schedule or learned online.

Each predicts the points from `from_ms` on, from what was known at the start of their day of refitting (online: at the
point): labels whose `known_ms` lies before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from lightgbm import Dataset, train
from numpy.typing import NDArray

from tests.bench.quality.streams import Points, Stream

__all__ = ["FIRST", "REGULARISED", "boosted", "logistic_refit", "online_logistic"]

Floats = NDArray[np.float64]
DAY_MS = 86_400_000

_COMMON = {
    "objective": "binary", "num_threads": 1, "deterministic": True, "force_row_wise": True, "verbose": -1,
}  # fmt: skip
#: LightGBM as it comes, with its trees made smaller steps.
FIRST: dict[str, Any] = {**_COMMON, "num_trees": 200, "learning_rate": 0.05, "num_leaves": 31}
REGULARISED: dict[str, Any] = {
    **_COMMON, "num_trees": 250, "learning_rate": 0.03, "num_leaves": 15, "bagging_fraction": 0.5, "bagging_freq": 1,
    "feature_fraction": 0.3, "lambda_l2": 10.0, "max_bin": 63,
}  # fmt: skip


def _refits(points: Points, from_ms: int, every_days: float) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(indices of points whose label is known, indices of points to predict) at each refit."""
    last_ms = int(points.as_of_ms.max())
    for at_ms in range(from_ms, last_ms + 1, int(every_days * DAY_MS)):
        due = (points.as_of_ms >= at_ms) & (points.as_of_ms < at_ms + every_days * DAY_MS)
        yield np.flatnonzero(points.known_ms < at_ms), np.flatnonzero(due)


def boosted(stream: Stream, features: NDArray[np.float32], every_days: float, parameters: dict[str, Any]) -> Floats:
    """(n,) of LightGBM refitted from scratch on all known labels; NaN before judging begins."""
    points = stream.points
    out = np.full(len(points), np.nan)
    for known, due in _refits(points, stream.judged_from_ms, every_days):
        if not len(due):
            continue
        # A share, as the first fits of a small stream have few examples.
        leaf = min(stream.leaf_examples, max(20, len(known) // 20))
        log_odds = np.zeros(len(due))
        # Without draws, one fit is like another.
        fits = stream.fits if parameters is REGULARISED else 1
        for seed in range(1, fits + 1):
            chosen = {**parameters, "seed": seed}
            if parameters is REGULARISED:
                chosen["min_data_in_leaf"] = leaf
            data = Dataset(features[known], points.label[known].astype(np.float32), params=chosen)
            log_odds += np.asarray(train(chosen, data).predict(features[due], raw_score=True, num_threads=1))
        out[due] = _chance(log_odds / fits)
    return out


def logistic_refit(stream: Stream, every_days: float) -> Floats:
    """(n,) of logistic regression with an L2 penalty on the standardised aggregates, refitted to convergence."""
    points = stream.points
    x = _dense(points)
    spread = x.std(axis=0)
    x = np.clip((x - x.mean(axis=0)) / np.where(spread > 1e-3, spread, 1.0), -6.0, 6.0)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    out = np.full(len(points), np.nan)
    weight = np.zeros(x.shape[1])
    for known, due in _refits(points, stream.judged_from_ms, every_days):
        if len(due):
            weight = _mode(x[known], points.label[known], weight, stream.penalty)
            out[due] = _chance(x[due] @ weight)
    return out


def _dense(points: Points) -> Floats:
    """(n, inputs): signed logarithms, and of the columns that are categories one column for each value."""
    raw = points.aggregates.astype(np.float64)
    numbers, codes = np.split(raw, [raw.shape[1] - points.codes], axis=1)
    seen = np.isfinite(numbers)
    filled = np.where(seen, np.sign(numbers) * np.log1p(np.abs(np.nan_to_num(numbers))), 0.0)
    absent = ~seen[:, ~seen.all(axis=0)]
    hot = [codes[:, [i]] == np.unique(codes[:, i])[None, :] for i in range(codes.shape[1])]
    return np.concatenate([filled, absent, *hot], axis=1).astype(np.float64)


def _chance(log_odds: Floats) -> Floats:
    return 0.5 + 0.5 * np.tanh(0.5 * log_odds)


def _mode(x: Floats, label: NDArray[np.bool_], start: Floats, penalty: float) -> Floats:
    """Weights (inputs,), the last one the bias, by Newton's method."""
    precision = np.append(np.full(len(start) - 1, penalty), 1e-3)
    weight = start.copy()
    for _ in range(25):
        chance = _chance(x @ weight)
        gradient = x.T @ (label - chance) - precision * weight
        curvature = (x * (chance * (1.0 - chance))[:, None]).T @ x + np.diag(precision)
        step = np.linalg.solve(curvature, gradient)
        weight += step
        if np.abs(step).max() < 1e-6:
            break
    return weight


def online_logistic(stream: Stream) -> Floats:
    """(n,) of River's logistic regression on the scaled aggregates, one pass, each label as it becomes known.

    It is given what the refitted regression is, and smaller steps than River's own (.01), which are too large for so
    many inputs: with those it forgets one campaign of the shop while it learns the next. On the loans, where the 17
    labels of an application, all the same, come at once, the intercept's are smaller, too: with River's own,
    predictions go up and down with the latest outcomes.
    """
    from river import linear_model, optim, preprocessing

    points = stream.points
    head = linear_model.LogisticRegression(optim.SGD(stream.rate), intercept_lr=stream.intercept_rate)
    model = preprocessing.StandardScaler() | head
    rows = _dense(points)
    names = [str(i) for i in range(rows.shape[1])]
    out = np.full(len(points), np.nan)
    known = np.argsort(points.known_ms, kind="stable")
    told = 0
    for i, at_ms in enumerate(points.as_of_ms.tolist()):
        while told < len(known) and points.known_ms[known[told]] < at_ms:
            one = int(known[told])
            model.learn_one(dict(zip(names, rows[one].tolist(), strict=True)), bool(points.label[one]))
            told += 1
        if at_ms >= stream.judged_from_ms:
            out[i] = model.predict_proba_one(dict(zip(names, rows[i].tolist(), strict=True))).get(True, 0.5)
    return out
