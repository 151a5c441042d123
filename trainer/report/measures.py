"""What a kind of task is judged by: its measures, the one that counts, and whether it happens as predicted.

Guaranteed: what cannot be measured, for want of two outcomes, is not a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.evaluation import (
    Interval,
    Measure,
    auc,
    class_log_loss,
    expected_calibration_error,
    interval,
    log_loss,
    mean_calibration_error,
    measure_of_auc,
    measure_of_class_auc,
    measure_of_r2,
)

__all__ = ["LEAST", "ROUNDS", "Bin", "Judge"]

Floats = NDArray[np.float64]

#: Of fewer examples of either outcome, or of fewer values, figures would show noise.
LEAST = 10
#: Of each bootstrap.
ROUNDS = 300
_BINS = 10
#: By kind of task: measure -> its name for people, with its unit. The first one counts most.
_CLASS_MEASURES = {"auc": "AUC", "log_loss": "log loss (nats)", "calibration_error": "calibration error"}
_MEASURES = {
    "binary": _CLASS_MEASURES,
    "multiclass": {**_CLASS_MEASURES, "auc": "AUC (mean over classes)"},
    "regression": {
        "r2": "R² (share of variance explained)",
        "squared_error": "mean squared error (units of the label, squared)",
        "calibration_error": "calibration error (units of the label)",
    },
}


@dataclass(frozen=True)
class Bin:
    """Examples of similar predictions: the means of predictions and of labels, the latter's 95 % interval over clients,
    how many."""

    predicted: float
    observed: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Judge:
    """Judges predictions (n, outputs) of a kind of task by targets (n,): 0 or 1, the index of a class, or a value."""

    kind: str
    classes: Sequence[str] = ()

    @property
    def measures(self) -> dict[str, str]:
        """Measure -> its name for people, with its unit; the first one counts most."""
        return _MEASURES[self.kind]

    @property
    def chief(self) -> str:
        """The measure that counts most: the area under the ROC curve, or for numbers R²; higher is better."""
        return next(iter(self.measures))

    @property
    def chief_name(self) -> str:
        """The same for people, short."""
        return {"auc": "AUC", "r2": "R²"}[self.chief]

    @property
    def outputs(self) -> tuple[str, ...]:
        """What there is a reliability curve of: each class, or the one value under an empty name."""
        return tuple(self.classes) or ("",)

    def measure(self, target: Floats, said: Floats) -> dict[str, float]:
        """Each measure of these examples."""
        if self.kind == "binary":
            label, score = target > 0.5, said[:, 0]
            values = (auc(label, score), log_loss(label, score), expected_calibration_error(label, score))
        elif self.kind == "multiclass":
            values = (
                self.chief_of(target, said)(None),
                class_log_loss(target, said),
                float(np.mean([one["calibration_error"] for one in self.by_class(target, said).values()])),
            )
        else:
            error = float(np.square(target - said[:, 0]).mean()) if len(target) else math.nan
            values = (self.chief_of(target, said)(None), error, mean_calibration_error(target, said[:, 0]))
        return dict(zip(self.measures, values, strict=True))

    def by_class(self, target: Floats, said: Floats) -> dict[str, dict[str, float]]:
        """Of each class its share, and AUC and calibration error of its predictions against the rest; of other kinds
        nothing."""
        return {
            name: {
                "share": float((target == number).mean()) if len(target) else math.nan,
                "auc": auc(target == number, said[:, number]),
                "calibration_error": expected_calibration_error(target == number, said[:, number]),
            }
            for number, name in enumerate(self.classes)
        }

    def chief_of(self, target: Floats, said: Floats) -> Measure:
        """The measure that counts most, under any weights of these examples."""
        if self.kind == "binary":
            return measure_of_auc(target > 0.5, said[:, 0])
        return measure_of_class_auc(target, said) if self.kind == "multiclass" else measure_of_r2(target, said[:, 0])

    def outcomes(self, target: Floats) -> dict[str, int]:
        """How many examples there are of each outcome; of numbers, how many."""
        if self.kind == "regression":
            return {"values": len(target)}
        names = self.classes or ("false", "true")
        counts = np.bincount(target.astype(np.int64), minlength=len(names))
        return dict(zip(names, counts.tolist(), strict=True))

    def is_enough(self, target: Floats) -> bool:
        """Whether figures of these say anything: of two outcomes there are `LEAST`, or twice as many values."""
        if self.kind == "regression":
            return len(target) >= 2 * LEAST
        return sum(count >= LEAST for count in self.outcomes(target).values()) >= 2

    def reliability(
        self, client: NDArray[np.int64], target: Floats, said: Floats, generator: np.random.Generator
    ) -> dict[str, list[Bin]]:
        """By output, groups of equally many examples, by rising prediction."""
        if self.kind == "regression":
            return {"": [_bin_of_values(client, target, said[:, 0], part, generator) for part in _tenths(said[:, 0])]}
        found = {}
        for number, name in enumerate(self.outputs):
            is_it = target == (number if self.classes else 1)
            found[name] = [_bin_of_shares(client, is_it, said[:, number], part) for part in _tenths(said[:, number])]
        return found


def _tenths(said: Floats) -> list[NDArray[np.int64]]:
    return [part for part in np.array_split(np.argsort(said, kind="stable"), _BINS) if len(part)]


def _bin_of_values(
    client: NDArray[np.int64], target: Floats, said: Floats, part: NDArray[np.int64], generator: np.random.Generator
) -> Bin:
    label = target[part]

    def mean(weights: Floats | None) -> float:
        return float(np.average(label, weights=weights))

    found = interval(client[part], len(part), mean, None, generator, ROUNDS)
    return Bin(float(said[part].mean()), found.value, found.low, found.high, len(part))


def _bin_of_shares(client: NDArray[np.int64], is_it: NDArray[Any], said: Floats, part: NDArray[np.int64]) -> Bin:
    label = is_it[part].astype(np.float64)
    share = _share_interval(client[part], label)
    return Bin(float(said[part].mean()), share.value, share.low, share.high, len(part))


def _share_interval(client: NDArray[np.int64], label: Floats, z: float = 1.96) -> Interval:
    """A share with its interval over clients: E. B. Wilson's (JASA 22, 1927), of so many independent examples as vary
    as much as these, which are alike within a client (E. L. Korn, B. I. Graubard, Survey Methodology 24, 1998)."""
    n, share = len(label), float(label.mean())
    names, own = np.unique(client, return_inverse=True)
    within = np.bincount(own, label - share)
    # Where all are the same, a client counts once.
    design = float(np.square(within).sum()) / (n * share * (1.0 - share)) if 0.0 < share < 1.0 else n / len(names)
    n_like = n / max(1.0, design)
    center = (share + z * z / (2 * n_like)) / (1 + z * z / n_like)
    half = z / (1 + z * z / n_like) * math.sqrt(share * (1 - share) / n_like + z * z / (4 * n_like * n_like))
    return Interval(share, max(0.0, center - half), min(1.0, center + half))
