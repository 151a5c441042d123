"""What heads see of a row: its hidden state, its memory on a scale that suits linear models, and the event.

Counts, sums and visits are read through a signed logarithm, sketches by their direction, times as the logarithm
of the hours since (and whether the thing ever happened), the latest numbers through a signed logarithm (and whether
there is one), the latest categories as one column for each declared value and one for all others; what is `per`
another memory by its share of that one. Rings and tallies say nothing by themselves. One function for worker and
trainer; a row's features do not depend on the other rows of the call.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stream.model.layout import Layout
from stream.model.values import FieldValues, ValueTables
from stream.settings import STATE, Memory, Task
from stream.wire import EventColumns

__all__ = ["Readout", "TaskInputs", "group_names"]


class Readout:
    """Features of rows.

    `names` (F,) names each feature, the memory's by the memory's name; `is_state` (F,) is true of those that say
    something only together: hidden state and sketches; `is_number` (F,) of counts, sums, times and other numbers that
    each say something alone, and not of yes or no.
    """

    def __init__(self, layout: Layout) -> None:
        self._hidden = layout.hidden
        names = [f"{STATE}[{i}]" for i in range(layout.hidden)]
        numbers: set[str] = set()
        statistics: list[int] = []
        shares: list[tuple[int, int]] = []
        place = {operation.memory.name: operation for operation in layout.operations}
        self._sketches: list[slice] = []
        times: list[int] = []
        for operation in layout.operations:
            if operation.is_statistic:
                if operation.memory.per is not None:
                    whole = place[operation.memory.per].start
                    shares += [(len(statistics) + at, whole) for at in range(operation.slots)]
                statistics += range(operation.start, operation.start + operation.slots)
                names += _slot_names(layout, operation.memory.name, operation.memory.by, operation.memory.modality)
        numbers.update(names[layout.hidden :])
        for operation in layout.operations:
            if operation.memory.kind == "sketch":
                self._sketches.append(slice(operation.start, operation.start + operation.slots))
                names += [f"{operation.memory.name}[{i}]" for i in range(operation.slots)]
        for operation in layout.operations:
            if operation.memory.is_time:
                times += range(operation.start, operation.start + 2 * operation.slots, 2)
                slots = _slot_names(layout, operation.memory.name, operation.memory.by, operation.memory.modality)
                names += [f"{slot}.{part}" for slot in slots for part in ("hours", "seen")]
                numbers.update(f"{slot}.hours" for slot in slots)
        self._latest: list[tuple[slice, int]] = []
        for operation in layout.operations:
            if operation.memory.kind == "last":
                values = _values(layout, operation.memory)
                self._latest.append((slice(operation.start, operation.start + operation.slots), len(values)))
                parts = values or ("value", "seen")
                kept = range(1, operation.memory.size + 1)
                names += [f"{operation.memory.name}[{at}].{part}" for at in kept for part in parts]
                numbers.update(f"{operation.memory.name}[{at}].value" for at in kept if not values)
        self._statistics = np.array(statistics, np.int64)
        self._shares, self._wholes = np.array(shares, np.int64).reshape(-1, 2).T
        self._times = np.array(times, np.int64)
        self.names = tuple(names)
        self.is_state = np.zeros(len(names), np.bool_)
        self.is_state[: layout.hidden] = True
        self.is_number = np.array([name in numbers for name in names])
        sketched = layout.hidden + len(statistics)
        self.is_state[sketched : sketched + sum(where.stop - where.start for where in self._sketches)] = True

    @property
    def width(self) -> int:
        """Number of features."""
        return len(self.names)

    def features(
        self, hidden: NDArray[np.float32], memory: NDArray[np.float32], now_ms: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """(k, F) features of k rows.

        Parameters
        ----------
        hidden: (k, H); memory: (k, M), as of `now_ms` (k,), the time of each row's last event.
        """
        parts = [hidden]
        statistics = memory[:, self._statistics]
        if len(self._shares):
            whole = memory[:, self._wholes]
            parts_of = statistics[:, self._shares]
            statistics[:, self._shares] = np.divide(parts_of, whole, out=np.zeros_like(whole), where=whole > 0)
        parts.append(np.copysign(np.log1p(np.abs(statistics)), statistics))
        for where in self._sketches:
            sketch = memory[:, where]
            length = np.sqrt(np.square(sketch, dtype=np.float64).sum(axis=1, keepdims=True))
            parts.append((sketch / np.maximum(length, 1e-6)).astype(np.float32))
        if len(self._times):
            high = memory[:, self._times].astype(np.float64)
            time_ms = high * 2.0**24 + memory[:, self._times + 1]
            seen = time_ms > 0
            hours = np.where(seen, np.maximum(now_ms[:, None] - time_ms, 0.0) / 3_600_000.0, 0.0)
            pairs = np.stack([np.log1p(hours), seen], axis=2).astype(np.float32)
            parts.append(pairs.reshape(len(memory), 2 * pairs.shape[1]))
        for where, values in self._latest:
            kept = memory[:, where]
            if values:
                parts.append(
                    (kept[:, :, None] == np.arange(1, values + 1)).reshape(len(memory), values * kept.shape[1])
                )
            else:
                numbers, count = kept[:, :-1], kept[:, -1:]
                there = np.arange(numbers.shape[1]) < count
                pairs = np.stack([np.copysign(np.log1p(np.abs(numbers)), numbers), there], axis=2)
                parts.append(pairs.reshape(len(memory), 2 * pairs.shape[1]))
        return np.concatenate(parts, axis=1).astype(np.float32, copy=False)


def group_names(names: Sequence[str]) -> NDArray[np.str_]:
    """(F,) the group of each input of a head: what is before the first bracket, point or equals sign of its name.

    That is the name of a memory or of a field of the event, or `hidden`.
    """
    return np.array([re.split(r"[\[.=]", name, maxsplit=1)[0] for name in names])


def _values(layout: Layout, memory: Memory) -> tuple[str, ...]:
    """What the latest categories of a memory are told apart by; nothing where it keeps numbers."""
    assert memory.field is not None
    field = layout.settings.modalities[memory.modality].fields[memory.field]
    return () if field.type == "number" else (*field.values, "other")


def _slot_names(layout: Layout, name: str, by: str | None, modality: str) -> list[str]:
    if by is None:
        return [name]
    values = layout.settings.modalities[modality].fields[by].values
    return [f"{name}[{value}]" for value in (*values, "other")]


class CategoryCodes:
    """Which of its declared values a category field of one modality has."""

    def __init__(self, layout: Layout, modality: str, field: str) -> None:
        compiled = layout.schema.by_name[modality]
        values = [value.encode() for value in layout.settings.modalities[modality].fields[field].values]
        self._size = len(values)
        own = FieldValues(compiled.index, compiled.category_fields[field], values, 0)
        self._table = ValueTables([own], len(layout.schema.modalities), first=0, missing=-1)

    def __len__(self) -> int:
        return self._size

    def of(self, columns: EventColumns) -> NDArray[np.int32]:
        """(n,) index of each event's value; -1 for other values, absent fields and other modalities."""
        return self._table.codes(columns, 1)[:, 0]


