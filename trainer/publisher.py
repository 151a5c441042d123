"""Publishes parameter versions: one Kafka transaction for each, changed tensors and rows first, the marker last.

Guaranteed: versions rise, over restarts too; a version's records are kept and sent again, the same bytes,
until the broker confirmed their transaction, so no change is dropped and no version has two contents. The
transactional id is the group's trainer's: whoever opens a publisher fences the one before it, and a fenced
one raises `Fenced` instead of trying again.

Not guaranteed: that each state of the parameters becomes a version; what changes while a version waits for
its confirmation goes into the next one.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from confluent_kafka import KafkaError, KafkaException, Producer

from stream.errors import BrokerError, Fenced
from stream.kafka import producer_config
from stream.model.parameters import ParameterSet, Tensor, encode_tensor, tensor_checksum
from stream.model.rows import Changes, RowTable
from stream.parameter_log import MARKER_KEY, Marker, ParameterReader, encode_marker
from stream.parameter_records import Headers, TableState, encode_row, row_headers, row_key, rows_checksum
from stream.settings import Settings

__all__ = ["Publisher", "TableRows", "read_latest"]

logger = logging.getLogger(__name__)

_TRANSACTION_TIMEOUT_S = 60.0
_READ_TIMEOUT_S = 60.0


def read_latest(settings: Settings, timeout_s: float = _READ_TIMEOUT_S) -> tuple[ParameterSet, Marker] | None:
    """The last whole version in the log, and its marker; None where there is none.

    Raises
    ------
    BrokerError: the log cannot be read to its end in time.
    """
    return _read_log(settings, timeout_s)[0]


def _read_log(settings: Settings, timeout_s: float) -> tuple[tuple[ParameterSet, Marker] | None, Marker | None]:
    """The last whole version and its marker, and the last marker of all."""
    reader = ParameterReader(settings)
    reader.start()
    try:
        if not reader.wait_until_caught_up(timeout_s):
            if isinstance(reader.error, BrokerError):
                raise reader.error
            raise BrokerError(f"topic {settings.topics.parameters!r} was not read to its end in {timeout_s:g} s")
    finally:
        reader.stop()
    return reader.settle(), reader.latest


@dataclass(frozen=True)
class TableRows:
    """A table of `width` floats in a row, and those of its rows, by key, that may have changed; None: taken away."""

    width: int
    rows: Changes


@dataclass(frozen=True)
class _Version:
    """A version on its way: records in order, and what is live once it is confirmed."""

    tensors: Mapping[str, Tensor]
    rows: dict[str, dict[bytes, bytes | None]]
    marker: Marker
    records: list[tuple[bytes, bytes | None, Headers]]


class Publisher:
    """The one writer of the parameters topic.

    Opening it fences an earlier one, then reads the log: `current` is the last whole version, if there is
    one.

    Parameters
    ----------
    timeout_s: how long one attempt may wait for the broker.
    monotonic: seconds that never go back.

    Raises
    ------
    BrokerError: the broker does not answer in time.
    """

    def __init__(
        self, settings: Settings, timeout_s: float = 15.0, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._monotonic = monotonic
        self._topic = settings.topics.parameters
        self._timeout_s = timeout_s
        self._producer: Producer | None = None
        self._pending: _Version | None = None
        self._open()
        latest, last = _read_log(settings, _READ_TIMEOUT_S)
        self._marker = latest[1] if latest else None
        self.current = latest[0] if latest else None
        # A last version that is not whole still has its number.
        self.epoch = (last.epoch if last else 0) + 1
        self._last_version = last.version if last else 0

    @property
    def version(self) -> int:
        """The last version that was confirmed, 0 before the first."""
        return self.current.version if self.current is not None else 0

    def raise_floor(self, version: int) -> None:
        """No version at or below this is published, whatever the log says (it may have been emptied)."""
        self._last_version = max(self._last_version, version)

    @property
    def is_waiting(self) -> bool:
        """True while a version was sent and is not confirmed."""
        return self._pending is not None

    def publish(
        self,
        tensors: Mapping[str, Tensor],
        feedback_ms: Sequence[int],
        now_ms: int,
        tables: Mapping[str, TableRows] | None = None,
    ) -> ParameterSet:
        """Send these tensors as the next version and wait until the broker has confirmed it.

        While an earlier version waits for its confirmation, call `retry` instead.

        Parameters
        ----------
        tensors: all of the version's tensors, by name.
        feedback_ms: Kafka's times of the feedback that is new in it.
        tables: all of the version's tables, by name, with the rows that may have changed since the version before;
            the rows of a table that is left out are taken away.

        Raises
        ------
        Fenced: another trainer has taken over.
        BrokerError: not confirmed; the version waits for `retry`.
        """
        assert self._pending is None, "a version waits for its confirmation"
        self._pending = self._compose(tensors, feedback_ms, now_ms, tables or {})
        return self.retry()

    def retry(self) -> ParameterSet:
        """Send the waiting version, the same bytes; see `publish`."""
        assert self._pending is not None, "no version waits"
        version = self._pending
        try:
            self._send(version.records)
        except Fenced:
            raise
        except BrokerError:
            # The outcome may be unknown. A new producer of the same id first ends the old transaction, one
            # way or the other; then the same version follows, which readers that have it ignore.
            self._forget()
            raise
        tables = {}
        for name, state in version.marker.tables.items():
            tables[name] = self._base(name, state.width) or RowTable(state.width)
            tables[name].stage(version.rows.get(name, {}), (state.rows, state.checksum))
        self._pending = None
        self._marker = version.marker
        self.current = ParameterSet(version.tensors, version.marker.version, tables)
        self.current.settle()
        return self.current

    def close(self) -> None:
        """Forget the producer; never raises."""
        self._forget()

    def _compose(
        self, tensors: Mapping[str, Tensor], feedback_ms: Sequence[int], now_ms: int, tables: Mapping[str, TableRows]
    ) -> _Version:
        number = self._last_version + 1
        live = self._marker.tensors if self._marker is not None else {}
        entries: dict[str, tuple[int, int]] = {}
        records: list[tuple[bytes, bytes | None, Headers]] = []
        for name, tensor in tensors.items():
            if name in live and self.current is not None and _same(self.current[name], tensor):
                entries[name] = live[name]
                continue
            record = encode_tensor(name, number, tensor)
            entries[name] = (number, tensor_checksum(record))
            records.append((name.encode(), record, ()))
        records += [(name.encode(), None, ()) for name in live if name not in tensors]
        changes = {name: self._changed(name, given) for name, given in tables.items()}
        states = {name: self._state(name, given.width, changes[name], number) for name, given in tables.items()}
        for name, table in (self.current.tables if self.current is not None else {}).items():
            if name not in tables or self._base(name, tables[name].width) is None:
                gone = dict.fromkeys(key for key, _ in table.items())
                changes[name] = {**gone, **changes.get(name, {})}
        own = [(name, key, row) for name, rows in changes.items() for key, row in rows.items()]
        headers = row_headers(self.epoch, number)
        records += [(row_key(name, key), None if row is None else encode_row(row), headers) for name, key, row in own]
        marker = Marker(
            self.epoch, number, self.version, entries, tuple(feedback_ms), now_ms, states, len(own), rows_checksum(own)
        )
        records.append((MARKER_KEY, encode_marker(marker), ()))
        self._last_version = number
        return _Version(dict(tensors), changes, marker, records)

    def _base(self, name: str, width: int) -> RowTable | None:
        """The published table that rows of this width go on from."""
        table = self.current.tables.get(name) if self.current is not None else None
        return table if table is not None and table.width == width else None

    def _changed(self, name: str, given: TableRows) -> dict[bytes, bytes | None]:
        """The given rows that differ from those published."""
        table = self._base(name, given.width)
        keys = list(given.rows)
        before = table.get(keys) if table is not None else [None] * len(keys)
        return {key: given.rows[key] for key, row in zip(keys, before, strict=True) if row != given.rows[key]}

    def _state(self, name: str, width: int, changes: Changes, number: int) -> TableState:
        table = self._base(name, width)
        if table is None or self._marker is None:
            return TableState(number, width, *RowTable(width).after(changes))
        return TableState(self._marker.tables[name].since, width, *table.after(changes))

    def _open(self) -> None:
        config = producer_config(
            self._settings,
            transactional_id=f"{self._settings.kafka.group}-trainer",
            transaction_timeout_ms=int(_TRANSACTION_TIMEOUT_S * 1000),
            linger_ms=0,
            compression_type="none",
        )
        producer = Producer(config)
        try:
            producer.init_transactions(self._timeout_s)
        except KafkaException as error:
            raise self._error(error, "the transactional id was not granted") from error
        self._producer = producer

    def _send(self, records: list[tuple[bytes, bytes | None, Headers]]) -> None:
        if self._producer is None:
            self._reopen()
        producer = self._producer
        assert producer is not None
        try:
            producer.begin_transaction()
            deadline = self._monotonic() + self._timeout_s
            for key, value, headers in records:
                while True:
                    try:
                        producer.produce(self._topic, value, key, partition=0, headers=list(headers))
                        break
                    except BufferError:
                        # A version of very many rows is sent while it is written.
                        if self._monotonic() > deadline:
                            raise
                        producer.poll(0.05)
            # A record that is refused makes the commit fail.
            producer.commit_transaction(self._timeout_s)
        except (KafkaException, BufferError) as error:
            if isinstance(error, BufferError):
                raise BrokerError(f"parameters cannot be sent: {error}") from error
            raise self._error(error, "a version was not confirmed") from error

    def _reopen(self) -> None:
        """Take the transactional id again after a failure, unless a later trainer has written since."""
        latest = read_latest(self._settings, self._timeout_s)
        if latest is not None and latest[1].epoch > self.epoch:
            raise Fenced(
                f"the parameters topic {self._topic!r} has versions of epoch {latest[1].epoch}, this trainer's is "
                f"{self.epoch}: another trainer has taken over; this one must stop"
            )
        self._open()

    def _error(self, error: KafkaException, what: str) -> BrokerError:
        reason: KafkaError = error.args[0]
        if reason.code() in (
            KafkaError._FENCED,
            KafkaError.INVALID_PRODUCER_EPOCH,
            KafkaError.PRODUCER_FENCED,
        ):
            return Fenced(
                f"{what}: {reason.str()}; another trainer of group {self._settings.kafka.group!r} has taken over "
                f"(transactional id {self._settings.kafka.group}-trainer); this one must stop"
            )
        return BrokerError(f"{what}: {reason.str()}")

    def _forget(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            with contextlib.suppress(KafkaException):
                producer.abort_transaction(1.0)
            producer.purge()
            producer.flush(1.0)


def _same(old: Tensor, new: Tensor) -> bool:
    return old is new or (old.dtype == new.dtype and old.shape == new.shape and old.tobytes() == new.tobytes())
