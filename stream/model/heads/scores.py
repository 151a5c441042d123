"""What all heads share: inputs on one scale, and the way from scores to predictions."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stream.errors import ParametersError
from stream.model.parameters import ParameterSet, Tensor

__all__ = ["CLIP", "Part", "checked", "predictions", "sigmoid", "standardise", "typical_inputs"]

Floats = NDArray[np.float64]
Inputs = NDArray[np.float32]

#: Standardised inputs are kept within this many standard deviations.
CLIP = 6.0


class Part(Protocol):
    """One model of a head.

    Scores are (k, outputs): the log-odds of a binary task, the log-probabilities (up to a constant) of the classes of a
    multiclass one, the value of a regression. Scores of several parts are averaged.
    """

    def scores(self, inputs: Inputs) -> Floats:
        """(k, outputs) for inputs (k, F)."""
        ...

    def typical(self, features: Inputs) -> Floats:
        """(k, outputs) for rows with features (k, R), as if an event came now with fields like the average one's."""
        ...


def sigmoid(x: Floats) -> Floats:
    """Logistic function, without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def predictions(kind: str, scores: Floats) -> NDArray[np.float32]:
    """(k, outputs) predictions of a task of this kind: probabilities, or the values themselves."""
    if kind == "binary":
        return sigmoid(scores).astype(np.float32)
    if kind == "multiclass":
        powers: Floats = np.exp(scores - scores.max(axis=1, keepdims=True))
        chances: Floats = powers / powers.sum(axis=1, keepdims=True)
        return chances.astype(np.float32)
    return scores.astype(np.float32)


def standardise(inputs: Inputs, center: Floats, scale: Floats) -> Floats:
    """(k, F) inputs around their center, in units of their scale, clipped, and a last column of ones."""
    scaled = np.clip((inputs - center) / scale, -CLIP, CLIP)
    return np.concatenate([scaled, np.ones((len(inputs), 1))], axis=1)


def typical_inputs(features: Inputs, center: Floats) -> Inputs:
    """(k, F) inputs of rows with features (k, R): what a head sees of the event is at its center."""
    rows = features.shape[1]
    event = np.broadcast_to(center[rows:].astype(np.float32), (len(features), len(center) - rows))
    return np.concatenate([features, event], axis=1)


def checked(parameters: ParameterSet, name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor of that name.

    Raises
    ------
    ParametersError: it is missing, or of another shape.
    """
    tensor = parameters[name]
    if tensor.shape != shape:
        raise ParametersError(f"tensor {name!r} has shape {tensor.shape}: the settings describe {shape}")
    return tensor
