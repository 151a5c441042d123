"""A worker's name in its group: kept by its data directory, held by one process at a time, left at the end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from pathlib import Path

import pytest
from aiokafka.cluster import ClusterMetadata
from aiokafka.protocol.metadata import MetadataResponse_v1
from confluent_kafka.admin import AdminClient, NewTopic

from stream import ports
from stream.broker import Broker
from stream.errors import BrokerError, StoreError
from stream.faust_app import make_app
from stream.kafka import client_config
from stream.membership import Membership
from stream.store import StoreLocked
from stream.transport import FetchedBlock
from stream.worker import Worker
from tests.support.processes import Livestate, http_get, metric, wait_for
from tests.support.settings import small_settings
from tests.worker.conftest import System


def test_a_directory_keeps_its_name(tmp_path: Path) -> None:
    with Membership(tmp_path) as first:
        name = first.name
    with Membership(tmp_path) as again:
        assert again.name == name
    other = tmp_path / "other"
    other.mkdir()
    with Membership(other) as another:
        assert another.name != name


@pytest.mark.parametrize("text", ["", "0123", "x" * 32, "\xff"])
def test_a_damaged_name_is_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "worker-id").write_text(text, encoding="latin-1")
    with Membership(tmp_path) as membership:
        name = membership.name
    assert len(name) == 32
    with Membership(tmp_path) as again:
        assert again.name == name


def test_a_second_process_is_refused_by_name(tmp_path: Path) -> None:
    with Membership(tmp_path), pytest.raises(StoreLocked, match=f"{tmp_path} is in use by another worker"):
        Membership(tmp_path)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        missing = tmp_path / "missing"
    else:
        missing = tmp_path
        missing.chmod(0o500)
    with pytest.raises(StoreError, match="worker-id cannot be written"):
        Membership(missing)


def _position(port: int) -> int:
    status, body = http_get(port, "/v1/status")
    return sum(json.loads(body)["positions"].values()) if status == 200 else 0


def _has_all(port: int) -> bool:
    return http_get(port, "/readyz")[0] == 200 and metric(port, "livestate_partitions_assigned") == 2


def test_a_killed_worker_is_back_before_its_session_ends(apache_broker: Broker, free_port: int, tmp_path: Path) -> None:
    # Given a worker whose session lasts much longer than the test waits
    system = System(apache_broker, tmp_path)
    system.environment["LIVESTATE_KAFKA__SESSION_TIMEOUT_S"] = "120"
    system.publish_parameters()
    with system.worker(free_port) as worker:
        wait_for(lambda: _has_all(free_port), 60, "the worker serves all partitions")
        system.publish(300)
        # When it is killed and started again
        worker.kill()
        worker.start()
        # Then it has its partitions back and applies what was published
        wait_for(lambda: _has_all(free_port), 60, "the worker serves all partitions again")
        system.publish(300)
        wait_for(lambda: _position(free_port) == system.published, 60, "all events are applied")
        assert worker.stop() == 0


def test_a_worker_that_is_told_to_stop_leaves_its_partitions_to_others(
    apache_broker: Broker, free_port: int, tmp_path: Path
) -> None:
    # Given two workers whose sessions last much longer than the test waits
    system = System(apache_broker, tmp_path)
    system.environment["LIVESTATE_KAFKA__SESSION_TIMEOUT_S"] = "120"
    system.publish_parameters()
    other = ports.free_port()
    with system.worker(free_port, "a") as first, system.worker(other, "b") as second:
        wait_for(
            lambda: all(metric(port, "livestate_partitions_assigned") == 1 for port in (free_port, other)),
            60,
            "each worker serves a partition",
        )
        # When one is told to stop
        assert second.stop() == 0
        # Then the other has everything
        wait_for(lambda: _has_all(free_port), 60, "the worker that stays serves all partitions")
        assert first.stop() == 0


def test_brokers_that_go_away_as_a_worker_starts_are_named(tmp_path: Path, free_port: int) -> None:
    # Given a worker that has found its brokers, which are gone when it joins the group
    found = small_settings(
        KAFKA__BOOTSTRAP_SERVERS=f"127.0.0.1:{free_port}", WORKER__DATA_DIR=str(tmp_path), WORKER__HTTP_PORT="0"
    )
    worker = Worker(found)
    # Then it ends with what a supervisor starts it again for
    with pytest.raises(BrokerError, match=rf"the brokers at 127\.0\.0\.1:{free_port} went away") as refused:
        asyncio.run(worker.run())
    assert refused.value.exit_code == 3


def test_a_worker_told_to_stop_before_it_has_brokers_ends_with_0(tmp_path: Path, free_port: int) -> None:
    # Given a worker that is starting, where no broker is
    settings = tmp_path / "settings.toml"
    settings.write_text(f'[kafka]\nbootstrap_servers = "127.0.0.1:{free_port}"\n')
    arguments = ["worker", "--settings", str(settings), "--broker-timeout", "120"]
    worker = Livestate(tmp_path / "log", arguments, {"LIVESTATE_WORKER__DATA_DIR": str(tmp_path / "data")}).start()
    try:
        # When it is told to stop as soon as it takes SIGTERM
        status = Path(f"/proc/{worker.process.pid}/status")

        def takes_it() -> bool:
            caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status.read_text(), re.MULTILINE)
            return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)

        wait_for(takes_it, 60, "the worker takes SIGTERM")
        # Then it ends with 0, as one that has served
        assert worker.stop() == 0, worker.text()
    finally:
        worker.kill()


def test_a_worker_that_ends_is_not_ready_and_says_why(tmp_path: Path) -> None:
    # Given a worker that has met what ends it
    worker = Worker(small_settings(WORKER__DATA_DIR=str(tmp_path)))
    assert not any(reason.startswith("it ends") for reason in worker.health().reasons)
    worker._fail(BrokerError("the changelog is gone"))
    # Then it is neither live nor ready, and names that until it is gone
    health = worker.health()
    assert not health.live
    assert health.reasons[0] == "it ends: the changelog is gone"


def test_who_assigns_without_knowing_the_topic_says_so() -> None:
    # Given a member of the group, and a cluster that does not tell of the topic
    async def take(block: FetchedBlock) -> None: ...

    found = small_settings()
    assignor = make_app(found, None, take).assignor
    topic = found.topics.events
    members = {"member": assignor.metadata({topic})}
    cluster = ClusterMetadata()
    # When it assigns the partitions, then it has none and says so, until it knows them
    assert assignor.assign(cluster, members)["member"].assignment == []
    assert assignor.lacks_topic
    # And who joins again, and may find another one assigning, says nothing of it
    assignor.metadata({topic})
    assert not assignor.lacks_topic
    assignor.assign(cluster, members)
    partitions = [(0, number, 1, [1], [1]) for number in range(2)]
    cluster.update_metadata(MetadataResponse_v1([(1, "localhost", 9092, None)], 1, [(0, topic, False, partitions)]))
    assert assignor.assign(cluster, members)["member"].assignment == [(topic, [0, 1])]
    assert not assignor.lacks_topic


def test_partitions_that_the_broker_did_not_tell_of_are_taken_once_it_does(
    apache_broker: Broker, free_port: int, tmp_path: Path
) -> None:
    # Given a worker whose broker no longer knows the topic, so that there is nothing to assign
    system = System(apache_broker, tmp_path)
    system.publish_parameters()
    with system.worker(free_port) as worker:
        wait_for(lambda: _has_all(free_port), 60, "the worker serves all partitions")
        events = system.settings.topics.events
        admin = AdminClient(client_config(system.settings))
        admin.delete_topics([events])[events].result(30)
        wait_for(
            lambda: (
                metric(free_port, "livestate_partitions_assigned") == 0 and http_get(free_port, "/readyz")[0] == 503
            ),
            60,
            "the worker has no partition and says so",
        )
        # When the broker knows it again
        admin.create_topics([NewTopic(events, 2, 1)])[events].result(30)
        # Then it is served long before the client would have looked by itself
        wait_for(lambda: _has_all(free_port), 60, "the worker serves all partitions again")
        system.publish(300)
        wait_for(lambda: _position(free_port) == system.published, 60, "all events are applied")
        assert worker.stop() == 0
