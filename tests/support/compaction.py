"""A parameter log on Apache Kafka that is compacted while a test looks on."""

from __future__ import annotations

from collections.abc import Callable

from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from stream.kafka import client_config, log_ends
from stream.settings import Settings
from tests.support.processes import wait_for
from tests.support.truth import read_topic

__all__ = ["compact_at_once", "wait_until_compacted"]


def compact_at_once(settings: Settings) -> None:
    """Let the broker close segments and compact them as soon as there are records."""
    resource = ConfigResource(
        ResourceType.TOPIC,
        settings.topics.parameters,
        incremental_configs=[
            ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
            for name, value in {"segment.ms": "50", "min.cleanable.dirty.ratio": "0.0"}.items()
        ],
    )
    admin = AdminClient(client_config(settings))
    admin.incremental_alter_configs([resource])[resource].result(30)


def wait_until_compacted(settings: Settings, publish: Callable[[], None]) -> None:
    """Publish versions until three quarters of the log are gone."""

    def is_compacted() -> bool:
        # A segment is closed by the first record after its time, and compacted when it is closed.
        publish()
        _, end = log_ends(settings, settings.topics.parameters, 0)
        return len(read_topic(settings, settings.topics.parameters, 0)) < end / 4

    wait_for(is_compacted, 90, "the log is compacted")
