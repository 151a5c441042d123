"""A small ensemble of networks with one hidden layer each, on the same standardised inputs.

Numbers among them may be read in pieces as well (Gorishniy et al., On Embeddings for Numerical Features in Tabular Deep
Learning, NeurIPS 2022), between fixed knots: the inputs are standardised.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stream.model.heads.scores import Floats, Inputs, checked, standardise, typical_inputs
from stream.model.parameters import ParameterSet, Tensor
from stream.settings import Mlp

__all__ = ["MlpPart", "knots", "mlp_names", "mlp_tensors", "with_pieces"]

_LAYERS = ("input", "output")
#: Pieces lie within so many standard deviations.
_REACH = 2.0


def mlp_names(task: str) -> frozenset[str]:
    """Names of the tensors that `MlpPart` serves."""
    own = {f"head/{task}/mlp/{part}" for part in _LAYERS}
    return frozenset({f"head/{task}/center", f"head/{task}/scale", *own})


def mlp_tensors(task: str, center: Floats, scale: Floats, layers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `MlpPart` serves.

    Parameters
    ----------
    layers: `input` (F + n pieces + 1, members x hidden), `output` (members, hidden + 1, outputs), float32; the last
        row of each holds the biases.
    """
    tensors: dict[str, Tensor] = {f"head/{task}/center": center, f"head/{task}/scale": scale}
    return tensors | {f"head/{task}/mlp/{part}": layers[part] for part in _LAYERS}


def knots(pieces: int) -> Floats:
    """(pieces + 1,) between which numbers are read, in standard deviations."""
    return np.linspace(-_REACH, _REACH, pieces + 1)


def with_pieces(x: Floats, numbers: NDArray[np.int64], pieces: int) -> Floats:
    """(k, F + n pieces + 1) of standardised inputs and a one (k, F + 1): before the one, how far each of the n
    `numbers` has come through each piece, from 0 to 1."""
    if not pieces or not len(numbers):
        return x
    at = knots(pieces).astype(x.dtype)
    through = np.clip((x[:, numbers, None] - at[:-1]) / (at[1] - at[0]), 0.0, 1.0).reshape(len(x), -1)
    return np.concatenate([x[:, :-1], through, x[:, -1:]], axis=1)


class MlpPart:
    """Serves what `mlp_tensors` names: the mean of the members' scores.

    Parameters
    ----------
    is_number: (F,) which inputs are read in pieces.

    Raises
    ------
    ParametersError: a tensor is missing, or of another shape than the settings describe.
    """

    def __init__(
        self, task: str, parameters: ParameterSet, is_number: NDArray[np.bool_], outputs: int, settings: Mlp
    ) -> None:
        width, members, hidden = len(is_number), settings.members, settings.hidden
        self._pieces, self._numbers = settings.pieces, np.flatnonzero(is_number)
        read = width + len(self._numbers) * self._pieces
        self._center = checked(parameters, f"head/{task}/center", (width,))
        self._scale = checked(parameters, f"head/{task}/scale", (width,))
        first = checked(parameters, f"head/{task}/mlp/input", (read + 1, members * hidden))
        last = checked(parameters, f"head/{task}/mlp/output", (members, hidden + 1, outputs))
        # In float64 a row's prediction does not depend, after rounding, on how many rows are asked about at once.
        self._input = first.astype(np.float64)
        self._output = last[:, :-1].reshape(members * hidden, outputs).astype(np.float64) / members
        self._bias = last[:, -1].astype(np.float64).mean(axis=0)

    def scores(self, inputs: Inputs) -> Floats:
        x = with_pieces(standardise(inputs, self._center, self._scale), self._numbers, self._pieces)
        scores: Floats = np.maximum(x @ self._input, 0.0) @ self._output + self._bias
        return scores

    def typical(self, features: Inputs) -> Floats:
        return self.scores(typical_inputs(features, self._center))
