"""Versions are served whole or not at all."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.errors import ParametersError
from stream.model.parameters import ParameterSet, encode_tensor, tensor_checksum
from stream.model.rows import row_hash
from stream.parameter_log import MARKER_KEY, Marker, VersionAssembler, encode_marker
from stream.parameter_records import Headers, TableState, encode_row, row_headers, row_key, rows_checksum
from stream.store import PackedKeys

Record = tuple[bytes, bytes | None]


class Log:
    """Writes versions of a few small tensors, as a trainer would."""

    def __init__(self) -> None:
        self.listed: dict[str, tuple[int, int]] = {}
        self.tensors: dict[str, np.ndarray] = {}
        self.version = 0

    def write(self, **changed: float) -> list[Record]:
        self.version += 1
        records: list[Record] = []
        for name, value in changed.items():
            tensor = np.array([value])
            record = encode_tensor(name, self.version, tensor)
            self.listed[name] = (self.version, tensor_checksum(record))
            self.tensors[name] = tensor
            records.append((name.encode(), record))
        return [*records, (MARKER_KEY, self.marker())]

    def remove(self, name: str) -> list[Record]:
        self.version += 1
        del self.listed[name], self.tensors[name]
        return [(name.encode(), None), (MARKER_KEY, self.marker())]

    def marker(self) -> bytes:
        return encode_marker(Marker(1, self.version, self.version - 1, dict(self.listed), (), 0))


def _is(parameters: ParameterSet | None, tensors: dict[str, np.ndarray]) -> bool:
    return parameters is not None and {n: t.tobytes() for n, t in parameters.items()} == {
        n: t.tobytes() for n, t in tensors.items()
    }


def _compacted(records: list[Record]) -> list[Record]:
    last = {key: i for i, (key, _) in enumerate(records)}
    return [record for i, record in enumerate(records) if last[record[0]] == i]


versions = st.lists(
    st.dictionaries(st.sampled_from("abcde"), st.floats(allow_nan=False, width=32), min_size=1), min_size=1, max_size=8
)


@given(versions)
def test_a_live_reader_sees_every_version_and_a_late_one_the_last(changes: list[dict[str, float]]) -> None:
    # Given a log of versions
    log, live, records = Log(), VersionAssembler(), []
    for change in changes:
        written = log.write(**change)
        records += written
        # When a live reader follows it, then each version is whole when its marker comes, and not before
        for key, value in written[:-1]:
            assert live.feed(key, value) is None
        assert _is(live.feed(*written[-1]), log.tensors)
    # And a reader that starts late on the compacted log ends with the same tensors
    late = VersionAssembler()
    for key, value in _compacted(records):
        late.feed(key, value)
    assert _is(late.current, log.tensors)
    assert late.torn == 0


@given(versions, st.data())
def test_missing_records_are_never_served_and_duplicates_change_nothing(
    changes: list[dict[str, float]], data: st.DataObject
) -> None:
    # Given a log from which a record of the last version was lost, and in which others are doubled
    log, records = Log(), []
    for change in changes:
        records += log.write(**change)
    lost = data.draw(st.integers(len(records) - 1 - len(changes[-1]), len(records) - 2))
    reader, served = VersionAssembler(), []
    for i, record in enumerate(records):
        for _ in range(data.draw(st.integers(1, 2))):
            if i != lost and (complete := reader.feed(*record)) is not None:
                served.append(complete.version)
    # Then every version but the torn one is served, once
    assert served == list(range(1, len(changes)))
    assert reader.torn > 0
    # And the next whole version heals it
    for record in log.write(**dict.fromkeys("abcde", 1.0)):
        reader.feed(*record)
    assert _is(reader.current, log.tensors)


def test_records_of_an_aborted_transaction_are_not_served() -> None:
    # Given a version, then records of one that was aborted (a broker may show them), then a later version
    log, reader = Log(), VersionAssembler()
    for record in log.write(a=1.0, b=2.0):
        reader.feed(*record)
    reader.feed(b"a", encode_tensor("a", 2, np.array([99.0])))
    # When the next version changes something else
    for record in log.write(b=3.0):
        reader.feed(*record)
    # Then the aborted record has no part in it
    assert _is(reader.current, {"a": np.array([1.0]), "b": np.array([3.0])})


def test_a_removed_tensor_is_gone() -> None:
    log, reader = Log(), VersionAssembler()
    for record in log.write(a=1.0, b=2.0) + log.remove("a"):
        reader.feed(*record)
    assert _is(reader.current, {"b": np.array([2.0])})


@given(st.binary(max_size=200))
def test_foreign_bytes_are_refused(noise: bytes) -> None:
    headers = row_headers(1, 1)
    for key, value, given_headers in (
        (b"a", noise, headers),
        (MARKER_KEY, noise, headers),
        (row_key("t", b"=a"), noise, headers),
        (row_key("t", b"=a"), encode_row(b"1234"), [("version", noise)]),
        (row_key("t", b"=a"), None, []),
    ):
        with pytest.raises(ParametersError):
            VersionAssembler().feed(key, value, given_headers)


def test_a_marker_of_a_later_format_is_refused_by_name() -> None:
    later = msgpack.packb({**msgpack.unpackb(Log().marker()), "format": 3})
    with pytest.raises(ParametersError, match="format 3"):
        VersionAssembler().feed(MARKER_KEY, later)


def test_a_marker_without_tables_is_read_as_one_of_the_first_format() -> None:
    log, reader = Log(), VersionAssembler()
    tensor, (key, marker) = log.write(a=1.0)
    reader.feed(*tensor)
    first = {
        name: value
        for name, value in msgpack.unpackb(marker or b"").items()
        if name not in ("format", "tables", "records", "checksum")
    }
    reader.feed(key, msgpack.packb(first))
    assert _is(reader.current, log.tensors)


# ---------------------------------------------------------------- rows

TABLES = {"task.merchant": 1, "task.city": 2}
KEYS = [b"*", b"=", b"=a", b"=b/c", b"=\xff"]
Row = tuple[str, bytes, bytes | None]
Stamped = tuple[bytes, bytes | None, Headers]


class Trainer:
    """Writes versions with rows: what a publisher's transactions put into the log."""

    def __init__(self) -> None:
        self.epoch = 1
        self.version = 0
        self.tables: dict[str, dict[bytes, bytes]] = {name: {} for name in TABLES}
        self.since = dict.fromkeys(TABLES, 1)
        self.tensor = 0.0
        self.tensor_entry = (0, 0)
        #: What each version is.
        self.history: dict[int, Contents] = {}

    def write(self, changes: Sequence[Row], *, from_nothing: str | None = None) -> list[Stamped]:
        """One version; `from_nothing` names a table that is written anew, as after a log that cannot be read."""
        before, self.version = self.version, self.version + 1
        headers = row_headers(self.epoch, self.version)
        if from_nothing is not None:
            self.since[from_nothing] = self.version
            self.tables[from_nothing] = {}
        latest: dict[tuple[str, bytes], bytes | None] = {(table, key): row for table, key, row in changes}
        own: list[Row] = []
        for (table, key), row in latest.items():
            rows = self.tables[table]
            if row is None and key not in rows:
                continue
            if row is None:
                del rows[key]
            else:
                rows[key] = row
            own.append((table, key, row))
        records: list[Stamped] = []
        self.tensor += 1.0
        tensor = encode_tensor("head", self.version, np.array([self.tensor]))
        self.tensor_entry = (self.version, tensor_checksum(tensor))
        records.append((b"head", tensor, ()))
        records += [(row_key(t, k), None if row is None else encode_row(row), headers) for t, k, row in own]
        states = {
            name: TableState(self.since[name], TABLES[name], len(rows), _sum_of(rows))
            for name, rows in self.tables.items()
        }
        marker = Marker(
            self.epoch, self.version, before, {"head": self.tensor_entry}, (), 0, states, len(own), rows_checksum(own)
        )
        records.append((MARKER_KEY, encode_marker(marker), ()))
        self.history[self.version] = self.contents()
        return records

    def aborted(self, changes: Sequence[Row], length: int) -> list[Stamped]:
        """The first records of a version that is never closed; the trainer dies of it and another one follows."""
        attempt = copy.deepcopy(self)
        records = attempt.write(changes)[:-1][:length]
        self.epoch += 1
        return records

    def contents(self) -> Contents:
        return self.tensor, {name: dict(rows) for name, rows in self.tables.items()}


