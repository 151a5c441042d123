"""The recurrent cell: a gated recurrent unit stepped over waves of clients.

Guaranteed: a row's new state is the same, bit for bit, whatever other rows are in the batch: products
(`stream.model.product`) and gates (`stream.model.gates`) compute each row by itself, in one order.

Method: K. Cho et al., Learning Phrase Representations using RNN Encoder-Decoder, 2014, in the form of
torch.nn.GRU (reset gate after the recurrent product).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stream.borrowing import borrowing
from stream.errors import ParametersError
from stream.model.gates import advance_states
from stream.model.parameters import ParameterSet
from stream.model.product import aligned_zeros, multiply_add, pack_weights, padded_columns
from stream.store.hashing import LINE, prefetch

__all__ = ["Cell"]

#: Rows whose products stay in a core's cache until their gates are computed.
_CHUNK_ROWS = 64
#: Rows asked for before they are read.
_AHEAD = 64


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
            tensors[name] = np.asarray(tensor, np.float32)
        self.hidden = hidden
        self.inputs = inputs
        self._input_panels, self._input_bias = pack_weights(tensors["weight_ih"], tensors["bias_ih"])
        self._panels, self._bias = pack_weights(tensors["weight_hh"], tensors["bias_hh"])
        scratch = (_CHUNK_ROWS, padded_columns(3 * hidden))
        self._from_input, self._from_state = aligned_zeros(scratch), aligned_zeros(scratch)
        self._powers = np.empty(3 * hidden, np.float32)
        self._parts = np.empty(2 * hidden, np.float32)

    def run(
        self,
        inputs: NDArray[np.float32],
        starts: NDArray[np.int64],
        rows: NDArray[np.float32],
        slots: NDArray[np.int64],
        kept: NDArray[np.int64],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Step through waves: the states (clients, H) after the last one, and those (k, H) right after some events.

        Parameters
        ----------
        inputs: (events, D) encoded events in wave order; C order, as are `rows`.
        starts: (waves + 1,) first row of each wave; a wave has at most as many rows as the one before.
        rows, slots: (any, H or more) and (clients,): the states before the first wave are the first H columns of
            rows[slots], in the order of the wave's rows.
        kept: (k,) rows of `inputs`, rising.
        """
        states = np.empty((len(slots), self.hidden), np.float32)
        after = np.empty((len(kept), self.hidden), np.float32)
        _run_waves(
            inputs, starts, rows, slots, self._input_panels, self._input_bias, self._panels, self._bias,
            self._from_input, self._from_state, self._powers, self._powers.view(np.int32), self._parts,
            states, kept, after,
        )  # fmt: skip
        return states, after

    def self_check(self, generator: np.random.Generator) -> None:
        """Prove on this machine that a row's result does not depend on its neighbours.

        Raises
        ------
        ParametersError: it does.
        """
        rows = 203
        inputs = generator.standard_normal((rows, self.inputs)).astype(np.float32)
        state = generator.uniform(-1, 1, (rows, self.hidden)).astype(np.float32)
        whole = self._one_wave(inputs, state)
        for size in (1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 100, 202):
            at = int(generator.integers(0, rows - size + 1))
            part = self._one_wave(inputs[at : at + size], state[at : at + size])
            if part.tobytes() != whole[at : at + size].tobytes():
                raise ParametersError("on this machine a row's state depends on the other rows of its batch")

    def _one_wave(self, inputs: NDArray[np.float32], state: NDArray[np.float32]) -> NDArray[np.float32]:
        starts = np.array([0, len(inputs)])
        return self.run(inputs, starts, state, np.arange(len(inputs)), np.empty(0, np.int64))[0]


@borrowing()
def _run_waves(  # type: ignore[no-untyped-def]
    inputs, starts, rows, slots, input_panels, input_bias, panels, bias,
    from_input, from_state, powers, bits, parts, states, kept, after,
):  # fmt: skip
    """Pieces of a wave, as large as the scratch arrays, whose input products are those of a chunk of all events."""
    events = inputs.shape[0]
    width = states.shape[1]
    most = from_input.shape[0]
    at = wave = found = 0
    while at < events:
        while starts[wave + 1] <= at:
            wave += 1
        chunk = at - at % most
        if at == chunk:
            multiply_add(inputs, at, min(most, events - at), input_panels, input_bias, from_input)
        count = min(starts[wave + 1], chunk + most) - at
        # A wave's clients are the first ones of the wave before.
        first = at - starts[wave]
        if wave == 0:
            for i in range(at, at + count):
                # Also of the next pieces, whose rows memory then brings while this one is computed.
                if i + _AHEAD < starts[1]:
                    for k in range(0, width, LINE):
                        prefetch(rows, slots[i + _AHEAD] * rows.shape[1] + k)
                for k in range(width):
                    states[i, k] = rows[slots[i], k]
        multiply_add(states, first, count, panels, bias, from_state)
        advance_states(from_input, at - chunk, from_state, count, width, powers, bits, parts, states, first)
        while found < kept.shape[0] and kept[found] < at + count:
            row = first + kept[found] - at
            for k in range(width):
                after[found, k] = states[row, k]
            found += 1
        at += count
