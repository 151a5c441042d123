"""The parameters topic: versions as the trainer writes them and as readers put them together.

A version is one Kafka transaction: a record for each tensor that changed, under the tensor's name; a record for each
row of a category table that changed, under the table and the row's key; a null for each one removed; and last a
marker under `version`. Rows and their nulls carry a header that says which version they belong to.

The marker lists every tensor of the version with the version it was last written in and the checksum of that record.
Rows can be millions, so of these it gives two sums: number and hashes of the version's own row records, which pick
them from among records of aborted transactions (a broker may show them); and for each table the number of its rows
and the running sum of their hashes, which proves the whole table, however it came about. So one rule covers the live
stream, a late start on a compacted log, duplicates, gaps and aborted transactions: a version is complete exactly when
every tensor its marker lists is there with that checksum and every table has that number of rows and that sum;
anything else is never served. A reader that missed something starts over from the log.

Bounded: what waits for a marker is at most one entry for each key of the log.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from stream.errors import BrokerError, ParametersError
from stream.kafka import client_config
from stream.model.parameters import ParameterSet, Tensor, decode_tensor, tensor_checksum
from stream.model.rows import RowTable
from stream.parameter_records import (
    MARKER_KEY,
    Headers,
    Marker,
    TableState,
    Tag,
    decode_marker,
    decode_row,
    encode_marker,
    is_row,
    rows_checksum,
)
from stream.settings import Settings

__all__ = ["MARKER_KEY", "Marker", "ParameterReader", "VersionAssembler", "decode_marker", "encode_marker"]

logger = logging.getLogger(__name__)

#: Writings of one tensor kept at once: a broker that shows aborted transactions can put a few between two versions.
_CANDIDATES = 4
#: Seconds between starting over where that did not help, at first and at most.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A row that no marker has closed yet."""

    tag: Tag
    row: bytes | None


#: By table and key, rows to write; None takes one away.
_TableChanges = dict[str, dict[bytes, bytes | None]]


