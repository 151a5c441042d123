"""After how long most positives have come, learned from windows that have closed.

The delay of a positive is the time from its prediction to when it became known. Delays are counted per stratum (such
as the kind of a campaign) once the positive's window has closed, because among open windows the quick ones are a
majority. The share of a stratum's positives that have come after a time t is estimated as (c(t) + k F(t)) / (n + k):
c of its own n, F the share over all strata, k the weight of what is common to all.

Guaranteed: bounded (`BINS` counts a stratum), and the same for the same delays in any order. Not guaranteed: sense in a
stratum whose windows are of very different lengths; what comes late in the long ones is taken for missing.
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from trainer.checkpoint import pack_array, unpack_array

__all__ = ["Delays"]

logger = logging.getLogger(__name__)

BINS = 512
#: Positives of closed windows before anything is said.
LEAST_POSITIVES = 30
#: What is common to all strata weighs as much as so many positives of one.
SHRINKAGE = 20.0


class Delays:
    """Delays of one task's positives.

    Parameters
    ----------
    strata: how many there are.
    span_ms: longest delay told apart; `BINS` bins of equal width.
    share: of the positives, above which the others are not waited for.
    """

    def __init__(self, strata: int, span_ms: int, share: float) -> None:
        self._share = share
        self._bin_ms = max(1, -(-span_ms // BINS))
        self._counts = np.zeros((strata, BINS), np.int64)
        self._ages_ms: list[int | None] = [None] * strata

    @property
    def strata(self) -> int:
        """How many strata there are."""
        return len(self._ages_ms)

    def add(self, stratum: int, delay_ms: int) -> None:
        """Count a positive whose window has closed."""
        self._counts[min(stratum, self.strata - 1), min(max(delay_ms, 0) // self._bin_ms, BINS - 1)] += 1
        self._refresh()

    def age_ms(self, stratum: int) -> int | None:
        """The age of a prediction at which its label is final; None while too little is known."""
        return self._ages_ms[min(stratum, self.strata - 1)]

    def _refresh(self) -> None:
        counts: NDArray[np.float64] = np.cumsum(self._counts, axis=1).astype(np.float64)
        together = counts.sum(axis=0)
        if together[-1] < LEAST_POSITIVES:
            return
        common = together / together[-1]
        shares = (counts + SHRINKAGE * common) / (counts[:, -1:] + SHRINKAGE)
        # Shares end at 1, which no share to exceed is above.
        bins = np.argmax(shares > self._share, axis=1)
        self._ages_ms = [(at + 1) * self._bin_ms for at in bins.tolist()]

    def save(self) -> bytes:
        """Everything, as bytes."""
        return pack_array(np.concatenate([[self._bin_ms], self._counts.ravel()]))

    def load(self, data: bytes, task: str) -> None:
        """Take over what `save` wrote, unless it was under other settings: then delays are learned anew."""
        bin_ms, *counts = unpack_array(data).tolist()
        if bin_ms != self._bin_ms or len(counts) != self._counts.size:
            logger.warning("task %s: strata or time to live are others now, delays of positives are learned anew", task)
            return
        self._counts = np.array(counts, np.int64).reshape(self._counts.shape)
        self._refresh()
