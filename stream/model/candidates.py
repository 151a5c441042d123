"""How a row's memory matches the candidates of an event: what it holds of the items the event lists.

A tally says how often each candidate came, by the smaller of its bins (the count-min estimate, never too low); a ring
in how many of its places it is. Counts add up within a group, a coupon's products say, and the head sees on a
logarithmic scale the mean of the best groups, the best, the mean of all, and the count of all candidates together.
One function of (row, event) for worker and trainer, in a fixed order: no other row or event of the call matters.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from stream.model.kernels import ring_code, tally_bins
from stream.model.layout import Layout
from stream.settings import Task
from stream.wire import EventColumns

__all__ = ["BEST", "Matches"]

#: Groups that the mean of the best is over.
BEST = 16
_PARTS = ("best", "maximum", "mean", "union")


@njit(cache=True, nogil=True)
def _held(memory: Any, at: Any, size: Any, is_ring: Any, hashed: Any) -> Any:
    """How often an item is in a memory that begins at `at`."""
    if not is_ring:
        first, second = tally_bins(hashed, size)
        return min(np.float64(memory[at + first]), np.float64(memory[at + size + second]))
    high, low = ring_code(hashed)
    count = 0.0
    for k in range(at, at + 2 * size, 2):
        if memory[k] == high and memory[k + 1] == low:
            count += 1.0
    return count


@njit(cache=True, nogil=True)
def _match(
    memory: Any, start: Any, count: Any, item_hash: Any, item_group: Any, at: Any, size: Any, is_ring: Any, best: Any,
    out: Any, to: Any,
) -> None:  # fmt: skip
    """out[i, to : to + 4] of the i-th row of `memory` and its items."""
    for i in range(start.shape[0]):
        n = count[i]
        if n <= 0:
            out[i, to : to + 4] = 0.0
            continue
        hashes = item_hash[start[i] : start[i] + n]
        groups = item_group[start[i] : start[i] + n]
        held = np.zeros(groups[n - 1] + 1)
        order = np.argsort(hashes)
        union = 0.0
        for k in range(n):
            q = order[k]
            amount = _held(memory[i], at, size, is_ring, hashes[q])
            held[groups[q]] += amount
            if k == 0 or hashes[q] != hashes[order[k - 1]]:
                union += amount
        for g in range(held.shape[0]):
            # What a sum of few floats below zero may leave of nothing.
            held[g] = np.log1p(max(held[g], 0.0))
        held = np.sort(held)
        of_best = 0.0
        of_all = 0.0
        kept = min(best, held.shape[0])
        for g in range(held.shape[0] - 1, -1, -1):
            of_all += held[g]
            if g >= held.shape[0] - kept:
                of_best += held[g]
        out[i, to] = of_best / kept
        out[i, to + 1] = held[held.shape[0] - 1]
        out[i, to + 2] = of_all / held.shape[0]
        out[i, to + 3] = np.log1p(max(union, 0.0))


class Matches:
    """What a task's head sees of its candidates: four columns for each memory matched with them.

    `names` (M,) names the columns, by memory and part.
    """

    def __init__(self, layout: Layout, task: Task) -> None:
        fields = layout.schema.by_name[task.on].item_fields
        place = {operation.memory.name: operation for operation in layout.operations}
        self._matched = [(fields[field], place[name]) for field, names in task.candidates.items() for name in names]
        self.names = tuple(f"{operation.memory.name}.{part}" for _, operation in self._matched for part in _PARTS)

    def values(
        self, columns: EventColumns, event: NDArray[np.int64], memory: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """(k, M) for the events at indices `event` (k,) of the batch and the memory (k, floats) of their rows right
        after them; zeros where an event lists nothing."""
        out = np.zeros((len(event), len(self.names)), np.float32)
        # The whole array: some of the columns of a single row are another kind of array, for which a kernel would be
        # compiled again.
        for number, (column, operation) in enumerate(self._matched):
            _match(
                memory, columns.item_start[event, column], columns.item_count[event, column],
                columns.item_hash, columns.item_group, operation.start, operation.slots // 2,
                operation.memory.kind == "ring", BEST, out, 4 * number,
            )  # fmt: skip
        return out
