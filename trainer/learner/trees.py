"""The head `gbdt`: LightGBM, refitted on schedule on the examples as they were at prediction time.

A fit runs on a thread of its own and begins to serve at a moment that the labels alone decide: the first one that may
be learned `delay_s` of stream time after the fit was begun (or when the kept examples would else be overwritten). If it
is not done by then, that label waits for it. So what is learned does not depend on how fast the machine is, and a fit
that a crash took is made again from the same examples.

Source: Ke et al., LightGBM, NeurIPS 2017.
"""

from __future__ import annotations

import threading
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from stream.errors import StoreError
from stream.model.heads import lightgbm, trees_tensors
from stream.model.parameters import Tensor
from stream.settings import Task
from trainer.learner.examples import Batch, Examples
from trainer.learner.part import Floats, Labelled, Load

__all__ = ["TreesLearner", "fit_trees"]

_OBJECTIVES = {"binary": "binary", "multiclass": "multiclass", "regression": "regression"}


class TreesLearner:
    """The part `gbdt` of a task's head; see `MlpLearner` for the parameters.

    Raises
    ------
    SettingsError: LightGBM is not installed.
    """

    def __init__(self, task: str, settings: Task, sees: NDArray[np.bool_], examples: Examples, seed: int) -> None:
        lightgbm(f"tasks.{task}.head")
        self._task = task
        self._settings = settings
        self._sees = sees
        self._examples = examples
        self._seed = seed
        self._text = ""
        self._next_ms = 0
        self.behind = 0
        #: Of the fit under way: how many examples there were, and from when on it serves.
        self._begun: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        self._found: str | Exception = ""

    def learn(self, one: Labelled, x: Floats) -> int:
        count = self._examples.count
        self.behind += 1
        if self._begun is not None:
            begun, serves_ms = self._begun
            if one.final_ms >= serves_ms or count - begun >= self._examples.slack:
                self._serve(count - begun)
        if self._begun is None and one.final_ms >= self._next_ms and self._is_enough():
            gbdt = self._settings.gbdt
            self._next_ms = one.final_ms + int(gbdt.refit_interval_s * 1000)
            self._begun = (count, one.final_ms + int(gbdt.delay_s * 1000))
            self._begin()
        return 0

    def _is_enough(self) -> bool:
        least = self._settings.gbdt.least_examples
        count = self._examples.count
        if count - self._examples.first(count) < least:
            return False
        if self._settings.kind == "regression":
            return True
        # Counting all of them at each label would cost more than learning it.
        if count > least and count % 100:
            return False
        target = self._examples.take(np.arange(self._examples.first(count), count)).target
        each = np.bincount(target.astype(np.int64), minlength=max(2, len(self._settings.classes)))
        return int(each.min()) >= max(1, least // 100)

    def _begin(self) -> None:
        assert self._begun is not None
        numbers = np.arange(self._examples.first(self._begun[0]), self._begun[0])
        batch = self._examples.take(numbers)

        def run() -> None:
            try:
                self._found = fit_trees(self._settings, batch, self._seed, self._sees)
            except Exception as error:
                self._found = error

        self._thread = threading.Thread(target=run, name=f"gbdt-{self._task}", daemon=True)
        self._thread.start()

    def _serve(self, behind: int) -> None:
        assert self._thread is not None
        self._thread.join()
        self._thread = self._begun = None
        if isinstance(self._found, Exception):
            raise StoreError(f"task {self._task!r}: the fit of its head 'gbdt' failed: {self._found}") from self._found
        self._text = self._found
        self.behind = behind

    def tensors(self, center: Floats, scale: Floats, *, settled: bool = False) -> dict[str, Tensor]:
        return trees_tensors(self._task, center, self._text) if self._text else {}

    def save(self) -> dict[str, bytes]:
        saved: bytes = msgpack.packb([self._text, self._next_ms, self.behind, self._begun])
        return {"gbdt": saved}

    def load(self, load: Load) -> None:
        self._text, self._next_ms, self.behind, begun = msgpack.unpackb(load("gbdt"))
        if begun is not None:
            self._begun = (begun[0], begun[1])
            self._begin()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.join()


def fit_trees(settings: Task, batch: Batch, seed: int, sees: NDArray[np.bool_]) -> str:
    """A model of these examples as LightGBM writes it; the same for the same examples.

    Parameters
    ----------
    sees: (F,) by which of the inputs its trees may split.
    """
    package = lightgbm("tasks.NAME.head")
    gbdt = settings.gbdt
    parameters: dict[str, Any] = {
        "objective": _OBJECTIVES[settings.kind],
        "learning_rate": gbdt.learning_rate,
        "num_leaves": gbdt.leaves,
        "min_data_in_leaf": gbdt.leaf_examples,
        "bagging_fraction": gbdt.subsample,
        "bagging_freq": 1 if gbdt.subsample < 1.0 else 0,
        "feature_fraction": gbdt.columns,
        "lambda_l2": gbdt.penalty,
        "max_bin": gbdt.bins,
        "seed": seed + 1,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": 1,
        "verbose": -1,
    }
    if settings.kind == "multiclass":
        parameters["num_class"] = len(settings.classes)
    # LightGBM warns of a column that lies among others.
    offset = np.ascontiguousarray(batch.offset) if batch.offset.any() else None
    # It draws the columns of a tree from those that vary.
    inputs = batch.inputs if sees.all() else np.where(sees, batch.inputs, np.float32(0.0))
    data = package.Dataset(
        inputs, batch.target, weight=batch.weight, init_score=offset, params=parameters, free_raw_data=True
    )
    text: str = package.train(parameters, data, num_boost_round=gbdt.trees).model_to_string()
    return text
