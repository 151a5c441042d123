"""A backup of what workers restore from, and its way back into an empty system.

A backup holds the changelog (every client's row, and for each partition the position in the events up to which rows
were advanced), the embeddings, and the parameters, each as compaction would leave it. A directory is a whole backup
when it has `manifest.json`, which is written last.

Guarantees: rows, embeddings and parameters come back bit for bit; every file is verified before anything is written;
a backup goes into empty topics alone. Where the events topic is the same, a worker goes on at the backup's positions,
and an event that a row has seen is never applied to it again. `same` is not believed but proved: the record just
before each position has to be the one that was there.
Not in it: events, feedback and dead letters, and the trainer's data directory, whose backup is a copy of the
directory. With another events topic the rows come back without offsets: every event that the topic has is a new one.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import msgpack
import msgspec
from confluent_kafka import Consumer, KafkaException, Message, Producer, TopicPartition

from stream.changelog import META_KEY, ChangelogWriter, PartitionMeta
from stream.compacted import CompactedPartition, Record
from stream.errors import BrokerError, DataError
from stream.kafka import client_config, log_ends, producer_config
from stream.parameter_log import MARKER_KEY, decode_marker
from stream.settings import Settings

__all__ = ["Events", "restore_backup", "write_backup"]

Events = Literal["same", "new"]
Passed = Callable[[float, str], None]

_FORMAT = 1
_MANIFEST = "manifest.json"
_CHUNK_RECORDS = 1_000
_TIMEOUT_S = 60.0
_TRANSACTION_ROWS = 100_000
_LONGEST_TRANSACTION_MS = 900_000
#: Layout of rows of which more are to come.
_UNFINISHED = "of an import that did not end"


def write_backup(settings: Settings, directory: Path, passed: Passed = lambda share, text: None) -> dict[str, Any]:
    """Write a backup of a system, which may run; returns its manifest.

    Raises
    ------
    DataError: the directory holds a backup already or cannot be written; or workers rebuild under another trunk.
    BrokerError: a topic cannot be read.
    """
    if (directory / _MANIFEST).exists():
        raise DataError(f"{str(directory)!r} holds a backup already: name another directory")
    n = settings.topics.partitions
    files: dict[str, dict[str, int]] = {}
    partitions = []
    version: int | None = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Rows first: embeddings read later are then at least as new, and those of events applied again come again.
        for role, number in [
            *(("changelog", p) for p in range(n)),
            *(("embeddings", p) for p in range(n)),
            ("parameters", 0),
        ]:
            topic = getattr(settings.topics, role)
            name = f"{role}-{number}"
            done = len(files) / (2 * n + 1)
            with CompactedPartition(
                settings, topic, number, directory, tombstones=role == "parameters",
                passed=_part(passed, done, 1 / (2 * n + 1), f"{name}: reading"),
            ) as found:  # fmt: skip
                records = found.records()
                if role == "parameters":
                    marker = found.get(MARKER_KEY)
                    version = None if marker is None else decode_marker(marker).version
                if role == "changelog":
                    partitions.append(_partition(settings, number, found.get(META_KEY)))
                    records = (one for one in records if one[0] != META_KEY)
                files[name] = _write(directory / name, records)
        manifest = {
            "format": _FORMAT,
            "created_ms": int(time.time() * 1000),
            "partitions": partitions,
            "parameter_version": version,
            "files": files,
        }
        trunks = {one["trunk"] for one in partitions if one["trunk"] is not None}
        if len(trunks) > 1:
            raise DataError(
                f"partitions have rows of trunks {', '.join(sorted(trunks))}: wait until the rebuild is done"
            )
        beside = directory / f"{_MANIFEST}.part"
        beside.write_text(json.dumps(manifest))
        _sync(beside)
        beside.replace(directory / _MANIFEST)
    except OSError as error:
        raise DataError(f"{str(directory)!r} cannot be written: {error.strerror or error}") from error
    return manifest


def _part(passed: Passed, done: float, share: float, text: str) -> Callable[[float], None]:
    return lambda within: passed(done + share * within, text)


def restore_backup(
    settings: Settings, directory: Path, events: Events, layout: str, passed: Passed = lambda share, text: None
) -> dict[str, Any]:
    """Write a backup into the empty topics of a system that does not run; returns its manifest.

    Parameters
    ----------
    events: `same`, the events topic is the one that the rows were made of; `new`, its events are in no row.
    layout: fingerprint of the settings' rows.

    Raises
    ------
    DataError: the backup is damaged, or of other settings; a topic is not empty; the events are not the same.
    BrokerError: the broker refuses; what is written then is no whole backup, and topics have to be made anew.
    """
    manifest = _manifest(directory)
    _check(settings, manifest, events, layout)
    with ExitStack() as opened:
        contents = {name: _Contents(opened, directory / name, size) for name, size in manifest["files"].items()}
        for at, one in enumerate(contents.values()):
            passed(0.3 * at / len(contents), f"{one.path.name}: verifying")
            one.verify()
        _restore_parameters(settings, contents["parameters-0"])
        for number, partition in enumerate(manifest["partitions"]):
            passed(0.3 + 0.7 * number / len(manifest["partitions"]), f"partition {number}: writing")
            _restore_embeddings(settings, number, contents[f"embeddings-{number}"], events)
            _restore_rows(settings, number, partition, contents[f"changelog-{number}"], events)
    return manifest


# ---------------------------------------------------------------- files


def _write(path: Path, records: Iterator[Record]) -> dict[str, int]:
    """A file of chunks, each after its length and checksum; what the manifest says of it."""
    count = 0
    with path.open("wb") as file:
        while chunk := list(islice(records, _CHUNK_RECORDS)):
            packed = msgpack.packb(chunk)
            file.write(len(packed).to_bytes(8, "little") + zlib.crc32(packed).to_bytes(4, "little") + packed)
            count += len(chunk)
    _sync(path)
    return {"records": count, "bytes": path.stat().st_size}


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


class _Contents:
    """The records of one file."""

    def __init__(self, opened: ExitStack, path: Path, size: dict[str, int]) -> None:
        self.path = path
        self._size = size
        try:
            self._file = opened.enter_context(path.open("rb"))
        except OSError as error:
            raise _damaged(path, error.strerror or str(error)) from error

    def records(self) -> Iterator[Record]:
        """In chunks from the disk; raises DataError where they are not as written."""
        self._file.seek(0)
        count = 0
        while header := self._file.read(12):
            packed = self._file.read(int.from_bytes(header[:8], "little"))
            if len(header) < 12 or zlib.crc32(packed) != int.from_bytes(header[8:], "little"):
                raise _damaged(self.path, f"the chunk after record {count:,} fails its checksum")
            for key, value, headers in msgpack.unpackb(packed):
                count += 1
                yield key, value, [(name, content) for name, content in headers]
        if count != self._size["records"]:
            raise _damaged(self.path, f"{count:,} records where the manifest says {self._size['records']:,}")

    def verify(self) -> None:
        """Read it all once."""
        for _ in self.records():
            pass


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"backup {str(path)!r}: {what}; use another backup")


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / _MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        if manifest["format"] != _FORMAT:
            raise DataError(f"{str(path)!r} has format {manifest['format']}, this version reads {_FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{str(directory)!r} is no whole backup: {error}") from error
    return manifest


# ---------------------------------------------------------------- what is in a backup


def _partition(settings: Settings, number: int, record: bytes | None) -> dict[str, Any]:
    """What the manifest says of a partition: how far its events were applied, and the proof of it."""
    if record is None:
        return {"position": None, "watermark_ms": None, "trunk": None, "layout": None, "before": None}
    meta = PartitionMeta.decode(record)
    before = _record_before(settings, number, meta.position)
    return {
        "position": meta.position,
        "watermark_ms": meta.watermark_ms,
        "trunk": meta.trunk,
        "layout": meta.layout,
        "before": None if before is None else list(_identity(before)),
    }


def _record_before(settings: Settings, number: int, position: int) -> Message | None:
    """The last record of a partition's events before a position; None where there is none."""
    topic = settings.topics.events
    low, high = log_ends(settings, topic, number)
    # Marks of transactions take offsets, too, and are seen by nobody.
    start = max(low, position - 20)
    if start >= position or high < position:
        return None
    config = client_config(settings, group_id=f"{settings.kafka.group}-backup", enable_partition_eof=True)
    consumer = Consumer({**config, "enable.auto.commit": False, "fetch.wait.max.ms": 20})
    try:
        consumer.assign([TopicPartition(topic, number, start)])
        last: Message | None = None
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline:
            message = consumer.poll(0.2)
            if message is None:
                continue
            if message.error() is not None or (message.offset() or 0) >= position:
                return last
            last = message
        raise BrokerError(f"topic {topic!r} was not read within {_TIMEOUT_S:g} s")
    except KafkaException as error:
        raise BrokerError(f"topic {topic!r} cannot be read: {error.args[0].str()}") from error
    finally:
        consumer.close()


