"""Quality on real streams with delayed feedback, beside what it is to be better than.

    python -m tests.bench.quality --stream loan coupon [--rows live frozen …] [--refit-days 1] [--trunks next_event …]

A stream goes through Kafka; a worker predicts, a trainer learns, and predictions are read back from the embeddings
topic: `live`. From the trainer's record come `frozen` (the same heads, which stop learning where judging begins) and
`publish_interval` (the same, published less often). `retrained_daily`: LightGBM on the same rows, and
`aggregates_lightgbm`: on hand-made aggregates, the better of two settings, both from scratch every `--refit-days`;
`logistic_refit` on the aggregates as often; `river`: logistic regression online. With `--trunks`, heads learn over
states of trunks that were made in other ways, too. All are judged on the same points, with 95 % intervals from a
bootstrap over clients. The last line is JSON, by stream.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.model.heads import Questions
from stream.model.layout import Layout
from stream.model.parameters import ParameterSet
from stream.settings import Settings, load
from stream.wire import Schema
from tests.bench.quality.baselines import FIRST, REGULARISED, boosted, logistic_refit, online_logistic
from tests.bench.quality.coupon import coupon_stream
from tests.bench.quality.live import live, lived
from tests.bench.quality.loan import loan_stream
from tests.bench.quality.streams import NEVER_MS, Points, Stream
from tests.bench.quality.trunks import TRUNKS, made_trunk, under_trunk
from tests.bench.support.site import machine
from trainer.evaluation import auc, auc_difference_interval, auc_interval, expected_calibration_error, log_loss
from trainer.record import AnsweredExamples, read_record
from trainer.report.again import Again

__all__ = ["main"]

Floats = NDArray[np.float64]
Tell = Callable[[str], None]
HOUR_MS = 3_600_000
ROWS = ("live", "frozen", "retrained_daily", "aggregates_lightgbm", "logistic_refit", "river")
STREAMS: dict[str, Callable[[int | None], Stream]] = {"loan": loan_stream, "coupon": coupon_stream}
NEVER = "never"
INTERVALS_MS = {"5h": 5 * HOUR_MS, "1h": HOUR_MS, "30min": HOUR_MS // 2, "1s": 1000}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.quality", description=__doc__)
    parser.add_argument("--stream", nargs="+", choices=sorted(STREAMS), default=sorted(STREAMS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="beside `live` (default: all)")
    parser.add_argument("--refit-days", type=float, default=1.0, help="days between refits of baselines (%(default)s)")
    parser.add_argument("--pace", type=float, help="records published a second, at most (default: the stream's)")
    parser.add_argument(
        "--behind", type=int, metavar="N",
        help="publish nothing while worker or trainer have so many records to go (default: the stream's)",
    )  # fmt: skip
    parser.add_argument("--trunk", choices=sorted(TRUNKS), help="that serves (default: the stream's)")
    parser.add_argument("--trunks", nargs="*", choices=sorted(TRUNKS), default=(), help="that are compared")
    parser.add_argument("--directory", help="keep here what was found, and go on from what is there")
    parser.add_argument("--cases", type=int, help="only the first so many clients")
    parser.add_argument("--rounds", type=int, default=500, help="of the bootstrap (%(default)s)")
    options = parser.parse_args(arguments)
    began = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    with contextlib.ExitStack() as kept:
        place = options.directory or kept.enter_context(tempfile.TemporaryDirectory(prefix="livestate-quality-"))
        result: dict[str, Any] = {
            name: _measured(STREAMS[name](options.cases), place, options, tell) for name in options.stream
        }
    result |= {"seconds": round(time.monotonic() - began), "machine": machine()}
    print(json.dumps(result))
    return result


def _measured(stream: Stream, place: str, options: argparse.Namespace, tell: Tell) -> dict[str, Any]:
    tell(f"{stream.task}: {len(stream.events):,} events, {len(stream.points):,} points")
    trunk = options.trunk or stream.trunk

    def make_trunk(settings: Settings) -> ParameterSet:
        made = made_trunk(trunk, settings, stream)
        tell(f"trunk: {trunk}")
        return made

    settings = load(stream.settings)
    directory = Path(place) / stream.task
    left = lived(directory) or live(stream, directory, make_trunk, options.pace, options.behind)
    examples = read_record(left.record)[stream.task]
    at = _places(stream.points, examples)
    judged = (stream.points.as_of_ms >= stream.judged_from_ms) & (stream.points.known_ms < NEVER_MS)
    scores, intervals, trunks = {}, {}, {}

    def kept(name: str, make: Callable[[], Floats]) -> Floats:
        """What `make` gives, or gave in an earlier run."""
        file = directory / f"{name}.npy"
        if not file.exists():
            np.save(file, make())
        values: Floats = np.load(file)
        several = values.reshape(-1, len(judged))
        there = judged & np.isfinite(several).all(axis=0)
        for one in several:
            tell(f"{name}: AUC {auc(stream.points.label[there], one[there]):.4f} of {int(there.sum()):,}")
        return values

    def published() -> Floats:
        question = Questions(Layout.compile(settings, Schema.compile(settings))).by_task[stream.task]
        again = Again.of(settings, question, examples)
        often, _ = again.published_every(list(INTERVALS_MS.values()), stream.judged_from_ms)
        said = [again.frozen_at(stream.judged_from_ms), *often]
        return np.stack([_at(one[:, 0], at, len(judged)) for one in said])

    scores["live"] = kept("live", lambda: left.prediction)
    for name, make in _baselines(stream, examples, at, options.refit_days).items():
        if name.startswith(tuple(options.rows)):
            scores[name] = kept(f"{name}-{options.refit_days:g}", make)
    if "frozen" in options.rows:
        intervals = dict(zip((NEVER, *INTERVALS_MS), kept("published", published), strict=True))
        scores["frozen"] = intervals[NEVER]
    for name in options.trunks:
        trunks[name] = kept(f"trunk-{name}", partial(_over, name, settings, stream, examples, at))
    for values in [*scores.values(), *intervals.values(), *trunks.values()]:
        judged &= np.isfinite(values)
    return {
        **_result(stream, scores, intervals, judged, options.rounds),
        "trunks": _compared(stream, trunks, judged, options.rounds),
        "trunk": trunk, "refit_days": options.refit_days, "pace": options.pace or stream.pace,
        "versions": left.versions, "live_s": round(left.seconds),
    }  # fmt: skip


def _over(trunk: str, settings: Settings, stream: Stream, examples: AnsweredExamples, at: NDArray[np.int64]) -> Floats:
    """(points,) what heads would have said over that trunk."""
    said = under_trunk(settings, stream, made_trunk(trunk, settings, stream), examples, at)
    return _at(said, at, len(stream.points))


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
    stream: Stream, examples: AnsweredExamples, at: NDArray[np.int64], days: float
) -> dict[str, Callable[[], Floats]]:
    points = stream.points
    rows = np.full((len(points), examples.inputs.shape[1]), np.nan, np.float32)
    rows[at] = examples.inputs
    return {
        "retrained_daily": lambda: boosted(stream, rows, days, REGULARISED),
        "aggregates_lightgbm_first": lambda: boosted(stream, points.aggregates, days, FIRST),
        "aggregates_lightgbm_regularised": lambda: boosted(stream, points.aggregates, days, REGULARISED),
        "logistic_refit": lambda: logistic_refit(stream, days),
        "river": lambda: online_logistic(stream),
    }


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
        **{name: row["auc"] for name, row in rows.items()},
        "gain_over_frozen": gains.get("frozen"),
        "points": int(judged.sum()),
        "clients": len(np.unique(client)),
        "positives": int(label.sum()),
        "rows": rows,
        "gains": gains,
        "publish_interval": {name: round(auc(label, values[judged]), 4) for name, values in intervals.items()},
    }


def _compared(
    stream: Stream, scores: dict[str, Floats], judged: NDArray[np.bool_], rounds: int
) -> dict[str, dict[str, Any]]:
    """AUC over each trunk, and how far it is ahead of the first one, with the interval over clients."""
    client, label = stream.points.client[judged], stream.points.label[judged]
    out: dict[str, dict[str, Any]] = {}
    for name, values in scores.items():
        first = next(iter(scores.values()))[judged]
        gain = auc_difference_interval(client, label, values[judged], first, np.random.default_rng(0), rounds)
        ahead = [round(value, 4) for value in (gain.value, gain.low, gain.high)]
        out[name] = {"auc": round(auc(label, values[judged]), 4), "ahead_of_first": ahead}
    return out


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