Contents = tuple[float, dict[str, dict[bytes, bytes]]]


def _sum_of(rows: dict[bytes, bytes]) -> int:
    return sum(row_hash(key, row) for key, row in rows.items()) % 2**64


def _contents(parameters: ParameterSet | None) -> Contents:
    assert parameters is not None
    return float(parameters["head"][0]), {name: dict(table.items()) for name, table in parameters.tables.items()}


def _served(parameters: ParameterSet) -> dict[str, dict[bytes, bytes]]:
    """What a worker that has settled the version finds under every key."""
    parameters.settle()
    found: dict[str, dict[bytes, bytes]] = {}
    for name, table in parameters.tables.items():
        vectors, there = table.gather(PackedKeys.from_list(KEYS))
        found[name] = {key: vectors[i].tobytes() for i, key in enumerate(KEYS) if there[i]}
    return found


def _row(draw: st.DrawFn) -> Row:
    table = draw(st.sampled_from(sorted(TABLES)))
    numbers = st.lists(st.floats(width=32), min_size=TABLES[table], max_size=TABLES[table])
    row = draw(st.none() | numbers.map(lambda found: np.array(found, np.float32).tobytes()))
    return table, draw(st.sampled_from(KEYS)), row


@st.composite
def row_changes(draw: st.DrawFn) -> list[Row]:
    return [_row(draw) for _ in range(draw(st.integers(0, 6)))]


