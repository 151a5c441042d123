"""Optimizers whose state lives in the row, for tables that are learned.

Guarantees: the state goes wherever the row goes, to disk, snapshot and changelog, so the next step after a restore
is bit-identical; a row that occurs twice in a batch takes two steps, in order. A step touches the given rows only:
there is no decay of the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stream.errors import StoreError
from stream.store import stepping
from stream.store.store import EmbeddingStore, Keys

__all__ = ["Adagrad", "Adam", "Optimizer", "Sgd", "apply_gradients"]

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


class Optimizer(Protocol):
    """What apply_gradients needs."""

    def state_width(self, width: int) -> int:
        """Floats of state for a vector of `width` floats: the table's state_width."""

    def step(self, rows: Float32, slots: Int64, gradients: Float32) -> None:
        """Step rows[slots] (float32[capacity, width + state_width]) by gradients (float32[n, width])."""


@dataclass(frozen=True)
class Sgd:
    """Plain stochastic gradient descent."""

    rate: float = 0.01

    def state_width(self, width: int) -> int:
        """0."""
        return 0

    def step(self, rows: Float32, slots: Int64, gradients: Float32) -> None:
        """See Optimizer."""
        stepping.sgd(rows, slots, gradients, np.float32(self.rate))


@dataclass(frozen=True)
class Adagrad:
    """Adagrad (Duchi, Hazan, Singer 2011), a sum of squares per float."""

    rate: float = 0.01
    epsilon: float = 1e-10

    def state_width(self, width: int) -> int:
        """`width`."""
        return width

    def step(self, rows: Float32, slots: Int64, gradients: Float32) -> None:
        """See Optimizer."""
        stepping.adagrad(rows, slots, gradients, np.float32(self.rate), np.float32(self.epsilon))


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma, Ba 2015) with a step count per row, so that a rare row is corrected for its own steps."""

    rate: float = 0.001
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def state_width(self, width: int) -> int:
        """2 * width + 1."""
        return 2 * width + 1

    def step(self, rows: Float32, slots: Int64, gradients: Float32) -> None:
        """See Optimizer."""
        stepping.adam(
            rows,
            slots,
            gradients,
            np.float32(self.rate),
            np.float32(self.beta1),
            np.float32(self.beta2),
            np.float32(self.epsilon),
            np.float32(2**23),
        )


def apply_gradients(
    store: EmbeddingStore,
    optimizer: Optimizer,
    keys: Keys,
    gradients: npt.ArrayLike,
    event_ms: npt.ArrayLike | None = None,
) -> None:
    """Step the rows of keys by gradients (float32[n, width]); a key without a row has a new one.

    Per occurrence events_seen goes up by one and last_event_ms to event_ms (int64[n] or one for all, the watermark
    if not given) where that is later. Keys that are not admitted yet are passed over. Raises StoreError where
    the table's state_width is not the optimizer's.
    """
    width = store.options.width
    if store.options.state_width != optimizer.state_width(width):
        raise StoreError(
            f"store.state_width: {store.options.state_width} with {type(optimizer).__name__}; accepted: "
            f"{optimizer.state_width(width)} for width {width}"
        )
    values = np.ascontiguousarray(gradients, np.float32)
    if values.shape != (len(keys), width):
        raise StoreError(f"gradients: shape {values.shape}; ({len(keys)}, {width}) is needed")
    when = np.empty(len(keys), np.int64)
    when[:] = max(store.watermark_ms, 0) if event_ms is None else event_ms
    with store.update(keys) as slots:
        optimizer.step(store.rows, slots, values)
        known = slots >= 0
        np.add.at(store.events_seen, slots[known], 1)
        np.maximum.at(store.last_event_ms, slots[known], when[known])
