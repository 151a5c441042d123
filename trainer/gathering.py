"""Whether the labels that become final together are all there, so that one version has them all."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["Gathering"]


class Gathering:
    """Labels of one moment lie in several partitions and are read one after the other. A version of the first few would
    let all the others wait for the next one.

    Parameters
    ----------
    least, most: seconds; for how long more labels are waited for at least, and at most.
    """

    def __init__(self, least: float, most: float) -> None:
        self._least = least
        self._most = most
        self._seen: dict[str, int] = {}
        self._since = 0.0

    def is_over(self, unpublished: Mapping[str, int], now: float) -> bool:
        """Asked after each look for more: true where that brought none, after the least time, or time is up.

        Parameters
        ----------
        unpublished: by task, how many labels no version has.
        now: seconds, monotonic.
        """
        is_growing = unpublished != self._seen
        if not self._seen:
            self._since = now
        self._seen = dict(unpublished)
        waited = now - self._since
        return not unpublished or waited >= (self._most if is_growing else self._least)
