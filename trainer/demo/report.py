"""What a run shows: a line of progress, and at the end its figures as text and JSON and a picture of AUC.

Guarantees: every figure shown was handed in; a figure that is not there is shown as a dash and `null`, never
as 0. Pictures are drawn without a display.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.dates as dates
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from trainer.evaluation import cumulative_auc, rolling_auc

__all__ = ["ProgressLine", "RunReport", "Series", "draw_auc_over_time"]

DAY_MS = 86_400_000
#: Of fewer predictions of either outcome, AUC says nothing, and a curve would show noise.
LEAST_OF_EACH_CLASS = 10
#: Blue, orange, green of Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


class ProgressLine:
    """One line of progress on standard output, written over itself on a terminal, now and then elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._told = -float("inf")

    def show(self, share: float, text: str) -> None:
        """Say how far it is, 0 to 1; 1 ends the line."""
        now = time.monotonic()
        if now - self._told < (0.2 if self._live else 10.0) and share < 1.0:
            return
        self._told = now
        width = 24
        bar = "█" * int(share * width) + "░" * (width - int(share * width))
        line = f"{bar} {share:4.0%}  {text}"
        if self._live:
            columns = shutil.get_terminal_size().columns
            print(f"\r{line[: columns - 1]:<{columns - 1}}", end="" if share < 1.0 else "\n", flush=True)
        else:
            print(line, flush=True)


