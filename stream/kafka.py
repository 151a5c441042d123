"""How Livestate's own Kafka clients are configured, and the topics they need.

Guarantees: every client made from these configurations uses Java's partitioner, writes librdkafka's messages
to Python's logging instead of standard error, and can carry any record the settings allow. `ensure_topics`
never changes a topic that exists.

Not guaranteed: that a topic's retention suits the user; `events`, `feedback` and `dead-letters` keep what the
broker's defaults say.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    ClusterMetadata,
    ConfigResource,
    NewTopic,
    ResourceType,
)

from stream.errors import BrokerError, SecurityError, TopicError
from stream.partitioner import murmur2, partition_of, partitions_of
from stream.security import librdkafka_security, refusal
from stream.settings import Kafka, Settings

__all__ = [
    "Cluster",
    "TopicPlan",
    "client_config",
    "ensure_topics",
    "log_ends",
    "log_range",
    "metadata",
    "murmur2",
    "partition_of",
    "partitions_of",
    "producer_config",
    "topic_plans",
    "wait_until_reachable",
]

logger = logging.getLogger(__name__)

#: Dead letters carry whatever was received, and versions carry whole tensors: both may exceed a broker's
#: default.
LARGEST_RECORD_BYTES = 64 * 1024 * 1024
REQUEST_TIMEOUT_S = 30.0
#: What a cluster says of a partition while its topic is new, or while its leader moves or starts.
_PASSING = frozenset(
    {
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError._UNKNOWN_PARTITION,
        KafkaError._TRANSPORT,
        KafkaError._TIMED_OUT,
    }
)
#: More records than any batch holds.
_LARGEST_BATCH = 200_000

#: A compacted topic is read from its start by those who restore: small segments close, and are compacted,
#: soon. A deleted key is physically gone within a day, its tombstone a day later.
COMPACT = {
    "cleanup.policy": "compact",
    "segment.bytes": str(128 * 1024 * 1024),
    "segment.ms": str(3_600_000),
    "min.cleanable.dirty.ratio": "0.2",
    "max.compaction.lag.ms": str(86_400_000),
    "delete.retention.ms": str(86_400_000),
}
DELETE = {"cleanup.policy": "delete"}


@dataclass(frozen=True)
class TopicPlan:
    """One topic as it should be: its name, what it is for, its shape."""

    name: str
    role: str
    partitions: int
    replication: int
    config: dict[str, str]


@dataclass(frozen=True)
class Cluster:
    """What answered a metadata request."""

    id: str | None
    brokers: tuple[str, ...]
    #: topic -> number of partitions
    topics: dict[str, int]


def client_config(settings: Settings, **more: Any) -> dict[str, Any]:
    """Configuration of a confluent-kafka client; names in `more` are librdkafka's with `_` for `.`."""
    return {**_base_config(settings.kafka), **{name.replace("_", "."): value for name, value in more.items()}}


def producer_config(settings: Settings, **more: Any) -> dict[str, Any]:
    """Configuration of a confluent-kafka producer: Java's partitioner, idempotent, batched, compressed."""
    config = client_config(
        settings,
        partitioner="murmur2_random",
        enable_idempotence=True,
        compression_type=settings.kafka.compression,
        linger_ms=5,
        batch_size=256 * 1024,
        queue_buffering_max_messages=200_000,
        queue_buffering_max_kbytes=256 * 1024,
        message_max_bytes=LARGEST_RECORD_BYTES,
    )
    return {**config, **{name.replace("_", "."): value for name, value in more.items()}}


def topic_plans(settings: Settings) -> list[TopicPlan]:
    """The topics of `settings` and their shapes."""
    topics = settings.topics
    durable = {"min.insync.replicas": str(max(1, topics.replication - 1))}
    large = {"max.message.bytes": str(LARGEST_RECORD_BYTES)}
    n, replication = topics.partitions, topics.replication
    return [
        TopicPlan(topics.events, "events", n, replication, {**DELETE, **durable}),
        TopicPlan(topics.feedback, "feedback", n, replication, {**DELETE, **durable}),
        TopicPlan(topics.embeddings, "embeddings", n, replication, {**COMPACT, **durable}),
        TopicPlan(topics.changelog, "changelog", n, replication, {**COMPACT, **durable}),
        TopicPlan(topics.parameters, "parameters", 1, replication, {**COMPACT, **durable, **large}),
        TopicPlan(topics.dead_letters, "dead_letters", 1, replication, {**DELETE, **durable, **large}),
    ]


