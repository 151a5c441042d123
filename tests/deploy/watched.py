"""A running Livestate with a Prometheus that watches it, as deploy/ configures it but for paces and addresses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stream.broker import Broker
from stream.cli import EXAMPLE
from stream.kafka import ensure_topics
from stream.settings import Settings, load
from tests.deploy.queries import read_yaml
from tests.support.processes import Livestate, http_get, wait_for
from trainer.demo.processes import free_ports

__all__ = ["Prometheus", "Watched", "run_prometheus", "run_watched", "usable_prometheus"]


def usable_prometheus() -> bool:
    """Whether Prometheus is installed; where it is not, CI fails."""
    if shutil.which("prometheus") is not None:
        return True
    assert os.environ.get("CI") != "true", "prometheus is not installed (Debian package prometheus)"
    return False


@dataclass(frozen=True)
class Prometheus:
    """A running one."""

    port: int

    def get(self, path: str, **parameters: object) -> Any:
        """What its API answers."""
        status, body = http_get(self.port, f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}", 20.0)
        assert status == 200, f"{path} {parameters}: {status} {body}"
        return json.loads(body)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Series of an instant query, those without a number left out."""
        return [one for one in self.get("query", query=expression)["result"] if one["value"][1] != "NaN"]


@contextmanager
def run_prometheus(directory: Path, targets: Mapping[str, Mapping[str, str]], every_s: int = 1) -> Iterator[Prometheus]:
    """Prometheus with the configuration and rules of deploy/.

    targets: for each job the name and the address of each process, in place of those in the file.
    every_s: seconds between scrapes, and between evaluations of the rules.
    """
    configuration, rules = read_yaml("deploy/prometheus.yml"), read_yaml("deploy/alerts.yml")
    pace = {"scrape_interval": f"{every_s}s", "scrape_timeout": f"{every_s}s", "evaluation_interval": f"{every_s}s"}
    configuration["global"] = pace
    configuration["scrape_configs"] = [
        {
            "job_name": job["job_name"],
            "static_configs": [
                {"targets": [address], "labels": {"instance": name}}
                for name, address in targets[job["job_name"]].items()
            ],
        }
        for job in configuration["scrape_configs"]
        if job["job_name"] in targets
    ]
    for group in rules["groups"]:
        group["interval"] = f"{every_s}s"
    directory.mkdir()
    (directory / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    (directory / "alerts.yml").write_text(yaml.safe_dump(rules, width=10_000))
    port = free_ports([0])[0]
    command = [
        "prometheus", f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(lambda: http_get(port, "/-/ready")[0] == 200, 30, "Prometheus is ready")
        yield Prometheus(port)
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Watched:
    """A worker and a trainer of the shop, and their Prometheus."""

    settings: Settings
    environment: Mapping[str, str]
    worker_port: int
    trainer_port: int
    prometheus: Prometheus


@contextmanager
def run_watched(broker: Broker, directory: Path) -> Iterator[Watched]:
    """All of it on a broker, with checkpoints every second."""
    worker_port, trainer_port = free_ports([0, 0])
    environment = {
        **broker.environment,
        "LIVESTATE_KAFKA__SESSION_TIMEOUT_S": "6",
        "LIVESTATE_WORKER__DATA_DIR": str(directory / "worker"),
        "LIVESTATE_WORKER__HTTP_PORT": str(worker_port),
        "LIVESTATE_WORKER__CHECKPOINT_INTERVAL_S": "1",
        "LIVESTATE_TRAINER__DATA_DIR": str(directory / "trainer"),
        "LIVESTATE_TRAINER__HTTP_PORT": str(trainer_port),
        "LIVESTATE_TRAINER__CHECKPOINT_INTERVAL_S": "1",
    }
    settings = load(EXAMPLE, environment)
    ensure_topics(settings, create=True)
    with ExitStack() as stack:
        for name in ("trainer", "worker"):
            stack.enter_context(Livestate(directory / f"{name}.log", [name], environment))
        targets = {
            "livestate-worker": {"worker-1:6066": f"127.0.0.1:{worker_port}"},
            "livestate-trainer": {"trainer:6067": f"127.0.0.1:{trainer_port}"},
        }
        prometheus = stack.enter_context(run_prometheus(directory / "prometheus", targets))
        for name, port in (("trainer", trainer_port), ("worker", worker_port)):
            wait_for(lambda port=port: http_get(port, "/readyz")[0] == 200, 90, f"the {name} is ready")  # type: ignore[misc]
        yield Watched(settings, environment, worker_port, trainer_port, prometheus)
