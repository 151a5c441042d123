"""`livestate doctor`: all is well where it is, and each thing that can be wrong is found for real."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from stream.broker import Broker
from stream.doctor import Doctor, Finding
from stream.metrics import TrainerMetrics
from stream.ports import free_port
from stream.settings import load
from tests.commands.conftest import Run
from tests.support.processes import http_get, wait_for
from tests.support.settings import write_settings
from tests.worker.conftest import System
from trainer.monitoring import Health, Monitoring


def only(findings: Iterable[Finding], check: str) -> list[Finding]:
    return [finding for finding in findings if finding.check == check]


def doctor(system: System, **more: object) -> list[Finding]:
    """All findings; nobody listens where the worker and the trainer are looked for, unless `more` says so."""
    nobody = f"http://127.0.0.1:{free_port()}"
    return list(Doctor(system.settings, **{"worker": nobody, "trainer": nobody, **more}).findings())


@pytest.mark.timeout(240)
def test_a_worker_is_found_unready_and_then_all_is_well(system: System, run: Run) -> None:
    # Given a worker that waits for parameters
    port = free_port()
    address, nobody = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{free_port()}"
    command = ("doctor", "--settings", system.file, "--worker", address, "--trainer", nobody, "--json")
    with system.worker(port):
        wait_for(lambda: http_get(port, "/readyz")[0] == 503, 60, "the worker answers")
        # When the doctor comes
        done = run(*command)
        # Then it says what the worker waits for
        assert done.code == 1, done.err
        (worker,) = (one for one in done.json if one["check"] == "worker")
        assert worker["state"] == "failed"
        assert "no parameters yet" in worker["detail"]
        (parameters,) = (one for one in done.json if one["check"] == "parameters")
        assert (parameters["state"], parameters["detail"]) == ("warning", "there is no version")
        # When there are parameters
        system.publish_parameters()
        system.publish(20)
        wait_for(lambda: http_get(port, "/readyz")[0] == 200, 60, "the worker is ready")
        done = run(*command)
    # Then nothing is failed, and but the trainer, which does not run, everything is ok
    assert done.code == 0, done.out
    states = {(one["check"], one["state"]) for one in done.json}
    checks = ("settings", "packages", "broker", "topics", "clock", "parameters", "disk", "worker")
    assert states == {*((check, "ok") for check in checks), ("trainer", "warning")}


def test_a_broker_that_is_not_there_is_failed(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVESTATE_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1")
    for name in ("WORKER", "TRAINER"):
        monkeypatch.setenv(f"LIVESTATE_{name}__HTTP_PORT", str(free_port()))
    done = run("doctor", "--settings", write_settings(tmp_path / "settings.toml"), "--broker-timeout", "0.5")
    assert done.code == 1
    assert "failed   broker: no Kafka broker answered at kafka.bootstrap_servers = '127.0.0.1:1'" in done.out
    assert "start it with `livestate trainer`" in done.out


def test_topics_of_the_wrong_shape_are_failed(apache_broker: Broker, tmp_path: Path) -> None:
    # Given topics that somebody made by hand, one of them not at all
    environment = apache_broker.environment | {
        f"LIVESTATE_TOPICS__{name.upper()}": f"{tmp_path.name}-{name}"
        for name in ("events", "feedback", "embeddings", "changelog", "parameters", "dead_letters")
    }
    environment |= {"LIVESTATE_TOPICS__PARTITIONS": "2", "LIVESTATE_TOPICS__REPLICATION": "2"}
    settings = load(write_settings(tmp_path / "settings.toml"), environment)
    topics = settings.topics
    admin = AdminClient({"bootstrap.servers": settings.kafka.bootstrap_servers})
    compact, delete = {"cleanup.policy": "compact"}, {"cleanup.policy": "delete"}
    made = [
        NewTopic(topics.events, 2, config=compact),
        NewTopic(topics.feedback, 3, config=delete),
        NewTopic(topics.embeddings, 2, config=compact),
        NewTopic(topics.changelog, 2, config=delete),
        NewTopic(topics.parameters, 1, config={"cleanup.policy": "compact,delete"}),
    ]
    for answer in admin.create_topics(made).values():
        answer.result(30)
    wait_for(lambda: {one.topic for one in made} <= set(admin.list_topics(timeout=10).topics), 30, "topics are there")
    # When they are looked at
    findings = only(Doctor(settings).findings(), "topics")
    # Then each fault is named with what to do
    failed = {one.detail: one.advice for one in findings if one.state == "failed"}
    assert failed[f"{topics.dead_letters!r} is missing"] == "create it with `livestate topics --create`"
    assert any(text.startswith(f"{topics.feedback!r} has 3 partitions, topics.partitions is 2") for text in failed)
    assert any(f"{topics.changelog!r} has cleanup.policy = 'delete', expected 'compact'" in text for text in failed)
    assert any(text.startswith("partitions differ: ") and f"{topics.feedback} 3" in text for text in failed)
    assert len(failed) == 4
    warned = [one.detail for one in findings if one.state == "warning"]
    assert any(f"{topics.events!r} has cleanup.policy = 'compact', expected 'delete'" in text for text in warned)
    assert sum("has 1 replicas, topics.replication is 2; there are only 1 brokers" in text for text in warned) == 5
    assert len(warned) == 6


def test_a_clock_that_is_wrong_is_found(embedded_system: System) -> None:
    embedded_system.publish(3)
    for behind_s, state in ((0, "ok"), (20, "warning"), (3_600, "failed")):
        (clock,) = only(doctor(embedded_system, clock=lambda s=behind_s: time.time() - s), "clock")
        assert clock.state == state, clock
        assert "the newest record" in clock.detail


def test_parameters_that_do_not_fit_are_failed(embedded_system: System, tmp_path: Path) -> None:
    # Given a version, and settings of another width
    embedded_system.publish_parameters()
    (parameters,) = only(doctor(embedded_system), "parameters")
    assert parameters.state == "ok"
    assert "version 1, trunk " in parameters.detail
    other = load(embedded_system.file, embedded_system.environment | {"LIVESTATE_MODEL__HIDDEN": "24"})
    # When they are compared
    (parameters,) = only(Doctor(other).findings(), "parameters")
    # Then the tensor that does not fit is named
    assert parameters.state == "failed"
    assert "version 1 does not fit the settings: " in parameters.detail
    assert "trunk/" in parameters.detail


def test_disks_that_cannot_be_written_or_are_too_small_are_failed(tmp_path: Path) -> None:
    # Given a data directory that would lie below a file
    (tmp_path / "file").touch()
    environment = {
        "LIVESTATE_WORKER__DATA_DIR": str(tmp_path / "file" / "data"),
        "LIVESTATE_TRAINER__DATA_DIR": str(tmp_path / "trainer"),
        "LIVESTATE_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1",
    }
    settings = load(write_settings(tmp_path / "settings.toml"), environment)
    # When room for as many clients as no disk has is asked for
    worker, trainer = only(Doctor(settings, broker_timeout_s=0.1, clients=10**15).findings(), "disk")
    # Then neither will do
    assert worker.state == trainer.state == "failed"
    assert "worker.data_dir = " in worker.detail
    assert "cannot be written" in worker.detail
    assert "GB needed for 1,000,000,000,000,000 clients" in trainer.detail
    # And an estimate that the settings bound is small
    small = load(write_settings(tmp_path / "settings.toml"), environment | {"LIVESTATE_STORE__MAX_ROWS": "64"})
    _, trainer = only(Doctor(small, broker_timeout_s=0.1).findings(), "disk")
    assert "GB needed for 256 clients" in trainer.detail


def test_packages_outside_their_tested_range_are_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given an installation that asks for an older and for an unknown package
    (tmp_path / "livestate-0.1.0.dist-info").mkdir()
    (tmp_path / "livestate-0.1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: livestate\nVersion: 0.1.0\n"
        "Requires-Dist: msgpack<1,>=0.5\nRequires-Dist: numpy<3,>=2\nRequires-Dist: no-such-package==1.0\n"
        'Requires-Dist: another-one; extra == "demo"\n'
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    settings = load(write_settings(tmp_path / "settings.toml"), {"LIVESTATE_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1"})
    (packages,) = only(Doctor(settings, broker_timeout_s=0.1).findings(), "packages")
    assert packages.state == "failed"
    assert "tested with <1,>=0.5; no-such-package is not installed, ==1.0 is needed" in packages.detail
    assert "numpy" not in packages.detail


def test_a_trainer_that_is_not_ready_is_failed(tmp_path: Path) -> None:
    settings = load(write_settings(tmp_path / "settings.toml"), {"LIVESTATE_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1"})
    health = Health()
    with Monitoring("127.0.0.1", 0, TrainerMetrics(), health) as monitoring:
        for ready, state in ((False, "failed"), (True, "ok")):
            health.ready = ready
            examined = Doctor(settings, broker_timeout_s=0.1, trainer=f"http://127.0.0.1:{monitoring.port}")
            (trainer,) = only(examined.findings(), "trainer")
            assert trainer.state == state, trainer
    (trainer,) = only(examined.findings(), "trainer")
    assert trainer.state == "warning"


def test_settings_that_let_anybody_in_are_warned_of(tmp_path: Path) -> None:
    environment = {"LIVESTATE_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1", "LIVESTATE_WORKER__HTTP_HOST": "0.0.0.0"}
    settings = load(write_settings(tmp_path / "settings.toml"), environment)
    first, second = only(Doctor(settings, broker_timeout_s=0.1).findings(), "settings")
    assert first.state == "ok"
    assert second.state == "warning"
    assert "worker.http_host = '0.0.0.0'" in second.detail