def metadata(kafka: Kafka, timeout_s: float) -> Cluster:
    """Ask the broker once who and what there is.

    Raises
    ------
    SecurityError: the broker and this client do not trust each other.
    BrokerError: no answer within `timeout_s`; names the address and the last reason given.
    """
    errors: list[KafkaError] = []
    # What goes wrong is in the error raised; a line in the log for each attempt to connect would say no more.
    admin = AdminClient({**_base_config(kafka), "log_level": 0, "error_cb": errors.append})
    try:
        answer: ClusterMetadata = admin.list_topics(timeout=timeout_s)
    except KafkaException as error:
        # The reason (refused, wrong password) comes by callback; the call itself only says that it failed.
        while admin.poll(0.05):
            pass
        refused = refusal(kafka, errors)
        if refused is not None:
            raise SecurityError(f"{kafka.bootstrap_servers}: {refused}") from error
        reason = errors[-1].str() if errors else error.args[0].str()
        raise BrokerError(f"no answer from {kafka.bootstrap_servers} within {timeout_s:g} s: {reason}") from error
    return Cluster(
        answer.cluster_id,
        tuple(f"{broker.host}:{broker.port}" for broker in answer.brokers.values()),
        {name: len(topic.partitions) for name, topic in answer.topics.items() if topic.error is None},
    )


def wait_until_reachable(settings: Settings, timeout_s: float = 30.0) -> Cluster:
    """Return as soon as the broker answers.

    Raises
    ------
    SecurityError: the broker does not let this client in, and will not later.
    BrokerError: it did not within `timeout_s`; names the address, how long was waited, and what to check.
    """
    deadline = time.monotonic() + timeout_s
    attempt_s = 1.0
    while True:
        left = deadline - time.monotonic()
        try:
            return metadata(settings.kafka, max(0.1, min(left, attempt_s)))
        except SecurityError:
            raise
        except BrokerError as error:
            if deadline - time.monotonic() <= 0:
                raise BrokerError(
                    f"no Kafka broker answered at kafka.bootstrap_servers = "
                    f"{settings.kafka.bootstrap_servers!r} within {timeout_s:g} s; last: {error}; "
                    f"check that the broker runs, that the address is its advertised listener, "
                    f"and that security settings match"
                ) from error
        attempt_s = min(2 * attempt_s, 5.0)
        time.sleep(0.05)


