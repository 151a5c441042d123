"""Kernels that borrow the arrays they are given.

numba counts who holds an array, by an atomic addition each time a kernel makes a view or passes an array on, also where
the caller holds it all the while. In a loop over records that costs more than the work: two thirds of decoding.
It also calls one kernel from another with six to ten words for each array, unless `forceinline=True` asks for the
kernel itself to be put there: to be asked for where one is called for each record.

Guaranteed: a kernel made here counts nothing. One that would make an array of its own does not compile: it is given
scratch arrays instead. Its source must not keep an array beyond the call, which no compiled kernel can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, DTypeLike, NDArray

__all__ = ["borrowing", "read_only"]


def borrowing(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that compiles a kernel like `numba.njit(cache=True, nogil=True, **options)`."""
    decorator: Callable[[Callable[..., Any]], Any] = njit(cache=True, nogil=True, _nrt=False, **options)
    return decorator


def read_only(array: ArrayLike, kind: DTypeLike | None = None) -> NDArray[Any]:
    """The same values, contiguous, of that type, and read-only: one compiled kernel serves every caller."""
    view: NDArray[Any] = np.ascontiguousarray(array, kind).view()
    view.setflags(write=False)
    return view
