"""Blocks of records as arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.wire import RecordBlock, hash_bytes
from stream.wire.event_kernel import hash_rows

items = st.one_of(st.none(), st.binary(max_size=20))


@given(st.lists(st.tuples(items, items), max_size=20))
def test_given_any_keys_and_values_then_each_is_given_back_as_received(
    records: list[tuple[bytes | None, bytes | None]],
) -> None:
    n = len(records)
    keys, values = [key for key, _ in records], [value for _, value in records]

    block = RecordBlock.from_lists(keys, values, range(n), np.arange(n))

    assert len(block) == n
    assert [block.key(i) for i in range(n)] == keys
    assert [block.value(i) for i in range(n)] == values


def test_headers_are_kept_only_where_some_record_has_them() -> None:
    assert RecordBlock.from_lists([b"a"], [b"b"], [0], [0], [[]]).headers is None
    assert RecordBlock.from_lists([b"a"], [b"b"], [0], [0], [None]).headers_of(0) == ()
    block = RecordBlock.from_lists([b"a"] * 2, [b"b"] * 2, [0, 1], [0, 0], [None, [("h", b"v")]])
    assert block.headers_of(0) == ()
    assert block.headers_of(1) == [("h", b"v")]


def test_a_block_does_not_change_and_leaves_the_callers_arrays_alone() -> None:
    moments = np.zeros(1, dtype=np.int64)
    block = RecordBlock.from_lists([b"a"], [b"b"], [0], moments)

    with pytest.raises(ValueError, match="read-only"):
        block.timestamps_ms[0] = 1
    moments[0] = 5
    assert moments.flags.writeable


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("key_offsets", np.array([0, 9], dtype=np.int64), "key_offsets must rise"),
        ("key_offsets", np.array([1, 0], dtype=np.int64), "key_offsets must rise"),
        ("key_offsets", np.array([-1, 1], dtype=np.int64), "key_offsets must rise"),
        ("value_offsets", np.array([0], dtype=np.int64), "value_offsets has 1 entries"),
        ("timestamps_ms", np.array([0, 0], dtype=np.int64), "timestamps_ms has 2 entries"),
        ("value_is_null", np.array([], dtype=np.bool_), "value_is_null has 0 entries"),
    ],
)
def test_arrays_that_do_not_agree_are_refused(name: str, array: np.ndarray, message: str) -> None:
    given = RecordBlock.from_lists([b"a"], [b"b"], [0], [0])
    arrays = {field: getattr(given, field) for field in given.__dataclass_fields__}

    with pytest.raises(ValueError, match=message):
        RecordBlock(**(arrays | {name: array}))


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=10))
def test_the_kernels_hash_is_the_documented_one(texts: list[bytes]) -> None:
    lengths = np.array([[len(text)] for text in texts], dtype=np.int32)
    starts = np.cumsum(np.vstack([np.zeros((1, 1), np.int64), lengths[:-1]]), axis=0)
    hashes = np.zeros(starts.shape, dtype=np.uint64)
    text = np.frombuffer(b"".join(texts), dtype=np.uint8)

    hash_rows(np.arange(len(texts)), text, starts, lengths, hashes)

    assert hashes[:, 0].tolist() == [hash_bytes(text) for text in texts]
