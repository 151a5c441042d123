"""The product of the recurrent unit: a chain of fused multiply-adds, the same for a row wherever it stands."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from stream.model.product import aligned_zeros, multiply_add, pack_weights, padded_columns


def _product(left: NDArray[np.float32], weights: NDArray[np.float32], bias: NDArray[np.float32]) -> NDArray[np.float32]:
    out = np.full((len(left), padded_columns(len(weights))), np.nan, np.float32)
    multiply_add(left, 0, len(left), *pack_weights(weights, bias), out)
    assert not out[:, len(weights) :].any()
    return out[:, : len(weights)]


def _nearest(value: Fraction) -> np.float32:
    """The float32 nearest to an exact number, the even one of two."""
    guess = np.float32(float(value))
    around = (np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf)))
    return min(around, key=lambda one: (abs(Fraction(float(one)) - value), int(one.view(np.int32)) & 1))


@pytest.mark.parametrize("rows", [1, 3, 8, 13])
def test_an_element_is_one_chain_of_fused_multiply_adds(rows: int) -> None:
    # Given numbers whose products need more digits than a float32 has
    rng = np.random.default_rng(rows)
    left = rng.normal(size=(rows, 21)).astype(np.float32)
    weights, bias = rng.normal(size=(9, 21)).astype(np.float32), rng.normal(size=9).astype(np.float32)
    # When they are multiplied
    product = _product(left, weights, bias)
    # Then each sum is that of exact arithmetic, rounded once at each step
    for row in range(rows):
        for column in range(9):
            total = bias[column]
            for a, b in zip(left[row], weights[column], strict=True):
                total = _nearest(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(total)))
            assert product[row, column].tobytes() == total.tobytes()


@pytest.mark.parametrize(("inner", "columns"), [(1, 3), (5, 64), (31, 65), (64, 192), (100, 300)])
def test_products_are_exact_to_rounding_and_rows_are_apart(inner: int, columns: int) -> None:
    rng = np.random.default_rng(inner)
    left = rng.normal(size=(77, inner)).astype(np.float32)
    weights, bias = rng.normal(size=(columns, inner)).astype(np.float32), rng.normal(size=columns).astype(np.float32)
    whole = _product(left, weights, bias)
    exact = left.astype(np.float64) @ weights.astype(np.float64).T + bias
    size = np.abs(left).astype(np.float64) @ np.abs(weights).astype(np.float64).T + np.abs(bias)
    assert (np.abs(whole - exact) <= (inner + 1) * np.finfo(np.float32).eps * size).all()
    for begin, end in ((0, 1), (5, 8), (8, 16), (3, 77), (60, 77)):
        assert _product(left[begin:end], weights, bias).tobytes() == whole[begin:end].tobytes()


def test_aligned_arrays_begin_with_a_cache_line() -> None:
    for size in (1, 7, 100):
        assert aligned_zeros((size, 3)).ctypes.data % 64 == 0
