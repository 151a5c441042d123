"""What other ways of learning would have said of the examples that a trainer recorded.

Guarantees: a prediction at time t uses labels that were final at or before t, and no others; all ways see the same
inputs, standardised as the live head's were.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from stream.model.heads import sigmoid, standardise
from trainer.learner import BayesianLogistic
from trainer.record import AnsweredExamples

__all__ = ["learned_on_the_way", "refitted"]

Floats = NDArray[np.float64]
_NEWTON_STEPS = 25
_CONVERGED = 1e-8


def learned_on_the_way(
    examples: AnsweredExamples,
    head: BayesianLogistic,
    inputs: NDArray[np.bool_] | None = None,
    passed: Callable[[float], None] = lambda _: None,
) -> Floats:
    """(n,) predictions of a head that learns each label once it is final, and is asked before.

    Parameters
    ----------
    head: the prior; it learns here. Its width is that of the inputs taken, and one.
    inputs: bool[F], those that it sees; all if not given.
    passed: told now and then how much is done, 0 to 1.
    """
    x = _standardised(examples, inputs)
    final = np.argsort(examples.final_ms, kind="stable")
    asked = np.argsort(examples.as_of_ms, kind="stable")
    known = np.searchsorted(examples.final_ms[final], examples.as_of_ms[asked], "right")
    out = np.full(len(examples), np.nan)
    learned = 0
    finite = np.asarray(np.isfinite(x).all(axis=1), np.bool_)
    edges = [0, *(np.flatnonzero(np.diff(known)) + 1).tolist(), len(asked)]
    for start, end in itertools.pairwise(edges):
        if start == end:
            continue
        for i in final[learned : known[start]].tolist():
            if finite[i]:
                head.learn(x[i], bool(examples.label[i]), float(examples.weight[i]))
        learned = int(known[start])
        out[asked[start:end]] = head.predict(x[asked[start:end]])
        passed(end / len(asked))
    return out


def refitted(examples: AnsweredExamples, prior: BayesianLogistic, times_ms: NDArray[np.int64]) -> Floats:
    """(n,) predictions of a head that is fitted anew, exactly, at each of `times_ms` (rising), NaN before the first.

    The weights are the mode of the posterior given all labels final by then, found by Newton's method (iteratively
    reweighted least squares); the prior is that of the head that learns online.
    """
    x = _standardised(examples, None)
    out = np.full(len(examples), np.nan)
    usable = np.isfinite(x).all(axis=1)
    precision = np.asarray(np.linalg.inv(prior.covariance), np.float64)
    weights = prior.mean.copy()
    for at, start in enumerate(times_ms.tolist()):
        known = usable & (examples.final_ms <= start)
        weights = _mode(x[known], examples.label[known], examples.weight[known], prior.mean, precision, weights)
        end = times_ms[at + 1] if at + 1 < len(times_ms) else np.iinfo(np.int64).max
        asked = (examples.as_of_ms >= start) & (examples.as_of_ms < end)
        out[asked] = sigmoid(x[asked] @ weights)
    return out


def _standardised(examples: AnsweredExamples, inputs: NDArray[np.bool_] | None) -> Floats:
    x = standardise(examples.inputs, examples.center, examples.scale)
    return x if inputs is None else x[:, np.append(inputs, True)]


def _mode(
    x: Floats, label: NDArray[np.bool_], weight: Floats, mean: Floats, precision: Floats, start: Floats
) -> Floats:
    """Where the log posterior is largest; Newton's steps, halved until each gains."""

    def loss(m: Floats) -> float:
        z = x @ m
        # log(1 + exp(z)) - y z, without overflow
        nll = np.logaddexp(0.0, z) - label * z
        return float(weight @ nll + 0.5 * (m - mean) @ precision @ (m - mean))

    m = start.copy()
    before = loss(m)
    for _ in range(_NEWTON_STEPS):
        p = sigmoid(x @ m)
        gradient = x.T @ (weight * (p - label)) + precision @ (m - mean)
        curvature = (x.T * (weight * p * (1.0 - p))) @ x + precision
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while (after := loss(m - size * step)) > before and size > 1e-6:
            size *= 0.5
        if after > before:
            break
        m = m - size * step
        if before - after <= _CONVERGED * abs(before):
            break
        before = after
    return m
