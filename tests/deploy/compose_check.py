"""Deploys docker-compose.yml for real and breaks it: nothing may be lost.

    python -m tests.deploy.compose_check [--without SERVICE ...] [--skip-build] [--keep]

It builds the image, starts the stack under a project name and on ports of its own, and publishes events and
feedback from this machine. One worker container is killed and started again, the other is restarted, the trainer too,
and two more workers come and go, all under load. Then, from the topics alone, every state and every embedding has to
equal one undisturbed pass over the events, bit for bit. It also looks at what the containers may do, that none of them
compiled a kernel at its start, and that every query of the dashboard and of the rules finds data in Prometheus.
At the end everything is removed again.

Exit codes: 0 all true; 1 not; 77 no container engine answers here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from stream.cli import EXAMPLE
from stream.parameter_log import ParameterReader
from stream.settings import Settings, load
from stream.wire import decode_embedding
from tests.deploy.publisher import Publisher
from tests.deploy.queries import alert_queries, shown_queries
from tests.support.processes import http_get, wait_for
from tests.support.truth import check_partition, read_topic
from trainer.demo.processes import free_ports

ROOT = Path(__file__).resolve().parents[2]
WORKERS = ("worker-1", "worker-2")
PORTS = {"worker-1": "WORKER_1_PORT", "worker-2": "WORKER_2_PORT", "trainer": "TRAINER_PORT"}
NO_ENGINE = 77


class Stack:
    """The compose project under test: its own name, its own ports."""

    def __init__(self, compose: list[str], without: list[str]) -> None:
        self._compose = compose
        self.name = f"livestate-check-{os.getpid()}"
        names = ("BROKER_PORT", "WORKER_1_PORT", "WORKER_2_PORT", "TRAINER_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")
        self.ports = dict(zip(names, free_ports([0] * len(names)), strict=True))
        self._secret = Path(tempfile.mkstemp(prefix="livestate-check-")[1])
        self._secret.write_text("only for this check\n")
        self._secret.chmod(0o644)
        self._environment = {
            **os.environ,
            **{name: str(port) for name, port in self.ports.items()},
            "COMPOSE_PROJECT_NAME": self.name,
            "GRAFANA_PASSWORD_FILE": str(self._secret),
            "IMAGE_TAG": "check",
        }
        every = self.compose("config", "--services").split()
        self.services = [name for name in every if name not in without and name not in ("demo", "more-workers")]

    def compose(self, *arguments: str, **variables: str) -> str:
        """Run a compose command, under environment variables; returns what it printed."""
        environment = self._environment | variables
        done = subprocess.run([*self._compose, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise AssertionError(f"compose {' '.join(arguments)}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
        return done.stdout

    def container(self, service: str) -> str:
        """Id of a service's container."""
        return self.compose("ps", "--all", "-q", service).strip()

    def inspect(self, service: str) -> dict[str, Any]:
        """What the engine says about a service's container."""
        found: list[dict[str, Any]] = json.loads(docker("inspect", self.container(service)))
        return found[0]

    def is_healthy(self, service: str) -> bool:
        """Whether its health check passes."""
        state = self.inspect(service)["State"]
        return bool(state["Running"]) and state.get("Health", {}).get("Status") == "healthy"

    def status(self, service: str) -> dict[str, Any]:
        """A worker's /v1/status; empty while it does not answer."""
        code, body = http_get(self.ports[PORTS[service]], "/v1/status")
        return json.loads(body) if code == 200 else {}

    def applied(self) -> dict[int, int]:
        """Position of each partition, by the worker that owns it."""
        positions: dict[int, int] = {}
        for worker in WORKERS:
            for number, position in self.status(worker).get("positions", {}).items():
                positions[int(number)] = max(position, positions.get(int(number), 0))
        return positions

    def owners(self) -> int:
        """How many workers have partitions, as the first one knows it."""
        return len({address for address in self.status("worker-1").get("owners", {}).values() if address})

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Result of an instant query by Prometheus."""
        path = f"/api/v1/query?query={urllib.parse.quote(expression)}"
        code, body = http_get(self.ports["PROMETHEUS_PORT"], path)
        assert code == 200, f"{expression}: {code} {body}"
        result: list[dict[str, Any]] = json.loads(body)["data"]["result"]
        return result

    def remove(self) -> None:
        """Remove containers, volumes and networks, and see that none is left."""
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "90")
        self._secret.unlink()
        label = f"label=com.docker.compose.project={self.name}"
        for kind in (["ps", "-a"], ["volume", "ls"], ["network", "ls"]):
            left = docker(*kind, "-q", "--filter", label).split()
            assert not left, f"docker {kind[0]}: {left} are left after `down`"


def docker(*arguments: str) -> str:
    """Run a docker command; returns what it printed."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"docker {' '.join(arguments)}: {done.stderr[-2000:]}")
    return done.stdout


def find_compose() -> list[str] | None:
    """The command for Compose v2, else for version 1; None where no engine answers."""
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        return None
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and not subprocess.run([*command, "version"], capture_output=True).returncode:
            return command
    return None


