"""Quality on a real stream with delayed feedback, beside what it is to be better than.

    python -m tests.bench.quality --stream loan [--rows live frozen …] [--refit-days 1] [--pace 1500] [--cases N]

The stream goes through Kafka; a worker predicts, a trainer learns, and predictions are read back from the embeddings
topic: `live`. From the trainer's record come `frozen` (the same heads, which stop learning where judging begins) and
`publish_interval` (the same, published less often). `retrained_daily`: LightGBM on the same rows, and
`aggregates_lightgbm`: on hand-made aggregates, the better of two settings, both from scratch every `--refit-days`;
`logistic_refit` on the aggregates as often; `river`: logistic regression online. All are judged on the same points,
with 95 % intervals from a bootstrap over clients. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.bench.quality.again import published_every
from tests.bench.quality.baselines import FIRST, REGULARISED, boosted, logistic_refit, online_logistic
from tests.bench.quality.live import live
from tests.bench.quality.streams import STREAMS, Points, Stream
from tests.bench.support.site import machine
from trainer.evaluation import auc, auc_difference_interval, auc_interval, expected_calibration_error, log_loss
from trainer.record import AnsweredExamples, read_record

__all__ = ["main"]

Floats = NDArray[np.float64]
Tell = Callable[[str], None]
HOUR_MS = 3_600_000
ROWS = ("live", "frozen", "retrained_daily", "aggregates_lightgbm", "logistic_refit", "river")
INTERVALS_MS = {"never": None, "5h": 5 * HOUR_MS, "1h": HOUR_MS, "30min": HOUR_MS // 2, "1s": 1000}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.quality", description=__doc__)
    parser.add_argument("--stream", choices=sorted(STREAMS), default="loan")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="beside `live` (default: all)")
    parser.add_argument("--refit-days", type=float, default=1.0, help="days between refits of baselines (%(default)s)")
    parser.add_argument("--pace", type=float, default=1500.0, help="records published a second, at most (%(default)s)")
    parser.add_argument(
        "--behind", type=int, default=2_000, metavar="N",
        help="publish nothing while worker or trainer have so many records to go (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--trunk", choices=("random", "pretrained"), default="random")
    parser.add_argument("--cases", type=int, help="only the first so many clients")
    parser.add_argument("--rounds", type=int, default=500, help="of the bootstrap (%(default)s)")
    options = parser.parse_args(arguments)
    began = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    stream = STREAMS[options.stream](options.cases)
    tell(f"{len(stream.events):,} events, {len(stream.points):,} points")
    with tempfile.TemporaryDirectory(prefix="livestate-quality-") as directory:
        lived = live(stream, Path(directory), options.pace, options.trunk, options.behind)
        tell(f"live: {lived.versions:,} versions")
        examples = read_record(lived.record)[stream.task]
    at = _places(stream.points, examples)
    scores, intervals = {"live": lived.prediction}, {}
    if "frozen" in options.rows:
        same = published_every(
            lived.settings, stream.task, examples, stream.judged_from_ms, list(INTERVALS_MS.values())
        )
        intervals = {name: _at(same[interval], at, len(stream.points)) for name, interval in INTERVALS_MS.items()}
        scores["frozen"] = intervals["never"]
        tell("frozen, and published less often")
    scores |= _baselines(stream, examples, at, options.rows, options.refit_days, tell)
    judged = stream.points.as_of_ms >= stream.judged_from_ms
    for values in [*scores.values(), *intervals.values()]:
        judged &= np.isfinite(values)
    result = _result(stream, scores, intervals, judged, options.rounds)
    result |= {
        "stream": options.stream, "trunk": options.trunk, "refit_days": options.refit_days, "pace": options.pace,
        "versions": lived.versions, "live_s": round(lived.seconds), "seconds": round(time.monotonic() - began),
        "machine": machine(),
    }  # fmt: skip
    print(json.dumps(result))
    return result


def _places(points: Points, examples: AnsweredExamples) -> NDArray[np.int64]:
    """(examples,) the point of each answered example."""
    moments = zip(points.client.tolist(), points.as_of_ms.tolist(), strict=True)
    number = {(client.encode(), at): i for i, (client, at) in enumerate(moments)}
    return np.array([number[key] for key in zip(examples.client_id, examples.as_of_ms.tolist(), strict=True)], np.int64)


def _at(values: NDArray[Any], at: NDArray[np.int64], n: int) -> Floats:
    out = np.full(n, np.nan)
    out[at] = values
    return out


def _baselines(
    stream: Stream, examples: AnsweredExamples, at: NDArray[np.int64], wanted: Sequence[str], days: float, tell: Tell
) -> dict[str, Floats]:
    points, from_ms = stream.points, stream.judged_from_ms
    rows = np.full((len(points), examples.inputs.shape[1]), np.nan, np.float32)
    rows[at] = examples.inputs
    makers = {
        "retrained_daily": lambda: boosted(points, rows, from_ms, days, REGULARISED),
        "aggregates_lightgbm_first": lambda: boosted(points, points.aggregates, from_ms, days, FIRST),
        "aggregates_lightgbm_regularised": lambda: boosted(points, points.aggregates, from_ms, days, REGULARISED),
        "logistic_refit": lambda: logistic_refit(points, from_ms, days),
        "river": lambda: online_logistic(points, from_ms),
    }
    scores = {}
    for name, make in makers.items():
        if name.startswith(tuple(wanted)):
            scores[name] = make()
            tell(name)
    return scores


def _result(
    stream: Stream,
    scores: dict[str, Floats],
    intervals: dict[str, Floats],
    judged: NDArray[np.bool_],
    rounds: int,
) -> dict[str, Any]:
    client, label = stream.points.client[judged], stream.points.label[judged]
    rows: dict[str, Any] = {}
    for name, values in scores.items():
        said = values[judged]
        found = auc_interval(client, label, said, np.random.default_rng(0), rounds)
        rows[name] = {
            "auc": round(found.value, 4), "auc_interval": [round(found.low, 4), round(found.high, 4)],
            **_measures(client, label, said, rounds),
        }  # fmt: skip
    two = [row for name, row in rows.items() if name.startswith("aggregates_lightgbm")]
    if two:
        rows["aggregates_lightgbm"] = max(two, key=lambda row: float(row["auc"]))
    live = scores["live"][judged]
    gains = {}
    for name, values in scores.items():
        if name != "live":
            gain = auc_difference_interval(client, label, live, values[judged], np.random.default_rng(0), rounds)
            gains[name] = [round(value, 4) for value in (gain.value, gain.low, gain.high)]
    return {
        "points": int(judged.sum()),
        "clients": len(np.unique(client)),
        "positives": int(label.sum()),
        "rows": rows,
        "gain_over_frozen": gains.get("frozen"),
        "gains": gains,
        "publish_interval": {name: round(auc(label, values[judged]), 4) for name, values in intervals.items()},
    }


def _measures(client: NDArray[np.str_], label: NDArray[np.bool_], said: Floats, rounds: int) -> dict[str, Any]:
    """Log loss and calibration error, with their intervals over clients."""
    measures = {"log_loss": log_loss, "calibration_error": expected_calibration_error}
    order = np.argsort(client, kind="stable")
    starts = np.flatnonzero(np.append(True, client[order][1:] != client[order][:-1]))
    groups = np.split(order, starts[1:])
    random = np.random.default_rng(0)
    drawn: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(min(rounds, 100)):
        chosen = np.concatenate([groups[i] for i in random.integers(0, len(groups), len(groups))])
        for name, measure in measures.items():
            drawn[name].append(measure(label[chosen], said[chosen]))
    out: dict[str, Any] = {}
    for name, measure in measures.items():
        low, high = np.quantile(drawn[name], [0.025, 0.975])
        out[name] = round(measure(label, said), 4)
        out[f"{name}_interval"] = [round(float(low), 4), round(float(high), 4)]
    return out


if __name__ == "__main__":
    main()
