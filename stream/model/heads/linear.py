"""Heads with one weight for each input: logistic for classes, linear for values."""

from __future__ import annotations

import numpy as np

from stream.model.heads.scores import Floats, Inputs, checked, sigmoid, standardise
from stream.model.parameters import ParameterSet, Tensor

__all__ = ["LinearPart", "linear_names", "linear_tensors"]


def linear_names(task: str) -> frozenset[str]:
    """Names of the tensors that `LinearPart` serves."""
    return frozenset(f"head/{task}/{part}" for part in ("center", "scale", "weight"))


def linear_tensors(task: str, center: Floats, scale: Floats, weight: Floats) -> dict[str, Tensor]:
    """The tensors that `LinearPart` serves."""
    return {f"head/{task}/center": center, f"head/{task}/scale": scale, f"head/{task}/weight": weight}


class LinearPart:
    """Serves `head/{task}/center`, `/scale` (F,) and `/weight`, the last one the bias: (F + 1,), or for a multiclass
    task (classes, F + 1), each class against the others.

    Raises
    ------
    ParametersError: a tensor is missing, or of another shape than the settings describe.
    """

    def __init__(self, task: str, parameters: ParameterSet, width: int, classes: int) -> None:
        self._classes = classes
        self._center = checked(parameters, f"head/{task}/center", (width,))
        self._scale = checked(parameters, f"head/{task}/scale", (width,))
        weights = (classes, width + 1) if classes else (width + 1,)
        self._weight = checked(parameters, f"head/{task}/weight", weights)

    def scores(self, inputs: Inputs, added: Floats | None = None) -> Floats:
        """See `Part`; `added` (k, outputs) is what categories add before classes are weighed against each other."""
        sums = standardise(inputs, self._center, self._scale) @ self._weight.T
        if added is not None:
            sums = sums + (added if self._classes else added[:, 0])
        return self._of(sums)

    def typical(self, features: Inputs) -> Floats:
        rows = features.shape[1]
        x = standardise(features, self._center[:rows], self._scale[:rows])
        # The other inputs are zero where they are at their center.
        weight = np.concatenate([self._weight[..., :rows], self._weight[..., -1:]], axis=-1)
        return self._of(x @ weight.T)

    def _of(self, sums: Floats) -> Floats:
        if not self._classes:
            return sums[:, None]
        chances = np.maximum(sigmoid(sums), 1e-12)
        scores: Floats = np.log(chances / chances.sum(axis=1, keepdims=True))
        return scores