@dataclass(frozen=True)
class RunReport:
    """What a run did and how well. Counts are whole runs; times in milliseconds; None: not measured."""

    events_published: int
    events_applied: int
    clients: int
    embeddings_published: int
    feedback_published: int
    feedback_joined: int
    feedback_late: int
    feedback_unmatched: int
    versions_published: int
    versions_applied: int
    feedback_to_served_median_ms: float | None
    feedback_to_served_p99_ms: float | None
    #: prequential AUC of each model on the same predictions, best known name first: `live`, `frozen`,
    #: `lightgbm`
    auc: dict[str, float | None]
    #: what `auc` was measured on
    evaluated: str = ""
    dead_letters: int = 0
    elapsed_s: float | None = None
    picture: str | None = None
    #: further figures, name -> value
    more: dict[str, float | int | str | None] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line of JSON; figures that are not there, or not finite, are null."""
        return json.dumps(_finite(asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> RunReport:
        """The report that `to_json` wrote."""
        return cls(**json.loads(text))

    def table(self) -> str:
        """The figures as aligned lines of text."""
        same = "equal" if self.events_published == self.events_applied else "NOT EQUAL"
        rows: list[tuple[str, str]] = [
            ("events published", _count(self.events_published)),
            ("events applied", f"{_count(self.events_applied)}  ({same})"),
            ("clients", _count(self.clients)),
            ("embeddings published", _count(self.embeddings_published)),
            ("dead letters", _count(self.dead_letters)),
            ("feedback published", _count(self.feedback_published)),
            ("  joined", _count(self.feedback_joined)),
            ("  late", _count(self.feedback_late)),
            ("  unmatched", _count(self.feedback_unmatched)),
            ("parameter versions published", _count(self.versions_published)),
            ("parameter versions applied", _count(self.versions_applied)),
            ("feedback to served, median", _milliseconds(self.feedback_to_served_median_ms)),
            ("feedback to served, p99", _milliseconds(self.feedback_to_served_p99_ms)),
            *((f"AUC {name}", _auc(value)) for name, value in self.auc.items()),
        ]
        if self.evaluated:
            rows.append(("AUC measured on", self.evaluated))
        rows += [(name, str(value) if value is not None else "-") for name, value in self.more.items()]
        if self.elapsed_s is not None:
            rows.append(("time taken", f"{self.elapsed_s:.0f} s"))
        rows.append(("picture", self.picture or "-"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


@dataclass(frozen=True)
class Series:
    """The predictions of one model, in any order.

    name: as in the legend. times_ms: int64[n] UTC ms. labels: bool[n]. scores: float[n]; NaN where the model
    made no prediction.
    """

    name: str
    times_ms: ArrayLike
    labels: ArrayLike
    scores: ArrayLike

    def known(self) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.float64]]:
        """Times, labels and scores where there is a score."""
        times, labels = np.asarray(self.times_ms, np.int64), np.asarray(self.labels, bool)
        scores = np.asarray(self.scores, np.float64)
        there = ~np.isnan(scores)
        return times[there], labels[there], scores[there]


def draw_auc_over_time(
    path: str | Path,
    series: list[Series],
    *,
    title: str,
    evaluated_from_ms: int | None = None,
    window_days: float = 60.0,
    step_days: float = 2.0,
) -> Path:
    """Draw AUC over time of several models to a PNG file and return its path.

    Above, AUC of the predictions of the last `window_days`; below, of all predictions since
    `evaluated_from_ms`, which is marked. A curve begins where there are at least ten predictions of each
    outcome. The directory is made when missing.

    Raises
    ------
    ValueError: there is no prediction to draw.
    """
    known = [(one.name, *one.known()) for one in series]
    moments = np.concatenate([times for _, times, _, _ in known]) if known else np.empty(0, np.int64)
    if not len(moments):
        raise ValueError("series: expected at least one model with predictions")
    first, last = int(moments.min()), int(moments.max())
    begin = first if evaluated_from_ms is None else evaluated_from_ms
    ends = np.append(np.arange(first, last, step_days * DAY_MS), last)
    figure = Figure(figsize=(10.0, 7.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    rolling, total = figure.subplots(2, 1, sharex=True)
    for at, (name, times, labels, scores) in enumerate(known):
        colour = COLOURS[at % len(COLOURS)]
        # Earlier series lie on top: the first one named is the one that the picture is about.
        style: dict[str, Any] = {"color": colour, "linewidth": 2.2 if at == 0 else 1.6, "zorder": 10 - at}
        style["drawstyle"] = "steps-post"
        recent = rolling_auc(times, labels, scores, ends, window_days * DAY_MS)
        recent[_rarer(times, labels, ends - window_days * DAY_MS, ends) < LEAST_OF_EACH_CLASS] = np.nan
        rolling.plot(_days(ends), recent, label=name, **style)
        since = times >= begin
        after = ends[ends >= begin]
        values = cumulative_auc(times[since], labels[since], scores[since], after)
        values[_rarer(times, labels, np.full(len(after), begin - 1), after) < LEAST_OF_EACH_CLASS] = np.nan
        overall = values[-1] if len(values) else float("nan")
        total.plot(_days(after), values, label=f"{name}: {_auc(float(overall))}", **style)
    rolling.set_title(f"Predictions of the last {window_days:g} days", fontsize=10, loc="left")
    day = np.datetime64(begin, "ms").astype("datetime64[D]")
    total.set_title(f"All predictions since {day}", fontsize=10, loc="left")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    for axes in (rolling, total):
        axes.set_ylabel("AUC (0.5: chance)")
        axes.grid(True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="best", framealpha=0.9, fontsize=9)
        if evaluated_from_ms is not None and first < evaluated_from_ms < last:
            mark = float(_days(np.asarray([evaluated_from_ms]))[0])
            axes.axvline(mark, color="0.4", linestyle=":", linewidth=1.2)
            axes.annotate(
                f"from {day} ",
                (mark, 1.0),
                xycoords=("data", "axes fraction"),
                ha="right",
                va="top",
                fontsize=9,
                color="0.35",
            )
    locator = dates.AutoDateLocator()
    total.xaxis.set_major_locator(locator)
    total.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))
    total.set_xlabel("day of the campaign's start (time of the prediction)")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="png")
    return target


def _rarer(
    times: NDArray[np.int64], labels: NDArray[np.bool_], after: NDArray[Any], until: NDArray[Any]
) -> NDArray[np.int64]:
    """int64[len(until)]: how many predictions in (after, until] have the outcome that is rarer there."""
    counts = []
    for outcome in (True, False):
        moments = np.sort(times[labels == outcome])
        counts.append(np.searchsorted(moments, until, "right") - np.searchsorted(moments, after, "right"))
    return np.asarray(np.minimum(*counts), np.int64)


def _days(times_ms: NDArray[Any]) -> NDArray[np.float64]:
    """matplotlib's days since 1970."""
    return np.asarray(times_ms, np.float64) / DAY_MS


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _count(value: int) -> str:
    return f"{value:,}"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:,.0f} ms"


def _auc(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"
