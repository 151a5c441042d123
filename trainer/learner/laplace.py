"""Many labels of one moment as one update: the mode of a Gaussian prior times all their likelihoods at once.

The weights have the prior N(m, S). With X the inputs (n, d) of n labels, the mode m + d' is found by Newton's method,
each step halved until it gains, and the new covariance is the inverse of the curvature there (Laplace). S is never
inverted, so weights whose prior variance is 0 stay where they are.

Derivation: write X = E U and the way from m as S U' c, with (E, U) = (X, 1) where labels are more than weights and
(1, X) where they are fewer. With Q = U S U', curvatures v and z = z0 + E Q c, a Newton step leads to the c that solves
(1 + E' v E Q) c = E' (v (z - z0) + w (y - s(z))). The covariance is S - S U' (1 + E' v E Q)^-1 E' v E U S, which is
Sherman, Morrison and Woodbury's. With U = X this is algorithm 3.1 of C. E. Rasmussen & C. K. I. Williams, Gaussian
Processes for Machine Learning, 2006; with one label it is what `BayesianLogistic.learn` does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stream.model.heads import sigmoid

__all__ = ["joint_update"]

Floats = NDArray[np.float64]

_STEPS = 100
_HALVINGS = 30
#: A Newton step that moves no score by more than this is the last: the next would move it by about its square.
_SMALL = 1e-9
#: Near the mode a step gains less than this share of the loss, which is lost in rounding.
_ROUNDING = 1e-12


def joint_update(
    mean: Floats, covariance: Floats, x: Floats, label: Floats, weight: Floats, offset: Floats
) -> tuple[Floats, Floats] | None:
    """The mean (d,) and covariance (d, d) after n labels; None where they were not found, as numbers are too large.

    Guaranteed: the same bits for the same labels in the same order, on one thread of one machine.

    Parameters
    ----------
    mean, covariance: before; not changed.
    x: (n, d) inputs.
    label, weight, offset: (n,) 0 or 1, and see `BayesianLogistic.learn`.
    """
    try:
        return _update(mean, covariance, x, label, weight, offset)
    except np.linalg.LinAlgError:
        return None


def _update(
    mean: Floats, covariance: Floats, x: Floats, label: Floats, weight: Floats, offset: Floats
) -> tuple[Floats, Floats] | None:
    lift = x if len(x) > len(mean) else None
    with np.errstate(over="ignore", invalid="ignore"):
        # S U', (d, k).
        reach = covariance if lift is not None else covariance @ x.T
        inner = covariance if lift is not None else x @ reach
        found = _mode(inner, lift, x @ mean + offset, label, weight)
        if found is None:
            return None
        c, curvature = found
        matrix = np.eye(len(inner)) + _bend(lift, curvature, inner)
        shrunk = covariance - reach @ np.linalg.solve(matrix, _bend(lift, curvature, reach.T))
        shrunk = 0.5 * (shrunk + shrunk.T)
        moved = mean + reach @ c
    finite = bool(np.isfinite(moved).all() and np.isfinite(shrunk).all() and (np.diagonal(shrunk) >= 0.0).all())
    return (moved, shrunk) if finite else None


def _bend(lift: Floats | None, curvature: Floats, what: Floats) -> Floats:
    """E' v E times what is (k, m)."""
    if lift is None:
        return curvature[:, None] * what
    # A product with its own transpose takes half the time of another.
    root = np.sqrt(curvature)[:, None] * lift
    return np.asarray((root.T @ root) @ what)


def _mode(
    inner: Floats, lift: Floats | None, start: Floats, label: Floats, weight: Floats
) -> tuple[Floats, Floats] | None:
    """c (k,) and the curvatures (n,) at the mode, with `inner` Q and `lift` E, None for the identity."""
    c = np.zeros(len(inner))
    z = start.copy()
    loss = _loss(z, label, weight)
    one = np.eye(len(inner))
    for _ in range(_STEPS):
        chance = sigmoid(z)
        curvature = weight * chance * (1.0 - chance)
        pull = curvature * (z - start) + weight * (label - chance)
        matrix = one + _bend(lift, curvature, inner)
        right = pull if lift is None else lift.T @ pull
        if not (np.isfinite(matrix).all() and np.isfinite(right).all()):
            return None
        step = np.linalg.solve(matrix, right) - c
        move = inner @ step if lift is None else lift @ (inner @ step)
        if float(np.abs(move).max()) <= _SMALL:
            chance = sigmoid(z + move)
            return c + step, weight * chance * (1.0 - chance)
        share = 1.0
        for _ in range(_HALVINGS):
            tried, there = c + share * step, z + share * move
            value = 0.5 * float(tried @ inner @ tried) + _loss(there, label, weight)
            if value <= loss + _ROUNDING * (1.0 + loss):
                break
            share *= 0.5
        else:
            return None
        c, z, loss = tried, there, value
    return None


def _loss(z: Floats, label: Floats, weight: Floats) -> float:
    return float(weight @ (np.logaddexp(0.0, z) - label * z))