@contextmanager
def step(name: str) -> Iterator[None]:
    """Say what is done, and how long it took."""
    print(f"{name} …", end=" ", flush=True)
    started = time.monotonic()
    yield
    print(f"{time.monotonic() - started:.1f} s", flush=True)


def check(stack: Stack, *, build: bool) -> None:
    """The whole check; AssertionError says what is not true."""
    if build:
        with step("build the image"):
            stack.compose("build", "topics")
            print(f"{int(docker('image', 'inspect', '-f', '{{.Size}}', 'livestate:check')) / 1e6:,.0f} MB", end=", ")
    with step("start, until every health check passes"):
        stack.compose("up", "--detach", "--no-build", *stack.services)
        lasting = [name for name in stack.services if name != "topics"]
        wait_for(lambda: all(stack.is_healthy(name) for name in lasting), 300, "every service is healthy")
    settings = load(EXAMPLE, {"LIVESTATE_KAFKA__BOOTSTRAP_SERVERS": f"127.0.0.1:{stack.ports['BROKER_PORT']}"})
    with step("what containers may do, and can"):
        check_guards(stack)
    publisher = Publisher(settings)
    with step("20,000 events in"):
        publisher.publish(20_000)
        wait_for_all(stack, publisher)
    with step("embeddings out, by topic and by HTTP"):
        check_reading(stack, settings, publisher.clients)
    if "prometheus" in stack.services:
        with step("every query of dashboard and rules"):
            check_queries(stack, publisher)
    with step("kill worker-1 under load; worker-2 takes all partitions"), publisher.load():
        docker("kill", "--signal", "KILL", stack.container("worker-1"))
        everything = list(range(settings.topics.partitions))
        wait_for(lambda: stack.status("worker-2").get("partitions") == everything, 120, "worker-2 serves them all")
    with step("start worker-1 again under load"), publisher.load():
        stack.compose("start", "worker-1")
        wait_for(lambda: bool(stack.status("worker-1").get("partitions")), 120, "worker-1 serves partitions")
        wait_for(lambda: stack.is_healthy("worker-1"), 120, "worker-1 is healthy")
    with step("restart worker-2 under load"), publisher.load():
        stack.compose("restart", "--timeout", "90", "worker-2")
        wait_for(lambda: bool(stack.status("worker-2").get("partitions")), 120, "worker-2 serves partitions")
        wait_for(lambda: stack.is_healthy("worker-2"), 120, "worker-2 is healthy")
    with step("restart the trainer under load"), publisher.load():
        version = stack.status("worker-1")["parameter_version"]
        stack.compose("restart", "--timeout", "90", "trainer")
        wait_for(lambda: stack.is_healthy("trainer"), 120, "the trainer is healthy")
        wait_for(lambda: stack.status("worker-1")["parameter_version"] > version, 120, "a new version is served")
    with step("two more workers under load"), publisher.load():
        stack.compose("up", "--detach", "--no-build", "more-workers", MORE_WORKERS="2")
        wait_for(lambda: stack.owners() == 4, 180, "each of four workers serves a partition")
    with step("and without them again"), publisher.load():
        stack.compose("up", "--detach", "--no-build", "more-workers", MORE_WORKERS="0")
        wait_for(lambda: stack.owners() == len(WORKERS), 120, "two workers serve all partitions")
    with step("no kernel was compiled at a start"):
        check_kernels(stack)
    with step(f"{sum(publisher.ends.values()):,} events are applied, the workers stop"):
        wait_for_all(stack, publisher)
        stack.compose("stop", "--timeout", "90", *WORKERS)
        for worker in WORKERS:
            state = stack.inspect(worker)["State"]
            assert state["ExitCode"] == 0, f"{worker} ended with {state['ExitCode']}"
    with step("every state and embedding, bit for bit"):
        check_truth(settings, publisher)


def wait_for_all(stack: Stack, publisher: Publisher) -> None:
    """Return when the workers have applied all that was published."""
    wait_for(lambda: stack.applied() == publisher.ends, 180, f"all of {publisher.ends} are applied")


def check_guards(stack: Stack) -> None:
    """No root, nothing writable but data, no privileges, nothing reachable from elsewhere; every head can be used."""
    for service in stack.services:
        if service == "topics":
            continue
        found = stack.inspect(service)
        host = found["HostConfig"]
        assert found["Config"]["User"].split(":")[0] not in ("", "0", "root"), f"{service} runs as root"
        assert host["CapDrop"] == ["ALL"], f"{service} has capabilities"
        assert not host["Privileged"], f"{service} is privileged"
        assert host["ReadonlyRootfs"] or service == "kafka", f"{service} can write to its root"
        for bindings in found["NetworkSettings"]["Ports"].values():
            for binding in bindings or ():
                assert binding["HostIp"] == "127.0.0.1", f"{service} is published on {binding}"
    for service in (*WORKERS, "trainer"):
        identity = docker("exec", stack.container(service), "id", "-u").strip()
        assert identity == "10001", f"{service} runs as user {identity}"
        written = subprocess.run(
            ["docker", "exec", stack.container(service), "sh", "-c", "touch /opt/livestate/x"], capture_output=True
        )
        assert written.returncode, f"{service} can write to its image"
        # Settings may ask for the head `gbdt`, in any of them.
        docker("exec", stack.container(service), "python", "-c", "import lightgbm")


