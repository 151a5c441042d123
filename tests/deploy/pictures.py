"""Pictures of the boards, drawn from their own queries against a live run: python -m tests.deploy.pictures.

It starts a broker, a trainer, a worker and a Prometheus, replays real purchases with their feedback for a while, asks
by HTTP, and writes deploy/images/board-NAME.png. What is drawn is what Grafana would draw, in a similar look.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from deploy.grafana.boards import BOARDS
from deploy.grafana.panels import COLUMNS, Board
from stream.broker import EmbeddedBroker
from stream.cli import EXAMPLE
from tests.deploy.queries import ROOT, filled
from tests.deploy.watched import Prometheus, Watched, run_watched
from tests.support.processes import http_get

__all__ = ["draw", "main", "shown"]

IMAGES = ROOT / "deploy/images"
_POINTS = 120
_DPI = 80
_GROUND, _PANEL, _TEXT, _LINES = "#111217", "#1a1c22", "#d0d1d6", "#33363d"
_COLOURS = {"green": "#3f8f4f", "yellow": "#b8901f", "red": "#c4354a", "blue": "#2f62b0"}
_CURVES = ["#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#37872d", "#8ab8ff", "#e0b400"]


def shown(value: float, unit: str) -> str:
    """A number as the board's unit writes it."""
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        return f"{1000 * value:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"
    if unit == "dateTimeAsIso":
        return time.strftime("%Y-%m-%d %H:%M", time.gmtime(value / 1000))
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size and unit != "none":
            value, suffix = value / size, letter
            break
    else:
        suffix = ""
    ending = {"bytes": f" {suffix}B", "cps": f"{suffix}/s", "reqps": f"{suffix}/s"}.get(unit, suffix)
    return f"{value:.4g}{ending}"


def _colour(value: float, steps: list[dict[str, Any]]) -> str:
    reached = [step["color"] for step in steps if step["value"] is None or value >= step["value"]]
    return _COLOURS[reached[-1]]


def _legend(form: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), form)


def _tile(axes: Axes, panel: dict[str, Any], prometheus: Prometheus, at: float) -> None:
    field, (target,) = panel["fieldConfig"]["defaults"], panel["targets"]
    result = prometheus.get("query", query=filled(target["expr"]), time=at)["result"]
    value = float(result[0]["value"][1])
    axes.set_facecolor(_colour(value, field["thresholds"]["steps"]))
    axes.text(0.5, 0.42, shown(value, field["unit"]), ha="center", va="center", fontsize=17, color="white")
    axes.text(0.04, 0.93, panel["title"], ha="left", va="top", fontsize=8, color="white")
    axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(0, 1))


def _graph(axes: Axes, panel: dict[str, Any], prometheus: Prometheus, start: float, end: float) -> None:
    field = panel["fieldConfig"]["defaults"]
    axes.set_facecolor(_PANEL)
    drawn: list[tuple[str, list[float], list[float]]] = []
    for target in panel["targets"]:
        found = prometheus.get(
            "query_range", query=filled(target["expr"]), start=start, end=end, step=(end - start) / _POINTS
        )["result"]
        for series in found:
            points = [(float(at) - start, float(value)) for at, value in series["values"]]
            drawn.append(
                (_legend(target["legendFormat"], series["metric"]), [x for x, _ in points], [y for _, y in points])
            )
    if field["custom"]["stacking"]["mode"] == "normal":
        longest = max((xs for _, xs, _ in drawn), key=len)
        layers = [[dict(zip(xs, ys, strict=True)).get(x, 0.0) for x in longest] for _, xs, ys in drawn]
        colours = [_CURVES[i % len(_CURVES)] for i in range(len(layers))]
        axes.stackplot(longest, *layers, labels=[name for name, _, _ in drawn], colors=colours, alpha=0.6)
    else:
        for i, (name, xs, ys) in enumerate(drawn):
            axes.plot(xs, ys, label=name, color=_CURVES[i % len(_CURVES)], linewidth=1.1)
    limits = [step["value"] for step in field["thresholds"]["steps"] if step["value"] is not None]
    if field["custom"]["thresholdsStyle"]["mode"] == "line":
        axes.axhline(limits[0], color=_COLOURS["red"], linewidth=1, linestyle="--")
    if field["unit"] != "dateTimeAsIso":
        axes.set_ylim(bottom=0)
    axes.set_xlim(0, end - start)
    axes.set_title(panel["title"], loc="left", fontsize=8, color=_TEXT, pad=4)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, field["unit"])))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} s"))
    axes.tick_params(colors=_TEXT, labelsize=6.5, length=0)
    axes.grid(color=_LINES, linewidth=0.5)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=3, fontsize=6.5, frameon=False, labelcolor=_TEXT,
        handlelength=1.2, columnspacing=1.0,
    )  # fmt: skip


