"""Prometheus rules and the Grafana dashboard name metrics that exist, and each alert is tried."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from stream.cli import EXAMPLE
from stream.metrics import TrainerMetrics, WorkerMetrics
from stream.settings import load
from tests.deploy.queries import (
    DASHBOARDS,
    ROOT,
    alert_queries,
    metrics_in,
    panels,
    read_yaml,
    recorded_in,
    rules,
    shown_queries,
)

ALERTS = [rule for rule in rules() if "alert" in rule]
DATASOURCE = {"type": "prometheus", "uid": "livestate-prometheus"}
UNITS = {"bytes", "cps", "dateTimeAsIso", "none", "percentunit", "reqps", "s", "short"}


def promtool(*arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run promtool in deploy/; without it the test is skipped, and in CI it fails."""
    if shutil.which("promtool") is None:
        if os.environ.get("CI"):
            pytest.fail("promtool is not installed (Debian package prometheus)")
        pytest.skip("promtool is not installed (Debian package prometheus)")
    return subprocess.run(["promtool", *arguments], cwd=ROOT, input=given, capture_output=True, text=True, timeout=120)


def samples() -> set[str]:
    """Names of all samples that worker and trainer can show."""
    names: set[str] = set()
    for metrics in (WorkerMetrics(), TrainerMetrics()):
        for metric in metrics.registry.collect():
            suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(metric.type, [""])
            names |= {metric.name + suffix for suffix in suffixes}
    return names


def test_prometheus_accepts_its_configuration() -> None:
    done = promtool("check", "config", "deploy/prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_and_keeps_silent_as_it_should() -> None:
    done = promtool("test", "rules", "tests/deploy/alerts.test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", [rule["alert"] for rule in ALERTS])
def test_each_alert_has_both_cases(name: str) -> None:
    cases = {case["name"] for case in read_yaml("tests/deploy/alerts.test.yml")["tests"]}
    assert {f"{name} fires", f"{name} does not fire"} <= cases


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_each_alert_says_how_bad_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"]
    path, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^#+ (\w+)$", (ROOT / path).read_text(), re.MULTILINE)
    assert anchor in [heading.lower() for heading in headings]


@pytest.mark.parametrize("query", shown_queries() + alert_queries())
def test_queries_name_what_exists(query: str) -> None:
    assert metrics_in(query) <= samples()
    assert recorded_in(query) <= {rule["record"] for rule in rules() if "record" in rule}


def test_recorded_series_are_used() -> None:
    used = set().union(*(recorded_in(query) for query in shown_queries() + alert_queries()))
    assert used == {rule["record"] for rule in rules() if "record" in rule}


def test_prometheus_scrapes_every_worker_and_the_trainer() -> None:
    # Given the services and their ports
    services = read_yaml("docker-compose.yml")["services"]
    settings = load(EXAMPLE, {})
    workers = [f"{name}:{settings.worker.http_port}" for name in services if name.startswith("worker-")]
    # Then each of them is a target under the job that the queries name
    jobs = {
        job["job_name"]: [target for group in job["static_configs"] for target in group["targets"]]
        for job in read_yaml("deploy/prometheus.yml")["scrape_configs"]
    }
    assert jobs["livestate-worker"] == workers
    assert jobs["livestate-trainer"] == [f"trainer:{settings.trainer.http_port}"]


def test_the_data_source_is_the_one_that_dashboards_name() -> None:
    (source,) = read_yaml("deploy/grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert {"type": source["type"], "uid": source["uid"]} == DATASOURCE
    assert source["url"] == "http://prometheus:9090"
    (provider,) = read_yaml("deploy/grafana/provisioning/dashboards/livestate.yml")["providers"]
    mounts = read_yaml("docker-compose.yml")["services"]["grafana"]["volumes"]
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in mounts


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_dashboards_are_sound(path: Path) -> None:
    board = json.loads(path.read_text())
    assert board["uid"]
    assert board["title"]
    assert board["schemaVersion"] >= 39
    every = board["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    assert len({panel["title"] for panel in every}) == len(every)
    taken: set[tuple[int, int]] = set()
    for panel in every:
        place = panel["gridPos"]
        columns, lines = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells = set(product(columns, lines))
        assert columns.stop <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in panels(path):
        assert panel["datasource"] == DATASOURCE
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        references = [target["refId"] for target in panel["targets"]]
        assert references
        assert len(set(references)) == len(references)
        for target in panel["targets"]:
            assert target["datasource"] == DATASOURCE
            assert panel["type"] == "stat" or target["legendFormat"], f"{panel['title']} has a curve without a name"
