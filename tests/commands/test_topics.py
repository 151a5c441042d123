"""`livestate topics`: missing ones are said, made when asked, and told as data."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from stream.broker import Broker
from tests.commands.conftest import Run
from tests.support.settings import write_settings


def test_topics_are_made_once_and_told_as_json(
    embedded_broker: Broker, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a broker without the settings' topics
    prefix, roles = (
        uuid.uuid4().hex[:8],
        ("events", "feedback", "embeddings", "changelog", "parameters", "dead_letters"),
    )
    for name, value in embedded_broker.environment.items():
        monkeypatch.setenv(name, value)
    for role in roles:
        monkeypatch.setenv(f"LIVESTATE_TOPICS__{role.upper()}", f"{prefix}-{role}")
    command = ("topics", "--settings", write_settings(tmp_path / "settings.toml"))
    # When they are looked for, then what is missing is said, and with which code
    done = run(*command)
    assert done.code == 3
    assert f"'{prefix}-dead_letters' (topics.dead_letters, 1 partitions)" in done.err
    # When they are made, then each is told, and the second time they were there
    for created in (True, False):
        done = run(*command, "--create", "--json")
        assert done.code == 0, done.err
        assert {one["role"]: (one["name"], one["created"]) for one in done.json} == {
            role: (f"{prefix}-{role}", created) for role in roles
        }
        policies = {one["role"]: (one["partitions"], one["cleanup_policy"]) for one in done.json}
        assert policies["changelog"] == (4, "compact")
        assert policies["parameters"] == (1, "compact")
        assert policies["events"] == (4, "delete")
