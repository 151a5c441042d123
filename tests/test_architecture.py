"""Walls of the house that imports must not cross."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_stream_never_imports_trainer() -> None:
    importing = [path for path in (ROOT / "stream").rglob("*.py") if "trainer" in _imports(path)]
    assert not importing


def test_nothing_unpickles() -> None:
    importing = [
        path
        for package in ("stream", "trainer")
        for path in (ROOT / package).rglob("*.py")
        if {"pickle", "shelve", "cloudpickle", "joblib"} & _imports(path)
    ]
    assert not importing
