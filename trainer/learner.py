"""Learning: a Bayesian logistic head per task, one exact update for each label.

The weights have a Gaussian posterior N(m, S). A label y of weight w at inputs x multiplies it by
sigmoid(±x·b)**w; the new mean is the mode of that product, found exactly by Newton's method in one dimension
(every mode lies on m + c S x), and the new covariance is the inverse of the curvature there (Laplace).

Derivation: the mode satisfies m' = m + w (y - s(z)) S x with z = x·m', so z solves z = x·m + w v (y - s(z)),
v = x·S x, whose left minus right side rises at a rate of at least 1: one root, between x·m and x·m ± w v. The
curvature is S^-1 + w s(z)(1 - s(z)) x x', inverted by Sherman and Morrison. Source: D. J. Spiegelhalter, S.
L. Lauritzen, Sequential updating of conditional probabilities, Networks 20, 1990.

Guaranteed: float64 throughout and the same result for the same labels in the same order; a label that would
make anything not finite changes nothing and is counted. A weight of 2 is not two labels of weight 1, as each
update is approximated by itself; it is the same likelihood.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import msgpack
import numpy as np
from numpy.typing import NDArray

from stream.errors import StoreError
from stream.model.heads import head_tensors, sigmoid, standardise
from stream.model.parameters import Tensor
from stream.settings import Task
from trainer.checkpoint import Changes, Database, pack_array, unpack_array
from trainer.evaluation import auc, log_loss

__all__ = ["BayesianLogistic", "Prequential", "Standardiser", "TaskLearner"]

_NEWTON_STEPS = 200
#: An input that hardly varied among the first examples is left on its own scale: noise is not blown up.
_SMALLEST_SCALE = 1e-3
_WINDOW = 20_000


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
        """The prior of a task: one variance for weights on hidden state and sketches, whose many columns say
        little each, one for the others, and a wide one for the bias, which no input can stand in for.

        Parameters
        ----------
        is_state: (F,) which of the head's inputs are hidden state or sketch.
        """
        state = settings.state_prior_variance
        if state is None:
            state = settings.prior_variance / 10.0
        weights = np.where(is_state, state, settings.prior_variance)
        return cls(len(weights) + 1, np.append(weights, settings.bias_variance))

    def learn(self, x: NDArray[np.float64], label: bool, weight: float = 1.0) -> bool:
        """Update by one label at inputs x (width,); False, and no change, where it would not be finite."""
        if not (np.isfinite(x).all() and math.isfinite(weight)):
            return False
        gain = self.covariance @ x
        variance = max(float(x @ gain), 0.0)
        root = _mode(float(self.mean @ x), weight * variance, float(label))
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


class Standardiser:
    """Center and scale of a task's inputs, fixed for good by the first `examples` of them, labelled or not.

    Until then `center` and `scale` are None. Moments by Welford's method.
    """

    def __init__(self, width: int, examples: int) -> None:
        self._wanted = examples
        self.count = 0
        self._mean = np.zeros(width)
        self._squares = np.zeros(width)
        self.center: NDArray[np.float64] | None = None
        self.scale: NDArray[np.float64] | None = None

    def observe(self, inputs: NDArray[np.float32]) -> bool:
        """Take one example's inputs (F,); True when they are the ones that fix center and scale."""
        if self.center is not None:
            return False
        self.count += 1
        difference = inputs - self._mean
        self._mean += difference / self.count
        self._squares += difference * (inputs - self._mean)
        if self.count < self._wanted:
            return False
        deviation = np.sqrt(self._squares / self.count)
        self.center = self._mean
        self.scale = np.where(deviation > _SMALLEST_SCALE, deviation, 1.0)
        return True

    def save(self) -> bytes:
        """Everything, as bytes."""
        return pack_array(np.stack([np.full_like(self._mean, self.count), self._mean, self._squares]))

    def load(self, data: bytes) -> None:
        """Take over what `save` wrote."""
        count, self._mean, self._squares = unpack_array(data)
        self.count = int(count[0])
        if self.count >= self._wanted:
            self.center = self._mean
            deviation = np.sqrt(self._squares / self.count)
            self.scale = np.where(deviation > _SMALLEST_SCALE, deviation, 1.0)


class Prequential:
    """Quality of predictions as they were made, over the last `window` answered ones."""

    def __init__(self, window: int = _WINDOW) -> None:
        self._predictions: deque[float] = deque(maxlen=window)
        self._labels: deque[bool] = deque(maxlen=window)

    def __len__(self) -> int:
        return len(self._labels)

    def add(self, prediction: float, label: bool) -> None:
        """Take one; NaN, where no head existed, does not count."""
        if math.isfinite(prediction):
            self._predictions.append(prediction)
            self._labels.append(label)

    def log_loss(self) -> float:
        """Mean log loss in nats; NaN where nothing was answered."""
        return log_loss(*self._arrays()) if self._labels else math.nan

    def auc(self) -> float:
        """Area under the ROC curve, ties by half; NaN with one class alone."""
        labels, predictions = self._arrays()
        if labels.all() or not labels.any():
            return math.nan
        return auc(labels, predictions)

    def _arrays(self) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        return np.array(self._labels, np.bool_), np.array(self._predictions, np.float64)

    def save(self) -> bytes:
        """Everything, as bytes."""
        labels, predictions = self._arrays()
        return pack_array(np.stack([labels.astype(np.float64), predictions]))

    def load(self, data: bytes) -> None:
        """Take over what `save` wrote."""
        labels, predictions = unpack_array(data)
        self._labels.extend((labels > 0.5).tolist())
        self._predictions.extend(predictions.tolist())