def check_reading(stack: Stack, settings: Settings, clients: set[bytes]) -> None:
    """The latest embedding of a client is the same by topic and by each worker's HTTP, and another's is not there."""
    latest: dict[bytes, Any] = {}
    for number in range(settings.topics.partitions):
        for message in read_topic(settings, settings.topics.embeddings, number):
            latest[message.key()] = message
    assert latest.keys() == clients, f"{len(latest)} clients have embeddings, not {len(clients)}"
    for client in list(latest)[:20]:
        wanted = decode_embedding(latest[client].value())
        answers = [http_get(stack.ports[PORTS[name]], f"/v1/clients/{client.decode()}") for name in WORKERS]
        assert [code for code, _ in answers] == [200, 200], f"{client!r}: {answers}"
        for found in (json.loads(body) for _, body in answers):
            assert found["offset"] == wanted.offset
            assert np.array_equal(np.array(found["vector"], np.float32), wanted.vector)
    assert [http_get(stack.ports[PORTS[name]], "/v1/clients/nobody")[0] for name in WORKERS] == [404, 404]


def check_queries(stack: Stack, publisher: Publisher) -> None:
    """Every target is up, every query finds data, and no alert fires but the one for the unusable records."""
    up = {one["metric"]["instance"]: one["value"][1] for one in stack.query('up{job=~"livestate-.+"}')}
    assert up == {"worker-1:6066": "1", "worker-2:6066": "1", "trainer:6067": "1"}, up
    empty: list[str] = []

    def all_find_data() -> bool:
        publisher.publish(200)
        for worker in WORKERS:
            stack.status(worker)
        empty[:] = [text for text in shown_queries() if not stack.query(text)]
        return not empty

    try:
        wait_for(all_find_data, 120, "every query finds data")
    except AssertionError as error:
        raise AssertionError(f"no data for {empty}") from error
    for text in alert_queries():
        stack.query(text)
    firing = {one["metric"]["alertname"] for one in stack.query('ALERTS{alertstate="firing"}')}
    assert firing <= {"LivestateDeadLetters"}, f"{firing} fire on a healthy system"


def check_kernels(stack: Stack) -> None:
    """Each container has the kernels of the image and no others."""
    names = "cd {} && find . -name '*.nbc'"
    for service in (*WORKERS, "trainer"):
        there, had = (
            set(docker("exec", stack.container(service), "sh", "-c", names.format(place)).split())
            for place in ("$NUMBA_CACHE_DIR", "/opt/kernels")
        )
        assert there == had, f"{service} compiled {there - had} beside the {len(had)} kernels of its image"


def check_truth(settings: Settings, publisher: Publisher) -> None:
    """Changelog and embeddings of every partition equal one pass over its events."""
    reader = ParameterReader(settings)
    reader.start()
    try:
        assert reader.wait_until_caught_up(60), "parameters are not read"
        assert reader.staged is not None, "there are no parameters"
        parameters = reader.staged[0]
    finally:
        reader.stop()
    events = 0
    for number, end in publisher.ends.items():
        assert len(read_topic(settings, settings.topics.events, number)) == end
        events += check_partition(settings, parameters, number).events
    refused = {
        tuple(value for name, value in message.headers() if name in ("livestate-partition", "livestate-offset"))
        for message in read_topic(settings, settings.topics.dead_letters, 0)
    }
    assert len(refused) == publisher.refused, f"{len(refused)} dead letters for {publisher.refused} unusable records"
    assert events + publisher.refused == sum(publisher.ends.values())
    print(f"{events:,} events of {len(publisher.clients):,} clients, {len(refused)} dead letters", end=", ")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.deploy.compose_check", description=__doc__.splitlines()[0])
    parser.add_argument("--without", nargs="+", default=[], metavar="SERVICE", help="services to leave out")
    parser.add_argument("--skip-build", action="store_true", help="use the image livestate:check as it is")
    parser.add_argument("--keep", action="store_true", help="leave everything up when the check fails")
    options = parser.parse_args(arguments)
    compose = find_compose()
    if compose is None:
        print("no container engine answers here", file=sys.stderr)
        return NO_ENGINE
    stack = Stack(compose, options.without)
    try:
        check(stack, build=not options.skip_build)
    except BaseException as error:
        print(f"failed: {error}", file=sys.stderr)
        if options.keep:
            print(f"left up: project {stack.name}, ports {stack.ports}", file=sys.stderr)
            return 1
        for service in stack.services:
            print(f"--- {service}\n{stack.compose('logs', '--no-color', '--tail', '25', service)}", file=sys.stderr)
        stack.remove()
        if isinstance(error, AssertionError):
            return 1
        raise
    with step("everything is removed"):
        stack.remove()
    return 0


if __name__ == "__main__":
    sys.exit(main())
