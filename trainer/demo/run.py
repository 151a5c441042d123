"""`livestate run`: the whole system on one machine, on a real year of purchases.

Steps: start an embedded broker; pretrain the trunk on the first quarter of the stream; start a worker and the
trainer, each a process of its own; replay the stream through Kafka; wait until all of it is applied; compare
the served predictions with what became of them, beside a frozen copy and retrained hand-made aggregates.

Guaranteed: everything it started has ended when it returns, however it ends, short of SIGKILL; the predictions
it reports on are those the worker published, read back from the embeddings topic. Ports are those of the
settings where they are free, else any.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stream.broker import EmbeddedBroker
from stream.commands.common import ProgressLine as CommandProgress
from stream.errors import DataError, LivestateError
from stream.kafka import ensure_topics
from stream.settings import Settings, Worker, load
from stream.wire import RecordBlock
from trainer.demo import journey as demo
from trainer.demo.comparison import MIDYEAR_MS, Comparison, compare
from trainer.demo.encoding import EventPacker
from trainer.demo.journey import DAY_MS, TASK, YEAR_START_MS, Journey
from trainer.demo.processes import Exposition, Interrupts, Process, free_ports
from trainer.demo.replay import Progress, replay
from trainer.demo.report import ProgressLine, RunReport
from trainer.files import save_parameters
from trainer.pretrain import fit
from trainer.report.commands import write_report

__all__ = ["Options", "run_demo"]

YEAR_END_MS = YEAR_START_MS + 365 * DAY_MS
_DRAIN_TIMEOUT_S = 120.0
_PACK_EVENTS = 20_000
#: Events published and not applied yet: more of them would be what feedback waits behind.
_MAX_LAG = 8_000
_CHECK_S = 1.0
_LOOK_S = 0.2
#: Twice the interval at which the trainer sets its gauges.
_SETTLED_S = 2.0


@dataclass(frozen=True)
class Options:
    """What the command was asked for; `rate` in events a second, `until_ms` the end of the stream."""

    settings: Path
    directory: Path
    rate: float
    keep: bool
    until_ms: int | None = None


@dataclass(frozen=True)
class _System:
    """A running system."""

    settings: Settings
    worker: Process
    trainer: Process
    worker_metrics: Exposition
    trainer_metrics: Exposition

    def check(self) -> None:
        self.worker.check()
        self.trainer.check()

    def refresh(self) -> None:
        self.worker_metrics.refresh()
        self.trainer_metrics.refresh()

    def applied(self) -> tuple[float, float]:
        """Events that have passed the worker and the trainer."""
        worker = self.worker_metrics
        return (
            worker.total("livestate_events_applied_total") + worker.total("livestate_dead_letters_total"),
            self.trainer_metrics.total("livestate_trainer_events_total"),
        )


def run_demo(options: Options) -> int:
    """Run it; returns the exit code.

    Raises
    ------
    LivestateError: a part did not start, failed, or lost something; the message says which.
    KeyboardInterrupt: on SIGINT and SIGTERM, after everything has ended.
    """
    began = time.monotonic()
    with Interrupts() as interrupts, contextlib.ExitStack() as started:
        try:
            _run(options, began, interrupts, started)
        except KeyboardInterrupt:
            print("\nStopping …", flush=True)
            raise
    return 0


def _run(options: Options, began: float, interrupts: Interrupts, started: contextlib.ExitStack) -> None:
    directory = options.directory
    asked = load(options.settings)
    _prepare(directory)
    print("Reading a year of purchases …", flush=True)
    journey = demo.load()
    if options.until_ms is not None:
        journey = journey.until(options.until_ms)
    purchases, sends, redemptions = journey.counts
    print(
        f"  {purchases:,} purchases of {journey.households:,} households, {sends:,} campaign sends, "
        f"{redemptions:,} coupon redemptions"
    )
    broker_port, worker_port, trainer_port = free_ports(
        [_port(asked.kafka.bootstrap_servers), asked.worker.http_port, asked.trainer.http_port]
    )
    with interrupts.held():
        broker = started.enter_context(EmbeddedBroker(directory / "broker", broker_port))
    environment = {
        **broker.environment,
        # The first member of a group waits for half of it.
        "LIVESTATE_KAFKA__SESSION_TIMEOUT_S": "6",
        "LIVESTATE_WORKER__DATA_DIR": str(directory / "worker"),
        "LIVESTATE_WORKER__HTTP_PORT": str(worker_port),
        "LIVESTATE_TRAINER__DATA_DIR": str(directory / "trainer"),
        "LIVESTATE_TRAINER__HTTP_PORT": str(trainer_port),
    }
    settings = load(options.settings, {**os.environ, **environment})
    ensure_topics(settings, create=True)
    trunk, record = directory / "trunk.msgpack", directory / "answered.bin"
    _pretrain(settings, journey, trunk)
    file = ["--settings", str(options.settings)]
    worker = Process("worker", ["worker", *file], environment, directory)
    trainer = Process(
        "trainer", ["trainer", *file, "--trunk", str(trunk), "--record", str(record)], environment, directory
    )
    print(f"Starting worker and trainer (logs in {directory}/) …", flush=True)
    with interrupts.held():
        started.enter_context(trainer)
        started.enter_context(worker)
        # Both get ready to end at the same time.
        started.callback(trainer.ask_to_stop)
        started.callback(worker.ask_to_stop)
    trainer.wait_until_ready(trainer_port, 60.0)
    worker.wait_until_ready(worker_port, 60.0)
    system = _System(settings, worker, trainer, Exposition(worker_port), Exposition(trainer_port))
    last = _replay(system, journey, options.rate)
    _drain(system, last)
    print("Comparing with a frozen copy and with batch models on hand-made aggregates …", flush=True)
    comparison = compare(settings, journey, record, directory / "auc.png")
    _draw_quality(settings, journey, record, directory / "quality")
    report = _report(system, journey, last, comparison, time.monotonic() - began)
    (directory / "report.json").write_text(report.to_json() + "\n")
    print(f"\n{report.table()}", flush=True)
    if report.events_published != report.events_applied:
        raise LivestateError(
            f"{report.events_published:,} events were published, but the worker applied {report.events_applied:,} "
            f"and refused {report.dead_letters:,} as dead letters; see {worker.log}"
        )
    if options.keep:
        _keep(system, broker.bootstrap_servers, journey)


def _port(bootstrap_servers: str) -> int:
    """The port of the first server named; 0 where there is none."""
    port = bootstrap_servers.split(",")[0].rpartition(":")[2]
    return int(port) if port.isdecimal() else 0


def _prepare(directory: Path) -> None:
    """A fresh place for this run; only what an earlier run left is removed."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("broker", "worker", "trainer", "quality"):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in ("trunk.msgpack", "answered.bin", "report.json", "auc.png"):
        (directory / name).unlink(missing_ok=True)


