"""Kernels that count no holders of their arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba.core.errors import NumbaError

from stream.borrowing import borrowing


@borrowing()
def _add_rows(rows: Any, total: Any) -> None:
    for i in range(len(rows)):
        view = rows[i]
        for k in range(len(view)):
            total[k] += view[k]


@borrowing()
def _doubled(values: Any) -> Any:
    twice = np.empty(len(values))
    for i in range(len(values)):
        twice[i] = 2.0 * values[i]
    return twice.sum()


def test_a_kernel_that_makes_views_reads_and_writes_what_it_is_given() -> None:
    # Given
    rows, total = np.arange(12.0).reshape(4, 3), np.zeros(3)

    # When
    _add_rows(rows, total)

    # Then
    assert total.tolist() == rows.sum(axis=0).tolist()


def test_a_kernel_that_would_make_an_array_is_refused() -> None:
    # Given a kernel whose array nobody would ever let go of, when it is called, then it does not compile.
    with pytest.raises(NumbaError, match="empty"):
        _doubled(np.arange(3.0))
