"""Brokers that ask who a client is, and clients that ask the same of brokers: Apache Kafka with TLS and SASL."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiokafka.client import AIOKafkaClient
from confluent_kafka import Producer

from stream.batch_producer import asyncio_client_config
from stream.errors import SecurityError
from stream.kafka import metadata, producer_config, wait_until_reachable
from stream.ports import free_port
from stream.settings import Settings
from stream.wire import encode_event
from stream.wire.feedback import FeedbackRecord, encode_feedback
from tests.support.brokers import require_apache
from tests.support.processes import Livestate, http_get, metric, wait_for
from tests.support.secured import USER, SecuredBroker, new_authority
from tests.support.settings import small_settings
from tests.support.trunk import random_trunk
from tests.support.truth import block_of, changelog_states, check_partition, one_pass, read_topic
from tests.worker.conftest import System
from trainer.files import save_parameters
from trainer.publisher import read_latest

#: A refusal is known after the first attempts, not when `--broker-timeout` has passed.
LONG_S, SOON_S = 120.0, 30.0
NOW_MS = 1_700_000_000_000


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredBroker]:
    """One running node for the module."""
    with SecuredBroker(
        require_apache(), tmp_path_factory.mktemp("secured"), properties={"group.min.session.timeout.ms": "1000"}
    ) as broker:
        yield broker


def settings_of(environment: dict[str, str], **changes: str) -> Settings:
    """Settings of a client, some of them changed."""
    kafka = {name.removeprefix("LIVESTATE_"): value for name, value in environment.items()}
    return small_settings(**kafka | {f"KAFKA__{name}": value for name, value in changes.items()})


@pytest.mark.parametrize(
    ("protocol", "mechanism"),
    [
        ("SASL_SSL", "SCRAM-SHA-512"),
        ("SASL_SSL", "SCRAM-SHA-256"),
        ("SASL_SSL", "PLAIN"),
        ("SASL_PLAINTEXT", "SCRAM-SHA-512"),
        ("SSL", ""),
    ],
)
def test_both_client_libraries_are_let_in(secured: SecuredBroker, protocol: str, mechanism: str) -> None:
    # Given settings for a listener
    settings = settings_of(secured.environment_for(protocol, mechanism))
    if protocol == "SSL":
        # That asks for a certificate, whose key has a password
        mine = secured.authority.issue("client", key_password="for the key")
        password = mine.key.with_name("key-password")
        password.write_text("for the key\n")
        settings = settings_of(
            secured.environment_for(protocol), SSL_CERTIFICATE_FILE=str(mine.certificate),
            SSL_KEY_FILE=str(mine.key), SSL_KEY_PASSWORD_FILE=str(password),
        )  # fmt: skip

    async def brokers() -> list[str]:
        client = AIOKafkaClient(**asyncio_client_config(settings))
        try:
            await client.bootstrap()
            assert await client.ready(1)
            return [f"{broker.host}:{broker.port}" for broker in client.cluster.brokers()]
        finally:
            writers = [connection._writer for connection in client._conns.values()]
            await client.close()
            # With TLS, saying goodbye takes a while.
            await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)

    # When both connect, then both see the cluster by this listener's own address
    assert list(metadata(settings.kafka, 10.0).brokers) == [secured.address(protocol)]
    assert asyncio.run(brokers()) == [secured.address(protocol)]


@pytest.mark.parametrize(
    ("listener", "changes", "said"),
    [
        ("SASL_SSL", {"SASL_PASSWORD_FILE": "{wrong}"}, r"kafka\.sasl_password_file = '.*wrong'"),
        ("SASL_SSL", {"SASL_PASSWORD_FILE": "{wrong}", "SASL_MECHANISM": "PLAIN"}, r"kafka\.sasl_mechanism = 'PLAIN'"),
        ("SASL_SSL", {"SASL_USERNAME": "bob"}, r"kafka\.sasl_username = 'bob'"),
        ("SASL_SSL", {"SSL_CA_FILE": "{foreign}"}, r"verify failed.*kafka\.ssl_ca_file = '.*foreign\.crt'"),
        ("SASL_SSL", {"HOST": "localhost"}, r"verify failed.*kafka\.bootstrap_servers = 'localhost:"),
        ("SASL_SSL", {"SECURITY_PROTOCOL": "PLAINTEXT"}, r"kafka\.security_protocol = 'PLAINTEXT'.* expected SSL, or"),
        ("SASL_SSL", {"SECURITY_PROTOCOL": "SSL"}, r"kafka\.security_protocol = 'SSL'.* expected SASL_SSL"),
        ("SASL_SSL", {"SECURITY_PROTOCOL": "SASL_PLAINTEXT"}, r"speaks TLS; expected SSL, or SASL_SSL"),
        ("SASL_PLAINTEXT", {"SECURITY_PROTOCOL": "SASL_SSL"}, r"does not speak TLS; expected PLAINTEXT, or SASL"),
        ("SASL_PLAINTEXT", {"SECURITY_PROTOCOL": "PLAINTEXT"}, r"without a password; expected SASL_PLAINTEXT"),
        ("PLAINTEXT", {"SECURITY_PROTOCOL": "SASL_PLAINTEXT"}, r"handshake failed.*kafka\.sasl_username"),
        ("SSL", {}, r"certificate.*check kafka\.ssl_certificate_file = None"),
    ],
)
def test_a_client_that_is_not_let_in_is_told_why_at_once(
    secured: SecuredBroker, tmp_path: Path, listener: str, changes: dict[str, str], said: str
) -> None:
    # Given a listener, and settings that do not fit it in one point
    (tmp_path / "wrong").write_text("not it\n")
    places = {"wrong": str(tmp_path / "wrong")}
    if "{foreign}" in changes.values():
        places["foreign"] = str(new_authority(tmp_path, "foreign").certificate)
    changes = {name: value.format(**places) for name, value in changes.items()}
    protocol = changes.get("SECURITY_PROTOCOL", listener)
    address = secured.address(listener)
    if "HOST" in changes:
        address = address.replace("127.0.0.1", changes.pop("HOST"))
    settings = settings_of(secured.environment_for(protocol), **changes, BOOTSTRAP_SERVERS=address)
    # When the broker is waited for
    started = time.monotonic()
    with pytest.raises(SecurityError, match=said) as refused:
        wait_until_reachable(settings, LONG_S)
    # Then the error comes soon, says what to check, and no secret
    assert time.monotonic() - started < SOON_S
    assert "not it" not in str(refused.value)


def test_states_are_right_on_a_broker_with_tls_and_passwords(secured: SecuredBroker, tmp_path: Path) -> None:
    # Given topics, a trainer and a worker that reach the broker by TLS and SCRAM alone
    system = System(secured, tmp_path)
    assert system.settings.kafka.security_protocol == "SASL_SSL"
    worker_port, trainer_port = free_port(), free_port()
    trainer = Livestate(
        tmp_path / "trainer.log",
        ["trainer", "--settings", str(system.file)],
        system.environment
        | {
            "LIVESTATE_TRAINER__DATA_DIR": str(tmp_path / "trainer"),
            "LIVESTATE_TRAINER__HTTP_PORT": str(trainer_port),
            "LIVESTATE_TRAINER__PUBLISH_INTERVAL_S": "0.1",
        },
    )
    with trainer, system.worker(worker_port) as worker:
        wait_for(lambda: http_get(worker_port, "/readyz")[0] == 200, 90, "the worker is ready")
        # When events are published, and feedback on offers
        system.publish(300)
        producer = Producer(producer_config(system.settings))
        for i in range(60):
            client, at = f"client-{i}", system.clock_ms + i
            system.send(client.encode(), encode_event(client, at, "offer", {"product": "loan", "rate": i / 10}))
            feedback = FeedbackRecord(client, at + 1, at, "accepted", i % 2 == 1)
            producer.produce(system.settings.topics.feedback, encode_feedback(feedback), client)
        system.send(b"client-1", b"no event")
        system.flush()
        assert producer.flush(60) == 0
        wait_for(lambda: metric(trainer_port, "livestate_examples_learned_total") >= 20, 60, "feedback is learned")
        learned = metric(trainer_port, "livestate_parameter_version")
        # Then what was learned is served
        wait_for(lambda: metric(worker_port, "livestate_parameter_version") >= learned, 60, "the version is served")
        wait_for(lambda: metric(worker_port, "livestate_events_applied_total") >= 360, 60, "the events are applied")
        assert metric(worker_port, "livestate_dead_letters_total") == 1
        assert worker.stop() == 0
        assert trainer.stop() == 0
    # And states, changelog and embeddings are those of one undisturbed pass
    latest = read_latest(system.settings)
    assert latest is not None
    assert sum(check_partition(system.settings, latest[0], p).events for p in range(2)) == 360


def test_a_trunk_is_rebuilt_on_a_broker_with_tls_and_passwords(secured: SecuredBroker, tmp_path: Path) -> None:
    # Given a worker that reaches the broker by TLS and SCRAM alone and serves the states of one trunk
    system = System(secured, tmp_path)
    system.publish_parameters()
    system.publish(400)
    worker_port, trainer_port = free_port(), free_port()
    new = random_trunk(system.layout, seed=99)
    save_parameters(tmp_path / "next.msgpack", new)
    arguments = ["--trunk", str(tmp_path / "next.msgpack"), "--data-dir", str(tmp_path / "next")]
    rebuild = Livestate(
        tmp_path / "rebuild.log",
        ["rebuild", "--settings", str(system.file), *arguments, "--http-port", str(trainer_port)],
        system.environment,
    )
    with system.worker(worker_port) as worker:
        wait_for(lambda: metric(worker_port, "livestate_events_applied_total") >= 400, 90, "the events are applied")
        # When another trunk is rebuilt, and events go on
        with rebuild:
            wait_for(lambda: metric(trainer_port, "livestate_parameter_versions_published_total") >= 1, 90, "it leads")
            system.publish(200)
            wait_for(
                lambda: _serves(worker_port, new.trunk_id, system.published), 90, "the new trunk serves all events"
            )
            assert rebuild.stop() == 0
        assert worker.stop() == 0
    # Then states and changelog are those of one undisturbed pass under it
    latest = read_latest(system.settings)
    assert latest is not None
    assert latest[0].trunk_id == new.trunk_id
    for partition in range(2):
        truth = one_pass(
            system.settings, latest[0], block_of(read_topic(system.settings, system.settings.topics.events, partition))
        )
        assert changelog_states(system.settings, system.layout, partition)[0] == dict(truth.states)


def _serves(port: int, trunk_id: str, events: int) -> bool:
    status, body = http_get(port, "/v1/status")
    found = json.loads(body) if status == 200 else {}
    serves = status == 200 and found["trunk"] == trunk_id and not found["rebuilding"]
    return serves and sum(found["positions"].values()) >= events


@pytest.mark.parametrize("command", ["worker", "trainer", "topics"])
def test_a_program_with_the_wrong_password_ends_with_a_clear_error(
    secured: SecuredBroker, tmp_path: Path, command: str
) -> None:
    # Given a file with another password
    wrong = tmp_path / "password"
    wrong.write_text("not it\n")
    environment = secured.environment | {
        "LIVESTATE_KAFKA__SASL_PASSWORD_FILE": str(wrong),
        "LIVESTATE_WORKER__DATA_DIR": str(tmp_path / "worker"),
        "LIVESTATE_TRAINER__DATA_DIR": str(tmp_path / "trainer"),
        "LIVESTATE_TRAINER__HTTP_PORT": "0",
    }
    # When the program is started, then it ends with the code of broker errors, long before its patience does
    waits = [] if command == "topics" else ["--broker-timeout", str(LONG_S)]
    with Livestate(tmp_path / "log", [command, *waits], environment) as program:
        assert program.process.wait(60) == 3
    text = program.text()
    assert "Authentication failed" in text
    assert f"kafka.sasl_username = {USER!r}" in text
    assert f"kafka.sasl_password_file = {str(wrong)!r}" in text
    assert "not it" not in text
    assert "Traceback" not in text
