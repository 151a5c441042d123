"""The boards: written from their source, and such as Grafana's published schema has them."""

from __future__ import annotations

import enum
import json
import types
import typing
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.boards import BOARDS, DIRECTORY, text_of
from deploy.grafana.panels import Board, Tile

register_default_plugins()
#: Read by the annotations of Prometheus's data source; the schema has what all data sources share.
OF_THE_DATA_SOURCE = {"step", "textFormat", "titleFormat"}
by_name = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)


def test_the_files_are_those_of_the_source() -> None:
    written = {path.stem: path.read_text(encoding="utf-8") for path in DIRECTORY.glob("*.json")}
    assert written == {board.name: text_of(board) for board in BOARDS}, "run: python -m deploy.grafana.boards"


def _lost(given: Any, kept: Any, where: str) -> list[str]:
    """What the schema's classes did not take over, or took otherwise."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [text for key in given for text in _lost(given[key], kept.get(key, "nothing"), f"{where}.{key}")]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [text for i, one in enumerate(given) for text in _lost(one, kept[i], f"{where}[{i}]")]
    return [] if given == kept else [f"{where}: {given!r} became {kept!r}"]


def _wrong(value: Any, kind: Any, where: str) -> list[str]:
    """Values that are not of the type the schema says."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        tried = [_wrong(value, one, where) for one in arguments if one is not type(None)]
        return [] if value is None else min(tried, key=len)
    if origin is typing.Literal:
        return [] if value in arguments else [f"{where}: {value!r} is none of {arguments}"]
    if origin is list:
        if not isinstance(value, list):
            return [f"{where}: {value!r} is no list"]
        return [text for i, one in enumerate(value) for text in _wrong(one, arguments[0], f"{where}[{i}]")]
    if kind is object and hasattr(type(value), "from_json"):
        # Of a panel's options and queries the schema names no class; that is chosen by the panel's type.
        return _wrong(value, type(value), where)
    if not isinstance(kind, type) or kind is object or origin is not None:
        return []
    if issubclass(kind, enum.Enum):
        return [] if value in [one.value for one in kind] else [f"{where}: {value!r} is no {kind.__name__}"]
    if not isinstance(value, (int, float) if kind is float else kind):
        return [f"{where}: {value!r} is no {kind.__name__}"]
    if not hasattr(type(value), "from_json"):
        return []
    hints = typing.get_type_hints(type(value).__init__)
    return [
        text
        for name, one in vars(value).items()
        if one is not None
        for text in _wrong(one, hints.get(name, object), f"{where}.{name}")
    ]


@by_name
def test_grafanas_schema_takes_every_field_as_it_is(board: Board) -> None:
    # Given a board's file
    given = json.loads(text_of(board))
    # When it is read by the classes made from Grafana's schema, and written again
    for annotation in given["annotations"]["list"]:
        for name in OF_THE_DATA_SOURCE:
            del annotation[name]
    read = Dashboard.from_json(json.loads(json.dumps(given)))
    kept = json.loads(JSONEncoder(sort_keys=True).encode(read))
    # Then nothing is unknown to the schema, and nothing is of a type or value it does not have
    assert _lost(given, kept, board.name) == []
    assert _wrong(read, Dashboard, board.name) == []


def test_what_is_against_the_schema_is_found() -> None:
    given = json.loads(text_of(BOARDS[0]))
    given["annotations"] = {"list": []}
    given["panels"][0]["options"]["colourMode"] = "background"
    given["panels"][1]["options"]["graphMode"] = "curve"
    given["panels"][2]["gridPos"]["x"] = "left"
    given["refreshed"] = True
    read = Dashboard.from_json(json.loads(json.dumps(given)))
    kept = json.loads(JSONEncoder(sort_keys=True).encode(read))
    assert {text.split(":")[0] for text in _lost(given, kept, "board")} == {
        "board.refreshed", "board.panels[0].options.colourMode",
    }  # fmt: skip
    assert {text.split(":")[0] for text in _wrong(read, Dashboard, "board")} == {
        "board.panels[1].options.graph_mode", "board.panels[2].grid_pos.x",
    }  # fmt: skip


def test_there_is_a_board_for_each_question() -> None:
    assert [board.name for board in BOARDS] == ["overview", "worker", "store", "trainer"]
    for board in BOARDS:
        assert len({board.as_json()["uid"] for board in BOARDS}) == len(BOARDS)
        for tile in board.tiles:
            values = [value for value, _ in tile.steps]
            assert values[0] is None
            assert values[1:] == sorted(value for value in values if value is not None)
            assert tile.description
            assert isinstance(tile, Tile)
        # Every tile but plain sizes says by its colour whether all is well.
        assert [tile for tile in board.tiles if len(tile.steps) > 1]
