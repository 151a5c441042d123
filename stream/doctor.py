"""What can be wrong with an installation, looked at without changing anything.

Guarantees: nothing is written to any topic or database (a file made to see whether a directory can be written is gone
at once); every check gives at least one finding, also where it could not be made; `failed` is what keeps a worker or
trainer from starting or makes it lose something, `warning` what may be meant so.
Not guaranteed: that a finding still holds when it is read.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Literal

from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType, TopicMetadata

from stream.commands.asking import ask, local_address, worker_address
from stream.errors import BrokerError, LivestateError, ParametersError, SettingsError
from stream.kafka import Cluster, TopicPlan, client_config, log_range, topic_plans, wait_until_reachable
from stream.settings import Settings
from stream.tested_versions import untested_packages

__all__ = ["Doctor", "Finding"]

State = Literal["ok", "warning", "failed"]

_REQUEST_S = 10.0
_ASK_S = 5.0
#: A record from this far ahead is nobody's clock that is kept in time.
_AHEAD_WARNING_S, _AHEAD_FAILED_S = 2.0, 60.0
#: Bytes of a row in a local database beyond its floats, and how many times as much compaction may need for a while.
_ROW_OVERHEAD_BYTES, _COMPACTION = 100, 2
_LEAST_FREE_BYTES = 1 << 30
_CLIENT_TOPICS = ("events", "feedback", "embeddings", "changelog")


@dataclass(frozen=True)
class Finding:
    """One result: what was looked at, how it is, what was found, and what to do about it."""

    check: str
    state: State
    detail: str
    advice: str = ""


class Doctor:
    """Examines one installation.

    Parameters
    ----------
    clients: how many the disk is estimated for; as many as settings or topics tell by default.
    worker, trainer: base URLs; the settings' by default.
    clock: seconds since 1970.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        broker_timeout_s: float = _REQUEST_S,
        clients: int | None = None,
        worker: str | None = None,
        trainer: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._broker_timeout_s = broker_timeout_s
        self._clients = clients
        self._worker = worker or worker_address(settings.worker)
        host, port = settings.trainer.http_host, settings.trainer.http_port
        self._trainer = trainer or local_address("http", host, port)
        self._clock = clock
        self._records_of: dict[str, int] = {}

    def findings(self) -> Iterator[Finding]:
        """Each as soon as it is known."""
        yield from self._look_at_settings()
        yield from self._look_at_packages()
        cluster: Cluster | None = None
        try:
            cluster = wait_until_reachable(self._settings, self._broker_timeout_s)
            brokers = ", ".join(cluster.brokers)
            yield Finding("broker", "ok", f"{brokers} by {self._settings.kafka.security_protocol}")
        except (BrokerError, SettingsError) as error:
            yield Finding("broker", "failed", str(error), "topics, parameters and clock were not looked at")
        if cluster is not None:
            for check, look in (
                ("topics", self._look_at_topics),
                ("clock", self._look_at_clock),
                ("parameters", self._look_at_parameters),
            ):
                try:
                    yield from look(cluster)
                except (BrokerError, KafkaException) as error:
                    yield Finding(check, "failed", str(error), "look at the broker's log")
        yield from self._look_at_disks()
        yield from self._look_at_worker()
        yield from self._look_at_trainer()

    # ---------------------------------------------------------------- here

    def _look_at_settings(self) -> Iterator[Finding]:
        settings = self._settings
        what = f"{len(settings.modalities)} modalities, {len(settings.memory)} memories, {len(settings.tasks)} tasks"
        if not settings.tasks:
            yield Finding("settings", "warning", what, "add [tasks.NAME]: without one nothing is predicted or learned")
        else:
            yield Finding("settings", "ok", what)
        worker = settings.worker
        if worker.http_host not in ("127.0.0.1", "::1", "localhost") and worker.http_token_file is None:
            yield Finding(
                "settings",
                "warning",
                f"worker.http_host = {worker.http_host!r}: whoever reaches the port reads every client's state",
                "set worker.http_token_file, or let only a proxy reach the port",
            )

    def _look_at_packages(self) -> Iterator[Finding]:
        try:
            checked, wrong = untested_packages()
        except PackageNotFoundError:
            yield Finding(
                "packages", "warning", "livestate is not installed as a package", "install it with pip to check them"
            )
            return
        if wrong:
            yield Finding("packages", "failed", "; ".join(wrong), "pip install --upgrade --force-reinstall livestate")
        else:
            yield Finding("packages", "ok", f"{checked} packages are in their tested ranges")

    def _look_at_disks(self) -> Iterator[Finding]:
        for name, directory in (
            ("worker.data_dir", self._settings.worker.data_dir),
            ("trainer.data_dir", self._settings.trainer.data_dir),
        ):
            there = Path(directory).absolute()
            while not there.exists():
                there = there.parent
            try:
                with tempfile.TemporaryFile(dir=there):
                    pass
            except OSError as error:
                yield Finding(
                    "disk", "failed", f"{name} = {directory!r} cannot be written: {error.strerror}",
                    f"let this user write to {there}, or name another directory",
                )  # fmt: skip
                continue
            yield self._space(name, directory, shutil.disk_usage(there).free)

    def _space(self, name: str, directory: str, free: int) -> Finding:
        clients = self._expected_clients()
        needed = clients * self._row_bytes() * _COMPACTION
        detail = f"{name} = {directory!r}: {free / 1e9:,.1f} GB free"
        if clients:
            detail += f", at most {needed / 1e9:,.1f} GB needed for {clients:,} clients"
        if free < needed:
            return Finding("disk", "failed", detail, "give it a larger disk, or set store.max_rows or store.ttl_s")
        if free < _LEAST_FREE_BYTES:
            return Finding("disk", "warning", detail, "make room: less than 1 GB is soon used up")
        return Finding("disk", "ok", detail)

    def _expected_clients(self) -> int:
        if self._clients is not None:
            return self._clients
        if self._settings.store.max_rows is not None:
            return self._settings.store.max_rows * self._settings.topics.partitions
        return self._records_of.get("changelog", 0)

    def _row_bytes(self) -> int:
        # Imported here: numba takes seconds that a broker which is not there need not wait for.
        from stream.model.layout import Layout
        from stream.wire import Schema

        layout = Layout.compile(self._settings, Schema.compile(self._settings))
        return 4 * layout.width + _ROW_OVERHEAD_BYTES

    # ---------------------------------------------------------------- the broker

    def _look_at_topics(self, cluster: Cluster) -> Iterator[Finding]:
        admin = AdminClient(client_config(self._settings))
        plans = topic_plans(self._settings)
        there = admin.list_topics(timeout=_REQUEST_S).topics
        policies = _policies(admin, [plan.name for plan in plans if plan.name in cluster.topics])
        good = 0
        for plan in plans:
            found = list(_wrong_with(plan, there.get(plan.name), policies.get(plan.name), len(cluster.brokers)))
            good += not found
            yield from found
        counts = {name: cluster.topics[name] for plan in plans if (name := plan.name) in cluster.topics}
        of_clients = {
            plan.name: counts[plan.name] for plan in plans if plan.role in _CLIENT_TOPICS and plan.name in counts
        }
        if len(set(of_clients.values())) > 1:
            different = ", ".join(f"{name} {n}" for name, n in of_clients.items())
            yield Finding(
                "topics", "failed", f"partitions differ: {different}",
                "a client has to be on one partition number everywhere: make them anew with the same number",
            )  # fmt: skip
        if good == len(plans):
            yield Finding("topics", "ok", f"all {good} are there, {self._settings.topics.partitions} partitions each")

    def _look_at_clock(self, cluster: Cluster) -> Iterator[Finding]:
        newest: tuple[float, str] | None = None
        topics = self._settings.topics
        for topic, partitions in (
            (topics.events, topics.partitions), (topics.changelog, topics.partitions), (topics.parameters, 1),
        ):  # fmt: skip
            if topic not in cluster.topics:
                continue
            for partition in range(min(partitions, cluster.topics[topic])):
                low, high, written_s = _last_record(self._settings, topic, partition)
                if topic == topics.changelog:
                    self._records_of["changelog"] = self._records_of.get("changelog", 0) + high - low
                if written_s is not None and (newest is None or written_s > newest[0]):
                    newest = (written_s, topic)
        if newest is None:
            yield Finding("clock", "ok", "no record to compare with")
            return
        ahead = newest[0] - self._clock()
        detail = f"the newest record, on {newest[1]!r}, is from {abs(ahead):,.1f} s {'ahead' if ahead > 0 else 'ago'}"
        if ahead > _AHEAD_WARNING_S:
            state: State = "failed" if ahead > _AHEAD_FAILED_S else "warning"
            yield Finding("clock", state, detail, "set the clocks of this machine, publishers and broker by NTP")
        else:
            yield Finding("clock", "ok", detail)

    def _look_at_parameters(self, cluster: Cluster) -> Iterator[Finding]:
        from stream.model.engine import Engine
        from stream.model.heads import Questions
        from stream.model.layout import Layout
        from stream.parameter_log import ParameterReader
        from stream.wire import Schema

        if self._settings.topics.parameters not in cluster.topics:
            return
        reader = ParameterReader(self._settings)
        reader.start()
        try:
            if not reader.wait_until_caught_up(_REQUEST_S):
                yield Finding(
                    "parameters", "failed", f"not read to their end: {reader.error}", "look at the broker's log"
                )
                return
        finally:
            reader.stop()
        if reader.staged is None:
            yield Finding("parameters", "warning", "there is no version", "start the trainer: workers wait for one")
            return
        parameters, marker = reader.staged
        layout = Layout.compile(self._settings, Schema.compile(self._settings))
        try:
            Engine(layout, parameters)
            heads = Questions(layout).heads(parameters)
        except (ParametersError, KeyError) as error:
            yield Finding(
                "parameters", "failed", f"version {parameters.version} does not fit the settings: {error}",
                "go back to the settings that it was learned with, or bring a trunk in with `livestate rebuild`",
            )  # fmt: skip
            return
        age_s = self._clock() - marker.created_ms / 1000
        detail = (
            f"version {parameters.version}, trunk {parameters.trunk_id}, heads of {len(heads)} of "
            f"{len(self._settings.tasks)} tasks, {age_s:,.0f} s old"
        )
        if reader.torn:
            yield Finding(
                "parameters", "warning", f"{detail}; {reader.torn} versions were not whole", "see the trainer's log"
            )
        else:
            yield Finding("parameters", "ok", detail)

    # ---------------------------------------------------------------- worker and trainer

    def _look_at_worker(self) -> Iterator[Finding]:
        try:
            ask(self._settings.worker, self._worker, "/readyz", timeout_s=_ASK_S)
            status = json.loads(ask(self._settings.worker, self._worker, "/v1/status", timeout_s=_ASK_S))
        except SettingsError as error:
            yield Finding("worker", "failed", str(error), "give every worker and tool the same token")
            return
        except LivestateError as error:
            yield _unhealthy("worker", self._worker, error)
            return
        lag = sum(status["lag"].values())
        unserved = [number for number, address in status["owners"].items() if address is None]
        detail = (
            f"{self._worker} is ready: partitions {status['partitions']}, version {status['parameter_version']}, "
            f"{lag:,} events behind"
        )
        if unserved:
            yield Finding("worker", "failed", f"{detail}; nobody serves {', '.join(unserved)}", "start another worker")
        elif status["rebuilding"]:
            yield Finding("worker", "warning", f"{detail}; rebuilding {status['rebuilding']}", "wait until it is done")
        else:
            yield Finding("worker", "ok", detail)
        for address in sorted({one for one in status["owners"].values() if one} - {status["address"]}):
            try:
                ask(self._settings.worker, address, "/readyz", timeout_s=_ASK_S)
                yield Finding("worker", "ok", f"{address} is ready")
            except LivestateError as error:
                yield _unhealthy("worker", address, error)

    def _look_at_trainer(self) -> Iterator[Finding]:
        try:
            ask(self._settings.worker, self._trainer, "/readyz", timeout_s=_ASK_S)
            yield Finding("trainer", "ok", f"{self._trainer} is ready")
        except LivestateError as error:
            yield _unhealthy("trainer", self._trainer, error)