def log_range(consumer: Consumer, topic: str, partition: int, timeout_s: float = REQUEST_TIMEOUT_S) -> tuple[int, int]:
    """(first offset, offset after the last) as the partition's leader says; waits while there is none.

    Raises
    ------
    KafkaException: refused, or no leader answered in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        left = deadline - time.monotonic()
        try:
            low, high = consumer.get_watermark_offsets(
                TopicPartition(topic, partition), timeout=max(0.1, left), cached=False
            )
        except KafkaException as error:
            if left <= 0 or error.args[0].code() not in _PASSING:
                raise
            time.sleep(0.05)
            # What the client remembers of a partition that was not there it would answer for half a minute.
            with contextlib.suppress(KafkaException):
                consumer.list_topics(topic, timeout=max(0.1, min(left, 5.0)))
        else:
            return int(low), int(high)


def log_ends(settings: Settings, topic: str, partition: int, timeout_s: float = REQUEST_TIMEOUT_S) -> tuple[int, int]:
    """(first offset, offset after the last record) of a partition.

    The last batch is read: some brokers, the embedded one among them, tell an end that lies inside it. Where
    records keep coming, the end is one that was true during the call.

    Raises
    ------
    BrokerError: the broker does not answer in time.
    """
    config = client_config(settings, group_id=f"{settings.kafka.group}-ends", enable_partition_eof=True)
    consumer = Consumer({**config, "enable.auto.commit": False, "fetch.wait.max.ms": 20})
    deadline = time.monotonic() + timeout_s
    try:
        low, high = log_range(consumer, topic, partition, timeout_s)
        if high <= low:
            return low, high
        consumer.assign([TopicPartition(topic, partition, max(low, high - 1))])
        end = high
        while time.monotonic() < deadline and end < high + _LARGEST_BATCH:
            for message in consumer.consume(1000, timeout=0.1):
                error = message.error()
                if error is None:
                    end = max(end, (message.offset() or 0) + 1)
                elif error.code() == KafkaError._PARTITION_EOF:
                    return low, end
        return low, end
    except KafkaException as error:
        raise BrokerError(f"the ends of topic {topic!r} cannot be read: {error.args[0].str()}") from error
    finally:
        consumer.close()


def ensure_topics(settings: Settings, create: bool, timeout_s: float = REQUEST_TIMEOUT_S) -> list[str]:
    """Check the topics of `settings` and, with `create`, make the missing ones; returns the names made.

    Raises
    ------
    TopicError: a topic is missing and `create` is false; a topic has another number of partitions than the
        settings say; a topic whose last value per key must be kept is not compacted.
    BrokerError: the broker does not answer or refuses.
    """
    plans = topic_plans(settings)
    _check_names(plans)
    cluster = metadata(settings.kafka, timeout_s)
    for plan in plans:
        found = cluster.topics.get(plan.name)
        if found is not None and found != plan.partitions:
            raise TopicError(_wrong_count(plan, found))
    missing = [plan for plan in plans if plan.name not in cluster.topics]
    if missing and not create:
        raise TopicError(
            f"topics are missing on {settings.kafka.bootstrap_servers}: "
            + ", ".join(f"{plan.name!r} (topics.{plan.role}, {plan.partitions} partitions)" for plan in missing)
            + "; create them with `livestate topics --create`, or with your own tools"
        )
    admin = AdminClient(_base_config(settings.kafka))
    existing = [plan for plan in plans if plan.name in cluster.topics]
    _check_policies(admin, existing, timeout_s)
    made = _create(admin, missing, timeout_s) if missing else []
    _await_topics(settings, missing, timeout_s)
    _check_policies(admin, [plan for plan in missing if plan not in made], timeout_s)
    return [plan.name for plan in made]


def _base_config(kafka: Kafka) -> dict[str, Any]:
    return {
        "bootstrap.servers": kafka.bootstrap_servers,
        "logger": logger,
        "error_cb": _note_error,
        **librdkafka_security(kafka),
    }


def _note_error(error: KafkaError) -> None:
    logger.warning("%s: %s", error.name(), error.str())


def _check_names(plans: list[TopicPlan]) -> None:
    roles: dict[str, str] = {}
    for plan in plans:
        if plan.name in roles:
            raise TopicError(
                f"topics.{plan.role} = {plan.name!r}: expected a name of its own; it is topics.{roles[plan.name]}"
            )
        roles[plan.name] = plan.role


def _wrong_count(plan: TopicPlan, found: int) -> str:
    if plan.role in ("parameters", "dead_letters"):
        return (
            f"topic {plan.name!r} (topics.{plan.role}) has {found} partitions, expected {plan.partitions}: "
            f"delete it so that it is created anew, or name another in topics.{plan.role}"
        )
    return (
        f"topic {plan.name!r} (topics.{plan.role}) has {found} partitions, but topics.partitions = "
        f"{plan.partitions}: every client would change its partition and lose its state. "
        f"Set topics.partitions = {found}, or move to new topics of {plan.partitions} partitions by naming "
        f"them in [topics] and publishing the events again"
    )


def _check_policies(admin: AdminClient, plans: list[TopicPlan], timeout_s: float) -> None:
    compacted = {plan.name: plan for plan in plans if plan.config["cleanup.policy"] == "compact"}
    if not compacted:
        return
    resources = [ConfigResource(ResourceType.TOPIC, name) for name in compacted]
    for resource, answer in admin.describe_configs(resources, request_timeout=timeout_s).items():
        try:
            entry = answer.result(timeout_s).get("cleanup.policy")
        except KafkaException as error:
            # Reading configurations is a right of its own that a client may lack; the topic is there all the
            # same.
            logger.warning("the cleanup policy of topic %s cannot be read: %s", resource.name, error)
            continue
        if entry is not None and entry.value is not None and "compact" not in entry.value.split(","):
            plan = compacted[resource.name]
            raise TopicError(
                f"topic {plan.name!r} (topics.{plan.role}) has cleanup.policy = {entry.value!r}, expected "
                f"'compact': the broker would delete values that are still needed; change the topic's policy"
            )


def _create(admin: AdminClient, plans: list[TopicPlan], timeout_s: float) -> list[TopicPlan]:
    """Create topics; those that somebody else created in the meantime are not among the ones returned."""
    new = [
        NewTopic(plan.name, plan.partitions, replication_factor=plan.replication, config=plan.config) for plan in plans
    ]
    answers = admin.create_topics(new, request_timeout=timeout_s)
    made = []
    for plan in plans:
        try:
            answers[plan.name].result(timeout_s)
        except KafkaException as error:
            # Another worker that starts at the same time may have been first.
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise BrokerError(f"topic {plan.name!r} cannot be created: {error.args[0].str()}") from error
        else:
            made.append(plan)
    return made


def _await_topics(settings: Settings, plans: list[TopicPlan], timeout_s: float) -> None:
    """A created topic is not known to every broker at once; clients would see unknown partitions."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = metadata(settings.kafka, timeout_s).topics
        for plan in plans:
            if found.get(plan.name, plan.partitions) != plan.partitions:
                raise TopicError(_wrong_count(plan, found[plan.name]))
        absent = [plan.name for plan in plans if plan.name not in found]
        if not absent:
            return
        if time.monotonic() > deadline:
            raise BrokerError(f"topics {absent} were created but did not appear within {timeout_s:g} s")
        time.sleep(0.05)
