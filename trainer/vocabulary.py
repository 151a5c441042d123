"""What the encoder needs to know before anything is learned: category values and scales of numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from stream.model.layout import Layout
from stream.wire import EventColumns

__all__ = ["Survey"]

#: Standard deviations below this are taken for this: a field that hardly varies is not blown up.
_SMALLEST_SCALE = 1e-3


class Survey:
    """Counts over a stream of events.

    `values[i]` are the values of embedded field i that occurred at least `min_count` times, most frequent
    first, equal counts by bytes; `scale` (2, numbers) the mean and standard deviation of each encoded
    number's signed logarithm, 0 and 1 for one that never occurred.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._counts: list[Counter[bytes]] = [Counter() for _ in layout.embedded]
        self._number = np.zeros(layout.numbers, np.int64)
        self._sum = np.zeros(layout.numbers)
        self._squares = np.zeros(layout.numbers)
        self.events = 0

    def extend(self, batches: Iterable[EventColumns]) -> None:
        """Count the accepted events of some batches."""
        for columns in batches:
            self.events += int(columns.accepted.sum())
            self._count_values(columns)
            self._sum_numbers(columns)

    def _count_values(self, columns: EventColumns) -> None:
        for counter, field in zip(self._counts, self._layout.embedded, strict=True):
            of_field = (columns.modality == field.modality) & (columns.category_length[:, field.column] >= 0)
            rows = np.flatnonzero(of_field)
            # Of one batch, values are told apart by their 64-bit hash; over batches, by their bytes.
            _, first, number = np.unique(
                columns.category_hash[rows, field.column], return_index=True, return_counts=True
            )
            for row, occurred in zip(rows[first].tolist(), number.tolist(), strict=True):
                value = columns.category(row, field.column)
                if value is not None:
                    counter[value] += occurred

    def _sum_numbers(self, columns: EventColumns) -> None:
        layout = self._layout
        modalities = len(layout.schema.modalities)
        for modality, column in np.argwhere(layout.number_inputs >= 0).tolist():
            number = int(layout.number_inputs[modality, column]) - modalities
            values = columns.numbers[columns.modality == modality, column]
            values = values[np.isfinite(values)]
            squashed = np.copysign(np.log1p(np.abs(values)), values)
            self._number[number] += len(squashed)
            self._sum[number] += squashed.sum()
            self._squares[number] += np.square(squashed).sum()

    @property
    def values(self) -> list[list[bytes]]:
        """Values of each embedded field, in the order of their rows; row 0, `rare`, is none of them."""
        return [
            sorted((v for v, n in counter.items() if n >= field.min_count), key=lambda v: (-counter[v], v))
            for counter, field in zip(self._counts, self._layout.embedded, strict=True)
        ]

    @property
    def scale(self) -> NDArray[np.float64]:
        """See the class."""
        number = np.maximum(self._number, 1)
        mean = self._sum / number
        variance = np.maximum(self._squares / number - np.square(mean), 0.0)
        deviation = np.where(self._number > 0, np.maximum(np.sqrt(variance), _SMALLEST_SCALE), 1.0)
        return np.stack([mean, deviation])
