"""The head of one task: the parts that the settings name, their scores averaged.

A kind of part plugs in here with the tensors that it serves and how it is made of them; the trainer's side of it is in
`trainer.learner`. A part that has not been published yet is left out of the average; while there is none, the task has
no prediction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stream.model.heads.categories import Categories
from stream.model.heads.linear import LinearPart, linear_names
from stream.model.heads.mlp import MlpPart, mlp_names
from stream.model.heads.scores import Floats, Inputs, Part, predictions
from stream.model.heads.trees import TreesPart, trees_names
from stream.model.parameters import ParameterSet
from stream.settings import Task
from stream.store import PackedKeys

__all__ = ["Head", "output_names", "part_names"]

_NAMES = {"logistic": linear_names, "linear": linear_names, "mlp": mlp_names, "gbdt": trees_names}


def part_names(task: str, part: str) -> frozenset[str]:
    """Names of the tensors of one part of a task's head."""
    return _NAMES[part](task)


def output_names(task: str, settings: Task) -> tuple[str, ...]:
    """How a task's predictions are called: by its own name, or `task.class` for each class of a multiclass one."""
    return tuple(f"{task}.{one}" for one in settings.classes) if settings.kind == "multiclass" else (task,)


class Head:
    """What predicts one task.

    Parameters
    ----------
    is_number: (F,) which inputs are numbers that say something alone; see `Readout`.
    before: the head that served until now, if there is one.

    Raises
    ------
    ParametersError: a tensor does not fit the settings.
    SettingsError: a part needs a package that is not installed.
    """

    def __init__(
        self,
        task: str,
        settings: Task,
        parameters: ParameterSet,
        is_number: NDArray[np.bool_],
        before: Head | None = None,
    ) -> None:
        self._kind = settings.kind
        self.outputs = len(output_names(task, settings))
        self._categories = Categories(task, settings, parameters, self.outputs) if settings.tables else None
        self.parts: dict[str, Part] = {}
        for name in settings.parts:
            if all(tensor in parameters for tensor in part_names(task, name)):
                self.parts[name] = self._part(name, task, settings, parameters, is_number, before)

    def _part(
        self,
        name: str,
        task: str,
        settings: Task,
        parameters: ParameterSet,
        is_number: NDArray[np.bool_],
        before: Head | None,
    ) -> Part:
        width = len(is_number)
        if name == "mlp":
            return MlpPart(task, parameters, is_number, self.outputs, settings.mlp)
        if name == "gbdt":
            served = before.parts.get(name) if before is not None else None
            return TreesPart(task, parameters, width, self.outputs, served if isinstance(served, TreesPart) else None)
        return LinearPart(task, parameters, width, len(settings.classes))

    def predict(self, inputs: Inputs, keys: Sequence[PackedKeys] = ()) -> NDArray[np.float32]:
        """(k, outputs) predictions for (k, F) inputs, and keys (k,) of the rows of each of the task's tables."""
        return predictions(self._kind, _mean(list(self._scores(inputs, keys).values())))

    def predict_parts(
        self, inputs: Inputs, keys: Sequence[PackedKeys] = ()
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
        """The predictions (k, outputs), and what each part alone would say."""
        scores = self._scores(inputs, keys)
        alone = {name: predictions(self._kind, one) for name, one in scores.items()}
        return predictions(self._kind, _mean(list(scores.values()))), alone

    def _scores(self, inputs: Inputs, keys: Sequence[PackedKeys]) -> dict[str, Floats]:
        added = self._categories.added(keys, len(inputs)) if self._categories is not None else None
        return {
            name: part.scores(inputs, added) if isinstance(part, LinearPart) else part.scores(inputs)
            for name, part in self.parts.items()
        }

    def predict_typical(self, features: Inputs) -> NDArray[np.float32]:
        """(k, outputs) for rows with features (k, R), as if an event came now with fields like the average one's."""
        return predictions(self._kind, _mean([part.typical(features) for part in self.parts.values()]))


def _mean(scores: list[Floats]) -> Floats:
    return scores[0] if len(scores) == 1 else np.mean(scores, axis=0)