@dataclass(frozen=True)
class _Labelled:
    inputs: NDArray[np.float32]
    label: bool
    weight: float
    published_ms: int


class TaskLearner:
    """What one task learns: standardiser, posterior, and the labels that wait for the standardiser.

    Parameters
    ----------
    is_state: (F,) which of the head's inputs are hidden state or sketch.

    `learned` and `dropped` count since the program started; `included` lists Kafka's times of the feedback
    that the posterior has and no published version has yet.
    """

    def __init__(self, task: str, is_state: NDArray[np.bool_], settings: Task) -> None:
        self.task = task
        self.width = len(is_state)
        self.standardiser = Standardiser(self.width, settings.standardise_after)
        self.posterior = BayesianLogistic.of_task(settings, is_state)
        self.prequential = Prequential()
        self.learned = 0
        self.dropped = 0
        self.included: list[int] = []
        self._labels = 0
        self._queue: list[_Labelled] = []
        self._changed = True

    @property
    def labels(self) -> int:
        """Labels in the posterior."""
        return self._labels

    @property
    def queued(self) -> int:
        """Labels that wait until the standardiser is fixed."""
        return len(self._queue)

    def observe(self, inputs: NDArray[np.float32]) -> bool:
        """Take the inputs (F,) of a new example; True when they fixed the standardiser. Labels that waited
        for that are then learned, in the order they came."""
        if not np.isfinite(inputs).all() or not self.standardiser.observe(inputs):
            return False
        queue, self._queue = self._queue, []
        for one in queue:
            self._learn(one)
        return True

    def learn(
        self, inputs: NDArray[np.float32], label: bool, weight: float, prediction: float, published_ms: int
    ) -> None:
        """Take one answered example, with the prediction that was made for it."""
        self.prequential.add(prediction, label)
        self._changed = True
        one = _Labelled(inputs, label, weight, published_ms)
        if not (np.isfinite(inputs).all() and math.isfinite(weight)):
            self.dropped += 1
        elif self.standardiser.center is None:
            self._queue.append(one)
        else:
            self._learn(one)

    def _learn(self, one: _Labelled) -> None:
        center, scale = self.standardiser.center, self.standardiser.scale
        assert center is not None
        assert scale is not None
        x = standardise(one.inputs[None, :], center, scale)[0]
        if not self.posterior.learn(x, one.label, one.weight):
            self.dropped += 1
            return
        self.learned += 1
        self._labels += 1
        self._changed = True
        self.included.append(one.published_ms)

    def head(self) -> dict[str, Tensor]:
        """The tensors to serve; none before the first label is learned."""
        center, scale = self.standardiser.center, self.standardiser.scale
        if center is None or scale is None or not self._labels:
            return {}
        return dict(head_tensors(self.task, center, scale, self.posterior.mean))

    def save(self, changes: Changes) -> None:
        """Add everything to a checkpoint; the posterior only where it changed."""
        changes[self._name("standardiser")] = self.standardiser.save()
        if not self._changed:
            return
        changes[self._name("mean")] = pack_array(self.posterior.mean)
        changes[self._name("covariance")] = pack_array(self.posterior.covariance)
        changes[self._name("prequential")] = self.prequential.save()
        changes[self._name("queue")] = msgpack.packb(
            [[q.inputs.tobytes(), q.label, q.weight, q.published_ms] for q in self._queue]
        )
        changes[self._name("counts")] = msgpack.packb([self._labels, self.included])

    def saved(self) -> None:
        """The checkpoint is written."""
        self._changed = False

    def load(self, database: Database) -> None:
        """Take over what the last checkpoint holds, if it holds anything.

        Raises
        ------
        StoreError: the checkpoint was made with other inputs of the task.
        """
        standardiser = database.get(self._name("standardiser"))
        if standardiser is None:
            return
        if unpack_array(standardiser).shape[1] != self.width:
            raise StoreError(
                f"task {self.task!r} has {self.width} inputs, but the checkpoint in {str(database.path)!r} was "
                f"made with {unpack_array(standardiser).shape[1]}: restore the task's settings, or use another "
                f"trainer.data_dir"
            )
        self.standardiser.load(standardiser)
        mean, covariance, prequential, queue, counts = (
            database.get(self._name(name)) for name in ("mean", "covariance", "prequential", "queue", "counts")
        )
        if not (mean and covariance and prequential and queue and counts):
            raise StoreError(f"the checkpoint in {str(database.path)!r} lacks a part of task {self.task!r}")
        self.posterior.mean = unpack_array(mean)
        self.posterior.covariance = unpack_array(covariance)
        self.prequential.load(prequential)
        self._queue = [
            _Labelled(np.frombuffer(inputs, np.float32), label, weight, published_ms)
            for inputs, label, weight, published_ms in msgpack.unpackb(queue)
        ]
        self._labels, self.included = msgpack.unpackb(counts)
        self._changed = False

    def confirm(self, included: int) -> None:
        """The first `included` entries of `included` are in a version that is confirmed."""
        del self.included[:included]
        self._changed = self._changed or included > 0

    def _name(self, part: str) -> bytes:
        return f"t/{self.task}/{part}".encode()
