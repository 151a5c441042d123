"""Bayesian linear models: logistic for two classes and for several, and linear; one update for each label.

The weights have a Gaussian posterior N(m, S). A label y of weight w at inputs x multiplies it by
sigmoid(±x·b)**w; the new mean is the mode of that product, found exactly by Newton's method in one dimension
(every mode lies on m + c S x), and the new covariance is the inverse of the curvature there (Laplace).

Derivation: the mode satisfies m' = m + w (y - s(z)) S x with z = x·m', so z solves z = x·m + w v (y - s(z)),
v = x·S x, whose left minus right side rises at a rate of at least 1: one root, between x·m and x·m ± w v. The
curvature is S^-1 + w s(z)(1 - s(z)) x x', inverted by Sherman and Morrison. Source: D. J. Spiegelhalter, S.
L. Lauritzen, Sequential updating of conditional probabilities, Networks 20, 1990.

Of several classes, each has a posterior of its own against the others. The linear one is exact: its mean is that of
all labels at once (recursive least squares with the prior as ridge; it does not depend on the noise's variance, in
units of which its prior variances are).

Guaranteed: float64 throughout and the same result for the same labels in the same order; a label that would
make anything not finite changes nothing and is counted. A weight of 2 is not two labels of weight 1, as each
update is approximated by itself; it is the same likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stream.model.heads import linear_tensors, sigmoid
from stream.model.parameters import Tensor
from stream.settings import Task
from trainer.checkpoint import pack_array, unpack_array
from trainer.learner.part import Floats, Labelled, Load
from trainer.tables import CategoryTable, read_effects, write_effects

__all__ = ["BayesianLinear", "BayesianLogistic", "LinearLearner", "LogisticLearner", "prior_variance"]

_NEWTON_STEPS = 200


def prior_variance(settings: Task, is_state: NDArray[np.bool_]) -> Floats:
    """(F + 1,) variances of a task's weights: one for those on hidden state and sketches, whose many columns say
    little each, one for the others, and a wide one for the bias, which no input can stand in for.

    Parameters
    ----------
    is_state: (F,) which of the head's inputs are hidden state or sketch.
    """
    state = settings.state_prior_variance
    if state is None:
        state = settings.prior_variance / 10.0
    return np.append(np.where(is_state, state, settings.prior_variance), settings.bias_variance)


class BayesianLogistic:
    """Posterior of the weights of one logistic head.

    Parameters
    ----------
    width: inputs, the column of ones included.
    prior_variance: of each weight, around zero; one for all, or (width,).
    """

    def __init__(self, width: int, prior_variance: float | NDArray[np.float64]) -> None:
        self.mean = np.zeros(width)
        self.covariance = np.eye(width) * prior_variance

    @classmethod
    def of_task(cls, settings: Task, is_state: NDArray[np.bool_]) -> BayesianLogistic:
        """The prior of a task; see `prior_variance`."""
        variance = prior_variance(settings, is_state)
        return cls(len(variance), variance)

    def learn(
        self,
        x: NDArray[np.float64],
        label: bool,
        weight: float = 1.0,
        offset: float = 0.0,
        effects: NDArray[np.float64] | None = None,
    ) -> bool:
        """Update by one label at inputs x (width,); False, and no change, where it would not be finite.

        Parameters
        ----------
        offset: known log-odds that are added to x·b for this label alone.
        effects: (t, 2) mean and variance of further weights, each with an input of one here, updated in place. They
            are taken for independent of each other and of b, before this label and after it.
        """
        if not (np.isfinite(x).all() and math.isfinite(weight)):
            return False
        if effects is None:
            effects = np.zeros((0, 2))
        gain = self.covariance @ x
        variance = max(float(x @ gain), 0.0) + float(effects[:, 1].sum())
        start = float(self.mean @ x) + float(effects[:, 0].sum()) + offset
        root = _mode(start, weight * variance, float(label))
        if root is None:
            return False
        probability = _sigmoid(root)
        step = weight * (float(label) - probability)
        curvature = weight * probability * (1.0 - probability)
        shrink = curvature / (1.0 + curvature * variance)
        if not (math.isfinite(step) and math.isfinite(shrink)):
            return False
        mean = self.mean + gain * step
        if not np.isfinite(mean).all():
            return False
        self.mean = mean
        self.covariance -= np.outer(gain, gain) * shrink
        effects[:, 0] += effects[:, 1] * step
        effects[:, 1] -= np.square(effects[:, 1]) * shrink
        return True

    def predict(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """(k,) probabilities at the mean, for (k, width) inputs."""
        return sigmoid(x @ self.mean)


def _sigmoid(z: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * z))


def _mode(start: float, reach: float, label: float) -> float | None:
    """The root of z = start + reach (label - sigmoid(z)); None where the numbers are not finite."""
    if not (math.isfinite(start) and math.isfinite(reach)):
        return None
    low = start - reach * (1.0 - label)
    high = start + reach * label
    z = min(max(0.0, low), high)
    for _ in range(_NEWTON_STEPS):
        probability = _sigmoid(z)
        excess = z - start - reach * (label - probability)
        if excess > 0.0:
            high = z
        else:
            low = z
        following = z - excess / (1.0 + reach * probability * (1.0 - probability))
        if not low <= following <= high:
            following = 0.5 * (low + high)
        if abs(following - z) <= 1e-14 * max(1.0, abs(z)):
            return following
        z = following
    return z


class BayesianLinear:
    """Posterior of the weights of one linear head; see `BayesianLogistic` for the parameters."""

    def __init__(self, width: int, prior_variance: float | NDArray[np.float64]) -> None:
        self.mean = np.zeros(width)
        self.covariance = np.eye(width) * prior_variance

    def learn(self, x: Floats, label: float, weight: float = 1.0, effects: Floats | None = None) -> bool:
        """Update by one label at inputs x (width,); False, and no change, where it would not be finite.

        Parameters
        ----------
        effects: see `BayesianLogistic.learn`.
        """
        if not (np.isfinite(x).all() and math.isfinite(weight) and math.isfinite(label)):
            return False
        if effects is None:
            effects = np.zeros((0, 2))
        gain = self.covariance @ x
        shrink = weight / (1.0 + weight * (max(float(x @ gain), 0.0) + float(effects[:, 1].sum())))
        with np.errstate(over="ignore", invalid="ignore"):
            step = shrink * (label - float(self.mean @ x) - float(effects[:, 0].sum()))
            mean = self.mean + gain * step
            moved = effects[:, 0] + effects[:, 1] * step
        # Rows are kept as float32.
        if not (np.isfinite(mean).all() and (np.abs(moved) < 1e38).all()):
            return False
        self.mean = mean
        self.covariance -= np.outer(gain, gain) * shrink
        effects[:, 0] = moved
        effects[:, 1] -= np.square(effects[:, 1]) * shrink
        return True


class LogisticLearner:
    """The part `logistic` of a task's head: one posterior, or one for each class against the others."""

    def __init__(
        self, task: str, settings: Task, is_state: NDArray[np.bool_], tables: Sequence[CategoryTable] = ()
    ) -> None:
        self._task = task
        self._tables = tables
        self._classes = len(settings.classes)
        self.posteriors = [BayesianLogistic.of_task(settings, is_state) for _ in range(max(1, self._classes))]
        self.behind = 0

    def learn(self, one: Labelled, x: Floats) -> int:
        keys, effects = read_effects(self._tables, one.keys, len(self.posteriors))
        if not self._classes:
            first = self.posteriors[0]
            taken = [first.learn(x, one.target > 0.5, one.weight, one.log_odds_offset, effects[:, 0])]
        else:
            taken = [
                p.learn(x, one.target == c, one.weight, effects=effects[:, c]) for c, p in enumerate(self.posteriors)
            ]
        write_effects(self._tables, keys, effects)
        return int(not all(taken))

    def tensors(self, center: Floats, scale: Floats) -> dict[str, Tensor]:
        means = [posterior.mean for posterior in self.posteriors]
        return linear_tensors(self._task, center, scale, np.stack(means) if self._classes else means[0])

    def save(self) -> dict[str, bytes]:
        return {
            "mean": pack_array(np.stack([posterior.mean for posterior in self.posteriors])),
            "covariance": pack_array(np.stack([posterior.covariance for posterior in self.posteriors])),
        }

    def load(self, load: Load) -> None:
        means, covariances = unpack_array(load("mean")), unpack_array(load("covariance"))
        for posterior, mean, covariance in zip(self.posteriors, means, covariances, strict=True):
            posterior.mean, posterior.covariance = mean.copy(), covariance.copy()

    def close(self) -> None:
        pass


class LinearLearner:
    """The part `linear` of a regression's head."""

    def __init__(
        self, task: str, settings: Task, is_state: NDArray[np.bool_], tables: Sequence[CategoryTable] = ()
    ) -> None:
        self._task = task
        self._tables = tables
        variance = prior_variance(settings, is_state)
        self.posterior = BayesianLinear(len(variance), variance)
        self.behind = 0

    def learn(self, one: Labelled, x: Floats) -> int:
        keys, effects = read_effects(self._tables, one.keys, 1)
        taken = self.posterior.learn(x, one.target, one.weight, effects[:, 0])
        write_effects(self._tables, keys, effects)
        return int(not taken)

    def tensors(self, center: Floats, scale: Floats) -> dict[str, Tensor]:
        return linear_tensors(self._task, center, scale, self.posterior.mean)

    def save(self) -> dict[str, bytes]:
        return {"mean": pack_array(self.posterior.mean), "covariance": pack_array(self.posterior.covariance)}

    def load(self, load: Load) -> None:
        self.posterior.mean, self.posterior.covariance = unpack_array(load("mean")), unpack_array(load("covariance"))

    def close(self) -> None:
        pass
