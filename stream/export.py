"""Clients' embeddings as a Parquet file, from a live system's topic or from the database of a worker that is stopped.

Guarantees: one row for each client, as of an end of the topic not before the start of the export; clients that have
expired by then are left out; vectors bit for bit; the file takes its name when it is whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stream.compacted import CompactedPartition
from stream.errors import DataError, RecordError
from stream.model.heads import output_names
from stream.settings import Settings
from stream.wire import Embedding, decode_embedding

__all__ = ["Exported", "export_embeddings", "export_rows"]

_GROUP_ROWS = 10_000


@dataclass(frozen=True)
class Exported:
    """Rows written, and records of the topic that are no embeddings, which were left out."""

    rows: int
    refused: int


def export_embeddings(
    settings: Settings, path: Path, passed: Callable[[float, str], None] = lambda share, text: None
) -> Exported:
    """Write every client's latest embedding.

    Columns: client_id (text), events_seen, timestamp_ms (of the last event), offset (its own, in `partition`),
    parameter_version, vector (list of float32, of one length), and for each task prediction_TASK (float32; of
    several classes prediction_TASK.CLASS), null where the client's last event did not ask for one.

    Raises
    ------
    BrokerError: the topic cannot be read. DataError: the file cannot be written, or embeddings differ in width.
    """
    tasks = [name for task, kind in settings.tasks.items() for name in output_names(task, kind)]
    partitions = settings.topics.partitions
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    rows = refused = 0
    writer: pq.ParquetWriter | None = None
    width: int | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for number in range(partitions):
            told = _part(passed, number / partitions, 1 / partitions, f"partition {number}")
            with CompactedPartition(settings, settings.topics.embeddings, number, path.parent, passed=told) as found:
                records = found.records()
                while chunk := list(islice(records, _GROUP_ROWS)):
                    embeddings = []
                    for key, value, _ in chunk:
                        try:
                            embeddings.append(decode_embedding(value or b""))
                        except RecordError:
                            refused += 1
                            continue
                        if embeddings[-1].client_id.encode() != key:
                            refused += 1
                            embeddings.pop()
                    if not embeddings:
                        continue
                    if writer is None:
                        width = len(embeddings[0].vector)
                        writer = pq.ParquetWriter(beside, _schema(width, tasks), compression="zstd")
                    assert width is not None
                    writer.write_table(_table(embeddings, number, width, tasks))
                    rows += len(embeddings)
                    told(1.0)
        if writer is None:
            writer = pq.ParquetWriter(beside, _schema(0, tasks))
        writer.close()
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
    finally:
        if writer is not None:
            writer.close()
        beside.unlink(missing_ok=True)
    return Exported(rows, refused)


def _part(passed: Callable[[float, str], None], done: float, share: float, text: str) -> Callable[[float], None]:
    return lambda within: passed(done + share * within, text)


def _schema(width: int, tasks: list[str]) -> pa.Schema:
    integers = ("events_seen", "timestamp_ms", "offset", "partition", "parameter_version")
    return pa.schema(
        [
            pa.field("client_id", pa.string(), nullable=False),
            *(pa.field(name, pa.int64(), nullable=False) for name in integers),
            # An empty list of fixed length is not understood by every reader.
            pa.field("vector", pa.list_(pa.float32(), width) if width else pa.list_(pa.float32())),
            *(pa.field(f"prediction_{task}", pa.float32()) for task in tasks),
        ]
    )


def _table(embeddings: list[Embedding], partition: int, width: int, tasks: list[str]) -> pa.Table:
    other = next((one for one in embeddings if len(one.vector) != width), None)
    if other is not None:
        raise DataError(
            f"client {other.client_id!r} has a vector of {len(other.vector)} numbers, others have {width}: the topic "
            f"has embeddings of two settings; wait until all are published again"
        )
    vectors = pa.array(np.concatenate([one.vector for one in embeddings]))
    columns: list[Any] = [
        pa.array([one.client_id for one in embeddings]),
        pa.array([one.events_seen for one in embeddings]),
        pa.array([one.timestamp_ms for one in embeddings]),
        pa.array([one.offset for one in embeddings]),
        pa.array([partition] * len(embeddings)),
        pa.array([one.parameter_version for one in embeddings]),
        pa.FixedSizeListArray.from_arrays(vectors, width),
        *(pa.array([one.predictions.get(task) for one in embeddings], pa.float32()) for task in tasks),
    ]
    return pa.Table.from_arrays(columns, schema=_schema(width, tasks))


def export_rows(settings: Settings, data_dir: Path, directory: Path) -> dict[str, int]:
    """Write the rows (hidden state and memory) in the database of a worker that is stopped; rows by file name.

    One file for each partition, `partition-N.parquet`, with the columns of `stream.store`'s export.

    Raises
    ------
    StoreError: a database is in use, or damaged. DataError: there is none.
    """
    # Imported here: numba takes seconds that a wrong directory need not wait for.
    from stream.model.layout import Layout
    from stream.restore import store_options
    from stream.store import EmbeddingStore
    from stream.wire import Schema

    places = dict(_databases(data_dir))
    if not places:
        raise DataError(f"{str(data_dir)!r} has no database of a worker: name its worker.data_dir")
    width = Layout.compile(settings, Schema.compile(settings)).width
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{str(directory)!r} cannot be written: {error.strerror}") from error
    written = {}
    for name, place in places.items():
        with EmbeddingStore.open(place, store_options(settings, width)) as store:
            written[f"{name}.parquet"] = store.snapshot().export_parquet(directory / f"{name}.parquet")
    return written


def _databases(data_dir: Path) -> Iterator[tuple[str, Path]]:
    for place in sorted(data_dir.glob("partition-*-*")):
        found = re.match(r"(partition-\d+)-", place.name)
        if found is not None and place.is_dir():
            yield found[1], place
