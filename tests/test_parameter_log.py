"""Versions are served whole or not at all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.errors import ParametersError
from stream.model.parameters import ParameterSet, encode_tensor, tensor_checksum
from stream.parameter_log import MARKER_KEY, Marker, VersionAssembler, encode_marker

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
    for key in (b"a", MARKER_KEY):
        with pytest.raises(ParametersError):
            VersionAssembler().feed(key, noise)
