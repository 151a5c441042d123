"""The recurrent cell: a gated recurrent unit stepped over waves of clients.

Guaranteed: a row's new state is the same, bit for bit, whatever other rows are in the batch. A matrix product's
result for one row depends on the number of rows only when there are few (measured with MKL: below 16), so every
product runs on a multiple of `tile` rows; `self_check` proves it on the machine at hand. The gates are computed row
by row (`stream.model.gates`).

Method: K. Cho et al., Learning Phrase Representations using RNN Encoder-Decoder, 2014, in the form of
torch.nn.GRU (reset gate after the recurrent product).
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray

from stream.errors import ParametersError
from stream.model.gates import advance_states
from stream.model.parameters import ParameterSet

__all__ = ["Cell"]

_TILES = (16, 32, 64)
#: Rows whose products stay in a core's cache until their gates are computed; a multiple of every tile.
_CHUNK_ROWS = 256


class Cell:
    """A GRU with fixed weights.

    Parameters
    ----------
    parameters: must hold `trunk/weight_ih` (3H, D), `trunk/weight_hh` (3H, H), `trunk/bias_ih` (3H,) and
        `trunk/bias_hh` (3H,), gates in torch's order: reset, update, new.
    """

    def __init__(self, parameters: ParameterSet, inputs: int, hidden: int) -> None:
        shapes = {
            "weight_ih": (3 * hidden, inputs),
            "weight_hh": (3 * hidden, hidden),
            "bias_ih": (3 * hidden,),
            "bias_hh": (3 * hidden,),
        }
        tensors = {}
        for name, shape in shapes.items():
            tensor = parameters[f"trunk/{name}"]
            if tensor.shape != shape:
                raise ParametersError(f"tensor 'trunk/{name}' has shape {tensor.shape}: the settings describe {shape}")
            tensors[name] = torch.from_numpy(np.array(tensor, np.float32))
        self.hidden = hidden
        self.inputs = inputs
        self.tile = _TILES[0]
        self._input_weight = tensors["weight_ih"].t().contiguous()
        self._weight = tensors["weight_hh"].t().contiguous()
        self._input_bias = tensors["bias_ih"]
        self._bias = tensors["bias_hh"]
        self._scratch = torch.empty((0, 3 * hidden))
        self._powers = np.empty(3 * hidden, np.float32)
        self._parts = np.empty(2 * hidden, np.float32)

    def padded(self, rows: int) -> int:
        """Rows that hold `rows` of them and a whole tile past the last, itself a multiple of the tile."""
        return -(-rows // self.tile) * self.tile + self.tile

    def run(self, inputs: torch.Tensor, starts: NDArray[np.int64], first: torch.Tensor, out: torch.Tensor) -> None:
        """Step through waves.

        Parameters
        ----------
        inputs: (`padded(events)`, D) encoded events in wave order, then padding.
        starts: (waves + 1,) first row of each wave; a wave has at most as many rows as the one before.
        first: (at least clients + tile, H) states before the first wave, in the order of its rows.
        out: (`padded(events)`, H) receives the state after each event.
        """
        with torch.inference_mode():
            from_input = torch.addmm(self._input_bias, inputs, self._input_weight).numpy()
            edges = starts.tolist()
            widest = self.padded(min(_CHUNK_ROWS, max((b - a for a, b in itertools.pairwise(edges)), default=0)))
            if self._scratch.shape[0] < widest:
                self._scratch = torch.empty((widest, 3 * self.hidden))
            from_state, bits = self._scratch.numpy(), self._powers.view(np.int32)
            states, state, before = out.numpy(), first, first.numpy()
            for begin, end in itertools.pairwise(edges):
                for at in range(0, end - begin, _CHUNK_ROWS):
                    rows = min(_CHUNK_ROWS, end - begin - at)
                    tiled = -(-rows // self.tile) * self.tile
                    torch.addmm(self._bias, state[at : at + tiled], self._weight, out=self._scratch[:tiled])
                    here = slice(begin + at, begin + at + rows)
                    advance_states(
                        from_input[here], from_state, before[at : at + rows], self.hidden,
                        self._powers, bits, self._parts, states[here],
                    )  # fmt: skip
                # The next wave's clients are this wave's first ones, so its input starts at this wave's output.
                state, before = out[begin:], states[begin:]

    def self_check(self, generator: np.random.Generator) -> int:
        """Prove on this machine that a row's result does not depend on its neighbours; returns the tile used.

        Raises
        ------
        ParametersError: no tile up to 64 rows gives equal bits.
        """
        rows = 203
        inputs = torch.from_numpy(generator.standard_normal((rows, self.inputs)).astype(np.float32))
        state = torch.from_numpy(generator.uniform(-1, 1, (rows, self.hidden)).astype(np.float32))
        for tile in _TILES:
            self.tile = tile
            whole = self._one_wave(inputs, state)
            sizes = (1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 100, 202)
            places = [int(generator.integers(0, rows - size + 1)) for size in sizes]
            if all(
                torch.equal(self._one_wave(inputs[at : at + size], state[at : at + size]), whole[at : at + size])
                for size, at in zip(sizes, places, strict=True)
            ):
                return tile
        raise ParametersError(
            f"on this machine a row's state depends on the other rows of its batch, for every tile of {_TILES} rows"
        )

    def _one_wave(self, inputs: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        rows = inputs.shape[0]
        out = torch.zeros((self.padded(rows), self.hidden))
        padding = torch.zeros((self.padded(rows) - rows, inputs.shape[1]))
        first = torch.cat([state, torch.zeros((self.tile, self.hidden))])
        self.run(torch.cat([inputs, padding]), np.array([0, rows], np.int64), first, out)
        return out[:rows]
