"""Predictions in the order of their times, of which only the oldest are in memory.

The joiner asks which prediction comes of age next. Its database has all of them, in order of time; here are the keys of
the next few thousand, and from which key on the others lie in the database alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

__all__ = ["Ages"]

#: Keys of a partition, task and stratum read from the database at once; at most twice as many are in memory.
NEAR = 5_000

#: Keys from one on, in order: at most so many, and the one after them, if there is any.
Scan = Callable[[bytes, int], tuple[list[bytes], bytes | None]]


class Ages:
    """Keys of one partition, task and stratum.

    Parameters
    ----------
    scan: reads the database.
    rest: the first key that may be there.
    """

    def __init__(self, scan: Scan, rest: bytes) -> None:
        self._scan = scan
        self._near: list[bytes] = []
        self._rest: bytes | None = rest

    def add(self, key: bytes) -> None:
        """Take a key that the database has from now on."""
        if self._rest is not None and key >= self._rest:
            return
        heapq.heappush(self._near, key)
        if len(self._near) > 2 * NEAR:
            self._near.sort()
            self._rest = self._near[NEAR]
            del self._near[NEAR:]

    def first(self) -> bytes | None:
        """The least key; None: there is none."""
        if not self._near and self._rest is not None:
            self._near, self._rest = self._scan(self._rest, NEAR)
        return self._near[0] if self._near else None

    def pop(self) -> None:
        """Drop the least key."""
        heapq.heappop(self._near)
