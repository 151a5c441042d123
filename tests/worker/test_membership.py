"""A worker's name in its group: kept by its data directory, held by one process at a time, left at the end."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from stream import ports
from stream.broker import Broker
from stream.errors import StoreError
from stream.membership import Membership
from stream.store import StoreLocked
from tests.support.processes import http_get, metric, wait_for
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
