"""The figures of a report: each way of learning beside the others, over time, and what groups of inputs contribute.

Guarantees: ways are compared on the same examples, all after the split, of a prediction whose answer was corrected with
the last one; intervals are bootstrapped over clients; what cannot be measured, for want of two outcomes, is not a
number (`null` in JSON), never 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.errors import DataError
from stream.model.heads import Questions
from stream.model.layout import Layout
from stream.model.readout import group_names
from stream.settings import Settings, Task
from stream.wire import Schema
from trainer.evaluation import interval
from trainer.record import AnsweredExamples
from trainer.report.again import Again
from trainer.report.groups import Contributions, contributions
from trainer.report.measures import LEAST, ROUNDS, Bin, Judge
from trainer.report.rows import fitted_anew, name_of_fit

__all__ = ["FROZEN", "LIVE", "Quality", "TaskReport", "report_on"]

Floats = NDArray[np.float64]

LIVE, FROZEN = "live", "frozen at the split"
_POINTS = 80
#: A window that has just begun at the split shows noise.
_LEAST_OF_WINDOW = 0.25
_REFITS = 12


@dataclass(frozen=True)
class Quality:
    """One way of learning on the evaluated examples.

    `measures`: all of the kind of task. `low`, `high`: of the one that counts, which is `chief`; `gain` is how much
    that is above the frozen head's, with its interval. `by_class`: of a multiclass task.
    """

    chief: str
    measures: dict[str, float]
    low: float
    high: float
    gain: float
    gain_low: float
    gain_high: float
    by_class: dict[str, dict[str, float]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """A map of plain values."""
        found: dict[str, Any] = {
            **self.measures, f"{self.chief}_low": self.low, f"{self.chief}_high": self.high,
            "gain": self.gain, "gain_low": self.gain_low, "gain_high": self.gain_high,
        }  # fmt: skip
        return found | {"by_class": self.by_class} if self.by_class else found


@dataclass(frozen=True)
class TaskReport:
    """All figures of one task.

    `head` its parts; `left_out` what the heads learned again do without. `outcomes`, `evaluated_outcomes`: how many
    examples had each. `times_ms` (t,) ends of windows of `window_ms`; one that would begin before the split and ends
    after it begins at the split, so that all ways are judged on the same predictions. `over_time` way -> measure ->
    (t,); `rows` in the order to be shown; `reliability` way -> output -> bins, the output of a task with one being "".
    """

    task: str
    judge: Judge
    head: tuple[str, ...]
    left_out: str
    examples: int
    clients: int
    outcomes: dict[str, int]
    split_ms: int
    evaluated: int
    evaluated_outcomes: dict[str, int]
    rows: dict[str, Quality]
    window_ms: int
    times_ms: list[int]
    over_time: dict[str, dict[str, list[float]]]
    reliability: dict[str, dict[str, list[Bin]]]
    contributions: Contributions

    def as_json(self) -> dict[str, Any]:
        """A map of plain values; NaN stands for what could not be measured."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        del found["judge"], found["contributions"]
        one_curve = self.judge.kind != "multiclass"
        return found | {
            "kind": self.judge.kind,
            "rows": {name: row.as_json() for name, row in self.rows.items()},
            "reliability": {
                name: [asdict(one) for one in curves[""]]
                if one_curve
                else {output: [asdict(one) for one in bins] for output, bins in curves.items()}
                for name, curves in self.reliability.items()
            },
            "groups": [asdict(group) for group in self.contributions.groups],
            "group_head": self.contributions.head,
            "group_head_is_own": self.contributions.is_own,
            "group_examples": self.contributions.examples,
            "group_evaluated": self.contributions.evaluated,
        }


