"""Center and scale of a task's inputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.checkpoint import pack_array, unpack_array

__all__ = ["Standardiser"]

#: An input that hardly varied among the examples is left on its own scale: noise is not blown up.
_SMALLEST_SCALE = 1e-3


class Standardiser:
    """Center and scale of a task's inputs: what the first `examples` of them say, labelled or not, and what all say
    that have come whenever they are as many as one of `again`, which rise; after the last size they stay.

    Until the first size `center` and `scale` are None. Moments by Welford's method.
    """

    def __init__(self, width: int, examples: int, again: Sequence[int] = ()) -> None:
        self._sizes = (examples, *again)
        self.count = 0
        self._mean = np.zeros(width)
        self._squares = np.zeros(width)
        self.center: NDArray[np.float64] | None = None
        self.scale: NDArray[np.float64] | None = None

    @property
    def is_final(self) -> bool:
        """Whether center and scale stay as they are."""
        return self.count >= self._sizes[-1]

    def observe(self, inputs: NDArray[np.float32]) -> bool:
        """Take one example's inputs (F,); True when center and scale are others because of it."""
        if self.is_final:
            return False
        self.count += 1
        difference = inputs - self._mean
        self._mean += difference / self.count
        self._squares += difference * (inputs - self._mean)
        if self.count not in self._sizes:
            return False
        self._fix()
        return True

    def _fix(self) -> None:
        deviation = np.sqrt(self._squares / self.count)
        self.center = self._mean.copy()
        self.scale = np.where(deviation > _SMALLEST_SCALE, deviation, 1.0)

    @property
    def fixed(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Center and scale (F,), once they are there."""
        assert self.center is not None
        assert self.scale is not None
        return self.center, self.scale

    def save(self) -> bytes:
        """Everything, as bytes."""
        fixed = [] if self.center is None else list(self.fixed)
        return pack_array(np.stack([np.full_like(self._mean, self.count), self._mean, self._squares, *fixed]))

    def load(self, data: bytes) -> None:
        """Take over what `save` wrote."""
        count, self._mean, self._squares, *fixed = (row.copy() for row in unpack_array(data))
        self.count = int(count[0])
        if fixed:
            self.center, self.scale = fixed
        elif self.count >= self._sizes[0]:
            # An earlier trainer counted no further than it had to.
            self._fix()
