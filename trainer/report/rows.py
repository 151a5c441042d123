"""What models that are fitted anew, again and again, would have said of the examples that a trainer recorded.

Guaranteed: a prediction at time t uses labels that were final before t, and no others; all ways see the same inputs,
under the scale of the moment, and predict by the same parts that serve. A task whose head is Bayesian is fitted
exactly, under the prior of the head that learns online; one with networks or trees by LightGBM as `tasks.NAME.gbdt`
says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from stream.model.heads import Head, linear_tensors, sigmoid, standardise, trees_tensors
from stream.model.parameters import ParameterSet, Tensor
from trainer.learner import Batch, fit_trees, prior_variance, seen_by
from trainer.record import Scale
from trainer.report.again import Again

__all__ = ["BAYESIAN", "fitted_anew", "name_of_fit"]

Floats = NDArray[np.float64]
#: Parts of a head that have one exact fit.
BAYESIAN = frozenset({"logistic", "linear"})
_NEWTON_STEPS = 25
_CONVERGED = 1e-8


def name_of_fit(again: Again) -> str:
    """What is fitted anew beside this task."""
    if not BAYESIAN.issuperset(again.settings.parts):
        return "LightGBM fitted anew"
    return "linear fitted anew" if again.settings.kind == "regression" else "logistic fitted anew"


def fitted_anew(again: Again, times_ms: NDArray[np.int64], passed: Callable[[float], None] = lambda _: None) -> Floats:
    """(n, outputs) predictions of a model that is fitted anew at each of `times_ms` (rising), NaN before the first and
    where there was too little to fit: no label, or none of some class.

    Parameters
    ----------
    passed: told now and then how much is done, 0 to 1.
    """
    examples, settings = again.examples, again.settings
    bayesian = BAYESIAN.issuperset(settings.parts)
    fit: _Fit = _Bayesian(again) if bayesian else _Trees(again)
    head = "gbdt" if not bayesian else "linear" if settings.kind == "regression" else "logistic"
    serves = msgspec.structs.replace(settings, head=head)
    usable = np.isfinite(examples.inputs).all(axis=1)
    targets = again.targets()
    out = np.full((len(examples), again.outputs), np.nan)
    for at, start in enumerate(times_ms.tolist()):
        passed(at / len(times_ms))
        known = np.flatnonzero(usable & (examples.final_ms < start))
        end = times_ms[at + 1] if at + 1 < len(times_ms) else np.iinfo(np.int64).max
        asked = np.flatnonzero(usable & (examples.as_of_ms >= start) & (examples.as_of_ms < end))
        if len(asked) and _is_enough(settings.kind, again.outputs, targets[known]):
            parameters = ParameterSet(fit.tensors(known, targets[known], examples.scale_at(start)))
            out[asked] = Head(again.task, serves, parameters, again.is_number).predict(examples.inputs[asked])
    return out


def _is_enough(kind: str, outputs: int, targets: Floats) -> bool:
    if kind == "regression":
        return len(targets) > 0
    return bool(np.bincount(targets.astype(np.int64), minlength=max(2, outputs)).all())


class _Fit(Protocol):
    """A model of the examples at indices `known` (k,) with these targets (k,), as tensors that a head serves."""

    def tensors(self, known: NDArray[np.int64], targets: Floats, scale: Scale) -> dict[str, Tensor]: ...


class _Trees:
    """LightGBM, of the newest examples that the task may keep."""

    def __init__(self, again: Again) -> None:
        self._again = again

    def tensors(self, known: NDArray[np.int64], targets: Floats, scale: Scale) -> dict[str, Tensor]:
        again, examples = self._again, self._again.examples
        newest = slice(max(0, len(known) - again.settings.keep_examples), None)
        kept = known[newest]
        batch = Batch(examples.inputs[kept], targets[newest], examples.weight[kept], np.zeros(len(kept)))
        sees = seen_by("gbdt", again.settings, again.groups, len(again.is_state))
        return trees_tensors(again.task, scale.center, fit_trees(again.settings, batch, again.seed, sees))


class _Bayesian:
    """The weights of largest posterior given all labels, of several classes for each against the others.

    Logistic ones are found by Newton's method (iteratively reweighted least squares), which begins where the last fit
    ended; linear ones in closed form.
    """

    def __init__(self, again: Again) -> None:
        self._again = again
        name = "linear" if again.settings.kind == "regression" else "logistic"
        sees = seen_by(name, again.settings, again.groups, len(again.is_state))
        variance = prior_variance(again.settings, again.is_state, sees)
        # A weight without a variance stays at zero.
        self._free = variance > 0.0
        self._precision = np.diag(1.0 / variance[self._free])
        self._modes = np.zeros((again.outputs, int(self._free.sum())))

    def tensors(self, known: NDArray[np.int64], targets: Floats, scale: Scale) -> dict[str, Tensor]:
        again, examples = self._again, self._again.examples
        x = standardise(examples.inputs[known], scale.center, scale.scale)[:, self._free]
        weight = examples.weight[known]
        for output, mode in enumerate(self._modes):
            if again.settings.kind == "regression":
                mode[:] = np.linalg.solve((x.T * weight) @ x + self._precision, x.T @ (weight * targets))
            else:
                is_it = targets == (output if again.settings.classes else 1)
                mode[:] = _mode(x, is_it, weight, self._precision, mode)
        weights = np.zeros((len(self._modes), len(self._free)))
        weights[:, self._free] = self._modes
        return linear_tensors(again.task, scale.center, scale.scale, weights if again.settings.classes else weights[0])


def _mode(x: Floats, label: NDArray[np.bool_], weight: Floats, precision: Floats, start: Floats) -> Floats:
    """Where the log posterior is largest, the prior being around zero; Newton's steps, halved until each gains."""

    def loss(m: Floats) -> float:
        z = x @ m
        # log(1 + exp(z)) - y z, without overflow
        nll = np.logaddexp(0.0, z) - label * z
        return float(weight @ nll + 0.5 * m @ precision @ m)

    m = start.copy()
    before = loss(m)
    for _ in range(_NEWTON_STEPS):
        p = sigmoid(x @ m)
        gradient = x.T @ (weight * (p - label)) + precision @ m
        curvature = (x.T * (weight * p * (1.0 - p))) @ x + precision
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while (after := loss(m - size * step)) > before and size > 1e-6:
            size *= 0.5
        if after > before:
            break
        m = m - size * step
        if before - after <= _CONVERGED * abs(before):
            break
        before = after
    return m