def _pretrain(settings: Settings, journey: Journey, trunk: Path) -> None:
    """Train the trunk on the first quarter of what is replayed, before anything is served."""
    span_ms = min(journey.end_ms + 1, YEAR_END_MS) - YEAR_START_MS
    until_ms = YEAR_START_MS + max(1, round(span_ms / 4 / DAY_MS)) * DAY_MS
    day = np.datetime64(until_ms, "ms").astype("datetime64[D]")
    print(f"Pretraining the trunk on the days before {day}: next purchase from the ones before …", flush=True)
    packer = EventPacker(journey)
    part = journey.between(None, until_ms)

    def blocks() -> Iterator[RecordBlock]:
        for at in range(part.start, part.stop, _PACK_EVENTS):
            until = min(at + _PACK_EVENTS, part.stop)
            keys, values = packer.pack(slice(at, until))
            yield RecordBlock.from_lists(keys, values, np.arange(at, until), journey.timestamp_ms[at:until])

    line, began = ProgressLine(), time.monotonic()
    result = fit(settings, blocks(), lambda share, text: line.show(min(share, 0.99), text))
    save_parameters(trunk, result.parameters)
    line.show(
        1.0,
        f"loss {result.loss:.3f} (best constant {result.baseline:.3f}), {result.events:,} events, "
        f"{time.monotonic() - began:.0f} s",
    )


def _replay(system: _System, journey: Journey, rate: float) -> Progress:
    """Publish the year while a thread watches the metrics."""
    print(f"Replaying {len(journey):,} events at up to {rate:,.0f} a second …", flush=True)
    watching = threading.Event()
    published = [0]
    failures: list[LivestateError] = []

    def watch() -> None:
        while not watching.wait(0.25):
            system.refresh()
            try:
                system.check()
            except LivestateError as error:
                failures.append(error)
                return

    def lag() -> int:
        return max(0, published[0] - int(min(system.applied())))

    line = ProgressLine()

    def progress(now: Progress) -> None:
        published[0] = now.events
        if failures:
            raise failures[0]
        done = now.events / max(1, now.events_total)
        line.show(min(done, 0.99), _progress_text(system, now, lag()))

    watcher = threading.Thread(target=watch, name="watch", daemon=True)
    watcher.start()
    try:
        last = replay(system.settings, journey, rate=rate, lag=lag, max_lag=_MAX_LAG, progress=progress)
    finally:
        watching.set()
        watcher.join()
    line.show(1.0, _progress_text(system, last, lag()))
    return last


