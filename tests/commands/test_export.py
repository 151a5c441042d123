"""`livestate export` and `import`: what comes out is what the system holds, and a backup brings it back, once."""

from __future__ import annotations

import copy
import json
import uuid
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from confluent_kafka import Producer

from stream.kafka import ensure_topics, producer_config
from stream.partitioner import partition_of
from stream.ports import free_port
from stream.settings import load
from stream.store import PackedKeys
from stream.wire import EmbeddingEncoder, decode_embedding
from tests.commands.conftest import Run
from tests.support.processes import metric, wait_for
from tests.support.truth import changelog_states, check_partition, read_topic
from tests.worker.conftest import System


def another(system: System, monkeypatch: pytest.MonkeyPatch, *roles: str) -> System:
    """The same system with new, empty topics of these roles and another group; the environment says so."""
    new = copy.copy(system)
    prefix = uuid.uuid4().hex[:8]
    changes = {f"LIVESTATE_TOPICS__{role.upper()}": f"{prefix}-{role}" for role in roles}
    new.environment = system.environment | changes | {"LIVESTATE_KAFKA__GROUP": prefix}
    new.settings = load(system.file, new.environment)
    ensure_topics(new.settings, create=True)
    for name, value in new.environment.items():
        monkeypatch.setenv(name, value)
    return new


def serve(system: System, name: str, events: int) -> float:
    """Run a worker until it has passed so many events, stop it; how many of them it applied."""
    port = free_port()
    with system.worker(port, name) as worker:
        passed = ("livestate_events_applied_total", "livestate_events_replayed_total")
        wait_for(lambda: sum(metric(port, one) for one in passed) >= events, 90, f"{events} events are passed")
        applied = metric(port, passed[0])
        assert worker.stop() == 0
    return applied


def latest(system: System) -> dict[str, object]:
    """Each client's last embedding, as a reader of the topic has it."""
    found = {}
    for partition in range(2):
        for message in read_topic(system.settings, system.settings.topics.embeddings, partition):
            found[message.key().decode()] = decode_embedding(message.value())
    return found


