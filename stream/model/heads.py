"""Heads: what turns a row's features into the prediction of a task.

A `logistic` head standardises its inputs, clips them and applies one weight each. Until the trainer has
published it, a task has no prediction.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stream.errors import ParametersError
from stream.model.engine import Triggers
from stream.model.layout import Layout
from stream.model.parameters import ParameterSet
from stream.model.readout import CategoryCodes, Readout, TaskInputs
from stream.wire import EventColumns

__all__ = ["CLIP", "LogisticHead", "Questions", "TaskQuestion", "head_tensors", "sigmoid", "standardise"]

#: Standardised inputs are kept within this many standard deviations.
CLIP = 6.0


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logistic function, without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def standardise(
    inputs: NDArray[np.float32], center: NDArray[np.float64], scale: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(k, F) inputs around their center, in units of their scale, clipped, and a last column of ones."""
    scaled = np.clip((inputs - center) / scale, -CLIP, CLIP)
    return np.concatenate([scaled, np.ones((len(inputs), 1))], axis=1)


class LogisticHead:
    """Serves `head/{task}/center`, `/scale` (F,) and `/weight` (F + 1,), the last one the bias."""

    def __init__(self, task: str, parameters: ParameterSet, width: int) -> None:
        self._center = parameters[f"head/{task}/center"]
        self._scale = parameters[f"head/{task}/scale"]
        self._weight = parameters[f"head/{task}/weight"]
        for name, tensor, expected in (
            ("center", self._center, (width,)),
            ("scale", self._scale, (width,)),
            ("weight", self._weight, (width + 1,)),
        ):
            if tensor.shape != expected:
                raise ParametersError(
                    f"tensor 'head/{task}/{name}' has shape {tensor.shape}: the settings describe {expected}"
                )

    def predict(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """(k,) probabilities for (k, F) inputs."""
        logits = standardise(inputs, self._center, self._scale) @ self._weight
        return sigmoid(logits).astype(np.float32)

    def predict_typical(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """(k,) probabilities for rows with features (k, R), as if an event came now with fields like the average one's.

        What a head sees of the event is the rest of its inputs, which are zero where they are at their center.
        """
        rows = features.shape[1]
        logits = standardise(features, self._center[:rows], self._scale[:rows]) @ np.append(
            self._weight[:rows], self._weight[-1]
        )
        return sigmoid(logits).astype(np.float32)


def head_tensors(
    task: str, center: NDArray[np.float64], scale: NDArray[np.float64], weight: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """The tensors that `LogisticHead` serves."""
    return {f"head/{task}/center": center, f"head/{task}/scale": scale, f"head/{task}/weight": weight}


class TaskQuestion:
    """What one task asks at its events: which triggers are its own and what its head sees there."""

    def __init__(self, layout: Layout, readout: Readout, task: str) -> None:
        settings = layout.settings.tasks[task]
        self.task = task
        self._modality = layout.schema.by_name[settings.on].index
        self._inputs = TaskInputs(layout, settings)
        by = settings.final_by
        self._strata = None if by is None else CategoryCodes(layout, settings.on, by)
        self._readout = readout
        self.names = (*readout.names, *self._inputs.names)
        #: (F,) which inputs are hidden state or sketch.
        self.is_state = np.concatenate([readout.is_state, np.zeros(len(self._inputs.names), np.bool_)])

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
        features = self._readout.features(triggers.hidden[own], triggers.memory[own], columns.timestamp_ms[event])
        return own, np.concatenate([features, self._inputs.values(columns, event)], axis=1)


class Questions:
    """All tasks of a layout, in the order of the settings."""

    def __init__(self, layout: Layout) -> None:
        self.readout = Readout(layout)
        self.tasks = tuple(TaskQuestion(layout, self.readout, name) for name in layout.settings.tasks)
        self.by_task = {question.task: question for question in self.tasks}

    def heads(self, parameters: ParameterSet) -> dict[str, LogisticHead]:
        """The heads that these parameters hold; a task without one has no prediction yet."""
        return {
            question.task: LogisticHead(question.task, parameters, question.width)
            for question in self.tasks
            if f"head/{question.task}/weight" in parameters
        }

    def predict(self, heads: dict[str, LogisticHead], columns: EventColumns, triggers: Triggers) -> NDArray[np.float32]:
        """(triggers, tasks) predictions; NaN where a task does not ask or has no head yet."""
        out = np.full((len(triggers.event), len(self.tasks)), np.nan, np.float32)
        for column, question in enumerate(self.tasks):
            head = heads.get(question.task)
            if head is not None and len(triggers.event):
                own, inputs = question.ask(columns, triggers)
                out[own, column] = head.predict(inputs)
        return out
