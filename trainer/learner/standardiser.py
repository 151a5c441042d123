"""Center and scale of a task's inputs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.checkpoint import pack_array, unpack_array

__all__ = ["Standardiser"]

#: An input that hardly varied among the first examples is left on its own scale: noise is not blown up.
_SMALLEST_SCALE = 1e-3


class Standardiser:
    """Center and scale of a task's inputs, fixed for good by the first `examples` of them, labelled or not.

    Until then `center` and `scale` are None. Moments by Welford's method.
    """

    def __init__(self, width: int, examples: int) -> None:
        self._wanted = examples
        self.count = 0
        self._mean = np.zeros(width)
        self._squares = np.zeros(width)
        self.center: NDArray[np.float64] | None = None
        self.scale: NDArray[np.float64] | None = None

    def observe(self, inputs: NDArray[np.float32]) -> bool:
        """Take one example's inputs (F,); True when they are the ones that fix center and scale."""
        if self.center is not None:
            return False
        self.count += 1
        difference = inputs - self._mean
        self._mean += difference / self.count
        self._squares += difference * (inputs - self._mean)
        if self.count < self._wanted:
            return False
        deviation = np.sqrt(self._squares / self.count)
        self.center = self._mean
        self.scale = np.where(deviation > _SMALLEST_SCALE, deviation, 1.0)
        return True

    @property
    def fixed(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Center and scale (F,), once they are fixed."""
        assert self.center is not None
        assert self.scale is not None
        return self.center, self.scale

    def save(self) -> bytes:
        """Everything, as bytes."""
        return pack_array(np.stack([np.full_like(self._mean, self.count), self._mean, self._squares]))

    def load(self, data: bytes) -> None:
        """Take over what `save` wrote."""
        count, self._mean, self._squares = unpack_array(data)
        self.count = int(count[0])
        if self.count >= self._wanted:
            self.center = self._mean
            deviation = np.sqrt(self._squares / self.count)
            self.scale = np.where(deviation > _SMALLEST_SCALE, deviation, 1.0)
