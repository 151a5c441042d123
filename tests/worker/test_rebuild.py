"""A new trunk: rows are rebuilt beside live traffic and taken over at one offset, through crashes too."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from stream.model.heads import Questions
from stream.model.parameters import ParameterSet
from stream.wire import decode_embedding
from tests.support.processes import http_get, metric, wait_for
from tests.support.trunk import publish_version, random_head, random_trunk
from tests.support.truth import Truth, block_of, changelog_states, one_pass, read_topic
from tests.worker.conftest import System

NEW_VERSION = 10


def _new_trunk(system: System) -> ParameterSet:
    head = random_head("accepted", Questions(system.layout).tasks[0].width, seed=3)
    return random_trunk(system.layout, seed=99).updated(head, NEW_VERSION)


def _position(port: int) -> int:
    status, body = http_get(port, "/v1/status")
    return sum(json.loads(body)["positions"].values()) if status == 200 else 0


def _is_done(system: System, port: int) -> bool:
    return _position(port) >= system.published and metric(port, "livestate_parameter_version") == NEW_VERSION


def _check(system: System, new: ParameterSet) -> None:
    """Everything in the changelog, and every client's last embedding, is of one pass under the new trunk."""
    old_seen = new_seen = 0
    for partition in range(2):
        events = block_of(read_topic(system.settings, system.settings.topics.events, partition))
        before: Truth = one_pass(system.settings, system.parameters, events)
        after: Truth = one_pass(system.settings, new, events)
        states, position = changelog_states(system.settings, system.layout, partition)
        assert position == events.offsets[-1] + 1
        assert states == dict(after.states)
        last = {}
        for message in read_topic(system.settings, system.settings.topics.embeddings, partition):
            embedding = decode_embedding(message.value())
            is_new = embedding.parameter_version == NEW_VERSION
            old_seen, new_seen = old_seen + (not is_new), new_seen + is_new
            truth = after if is_new else before
            assert embedding.vector.tobytes() == truth.hidden[message.key(), embedding.offset]
            last[message.key()] = (is_new, embedding.offset, embedding.events_seen)
        assert last == {key: (True, s.applied_offset, s.events_seen) for key, s in after.states.items()}
    assert old_seen
    assert new_seen


def test_rows_are_rebuilt_beside_live_traffic(new_system: Callable[..., System], free_port: int) -> None:
    # Given a worker that serves the states of one trunk
    system = new_system()
    system.publish_parameters()
    system.publish(3000)
    new = _new_trunk(system)
    with system.worker(free_port) as worker:
        wait_for(lambda: _position(free_port) >= system.published, 60, "all events are applied")
        # When a version with another trunk comes while events go on
        publish_version(system.settings, new, NEW_VERSION, 1)
        system.publish(1500)
        wait_for(lambda: _is_done(system, free_port), 60, "the new trunk serves")
        system.publish(500)
        wait_for(lambda: _is_done(system, free_port), 60, "all events are applied")
        # And the worker is stopped
        assert worker.stop() == 0
        assert metric(free_port, "livestate_partitions_rebuilding") == 0
    # Then changelog and embeddings are wholly of the new trunk, as of one pass
    _check(system, new)
    # And the rows of the old one are gone from disk
    left = [path.name for path in (system.directory / "data-a").glob("partition-*")]
    assert sorted(left) == sorted(f"partition-{p}-{new.trunk_id}" for p in range(2))


@pytest.mark.parametrize("moment", ["during", "before"])
def test_a_kill_on_the_way_changes_nothing(new_system: Callable[..., System], free_port: int, moment: str) -> None:
    # Given a worker that serves the states of one trunk, some of them ahead of its checkpoint
    system = new_system()
    system.environment["LIVESTATE_WORKER__CHECKPOINT_INTERVAL_S"] = "0.5"
    system.publish_parameters()
    system.publish(3000)
    new = _new_trunk(system)
    with system.worker(free_port) as worker:
        wait_for(lambda: metric(free_port, "livestate_checkpoints_total") >= 2, 60, "both partitions are checkpointed")
        if moment == "before":
            # When it is killed, and another trunk published before it is back
            worker.kill()
            publish_version(system.settings, new, NEW_VERSION, 1)
        else:
            # When it is killed while it rebuilds
            system.publish(2000)
            publish_version(system.settings, new, NEW_VERSION, 1)
            wait_for(lambda: metric(free_port, "livestate_rebuilt_events_total") > 0, 60, "the rebuild is under way")
            worker.kill()
        system.publish(300)
        worker.start()
        wait_for(lambda: _is_done(system, free_port), 60, "the new trunk serves all events")
        assert worker.stop() == 0
    # Then changelog and embeddings are wholly of the new trunk, as of one pass
    _check(system, new)