class TaskInputs:
    """What a task's head sees of the event that asks for the prediction: the fields named in `inputs`.

    A number is read through a signed logarithm, a category as one column for each declared value; `is_number` says
    which is which.
    """

    def __init__(self, layout: Layout, task: Task) -> None:
        modality = layout.schema.by_name[task.on]
        self._modality = modality.index
        fields = layout.settings.modalities[task.on].fields
        self._numbers = [(modality.number_fields[n]) for n in task.inputs if fields[n].type == "number"]
        self._categories = [CategoryCodes(layout, task.on, n) for n in task.inputs if fields[n].type == "category"]
        self.names = (
            *(n for n in task.inputs if fields[n].type == "number"),
            *(f"{n}={v}" for n in task.inputs if fields[n].type == "category" for v in fields[n].values),
        )
        self.is_number = np.arange(len(self.names)) < len(self._numbers)

    def values(self, columns: EventColumns, event: NDArray[np.int64]) -> NDArray[np.float32]:
        """(k, inputs) for the events at indices `event` (k,) of the batch; absent fields are zero."""
        parts: list[NDArray[np.float32]] = []
        if self._numbers:
            numbers = np.nan_to_num(columns.numbers[event][:, self._numbers], nan=0.0)
            parts.append(np.copysign(np.log1p(np.abs(numbers)), numbers).astype(np.float32))
        for category in self._categories:
            parts.append((category.of(columns)[event][:, None] == np.arange(len(category))).astype(np.float32))
        if not parts:
            return np.zeros((len(event), 0), np.float32)
        return np.concatenate(parts, axis=1)
