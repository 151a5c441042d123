"""How long rows live, where events may keep them alive for different times.

A row's deadline is the latest over its events of event time and the event's own time to live; it is expired once
event time is there. All that ends rows by age, or orders them by it, goes by one number for each row: its deadline
less the table's longest time to live. Where there is one time to live that is last_event_ms itself, and nothing is
kept beside it. Otherwise a record holds, as its lag, how much the number is behind last_event_ms.

Guarantees: the number never goes back while a row lives, and does not depend on the order of its events. Rows whose
time to live is no longer possible, the options having changed, get the nearest that is.
"""

# mypy: disable-error-code="import-untyped,import-not-found,untyped-decorator,no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from stream.errors import StoreError

__all__ = ["FOR_EVER", "MAX_SPREAD_MS", "Lives", "aged_by", "aged_of", "lag_of", "prolonged", "with_lag"]

Int64 = npt.NDArray[np.int64]

#: The time to live, in milliseconds, of what never expires.
FOR_EVER = 2**48 - 1
#: Most milliseconds between a table's shortest and longest time to live, about four years.
MAX_SPREAD_MS = 2**37 - 2

_NEVER_LAG = 2**37 - 1
_NEVER_AGED = 2**60
_ALL = np.uint64(2**37 - 1)
_M32 = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(0xF800)
_NOT_LAG = np.uint64(0xFFFF07FF)
_S11 = np.uint64(11)
_S21 = np.uint64(21)
_S32 = np.uint64(32)


@njit(cache=True, nogil=True, inline="always")
def lag_of(word: Any, mask: Any) -> Any:
    """Lag in word 5 of a record; mask is that of `Lives`."""
    return np.int64(((word >> _S32) | ((word & _HIGH) << _S21)) & mask)


@njit(cache=True, nogil=True, inline="always")
def aged_by(last: Any, lag: Any) -> Any:
    """Deadline less the longest time to live, by last_event_ms and lag."""
    return last + np.int64(_NEVER_AGED) if lag == _NEVER_LAG else last - lag


@njit(cache=True, nogil=True, inline="always")
def aged_of(last: Any, word: Any, mask: Any) -> Any:
    """The same by last_event_ms and word 5 of a record."""
    return aged_by(last, lag_of(word, mask))


@njit(cache=True, nogil=True, inline="always")
def with_lag(word: Any, lag: Any) -> Any:
    """Word 5 of a record with another lag."""
    bits = np.uint64(lag)
    return (word & _NOT_LAG) | ((bits & _M32) << _S32) | ((bits >> _S32) << _S11)


@njit(cache=True, nogil=True, inline="always")
def prolonged(last: Any, lag: Any, is_new: Any, ms: Any, more: Any) -> Any:
    """Lag of a row (last_event_ms, lag) after an event at ms whose own lag is `more`."""
    if more == _NEVER_LAG or (lag == _NEVER_LAG and not is_new):
        return np.int64(_NEVER_LAG)
    if is_new:
        # Its last_event_ms is 0 so far, and stays so where the event is from before that.
        return min(more + max(last - ms, 0), np.int64(_NEVER_LAG - 1))
    return max(last, ms) - max(last - lag, ms - more)


@njit(cache=True, nogil=True)
def _read(records: Any, slots: Any, mask: Any, out: Any) -> None:
    for i in range(slots.shape[0]):
        out[i] = lag_of(records[slots[i], 5], mask)


@njit(cache=True, nogil=True)
def _write(records: Any, slots: Any, lags: Any) -> None:
    for i in range(slots.shape[0]):
        records[slots[i], 5] = with_lag(records[slots[i], 5], lags[i])


@njit(cache=True, nogil=True)
def _prolong(records: Any, slots: Any, at: Any, last: Any, lags: Any, event_ms: Any, more: Any, started: Any) -> None:
    """Lags of rows after events in order; `at` numbers the row of each, last and lags change in place."""
    for i in range(slots.shape[0]):
        j = at[i]
        slot = slots[i]
        is_new = not started[j] and records[slot, 2] == np.uint64(0) and records[slot, 3] == np.uint64(0)
        lags[j] = prolonged(last[j], lags[j], is_new, event_ms[i], more[i])
        last[j] = max(last[j], event_ms[i])
        started[j] = True
        records[slot, 5] = with_lag(records[slot, 5], lags[j])


