"""The compiled counting loop of the admission sketch.

Guarantees: a count never falls below the number of times its key was counted, up to the threshold. Does not
remove anything: counts only grow.
"""

# mypy: disable-error-code="import-untyped,import-not-found,untyped-decorator,no-untyped-call"
from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from stream.store.hashing import hash_one

__all__ = ["DEPTH", "count"]

DEPTH = 8


@njit(cache=True, nogil=True)
def count(
    buffer: Any,
    offsets: Any,
    seed: Any,
    cells: Any,
    threshold: Any,
    page_cells: Any,
    changed: Any,
    reached: Any,
) -> None:
    """Count keys in order into cells; reached (bool[n]) where a key's count is at the threshold afterwards."""
    size = np.uint64(cells.shape[0])
    places = np.empty(DEPTH, np.int64)
    for i in range(offsets.shape[0] - 1):
        h = hash_one(buffer, offsets[i], offsets[i + 1], seed)
        # Kirsch and Mitzenmacher (2006): the cells of a key are an arithmetic progression of two hashes.
        step = (h * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)
        low = np.int64(threshold)
        for d in range(DEPTH):
            h += step
            place = np.int64(((h >> np.uint64(32)) * size) >> np.uint64(32))
            places[d] = place
            low = min(low, np.int64(cells[place]))
        if low < threshold:
            low += 1
            for d in range(DEPTH):
                if np.int64(cells[places[d]]) < low:
                    cells[places[d]] = low
                    changed[places[d] // page_cells] = True
        reached[i] = low >= threshold
