"""Bringing a partition's rows to the end of its changelog.

Order matters: the changelog writer is opened first, which fences the partition's last owner; only then is the
end of the changelog its end.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from confluent_kafka import Consumer, KafkaException, TopicPartition

from stream.changelog import ChangelogWriter, PartitionMeta, read_changelog
from stream.checkpoint import META_NAME, LocalMeta
from stream.errors import BrokerError, StoreError
from stream.kafka import client_config
from stream.settings import Settings
from stream.store import EmbeddingStore, StoreOptions

__all__ = ["Restored", "partition_path", "restore_partition", "store_options"]


@dataclass(frozen=True)
class Restored:
    """A partition ready to go on: its rows, its fenced writer, the next input offset, and what it took."""

    store: EmbeddingStore
    writer: ChangelogWriter
    position: int
    rows: int
    seconds: float


def partition_path(settings: Settings, number: int) -> Path:
    """Where a partition's local database lies."""
    return Path(settings.worker.data_dir) / f"partition-{number}"


def store_options(settings: Settings, width: int) -> StoreOptions:
    """Options of one partition's store; the worker's memory is shared evenly by all partitions."""
    store = settings.store
    return StoreOptions(
        width=width,
        memory_rows=max(64, store.memory_rows // settings.topics.partitions),
        ttl_ms=None if store.ttl_s is None else int(store.ttl_s * 1000),
        max_rows=store.max_rows,
        min_rows=store.min_rows,
    )


def restore_partition(settings: Settings, number: int, *, width: int, trunk: str, layout: str) -> Restored:
    """Open a partition's rows and read what the changelog has beyond them. Blocks; run it on a thread.

    Raises
    ------
    StoreError: the database cannot be used, or the rows were made by another trunk or row layout.
    BrokerError: the broker does not answer.
    """
    started = time.perf_counter()
    writer = ChangelogWriter(settings, number)
    path = partition_path(settings, number)
    store = EmbeddingStore.open(path, store_options(settings, width))
    try:
        stored = store.meta(META_NAME)
        local = LocalMeta.decode(stored) if stored is not None else None
        meta = local.partition if local is not None else None
        rows = 0
        for batch in read_changelog(settings, number, local.changelog_offset if local is not None else 0):
            meta = batch.meta or meta
            kept = {} if meta is None else {META_NAME: LocalMeta(meta, batch.next_offset).encode()}
            store.restore(batch.keys, batch.rows, kept)
            rows += len(batch.keys)
        if meta is not None:
            _check_origin(settings, path, meta, trunk, layout)
            store.advance_watermark(meta.watermark_ms)
        position = meta.position if meta is not None else _first_offset(settings, number)
    except BaseException:
        store.close()
        raise
    return Restored(store, writer, position, rows, time.perf_counter() - started)


def _check_origin(settings: Settings, path: Path, meta: PartitionMeta, trunk: str, layout: str) -> None:
    for what, found, expected in (("trunk", meta.trunk, trunk), ("row layout", meta.layout, layout)):
        if found != expected:
            raise StoreError(
                f"the states in {path} and topic {settings.topics.changelog!r} were made by {what} {found}, but "
                f"parameters and settings have {expected}: go back to those, or start with new changelog and "
                f"embeddings topics, a new kafka.group and an empty worker.data_dir"
            )


def _first_offset(settings: Settings, number: int) -> int:
    """Where the events topic begins; not 0 once old events have been deleted."""
    topic = settings.topics.events
    consumer = Consumer(client_config(settings, group_id=f"{settings.kafka.group}-offsets"))
    try:
        low, _ = consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=30.0, cached=False)
        return int(low)
    except KafkaException as error:
        raise BrokerError(f"topic {topic!r} cannot be read: {error.args[0].str()}") from error
    finally:
        consumer.close()
