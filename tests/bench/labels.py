"""What learning labels early gives: a year of coupon campaigns through the trainer, once for each way of `labels`.

    python -m tests.bench.labels [--days 365] [--trunk FILE]

The trainer itself, without a broker: events and feedback of the Complete Journey in the order of their times, in four
partitions, a version served from at the end of each day of the stream. Every model is measured by what was served, on
the campaigns sent from July on that ended within the year: AUC, expected calibration error, log loss; differences to
`closed` with their 95 % intervals over households. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from stream.errors import RecordError
from stream.metrics import TrainerMetrics
from stream.model.parameters import ParameterSet
from stream.partitioner import partition_of
from stream.settings import Settings, load
from stream.wire import RecordBlock, encode_feedback
from trainer.demo.encoding import EventPacker
from trainer.demo.journey import DAY_MS, TASK, YEAR_START_MS, Journey
from trainer.demo.journey import load as load_journey
from trainer.evaluation import auc, auc_difference_interval, expected_calibration_error, log_loss
from trainer.examples import Example, Joined
from trainer.files import load_parameters, save_parameters
from trainer.online import OnlineTrainer
from trainer.pretrain import fit
from trainer.timeline import Record

__all__ = ["main"]

SHOP = Path(__file__).resolve().parents[2] / "stream" / "examples" / "shop.toml"
_PACK_EVENTS = 20_000
#: What is compared, as settings of the task.
WAYS: dict[str, dict[str, Any]] = {
    "closed": {"labels": "closed", "final_by": None},
    "final": {"labels": "final", "final_by": "campaign_type"},
    "as_they_come": {"labels": "as_they_come", "final_by": None},
    "closed, a quarter of the negatives": {"labels": "closed", "final_by": None, "negative_rate": 0.25},
}


class Stream:
    """The year as the trainer's records, a day at a time."""

    def __init__(self, journey: Journey, partitions: int) -> None:
        self.journey = journey
        self._packer = EventPacker(journey)
        self._partitions = partitions
        self._feedback = journey.feedback()
        self._known = np.array([one.timestamp_ms for one in self._feedback], np.int64)

    def pretrained(self, settings: Settings, path: Path | None) -> ParameterSet:
        """The trunk of the first quarter, as in the demo; kept in a file, if one is named."""
        if path is not None and path.exists():
            return load_parameters(path)
        part = self.journey.between(None, YEAR_START_MS + 91 * DAY_MS)

        def blocks() -> Iterator[RecordBlock]:
            for at in range(part.start, part.stop, _PACK_EVENTS):
                until = min(at + _PACK_EVENTS, part.stop)
                keys, values = self._packer.pack(slice(at, until))
                yield RecordBlock.from_lists(keys, values, np.arange(at, until), self.journey.timestamp_ms[at:until])

        parameters = fit(settings, blocks()).parameters
        if path is not None:
            save_parameters(path, parameters)
        return parameters

    def feed(self, trainer: OnlineTrainer) -> None:
        """Everything, with a version made at the end of each day: a day's events, then the labels known in it."""
        offsets: dict[tuple[str, int], int] = {}

        def record(kind: str, key: bytes, value: bytes, at: int) -> Record:
            partition = partition_of(key, self._partitions)
            offset = offsets[kind, partition] = offsets.get((kind, partition), -1) + 1
            return Record(partition, offset, at, key, value, ())

        times = self.journey.timestamp_ms
        for day in np.arange(YEAR_START_MS, self.journey.end_ms + DAY_MS, DAY_MS).tolist():
            part = self.journey.between(day, day + DAY_MS)
            keys, values = self._packer.pack(part)
            moments = times[part].tolist()
            trainer.apply_events([record("events", *one) for one in zip(keys, values, moments, strict=True)])
            known = self._feedback[slice(*np.searchsorted(self._known, [day, day + DAY_MS]).tolist())]
            trainer.apply_feedback(
                [record("feedback", one.client_id.encode(), encode_feedback(one), one.timestamp_ms) for one in known]
            )
            trainer.serve(ParameterSet(trainer.tensors(), day // DAY_MS))
            if trainer.needs_checkpoint:
                trainer.checkpoint(0)


def _refuse(record: Record, error: RecordError) -> None:
    raise error


def serve(stream: Stream, settings: Settings, parameters: ParameterSet) -> tuple[NDArray[Any], dict[str, float]]:
    """float64[sends]: what the trainer that learns under these settings says of each send when it is made; counts."""
    said: dict[tuple[bytes, int], float] = {}
    metrics = TrainerMetrics()
    with tempfile.TemporaryDirectory() as directory:
        trainer = OnlineTrainer(settings, Path(directory), parameters, metrics, _refuse)
        capture = trainer.joiner.capture

        def listening(partition: int, example: Example) -> Joined | None:
            said[example.client_id, example.as_of_ms] = example.prediction
            return capture(partition, example)

        trainer.joiner.capture = listening  # type: ignore[method-assign]
        try:
            stream.feed(trainer)
        finally:
            trainer.close()
    sends = stream.journey.sends
    pairs = zip(sends.household.tolist(), sends.timestamp_ms.tolist(), strict=True)
    found = np.array([said.get((str(household).encode(), at), np.nan) for household, at in pairs])
    # Before the first version nothing is said.
    served = np.where(np.isnan(found), 0.5, found)
    return served, {
        "learned": _total(metrics, "examples_learned"),
        "early": _total(metrics, "early_labels"),
        "corrected": _total(metrics, "feedback", outcome="corrected"),
    }


def _total(metrics: TrainerMetrics, name: str, **labels: str) -> float:
    samples = (one for family in metrics.registry.collect() for one in family.samples)
    return sum(
        one.value
        for one in samples
        if one.name == f"livestate_{name}_total" and all(one.labels[key] == value for key, value in labels.items())
    )


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the bench; prints and returns the result."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.labels")
    parser.add_argument("--days", type=int, default=365, help="days of the year to replay")
    parser.add_argument("--judged-from", type=int, default=181, help="first day whose predictions are measured")
    parser.add_argument("--trunk", type=Path, help="file to keep the pretrained trunk in")
    options = parser.parse_args(arguments)
    settings = load(SHOP, {})
    journey = load_journey().until(YEAR_START_MS + options.days * DAY_MS)
    stream = Stream(journey, settings.topics.partitions)
    print("pretraining ...", file=sys.stderr, flush=True)
    trunk = stream.pretrained(settings, options.trunk)
    sends = journey.sends
    redeemed = sends.redeemed_ms >= 0
    judged = journey.campaigns.end_ms[sends.campaign] <= journey.end_ms
    judged &= sends.timestamp_ms >= YEAR_START_MS + options.judged_from * DAY_MS
    result: dict[str, Any] = {"predictions": int(judged.sum()), "redeemed": float(redeemed[judged].mean())}
    said: dict[str, NDArray[Any]] = {}
    for name, overrides in WAYS.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        task = msgspec.structs.replace(settings.tasks[TASK], **overrides)
        served, outcomes = serve(stream, msgspec.structs.replace(settings, tasks={TASK: task}), trunk)
        said[name] = served[judged]
        truth = redeemed[judged]
        result[name] = {
            "auc": auc(truth, said[name]),
            "calibration_error": expected_calibration_error(truth, said[name]),
            "log_loss": log_loss(truth, said[name]),
            **outcomes,
        }
        if name != "closed":
            draws = np.random.default_rng(0)
            gain = auc_difference_interval(sends.household[judged], truth, said[name], said["closed"], draws)
            result[name]["auc_gain"] = [gain.value, gain.low, gain.high]
    # What a head that learned from a quarter of the negatives says, had its log-odds not been corrected.
    odds = said["closed, a quarter of the negatives"] / (1.0 - said["closed, a quarter of the negatives"]) / 0.25
    result["uncorrected_calibration_error"] = expected_calibration_error(redeemed[judged], odds / (1.0 + odds))
    print(json.dumps(result, default=lambda value: float(f"{value:.4g}")), flush=True)
    return result


if __name__ == "__main__":
    main()
