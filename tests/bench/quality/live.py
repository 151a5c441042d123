"""The system itself: a broker, a worker and a trainer as processes, the stream through Kafka, predictions read back."""

from __future__ import annotations

import contextlib
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from confluent_kafka import Message, Producer
from numpy.typing import NDArray

from stream.broker import EmbeddedBroker
from stream.kafka import ensure_topics, producer_config
from stream.model.parameters import ParameterSet
from stream.settings import Settings, load
from stream.wire import RecordBlock
from tests.bench.quality.streams import Stream
from trainer.demo.comparison import served_predictions
from trainer.demo.processes import Exposition, Interrupts, Process, free_ports
from trainer.files import save_parameters

__all__ = ["Lived", "live", "lived", "record_blocks"]

_BLOCK = 5_000
_STALLED_S = 600.0


@dataclass(frozen=True)
class Lived:
    """What a run left: `prediction` (points,) as served, NaN where none was; the trainer's record of answered examples,
    and what it took.

    It is kept in its directory, from where `lived` takes it up again.
    """

    prediction: NDArray[np.float64]
    record: Path
    seconds: float
    versions: int


def lived(directory: Path) -> Lived | None:
    """What an earlier run left in this directory; None where none ended there."""
    kept = directory / "live.npz"
    if not kept.exists():
        return None
    with np.load(kept) as found:
        seconds, versions = found["seconds"].item(), found["versions"].item()
        return Lived(found["prediction"], directory / "answered.bin", seconds, versions)


def live(
    stream: Stream,
    directory: Path,
    make_trunk: Callable[[Settings], ParameterSet],
    pace: float | None = None,
    most_behind: int | None = None,
) -> Lived:
    """Run the stream through the system.

    Parameters
    ----------
    pace: records a second, events and feedback together, at most; by default the stream's.
    most_behind: nothing is published while worker or trainer have so many records to go; by default the stream's.
    """
    began = time.monotonic()
    directory.mkdir(parents=True, exist_ok=True)
    broker_port, worker_port, trainer_port = free_ports([0, 0, 0])
    # However it is told to end, what it started ends before it.
    with Interrupts(), contextlib.ExitStack() as started:
        broker = started.enter_context(EmbeddedBroker(directory / "broker", broker_port))
        environment = {
            **broker.environment,
            "LIVESTATE_KAFKA__SESSION_TIMEOUT_S": "6",
            "LIVESTATE_WORKER__DATA_DIR": str(directory / "worker"),
            "LIVESTATE_WORKER__HTTP_PORT": str(worker_port),
            "LIVESTATE_TRAINER__DATA_DIR": str(directory / "trainer"),
            "LIVESTATE_TRAINER__HTTP_PORT": str(trainer_port),
        }
        settings = load(stream.settings, {**os.environ, **environment})
        ensure_topics(settings, create=True)
        save_parameters(directory / "trunk.msgpack", make_trunk(settings))
        record = directory / "answered.bin"
        file = ["--settings", str(stream.settings)]
        worker = started.enter_context(Process("worker", ["worker", *file], environment, directory))
        trunk_file = ["--trunk", str(directory / "trunk.msgpack"), "--record", str(record)]
        trainer = started.enter_context(Process("trainer", ["trainer", *file, *trunk_file], environment, directory))
        started.callback(trainer.ask_to_stop)
        worker.wait_until_ready(worker_port, 300.0)
        trainer.wait_until_ready(trainer_port, 300.0)
        watched = _Watched(worker, trainer, Exposition(worker_port), Exposition(trainer_port))
        _publish(stream, settings, watched, pace or stream.pace, most_behind or stream.behind)
        watched.wait(len(stream.events), len(stream.feedback), 0)
        versions = int(watched.trainer_metrics.total("livestate_parameter_version"))
        said, _ = served_predictions(settings, stream.output)
    moments = zip(stream.points.client.tolist(), stream.points.as_of_ms.tolist(), strict=True)
    prediction = np.array([said.get((client.encode(), at), np.nan) for client, at in moments])
    seconds = time.monotonic() - began
    np.savez(directory / "live.npz", prediction=prediction, seconds=seconds, versions=versions)
    return Lived(prediction, record, seconds, versions)


def record_blocks(stream: Stream, until_ms: int) -> Iterator[RecordBlock]:
    """The events before that time."""
    early = bisect_left(stream.events, until_ms, key=lambda one: one[0])
    for at in range(0, early, _BLOCK):
        part = stream.events[at : min(at + _BLOCK, early)]
        yield RecordBlock.from_lists(
            [client for _, client, _ in part], [value for _, _, value in part], np.arange(at, at + len(part)),
            np.array([time_ms for time_ms, _, _ in part]),
        )  # fmt: skip


@dataclass(frozen=True)
class _Watched:
    worker: Process
    trainer: Process
    worker_metrics: Exposition
    trainer_metrics: Exposition

    def behind(self, events: int, feedback: int) -> int:
        """Records published and not applied yet, of whichever process has more of them."""
        for process, metrics in ((self.worker, self.worker_metrics), (self.trainer, self.trainer_metrics)):
            process.check()
            metrics.refresh()
        worker = events - self.worker_metrics.total("livestate_events_applied_total")
        trainer = events - self.trainer_metrics.total("livestate_trainer_events_total")
        trainer += feedback - self.trainer_metrics.total("livestate_feedback_total")
        return int(max(worker, trainer))

    def wait(self, events: int, feedback: int, most: int) -> None:
        """Until no more than so many records are to go."""
        least, moved_at = self.behind(events, feedback), time.monotonic()
        while least > most:
            time.sleep(0.05)
            now = self.behind(events, feedback)
            if now < least:
                least, moved_at = now, time.monotonic()
            elif time.monotonic() - moved_at > _STALLED_S:
                raise SystemExit(f"{now} records were not applied, and nothing moved for {_STALLED_S:g} s")


def _publish(stream: Stream, settings: Settings, watched: _Watched, pace: float, most_behind: int) -> None:
    """Events and feedback in the order of their times; feedback after every event before it."""
    producer = Producer(producer_config(settings, compression_type="none", linger_ms=5))
    refused: list[str] = []

    def delivered(error: object, message: Message) -> None:
        if error is not None:
            refused.append(str(error))

    kinds = (settings.topics.events, settings.topics.feedback)
    due = sorted(
        [(at, 0, client, value) for at, client, value in stream.events]
        + [(at, 1, client, value) for at, client, value in stream.feedback],
        key=lambda one: one[:2],
    )
    sent = [0, 0]
    began = time.monotonic()
    chunk = max(1, int(pace / 20))
    asked = 0
    for i, (_, kind, client, value) in enumerate(due):
        producer.produce(kinds[kind], value, client, on_delivery=delivered)
        sent[kind] += 1
        if i % chunk:
            continue
        producer.poll(0)
        if refused:
            raise SystemExit(f"a record was not delivered: {refused[0]}")
        # To ask costs both of them some milliseconds.
        if i - asked >= most_behind // 4:
            watched.wait(*sent, most_behind)
            asked = i
        time.sleep(max(0.0, began + i / pace - time.monotonic()))
    producer.flush(60)
