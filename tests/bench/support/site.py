"""Where a bench runs: a broker, topics of its own, published parameters, and worker processes.

Processor time is read from /proc, so it counts every thread of a process, librdkafka's and the consumer's too.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stream.broker import ApacheBroker, Broker, EmbeddedBroker
from stream.kafka import ensure_topics
from stream.model.layout import Layout
from stream.settings import Settings, load
from stream.wire import Schema
from tests.bench.support.workload import random_parameters, settings_text
from tests.support.brokers import apache_home
from tests.support.processes import Livestate, http_get
from tests.support.trunk import publish_version

__all__ = [
    "Site",
    "busy_seconds",
    "choose_broker",
    "cpu_seconds",
    "machine",
    "on_cores",
    "open_site",
    "parsed",
    "scrape",
]

ROOT = Path(__file__).resolve().parents[3]
_TOPICS = ("events", "feedback", "embeddings", "changelog", "parameters", "dead_letters")


def choose_broker(kind: str, directory: Path) -> Broker:
    """`apache`, `embedded`, or `auto`: Apache Kafka where it is present.

    Raises
    ------
    SystemExit: Apache Kafka is asked for and is not here.
    """
    home = apache_home() if kind != "embedded" else None
    if home is not None:
        return ApacheBroker(home, directory)
    if kind == "apache":
        raise SystemExit("Apache Kafka is not here: set KAFKA_HOME to a distribution and install Java 17")
    return EmbeddedBroker(directory)


@dataclass
class Site:
    """Settings, topics and parameters of one measurement; `fresh` makes another one on the same events."""

    broker: Broker
    directory: Path
    #: The settings file.
    text: str
    hidden: int
    overrides: dict[str, str]
    topics: dict[str, str]

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **{f"LIVESTATE_TOPICS__{role.upper()}": name for role, name in self.topics.items()},
            **self.broker.environment,
            "LIVESTATE_KAFKA__GROUP": self.topics["changelog"],
            "LIVESTATE_KAFKA__SESSION_TIMEOUT_S": "6",
            "LIVESTATE_MODEL__HIDDEN": str(self.hidden),
            **self.overrides,
        }
        self.file = self.directory / "settings.toml"
        self.file.write_text(self.text)
        self.settings: Settings = load(self.file, self.environment)
        ensure_topics(self.settings, create=True)
        self.layout = Layout.compile(self.settings, Schema.compile(self.settings))
        self.parameters = random_parameters(self.layout)

    def fresh(self) -> Site:
        """The same events, and states, parameters and embeddings of its own."""
        prefix = uuid.uuid4().hex[:8]
        topics = {role: f"{prefix}-{role}" for role in _TOPICS} | {"events": self.topics["events"]}
        return Site(self.broker, self.directory / prefix, self.text, self.hidden, self.overrides, topics)

    def apart(self, overrides: dict[str, str]) -> Site:
        """Topics, states and parameters of its own, and settings that differ."""
        prefix = uuid.uuid4().hex[:8]
        topics = {role: f"{prefix}-{role}" for role in _TOPICS}
        both = self.overrides | overrides
        return Site(self.broker, self.directory / prefix, self.text, self.hidden, both, topics)

    def leave_to_workers(self, cores: Sequence[int] | None) -> None:
        """Keep the broker off these cores where it has others; None: off none."""
        allowed = os.sched_getaffinity(0)
        others = allowed.difference(cores or ())
        if self.broker.pid is not None:
            on_cores(self.broker.pid, sorted(others or allowed))

    def publish_parameters(self) -> None:
        """Version 1, before the first worker starts."""
        publish_version(self.settings, self.parameters, 1)

    def worker(self, name: str, port: int) -> Livestate:
        """A worker process with a disk of its own, not started yet."""
        return Livestate(
            self.directory / f"worker-{name}.log",
            ["worker", "--settings", str(self.file)],
            self.environment
            | {
                "LIVESTATE_WORKER__HTTP_PORT": str(port),
                "LIVESTATE_WORKER__DATA_DIR": str(self.directory / f"data-{name}"),
                "OMP_NUM_THREADS": "1",
            },
        )

    def trainer(self, port: int) -> Livestate:
        """A trainer process with a disk of its own, not started yet; it takes the trunk that was published."""
        return Livestate(
            self.directory / "trainer.log",
            ["trainer", "--settings", str(self.file)],
            self.environment
            | {
                "LIVESTATE_TRAINER__HTTP_PORT": str(port),
                "LIVESTATE_TRAINER__DATA_DIR": str(self.directory / "data-trainer"),
                "OMP_NUM_THREADS": "1",
            },
        )


@contextmanager
def open_site(
    broker: str, hidden: int = 64, memory_floats: int = 0, overrides: dict[str, str] | None = None, text: str = ""
) -> Iterator[Site]:
    """A broker in a temporary directory and a site on it; both are gone afterwards.

    text: the settings file, by default the workload's with so many floats of memory.
    """
    text = text or settings_text(memory_floats)
    directory = Path(tempfile.mkdtemp(prefix="livestate-bench-"))
    try:
        with choose_broker(broker, directory / "broker") as running:
            prefix = uuid.uuid4().hex[:8]
            topics = {role: f"{prefix}-{role}" for role in _TOPICS}
            yield Site(running, directory / prefix, text, hidden, overrides or {}, topics)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def scrape(port: int) -> dict[str, float]:
    """Every metric of a worker, summed over its labels; empty where nobody listens."""
    return parsed(http_get(port, "/metrics")[1])


def parsed(text: str) -> dict[str, float]:
    """Every metric in what a worker answers, summed over its labels."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("#") and "_bucket{" not in line:
            name, value = line.rsplit(" ", 1)
            name = name.split("{", 1)[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def cpu_seconds(pid: int) -> float:
    """Processor time that a process and all its threads have used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_seconds(cores: Sequence[int] | None = None) -> float:
    """Processor time that everything on these cores (None: on all of them) has used since the machine started."""
    names = None if cores is None else {f"cpu{core}" for core in cores}
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *values = line.split()
        if name == "cpu" if names is None else name in names:
            user, nice, system, _idle, _wait, irq, softirq, *_ = map(int, values)
            ticks += user + nice + system + irq + softirq
    return ticks / os.sysconf("SC_CLK_TCK")


def on_cores(pid: int, cores: Sequence[int]) -> None:
    """Keep a process, and every thread it has now or makes later, on these cores."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with_thread = int(task.name)
        try:
            os.sched_setaffinity(with_thread, cores)
        except ProcessLookupError:
            continue


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "unknown")
    return {"cpu": model, "cores": os.cpu_count()}