class VersionAssembler:
    """Turns records of the parameters topic, in order, into whole versions.

    `torn` counts markers that were not whole when they came; `latest` is the last marker of all, whole or not.
    """

    def __init__(self) -> None:
        self._written: dict[str, deque[tuple[int, int, Tensor]]] = {}
        self._rows: dict[str, dict[bytes, _Waiting]] = {}
        self._tags: dict[Tag, Tag] = {}
        self.current: ParameterSet | None = None
        self.marker: Marker | None = None
        self.latest: Marker | None = None
        self.torn = 0

    @property
    def is_behind(self) -> bool:
        """True where the last marker was not whole: something of the log was missed, or is not there."""
        return self.latest is not None and (self.marker is None or self.marker.version < self.latest.version)

    @property
    def waiting(self) -> int:
        """Rows that wait for a marker."""
        return sum(map(len, self._rows.values()))

    def feed(self, key: bytes | None, value: bytes | None, headers: Headers = ()) -> ParameterSet | None:
        """Take one record; returns the version it completes, if it completes a later one.

        Raises
        ------
        ParametersError: the record is neither tensor, row nor marker; the assembler is unchanged.
        """
        if key == MARKER_KEY and value is not None:
            return self._close(decode_marker(value))
        if key is not None and is_row(key):
            self._take_row(*decode_row(key, value, headers))
        elif value is not None:
            name, version, tensor = decode_tensor(value)
            kept = self._written.setdefault(name, deque(maxlen=_CANDIDATES))
            kept.append((version, tensor_checksum(value), tensor))
        return None

    def adopt(self, parameters: ParameterSet) -> None:
        """Go on with these tables, which have the same rows as those of `current`."""
        self.current = parameters

    def _take_row(self, table: str, key: bytes, row: bytes | None, tag: Tag) -> None:
        if self.marker is not None and tag[1] <= self.marker.version:
            return
        rows = self._rows.setdefault(table, {})
        before = rows.get(key)
        if before is None or before.tag <= tag:
            # Millions of rows share few tags.
            rows[key] = _Waiting(self._tags.setdefault(tag, tag), row)

    def _close(self, marker: Marker) -> ParameterSet | None:
        if self.latest is None or marker.version > self.latest.version:
            self.latest = marker
        if self.marker is not None and marker.version <= self.marker.version:
            return None
        tensors, changes = self._tensors_of(marker), self._changes_of(marker)
        if tensors is None or changes is None:
            self.torn += 1
            return None
        tables: dict[str, RowTable] = {}
        for name, state in marker.tables.items():
            table = self._base(name, state) or RowTable(state.width)
            table.stage(changes.get(name, {}), (state.rows, state.checksum))
            tables[name] = table
        self.marker = marker
        self.current = ParameterSet(tensors, marker.version, tables)
        for name in set(self._written) - set(tensors):
            del self._written[name]
        self._rows = {
            name: left
            for name, rows in self._rows.items()
            if (left := {key: one for key, one in rows.items() if one.tag > marker.tag})
        }
        self._tags.clear()
        return self.current

    def _tensors_of(self, marker: Marker) -> dict[str, Tensor] | None:
        tensors: dict[str, Tensor] = {}
        for name, (version, checksum) in marker.tensors.items():
            for written, summed, tensor in self._written.get(name, ()):
                if written == version and summed == checksum:
                    tensors[name] = tensor
        missing = sorted(set(marker.tensors) - set(tensors))
        if missing:
            logger.warning("version %d is not complete, waiting for a later one: %s", marker.version, missing)
            return None
        return tensors

    def _changes_of(self, marker: Marker) -> _TableChanges | None:
        """Rows that lead from the tables here to the marker's, if there are such."""
        if marker.previous == (0 if self.marker is None else self.marker.version):
            own = self._waiting_rows(lambda tag: tag == marker.tag)
            records = [(table, key, row) for table, rows in own.items() for key, row in rows.items()]
            whole = len(records) == marker.records and rows_checksum(records) == marker.checksum
            if whole and self._proves(marker, own):
                return own
        # Of several versions, as a compacted log has them.
        since = {name: state.since for name, state in marker.tables.items()}
        several = {
            name: {
                key: one.row
                for key, one in self._rows.get(name, {}).items()
                if one.tag <= marker.tag and one.tag[1] >= since[name]
            }
            for name in since
        }
        if self._proves(marker, several):
            return several
        logger.warning("version %d is not complete, waiting for a later one: rows are missing", marker.version)
        return None

    def _waiting_rows(self, chosen: Callable[[Tag], bool]) -> _TableChanges:
        return {
            name: {key: one.row for key, one in rows.items() if chosen(one.tag)} for name, rows in self._rows.items()
        }

    def _base(self, name: str, state: TableState) -> RowTable | None:
        """The table that a marker's goes on from; None where it begins from nothing."""
        if self.marker is None or self.current is None or name not in self.marker.tables:
            return None
        before = self.marker.tables[name]
        return self.current.tables[name] if (before.since, before.width) == (state.since, state.width) else None

    def _proves(self, marker: Marker, changes: _TableChanges) -> bool:
        for name, state in marker.tables.items():
            table = self._base(name, state) or RowTable(state.width)
            rows = changes.get(name, {})
            if not table.accepts(rows) or table.after(rows) != (state.rows, state.checksum):
                return False
        return True


