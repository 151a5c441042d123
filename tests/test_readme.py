"""What the README shows is true: its tables are the code's, and its programs run word for word."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stream.broker import Broker, EmbeddedBroker
from stream.kafka import ensure_topics
from stream.model.layout import Layout
from stream.settings import load, parse
from stream.wire import Schema
from tests.support.processes import ROOT, Livestate, http_get, wait_for
from tests.support.reference import README, rewritten
from tests.support.trunk import publish_version, random_trunk
from trainer.demo.processes import free_ports

TEXT = README.read_text()


def _blocks(language: str, heading: str) -> list[str]:
    section = re.split(r"^## ", TEXT, flags=re.MULTILINE)
    (chosen,) = [part for part in section if part.startswith(heading)]
    return re.findall(rf"^```{language}\n(.*?)^```", chosen, flags=re.MULTILINE | re.DOTALL)


def test_its_tables_are_those_of_the_code() -> None:
    assert rewritten(TEXT) == TEXT, "run: python -m tests.support.reference"


def test_its_example_settings_are_accepted() -> None:
    (block,) = _blocks("toml", "Describe your own stream")
    assert parse(block).tasks


def test_the_store_example_runs() -> None:
    (block,) = _blocks("python", "The embedding store by itself")
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[", "True", "False]"]


def test_files_it_links_to_are_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target


@contextlib.contextmanager
def _system(broker: Broker, directory: Path, more: dict[str, str]) -> Iterator[None]:
    """A worker of the shop example, with the topics' own names."""
    port = free_ports([0])[0]
    environment = {
        **broker.environment,
        "LIVESTATE_KAFKA__SESSION_TIMEOUT_S": "2",
        "LIVESTATE_WORKER__DATA_DIR": str(directory / "data"),
        "LIVESTATE_WORKER__HTTP_PORT": str(port),
        **more,
    }
    settings = load(ROOT / "stream" / "examples" / "shop.toml", environment)
    ensure_topics(settings, create=True)
    publish_version(settings, random_trunk(Layout.compile(settings, Schema.compile(settings))), 1)
    with Livestate(directory / "log", ["worker"], environment):
        wait_for(lambda: http_get(port, "/readyz")[0] == 200, 60, "the worker is ready")
        yield


def _run(command: list[str], program: str, broker: Broker) -> str:
    program = program.replace("localhost:9092", broker.bootstrap_servers)
    done = subprocess.run([*command, program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_publishing_and_reading_in_python(tmp_path: Path) -> None:
    publish, read = _blocks("python", "Publish and read")
    with EmbeddedBroker(tmp_path / "broker") as broker, _system(broker, tmp_path, {}):
        _run([sys.executable, "-c"], publish, broker)
        assert _run([sys.executable, "-c"], read, broker).startswith("900 1 {}")


def test_publishing_and_reading_with_kcat(apache_broker: Broker, tmp_path: Path) -> None:
    if shutil.which("kcat") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("kcat is not here")
        pytest.skip("kcat is not here")
    (block,) = [one for one in _blocks("sh", "Publish and read") if "kcat" in one]
    publish, read = block.split("\nkcat -C")
    with _system(apache_broker, tmp_path, {"LIVESTATE_TOPICS__EMBEDDINGS_FORMAT": "json"}):
        _run(["bash", "-c"], publish, apache_broker)
        shown: list[str] = []

        def is_there() -> bool:
            shown.append(_run(["bash", "-c"], "kcat -C" + read, apache_broker))
            return bool(shown[-1].strip())

        wait_for(is_there, 60, "an embedding is there")
        assert '901 {"client_id":"901"' in shown[-1]
