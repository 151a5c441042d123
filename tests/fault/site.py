"""A site under faults: a broker, topics, parameters, workers by name, and who restarts them.

Guaranteed: every process started here is ended by `close`, by its own process id. A worker that ends by itself
is started again, as a container would be, and its exit code is kept in `exits`; only `SUPERVISED` codes are
allowed to end a worker.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from stream.broker import Broker
from stream.kafka import ensure_topics, log_ends
from stream.model.heads import Questions
from stream.model.layout import Layout
from stream.model.parameters import ParameterSet
from stream.ports import free_port
from stream.settings import Settings, load
from stream.wire import Schema
from tests.support.processes import Livestate, http_get, metric, positions, wait_for
from tests.support.settings import write_settings
from tests.support.trunk import publish_version, random_head, random_trunk

__all__ = ["SESSION_TIMEOUT_S", "STOP_TIMEOUT_S", "SUPERVISED", "TTL_S", "Site", "Worker"]

#: The shortest that Apache Kafka grants without being told to.
SESSION_TIMEOUT_S = 6.0
STOP_TIMEOUT_S = 15.0
TTL_S = 1500
#: The broker is away or refuses, or another worker has taken over.
SUPERVISED = (3, 4)


class Worker:
    """One worker's place: its process, port and disk, which outlive each run of it."""

    def __init__(self, site: Site, name: str) -> None:
        self.name = name
        self.port = free_port()
        self.data_dir = site.directory / f"data-{name}"
        self.process = Livestate(
            site.directory / f"worker-{name}.log",
            ["worker", "--settings", str(site.file)],
            site.environment
            | {"LIVESTATE_WORKER__HTTP_PORT": str(self.port), "LIVESTATE_WORKER__DATA_DIR": str(self.data_dir)},
        )
        #: Whether it is meant to run, and whether it is stopped by SIGSTOP.
        self.wanted = False
        self.frozen = False

    @property
    def answers(self) -> bool:
        """Whether it runs and is not paused, so that it could serve."""
        return self.process.running and not self.frozen

    @property
    def ready(self) -> bool:
        """What /readyz says."""
        return self.answers and http_get(self.port, "/readyz", 1.0)[0] == 200

    @property
    def is_failing(self) -> bool:
        """Whether it has ended, or is about to, for a reason of its own."""
        return not self.process.running or (self.answers and http_get(self.port, "/livez", 1.0)[0] == 503)

    def start(self) -> None:
        self.wanted = True
        self.process.start()

    def kill(self) -> None:
        """SIGKILL."""
        self.wanted = self.frozen = False
        self.process.kill()

    def wipe(self) -> None:
        """Delete its disk; it must not run."""
        assert not self.process.running
        shutil.rmtree(self.data_dir, ignore_errors=True)

    def freeze(self) -> None:
        """SIGSTOP."""
        if self.process.running:
            self.frozen = True
            self.process.pause()

    def thaw(self) -> None:
        """SIGCONT."""
        if self.frozen:
            self.frozen = False
            if self.process.running:
                self.process.resume()

    def stop(self) -> float:
        """SIGTERM; it must end with 0 in time. Returns the seconds it took."""
        self.wanted = False
        began = time.monotonic()
        code = self.process.stop(2 * STOP_TIMEOUT_S)
        assert code == 0, f"worker {self.name} ended with exit code {code} on SIGTERM"
        return time.monotonic() - began

    def metric(self, name: str) -> float:
        """A metric of its own, summed over labels."""
        return metric(self.port, name)


