"""Pictures of a report, PNG, drawn without a display: quality over time, reliability, what groups contribute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib import dates
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trainer.report.figures import LIVE, TaskReport
from trainer.report.measures import Bin

__all__ = ["draw"]

_DAY_MS = 86_400_000
#: Of Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73")
_GREY = "0.35"
_LINES: tuple[Any, ...] = ("-", "--", "-.")
_MARKERS = ("o", "s", "^")
#: Of more classes only the most frequent ones are drawn.
_MOST_CLASSES = 9


def draw(report: TaskReport, directory: Path) -> dict[str, Path]:
    """Draw one task's pictures into a directory, which is made when missing; their paths by name."""
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, figure in (
        ("quality", _quality(report)),
        ("reliability", _reliability(report)),
        ("groups", _groups(report)),
    ):
        path = directory / f"{report.task}-{name}.png"
        FigureCanvasAgg(figure)
        figure.savefig(path, format="png")
        pictures[name] = path
    return pictures


def _quality(report: TaskReport) -> Figure:
    judge = report.judge
    figure = Figure(figsize=(10.0, 9.5), dpi=130, layout="constrained")
    panels = figure.subplots(len(judge.measures), 1, sharex=True)
    days = np.array(report.times_ms) / _DAY_MS
    figure.suptitle(
        f"{report.task}: how good were predictions? (head: {' + '.join(report.head)})\nat each moment those of the "
        f"last {report.window_ms / _DAY_MS:.0f} days, at first since the split",
        fontsize=12, fontweight="bold",
    )  # fmt: skip
    for axes, (measure, label) in zip(panels, judge.measures.items(), strict=True):
        for at, (name, curves) in enumerate(report.over_time.items()):
            axes.plot(
                days, curves[measure], color=_COLOURS[at], linestyle=_LINES[at], linewidth=2.4 - 0.4 * at,
                zorder=10 - at, label=f"{name}: {_figure(measure, report.rows[name].measures[measure])}",
            )  # fmt: skip
        # The unit is beside the curves, where a long name would not fit.
        axes.set_ylabel(fill(label, 30))
        higher = measure in ("auc", "r2")
        axes.set_title(f"{label.split(' (')[0]}: {'higher' if higher else 'lower'} is better", fontsize=10, loc="left")
        axes.axvline(report.split_ms / _DAY_MS, color="0.4", linestyle=":", linewidth=1.2)
        axes.legend(
            loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9,
            title=f"all {report.evaluated:,} after the split", title_fontsize=9,
        )  # fmt: skip
        _plain(axes)
    panels[0].annotate(
        "split ", (report.split_ms / _DAY_MS, 1.0), xycoords=("data", "axes fraction"), ha="right", va="top",
        fontsize=9, color=_GREY,
    )  # fmt: skip
    locator = dates.AutoDateLocator()
    panels[-1].xaxis.set_major_locator(locator)
    panels[-1].xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))
    panels[-1].set_xlabel("time of the prediction (stream time, UTC)")
    return figure


def _reliability(report: TaskReport) -> Figure:
    judge = report.judge
    if judge.kind == "multiclass":
        return _reliability_of_classes(report)
    figure = Figure(figsize=(8.5, 8.0), dpi=130, layout="constrained")
    axes = figure.subplots()
    for at, (name, curves) in enumerate(report.reliability.items()):
        _curve(axes, at, name, curves[""])
    bins = [one for curves in report.reliability.values() for one in curves[""]]
    if judge.kind == "regression":
        ends = [value for one in bins for value in (one.predicted, one.observed, one.low, one.high)]
        _square(axes, min(ends), max(ends))
        axes.set_xlabel("predicted value, mean of a tenth of the predictions (units of the label)")
        axes.set_ylabel("mean of their labels (units of the label)")
        question, how = "is it as high as predicted?", "predictions after the split"
    else:
        _square(axes, 0.0, max(max(one.predicted, one.high) for one in bins))
        axes.set_xlabel("predicted probability, mean of a tenth of the predictions")
        axes.set_ylabel("share of them that came true")
        question = "does it happen as often as predicted?"
        how = f"predictions after the split, {report.evaluated_outcomes['true']:,} of which came true"
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(
        f"{report.task}: {question}\n{report.evaluated:,} {how}; bars: 95 %, over clients, of the live head's",
        fontsize=11,
    )
    return figure