def _unhealthy(kind: str, address: str, error: LivestateError) -> Finding:
    """Nobody there may be meant so; somebody who says that it cannot work is not."""
    if " answered " in str(error):
        return Finding(kind, "failed", str(error), f"see the {kind}'s log")
    reason = str(error).partition(";")[0].replace("no worker answers", "nobody answers")
    return Finding(kind, "warning", reason, f"start it with `livestate {kind}`, or say where it is with --{kind} URL")


def _wrong_with(plan: TopicPlan, found: TopicMetadata | None, policy: str | None, brokers: int) -> Iterator[Finding]:
    if found is None or found.error is not None:
        yield Finding("topics", "failed", f"{plan.name!r} is missing", "create it with `livestate topics --create`")
        return
    if len(found.partitions) != plan.partitions:
        yield Finding(
            "topics", "failed",
            f"{plan.name!r} has {len(found.partitions)} partitions, topics.partitions is {plan.partitions}",
            "set topics.partitions to what there is, or move to new topics: clients would change their partition",
        )  # fmt: skip
    wanted = plan.config["cleanup.policy"]
    if policy is not None and wanted not in policy.split(","):
        lost = "values that are needed would be deleted" if wanted == "compact" else "it would grow for ever"
        yield Finding(
            "topics", "failed" if wanted == "compact" else "warning",
            f"{plan.name!r} has cleanup.policy = {policy!r}, expected {wanted!r}: {lost}",
            f"kafka-configs.sh --alter --topic {plan.name} --add-config cleanup.policy={wanted}",
        )  # fmt: skip
    replicas = min((len(one.replicas) for one in found.partitions.values()), default=0)
    if replicas < plan.replication:
        more = "" if brokers >= plan.replication else f"; there are only {brokers} brokers"
        yield Finding(
            "topics", "warning",
            f"{plan.name!r} has {replicas} replicas, topics.replication is {plan.replication}{more}",
            "add replicas with kafka-reassign-partitions.sh",
        )  # fmt: skip
    without = [number for number, one in found.partitions.items() if one.leader < 0]
    if without:
        yield Finding("topics", "failed", f"{plan.name!r}: partitions {without} have no leader", "start their brokers")
    behind = [number for number, one in found.partitions.items() if len(one.isrs) < len(one.replicas)]
    if behind:
        yield Finding(
            "topics",
            "warning",
            f"{plan.name!r}: replicas of partitions {behind} are not in sync",
            "look at the brokers",
        )


