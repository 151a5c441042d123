"""A running worker: dead letters, parameter versions, HTTP, stopping, fencing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from stream import ports
from stream.broker import Broker
from stream.kafka import producer_config
from stream.partitioner import partition_of
from stream.wire import decode_embedding, encode_event, encode_event_json
from tests.support.processes import Livestate, http_get, metric, wait_for
from tests.support.truth import check_partition, read_topic
from tests.worker.conftest import System

NOW_MS = 1_700_000_000_000
PAY = {"amount": 3.0, "merchant": "fuel"}


def _ready(port: int) -> None:
    wait_for(lambda: http_get(port, "/readyz")[0] == 200, 60, "the worker is ready")


def _passed(port: int) -> float:
    return sum(
        metric(port, name)
        for name in (
            "livestate_events_applied_total",
            "livestate_events_replayed_total",
            "livestate_dead_letters_total",
        )
    )


def _allow_large_records(system: System) -> None:
    """Topics of users may take records larger than a broker's default."""
    admin = AdminClient({"bootstrap.servers": system.settings.kafka.bootstrap_servers})
    entry = ConfigEntry("max.message.bytes", str(32 * 1024 * 1024), incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, system.settings.topics.events, incremental_configs=[entry])
    for answer in admin.incremental_alter_configs([resource]).values():
        answer.result(30)


def test_events_of_aborted_transactions_never_happened(apache_broker: Broker, tmp_path: Path, free_port: int) -> None:
    # Given a publisher that sends events in a transaction and gives it up, and one that commits
    system = System(apache_broker, tmp_path)
    system.publish_parameters()
    system.publish(200)
    producer = Producer(producer_config(system.settings, transactional_id=f"{tmp_path.name}-publisher"))
    producer.init_transactions(30)
    for ends in (producer.abort_transaction, producer.commit_transaction):
        producer.begin_transaction()
        for i in range(50):
            value = encode_event(f"client-{i}", 1_700_000_000_000 + i, "pay", {"amount": 1.0, "merchant": "x"})
            producer.produce(system.settings.topics.events, value, f"client-{i}")
        producer.flush(30)
        ends(30)
    system.publish(200)
    # When a worker applies them
    with system.worker(free_port) as worker:
        _ready(free_port)
        wait_for(lambda: metric(free_port, "livestate_events_applied_total") >= 450, 30, "450 events are applied")
        assert worker.stop() == 0
    # Then states are those of the committed ones alone
    assert sum(check_partition(system.settings, system.parameters, p).events for p in range(2)) == 450


def test_bad_records_reach_dead_letters_and_nothing_else_is_affected(
    new_system: Callable[..., System], free_port: int, request: pytest.FixtureRequest
) -> None:
    # Given good events among records that are wrong in every way
    system = new_system()
    system.publish_parameters()
    if "apache" in request.node.name:
        _allow_large_records(system)
    good = encode_event("a", NOW_MS, "pay", PAY)
    event = msgpack.unpackb(good)

    def with_(**changes: object) -> bytes:
        return msgpack.packb({**event, **changes})

    huge = msgpack.packb({**event, "fields": {**PAY, "note": "x" * 10_000_000}})
    bad: list[tuple[bytes | None, bytes | None, str]] = [
        (b"a", None, "null_value"),
        (b"a", b"\xc1\x00", "undecodable"),
        (b"a", msgpack.packb([1, 2]), "not_a_map"),
        (b"a", msgpack.packb({k: v for k, v in event.items() if k != "timestamp_ms"}), "missing_field"),
        (b"a", with_(timestamp_ms="yesterday"), "wrong_type"),
        (b"a", with_(modality="visit"), "unknown_modality"),
        (b"a", with_(fields={"amount": float("nan"), "merchant": "fuel"}), "not_finite"),
        (b"a", with_(fields={"amount": 2_000_000.0, "merchant": "fuel"}), "out_of_range"),
        (b"a", with_(fields={**PAY, "amout": 1}), "unknown_field"),
        (b"a", with_(timestamp_ms=4_000_000_000_000), "future"),
        (b"b", good, "key_mismatch"),
        (None, good, "key_mismatch"),
        (b"a", huge, "too_large"),
    ]
    producer = Producer(producer_config(system.settings))
    for key, value, _ in bad:
        system.send(b"a", good)
        producer.produce(system.settings.topics.events, key=key, value=value, headers=[("trace", b"7")], partition=0)
        producer.poll(0)
    system.send(b"c", encode_event_json("c", NOW_MS, "pay", PAY), headers=[("content-type", b"application/json")])
    system.flush()
    assert producer.flush(60) == 0
    # When the worker has passed them all
    with system.worker(free_port) as worker:
        _ready(free_port)
        wait_for(lambda: _passed(free_port) >= 2 * len(bad) + 1, 60, "everything is passed")
        counted = {
            line.split('"')[1]: float(line.rsplit(" ", 1)[1])
            for line in http_get(free_port, "/metrics")[1].splitlines()
            if line.startswith("livestate_dead_letters_total{")
        }
        assert worker.stop() == 0
    # Then each bad one is a dead letter with its bytes, its own headers and its reason, and is counted by it
    letters = read_topic(system.settings, system.settings.topics.dead_letters, 0)
    found = []
    for letter in letters:
        headers = dict(letter.headers())
        assert headers["trace"] == b"7"
        assert headers["livestate-topic"].decode() == system.settings.topics.events
        assert headers["livestate-detail"]
        found.append((letter.key(), letter.value(), headers["livestate-reason"].decode()))
    assert sorted(found, key=repr) == sorted(bad, key=repr)
    assert counted == {reason: sum(r == reason for _, _, r in bad) for _, _, reason in bad}
    # And the good ones are applied exactly
    events = sum(check_partition(system.settings, system.parameters, p).events for p in range(2))
    assert events == len(bad) + 1


