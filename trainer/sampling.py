"""Learning from a share of the negatives, without a bias.

Where positives are rare, most negatives say little each. Of those only a share r is learned from. Among what is learned
the odds of a positive are 1/r times those among all, so for each label that is learned log(1/r) is added to the head's
log-odds: what the head itself says is then about all. Source: G. King, L. Zeng, Logistic regression in rare events
data, Political Analysis 9, 2001 (prior correction).

Guaranteed: which negatives are kept depends on task, seed, client and time of the prediction alone, so a replay keeps
the same ones, and a larger rate keeps those of a smaller one and more.
"""

from __future__ import annotations

import hashlib
import math
import struct

__all__ = ["NegativeSampling"]


class NegativeSampling:
    """Which negatives of a task are learned from.

    Parameters
    ----------
    rate: share of them, above 0; 1 keeps all.
    """

    def __init__(self, task: str, rate: float, seed: int) -> None:
        self._key = hashlib.blake2b(f"{seed}/{task}".encode(), digest_size=16).digest()
        self._limit = round(rate * 2.0**64)
        #: To add to the head's log-odds for each label that is learned.
        self.log_odds_offset = -math.log(rate)

    def keeps(self, client_id: bytes, as_of_ms: int) -> bool:
        """Whether the negative of this prediction is learned from."""
        if not self.log_odds_offset:
            return True
        digest = hashlib.blake2b(struct.pack(">q", as_of_ms) + client_id, digest_size=8, key=self._key).digest()
        return int.from_bytes(digest, "big") < self._limit