class ParameterReader(threading.Thread):
    """Follows the parameters topic on a thread of its own and stages the latest whole version.

    `staged` is replaced in one assignment, so a reader of it never sees half a version.

    Parameters
    ----------
    on_version: called on this thread with each version and its marker, after it is staged.
    monotonic: seconds that never go back.
    """

    def __init__(
        self,
        settings: Settings,
        on_version: Callable[[ParameterSet, Marker], None] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name="parameters", daemon=True)
        self._settings = settings
        self._on_version = on_version
        self._stopping = threading.Event()
        self._caught_up = threading.Event()
        self._assembler = VersionAssembler()
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._torn_before = 0
        self._latest: Marker | None = None
        self._pause_s = _FIRST_PAUSE_S
        self._start_over_at = 0.0
        self.staged: tuple[ParameterSet, Marker] | None = None
        self.error: BaseException | None = None

    @property
    def torn(self) -> int:
        """Versions that were not complete when their marker came."""
        return self._torn_before + self._assembler.torn

    @property
    def latest(self) -> Marker | None:
        """The last marker in the topic, whether its version is whole or not."""
        return self._latest

    def settle(self, serving: str | None = None) -> tuple[ParameterSet, Marker] | None:
        """The staged version, its rows served from now on. To be called where nothing is predicted meanwhile.

        Parameters
        ----------
        serving: trunk of the version that was settled before; where this one's is another, it has tables of its own,
            and those of the version before stay as they are.
        """
        with self._lock:
            if self.staged is None:
                return None
            parameters, marker = self.staged
            if serving is not None and parameters.trunk_id != serving:
                own = parameters.forked()
                if self._assembler.current is parameters:
                    self._assembler.adopt(own)
                self.staged = own, marker
                parameters = own
            parameters.settle()
            return parameters, marker

    @property
    def has_caught_up(self) -> bool:
        """Whether everything that was in the topic at the start has been read."""
        return self._caught_up.is_set()

    def wait_until_caught_up(self, timeout_s: float) -> bool:
        """True once everything that was in the topic at the start has been read."""
        return self._caught_up.wait(timeout_s)

    def stop(self) -> None:
        """Stop the thread and wait for it."""
        self._stopping.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        """Read until stopped; an unexpected error is kept in `error`."""
        try:
            self._follow()
        except BaseException as error:
            self.error = error
            logger.exception("reading parameters failed")

    def _follow(self) -> None:
        topic = self._settings.topics.parameters
        consumer = Consumer(
            client_config(
                self._settings,
                group_id=f"{self._settings.kafka.group}-parameters",
                enable_auto_commit=False,
                isolation_level="read_committed",
                auto_offset_reset="earliest",
                enable_partition_eof=True,
                fetch_wait_max_ms=20,
                fetch_message_max_bytes=64 * 1024 * 1024,
            )
        )
        try:
            consumer.assign([TopicPartition(topic, 0, 0)])
            at_end = False
            while not self._stopping.is_set():
                # To wait for 500 would keep a version of fewer records waiting.
                first = consumer.poll(0.05)
                for message in [] if first is None else [first, *consumer.consume(500, timeout=0.0)]:
                    error = message.error()
                    at_end = at_end and error is not None
                    if error is None:
                        self._take(message.key(), message.value(), message.headers() or ())
                    elif error.code() == KafkaError._PARTITION_EOF:
                        self._caught_up.set()
                        at_end = True
                    elif error.fatal():
                        raise BrokerError(f"topic {topic!r} cannot be read: {error.str()}")
                    else:
                        logger.warning("topic %s: %s", topic, error.str())
                if at_end and self._starts_over():
                    at_end = False
                    consumer.assign([TopicPartition(topic, 0, 0)])
        except KafkaException as error:
            raise BrokerError(f"topic {topic!r} cannot be read: {error.args[0].str()}") from error
        finally:
            consumer.close()

    def _starts_over(self) -> bool:
        """At the end of the log, where the last version is not whole: read it again from the start, less and less
        often while that does not help."""
        if not self._assembler.is_behind:
            self._pause_s = _FIRST_PAUSE_S
            return False
        now = self._monotonic()
        if now < self._start_over_at:
            return False
        logger.warning("topic %s is read again from its start", self._settings.topics.parameters)
        self._start_over_at = now + self._pause_s
        self._pause_s = min(2.0 * self._pause_s, _LONGEST_PAUSE_S)
        self._torn_before += self._assembler.torn
        self._assembler = VersionAssembler()
        return True

    def _take(self, key: bytes | None, value: bytes | None, headers: Headers) -> None:
        with self._lock:
            try:
                complete = self._assembler.feed(key, value, headers)
            except ParametersError as error:
                logger.warning("topic %s: %s", self._settings.topics.parameters, error)
                return
            marker, latest = self._assembler.marker, self._assembler.latest
            if latest is not None and (self._latest is None or self._latest.version < latest.version):
                self._latest = latest
            if complete is None or marker is None:
                return
            if self.staged is not None and marker.version <= self.staged[1].version:
                # Seen before, on the way to where starting over has to lead.
                return
            self.staged = complete, marker
        if self._on_version is not None:
            self._on_version(complete, marker)