def draw(board: Board, prometheus: Prometheus, start: float, end: float, path: Path) -> None:
    """Draw a board as it was between two times (UTC seconds) to a PNG file."""
    panels = board.as_json()["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    width, height = 12.5, 0.7 + 0.3 * rows
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor=_GROUND)
    top = 0.6 / height
    figure.text(0.012, 1 - 0.3 / height, board.as_json()["title"], color=_TEXT, fontsize=13, va="center")

    def place(grid: dict[str, int], left: float, right: float, above: float, below: float) -> Axes:
        """Axes at a place of the grid, with margins in inches."""
        x, w = grid["x"] / COLUMNS, grid["w"] / COLUMNS
        y, h = grid["y"] / rows * (1 - top), grid["h"] / rows * (1 - top)
        return figure.add_axes(
            (
                x + left / width, 1 - top - y - h + below / height,
                w - (left + right) / width, h - (above + below) / height,
            )
        )  # fmt: skip

    for panel in panels:
        grid = panel["gridPos"]
        if panel["type"] == "row":
            middle = 1 - top - (grid["y"] + 0.5) / rows * (1 - top)
            figure.text(0.012, middle, panel["title"], color=_TEXT, fontsize=10, va="center", weight="bold")
            continue
        is_tile = panel["type"] == "stat"
        axes = place(grid, 0.06, 0.06, 0.06, 0.06) if is_tile else place(grid, 0.62, 0.14, 0.32, 0.5)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if is_tile:
            _tile(axes, panel, prometheus, end)
        else:
            _graph(axes, panel, prometheus, start, end)
    figure.savefig(path, dpi=_DPI, pil_kwargs={"optimize": True})


def _use(watched: Watched, seconds: float, rate: int, log: Path) -> None:
    """Replay purchases, and ask both for one client and for nobody, for so long."""
    command = [sys.executable, "-m", "trainer.demo.replay", str(EXAMPLE), "--rate", str(rate)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **watched.environment}
    with log.open("wb") as output:
        replay = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            assert not replay.poll(), log.read_text()
            http_get(watched.worker_port, "/v1/clients/900")
            http_get(watched.worker_port, "/v1/clients/nobody")
            time.sleep(0.1)
    finally:
        replay.kill()
        replay.wait()


def main(arguments: list[str] | None = None) -> None:
    """Run, and draw every board."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240.0, help="how long purchases are replayed")
    parser.add_argument("--rate", type=int, default=4000, help="events a second")
    parser.add_argument("--out", type=Path, default=IMAGES, help="a directory")
    options = parser.parse_args(arguments)
    mpl.use("agg")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with EmbeddedBroker(directory / "broker") as broker, run_watched(broker, directory) as watched:
            start = time.time()
            _use(watched, options.seconds, options.rate, directory / "replay.log")
            end = time.time() - 2.0
            for board in BOARDS:
                draw(board, watched.prometheus, start, end, options.out / f"board-{board.name}.png")
    print(f"{len(BOARDS)} pictures in {options.out}")


if __name__ == "__main__":
    sys.exit(main())
