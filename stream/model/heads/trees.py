"""Boosted trees in LightGBM's text form."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np

from stream.errors import ParametersError, SettingsError
from stream.model.heads.scores import Floats, Inputs, checked, typical_inputs
from stream.model.parameters import ParameterSet, Tensor

__all__ = ["TreesPart", "lightgbm", "trees_names", "trees_tensors"]


def lightgbm(setting: str) -> ModuleType:
    """The package, which is optional.

    Raises
    ------
    SettingsError: it is not installed; names the setting that asks for it.
    """
    try:
        return importlib.import_module("lightgbm")
    except ImportError as error:
        raise SettingsError(
            f"{setting} = 'gbdt': the package lightgbm is not installed ({error}): install livestate[gbdt], "
            f"or choose another head"
        ) from error


def trees_names(task: str) -> frozenset[str]:
    """Names of the tensors that `TreesPart` serves."""
    return frozenset({f"head/{task}/center", f"head/{task}/gbdt/text"})


def trees_tensors(task: str, center: Floats, text: str) -> dict[str, Tensor]:
    """The tensors that `TreesPart` serves."""
    return {f"head/{task}/center": center, f"head/{task}/gbdt/text": np.frombuffer(text.encode(), np.uint8)}


class TreesPart:
    """Serves `head/{task}/gbdt/text`, a model as LightGBM writes it, in UTF-8.

    Parameters
    ----------
    before: what served the version before; a text that did not change is not read again.

    Raises
    ------
    ParametersError: a tensor is missing, or no model of these inputs and outputs.
    SettingsError: LightGBM is not installed.
    """

    def __init__(
        self, task: str, parameters: ParameterSet, width: int, outputs: int, before: TreesPart | None = None
    ) -> None:
        name = f"head/{task}/gbdt/text"
        self._center = checked(parameters, f"head/{task}/center", (width,))
        self._text = parameters[name]
        self._outputs = outputs
        self._model: Any
        if before is not None and before._text is self._text:
            self._model = before._model
            return
        package = lightgbm(f"tasks.{task}.head")
        try:
            text = self._text.tobytes().decode()
            self._model = package.Booster(model_str=text)
        except (UnicodeDecodeError, package.basic.LightGBMError) as error:
            raise ParametersError(f"tensor {name!r} is no model that LightGBM can read: {error}") from error
        found = (self._model.num_feature(), self._model.num_model_per_iteration())
        if found != (width, outputs):
            raise ParametersError(
                f"tensor {name!r} is a model of {found[0]} inputs and {found[1]} outputs: the settings describe "
                f"{width} and {outputs}"
            )

    def scores(self, inputs: Inputs) -> Floats:
        if not len(inputs):
            return np.zeros((0, self._outputs))
        scores = np.asarray(self._model.predict(inputs, raw_score=True, num_threads=1), np.float64)
        return scores.reshape(len(inputs), self._outputs)

    def typical(self, features: Inputs) -> Floats:
        return self.scores(typical_inputs(features, self._center))
