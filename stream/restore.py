"""Bringing a partition's rows to the end of its changelog.

A partition's database lies in a directory that names its trunk, so that rows of two trunks can lie side by side while
one takes over from the other.

Order matters: the changelog writer is opened first, which fences the partition's last owner; only then is the end of
the changelog its end.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from stream.changelog import ChangelogWriter, PartitionMeta, read_changelog
from stream.checkpoint import META_NAME, LocalMeta
from stream.errors import StoreError
from stream.kafka import log_ends
from stream.settings import Settings, row_ttls
from stream.store import EmbeddingStore, StoreOptions

__all__ = ["Restored", "other_paths", "partition_path", "restore_partition", "store_options"]


@dataclass(frozen=True)
class Restored:
    """A partition ready to go on: its rows, its fenced writer, the next input offset, and what it took.

    `store` is None where the changelog's rows are of another trunk: they have to be rebuilt.
    """

    store: EmbeddingStore | None
    writer: ChangelogWriter
    position: int
    rows: int
    seconds: float


def partition_path(settings: Settings, number: int, trunk: str) -> Path:
    """Where a partition's local database under a trunk lies."""
    return Path(settings.worker.data_dir) / f"partition-{number}-{trunk}"


def other_paths(settings: Settings, number: int, trunk: str) -> list[Path]:
    """Where databases of the same partition under other trunks lie."""
    mine = partition_path(settings, number, trunk)
    return sorted(path for path in mine.parent.glob(f"partition-{number}-*") if path != mine)


def store_options(settings: Settings, width: int) -> StoreOptions:
    """Options of one partition's store; the worker's memory is shared evenly by all partitions."""
    store = settings.store
    ttl_ms, event_ttls_ms = row_ttls(settings)
    return StoreOptions(
        width=width,
        memory_rows=max(64, store.memory_rows // settings.topics.partitions),
        ttl_ms=ttl_ms,
        event_ttls_ms=event_ttls_ms,
        max_rows=store.max_rows,
        min_rows=store.min_rows,
        cold_rows=None if store.cold_rows is None else store.cold_rows // settings.topics.partitions,
        admission_threshold=store.admission_threshold,
        max_held_bytes=store.held_bytes,
    )


def restore_partition(settings: Settings, number: int, *, width: int, trunk: str, layout: str) -> Restored:
    """Open a partition's rows and read what the changelog has beyond them. Blocks; run it on a thread.

    Raises
    ------
    StoreError: the database cannot be used, or the rows have another layout.
    BrokerError: the broker does not answer.
    """
    started = time.perf_counter()
    writer = ChangelogWriter(settings, number)
    path = partition_path(settings, number, trunk)
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
            _check_layout(settings, path, meta, layout)
            if meta.trunk != trunk:
                store.close()
                return Restored(None, writer, meta.position, rows, time.perf_counter() - started)
            store.advance_watermark(meta.watermark_ms)
        position = meta.position if meta is not None else log_ends(settings, settings.topics.events, number)[0]
    except BaseException:
        store.close()
        raise
    return Restored(store, writer, position, rows, time.perf_counter() - started)


def _check_layout(settings: Settings, path: Path, meta: PartitionMeta, layout: str) -> None:
    if meta.layout != layout:
        raise StoreError(
            f"the states in {path} and topic {settings.topics.changelog!r} have row layout {meta.layout}, but the "
            f"settings of model and memory describe {layout}: go back to those, or start with new changelog and "
            f"embeddings topics, a new kafka.group and an empty worker.data_dir"
        )
