"""What every task asks at its events, and the heads that answer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stream.errors import ParametersError
from stream.model.candidates import Matches
from stream.model.engine import Triggers
from stream.model.heads.categories import CategoryKeys
from stream.model.heads.head import Head, output_names, part_names
from stream.model.heads.trees import lightgbm
from stream.model.layout import Layout
from stream.model.parameters import ParameterSet
from stream.model.readout import CategoryCodes, Readout, TaskInputs, group_names
from stream.store import PackedKeys
from stream.wire import EventColumns

__all__ = ["Questions", "TaskQuestion"]


class TaskQuestion:
    """What one task asks at its events: which triggers are its own and what its head sees there."""

    def __init__(self, layout: Layout, readout: Readout, task: str) -> None:
        self.settings = layout.settings.tasks[task]
        self.task = task
        self._modality = layout.schema.by_name[self.settings.on].index
        self._inputs = TaskInputs(layout, self.settings)
        by = self.settings.final_by
        self._strata = None if by is None else CategoryCodes(layout, self.settings.on, by)
        self._matches = Matches(layout, self.settings)
        self._readout = readout
        of_event = (*self._inputs.names, *self._matches.names)
        self.names = (*readout.names, *of_event)
        #: (F,) which inputs are hidden state or sketch.
        self.is_state = np.concatenate([readout.is_state, np.zeros(len(of_event), np.bool_)])
        #: (F,) which of them are numbers that say something alone; see `Readout`.
        self.is_number = np.concatenate(
            [readout.is_number, self._inputs.is_number, np.ones(len(self._matches.names), np.bool_)]
        )
        #: (F,) the group of each one; see `group_names`.
        self.groups = group_names(self.names)
        #: How its predictions are called on the embeddings topic and over HTTP.
        self.outputs = output_names(task, self.settings)
        self._before: Head | None = None
        self._keys = CategoryKeys(layout, self.settings)

    @property
    def width(self) -> int:
        """Number of the head's inputs, F."""
        return len(self.names)

    @property
    def strata(self) -> int:
        """How many kinds of delays are told apart: values of `final_by`, and all others."""
        return 1 if self._strata is None else len(self._strata) + 1

    def strata_of(self, columns: EventColumns, event: NDArray[np.int64]) -> NDArray[np.int64]:
        """(k,) which of them the events at indices `event` (k,) of the batch belong to."""
        if self._strata is None:
            return np.zeros(len(event), np.int64)
        codes = self._strata.of(columns)[event].astype(np.int64)
        return np.where(codes < 0, len(self._strata), codes)

    def ask(self, columns: EventColumns, triggers: Triggers) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Indices (k,) into the triggers that this task predicts at, and the head's inputs (k, F) there."""
        own = np.flatnonzero(columns.modality[triggers.event] == self._modality)
        event = triggers.event[own]
        memory = triggers.memory[own]
        features = self._readout.features(triggers.hidden[own], memory, columns.timestamp_ms[event])
        matches = self._matches.values(columns, event, memory)
        return own, np.concatenate([features, self._inputs.values(columns, event), matches], axis=1)

    def keys(self, columns: EventColumns, event: NDArray[np.int64]) -> list[PackedKeys]:
        """For each of the task's tables, the keys (k,) of the rows that its head reads at these events (k,)."""
        return self._keys.of(columns, event)

    def head(self, parameters: ParameterSet) -> Head | None:
        """The head that these parameters hold; None where they hold none yet.

        Raises
        ------
        ParametersError: a tensor does not fit the settings.
        """
        head = Head(self.task, self.settings, parameters, self.is_number, self._before)
        self._before = head
        return head if head.parts else None


class Questions:
    """All tasks of a layout, in the order of the settings.

    Raises
    ------
    SettingsError: a task's head needs a package that is not installed.
    """

    def __init__(self, layout: Layout) -> None:
        for task, settings in layout.settings.tasks.items():
            if "gbdt" in settings.parts:
                lightgbm(f"tasks.{task}.head")
        self.readout = Readout(layout)
        self.tasks = tuple(TaskQuestion(layout, self.readout, name) for name in layout.settings.tasks)
        self.by_task = {question.task: question for question in self.tasks}
        #: The names of all predictions, in the order of their columns.
        self.outputs = tuple(name for question in self.tasks for name in question.outputs)

    def heads(self, parameters: ParameterSet) -> dict[str, Head]:
        """The heads that these parameters hold; a task without one has no prediction yet.

        Raises
        ------
        ParametersError: a tensor does not fit the settings.
        """
        found = {question.task: question.head(parameters) for question in self.tasks}
        return {task: head for task, head in found.items() if head is not None}

    def unfit(self, parameters: ParameterSet) -> frozenset[str]:
        """Names of tensors of heads that the settings no longer have, or have with other inputs or outputs."""
        fit: set[str] = set()
        for question in self.tasks:
            try:
                question.head(parameters)
            except ParametersError:
                continue
            fit.update(*(part_names(question.task, part) for part in question.settings.parts))
        return frozenset(name for name in parameters if name.startswith("head/") and name not in fit)

    def predict(self, heads: dict[str, Head], columns: EventColumns, triggers: Triggers) -> NDArray[np.float32]:
        """(triggers, outputs) predictions; NaN where a task does not ask or has no head yet."""
        out = np.full((len(triggers.event), len(self.outputs)), np.nan, np.float32)
        column = 0
        for question in self.tasks:
            until = column + len(question.outputs)
            head = heads.get(question.task)
            if head is not None and len(triggers.event):
                own, inputs = question.ask(columns, triggers)
                keys = question.keys(columns, triggers.event[own])
                out[own, column:until] = head.predict(inputs, keys)
            column = until
        return out