class Lives:
    """The times to live of one table, and lags as its records hold them.

    ttl_ms: of rows whose events said none; None: for ever. event_ttls_ms: those that events may ask for.
    """

    def __init__(self, ttl_ms: int | None = None, event_ttls_ms: Sequence[int | None] = ()) -> None:
        every = {ttl_ms, *event_ttls_ms}
        finite = [ttl for ttl in every if ttl is not None]
        #: Whether rows have different times to live.
        self.several = len(every) > 1
        #: The longest that ends at all; None where nothing does.
        self.longest_ms = max(finite, default=None)
        self._spread = max(finite, default=0) - min(finite, default=0)
        self._bounded = None not in every
        self._default = FOR_EVER if ttl_ms is None else ttl_ms
        #: What kernels mask a record's lag with.
        self.mask = _ALL if self.several else np.uint64(0)
        #: Lag of a row that no event told otherwise.
        self.default_lag = int(self.lags(np.array([self._default]))[0]) if self.several else 0
        #: Lag of one that lives as short as any.
        self.shortest_lag = self._spread if self.several else 0

    @property
    def name(self) -> str:
        """What the order of a table's rows by age depends on."""
        if not self.several:
            return ""
        return f"{self.longest_ms} {self._default} {self._spread} {self._bounded}"

    def checked(self, life_ms: Int64) -> Int64:
        """The same; raises StoreError where one is not among the table's times to live, or between them."""
        shortest = (self.longest_ms or 0) - self._spread
        finite = life_ms != FOR_EVER
        bad = (life_ms < shortest) | (finite & (life_ms > (self.longest_ms or 0))) | (~finite & self._bounded)
        if self.several and bad.any():
            accepted = f"{shortest} to {self.longest_ms}" + ("" if self._bounded else f", or FOR_EVER ({FOR_EVER})")
            raise StoreError(f"ttl_ms: {int(life_ms[bad][0])} is not of this table; accepted: {accepted}")
        return life_ms

    def lags(self, life_ms: Int64) -> Int64:
        """Lags for times to live, int64[n]; 0 is the table's own ttl_ms."""
        if not self.several or self.longest_ms is None:
            return np.zeros(life_ms.shape[0], np.int64)
        life = np.where(life_ms == 0, self._default, life_ms)
        lags: Int64 = np.clip(self.longest_ms - life, 0, self._spread)
        if not self._bounded:
            lags[life == FOR_EVER] = _NEVER_LAG
        return lags

    def life_ms(self, lags: Int64) -> Int64:
        """Inverse of lags()."""
        if not self.several or self.longest_ms is None:
            return np.zeros(lags.shape[0], np.int64)
        return np.where(lags == _NEVER_LAG, FOR_EVER, self.longest_ms - lags)

    def aged(self, last_event_ms: Int64, life_ms: Int64) -> Int64:
        """Deadlines less the longest time to live, of rows last updated then which live so long after it."""
        if not self.several:
            return last_event_ms
        lags = self.lags(life_ms)
        return last_event_ms + np.where(lags == _NEVER_LAG, _NEVER_AGED, -lags)

    def read(self, records: npt.NDArray[np.uint64], slots: Int64) -> Int64:
        """Lags of the records at slots."""
        out = np.zeros(slots.shape[0], np.int64)
        if self.several:
            _read(records, slots, self.mask, out)
        return out

    def write(self, records: npt.NDArray[np.uint64], slots: Int64, lags: Int64) -> None:
        """Set the lags of the records at slots."""
        if self.several:
            _write(records, slots, lags)

    def prolong(self, records: npt.NDArray[np.uint64], slots: Int64, event_ms: Int64, life_ms: Int64) -> None:
        """Set the lags that rows will have once last_event_ms has followed these events."""
        if not self.several or not slots.shape[0]:
            return
        distinct, at = np.unique(slots, return_inverse=True)
        last = records.view(np.int64)[distinct, 3]
        lags = self.read(records, distinct)
        started = np.zeros(distinct.shape[0], np.bool_)
        _prolong(records, slots, at, last, lags, event_ms, self.lags(life_ms), started)
