"""What a row and an encoded event look like, compiled once from the settings.

A row is `hidden` floats of recurrent state followed by `memory` floats. The memory is ordered so that everything
that decays at one half-life lies together (one multiply over a range for each half-life), then what does not
decay, then times. A time is kept in two float32 values, `high * 2**24 + low` milliseconds, both exact; (0, 0)
means never.

A `tally` is two rows of bins, and a value counts in one bin of each. What keeps the latest values has the newest first.
A `ring` keeps two floats a value, 24 bits of its hash each and (0, 0) where there is none yet. A `top` keeps counts,
which may decay, and behind what does not decay the same two floats for each of them. A `last` of a category
keeps 1 + the value's number, one more than declared for any other, 0 for none yet; a `last` of a number the numbers,
and behind them how many there are.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import fields
from numpy.typing import NDArray

from stream.settings import Memory, Settings
from stream.wire import ModalitySchema, Schema

__all__ = ["EmbeddedField", "Layout", "Operation", "OperationTable"]

#: Operation kinds as the kernel knows them.
COUNT, SUM, VISITS, LAST_TIME, SKETCH, FIRST_TIME, LAST_NUMBER, LAST_CATEGORY, RING, TALLY, TOP = range(11)
_KINDS = {
    "count": COUNT,
    "sum": SUM,
    "visits": VISITS,
    "first_time": FIRST_TIME,
    "last_time": LAST_TIME,
    "ring": RING,
    "top": TOP,
    "tally": TALLY,
    "sketch": SKETCH,
}
#: Condition kinds as the kernel knows them.
ALWAYS, ABOVE, BELOW, EQUALS = range(4)

#: Time inputs of the encoder: log time since the last event, first event, and sine and cosine of hour and weekday.
TIME_INPUTS = 6


@dataclass(frozen=True)
class EmbeddedField:
    """A category field that the encoder reads through a learned table of `width` columns."""

    modality: int
    column: int
    name: str
    width: int
    min_count: int


@dataclass(frozen=True)
class Operation:
    """One memory of the settings and where its floats lie; of a `top` its counts, and at `time_start` their values."""

    memory: Memory
    start: int
    slots: int
    time_start: int

    @property
    def is_statistic(self) -> bool:
        """True for counts, sums and visits: non-sketch floats that are read through a logarithm."""
        return self.memory.kind in ("count", "sum", "visits")


@dataclass(frozen=True)
class OperationTable:
    """The operations as arrays for the kernel, those of modality m at `first[m]:first[m + 1]`."""

    first: NDArray[np.int32]
    integers: NDArray[np.int32]  # (operations, 10): see `_table`
    constants: NDArray[np.float64]  # (operations, 3): condition's bound, half-life in ms (inf: none), gap in ms
    decay_half_life_ms: NDArray[np.float64]  # of each decaying range
    decay_bounds: NDArray[np.int32]  # (ranges + 1,), offsets in the memory


@dataclass(frozen=True)
class Layout:
    """Row and input layout of one settings file."""

    settings: Settings
    schema: Schema
    hidden: int
    operations: tuple[Operation, ...]
    memory: int
    embedded: tuple[EmbeddedField, ...]
    #: Input column of each (modality, number column), -1 where the encoder does not read it.
    number_inputs: NDArray[np.int32]
    dense_inputs: int
    numbers: int
    table: OperationTable
    #: For each (modality, category column): the declared values, `values` of the field first.
    declared: dict[tuple[int, int], tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def compile(cls, settings: Settings, schema: Schema) -> Layout:
        """Lay out rows and inputs for these settings."""
        operations, memory = _place(settings)
        embedded = [
            EmbeddedField(m.index, m.category_fields[name], f"{m.name}.{name}", f.embedding, f.min_count)
            for m in schema.modalities
            for name, f in settings.modalities[m.name].fields.items()
            if f.type == "category" and f.embedding
        ]
        modalities = len(schema.modalities)
        number_inputs = np.full((modalities, max(1, schema.max_numbers)), -1, np.int32)
        column = modalities
        for m in schema.modalities:
            for name, f in settings.modalities[m.name].fields.items():
                if f.type == "number" and f.encode:
                    number_inputs[m.index, m.number_fields[name]] = column
                    column += 1
        numbers = column - modalities
        declared = _declared(settings, schema)
        return cls(
            settings=settings,
            schema=schema,
            hidden=settings.model.hidden,
            operations=operations,
            memory=memory,
            embedded=tuple(embedded),
            number_inputs=number_inputs,
            dense_inputs=column + TIME_INPUTS,
            numbers=numbers,
            table=_table(operations, settings, schema, declared),
            declared=declared,
        )

    @property
    def width(self) -> int:
        """Floats in a row."""
        return self.hidden + self.memory

    @property
    def inputs(self) -> int:
        """Width of an encoded event."""
        return self.dense_inputs + sum(f.width for f in self.embedded)

    @property
    def fingerprint(self) -> str:
        """Changes whenever rows of the old and the new layout could not be exchanged."""
        parts = [str(self.hidden), str(self.inputs)]
        parts += [f"{_described(o.memory)}@{o.start}+{o.slots}" for o in self.operations]
        parts += [f"{key}:{values}" for key, values in sorted(self.declared.items())]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def _described(memory: Memory) -> str:
    """The settings of a memory that are not left at their defaults: a new setting changes no fingerprint."""
    given = {f.name: getattr(memory, f.name) for f in fields(memory)}
    return repr({f.name: given[f.name] for f in fields(memory) if f.required or given[f.name] != f.default})


def _slots(settings: Settings, memory: Memory) -> int:
    """Values it keeps; a time is one, of two floats."""
    if memory.kind == "sketch":
        return memory.dimensions
    if memory.kind == "ring":
        return 2 * memory.size
    if memory.kind == "top":
        return memory.size
    if memory.kind == "tally":
        return 2 * memory.dimensions
    declared = settings.modalities[memory.modality].fields
    if memory.kind == "last":
        assert memory.field is not None
        return memory.size + (declared[memory.field].type == "number")
    return 1 if memory.by is None else len(declared[memory.by].values) + 1


def _place(settings: Settings) -> tuple[tuple[Operation, ...], int]:
    """Give every memory its place: decaying ones by half-life, then plain ones, then times."""
    order = sorted(settings.memory, key=lambda m: (m.is_time, m.half_life_s is None, m.half_life_s or 0.0))
    starts: dict[str, int] = {}
    at = 0
    for memory in order:
        starts[memory.name] = at
        if not memory.is_time:
            at += _slots(settings, memory)
    times: dict[str, int] = {}
    for memory in order:
        times[memory.name] = at
        if memory.is_time:
            at += 2 * _slots(settings, memory)
        elif memory.kind == "visits":
            at += 2
        elif memory.kind == "top":
            at += 2 * memory.size
    operations = []
    for memory in settings.memory:
        start = times[memory.name] if memory.is_time else starts[memory.name]
        operations.append(Operation(memory, start, _slots(settings, memory), times[memory.name]))
    return tuple(operations), at


def _declared(settings: Settings, schema: Schema) -> dict[tuple[int, int], tuple[str, ...]]:
    declared: dict[tuple[int, int], list[str]] = {}
    for m in schema.modalities:
        for name, f in settings.modalities[m.name].fields.items():
            if f.type == "category" and f.values:
                declared[m.index, m.category_fields[name]] = list(f.values)
    for memory in settings.memory:
        if memory.where is not None and memory.where.equals is not None:
            modality = _modality(schema, memory.modality)
            values = declared.setdefault((modality.index, modality.category_fields[memory.where.field]), [])
            if memory.where.equals not in values:
                values.append(memory.where.equals)
    return {key: tuple(values) for key, values in declared.items()}


def _modality(schema: Schema, name: str) -> ModalitySchema:
    return next(m for m in schema.modalities if m.name == name)


def _table(
    operations: tuple[Operation, ...],
    settings: Settings,
    schema: Schema,
    declared: dict[tuple[int, int], tuple[str, ...]],
) -> OperationTable:
    """Columns of `integers`: kind, start, slots, time start, number column, category column, slot column, the
    condition's kind and column, and the number of declared values of a category whose latest are kept. A condition on
    a category is bound to the index of its declared value."""
    rows: list[list[int]] = []
    constants: list[list[float]] = []
    first = [0]
    for m in schema.modalities:
        for o in operations:
            memory = o.memory
            if memory.modality != m.name:
                continue
            number = -1 if memory.field is None else m.number_fields.get(memory.field, -1)
            category = -1 if memory.field is None else m.category_fields.get(memory.field, -1)
            kind = _KINDS.get(memory.kind, LAST_NUMBER if number >= 0 else LAST_CATEGORY)
            by = m.category_fields[memory.by] if memory.by else -1
            condition, column, threshold = ALWAYS, -1, 0.0
            where = memory.where
            if where is not None and where.above is not None:
                condition, column, threshold = ABOVE, m.number_fields[where.field], where.above
            elif where is not None and where.below is not None:
                condition, column, threshold = BELOW, m.number_fields[where.field], where.below
            elif where is not None and where.equals is not None:
                column = m.category_fields[where.field]
                condition, threshold = EQUALS, float(declared[m.index, column].index(where.equals))
            other = (
                len(settings.modalities[m.name].fields[memory.field].values)
                if kind == LAST_CATEGORY and memory.field
                else 0
            )
            rows.append([kind, o.start, o.slots, o.time_start, number, category, by, condition, column, other])
            half_life_ms = np.inf if memory.half_life_s is None else memory.half_life_s * 1000.0
            constants.append([threshold, half_life_ms, memory.gap_s * 1000.0])
        first.append(len(rows))
    decaying = sorted((o for o in operations if o.memory.half_life_s is not None), key=lambda o: o.start)
    decay: list[float] = []
    bounds: list[int] = [0]
    for o in decaying:
        half_life = (o.memory.half_life_s or 0.0) * 1000.0
        if not decay or decay[-1] != half_life:
            decay.append(half_life)
            bounds.append(o.start + o.slots)
        bounds[-1] = o.start + o.slots
    return OperationTable(
        first=np.array(first, np.int32),
        integers=np.array(rows, np.int32).reshape(-1, 10),
        constants=np.array(constants, np.float64).reshape(-1, 3),
        decay_half_life_ms=np.array(decay, np.float64),
        decay_bounds=np.array(bounds, np.int32),
    )
