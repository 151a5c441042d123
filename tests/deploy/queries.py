"""Every PromQL query that deploy/ contains."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
#: What Grafana puts in place of its variables, where all workers are shown and Prometheus asks every few seconds.
VARIABLES = {"$__rate_interval": "20s", "$instance": "worker-.+"}
_METRIC = re.compile(r"\b(?:livestate|process)_[a-z0-9_]+")
_RECORDED = re.compile(r"\blivestate:[a-z0-9_:]+")
_SELECTOR = re.compile(r"\b(?:livestate_|livestate:|up\b)[a-z0-9_:]*(?:\{[^}]*\})?")


def read_yaml(path: str) -> Any:
    """A YAML file of the repository."""
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def rules() -> list[dict[str, Any]]:
    """Recording and alert rules."""
    return [rule for group in read_yaml("deploy/alerts.yml")["groups"] for rule in group["rules"]]


def panels(dashboard: Path) -> Iterator[dict[str, Any]]:
    """Panels that show data, those inside rows too."""
    for panel in json.loads(dashboard.read_text(encoding="utf-8"))["panels"]:
        for one in (panel, *panel.get("panels", ())):
            if one["type"] != "row":
                yield one


def filled(query: str) -> str:
    """A query as Grafana sends it."""
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query, query
    return query


def shown_queries() -> list[str]:
    """Queries of panels and recording rules: they have data while the system runs."""
    of_panels = [
        filled(target["expr"]) for board in DASHBOARDS for panel in panels(board) for target in panel["targets"]
    ]
    return of_panels + [rule["expr"] for rule in rules() if "record" in rule]


def alert_queries() -> list[str]:
    """Queries of alerts: they have no data while all is well."""
    return [rule["expr"] for rule in rules() if "alert" in rule]


def selectors(query: str) -> list[str]:
    """The series that a query reads, without their ranges and offsets."""
    return _SELECTOR.findall(query)


def metrics_in(query: str) -> set[str]:
    """Names of samples that worker or trainer have to show, in a query."""
    return set(_METRIC.findall(query))


def recorded_in(query: str) -> set[str]:
    """Names of recorded series in a query."""
    return set(_RECORDED.findall(query))
