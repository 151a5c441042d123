"""Panels and boards in few words, and the JSON that Grafana reads."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["COLUMNS", "DATASOURCE", "Board", "Graph", "Section", "Tile"]

#: Of Grafana's grid.
COLUMNS = 24
DATASOURCE = {"type": "prometheus", "uid": "livestate-prometheus"}
_TILE_WIDTH, _TILE_HEIGHT, _GRAPH_WIDTH, _GRAPH_HEIGHT = 4, 4, 8, 8

#: A colour from a value on; the first one from anywhere.
Steps = tuple[tuple[float | None, str], ...]


@dataclass(frozen=True)
class Tile:
    """One number on a coloured ground.

    steps: colours by value, in rising order.
    """

    title: str
    query: str
    unit: str
    steps: Steps
    description: str
    decimals: int | None = None

    def as_json(self, number: int, x: int, y: int) -> dict[str, Any]:
        """The panel at its place."""
        field = {"unit": self.unit, "thresholds": _thresholds(self.steps), "mappings": [], "noValue": "–"}
        if self.decimals is not None:
            field["decimals"] = self.decimals
        return {
            **_panel("stat", number, self.title, self.description, (x, y, _TILE_WIDTH, _TILE_HEIGHT)),
            "fieldConfig": {"defaults": {**field, "color": {"mode": "thresholds"}}, "overrides": []},
            "targets": [_target(0, self.query, "", instant=True)],
            "options": {
                "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
                "colorMode": "background",
                "graphMode": "none",
                "textMode": "value",
                "justifyMode": "center",
                "orientation": "auto",
            },
        }


@dataclass(frozen=True)
class Graph:
    """Curves over time.

    queries: the curves' names, and what they show. A name may hold labels: `{{instance}}`.
    limit: drawn as a red line; what lies above is not well.
    """

    title: str
    unit: str
    queries: Mapping[str, str]
    description: str = ""
    limit: float | None = None
    stacked: bool = False

    def as_json(self, number: int, x: int, y: int) -> dict[str, Any]:
        """The panel at its place."""
        steps: Steps = ((None, "green"),) if self.limit is None else ((None, "green"), (self.limit, "red"))
        custom: dict[str, Any] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 25 if self.stacked else 8,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if self.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "off" if self.limit is None else "line"},
        }
        if self.unit != "dateTimeAsIso":
            custom["axisSoftMin"] = 0
        field = {"unit": self.unit, "thresholds": _thresholds(steps), "mappings": []}
        return {
            **_panel("timeseries", number, self.title, self.description, (x, y, _GRAPH_WIDTH, _GRAPH_HEIGHT)),
            "fieldConfig": {
                "defaults": {**field, "color": {"mode": "palette-classic"}, "custom": custom},
                "overrides": [],
            },
            "targets": [_target(i, query, name) for i, (name, query) in enumerate(self.queries.items())],
            "options": {
                "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
                "tooltip": {"mode": "multi", "sort": "desc"},
            },
        }


@dataclass(frozen=True)
class Section:
    """Graphs under a heading, three in a line."""

    title: str
    graphs: Sequence[Graph]


@dataclass(frozen=True)
class Board:
    """Tiles, six in a line, and sections below.

    by_instance: whether it has a choice of processes; queries then name `$instance`.
    """

    name: str
    title: str
    description: str
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    by_instance: bool = False

    def as_json(self) -> dict[str, Any]:
        """What Grafana reads."""
        return {
            "uid": f"livestate-{self.name}",
            "title": f"Livestate: {self.title}",
            "description": self.description,
            "tags": ["livestate"],
            "schemaVersion": 41,
            "version": 1,
            "editable": False,
            "graphTooltip": 1,
            "refresh": "10s",
            "time": {"from": "now-30m", "to": "now"},
            "timezone": "utc",
            "timepicker": {},
            "templating": {"list": [_INSTANCES] if self.by_instance else []},
            "links": [_LINKS],
            "annotations": {"list": [_ALARMS]},
            "panels": self._panels(),
        }

    def _panels(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        y = 0
        per_line = COLUMNS // _TILE_WIDTH
        for start in range(0, len(self.tiles), per_line):
            for i, tile in enumerate(self.tiles[start : start + per_line]):
                found.append(tile.as_json(len(found) + 1, i * _TILE_WIDTH, y))
            y += _TILE_HEIGHT
        for section in self.sections:
            place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
            found.append(
                {
                    "id": len(found) + 1, "type": "row", "title": section.title, "collapsed": False, "gridPos": place,
                    "panels": [],
                }
            )  # fmt: skip
            y += 1
            per_line = COLUMNS // _GRAPH_WIDTH
            for start in range(0, len(section.graphs), per_line):
                for i, graph in enumerate(section.graphs[start : start + per_line]):
                    found.append(graph.as_json(len(found) + 1, i * _GRAPH_WIDTH, y))
                y += _GRAPH_HEIGHT
        return found


_LINKS = {
    "type": "dashboards", "title": "Livestate", "tags": ["livestate"], "asDropdown": False, "icon": "external link",
    "includeVars": False, "keepTime": True, "targetBlank": False, "tooltip": "", "url": "",
}  # fmt: skip
_ALARMS = {
    "name": "Alerts", "enable": True, "datasource": DATASOURCE, "iconColor": "red",
    "expr": 'ALERTS{alertname=~"Livestate.+", alertstate="firing"}', "titleFormat": "{{alertname}}",
    "textFormat": "{{instance}}", "step": "15s",
}  # fmt: skip
_INSTANCES = {
    "type": "query", "name": "instance", "label": "worker", "datasource": DATASOURCE,
    "query": "label_values(livestate_partitions_assigned, instance)", "refresh": 2, "sort": 1, "multi": True,
    "includeAll": True, "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    "hide": 0, "options": [], "regex": "", "skipUrlSync": False,
}  # fmt: skip


def _panel(kind: str, number: int, title: str, description: str, place: tuple[int, int, int, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "gridPos": dict(zip("xywh", place, strict=True)),
    }


def _target(number: int, query: str, name: str, instant: bool = False) -> dict[str, Any]:
    return {
        "refId": string.ascii_uppercase[number],
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query,
        "legendFormat": name,
        "range": not instant,
        "instant": instant,
    }


def _thresholds(steps: Steps) -> dict[str, Any]:
    return {"mode": "absolute", "steps": [{"color": colour, "value": value} for value, colour in steps]}