def test_versions_are_swapped_in_while_events_flow(new_system: Callable[..., System], free_port: int) -> None:
    # Given a worker that serves version 1, which has no head yet
    system = new_system()
    system.publish_parameters(1, with_head=False)
    with system.worker(free_port):
        _ready(free_port)
        offer = encode_event("a", NOW_MS, "offer", {"product": "loan"})
        partition = partition_of(b"a", 2)
        predictions: list[float | None] = []
        for version in (1, 2, 3):
            if version > 1:
                # When the trainer publishes another one
                system.publish_parameters(version)
                wait_for(
                    lambda v=version: metric(free_port, "livestate_parameter_version") == v, 30, f"version {version}"
                )
            system.send(b"a", offer)
            system.flush()
            wait_for(lambda v=version: _passed(free_port) >= v, 30, "the event is applied")

            def newest() -> dict[int, object]:
                topic = read_topic(system.settings, system.settings.topics.embeddings, partition)
                return {e.parameter_version: e for e in (decode_embedding(m.value()) for m in topic)}

            wait_for(lambda v=version: v in newest(), 30, f"an embedding of version {version}")
            predictions.append(newest()[version].predictions.get("accepted"))
        # Then predictions come with the first head and change with the next
        assert predictions[0] is None
        assert predictions[1] is not None
        assert predictions[1] != predictions[2]
        # And the state itself is untouched by heads
        assert metric(free_port, "livestate_parameter_versions_torn_total") == 0


def test_http_tells_health_and_states(new_system: Callable[..., System], free_port: int) -> None:
    # Given a worker without parameters
    system = new_system()
    with system.worker(free_port) as worker:
        wait_for(lambda: http_get(free_port, "/livez")[0] == 200, 60, "HTTP answers")
        status, reason = http_get(free_port, "/readyz")
        assert status == 503
        assert "no parameters yet" in reason
        # When a trunk is published and an event comes
        system.publish_parameters()
        system.send(b"client/7", encode_event("client/7", NOW_MS, "pay", PAY))
        system.flush()
        _ready(free_port)
        wait_for(lambda: _passed(free_port) >= 1, 30, "the event is applied")
        # Then the client's state is served, and an unknown client is a 404 with a problem body
        status, body = http_get(free_port, "/v1/clients/client%2F7")
        assert status == 200
        view = json.loads(body)
        assert (view["client_id"], view["events_seen"], view["timestamp_ms"]) == ("client/7", 1, NOW_MS)
        assert len(view["vector"]) == system.layout.hidden
        status, body = http_get(free_port, "/v1/clients/nobody")
        assert status == 404
        assert json.loads(body)["status"] == 404
        assert worker.stop() == 0


def test_a_paused_worker_cannot_write_over_its_successor(new_system: Callable[..., System], free_port: int) -> None:
    # Given a worker with changes that are not checkpointed yet, paused for longer than the session timeout
    system = new_system()
    system.environment["LIVESTATE_WORKER__CHECKPOINT_INTERVAL_S"] = "3600"
    system.publish_parameters()
    first, second_port = system.worker(free_port, "a"), ports.free_port()
    with first:
        _ready(free_port)
        system.publish(400)
        wait_for(lambda: _passed(free_port) >= 400, 60, "the first worker has applied the events")
        first.pause()
        system.environment["LIVESTATE_WORKER__CHECKPOINT_INTERVAL_S"] = "0.3"
        with system.worker(second_port, "b") as second:
            # When another worker takes its partitions over and goes on
            _ready(second_port)
            system.publish(400)
            wait_for(lambda: _passed(second_port) >= 800, 60, "the second worker has applied everything")
            wait_for(lambda: metric(second_port, "livestate_checkpoints_total") >= 2, 30, "and checkpointed it")
            # And the first one wakes up, tries its last checkpoint, and ends
            first.resume()
            first.process.terminate()
            first.process.wait(90)
            assert second.stop() == 0
    # Then changelog and embeddings still tell the truth
    events = sum(check_partition(system.settings, system.parameters, p).events for p in range(2))
    assert events == system.published


def test_the_wrong_broker_address_is_a_clear_error(tmp_path: Path) -> None:
    environment = {"LIVESTATE_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1", "LIVESTATE_WORKER__DATA_DIR": str(tmp_path)}
    with Livestate(tmp_path / "log", ["worker", "--broker-timeout", "1"], environment) as worker:
        assert worker.process.wait(60) == 3
        assert "kafka.bootstrap_servers = '127.0.0.1:1'" in worker.text()
