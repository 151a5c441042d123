"""A worker that is killed ends with exactly the states of one undisturbed pass."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable

import pytest

from tests.support.processes import http_get, metric, wait_for
from tests.support.truth import check_partition
from tests.worker.conftest import System


def _applied(port: int) -> float:
    return metric(port, "livestate_events_applied_total") + metric(port, "livestate_events_replayed_total")


@pytest.mark.parametrize("disk", ["kept", "deleted"])
def test_five_kills_change_nothing(new_system: Callable[..., System], free_port: int, disk: str) -> None:
    # Given a system with events to work on
    rng = random.Random(11)
    system = new_system()
    system.publish_parameters()
    system.publish(1500)
    with system.worker(free_port) as worker:
        for _ in range(5):
            # When the worker is killed at a random moment of its work, with or without its disk
            wait_for(lambda: http_get(free_port, "/readyz")[0] == 200, 60, "the worker is ready")
            system.publish(600)
            target = rng.randrange(1, 500)
            wait_for(lambda target=target: _applied(free_port) >= target, 60, f"{target} events are applied")
            worker.kill()
            if disk == "deleted":
                shutil.rmtree(system.directory / "data-a")
            system.publish(200)
            worker.start()
        wait_for(lambda: http_get(free_port, "/readyz")[0] == 200, 60, "the worker is ready")
        wait_for(lambda: _is_done(system, free_port), 60, "all events are applied")
        # And is at last told to stop
        assert worker.stop() == 0
    # Then changelog and embeddings equal one undisturbed pass, bit for bit
    events = sum(check_partition(system.settings, system.parameters, p).events for p in range(2))
    assert events == system.published


def _is_done(system: System, port: int) -> bool:
    import json

    status, body = http_get(port, "/v1/status")
    positions = json.loads(body)["positions"].values() if status == 200 else ()
    return sum(positions) >= system.published
