"""Bayesian linear models: logistic for two classes and for several, and linear.

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

Labels that become final at one moment of stream time, as those of a campaign do when it ends, are one update
(`trainer.learner.laplace`), whatever order they come in: learned one after the other, positives first as they often
come, each would be approximated where the ones before it have led. Until a label of another moment comes, what is
served is the update by those that have come.

Guaranteed: float64 throughout and the same result for the same labels in the same order; within a moment, in any order.
A label that would make anything not finite changes nothing and is counted. A weight of 2 is not two labels of weight 1
where each is an update of its own; it is the same likelihood.

Not guaranteed: that the order does not matter where one moment has more labels than are kept for it (4,096, or fewer
where inputs are more than 60: some 2,000 of 130 inputs, 300 of 800), which are then one update, the ones after them the
next; where labels of two moments come by turns; of a task with `tables`, or one that learns labels `as_they_come`,
where each label is an update of its own; nor of the linear one beyond rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgpack
import numpy as np
from numpy.typing import NDArray

from stream.model.heads import linear_tensors, sigmoid
from stream.model.parameters import Tensor
from stream.settings import Task
from trainer.checkpoint import pack_array, unpack_array
from trainer.learner.laplace import joint_update
from trainer.learner.part import Floats, Labelled, Load
from trainer.tables import CategoryTable, read_effects, write_effects

__all__ = ["BayesianLinear", "BayesianLogistic", "LinearLearner", "LogisticLearner", "prior_variance"]

_NEWTON_STEPS = 200
#: Labels of one moment that are kept together at most, and numbers of theirs.
_MOST_LABELS, _MOST_NUMBERS = 4096, 1 << 18
#: A label may weigh so much against the prior at most.
_HEAVIEST = 1e100
#: Target, weight and offset of a label stand behind its inputs.
_BESIDE = 3


def prior_variance(settings: Task, is_state: NDArray[np.bool_], sees: NDArray[np.bool_] | None = None) -> Floats:
    """(F + 1,) variances of a task's weights: one for those on hidden state and sketches, whose many columns say
    little each, one for the others, and a wide one for the bias, which no input can stand in for.

    Parameters
    ----------
    is_state: (F,) which of the head's inputs are hidden state or sketch.
    sees: (F,) which inputs the weights are for, by default all; the others have no variance, and stay at zero.
    """
    state = settings.state_prior_variance
    if state is None:
        state = settings.prior_variance / 10.0
    variance = np.where(is_state, state, settings.prior_variance)
    if sees is not None:
        variance[~sees] = 0.0
    return np.append(variance, settings.bias_variance)


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

    def after(self, x: Floats, label: Floats, weight: Floats, offset: Floats) -> BayesianLogistic:
        """What n labels at once make of it, at inputs (n, width); the others are (n,), see `learn`.

        Where the numbers are too large for that, they are learned one after the other.
        """
        found = BayesianLogistic(0, 1.0)
        together = None if len(x) == 1 else joint_update(self.mean, self.covariance, x, label, weight, offset)
        if together is not None:
            found.mean, found.covariance = together
            return found
        found.mean, found.covariance = self.mean, self.covariance.copy()
        for row, one, heavy, shift in zip(x, label.tolist(), weight.tolist(), offset.tolist(), strict=True):
            found.learn(row, one > 0.5, heavy, shift)
        return found

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
        self,
        task: str,
        settings: Task,
        is_state: NDArray[np.bool_],
        tables: Sequence[CategoryTable] = (),
        sees: NDArray[np.bool_] | None = None,
    ) -> None:
        self._task = task
        self._tables = tables
        self._classes = len(settings.classes)
        self._is_alone = bool(tables) or settings.labels == "as_they_come"
        variance = prior_variance(settings, is_state, sees)
        # No variance is ever above the prior's.
        self._variance, self._widest = variance, max(1.0, float(variance.max()))
        self._most = max(1, min(_MOST_LABELS, _MOST_NUMBERS // (len(variance) + _BESIDE)))
        #: Of all moments that are over.
        self._before = [BayesianLogistic(len(variance), variance) for _ in range(max(1, self._classes))]
        #: The labels of the present moment, of each its inputs and what stands beside them.
        self._moment = 0
        self._members: list[Floats] = []
        #: `_before` after these, once somebody has asked.
        self._reached: list[BayesianLogistic] | None = None
        self.behind = 0

    @property
    def posteriors(self) -> list[BayesianLogistic]:
        """After every label that was learned."""
        if not self._members:
            return self._before
        if self._reached is None:
            self._reached = [one.after(*labels) for one, labels in zip(self._before, self._labels(), strict=True)]
        return self._reached

    def _labels(self) -> Iterator[tuple[Floats, Floats, Floats, Floats]]:
        """For each posterior the labels of the present moment, in an order that they alone decide."""
        order = sorted(range(len(self._members)), key=lambda i: self._members[i].tobytes())
        rows = np.stack([self._members[i] for i in order])
        target, weight, offset = rows[:, -_BESIDE:].T
        for number in range(len(self._before)):
            own = np.array([self._is(one, number) for one in target.tolist()])
            yield rows[:, :-_BESIDE], own.astype(np.float64), weight, offset

    def _is(self, target: float, number: int) -> bool:
        """What a label is to one of the posteriors."""
        return target == number if self._classes else target > 0.5

    def learn(self, one: Labelled, x: Floats) -> int:
        if self._is_alone:
            return self._learn_alone(one, x)
        if not one.weight * max(self._widest, float(np.square(x) @ self._variance)) <= _HEAVIEST:
            return 1
        if self._members and (one.final_ms != self._moment or len(self._members) == self._most):
            self._end_moment()
        self._moment = one.final_ms
        row = np.empty(len(x) + _BESIDE)
        row[:-_BESIDE] = x
        row[-_BESIDE:] = one.target, one.weight, 0.0 if self._classes else one.log_odds_offset
        self._members.append(row)
        self._reached = None
        return 0

    def _end_moment(self) -> None:
        if self._reached is None and len(self._members) == 1:
            row = self._members[0]
            target, weight, offset = row[-_BESIDE:].tolist()
            for number, posterior in enumerate(self._before):
                posterior.learn(row[:-_BESIDE], self._is(target, number), weight, offset)
        else:
            self._before = self.posteriors
        self._members, self._reached = [], None

    def _learn_alone(self, one: Labelled, x: Floats) -> int:
        keys, effects = read_effects(self._tables, one.keys, len(self._before))
        offset = 0.0 if self._classes else one.log_odds_offset
        taken = [
            posterior.learn(x, self._is(one.target, number), one.weight, offset, effects[:, number])
            for number, posterior in enumerate(self._before)
        ]
        write_effects(self._tables, keys, effects)
        return int(not all(taken))

    def tensors(self, center: Floats, scale: Floats, *, settled: bool = False) -> dict[str, Tensor]:
        means = [posterior.mean for posterior in (self._before if settled else self.posteriors)]
        return linear_tensors(self._task, center, scale, np.stack(means) if self._classes else means[0])

    def save(self) -> dict[str, bytes]:
        moment: bytes = msgpack.packb([self._moment, [one.tobytes() for one in self._members]])
        return {
            "mean": pack_array(np.stack([posterior.mean for posterior in self._before])),
            "covariance": pack_array(np.stack([posterior.covariance for posterior in self._before])),
            "moment": moment,
        }

    def load(self, load: Load) -> None:
        means, covariances = unpack_array(load("mean")), unpack_array(load("covariance"))
        for posterior, mean, covariance in zip(self._before, means, covariances, strict=True):
            posterior.mean, posterior.covariance = mean.copy(), covariance.copy()
        self._moment, members = msgpack.unpackb(load("moment"))
        self._members = [np.frombuffer(one) for one in members]
        self._reached = None

    def close(self) -> None:
        pass


class LinearLearner:
    """The part `linear` of a regression's head."""

    def __init__(
        self,
        task: str,
        settings: Task,
        is_state: NDArray[np.bool_],
        tables: Sequence[CategoryTable] = (),
        sees: NDArray[np.bool_] | None = None,
    ) -> None:
        self._task = task
        self._tables = tables
        variance = prior_variance(settings, is_state, sees)
        self.posterior = BayesianLinear(len(variance), variance)
        self.behind = 0

    def learn(self, one: Labelled, x: Floats) -> int:
        keys, effects = read_effects(self._tables, one.keys, 1)
        taken = self.posterior.learn(x, one.target, one.weight, effects[:, 0])
        write_effects(self._tables, keys, effects)
        return int(not taken)

    def tensors(self, center: Floats, scale: Floats, *, settled: bool = False) -> dict[str, Tensor]:
        return linear_tensors(self._task, center, scale, self.posterior.mean)

    def save(self) -> dict[str, bytes]:
        return {"mean": pack_array(self.posterior.mean), "covariance": pack_array(self.posterior.covariance)}

    def load(self, load: Load) -> None:
        self.posterior.mean, self.posterior.covariance = unpack_array(load("mean")), unpack_array(load("covariance"))

    def close(self) -> None:
        pass
