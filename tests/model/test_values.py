"""Category values and their numbers: every value by all of its bytes, whatever its length and place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.model.values import FieldValues, ValueTables
from stream.store import PackedKeys
from stream.wire import EventColumns, hash_bytes

MODALITIES, COLUMNS = 3, 2
_FIRST, _MISSING = 5, 2
#: Few letters, so that values share beginnings; long ones, so that they do not fit a word.
_text = st.text("ab", max_size=20).map(str.encode)
_values = st.lists(_text, max_size=12, unique=True)
_fields = st.lists(
    st.tuples(st.integers(0, MODALITIES - 1), st.integers(0, COLUMNS - 1), _values), min_size=0, max_size=5
)
_events = st.lists(
    st.tuples(st.integers(-1, MODALITIES - 1), st.lists(st.none() | _text, min_size=COLUMNS, max_size=COLUMNS)),
    max_size=20,
)


def _columns(events: list[tuple[int, list[bytes | None]]]) -> EventColumns:
    n = len(events)
    start, length = np.zeros((n, COLUMNS), np.int64), np.full((n, COLUMNS), -1, np.int32)
    hashes = np.zeros((n, COLUMNS), np.uint64)
    text = b""
    for i, (_, given_values) in enumerate(events):
        for column, value in enumerate(given_values):
            if value is not None:
                start[i, column], length[i, column], hashes[i, column] = len(text), len(value), hash_bytes(value)
                text += value
    modality = np.array([kind for kind, _ in events], np.int32)
    nothing, none = np.zeros(n, np.int64), np.zeros((n, 0))
    return EventColumns(
        n, modality >= 0, PackedKeys.from_list([b"k"] * n), nothing, nothing, modality, none,
        np.frombuffer(text, np.uint8), start, length, hashes,
        none.astype(np.int64), none.astype(np.int32), np.zeros(0, np.uint64), np.zeros(0, np.int32), [],
    )  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(_fields, _events)
def test_codes_are_those_of_a_dictionary(
    fields: list[tuple[int, int, list[bytes]]], events: list[tuple[int, list[bytes | None]]]
) -> None:
    # Given fields of any modality, some of them twice, each with a target of its own
    tables = ValueTables(
        [FieldValues(*field, target) for target, field in enumerate(fields)], MODALITIES, _FIRST, _MISSING
    )
    # When the values of events are looked up, up to the last byte of the text
    codes = tables.codes(_columns(events), len(fields))
    # Then each has the code that a dictionary gives it, and -1 where the event has no such field
    for i, (kind, values) in enumerate(events):
        for target, (modality, column, known) in enumerate(fields):
            value = values[column]
            numbered = {one: _FIRST + number for number, one in enumerate(known)}
            absent = kind != modality or value is None
            assert codes[i, target] == (-1 if absent else numbered.get(value, _MISSING))


def test_a_value_with_the_hash_of_another_is_not_the_other() -> None:
    # Given an event whose value has the hash and the length of a known one, in a word and beyond it
    tables = ValueTables([FieldValues(0, 0, [b"abc", b"a" * 11], 0)], 1, first=0, missing=-1)
    columns = _columns([(0, [b"xyz", None]), (0, [b"a" * 10 + b"x", None]), (0, [b"abc", None])])
    hashes = columns.category_hash.copy()
    hashes[:2, 0] = hash_bytes(b"abc"), hash_bytes(b"a" * 11)
    # When it is looked up, then only the value itself is found
    assert tables.codes(replace(columns, category_hash=hashes), 1)[:, 0].tolist() == [-1, -1, 0]
