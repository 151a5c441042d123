"""Occurrence counts of very many keys in fixed memory, for admission.

Guarantees: a count is never too low, so nothing is admitted late. Does not forget: as more keys are counted than
it was made for, more of them are admitted early.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from stream.errors import StoreError
from stream.store import sketching
from stream.store.keys import MAX_KEY_BYTES, PackedKeys

__all__ = ["Sketch", "page_key", "page_number"]

Bool = npt.NDArray[np.bool_]
_PREFIX = b"\xff" * MAX_KEY_BYTES


def page_key(page: int) -> bytes:
    """Changelog key of a page: longer than any client key, so it can be no client's."""
    return _PREFIX + page.to_bytes(4, "big")


def page_number(key: bytes) -> int | None:
    """The page whose changelog key this is, None for a client key."""
    return int.from_bytes(key[MAX_KEY_BYTES:], "big") if len(key) > MAX_KEY_BYTES else None


class Sketch:
    """Occurrence counts in fixed memory: a count-min sketch with conservative update.

    After Cormode and Muthukrishnan (2005), and Estan and Varghese (2002) for the update. A count is never too low.
    It is too high where all of a key's 8 cells are shared; with 20 cells for each of `keys` expected keys fewer
    than 0.1 % of keys are admitted early once that many were counted, fewer than 2 % at twice as many. Cells are
    1 byte for thresholds up to 255, 2 bytes above.
    """

    PAGE_BYTES = 16_384
    _CELLS_PER_KEY = 20

    def __init__(self, keys: int, threshold: int, seed: int) -> None:
        kind = np.uint8 if threshold <= 255 else np.uint16
        if threshold > 65_535:
            raise StoreError(f"store.admission_threshold: {threshold} in sketch mode; accepted: up to 65535, or exact")
        page = self.PAGE_BYTES // np.dtype(kind).itemsize
        size = -(-keys * self._CELLS_PER_KEY // page) * page
        self.cells: npt.NDArray[np.unsignedinteger] = np.zeros(size, kind)
        self.changed = np.zeros(size // page, np.bool_)
        self._page_cells = page
        self._threshold = threshold
        self._seed = np.uint64(seed ^ 0x3C6EF372FE94F82B)

    @property
    def nbytes(self) -> int:
        """Memory of the counts."""
        return self.cells.nbytes

    def count(self, keys: PackedKeys) -> Bool:
        """Count each key once, in order; bool[n], true where that made its count reach the threshold."""
        reached = np.zeros(len(keys), np.bool_)
        sketching.count(
            keys.buffer, keys.offsets, self._seed, self.cells, self._threshold, self._page_cells, self.changed, reached
        )
        return reached

    def take_changed(self) -> dict[int, bytes]:
        """Pages changed since the last call, by number."""
        pages = np.flatnonzero(self.changed).tolist()
        self.changed[:] = False
        size = self._page_cells
        return {page: self.cells[page * size : (page + 1) * size].tobytes() for page in pages}

    def load(self, pages: Mapping[int, bytes]) -> None:
        """Set pages. Raises StoreError for one that does not fit."""
        size = self._page_cells
        for page, data in pages.items():
            if len(data) != self.PAGE_BYTES or not 0 <= page < self.changed.shape[0]:
                raise StoreError(
                    f"sketch page {page} of {len(data)} bytes does not fit; open the table with the sketch_keys and "
                    "admission_threshold it was written with"
                )
            self.cells[page * size : (page + 1) * size] = np.frombuffer(data, self.cells.dtype)

    def add(self, data: bytes) -> None:
        """Add the counts of another sketch of the same size, so that none is below what it was in either."""
        other = np.frombuffer(data, self.cells.dtype)
        if other.shape != self.cells.shape:
            raise StoreError(
                f"sketch of {len(data)} bytes where this table's has {self.cells.nbytes}; open the table with the "
                "sketch_keys and admission_threshold it was written with"
            )
        total = self.cells.astype(np.int64) + other
        self.cells[:] = np.minimum(total, np.iinfo(self.cells.dtype).max)
        self.changed[:] = True
