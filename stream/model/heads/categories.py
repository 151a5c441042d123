"""What the value of a category field adds to a head's scores: the rows of tables that are learned with every label.

A value is found by its exact bytes. One that has no row, and an absent field, use the table's `rare` row; where that
is not published yet nothing is added.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stream.errors import ParametersError
from stream.model.heads.scores import Floats
from stream.model.layout import Layout
from stream.model.parameters import ParameterSet
from stream.model.rows import RARE_KEY, RowTable, value_key
from stream.settings import Task
from stream.store import PackedKeys
from stream.wire import EventColumns

__all__ = ["Categories", "CategoryKeys", "table_names"]

_VALUE, _RARE = value_key(b"")[0], RARE_KEY[0]


def table_names(task: str, settings: Task) -> tuple[str, ...]:
    """Names of the tables that a task's head reads, in the order of its settings."""
    return tuple(f"{task}.{field}" for field in settings.tables)


class CategoryKeys:
    """Keys of rows from the events that ask for a task's predictions."""

    def __init__(self, layout: Layout, settings: Task) -> None:
        fields = layout.schema.by_name[settings.on].category_fields
        self._columns = [fields[name] for name in settings.tables]

    def of(self, columns: EventColumns, event: NDArray[np.int64]) -> list[PackedKeys]:
        """For each table, the keys (k,) of the rows that these events (k,) use."""
        return [_keys(columns, column, event) for column in self._columns]


def _keys(columns: EventColumns, column: int, event: NDArray[np.int64]) -> PackedKeys:
    start, length = columns.category_start[event, column], columns.category_length[event, column].astype(np.int64)
    size = np.maximum(length, 0)
    offsets = np.zeros(len(event) + 1, np.int64)
    np.cumsum(size + 1, out=offsets[1:])
    buffer = np.empty(int(offsets[-1]), np.uint8)
    is_value = np.ones(len(buffer), np.bool_)
    is_value[offsets[:-1]] = False
    buffer[offsets[:-1]] = np.where(length < 0, _RARE, _VALUE)
    before = np.cumsum(size) - size
    buffer[is_value] = columns.text[np.arange(int(size.sum())) + np.repeat(start - before, size)]
    return PackedKeys(buffer, offsets)


class Categories:
    """The tables of one task's head.

    Parameters
    ----------
    outputs: of the head; the width of every row.

    Raises
    ------
    ParametersError: a table is of another width.
    """

    def __init__(self, task: str, settings: Task, parameters: ParameterSet, outputs: int) -> None:
        self._outputs = outputs
        self._tables: list[RowTable | None] = [parameters.tables.get(name) for name in table_names(task, settings)]
        for name, table in zip(table_names(task, settings), self._tables, strict=True):
            if table is not None and table.width != outputs:
                raise ParametersError(
                    f"table {name!r} has rows of {table.width} floats: the settings describe {outputs}"
                )

    def added(self, keys: Sequence[PackedKeys], k: int) -> Floats:
        """(k, outputs) that the rows under these keys, (k,) for each table, add to the scores."""
        total = np.zeros((k, self._outputs))
        for table, own in zip(self._tables, keys, strict=True):
            if table is None:
                continue
            rows, found = table.gather(own)
            if not found.all():
                rare, _ = table.gather(PackedKeys.from_list([RARE_KEY]))
                rows[~found] = rare
            total += rows
        return total
