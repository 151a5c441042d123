"""A small system on a real broker, and the command run in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stream.broker import Broker
from stream.cli import main
from tests.worker.conftest import System


@dataclass(frozen=True)
class Done:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one line of JSON it printed."""
        return json.loads(self.out)


Run = Callable[..., Done]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command; wrong arguments are a code too."""

    def run(*arguments: object) -> Done:
        capfd.readouterr()
        try:
            code = main([str(one) for one in arguments])
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capfd.readouterr()
        return Done(code, out, err)

    return run


@pytest.fixture
def system(broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    """Topics of its own on each kind of broker; the environment says where."""
    return _system(broker, tmp_path, monkeypatch)


@pytest.fixture
def embedded_system(embedded_broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    """The same on the embedded broker."""
    return _system(embedded_broker, tmp_path, monkeypatch)


def _system(broker: Broker, directory: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    system = System(broker, directory)
    for name, value in system.environment.items():
        monkeypatch.setenv(name, value)
    return system
