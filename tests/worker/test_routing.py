"""Any worker answers for any client, while workers die, come back at another address, and leave."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stream.broker import Broker
from stream.cli import main
from stream.ports import free_port
from tests.support.processes import http_get, metric, wait_for
from tests.support.truth import read_topic
from tests.worker.conftest import System


def batch(port: int, client_ids: list[str]) -> tuple[int, dict[str, Any]]:
    """Status and body of a question for many clients; status 0 where nobody answers."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/clients:batchGet",
        json.dumps({"client_ids": client_ids}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except OSError:
        return 0, {}


def status(port: int) -> dict[str, Any]:
    """What a worker says of itself; empty while it does not answer."""
    code, body = http_get(port, "/v1/status")
    found: dict[str, Any] = json.loads(body) if code == 200 else {}
    return found


def owners(port: int) -> set[str]:
    return set(status(port).get("owners", {}).values())


@pytest.mark.timeout(240)
def test_any_worker_answers_for_any_client_while_partitions_change_hands(
    apache_broker: Broker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Given two workers with a partition each, whose sessions last longer than a restart
    system = System(apache_broker, tmp_path)
    system.environment |= {"LIVESTATE_KAFKA__SESSION_TIMEOUT_S": "20", "LIVESTATE_WORKER__HTTP_TIMEOUT_S": "20"}
    system.publish_parameters()
    system.publish(300)
    events = Counter(
        message.key().decode()
        for p in range(2)
        for message in read_topic(system.settings, system.settings.topics.events, p)
    )
    clients = sorted(events)
    ports = [free_port(), free_port(), free_port()]
    addresses = [f"http://127.0.0.1:{port}" for port in ports]

    def is_right(port: int) -> bool:
        """Whether a worker has an answer; if so, it is the right one."""
        code, body = batch(port, [*clients, "nobody"])
        if code != 200:
            assert code in (0, 503), body
            return False
        assert body["missing"] == ["nobody"]
        assert {view["client_id"]: view["events_seen"] for view in body["clients"]} == events
        return True

    with system.worker(ports[0], "a") as first, system.worker(ports[1], "b") as second:
        wait_for(lambda: owners(ports[0]) == owners(ports[1]) == set(addresses[:2]), 90, "both know both addresses")
        wait_for(lambda: sum(metric(p, "livestate_events_applied_total") for p in ports[:2]) >= 300, 60, "300 events")
        # When either is asked for all clients, then it answers for all of them
        assert is_right(ports[0])
        assert is_right(ports[1])
        told = status(ports[0])
        assert len(told["partitions"]) == 1
        assert told["address"] == addresses[0]
        wait_for(lambda: [*status(ports[0])["lag"].values()] == [0], 30, "the lag is known")
        for client_id in clients[:2]:
            assert main(["get", "--settings", str(system.file), "--worker", addresses[0], client_id, "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["events_seen"] == events[client_id]
        # When one is killed and comes back at another address
        second.kill()
        with system.worker(ports[2], "b") as moved:
            wait_for(lambda: owners(ports[0]) == {addresses[0], addresses[2]}, 90, "the new address is known")
            # Then either answers for all
            wait_for(lambda: is_right(ports[0]) and is_right(ports[2]), 60, "both answer for all clients")
            # When it leaves, while the other one is asked again and again
            answered: list[bool] = []
            wrong: list[BaseException] = []
            done = threading.Event()

            def ask() -> None:
                try:
                    while not done.is_set():
                        answered.append(is_right(ports[0]))
                except BaseException as error:
                    wrong.append(error)

            asking = threading.Thread(target=ask)
            asking.start()
            assert moved.stop() == 0
            wait_for(lambda: status(ports[0]).get("partitions") == [0, 1], 60, "one has everything")
        done.set()
        asking.join(60)
        # Then no answer was wrong, and it has all clients in the end
        assert not wrong
        assert answered
        assert is_right(ports[0])
        assert owners(ports[0]) == {addresses[0]}
        assert first.stop() == 0
