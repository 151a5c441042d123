"""One micro-batch: decoded events in, rows advanced in place.

Guaranteed: the rows after a batch equal, bit for bit, the rows after the same events one at a time; an event at
or below its row's `applied_offset` changes nothing. Not guaranteed: thread safety; one engine belongs to one
thread.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stream.errors import ParametersError
from stream.model import kernels
from stream.model.cell import Cell
from stream.model.layout import Layout
from stream.model.parameters import ParameterSet, Tensor
from stream.model.values import FieldValues, ValueTables
from stream.wire import EventColumns

__all__ = ["Advanced", "Encoded", "Engine", "Rows", "Triggers"]


class Rows(Protocol):
    """Arrays of rows, addressed by slot; the embedding store is one."""

    @property
    def vectors(self) -> NDArray[np.float32]: ...
    @property
    def events_seen(self) -> NDArray[np.int64]: ...
    @property
    def last_event_ms(self) -> NDArray[np.int64]: ...
    @property
    def applied_offset(self) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class Triggers:
    """Rows as they were right after the events that ask for a prediction.

    `event` (k,): index in the batch; `events_seen` (k,) by the client up to it; `hidden` (k, H); `memory` (k, M).
    """

    event: NDArray[np.int64]
    events_seen: NDArray[np.int64]
    hidden: NDArray[np.float32]
    memory: NDArray[np.float32]


@dataclass(frozen=True)
class Advanced:
    """What a batch did: `slots` (u,) of the rows that changed, `last_event` (u,) the index of the last event of
    each, `events` applied, `waves` run, the triggers, the batch as it was encoded, and `hidden` (u, H), the states of
    the rows after it."""

    slots: NDArray[np.int64]
    last_event: NDArray[np.int64]
    events: int
    waves: int
    triggers: Triggers
    encoded: Encoded
    hidden: NDArray[np.float32]


@dataclass(frozen=True)
class Encoded:
    """A batch in wave order before the learned part: `dense` (events, dense inputs), the first columns of `inputs`,
    which has room for what is learned; `codes` (n, fields) row of each embedded field per event of the batch, -1
    absent; `position` (n,) row in wave order, -1 skipped, and `event_at` (events,) its inverse."""

    position: NDArray[np.int64]
    event_at: NDArray[np.int64]
    slots: NDArray[np.int64]
    last: NDArray[np.int64]
    starts: NDArray[np.int64]
    events: int
    inputs: NDArray[np.float32]
    dense: NDArray[np.float32]
    codes: NDArray[np.int32]
    trigger_event: NDArray[np.int64]
    trigger_seen: NDArray[np.int64]
    trigger_memory: NDArray[np.float32]


class Engine:
    """Advances rows under one trunk.

    Parameters
    ----------
    layout: of the settings.
    parameters: a set whose trunk fits the layout.

    Raises
    ------
    ParametersError: a tensor is missing or of another shape than the layout describes.
    """

    def __init__(self, layout: Layout, parameters: ParameterSet) -> None:
        self.layout = layout
        self.parameters = parameters
        self.trunk_id = parameters.trunk_id
        self.cell = Cell(parameters, layout.inputs, layout.hidden)
        self._scale = np.array(parameters["trunk/scale"], np.float64)
        if self._scale.shape != (2, layout.numbers):
            raise ParametersError(
                f"tensor 'trunk/scale' has shape {self._scale.shape}: the settings describe {(2, layout.numbers)}"
            )
        values: list[list[bytes]] = []
        tables: list[NDArray[np.float32]] = []
        for f in layout.embedded:
            table = parameters[f"trunk/embedding/{f.name}"]
            own = _unpack_values(parameters, f.name)
            if table.shape != (len(own) + 1, f.width):
                raise ParametersError(
                    f"tensor 'trunk/embedding/{f.name}' has shape {table.shape}: "
                    f"its {len(own)} values and the settings describe {(len(own) + 1, f.width)}"
                )
            values.append(own)
            tables.append(np.asarray(table, np.float32).reshape(-1))
        self._tables = np.concatenate([*tables, np.zeros(1, np.float32)])
        widths = [f.width for f in layout.embedded]
        self._table_start = np.concatenate([[0], np.cumsum([t.size for t in tables])]).astype(np.int64)
        self._table_width = np.array(widths, np.int64)
        self._table_column = (layout.dense_inputs + np.concatenate([[0], np.cumsum(widths)])).astype(np.int64)
        self._encoder = EventEncoder(layout, values, self._scale, layout.inputs)

    def advance(self, columns: EventColumns, slots: NDArray[np.int64], rows: Rows) -> Advanced:
        """Apply the accepted events of a batch, in offset order, to their rows."""
        advanced = self.prepare(columns, slots, rows)
        self.settle(advanced, rows)
        return advanced

    def prepare(self, columns: EventColumns, slots: NDArray[np.int64], rows: Rows) -> Advanced:
        """As `advance`, but for the hidden states of the rows, which `settle` writes.

        Parameters
        ----------
        columns: n decoded events of one partition, offsets rising.
        slots: (n,) row of each event's client, -1 to leave the event out.
        rows: changed in place.
        """
        layout = self.layout
        encoded = self._encoder.encode(columns, slots, rows)
        events = encoded.events
        if events == 0:
            nothing = np.empty(0, np.int64)
            empty = Triggers(nothing, nothing, np.empty((0, layout.hidden), np.float32), encoded.trigger_memory)
            return Advanced(nothing, nothing, 0, 0, empty, encoded, empty.hidden)
        asked = encoded.position[encoded.trigger_event]
        order = np.argsort(asked)
        hidden, kept = self._run(
            encoded.event_at, encoded.inputs, encoded.codes, encoded.starts, rows.vectors, encoded.slots, asked[order]
        )
        at_triggers = np.empty_like(kept)
        at_triggers[order] = kept
        return Advanced(
            slots=encoded.slots,
            last_event=encoded.event_at[encoded.last],
            events=events,
            waves=len(encoded.starts) - 1,
            triggers=Triggers(encoded.trigger_event, encoded.trigger_seen, at_triggers, encoded.trigger_memory),
            encoded=encoded,
            hidden=hidden,
        )

    def settle(self, advanced: Advanced, rows: Rows) -> None:
        """Write the hidden states of what was prepared last; nothing in it can fail."""
        kernels.scatter_hidden(advanced.hidden, advanced.slots, rows.vectors)

    def step(
        self,
        dense: NDArray[np.float32],
        codes: NDArray[np.int32],
        starts: NDArray[np.int64],
        first: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """(clients, H) states after n encoded events in wave order; the same bits that `advance` gave them.

        Parameters
        ----------
        dense: (n, dense inputs).
        codes: (n, fields), -1 absent.
        starts: (waves + 1,) first event of each wave; a wave has at most as many as the one before.
        first: (clients, H) states before the first wave, in its order.
        """
        inputs = np.empty((len(dense), self.layout.inputs), np.float32)
        inputs[:, : self.layout.dense_inputs] = dense
        place, clients = np.arange(len(dense)), np.arange(len(first))
        none = np.empty(0, np.int64)
        return self._run(place, inputs, codes, starts, first, clients, none)[0]

    def _run(
        self,
        event_at: NDArray[np.int64],
        inputs: NDArray[np.float32],
        codes: NDArray[np.int32],
        starts: NDArray[np.int64],
        before: NDArray[np.float32],
        slots: NDArray[np.int64],
        kept: NDArray[np.int64],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Put the learned part of the inputs beside the dense one, and run the cell; see `Cell.run`."""
        kernels.assemble(
            event_at, codes, self._tables, self._table_start, self._table_width, self._table_column, inputs
        )
        return self.cell.run(inputs, starts, before, slots, kept)

    def moved(self, parameters: ParameterSet) -> Engine:
        """The engine of a later version of the same online trunk; this one where the trunk has not moved.

        Raises
        ------
        ParametersError: what may not change between versions of one trunk is another: values, scales, shapes.
        """
        before = self.parameters
        names = [name for name in (*before, *parameters) if name.startswith("trunk/")]
        other = [n for n in names if n not in before or n not in parameters or not _same(before[n], parameters[n])]
        if not other:
            return self
        for name in other:
            learned = name.startswith(("trunk/weight", "trunk/bias", "trunk/embedding/"))
            if not learned or name not in parameters or before[name].shape != parameters[name].shape:
                raise ParametersError(
                    f"tensor {name!r} of version {parameters.version} differs from version {before.version}'s in more "
                    f"than what is learned, but both have trunk {self.trunk_id}: bring it in with `livestate rebuild`"
                )
        engine = copy.copy(self)
        engine.parameters = parameters
        engine.cell = Cell(parameters, self.layout.inputs, self.layout.hidden)
        tables = [parameters[f"trunk/embedding/{f.name}"].reshape(-1) for f in self.layout.embedded]
        engine._tables = np.concatenate([*tables, np.zeros(1, np.float32)]).astype(np.float32, copy=False)
        return engine