@pytest.mark.timeout(240)
def test_a_backup_brings_a_system_back_and_no_event_counts_twice(
    system: System, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a worker that has applied events and ended
    system.publish_parameters()
    system.publish(600)
    assert serve(system, "a", 600) == 600
    # When its clients are exported, live and from its disk, and a backup is made
    live, offline, backup = tmp_path / "clients.parquet", tmp_path / "rows", tmp_path / "backup"
    done = run("export", "--out", live, "--settings", system.file, "--json")
    assert (done.code, done.json["refused"]) == (0, 0), done.err
    of_worker = ("--data-dir", tmp_path / "data-a", "--out", offline)
    assert run("export", *of_worker, "--settings", system.file).code == 0
    assert run("export", "--backup", backup, "--settings", system.file).code == 0
    # Then each client is in the file as it was last published
    rows = {row["client_id"]: row for row in pq.read_table(live).to_pylist()}
    published = latest(system)
    assert set(rows) == set(published)
    for client_id, one in published.items():
        row = rows[client_id]
        assert np.float32(row["vector"]).tobytes() == one.vector.tobytes()
        assert (row["events_seen"], row["timestamp_ms"], row["offset"], row["parameter_version"]) == (
            one.events_seen, one.timestamp_ms, one.offset, one.parameter_version,
        )  # fmt: skip
        assert row["prediction_accepted"] == pytest.approx(one.predictions.get("accepted"))
        assert row["partition"] == partition_of(client_id.encode(), 2)
    # And each row of the worker's disk is in the other
    before = [changelog_states(system.settings, system.layout, partition) for partition in range(2)]
    for partition, (states, _) in enumerate(before):
        exported = pq.read_table(offline / f"partition-{partition}.parquet").to_pylist()
        assert {row["key"]: row["events_seen"] for row in exported} == {k: s.events_seen for k, s in states.items()}
    # When events go on while nobody serves, and the backup is imported into new topics beside the events
    system.publish(150)
    restored = another(system, monkeypatch, "changelog", "embeddings", "parameters")
    done = run("import", backup, "--settings", system.file)
    assert done.code == 0, done.err
    # Then rows and positions are the same, bit for bit
    assert [changelog_states(restored.settings, restored.layout, p) for p in range(2)] == before
    # When a worker without a disk takes over
    assert serve(restored, "b", 150) == 150
    # Then states and embeddings are those of one pass over all events
    assert sum(check_partition(restored.settings, restored.parameters, p).events for p in range(2)) == 750
    # And what is not empty any more takes no backup
    done = run("import", backup, "--settings", system.file)
    assert done.code == 7
    assert "is not empty: a backup goes into new topics alone" in done.err


@pytest.mark.timeout(240)
def test_a_backup_is_refused_where_it_does_not_fit(
    embedded_system: System, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a backup, and new topics of every kind
    system, backup = embedded_system, tmp_path / "backup"
    system.publish_parameters()
    system.publish(200)
    serve(system, "a", 200)
    command = ("--settings", system.file)
    assert run("export", "--backup", backup, *command).code == 0
    before = [changelog_states(system.settings, system.layout, partition)[0] for partition in range(2)]
    restored = another(system, monkeypatch, "events", "changelog", "embeddings", "parameters")

    def refused(said: str, *more: str) -> None:
        done = run("import", backup, *command, *more)
        assert done.code == 7, done.err
        assert said in done.err

    # When it is imported, then each thing that does not fit is said
    refused("is not the one of the backup")
    with monkeypatch.context() as changed:
        changed.setenv("LIVESTATE_MODEL__HIDDEN", "24")
        refused("the settings of model and memory describe")
    with monkeypatch.context() as changed:
        changed.setenv("LIVESTATE_WORKER__DATA_DIR", str(tmp_path / "data-a"))
        refused("has rows of an earlier system")
    file = backup / "changelog-1"
    content = file.read_bytes()
    for damaged, said in (
        (content[:-1] + bytes([content[-1] ^ 1]), "fails its checksum"),
        (b"", "0 records where the manifest says"),
    ):
        file.write_bytes(damaged)
        refused(said, "--events", "new")
    file.write_bytes(content)
    manifest = (backup / "manifest.json").read_text()
    (backup / "manifest.json").unlink()
    refused("is no whole backup")
    (backup / "manifest.json").write_text(manifest)
    done = run("export", "--backup", backup, *command)
    assert done.code == 7
    assert "holds a backup already" in done.err
    # And nothing of all this was written
    assert changelog_states(restored.settings, restored.layout, 0) == ({}, 0)
    # When it is said that all events are new
    done = run("import", backup, *command, "--events", "new", "--json")
    # Then rows are the same but for their offsets, which mean nothing there
    assert done.code == 0, done.err
    for partition in range(2):
        states, position = changelog_states(restored.settings, restored.layout, partition)
        assert position == 0
        assert {key: (s.vector, s.events_seen, s.last_event_ms) for key, s in states.items()} == {
            key: (s.vector, s.events_seen, s.last_event_ms) for key, s in before[partition].items()
        }
        assert {state.applied_offset for state in states.values()} <= {-1}
    assert {one.offset for one in latest(restored).values()} == {-1}
    assert (
        len(latest(restored))
        == sum(map(len, before))
        == json.loads(manifest)["files"]["embeddings-0"]["records"]
        + json.loads(manifest)["files"]["embeddings-1"]["records"]
    )


def test_clients_that_are_gone_are_not_exported(embedded_system: System, tmp_path: Path, run: Run) -> None:
    # Given embeddings of which one was replaced, one deleted, and one record that is none
    system = embedded_system
    encoder = EmbeddingEncoder(2, ["accepted"])

    def embedding(key: bytes, seen: int, prediction: float) -> bytes:
        keys = PackedKeys.from_list([key])
        vectors, predictions = np.float32([[seen, 0.5]]), np.float32([[prediction]])
        (record,) = encoder.encode(keys, [seen], [seen], 3, [seen], vectors, predictions)
        return bytes(record)

    producer = Producer(producer_config(system.settings))
    for key, value in (
        (b"a", embedding(b"a", 1, 0.1)),
        (b"b", embedding(b"b", 1, 0.2)),
        (b"c", b"something else"),
        (b"d", embedding(b"e", 1, 0.2)),
        (b"a", embedding(b"a", 2, float("nan"))),
        (b"b", None),
        (b"f", embedding(b"f", 1, 0.75)),
    ):
        producer.produce(system.settings.topics.embeddings, value, key, partition=0)
    assert producer.flush(30) == 0
    # When they are exported
    file = tmp_path / "clients.parquet"
    done = run("export", "--out", file, "--settings", system.file, "--json")
    # Then the last of each that is there is in the file, and no scratch is left
    assert (done.code, done.json["clients"], done.json["refused"]) == (0, 2, 2)
    assert "2 records of" in done.err
    assert [(r["client_id"], r["events_seen"], r["prediction_accepted"]) for r in pq.read_table(file).to_pylist()] == [
        ("a", 2, None),
        ("f", 1, 0.75),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"clients.parquet", "settings.toml"}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("export",), 2, "expected either --out PATH"),
        (("export", "--out", "x", "--backup", "y"), 2, "expected either --out PATH"),
        (("export", "--out", "out", "--data-dir", "nowhere"), 7, "'nowhere' has no database of a worker"),
        (("import", "nowhere"), 7, "'nowhere' is no directory"),
    ],
)
def test_wrong_arguments_are_refused(run: Run, arguments: tuple[str, ...], code: int, said: str) -> None:
    done = run(*arguments)
    assert done.code == code
    assert said in done.err
