"""Quality of predictions as they were made."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.checkpoint import pack_array, unpack_array
from trainer.evaluation import auc, log_loss

__all__ = ["Prequential"]

_WINDOW = 20_000


class Prequential:
    """Quality of predictions as they were made, over the last `window` answered ones.

    Parameters
    ----------
    kind: of the task.
    """

    def __init__(self, kind: str = "binary", window: int = _WINDOW) -> None:
        self._kind = kind
        self._predictions: deque[NDArray[np.float64]] = deque(maxlen=window)
        self._targets: deque[float] = deque(maxlen=window)

    def __len__(self) -> int:
        return len(self._targets)

    def add(self, prediction: ArrayLike, target: float) -> None:
        """Take one, its outputs and what became of it; NaN, where no head existed, does not count."""
        outputs = np.atleast_1d(np.asarray(prediction, np.float64))
        if len(outputs) and np.isfinite(outputs).all():
            self._predictions.append(outputs)
            self._targets.append(target)

    def log_loss(self) -> float:
        """Mean log loss in nats; NaN where nothing was answered, and for a regression."""
        targets, predictions = self._arrays()
        if self._kind == "regression" or not len(targets):
            return math.nan
        if self._kind == "binary":
            return log_loss(targets > 0.5, predictions[:, 0])
        said = predictions[np.arange(len(targets)), targets.astype(np.int64)]
        return float(-np.log(np.clip(said, 1e-12, 1.0)).mean())

    def auc(self) -> float:
        """Area under the ROC curve, ties by half, of several classes the mean of each one's against the others; NaN
        with one class alone, and for a regression."""
        targets, predictions = self._arrays()
        if self._kind == "regression" or not len(targets):
            return math.nan
        if self._kind == "binary":
            return auc(targets > 0.5, predictions[:, 0])
        each = np.array([auc(targets == c, predictions[:, c]) for c in range(predictions.shape[1])])
        return float(each[~np.isnan(each)].mean()) if not np.isnan(each).all() else math.nan

    def squared_error(self) -> float:
        """Mean squared error of a regression; NaN otherwise."""
        targets, predictions = self._arrays()
        if self._kind != "regression" or not len(targets):
            return math.nan
        return float(np.square(targets - predictions[:, 0]).mean())

    def _arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return np.array(self._targets, np.float64), np.array(self._predictions, np.float64)

    def save(self) -> bytes:
        """Everything, as bytes."""
        targets, predictions = self._arrays()
        predictions = predictions if len(targets) else np.zeros((0, 1))
        return pack_array(np.concatenate([targets[:, None], predictions], axis=1))

    def load(self, data: bytes) -> None:
        """Take over what `save` wrote."""
        found = unpack_array(data)
        self._targets.extend(found[:, 0].tolist())
        self._predictions.extend(found[:, 1:])
