"""The compiled update rules of the optimizers, one row after the other.

Guarantees: rows are stepped in the order given, so a row that occurs twice takes two steps; equal inputs give
equal bits. Does not check shapes.
"""

# mypy: disable-error-code="import-untyped,import-not-found,untyped-decorator,no-untyped-call"
from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

__all__ = ["adagrad", "adam", "sgd"]


@njit(cache=True, nogil=True)
def sgd(rows: Any, slots: Any, gradients: Any, rate: Any) -> None:
    """w -= rate * g."""
    for i in range(slots.shape[0]):
        slot = slots[i]
        if slot < 0:
            continue
        for j in range(gradients.shape[1]):
            rows[slot, j] -= rate * gradients[i, j]


@njit(cache=True, nogil=True)
def adagrad(rows: Any, slots: Any, gradients: Any, rate: Any, epsilon: Any) -> None:
    """s += g * g; w -= rate * g / (sqrt(s) + epsilon). State: s, width floats."""
    width = gradients.shape[1]
    for i in range(slots.shape[0]):
        slot = slots[i]
        if slot < 0:
            continue
        for j in range(width):
            g = gradients[i, j]
            total = rows[slot, width + j] + g * g
            rows[slot, width + j] = total
            rows[slot, j] -= rate * g / (np.sqrt(total) + epsilon)


@njit(cache=True, nogil=True)
def adam(
    rows: Any, slots: Any, gradients: Any, rate: Any, beta1: Any, beta2: Any, epsilon: Any, last_step: Any
) -> None:
    """Adam with a step count per row. State: m and v, width floats each, then the count.

    The count stops at last_step, where both corrections have long been 1 and float32 still counts exactly.
    """
    width = gradients.shape[1]
    one = np.float32(1.0)
    for i in range(slots.shape[0]):
        slot = slots[i]
        if slot < 0:
            continue
        step = min(rows[slot, 3 * width] + one, last_step)
        rows[slot, 3 * width] = step
        correction1 = np.float32(1.0 - np.float64(beta1) ** np.float64(step))
        correction2 = np.float32(1.0 - np.float64(beta2) ** np.float64(step))
        for j in range(width):
            g = gradients[i, j]
            m = beta1 * rows[slot, width + j] + (one - beta1) * g
            v = beta2 * rows[slot, 2 * width + j] + (one - beta2) * g * g
            rows[slot, width + j] = m
            rows[slot, 2 * width + j] = v
            rows[slot, j] -= rate * (m / correction1) / (np.sqrt(v / correction2) + epsilon)
