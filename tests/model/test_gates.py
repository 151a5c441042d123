"""The gates of the recurrent unit: close to exact, and the same for a row wherever it stands."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from stream.model.gates import advance_states


def _advance(
    from_input: NDArray[np.float32], from_state: NDArray[np.float32], state: NDArray[np.float32]
) -> NDArray[np.float32]:
    rows, width = state.shape
    powers, parts = np.empty(3 * width, np.float32), np.empty(2 * width, np.float32)
    # Rows before and after stay what they are.
    states = np.pad(state, ((2, 1), (0, 0)), constant_values=7.0)
    given = np.pad(from_input, ((3, 0), (0, 0)))
    advance_states(given, 3, from_state, rows, width, powers, powers.view(np.int32), parts, states, 2)
    assert (states[[0, 1, -1]] == 7.0).all()
    return states[2:-1]


def _exact(
    from_input: NDArray[np.float32], from_state: NDArray[np.float32], state: NDArray[np.float32]
) -> NDArray[np.float64]:
    width = state.shape[1]
    a, b, h = (x.astype(np.float64) for x in (from_input, from_state, state))
    reset, update = (0.5 + 0.5 * np.tanh((a + b)[:, i * width : (i + 1) * width] / 2) for i in range(2))
    new = np.tanh(a[:, 2 * width :] + reset * b[:, 2 * width :])
    return new + update * (h - new)


@pytest.mark.parametrize("scale", [1e-6, 0.1, 1.0, 5.0, 30.0, 300.0])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_states_are_exact_to_rounding(width: int, scale: float) -> None:
    rng = np.random.default_rng(width)
    from_input, from_state = (rng.normal(0, scale, (200, 3 * width)).astype(np.float32) for _ in range(2))
    state = rng.uniform(-1, 1, (200, width)).astype(np.float32)
    exact = _exact(from_input, from_state, state)
    # The sum inside a gate is rounded to float32 first, which moves a gate by a few units of the sum's last place.
    bound = 3e-7 + 2 * np.finfo(np.float32).eps * scale
    assert np.abs(_advance(from_input, from_state, state) - exact).max() < bound


def test_extreme_sums_saturate() -> None:
    width = 4
    large = np.full((1, 3 * width), 1e30, np.float32)
    nothing, state = np.zeros((1, 3 * width), np.float32), np.full((1, width), 0.25, np.float32)
    # An update gate of one keeps the state, one of zero takes the candidate
    assert _advance(large, nothing, state).tolist() == state.tolist()
    assert np.allclose(_advance(-large, nothing, state), -1.0)


def test_a_rows_bits_do_not_depend_on_its_neighbours() -> None:
    rng = np.random.default_rng(3)
    width, rows = 24, 57
    from_input, from_state = (rng.normal(0, 2, (rows, 3 * width)).astype(np.float32) for _ in range(2))
    state = rng.uniform(-1, 1, (rows, width)).astype(np.float32)
    whole = _advance(from_input, from_state, state)
    order = rng.permutation(rows)
    assert np.array_equal(_advance(from_input[order], from_state[order], state[order]), whole[order])
    for row in range(rows):
        alone = _advance(*(x[row : row + 1] for x in (from_input, from_state, state)))
        assert alone.tobytes() == whole[row].tobytes()