def _policies(admin: AdminClient, names: list[str]) -> dict[str, str]:
    """Cleanup policies; without those of topics whose configuration this client may not read."""
    found: dict[str, str] = {}
    if not names:
        return found
    resources = [ConfigResource(ResourceType.TOPIC, name) for name in names]
    for resource, answer in admin.describe_configs(resources, request_timeout=_REQUEST_S).items():
        try:
            entry = answer.result(_REQUEST_S).get("cleanup.policy")
        except KafkaException:
            continue
        if entry is not None and entry.value is not None:
            found[resource.name] = entry.value
    return found


def _last_record(settings: Settings, topic: str, partition: int) -> tuple[int, int, float | None]:
    """(first offset, offset after the last, when the last record was written in seconds since 1970)."""
    config = client_config(settings, group_id=f"{settings.kafka.group}-doctor", enable_partition_eof=True)
    consumer = Consumer({**config, "enable.auto.commit": False, "fetch.wait.max.ms": 20})
    written: float | None = None
    try:
        low, high = log_range(consumer, topic, partition, _REQUEST_S)
        if high > low:
            # The very last ones may be marks of transactions, which no client sees.
            consumer.assign([TopicPartition(topic, partition, max(low, high - 20))])
            deadline = time.monotonic() + _REQUEST_S
            while time.monotonic() < deadline:
                message = consumer.poll(0.2)
                if message is None:
                    continue
                if message.error() is not None or (message.offset() or 0) >= high:
                    break
                kind, milliseconds = message.timestamp()
                if kind:
                    written = max(written or 0.0, milliseconds / 1000)
        return low, high, written
    finally:
        consumer.close()
