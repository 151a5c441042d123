"""Workers of a trunk that learns online: its versions are swapped whole, between micro-batches, without a rebuild."""

from __future__ import annotations

from pathlib import Path

import pytest

from stream.broker import Broker
from stream.model.heads import Questions
from stream.model.parameters import ParameterSet
from stream.wire import decode_embedding, encode_event
from tests.support.processes import http_get, metric, wait_for
from tests.support.trunk import publish_version, random_head, random_trunk
from tests.support.truth import block_of, one_pass, read_topic
from tests.worker.conftest import System

VERSIONS = 6
CLIENTS = 150
NOW_MS = 1_700_000_000_000


def trunk(system: System, version: int) -> ParameterSet:
    """One that began as another, and has other weights by now."""
    learned = random_trunk(system.layout, seed=version)
    head = random_head("accepted", Questions(system.layout).tasks[0].width)
    tensors = {name: one for name, one in learned.items() if "values" not in name and "offsets" not in name}
    return random_trunk(system.layout).of_kind("online").updated(tensors | head, version)


def pay(system: System, client: str, at: int) -> None:
    system.send(client.encode(), encode_event(client, at, "pay", {"amount": 3.0, "merchant": "fuel"}))


def test_no_event_sees_half_a_trunk_and_nothing_is_rebuilt(
    embedded_broker: Broker, tmp_path: Path, free_port: int
) -> None:
    # Given a worker of an online trunk
    system = System(embedded_broker, tmp_path)
    system.environment["LIVESTATE_MODEL__TRUNK"] = "online"
    system.environment["LIVESTATE_WORKER__BATCH_RECORDS"] = "20"
    trunks = {version: trunk(system, version) for version in range(1, VERSIONS + 1)}
    publish_version(system.settings, trunks[1], 1)
    with system.worker(free_port) as worker:
        wait_for(lambda: http_get(free_port, "/readyz")[0] == 200, 120, "the worker is ready")
        # When versions come while clients have their first event, each one
        for version in range(1, VERSIONS + 1):
            if version > 1:
                publish_version(system.settings, trunks[version], version, version - 1)
            for number in range(CLIENTS):
                pay(system, f"client-{version}-{number}", NOW_MS + number)
            system.flush()
        applied = VERSIONS * CLIENTS
        wait_for(lambda: metric(free_port, "livestate_events_applied_total") == applied, 60, "all events are applied")
        wait_for(lambda: metric(free_port, "livestate_parameter_version") == VERSIONS, 60, "the last version serves")
        # And it is killed, and started again
        checkpoints = metric(free_port, "livestate_checkpoints_total")
        wait_for(lambda: metric(free_port, "livestate_checkpoints_total") > checkpoints + 2, 60, "all is written")
        worker.kill()
        worker.start()
        pay(system, "client-1-0", NOW_MS + 1000)
        system.flush()
        wait_for(lambda: metric(free_port, "livestate_events_applied_total") >= 1, 60, "it goes on")
        # Then no row was rebuilt
        assert metric(free_port, "livestate_rebuilt_events_total") == 0
        assert worker.stop() == 0
    served = set()
    for partition in range(2):
        events = block_of(read_topic(system.settings, system.settings.topics.events, partition))
        states = {version: one_pass(system.settings, one, events).hidden for version, one in trunks.items()}
        for message in read_topic(system.settings, system.settings.topics.embeddings, partition):
            found = decode_embedding(message.value())
            if found.events_seen == 2:
                assert message.key() == b"client-1-0"
                served.add("again")
                continue
            # And each state is one step of the very trunk that its embedding names
            served.add(found.parameter_version)
            assert found.vector.tobytes() == states[found.parameter_version][message.key(), found.offset]
    assert served >= {"again", VERSIONS}
    assert len(served) > 3


@pytest.mark.parametrize("kind", ["fixed", "online"])
def test_a_trunk_of_the_other_kind_is_refused(
    embedded_broker: Broker, tmp_path: Path, free_port: int, kind: str
) -> None:
    # Given a version whose trunk is of the other kind than a worker's setting
    system = System(embedded_broker, tmp_path)
    other = {"fixed": "online", "online": "fixed"}[kind]
    system.environment["LIVESTATE_MODEL__TRUNK"] = kind
    publish_version(system.settings, trunk(system, 1).of_kind(other), 1)
    # When it starts, then it ends and says why
    with system.worker(free_port) as worker:
        wait_for(lambda: not worker.running, 60, "the worker has ended")
        assert worker.process.returncode not in (0, None)
    assert f"has a trunk that is {other}, but model.trunk = '{kind}'" in worker.log.read_text()
