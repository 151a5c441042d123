"""A small ensemble of networks with one hidden layer each, on the same standardised inputs."""

from __future__ import annotations

import numpy as np

from stream.model.heads.scores import Floats, Inputs, checked, standardise, typical_inputs
from stream.model.parameters import ParameterSet, Tensor

__all__ = ["MlpPart", "mlp_names", "mlp_tensors"]

_LAYERS = ("input", "output")


def mlp_names(task: str) -> frozenset[str]:
    """Names of the tensors that `MlpPart` serves."""
    own = {f"head/{task}/mlp/{part}" for part in _LAYERS}
    return frozenset({f"head/{task}/center", f"head/{task}/scale", *own})


def mlp_tensors(task: str, center: Floats, scale: Floats, layers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `MlpPart` serves.

    Parameters
    ----------
    layers: `input` (F + 1, members x hidden), `output` (members, hidden + 1, outputs), float32; the last row of each
        holds the biases.
    """
    tensors: dict[str, Tensor] = {f"head/{task}/center": center, f"head/{task}/scale": scale}
    return tensors | {f"head/{task}/mlp/{part}": layers[part] for part in _LAYERS}


class MlpPart:
    """Serves what `mlp_tensors` names: the mean of the members' scores.

    Raises
    ------
    ParametersError: a tensor is missing, or of another shape than the settings describe.
    """

    def __init__(
        self, task: str, parameters: ParameterSet, width: int, outputs: int, members: int, hidden: int
    ) -> None:
        self._center = checked(parameters, f"head/{task}/center", (width,))
        self._scale = checked(parameters, f"head/{task}/scale", (width,))
        first = checked(parameters, f"head/{task}/mlp/input", (width + 1, members * hidden))
        last = checked(parameters, f"head/{task}/mlp/output", (members, hidden + 1, outputs))
        # In float64 a row's prediction does not depend, after rounding, on how many rows are asked about at once.
        self._input = first.astype(np.float64)
        self._output = last[:, :-1].reshape(members * hidden, outputs).astype(np.float64) / members
        self._bias = last[:, -1].astype(np.float64).mean(axis=0)

    def scores(self, inputs: Inputs) -> Floats:
        x = standardise(inputs, self._center, self._scale)
        scores: Floats = np.maximum(x @ self._input, 0.0) @ self._output + self._bias
        return scores

    def typical(self, features: Inputs) -> Floats:
        return self.scores(typical_inputs(features, self._center))
