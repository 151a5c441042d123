"""Pictures of a report, PNG, drawn without a display: quality over time, reliability, what groups contribute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import dates
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trainer.report.figures import MEASURES, TaskReport

__all__ = ["draw"]

_DAY_MS = 86_400_000
#: Of Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_GREY = "0.35"
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":")


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
    figure = Figure(figsize=(10.0, 9.5), dpi=130, layout="constrained")
    panels = figure.subplots(len(MEASURES), 1, sharex=True)
    days = np.array(report.times_ms) / _DAY_MS
    figure.suptitle(
        f"{report.task}: predictions of the last {report.window_ms / _DAY_MS:.0f} days, at first since the split\n",
        fontsize=12, fontweight="bold",
    )  # fmt: skip
    for axes, (measure, label) in zip(panels, MEASURES.items(), strict=True):
        for at, (name, curves) in enumerate(report.over_time.items()):
            row = report.rows[name]
            whole = {"auc": row.auc, "log_loss": row.log_loss, "calibration_error": row.calibration_error}[measure]
            axes.plot(
                days, curves[measure], color=_COLOURS[at % len(_COLOURS)], linestyle=_LINES[at % len(_LINES)],
                linewidth=2.4 - 0.4 * min(at, 2), zorder=10 - at, label=f"{name}: {whole:.4f}",
            )  # fmt: skip
        axes.set_ylabel(label)
        better = "higher" if measure == "auc" else "lower"
        axes.set_title(f"{label}, {better} is better", fontsize=10, loc="left")
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
    figure = Figure(figsize=(7.5, 7.0), dpi=130, layout="constrained")
    axes = figure.subplots()
    largest = 0.0
    for at, (name, bins) in enumerate(report.reliability.items()):
        predicted, observed = _column(bins, "predicted"), _column(bins, "observed")
        bars = np.abs(np.stack([observed - _column(bins, "low"), _column(bins, "high") - observed]))
        axes.errorbar(
            predicted, observed, yerr=bars if at == 0 else None, color=_COLOURS[at % len(_COLOURS)], marker="o",
            markersize=5, linestyle=_LINES[at % len(_LINES)], linewidth=1.6, capsize=3, zorder=10 - at, label=name,
        )  # fmt: skip
        largest = max(largest, *predicted.tolist(), *observed.tolist(), *(_column(bins, "high") if at == 0 else [0.0]))
    end = min(1.0, 1.06 * largest) or 1.0
    axes.plot([0, end], [0, end], color=_GREY, linewidth=1.0, label="as often as predicted")
    axes.set_xlim(-0.01 * end, end)
    axes.set_ylim(-0.01 * end, end)
    axes.set_aspect("equal")
    axes.set_xlabel("predicted probability, mean of a tenth of the predictions")
    axes.set_ylabel("how many of them came true")
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    _plain(axes)
    figure.suptitle(
        f"{report.task}: does it happen as often as predicted?\n{report.evaluated:,} predictions after the split, "
        f"{report.evaluated_positives:,} of which came true; bars: 95 % of the live head's",
        fontsize=11,
    )
    return figure


def _groups(report: TaskReport) -> Figure:
    groups = list(reversed(report.groups))
    figure = Figure(figsize=(9.0, 1.8 + 0.32 * len(groups)), dpi=130, layout="constrained")
    axes = figure.subplots()
    loss = 100 * _column(groups, "loss")
    bars = np.abs(np.stack([loss - 100 * _column(groups, "low"), 100 * _column(groups, "high") - loss]))
    clear = [group.low > 0 for group in groups]
    axes.barh(
        range(len(groups)), loss, color=[_COLOURS[0] if one else "0.75" for one in clear], xerr=bars,
        error_kw={"ecolor": _GREY, "capsize": 2.5, "elinewidth": 1.0},
    )  # fmt: skip
    axes.set_yticks(range(len(groups)), [f"{group.name} ({group.inputs})" for group in groups], fontsize=9)
    axes.axvline(0.0, color=_GREY, linewidth=1.0)
    axes.margins(y=0.01)
    axes.set_xlabel("AUC points lost without it (1 point = 0.01); blue: its 95 % interval lies above 0")
    _plain(axes)
    figure.suptitle(
        f"{report.task}: what each group of inputs contributes (in brackets how many)\nhead learned anew on the record "
        f"without it; {report.group_examples:,} examples, measured after the split",
        fontsize=11,
    )
    return figure


def _column(items: Sequence[Any], name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([getattr(item, name) for item in items], np.float64)


def _plain(axes: Any) -> None:
    axes.grid(True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
