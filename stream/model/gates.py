"""The gates of the recurrent unit, one row after another, in one pass.

Guaranteed: a row's result depends on that row alone, and is the same, bit for bit, on every processor: only float32
additions, multiplications and divisions in a stated order, none of them fused. Within 3e-7 of the exact value (tests
compare with float64).

Method of the exponential: argument reduction and polynomial of S. L. Moshier's Cephes library (expf).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from stream.borrowing import borrowing

__all__ = ["advance_states"]

_LOG2_E = np.float32(1.4426950408889634)
#: Natural logarithm of 2 in two parts, the first exact in few bits.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_ONE = np.float32(1.0)
#: Adding and taking it away rounds a small float32 to a whole number.
_ROUND = np.float32(12582912.0)
#: Beyond, sigmoid and tanh are 0 or 1 to the last bit, and powers of two stay normal numbers.
_LARGEST = np.float32(87.0)


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _exponential(x):  # type: ignore[no-untyped-def]
    """(m, n) with e^x = m * 2^n; the caller puts 2^n together, so that the loop around it is vectorised."""
    x = min(max(x, -_LARGEST), _LARGEST)
    n = (x * _LOG2_E + _ROUND) - _ROUND
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    p = _P0
    p = p * r + _P1
    p = p * r + _P2
    p = p * r + _P3
    p = p * r + _P4
    p = p * r + _P5
    return p * (r * r) + r + _ONE, n


@borrowing(error_model="numpy")
def advance_states(  # type: ignore[no-untyped-def]
    from_input, begin, from_state, count, width, powers, bits, parts, states, first
):
    """New states of a piece of a wave, in the place of the old ones.

    Parameters
    ----------
    from_input, from_state: float32 (any, 3H), products with their biases, gates in order reset, update, new: rows from
        `begin` on, and from 0 on. count: of rows. width: H.
    powers, bits: float32[3H] and the same memory as int32[3H]. parts: float32[2H]. Both scratch.
    states: float32 (any, H), of which rows from `first` on change.
    """
    one_more = np.int32(127)
    shift = np.int32(23)
    for row in range(count):
        given = begin + row
        at = first + row
        for k in range(2 * width):
            m, n = _exponential(-(from_input[given, k] + from_state[row, k]))
            parts[k] = m
            bits[k] = (np.int32(n) + one_more) << shift
        for k in range(2 * width):
            powers[k] = _ONE / (_ONE + parts[k] * powers[k])
        for k in range(width):
            candidate = from_input[given, 2 * width + k] + powers[k] * from_state[row, 2 * width + k]
            m, n = _exponential(-(candidate + candidate))
            parts[k] = m
            bits[2 * width + k] = (np.int32(n) + one_more) << shift
        for k in range(width):
            power = parts[k] * powers[2 * width + k]
            new = (_ONE - power) / (_ONE + power)
            states[at, k] = new + powers[width + k] * (states[at, k] - new)