class EventEncoder:
    """Plans a batch, advances memory and metadata, and writes the encoder's inputs short of the learned tables.

    Training uses it directly, so that what is trained is what is served.

    Parameters
    ----------
    values: of each embedded field. scale: (2, numbers).
    width: columns to make for each event, the dense inputs first; no more than these by default.
    """

    def __init__(
        self, layout: Layout, values: Sequence[Sequence[bytes]], scale: NDArray[np.float64], width: int | None = None
    ) -> None:
        self._layout = layout
        self._width = width or layout.dense_inputs
        self._scale = scale
        modalities = len(layout.schema.modalities)
        embedded = zip(layout.embedded, values, strict=True)
        # Row 0 is the field's `rare` row; values follow it.
        self._embedded = ValueTables(
            [FieldValues(f.modality, f.column, own, number) for number, (f, own) in enumerate(embedded)],
            modalities, first=1, missing=0,
        )  # fmt: skip
        self._declared = ValueTables(
            [
                FieldValues(modality, column, [value.encode() for value in own], column)
                for (modality, column), own in layout.declared.items()
            ],
            modalities, first=0, missing=-1,
        )  # fmt: skip
        self._is_trigger = np.zeros(modalities, np.bool_)
        for m in layout.schema.modalities:
            self._is_trigger[m.index] = any(task.on == m.name for task in layout.settings.tasks.values())
        self._any_trigger = bool(self._is_trigger.any())
        self._counts = np.zeros(0, np.int32)
        self._rank = np.zeros(0, np.int64)

    def encode(self, columns: EventColumns, slots: NDArray[np.int64], rows: Rows) -> Encoded:
        """Advance everything but the hidden state; see `Engine.advance` for the parameters."""
        layout, n = self._layout, len(slots)
        capacity = rows.vectors.shape[0]
        if len(self._counts) < capacity:
            self._counts = np.zeros(capacity, np.int32)
            self._rank = np.zeros(capacity, np.int64)
        position = np.empty(n, np.int64)
        event_at = np.empty(n, np.int64)
        unique = np.empty(n, np.int64)
        clients, events, starts, last = kernels.plan(
            slots,
            columns.accepted,
            columns.offsets,
            rows.applied_offset,
            self._counts,
            position,
            event_at,
            unique,
            self._rank,
        )
        declared = self._declared.codes(columns, max(1, layout.schema.max_categories))
        codes = self._embedded.codes(columns, len(layout.embedded))
        triggers = int(self._is_trigger[columns.modality[position >= 0]].sum()) if self._any_trigger else 0
        trigger_event = np.empty(triggers, np.int64)
        trigger_seen = np.empty(triggers, np.int64)
        trigger_memory = np.empty((triggers, layout.memory), np.float32)
        inputs = np.empty((events, self._width), np.float32)
        program = layout.table
        kernels.advance(
            slots, position, columns.offsets, columns.timestamp_ms, columns.modality, columns.numbers,
            columns.category_hash, columns.category_length, declared,
            rows.vectors, layout.hidden, rows.events_seen, rows.last_event_ms, rows.applied_offset,
            program.first, program.integers, program.constants, program.decay_half_life_ms, program.decay_bounds,
            layout.number_inputs, self._scale, layout.dense_inputs, inputs, self._is_trigger,
            trigger_event, trigger_seen, trigger_memory, len(layout.schema.modalities),
        )  # fmt: skip
        return Encoded(
            position,
            event_at[:events],
            unique[:clients].copy(),
            last,
            starts,
            events,
            inputs,
            inputs[:, : layout.dense_inputs],
            codes,
            trigger_event,
            trigger_seen,
            trigger_memory,
        )


def _same(old: Tensor, new: Tensor) -> bool:
    return old is new or (old.dtype == new.dtype and np.array_equal(old, new))


def _unpack_values(parameters: ParameterSet, name: str) -> list[bytes]:
    data = parameters[f"trunk/values/{name}"].tobytes()
    offsets = parameters[f"trunk/value_offsets/{name}"].tolist()
    return [data[a:b] for a, b in itertools.pairwise(offsets)]


def pack_values(name: str, values: list[bytes]) -> dict[str, NDArray[np.uint8] | NDArray[np.int64]]:
    """The two tensors that hold a field's values in the order of their rows (row 1 is the first value)."""
    return {
        f"trunk/values/{name}": np.frombuffer(b"".join(values), np.uint8),
        f"trunk/value_offsets/{name}": np.concatenate([[0], np.cumsum([len(v) for v in values])]).astype(np.int64),
    }
