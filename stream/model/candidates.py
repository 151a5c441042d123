"""How a row's memory matches the candidates of an event: what it holds of the items the event lists.

A tally says how often each candidate came, by the smaller of its bins (the count-min estimate, never too low); a ring
in how many of its places it is; a top its count, if it is among the values kept. Counts add up within a group, a
coupon's products say, and the head sees on a logarithmic scale the mean of the best groups, the best, the mean of all,
and the count of all candidates together.
One function of (row, event) for worker and trainer, in a fixed order: no other row or event of the call matters.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from stream.model.kernels import ring_code, tally_bins
from stream.model.layout import Layout, Operation
from stream.settings import Task
from stream.wire import EventColumns

__all__ = ["BEST", "Matches"]

#: Groups that the mean of the best is over.
BEST = 16
_PARTS = ("best", "maximum", "mean", "union")


@njit(cache=True, nogil=True)
def _in_bins(memory: Any, at: Any, size: Any, hashes: Any, groups: Any, held: Any) -> Any:
    """Add to each group what a tally at `at` holds of its items; of all items, each once."""
    order = np.argsort(hashes)
    union = 0.0
    for k in range(len(order)):
        q = order[k]
        first, second = tally_bins(hashes[q], size)
        amount = min(np.float64(memory[at + first]), np.float64(memory[at + size + second]))
        held[groups[q]] += amount
        if k == 0 or hashes[q] != hashes[order[k - 1]]:
            union += amount
    return union


@njit(cache=True, nogil=True)
def _in_places(memory: Any, at: Any, codes: Any, size: Any, hashes: Any, groups: Any, held: Any) -> Any:
    """The same of what keeps `size` values: their codes at `codes`, their counts at `at`, or one each where that is -1.

    The places are found by an index of their codes, so the cost does not grow with how many there are.
    """
    slots = 2
    while slots < 2 * size:
        slots *= 2
    index = np.full(slots, -1)
    amounts = np.zeros(size)
    for k in range(size):
        high, low = memory[codes + 2 * k], memory[codes + 2 * k + 1]
        if high == 0.0 and low == 0.0:
            continue
        slot = np.int64(low) & (slots - 1)
        while index[slot] >= 0 and not (
            memory[codes + 2 * index[slot]] == high and memory[codes + 2 * index[slot] + 1] == low
        ):
            slot = (slot + 1) & (slots - 1)
        if index[slot] < 0:
            index[slot] = k
        amounts[index[slot]] += 1.0 if at < 0 else np.float64(memory[at + k])
    is_listed = np.zeros(size, np.bool_)
    for q in range(hashes.shape[0]):
        high, low = ring_code(hashes[q])
        slot = np.int64(low) & (slots - 1)
        while index[slot] >= 0:
            k = index[slot]
            if memory[codes + 2 * k] == high and memory[codes + 2 * k + 1] == low:
                held[groups[q]] += amounts[k]
                is_listed[k] = True
                break
            slot = (slot + 1) & (slots - 1)
    union = 0.0
    for k in range(size):
        if is_listed[k]:
            union += amounts[k]
    return union


@njit(cache=True, nogil=True)
def _match(
    memory: Any, start: Any, count: Any, item_hash: Any, item_group: Any, at: Any, codes: Any, size: Any, best: Any,
    out: Any, to: Any,
) -> None:  # fmt: skip
    """out[i, to : to + 4] of the i-th row of `memory` and its items; `codes` is -1 for a tally."""
    for i in range(start.shape[0]):
        n = count[i]
        if n <= 0:
            out[i, to : to + 4] = 0.0
            continue
        hashes = item_hash[start[i] : start[i] + n]
        groups = item_group[start[i] : start[i] + n]
        held = np.zeros(groups[n - 1] + 1)
        if codes < 0:
            union = _in_bins(memory[i], at, size, hashes, groups, held)
        else:
            union = _in_places(memory[i], at, codes, size, hashes, groups, held)
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
        matched = [(fields[field], place[name]) for field, names in task.candidates.items() for name in names]
        self._matched = [(field, *_where(operation)) for field, operation in matched]
        self.names = tuple(f"{operation.memory.name}.{part}" for _, operation in matched for part in _PARTS)

    def values(
        self, columns: EventColumns, event: NDArray[np.int64], memory: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """(k, M) for the events at indices `event` (k,) of the batch and the memory (k, floats) of their rows right
        after them; zeros where an event lists nothing."""
        out = np.zeros((len(event), len(self.names)), np.float32)
        # The whole array: some of the columns of a single row are another kind of array, for which a kernel would be
        # compiled again.
        for number, (column, at, codes, size) in enumerate(self._matched):
            _match(
                memory, columns.item_start[event, column], columns.item_count[event, column],
                columns.item_hash, columns.item_group, at, codes, size, BEST, out, 4 * number,
            )  # fmt: skip
        return out


def _where(operation: Operation) -> tuple[int, int, int]:
    """Where a memory's counts begin and where its codes do, -1 for what it has not, and its size."""
    if operation.memory.kind == "tally":
        return operation.start, -1, operation.memory.dimensions
    if operation.memory.kind == "top":
        return operation.start, operation.time_start, operation.memory.size
    return -1, operation.start, operation.memory.size