@st.composite
def histories(draw: st.DrawFn, aborts: bool = True) -> tuple[Trainer, list[Stamped]]:
    """A trainer, and the log of what it did; with aborted transactions as the embedded broker shows them."""
    trainer = Trainer()
    log: list[Stamped] = []
    for _ in range(draw(st.integers(1, 7))):
        if aborts and draw(st.booleans()):
            log += trainer.aborted(draw(row_changes()), draw(st.integers(0, 8)))
        anew = draw(st.sampled_from([None, None, None, *sorted(TABLES)]))
        log += trainer.write(draw(row_changes()), from_nothing=anew)
    return trainer, log


def _feed(reader: VersionAssembler, log: Sequence[Stamped], trainer: Trainer) -> list[int]:
    """Read a log; whatever is served on the way is what the trainer had at that version. Returns the versions."""
    served = []
    for key, value, headers in log:
        complete = reader.feed(key, value, headers)
        if complete is not None:
            assert _contents(complete) == trainer.history[complete.version]
            assert _served(complete) == trainer.history[complete.version][1]
            served.append(complete.version)
    return served


def _cleaned(log: list[Stamped], upto: int) -> list[Stamped]:
    """The log with its first records compacted, as Kafka's cleaner leaves it at some moment."""
    last = {key: i for i, (key, _, _) in enumerate(log[:upto])}
    return [record for i, record in enumerate(log) if i >= upto or last[record[0]] == i]


@settings(deadline=None, max_examples=60)
@given(histories(), st.data())
def test_a_worker_that_follows_serves_every_version_as_the_trainer_had_it(
    history: tuple[Trainer, list[Stamped]], data: st.DataObject
) -> None:
    # Given a log with records of aborted transactions among versions, and some records twice
    trainer, log = history
    doubled = [record for record in log for _ in range(data.draw(st.integers(1, 2)))]
    # Then a worker that reads it serves each version once, bit for bit
    reader = VersionAssembler()
    assert _feed(reader, doubled, trainer) == sorted(trainer.history)
    assert reader.torn == 0
    # And holds nothing that no marker can close any more
    assert reader.waiting == 0


@settings(deadline=None, max_examples=60)
@given(histories(aborts=False), st.data())
def test_a_worker_that_starts_late_on_a_compacted_log_ends_as_the_trainer(
    history: tuple[Trainer, list[Stamped]], data: st.DataObject
) -> None:
    trainer, log = history
    # Given a log that is compacted up to anywhere, within a version perhaps
    compacted = _cleaned(log, data.draw(st.integers(0, len(log))))
    # When a worker starts on it, and reads some of it twice
    reader = VersionAssembler()
    again = data.draw(st.integers(0, len(compacted)))
    _feed(reader, compacted[:again] + compacted, trainer)
    # Then it ends with the trainer's tables
    assert _contents(reader.current) == trainer.contents()
    assert not reader.is_behind
    # And goes on with what the trainer writes next
    assert _feed(reader, trainer.write([("task.city", b"=a", bytes(8))]), trainer) == [trainer.version]


@settings(deadline=None, max_examples=60)
@given(histories(), st.data())
def test_what_is_missing_is_never_served_and_reading_again_heals_it(
    history: tuple[Trainer, list[Stamped]], data: st.DataObject
) -> None:
    trainer, log = history
    # Given a worker that missed records of any kind
    lost = data.draw(st.sets(st.integers(0, len(log) - 1), min_size=1, max_size=4))
    reader = VersionAssembler()
    # Then whatever it serves is a version as the trainer had it
    _feed(reader, [record for i, record in enumerate(log) if i not in lost], trainer)
    # And either it has the last one, or knows that it lacks something, unless it was the last marker that it missed
    if len(log) - 1 not in lost and (reader.current is None or _contents(reader.current) != trainer.contents()):
        assert reader.is_behind
    # And reading the log again gives the trainer's tables
    again = VersionAssembler()
    _feed(again, log, trainer)
    assert _contents(again.current) == trainer.contents()


def test_rows_reach_predictions_only_when_their_version_is_settled() -> None:
    # Given a worker that serves a version
    trainer, reader = Trainer(), VersionAssembler()
    one, two = np.float32([1.0]).tobytes(), np.float32([2.0]).tobytes()
    _feed(reader, trainer.write([("task.merchant", b"=a", one)]), trainer)
    serving = reader.current
    assert serving is not None
    # When the next one comes in the middle of a micro-batch
    for record in trainer.write([("task.merchant", b"=a", two), ("task.merchant", b"=", two)]):
        reader.feed(*record)
    # Then the batch goes on with the rows that it had
    keys = PackedKeys.from_list([b"=a", b"="])
    vectors, found = serving.tables["task.merchant"].gather(keys)
    assert (vectors[0, 0], found.tolist()) == (1.0, [True, False])
    # And a version with tables of its own leaves them as they are
    assert reader.current is not None
    own = reader.current.forked()
    own.settle()
    assert own.tables["task.merchant"].gather(keys)[0].tolist() == [[2.0], [2.0]]
    assert serving.tables["task.merchant"].gather(keys)[0].tolist() == [[1.0], [0.0]]
