"""Large arrays that cost memory only where they are touched.

Guarantees: a reserved array's untouched pages take no memory, so a bounded table reserves all it may need and
never has to move; they read as zeros. Where the system refuses to reserve, an ordinary array is given.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Scratch", "reserve"]

_MAP_NORESERVE = 0x4000  # Linux; the mmap module does not name it in every supported Python
_SMALL = 1 << 20


def reserve(rows: int, columns: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array of zeros of shape (rows, columns)."""
    kind = np.dtype(dtype)
    size = rows * columns * kind.itemsize
    if size < _SMALL:
        return np.zeros((rows, columns), kind)
    try:
        area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except OSError:
        return np.zeros((rows, columns), kind)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Rows are read at random: with 4 KiB pages most of a gather's time is page-table walks.
        area.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(area, kind).reshape(rows, columns)


class Scratch:
    """Arrays in a file that is of use to this process alone: the system may page them out at any time.

    Room in the file is taken before it is used, so that a full disk is an OSError there and not a fault at some
    later write; what has no room yet costs nothing and is not to be touched.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._size = 0
        self._places: dict[int, int] = {}
        # Nobody else has use for it, and unlinked it cannot be left behind.
        path.unlink()

    def make(self, rows: int, columns: int, dtype: npt.DTypeLike, room: int) -> npt.NDArray[Any]:
        """A zeroed array of shape (rows, columns) in the file, with room for the first `room` rows."""
        kind = np.dtype(dtype)
        size = -(-max(rows * columns * kind.itemsize, 1) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        os.ftruncate(self._file, self._size + size)
        area = mmap.mmap(self._file, size, offset=self._size)
        array = np.frombuffer(area, kind, rows * columns).reshape(rows, columns)
        self._places[array.ctypes.data] = self._size
        self._size += size
        self.take(array, 0, room)
        return array

    def take(self, array: npt.NDArray[Any], first: int, stop: int) -> None:
        """Take room for the rows [first, stop) of an array made here."""
        stride = array.strides[0]
        if stop > first and stride:
            os.posix_fallocate(self._file, self._places[array.ctypes.data] + first * stride, (stop - first) * stride)

    @property
    def taken_bytes(self) -> int:
        """Disk in use."""
        return os.fstat(self._file).st_blocks * 512

    def free_share(self) -> float:
        """Share of the file system that is still free to this user."""
        room = os.fstatvfs(self._file)
        return room.f_bavail / max(room.f_blocks, 1)

    def close(self) -> None:
        """Let go of the file; its arrays stay as long as somebody holds them."""
        os.close(self._file)
