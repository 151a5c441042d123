"""Evidence that one forecaster has become worse than another, in a stream of which one may look at any moment.

Of each label both forecasters' losses are known, `later` of the one that is doubted and `earlier` of the other. Under
the hypothesis that the doubted one is not worse by more than a tolerance, the mean of d = later - (1 + tolerance)
earlier is at most 0, whatever came before. As losses lie in [0, limit], d is never below -(1 + tolerance) limit = -b,
and for any share s below 1 a gambler who stakes s / b on each d has a wealth that is not expected to grow and never
falls below 0. A change at an unknown label is found by one who begins anew whenever he has less than he began with:
that wealth, the mean over several stakes, is the evidence.

Guaranteed: while the hypothesis holds, the mean number of labels until the evidence first reaches x is at least x,
whatever the distribution of the losses and however often one looks. Nothing depends on how often that is, and the same
losses in the same pieces give the same evidence, bit for bit.

Not guaranteed: how soon a small difference is found.

Sources: J. Shin, A. Ramdas, A. Rinaldo, E-detectors: a nonparametric framework for sequential change detection, New
England Journal of Statistics in Data Science 2, 2023 (what is done, and the mean number of labels); Y. J. Choe, A.
Ramdas, Comparing sequential forecasters, Operations Research 72, 2024 (paired losses).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["Evidence"]

#: What is staked, as a share of the largest stake that cannot lose everything: large ones find large differences
#: soon, small ones find small differences at all.
_SHARES = np.array([0.8, 0.4, 0.1, 0.025])


class Evidence:
    """Evidence so far.

    Parameters
    ----------
    tolerance: share of the earlier one's loss by which the other may be worse.
    limit: largest loss.
    """

    def __init__(self, tolerance: float, limit: float) -> None:
        self._tolerance = tolerance
        self._stakes = _SHARES / ((1.0 + tolerance) * limit)
        #: Logarithm of each gambler's wealth.
        self._wealth = np.zeros(len(_SHARES))

    @property
    def log(self) -> float:
        """Natural logarithm of the evidence."""
        highest = float(self._wealth.max())
        return highest + math.log(float(np.exp(self._wealth - highest).mean()))

    def add(self, later: NDArray[np.float64], earlier: NDArray[np.float64]) -> None:
        """Take the losses (n,) of consecutive labels, each from 0 to the limit."""
        worse = later - (1.0 + self._tolerance) * earlier
        grown = np.cumsum(np.log1p(worse[:, None] * self._stakes), axis=0)
        # Who has less than 1 begins anew with the next label.
        lowest = np.concatenate([-np.maximum(self._wealth, 0.0)[None, :], grown[:-1]]).min(axis=0)
        self._wealth = grown[-1] - lowest

    def forget(self) -> None:
        """Begin anew."""
        self._wealth = np.zeros(len(_SHARES))

    def save(self) -> list[float]:
        """Everything, for `load`."""
        found: list[float] = self._wealth.tolist()
        return found

    def load(self, saved: list[float]) -> None:
        """Take over what `save` gave."""
        self._wealth = np.array(saved)