def report_on(
    settings: Settings,
    task: str,
    examples: AnsweredExamples,
    *,
    split_ms: int | None = None,
    most_for_groups: int = 20_000,
    generator: np.random.Generator,
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> TaskReport:
    """Measure one task.

    Parameters
    ----------
    examples: as recorded by a trainer with these settings.
    split_ms: from where ways are compared, and where the frozen one stopped learning; by default the middle of the
        recorded time.
    most_for_groups: groups are measured on the examples of so many clients drawn at random that there are no more.
    generator: of intervals and of that draw.
    progress: told how far it is, 0 to 1, and with what.

    Raises
    ------
    DataError: the record is of other settings, or has too little on one side of the split.
    """
    question = Questions(Layout.compile(settings, Schema.compile(settings))).by_task[task]
    _check(task, examples, question.settings, question.names)
    judge = Judge(question.settings.kind, tuple(question.settings.classes))
    again = Again.of(settings, question, examples)
    target = again.targets()
    if split_ms is None:
        split_ms = int((examples.as_of_ms.min() + examples.as_of_ms.max()) // 2)
    later = examples.as_of_ms >= split_ms
    _check_sides(task, judge, target, later, examples.final_ms < split_ms, split_ms)

    def part(begin: float, end: float, text: str) -> Callable[[float], None]:
        return lambda share: progress(begin + (end - begin) * share, f"{task}: {text}")

    frozen = again.frozen_at(split_ms, part(0.0, 0.15, FROZEN))
    frozen[~later] = np.nan
    refits = np.linspace(split_ms, int(examples.as_of_ms.max()), _REFITS, endpoint=False).astype(np.int64)
    scores = {
        LIVE: examples.said(again.outputs),
        FROZEN: frozen,
        name_of_fit(again): fitted_anew(again, refits, part(0.15, 0.35, name_of_fit(again))),
    }
    last = _last_of_each(examples)
    judged = later & last & np.all([np.isfinite(said).all(axis=1) for said in scores.values()], axis=0)
    _check_served(task, judge, target, scores, later & last, judged)
    client = examples.clients()
    judged_target, judged_client = target[judged], client[judged]
    span_ms = examples.span_ms
    window_ms = max(1, span_ms // 6)
    times = np.linspace(int(examples.as_of_ms.min()), int(examples.as_of_ms.max()), _POINTS).astype(np.int64)
    return TaskReport(
        task=task,
        judge=judge,
        head=question.settings.parts,
        left_out=f"what tables add ({', '.join(question.settings.tables)})" if question.settings.tables else "",
        examples=int(last.sum()),
        clients=int(client.max()) + 1,
        outcomes=judge.outcomes(target[last]),
        split_ms=split_ms,
        evaluated=int(judged.sum()),
        evaluated_outcomes=judge.outcomes(target[judged]),
        rows={
            name: _quality(judge, judged_target, judged_client, said[judged], frozen[judged], generator)
            for name, said in scores.items()
        },
        window_ms=window_ms,
        times_ms=times.tolist(),
        over_time={
            name: _over_time(judge, examples.as_of_ms, target, said, last, times, window_ms, split_ms)
            for name, said in scores.items()
        },
        reliability={
            name: judge.reliability(judged_client, judged_target, said[judged], generator)
            for name, said in scores.items()
        },
        contributions=contributions(
            again, judge, later & last, split_ms, most=most_for_groups, generator=generator,
            progress=lambda share, text: progress(0.4 + 0.6 * share, f"{task}: {text}"),
        ),
    )  # fmt: skip


def _check(task: str, examples: AnsweredExamples, settings: Task, names: tuple[str, ...]) -> None:
    """Refuse what was recorded under other settings, naming what differs."""
    advice = "give the settings that the trainer had"
    kinds = {"b": "true and false", "U": "names of classes"}
    wanted = {"binary": "b", "multiclass": "U", "regression": "if"}[settings.kind]
    if examples.label.dtype.kind not in wanted:
        found = kinds.get(examples.label.dtype.kind, "numbers")
        raise DataError(
            f"task {task!r}: the labels of the record are {found}, tasks.{task}.kind is {settings.kind!r}: {advice}"
        )
    if settings.kind == "multiclass":
        unknown = sorted(set(examples.label.tolist()) - set(settings.classes))
        if unknown:
            raise DataError(
                f"task {task!r}: the record has labels {unknown[0]!r}, tasks.{task}.classes are "
                f"{', '.join(settings.classes)}: {advice}"
            )
    if examples.names and examples.names != names:
        there, here = (list(dict.fromkeys(group_names(one).tolist())) for one in (examples.names, names))
        gone, new = ([name for name in one if name not in other] for one, other in ((there, here), (here, there)))
        sides = (("only the record has", gone), ("only the settings have", new))
        differs = "; ".join(f"{what} {', '.join(map(repr, some))}" for what, some in sides if some)
        first = next((pair for pair in zip(examples.names, names, strict=False) if pair[0] != pair[1]), None)
        if not differs and first is not None:
            differs = f"where the record has {first[0]!r} the settings describe {first[1]!r}"
        counts = f"the record has {len(examples.names)} inputs, the settings describe {len(names)}"
        raise DataError(f"task {task!r}: {counts}{': ' if differs else ''}{differs}: {advice}")
    if examples.inputs.shape[1] != len(names):
        raise DataError(
            f"task {task!r}: the record has {examples.inputs.shape[1]} inputs, the settings describe {len(names)}: "
            f"{advice}"
        )


def _check_sides(
    task: str, judge: Judge, target: Floats, later: NDArray[np.bool_], known: NDArray[np.bool_], split_ms: int
) -> None:
    day = datetime.fromtimestamp(split_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")
    for side, there, what in (
        ("before", ~later, "no example"), ("after", later, "no example"), ("before", known, "too few final labels"),
        ("after", later, "too few examples"),
    ):  # fmt: skip
        if not (judge.is_enough(target[there]) if what.startswith("too") else there.any()):
            counts = ", ".join(f"{count} {name}" for name, count in judge.outcomes(target[there]).items())
            least = f"{2 * LEAST} values" if judge.kind == "regression" else f"{LEAST} of each of two outcomes"
            raise DataError(
                f"task {task!r}: the record has {what} {side} the split at {day} ({counts}; {least} are needed on "
                f"either side): choose another with --split, or report once there are more"
            )


def _check_served(
    task: str,
    judge: Judge,
    target: Floats,
    scores: dict[str, Floats],
    asked: NDArray[np.bool_],
    judged: NDArray[np.bool_],
) -> None:
    """Refuse where too few predictions are there to compare, saying which way has none."""
    if judge.is_enough(target[judged]):
        return
    counts = ", ".join(
        f"{int((asked & np.isfinite(said).all(axis=1)).sum()):,} {name}" for name, said in scores.items()
    )
    raise DataError(
        f"task {task!r}: of {int(asked.sum()):,} examples after the split too few were predicted in every way "
        f"({counts}): choose a later one with --split, when its head served"
    )


def _last_of_each(examples: AnsweredExamples) -> NDArray[np.bool_]:
    """(n,) whether no later answer to the same prediction follows: a positive that came late corrects a negative."""
    last = dict(
        zip(zip(examples.client_id, examples.as_of_ms.tolist(), strict=True), range(len(examples)), strict=True)
    )
    found = np.zeros(len(examples), np.bool_)
    found[list(last.values())] = True
    return found


def _quality(
    judge: Judge,
    target: Floats,
    client: NDArray[np.int64],
    said: Floats,
    frozen: Floats,
    generator: np.random.Generator,
) -> Quality:
    chief = judge.chief_of(target, said)
    own = interval(client, len(target), chief, None, generator, ROUNDS)
    gain = interval(client, len(target), chief, judge.chief_of(target, frozen), generator, ROUNDS)
    return Quality(
        judge.chief, judge.measure(target, said), own.low, own.high, gain.value, gain.low, gain.high,
        judge.by_class(target, said),
    )  # fmt: skip


def _over_time(
    judge: Judge,
    as_of_ms: NDArray[np.int64],
    target: Floats,
    said: Floats,
    counts: NDArray[np.bool_],
    ends: NDArray[np.int64],
    window_ms: int,
    split_ms: int,
) -> dict[str, list[float]]:
    there = np.flatnonzero(counts & np.isfinite(said).all(axis=1))
    there = there[np.argsort(as_of_ms[there], kind="stable")]
    times = as_of_ms[there]
    curves: dict[str, list[float]] = {name: [] for name in judge.measures}
    for end in ends.tolist():
        after = max(end - window_ms, split_ms - 1) if end >= split_ms else end - window_ms
        is_short = end - after < window_ms * _LEAST_OF_WINDOW
        inside = there[np.searchsorted(times, after, "right") : np.searchsorted(times, end, "right")]
        values = dict.fromkeys(judge.measures, math.nan)
        if judge.is_enough(target[inside]) and not is_short:
            values = judge.measure(target[inside], said[inside])
        for name, curve in curves.items():
            curve.append(values[name])
    return curves
