"""Broker processes: they answer when started, end when told, and never outlive their owner."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from stream.broker import ApacheBroker, Broker, EmbeddedBroker
from stream.errors import BrokerError
from stream.kafka import client_config, ensure_topics, metadata, producer_config
from stream.ports import HOST, free_port
from stream.settings import Kafka
from tests.broker.conftest import settings_for
from tests.support.brokers import require_apache

pytestmark = pytest.mark.timeout(120)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_a_started_broker_answers_and_a_stopped_one_is_gone(new_broker: Callable[[], Broker]) -> None:
    with new_broker() as broker:
        pid = broker.pid
        assert pid is not None
        assert alive(pid)
        assert metadata(Kafka(bootstrap_servers=broker.bootstrap_servers), 5.0).brokers == (broker.bootstrap_servers,)
        assert broker.log_path.is_file()
    assert not alive(pid)
    assert broker.pid is None
    with pytest.raises(BrokerError, match="no answer from 127"):
        metadata(Kafka(bootstrap_servers=broker.bootstrap_servers), 1.0)


def test_a_killed_broker_starts_again_on_the_same_port(new_broker: Callable[[], Broker]) -> None:
    broker = new_broker().start()
    port, pid = broker.port, broker.pid
    assert pid is not None
    broker.kill()
    assert not alive(pid)
    broker.start()
    assert broker.port == port
    assert broker.running


def test_apache_keeps_its_topics_and_records_through_a_kill(tmp_path: Path) -> None:
    # Given a record acknowledged by Apache Kafka
    broker = ApacheBroker(require_apache(), tmp_path).start()
    try:
        settings = settings_for(broker)
        ensure_topics(settings, create=True)
        producer = Producer(producer_config(settings))
        producer.produce("events", b"kept", b"client")
        assert producer.flush(30) == 0
        # When the broker is killed and started again
        broker.kill()
        broker.start()
        # Then topics and record are there
        assert ensure_topics(settings, create=False) == []
        consumer = Consumer(client_config(settings, group_id="reader"))
        consumer.assign([TopicPartition("events", p, 0) for p in range(4)])
        message = None
        deadline = time.monotonic() + 30
        while message is None or message.error():
            assert time.monotonic() < deadline
            message = consumer.poll(1.0)
        assert message.value() == b"kept"
        consumer.close()
    finally:
        broker.stop()


def test_started_twice_is_refused(tmp_path: Path) -> None:
    with EmbeddedBroker(tmp_path) as broker, pytest.raises(BrokerError, match="runs already"):
        broker.start()


def test_a_taken_port_is_refused(tmp_path: Path) -> None:
    # Given a port that another broker holds, when a second one is started on it
    with EmbeddedBroker(tmp_path / "first") as first:
        second = EmbeddedBroker(tmp_path / "second", port=first.port)
        with pytest.raises(BrokerError, match="the port is taken"):
            second.start()
        # Then the first one goes on undisturbed
        assert second.pid is None
        assert first.running


class _Unlucky(ApacheBroker):
    """Its first port is the one given; nothing but its log says that it cannot be used."""

    first = 0

    def _pick_port(self) -> int:
        port, self.first = self.first, 0
        return port or super()._pick_port()


def test_a_port_that_was_taken_while_it_started_is_given_up_for_another(tmp_path: Path) -> None:
    # Given a free port whose successor, where the controller will listen, belongs to a connection
    with socket.create_server((HOST, 0)) as server, socket.socket() as taken:
        first = free_port(2)
        taken.bind((HOST, first + 1))
        taken.connect(server.getsockname())
        # When a broker picks it
        broker = _Unlucky(require_apache(), tmp_path)
        broker.first = first
        with broker:
            # Then it starts on others
            assert broker.port not in (0, first)
            found = metadata(Kafka(bootstrap_servers=broker.bootstrap_servers), 5.0)
            assert found.brokers == (broker.bootstrap_servers,)


def test_a_broker_that_does_not_answer_in_time_is_ended_and_its_log_named(tmp_path: Path) -> None:
    broker = EmbeddedBroker(tmp_path, start_timeout_s=0.0)
    with pytest.raises(BrokerError) as raised:
        broker.start()
    assert str(broker.log_path) in str(raised.value)
    assert broker.pid is None


def test_a_distribution_without_its_scripts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match=r"KAFKA_HOME = .*kafka-server-start\.sh"):
        ApacheBroker(tmp_path, tmp_path / "data").start()


def test_running_notices_a_crash(tmp_path: Path) -> None:
    with EmbeddedBroker(tmp_path) as broker:
        assert broker.pid is not None
        os.kill(broker.pid, signal.SIGKILL)
        wait_until(lambda: not broker.running)
        assert broker.pid is None


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_a_broker_does_not_outlive_its_owner(tmp_path: Path, by: signal.Signals) -> None:
    # Given a process of its own that owns a broker
    code = (
        "import sys, threading\n"
        "from stream.broker import EmbeddedBroker\n"
        "broker = EmbeddedBroker(sys.argv[1])\n"
        # A thread that ends at once: the broker lives as long as the process, not as the thread.
        "starter = threading.Thread(target=broker.start)\n"
        "starter.start(); starter.join()\n"
        "print(broker.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    assert alive(pid)
    # When the owner dies without a chance to stop it
    owner.send_signal(by)
    owner.communicate(timeout=20)
    # Then the broker ends too
    wait_until(lambda: not alive(pid))