def _progress_text(system: _System, now: Progress, lag: int) -> str:
    day = np.datetime64(now.stream_ms, "ms").astype("datetime64[D]") if now.stream_ms else "-"
    speed = now.events / max(now.elapsed_s, 1e-9)
    version = int(system.worker_metrics.total("livestate_parameter_version"))
    so_far = system.trainer_metrics.total("livestate_prequential_auc", task=TASK)
    quality = f"{so_far:.3f}" if so_far > 0 else "-"
    return f"{day}  {speed:,.0f} events/s  lag {lag:,}  version {version}  AUC so far {quality}"


def _drain(system: _System, last: Progress) -> None:
    """Wait until worker and trainer have passed everything and the last version serves."""
    what = f"worker and trainer have taken all {last.events:,} events and {last.feedback:,} labels"
    deadline = time.monotonic() + _DRAIN_TIMEOUT_S
    # What was learned is published a moment later, and metrics are set once a second: all must stay as it is.
    settled, since = None, 0.0
    while True:
        system.refresh()
        system.check()
        worker, trainer = system.worker_metrics, system.trainer_metrics
        now, version = time.monotonic(), trainer.total("livestate_parameter_version")
        if not (
            min(system.applied()) >= last.events
            and trainer.total("livestate_trainer_lag_events", topic=system.settings.topics.feedback) == 0
            and trainer.total("livestate_feedback_total") >= last.feedback
            and worker.total("livestate_parameter_version") >= version
        ):
            settled = None
        elif version != settled:
            settled, since = version, now
        elif now - since > _SETTLED_S + system.settings.trainer.publish_interval_s:
            return
        if now > deadline:
            passed, learned = system.applied()
            raise LivestateError(
                f"not within {_DRAIN_TIMEOUT_S:g} s: {what}; the worker has passed {passed:,.0f} events, the trainer "
                f"{learned:,.0f} and {trainer.total('livestate_feedback_total'):,.0f} labels"
            )
        time.sleep(_LOOK_S)


def _draw_quality(settings: Settings, journey: Journey, record: Path, directory: Path) -> None:
    """What `livestate report` makes of the record; nothing where it has no prediction from mid-year on."""
    if journey.end_ms <= MIDYEAR_MS:
        return
    print("Measuring quality over time and what each part of the row's memory contributes …", flush=True)
    line = CommandProgress(asked=False)
    try:
        figures = write_report(settings, record, directory, split_ms=MIDYEAR_MS, line=line)
        line.end()
    except DataError as error:
        print(f"  no quality report: {error}", flush=True)
        return
    print(f"  written to {directory}: report.json, {', '.join(figures['pictures'])}", flush=True)


def _report(system: _System, journey: Journey, last: Progress, comparison: Comparison, elapsed_s: float) -> RunReport:
    worker, trainer = system.worker_metrics, system.trainer_metrics
    median, p99 = (worker.quantile("livestate_feedback_to_served_seconds", q) for q in (0.5, 0.99))
    outcomes = {
        name: int(trainer.total("livestate_feedback_total", task=TASK, outcome=name))
        for name in ("joined", "early", "late", "unmatched")
    }
    return RunReport(
        events_published=last.events,
        events_applied=int(worker.total("livestate_events_applied_total")),
        clients=journey.households,
        embeddings_published=comparison.embeddings,
        feedback_published=last.feedback,
        feedback_joined=outcomes["joined"] + outcomes["early"],
        feedback_late=outcomes["late"],
        feedback_unmatched=outcomes["unmatched"],
        versions_published=int(trainer.total("livestate_parameter_versions_published_total")),
        versions_applied=int(worker.total("livestate_parameter_versions_applied_total")),
        feedback_to_served_median_ms=None if median is None else median * 1000,
        feedback_to_served_p99_ms=None if p99 is None else p99 * 1000,
        auc=dict(comparison.auc),
        more={
            f"live ahead of {name}": f"{ahead.value:+.4f} [{ahead.low:+.4f} {ahead.high:+.4f}]"
            for name, ahead in comparison.ahead.items()
        },
        evaluated=comparison.evaluated,
        dead_letters=int(worker.total("livestate_dead_letters_total")),
        elapsed_s=elapsed_s,
        picture=None if comparison.picture is None else str(comparison.picture),
    )


def _keep(system: _System, bootstrap_servers: str, journey: Journey) -> None:
    """Leave everything up until Ctrl-C, or until a part of it ends."""
    household = int(journey.purchases.household[0])
    settings = system.settings
    worker = f"http://127.0.0.1:{settings.worker.http_port}"
    print(
        f"\nStill running; Ctrl-C ends it.\n"
        f"  broker    {bootstrap_servers}\n"
        f"  worker    {worker}/metrics\n"
        f"  trainer   http://127.0.0.1:{settings.trainer.http_port}/metrics\n"
        f"  a client  livestate get {household}"
        + ("" if settings.worker.http_port == Worker().http_port else f" --worker {worker}"),
        flush=True,
    )
    while True:
        system.check()
        time.sleep(_CHECK_S)