def _reliability_of_classes(report: TaskReport) -> Figure:
    counts = report.evaluated_outcomes
    classes = sorted(counts, key=lambda name: -counts[name])[:_MOST_CLASSES]
    columns = min(3, len(classes))
    rows = math.ceil(len(classes) / columns)
    figure = Figure(figsize=(1.0 + 4.2 * columns, 1.8 + 4.0 * rows), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axes, name in zip(panels, classes, strict=False):
        for at, (way, curves) in enumerate(report.reliability.items()):
            _curve(axes, at, way, curves[name])
        bins = [one for curves in report.reliability.values() for one in curves[name]]
        _square(axes, 0.0, max(max(one.predicted, one.high) for one in bins))
        axes.set_title(f"{_short(name)} ({counts[name]:,} times)", fontsize=10)
    for axes in panels[len(classes) :]:
        axes.set_visible(False)
    more = f", the {len(classes)} most frequent of {len(counts)} classes" if len(classes) < len(counts) else ""
    for axes in panels[::columns]:
        axes.set_ylabel("share of them that were of the class")
    for axes in panels[max(0, len(classes) - columns) : len(classes)]:
        axes.set_xlabel("predicted probability, mean of a tenth")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    figure.suptitle(
        fill(
            f"{report.task}: does each class happen as often as predicted? {report.evaluated:,} predictions after the "
            f"split{more}; bars: 95 %, over clients, of the live head's", 32 * columns,
        ), fontsize=11,
    )  # fmt: skip
    return figure


def _curve(axes: Any, at: int, name: str, bins: Sequence[Bin]) -> None:
    predicted, observed = _column(bins, "predicted"), _column(bins, "observed")
    bars = np.abs(np.stack([observed - _column(bins, "low"), _column(bins, "high") - observed]))
    axes.errorbar(
        predicted, observed, yerr=bars if name == LIVE else None, color=_COLOURS[at], marker=_MARKERS[at], markersize=5,
        linestyle=_LINES[at], linewidth=1.6, capsize=3, zorder=10 - at, label=name,
    )  # fmt: skip


def _square(axes: Any, low: float, high: float) -> None:
    """The same range on both axes, with the line on which predictions are what comes."""
    room = 0.04 * (high - low) or 0.04
    axes.plot([low, high], [low, high], color=_GREY, linewidth=1.0, label="as predicted")
    axes.set_xlim(low - room, high + room)
    axes.set_ylim(low - room, high + room)
    axes.set_aspect("equal")
    _plain(axes)


def _groups(report: TaskReport) -> Figure:
    found = report.contributions
    groups = list(reversed(found.groups))
    figure = Figure(figsize=(9.5, 2.4 + 0.32 * len(groups)), dpi=130, layout="constrained")
    axes = figure.subplots()
    loss = 100 * _column(groups, "loss")
    bars = np.abs(np.stack([loss - 100 * _column(groups, "low"), 100 * _column(groups, "high") - loss]))
    colours = [_COLOURS[0] if group.low > 0 else _COLOURS[1] if group.high < 0 else "0.75" for group in groups]
    axes.barh(
        range(len(groups)), loss, color=colours, xerr=bars,
        error_kw={"ecolor": _GREY, "capsize": 2.5, "elinewidth": 1.0},
    )  # fmt: skip
    labels = [f"{_short(group.name)} ({group.inputs})" for group in groups]
    axes.set_yticks(range(len(groups)), labels, fontsize=9)
    axes.axvline(0.0, color=_GREY, linewidth=1.0)
    axes.margins(y=0.01)
    axes.set_xlabel(
        f"{report.judge.chief_name} points lost without it (1 point = 0.01), with 95 % intervals over clients\n"
        "blue: clearly worse without it; orange: clearly better without it; grey: neither is established"
    )
    _plain(axes)
    about = (
        f"learned anew without each group, on {found.examples:,} examples, {found.evaluated:,} of them after the "
        f"split, by {found.head}"
    )
    figure.suptitle(
        f"{report.task}: what each group of inputs contributes (in brackets how many)\n{fill(about, 90)}", fontsize=11
    )
    return figure


def _figure(measure: str, value: float) -> str:
    """As many digits as can be compared; an error's unit may be anything."""
    return f"{value:.4g}" if measure.endswith("error") else f"{value:.4f}"


def _short(name: str) -> str:
    return name if len(name) <= 32 else f"{name[:31]}…"


def _column(items: Sequence[Any], name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([getattr(item, name) for item in items], np.float64)


def _plain(axes: Any) -> None:
    axes.grid(True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