def _identity(message: Message) -> tuple[int, int, int]:
    """Offset, Kafka timestamp and checksum of a record."""
    content = (message.key() or b"") + b"\0" + (message.value() or b"")
    return int(message.offset() or 0), int(message.timestamp()[1]), zlib.crc32(content)


# ---------------------------------------------------------------- into a system


def _check(settings: Settings, manifest: dict[str, Any], events: Events, layout: str) -> None:
    partitions, topics = manifest["partitions"], settings.topics
    if len(partitions) != topics.partitions:
        raise DataError(
            f"the backup has {len(partitions)} partitions, topics.partitions is {topics.partitions}: rows belong to "
            f"their partition; make topics of {len(partitions)}"
        )
    layouts = {one["layout"] for one in partitions if one["layout"] is not None}
    if layouts - {layout}:
        raise DataError(
            f"the backup has rows of layout {', '.join(sorted(layouts))}, the settings of model and memory describe "
            f"{layout}: go back to those that it was made with"
        )
    kept = sorted(Path(settings.worker.data_dir).glob("partition-*"))
    if kept:
        raise DataError(f"worker.data_dir has rows of an earlier system, {str(kept[0])!r}: empty every worker's")
    for topic, n in (
        (topics.changelog, topics.partitions),
        (topics.embeddings, topics.partitions),
        (topics.parameters, 1),
    ):
        for number in range(n):
            low, high = log_ends(settings, topic, number)
            if high > low:
                raise DataError(f"topic {topic!r} is not empty: a backup goes into new topics alone")
    if events == "new":
        return
    for number, one in enumerate(partitions):
        if one["position"] is None:
            continue
        low, _ = log_ends(settings, topics.events, number)
        if low > one["position"]:
            raise DataError(
                f"topic {topics.events!r} begins at offset {low} of partition {number}, the backup ends at "
                f"{one['position']}: events between are gone; if they may be missing, say --events new"
            )
        found = _record_before(settings, number, one["position"])
        if one["before"] is not None and (found is None or list(_identity(found)) != one["before"]):
            raise DataError(
                f"topic {topics.events!r} is not the one of the backup: partition {number} has another record before "
                f"offset {one['position']}, or none any more; if all its events came after the backup, say --events new"
            )