class Site:
    """Settings, topics, parameter versions and workers on one broker; a context manager that ends the workers.

    Parameters
    ----------
    broker: running.
    directory: for settings, logs and the workers' disks; made when missing.
    overrides: settings as environment variables without their prefix.
    """

    def __init__(self, broker: Broker, directory: Path, **overrides: str) -> None:
        self.broker = broker
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        prefix = uuid.uuid4().hex[:8]
        names = ("events", "feedback", "embeddings", "changelog", "parameters", "dead_letters")
        values = {f"TOPICS__{name.upper()}": f"{prefix}-{name}" for name in names} | {
            "TOPICS__PARTITIONS": "4",
            "KAFKA__GROUP": prefix,
            "KAFKA__SESSION_TIMEOUT_S": str(SESSION_TIMEOUT_S),
            "STORE__TTL_S": str(TTL_S),
            # Fewer rows than clients in memory: the others lie on disk, changed ones too.
            "STORE__MEMORY_ROWS": "256",
            "WORKER__CHECKPOINT_INTERVAL_S": "1",
            "WORKER__BATCH_RECORDS": "500",
            "WORKER__STOP_TIMEOUT_S": str(STOP_TIMEOUT_S),
        }
        given = {f"LIVESTATE_{name}": value for name, value in (values | overrides).items()}
        self.environment = {**broker.environment, **given}
        self.file = write_settings(directory / "settings.toml")
        self.settings: Settings = load(self.file, self.environment)
        ensure_topics(self.settings, create=True)
        self.layout = Layout.compile(self.settings, Schema.compile(self.settings))
        self.parameters: ParameterSet = random_trunk(self.layout)
        self.versions: dict[int, ParameterSet] = {}
        self.workers: dict[str, Worker] = {}
        self.exits: Counter[int] = Counter()
        #: False from the moment the broker is killed until it answers again.
        self.broker_answers = True
        self.publish_version()

    def publish_version(self) -> None:
        """One more version of the parameters: the same trunk, another head."""
        version = len(self.versions) + 1
        width = Questions(self.layout).tasks[0].width
        held = self.parameters.updated(random_head("accepted", width, seed=version), version)
        self.versions[version] = held
        publish_version(self.settings, held, version, version - 1)

    def restart_broker(self, down_s: float) -> None:
        """SIGKILL the broker, and start it on the same directory and port `down_s` seconds later."""
        self.broker_answers = False
        self.broker.kill()
        time.sleep(down_s)
        self.broker.start()
        self.broker_answers = True

    def worker(self, name: str) -> Worker:
        """The worker of that name, made when first asked for, not started."""
        if name not in self.workers:
            self.workers[name] = Worker(self, name)
        return self.workers[name]

    @property
    def running(self) -> list[Worker]:
        """Workers that are meant to run."""
        return [worker for worker in self.workers.values() if worker.wanted]

    def supervise(self) -> None:
        """Start again what ended by itself; an exit code that is not allowed is an error."""
        for worker in self.running:
            if not worker.process.running:
                code = worker.process.process.returncode
                self.exits[code] += 1
                said = worker.process.text()[-500:]
                assert code in SUPERVISED, f"worker {worker.name} ended by itself with exit code {code}: {said}"
                worker.start()

    def positions(self) -> dict[int, int]:
        """Next offset of each partition that some worker serves now."""
        found: dict[int, int] = {}
        for worker in self.running:
            if worker.answers:
                for partition, position in positions(worker.port, 1.0).items():
                    found[partition] = max(position, found.get(partition, 0))
        return found

    def ends(self) -> dict[int, int]:
        """Where each partition of the events topic ends."""
        topics = self.settings.topics
        return {p: log_ends(self.settings, topics.events, p)[1] for p in range(topics.partitions)}

    def await_ready(self, timeout_s: float = 90.0) -> None:
        """Wait until every worker that is meant to run is ready."""

        def are_ready() -> bool:
            self.supervise()
            return all(worker.ready for worker in self.running)

        wait_for(are_ready, timeout_s, "all workers are ready")

    def await_applied(self, timeout_s: float = 90.0) -> None:
        """Wait until everything that was published before the call is applied by whoever serves it now."""
        ends = self.ends()

        def is_applied() -> bool:
            self.supervise()
            now = self.positions()
            return all(now.get(partition, -1) >= end for partition, end in ends.items())

        wait_for(is_applied, timeout_s, f"everything up to {ends} is applied")

    def await_staying(self, workers: Sequence[Worker], timeout_s: float = 60.0) -> None:
        """Wait until none of them is about to end by itself, as workers do that were without brokers for long."""

        def do_stay() -> bool:
            self.supervise()
            return not any(worker.is_failing for worker in workers)

        wait_for(do_stay, timeout_s, "all of them stay")

    def stop_all(self) -> None:
        """SIGTERM to all workers at once; each must end with 0."""
        ending = self.running
        self.await_staying(ending)
        for worker in ending:
            worker.wanted = False
            worker.process.process.terminate()
        deadline = time.monotonic() + 60.0
        for worker in ending:
            code = worker.process.process.wait(max(0.1, deadline - time.monotonic()))
            assert code == 0, f"worker {worker.name} ended with exit code {code} on SIGTERM"

    def close(self) -> None:
        """End what still runs."""
        for worker in self.workers.values():
            worker.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is not None:
            for worker in self.workers.values():
                print(f"---- worker {worker.name}\n{worker.process.text()[-6000:]}")
