"""Whole workers that missed versions: they end with the trainer's, and serve none that is torn on the way there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stream.broker import Broker
from stream.kafka import log_ends
from stream.model.heads import Questions
from stream.model.parameters import Tensor
from stream.ports import free_port
from stream.wire import decode_embedding
from tests.support.compaction import compact_at_once, wait_until_compacted
from tests.support.meanwhile import meanwhile
from tests.support.processes import http_get, metric, wait_for
from tests.support.trunk import random_head
from tests.support.truth import read_topic
from tests.worker.conftest import System
from trainer.publisher import Publisher

_TASKS = ("accepted", "second")
_SECOND = '\n[tasks.second]\non = "offer"\nstandardise_after = 20\n'
_MISSED = 300


def _score(version: int) -> float:
    return version % 1000 / 200 - 2.5


def _heads(system: System, version: int) -> dict[str, Tensor]:
    """Heads of both tasks that answer with their version, whatever they are asked."""
    tensors: dict[str, Tensor] = {}
    for question in Questions(system.layout).tasks:
        weight = np.zeros(question.width + 1)
        weight[-1] = _score(version)
        tensors |= random_head(question.task, question.width) | {f"head/{question.task}/weight": weight}
    return tensors


def _expected(version: int) -> object:
    """What both heads of a version predict."""
    return dict.fromkeys(_TASKS, pytest.approx(1.0 / (1.0 + np.exp(-_score(version))), abs=1e-6))


@pytest.mark.parametrize("kind", ["embedded", "apache"])
def test_workers_that_missed_versions_serve_the_last_one_and_none_torn(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    # Given a worker that has the first versions; on Apache Kafka the log is compacted as soon as it can be
    broker: Broker = request.getfixturevalue(f"{kind}_broker")
    system = System(broker, tmp_path, _SECOND)
    if kind == "apache":
        compact_at_once(system.settings)
    publisher = Publisher(system.settings)

    def publish() -> None:
        tensors = dict(system.parameters.items()) | _heads(system, publisher.version + 1)
        publisher.publish(tensors, [], 0)

    publish()
    ports = {"back": free_port(), "late": free_port()}
    back, late = (system.worker(port, name) for name, port in ports.items())

    def versions() -> list[float]:
        return [metric(port, "livestate_parameter_version") for port in ports.values()]

    with back:
        wait_for(lambda: versions()[0] == 1, 90, "the first version is served")
        system.publish(200)
        wait_for(lambda: _embeddings(system) > 0, 60, "the broker has embeddings of it")
        # When it is killed and misses many versions
        back.kill()
        if kind == "apache":
            wait_until_compacted(system.settings, publish)
        else:
            for _ in range(_MISSED):
                publish()
        missed = publisher.version
        # And is started again, beside one that was never there, while versions go on
        back.start()
        with late:
            with meanwhile(publish, 0.01):
                wait_for(lambda: min(versions()) > missed, 120, "both have versions that came meanwhile")
                for _ in range(6):
                    system.publish(100)
                    wait_for(lambda: _positions(ports) == system.published, 90, "events are applied between versions")
            wait_for(lambda: versions() == [publisher.version] * 2, 60, "both have the last version")
            system.publish(200)
            wait_for(lambda: _positions(ports) == system.published, 90, "all events are applied")
            # Then any of them says of a client what the trainer's last version says
            for port in ports.values():
                status, body = http_get(port, "/v1/clients/client-1")
                assert status == 200
                assert json.loads(body)["predictions"] == _expected(publisher.version)
            assert [back.stop(), late.stop()] == [0, 0]
    publisher.close()
    # And every embedding is of one version, the same for both heads
    served: set[int] = set()
    for partition in range(2):
        for message in read_topic(system.settings, system.settings.topics.embeddings, partition):
            found = decode_embedding(message.value())
            served.add(found.parameter_version)
            if found.predictions:
                assert found.predictions == _expected(found.parameter_version)
    assert served <= {1} | set(range(missed, publisher.version + 1))
    assert {1, publisher.version} < served


def _embeddings(system: System) -> int:
    """Records of the embeddings topic."""
    return sum(log_ends(system.settings, system.settings.topics.embeddings, number)[1] for number in range(2))


def _positions(ports: dict[str, int]) -> int:
    """Events that are applied, of all partitions."""
    found: dict[str, int] = {}
    for port in ports.values():
        status, body = http_get(port, "/v1/status")
        found |= json.loads(body)["positions"] if status == 200 else {}
    return sum(found.values())