def _restore_parameters(settings: Settings, contents: _Contents) -> None:
    """In one transaction, the marker last; a trainer that runs is fenced by it."""
    producer = Producer(
        producer_config(
            settings, transactional_id=f"{settings.kafka.group}-trainer", transaction_timeout_ms=_LONGEST_TRANSACTION_MS
        )
    )
    topic = settings.topics.parameters
    marker: Record | None = None
    try:
        producer.init_transactions(_TIMEOUT_S)
        producer.begin_transaction()
        for record in contents.records():
            if record[0] == MARKER_KEY:
                marker = record
            else:
                _produce(producer, topic, 0, record)
        if marker is not None:
            _produce(producer, topic, 0, marker)
        producer.commit_transaction(_TIMEOUT_S)
    except KafkaException as error:
        raise BrokerError(f"topic {topic!r} cannot be written: {error.args[0].str()}") from error


def _restore_embeddings(settings: Settings, number: int, contents: _Contents, events: Events) -> None:
    producer = Producer(producer_config(settings))
    topic = settings.topics.embeddings
    for key, value, headers in contents.records():
        # Readers drop what has no larger offset than what they have; in another topic offsets begin anew.
        kept = value if value is None or events == "same" else _without_offset(value)
        _produce(producer, topic, number, (key, kept, headers))
    if producer.flush(_TIMEOUT_S):
        raise BrokerError(f"topic {topic!r}: records were not confirmed within {_TIMEOUT_S:g} s")


def _without_offset(value: bytes) -> bytes:
    if value[:1] == b"{":
        return msgspec.json.encode(msgspec.json.decode(value) | {"offset": -1})
    return msgspec.msgpack.encode(msgspec.msgpack.decode(value) | {"offset": -1})


def _restore_rows(
    settings: Settings, number: int, partition: dict[str, Any], contents: _Contents, events: Events
) -> None:
    """Rows and position in one transaction, as a worker's checkpoint."""
    # Imported here: numba takes seconds that a wrong backup need not wait for.
    from stream.store.rows import without_offsets

    if partition["position"] is None:
        return
    position = int(partition["position"]) if events == "same" else log_ends(settings, settings.topics.events, number)[0]
    meta = PartitionMeta(position, int(partition["watermark_ms"]), str(partition["trunk"]), str(partition["layout"]))
    writer = ChangelogWriter(settings, number)
    writer.begin()
    try:
        records, written = contents.records(), 0
        while chunk := [(key, value) for key, value, _ in islice(records, _CHUNK_RECORDS) if value is not None]:
            if written >= _TRANSACTION_ROWS:
                # A transaction must not stay open for long; a worker refuses what is not of its layout.
                writer.commit(replace(meta, layout=_UNFINISHED), _TIMEOUT_S)
                writer.begin()
                written = 0
            keys, rows = [key for key, _ in chunk], [row for _, row in chunk]
            writer.write(keys, rows if events == "same" else without_offsets(rows))
            written += len(rows)
        writer.commit(meta, _TIMEOUT_S)
    except BaseException:
        writer.abort()
        raise


def _produce(producer: Producer, topic: str, partition: int, record: Record) -> None:
    key, value, headers = record
    while True:
        try:
            producer.produce(topic, value, key, partition, headers=list(headers))
            producer.poll(0)
            return
        except BufferError:
            producer.poll(0.05)
        except KafkaException as error:
            raise BrokerError(f"topic {topic!r} cannot be written: {error.args[0].str()}") from error
