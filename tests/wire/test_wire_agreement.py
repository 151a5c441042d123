"""The kernel and the one-by-one reader agree on every byte string; nothing makes either raise."""

from __future__ import annotations

import json
import math
import random
import struct
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from stream.errors import RecordError
from stream.settings import parse
from stream.wire import (
    REASONS,
    EventColumns,
    EventDecoder,
    RecordBlock,
    Schema,
    decode_embedding,
    decode_feedback,
    encode_event,
)

SETTINGS = parse(
    """
[limits]
record_bytes = 400
client_id_bytes = 12
max_skew_s = 1.0

[modalities.pay.fields]
amount = { type = "number", min = -10.0, max = 1000.0 }
kind = { type = "category", max_bytes = 6 }
memo = { type = "text", required = false, max_bytes = 8 }
rate = { type = "number", required = false }
shop = { type = "category", required = false, max_bytes = 20 }

[modalities.open.fields]
rate = { type = "number" }
kind = { type = "category", required = false }
things = { type = "items", required = false, max_items = 5, max_bytes = 6 }
more = { type = "items", required = false, max_items = 2 }

[modalities.ping]

[tasks.churn]
on = "open"
"""
)
SCHEMA = Schema.compile(SETTINGS)
RECORD_MS = 1_000_000
FAST = EventDecoder(SCHEMA, SETTINGS.limits, "msgpack")
SLOW = EventDecoder(SCHEMA, SETTINGS.limits, "msgpack", fast=False)
JSON = EventDecoder(SCHEMA, SETTINGS.limits, "json")


def described(columns: EventColumns) -> list[Any]:
    """Everything a block's columns say, in a form that compares bit for bit."""
    rejected = {r.index: (r.reason, r.detail) for r in columns.rejected}
    return [
        (
            bool(columns.accepted[row]),
            int(columns.timestamp_ms[row]),
            int(columns.modality[row]),
            columns.numbers[row].view(np.uint64).tolist(),
            [columns.category(row, column) for column in range(SCHEMA.max_categories)],
            columns.category_hash[row].tolist(),
            [
                list(
                    zip(columns.item_group[at : at + n].tolist(), columns.item_hash[at : at + n].tolist(), strict=True)
                )
                if n >= 0
                else None
                for at, n in zip(columns.item_start[row].tolist(), columns.item_count[row].tolist(), strict=True)
            ],
            columns.keys[row],
            rejected.get(row),
        )
        for row in range(columns.n)
    ]


def assert_agreement(keys: list[bytes | None], values: list[bytes | None]) -> EventColumns:
    n = len(values)
    block = RecordBlock.from_lists(keys, values, range(n), [RECORD_MS] * n)
    fast, slow = FAST.decode(block), SLOW.decode(block)
    assert described(fast) == described(slow)
    assert [r.index for r in fast.rejected] == np.flatnonzero(~fast.accepted).tolist()
    assert all(r.reason in REASONS and r.detail for r in fast.rejected)
    assert bool((fast.category_start + fast.category_length <= len(fast.text)).all())
    return fast


def packed_integer(draw: Any, value: int) -> bytes:
    """An integer in any width that holds it."""
    forms = [">b", ">B", ">h", ">H", ">i", ">I", ">q", ">Q"]
    tags = [0xD0, 0xCC, 0xD1, 0xCD, 0xD2, 0xCE, 0xD3, 0xCF]
    fits = [msgpack.packb(value)]
    for form, tag in zip(forms, tags, strict=True):
        try:
            fits.append(bytes([tag]) + struct.pack(form, value))
        except struct.error:
            continue
    return draw(st.sampled_from(fits))


def packed_text(draw: Any, data: bytes) -> bytes:
    forms = [b"\xda" + struct.pack(">H", len(data)), b"\xdb" + struct.pack(">I", len(data))]
    if len(data) < 32:
        forms.append(bytes([0xA0 | len(data)]))
    if len(data) < 256:
        forms.append(bytes([0xD9, len(data)]))
    return draw(st.sampled_from(forms)) + data


def packed(draw: Any, value: Any) -> bytes:
    """`value` as MessagePack in one of its many forms; a list of pairs is a map, a tuple an array."""
    if isinstance(value, bool) or value is None:
        return msgpack.packb(value)
    if isinstance(value, int):
        return packed_integer(draw, value)
    if isinstance(value, float):
        return msgpack.packb(value, use_single_float=draw(st.booleans()) and abs(value) < 3e38)
    if isinstance(value, str):
        return packed_text(draw, value.encode("utf-8"))
    if isinstance(value, list):
        forms = [b"\xde" + struct.pack(">H", len(value)), b"\xdf" + struct.pack(">I", len(value))]
        if len(value) < 16:
            forms.append(bytes([0x80 | len(value)]))
        body = b"".join(packed(draw, part) for pair in value for part in pair)
        return draw(st.sampled_from(forms)) + body
    if isinstance(value, tuple):
        forms = [b"\xdc" + struct.pack(">H", len(value)), b"\xdd" + struct.pack(">I", len(value))]
        if len(value) < 16:
            forms.append(bytes([0x90 | len(value)]))
        return draw(st.sampled_from(forms)) + b"".join(packed(draw, part) for part in value)
    return msgpack.packb(value)


numbers = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.integers(-12, 1002),
    st.sampled_from([2**53, 2**53 + 1, -(2**53), -(2**53) - 1]),
    st.floats(width=32),
    st.floats(),
    st.floats(-10, 1000),
)
texts = st.one_of(st.text(max_size=9), st.sampled_from(["web", "café", "x" * 6, "x" * 7, ""]))
strange = st.one_of(
    st.none(),
    st.booleans(),
    numbers,
    texts,
    st.binary(max_size=4),
    st.just(()),
    st.just((1, "a")),
    st.just([("a", 1)]),
)
categories = st.one_of(texts, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.integers(-99999, 999999))
members = st.lists(st.one_of(categories, st.lists(categories, max_size=4).map(tuple)), max_size=7).map(tuple)
items = st.one_of(members, st.lists(st.one_of(strange, members), max_size=3).map(tuple))
values_of = {
    "amount": numbers,
    "kind": categories,
    "memo": texts,
    "rate": numbers,
    "shop": categories,
    "things": items,
    "more": items,
}
item = st.one_of(st.sampled_from(["web", "é€", "", "123456"]), st.booleans(), st.integers(-99999, 999999))
valid_values_of = {
    "amount": st.one_of(st.integers(-10, 1000), st.floats(-10, 1000)),
    "kind": st.one_of(st.sampled_from(["web", "é€", ""]), st.booleans(), st.integers(-99999, 999999)),
    "memo": st.sampled_from(["", "12345678", "été"]),
    "rate": st.one_of(st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False)),
    "shop": st.one_of(st.text("abc", max_size=20), st.integers(-(2**63), 2**63 - 1)),
    "things": st.one_of(
        st.lists(item, max_size=5).map(tuple),
        st.tuples(st.lists(item, min_size=1, max_size=3).map(tuple), item, item),
        st.tuples(item, st.lists(item, min_size=4, max_size=4).map(tuple)),
    ),
    "more": st.one_of(st.just(()), st.tuples(item), st.tuples(item, item), st.tuples(st.tuples(item, item))),
}


@st.composite
def valid_records(draw: Any) -> tuple[bytes, bytes]:
    client_id = draw(st.sampled_from(["ann", "żółw", "x" * 12]))
    modality = draw(st.sampled_from(SCHEMA.modalities))
    fields = []
    for name, field in modality.fields.items():
        if field.required or draw(st.booleans()):
            fields.append((name, draw(valid_values_of[name])))
    pairs: list[tuple[str, Any]] = [
        ("client_id", client_id),
        ("timestamp_ms", draw(st.integers(0, RECORD_MS + 1000))),
        ("modality", modality.name),
        ("fields", draw(st.permutations(fields))),
    ]
    if draw(st.booleans()):
        pairs.append(("event_id", draw(st.text(max_size=20))))
    return client_id.encode(), packed(draw, draw(st.permutations(pairs)))


@st.composite
def odd_records(draw: Any) -> tuple[bytes | None, bytes]:
    """Records that are nearly right: any member may be missing, doubled, strange or of another modality."""
    modality = draw(st.sampled_from(["pay", "open", "ping", "paid", ""]))
    names = draw(st.lists(st.sampled_from([*values_of, "rte"]), max_size=6))
    fields = [(name, draw(st.one_of(values_of.get(name, strange), strange))) for name in names]
    client_id = draw(st.sampled_from(["ann", "", "x" * 12, "x" * 13]))
    pairs: list[tuple[Any, Any]] = [
        ("client_id", draw(st.one_of(st.just(client_id), strange))),
        ("timestamp_ms", draw(st.one_of(st.sampled_from([0, RECORD_MS + 1000, RECORD_MS + 1001]), numbers))),
        ("modality", draw(st.one_of(st.just(modality), strange))),
        ("fields", draw(st.one_of(st.just(fields), strange))),
    ]
    more = st.sampled_from([*pairs, ("event_id", "x"), ("event_id", 4), ("extra", 1), (7, 7)])
    pairs += draw(st.lists(more, max_size=2))
    for _ in range(draw(st.integers(0, 1))):
        pairs.pop(draw(st.integers(0, len(pairs) - 1)))
    return draw(st.sampled_from([client_id.encode(), None])), packed(draw, draw(st.permutations(pairs)))


@st.composite
def mutated_records(draw: Any) -> tuple[bytes | None, bytes]:
    key, value = draw(valid_records())
    data = bytearray(value)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data) - 1)) if data else 0
        kind = draw(st.sampled_from(["set", "cut", "insert", "delete", "append"]))
        if kind == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=5))
        elif kind == "delete":
            del data[at : at + draw(st.integers(1, 5))]
        else:
            data += draw(st.binary(max_size=5))
    return key, bytes(data)


records = st.one_of(
    valid_records(),
    odd_records(),
    mutated_records(),
    st.tuples(st.sampled_from([b"ann", None, b""]), st.one_of(st.none(), st.binary(max_size=80))),
)
thorough = hypothesis_settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


@thorough
@given(st.lists(valid_records(), min_size=1, max_size=8))
def test_given_valid_records_in_any_shape_then_both_ways_accept_them_alike(
    batch: list[tuple[bytes, bytes]],
) -> None:
    columns = assert_agreement([key for key, _ in batch], [value for _, value in batch])

    assert columns.rejected == []


@thorough
@given(st.lists(records, max_size=8))
@example([(b"ann", b"\x84\xa8modality\xa4ping\xa6fields\x80\xa6fields\x80\xa9client_id\xa3ann")])
def test_given_any_records_then_both_ways_give_the_same_columns_and_reasons(
    batch: list[tuple[bytes | None, bytes | None]],
) -> None:
    assert_agreement([key for key, _ in batch], [value for _, value in batch])


@thorough
@given(st.lists(records, max_size=6), st.data())
def test_given_any_records_then_how_they_are_cut_into_blocks_does_not_matter(
    batch: list[tuple[bytes | None, bytes | None]], data: Any
) -> None:
    cut = data.draw(st.integers(0, len(batch)))
    keys, values = [key for key, _ in batch], [value for _, value in batch]

    whole = described(FAST.decode(RecordBlock.from_lists(keys, values, range(len(batch)), [RECORD_MS] * len(batch))))
    parts: list[Any] = []
    for part in (slice(0, cut), slice(cut, len(batch))):
        n = len(values[part])
        parts += described(FAST.decode(RecordBlock.from_lists(keys[part], values[part], range(n), [RECORD_MS] * n)))

    assert whole == parts


def test_given_regular_records_then_the_kernel_takes_them_all() -> None:
    """Agreement alone would hold of a kernel that takes nothing: this one must leave the reader no work."""
    values = [
        encode_event("ann", i, "pay", {"amount": i, "kind": "web", "shop": i, "memo": "é"}, event_id=str(i))
        for i in range(100)
    ]
    block = RecordBlock.from_lists([b"ann"] * 100, values, range(100), [RECORD_MS] * 100)
    values[1::2] = [
        encode_event("ann", i, "open", {"rate": i, "things": [["a", i], True, ["b"]], "more": []}) for i in range(50)
    ]
    decoder = EventDecoder(SCHEMA, SETTINGS.limits, "msgpack")
    decoder._reader = None  # type: ignore[assignment]

    assert decoder.decode(block).accepted.all()


def mutations(rng: random.Random, value: bytes) -> bytes:
    data = bytearray(value)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            data[at : at + 1] = rng.randbytes(1)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 6))
        else:
            data[at : at + rng.randint(1, 6)] = b""
    return bytes(data)


@pytest.mark.parametrize("seed", range(3))
def test_given_thousands_of_broken_records_among_good_ones_then_the_good_ones_are_as_if_alone(
    seed: int,
) -> None:
    rng = random.Random(seed)
    fields = {"amount": 5.5, "kind": "web", "memo": "été", "rate": 7, "shop": 4711}
    good = encode_event("ann", RECORD_MS, "pay", fields, event_id="e")
    alone = described(FAST.decode(RecordBlock.from_lists([b"ann"], [good], [0], [RECORD_MS])))[0]
    values: list[bytes | None] = []
    for _ in range(3000):
        values.append(mutations(rng, good))
        values.append(rng.randbytes(rng.randrange(60)))
        values.append(good)

    columns = assert_agreement([b"ann"] * len(values), values)

    rows = described(columns)
    assert all(row == alone for row, value in zip(rows, values, strict=True) if value == good)
    assert len(columns.rejected) > 3000


def test_given_every_truncation_of_a_record_then_each_is_refused() -> None:
    value = encode_event("ann", 1, "pay", {"amount": 1.5, "kind": "web"})
    cuts: list[bytes | None] = [value[:i] for i in range(len(value))]

    columns = assert_agreement([b"ann"] * len(cuts), cuts)

    assert not columns.accepted.any()


def test_given_every_text_of_two_and_many_of_four_bytes_then_both_ways_judge_utf8_alike() -> None:
    rng = random.Random(5)
    texts = [bytes([a, b]) for a in range(256) for b in range(0, 256, 3)]
    texts += [bytes([rng.choice([0xE0, 0xED, 0xEF, 0xF0, 0xF4, 0xF5]), *rng.randbytes(3)]) for _ in range(2000)]
    for lead in (0xE0, 0xE1, 0xED, 0xF0, 0xF1, 0xF4):
        for second in (0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0):
            texts.append(bytes([lead, second, 0x80, 0x80]))
            texts.append(bytes([lead, second, 0x80, 0x41]))
    start = b"\x84\xa9client_id\xa3ann\xactimestamp_ms\x01\xa8modality\xa3pay\xa6fields\x82\xa6amount\x01\xa4kind"
    values: list[bytes | None] = [start + bytes([0xA0 | len(text)]) + text for text in texts]

    columns = assert_agreement([b"ann"] * len(values), values)

    for text, accepted in zip(texts, columns.accepted.tolist(), strict=True):
        try:
            text.decode("utf-8")
            valid = True
        except UnicodeDecodeError:
            valid = False
        assert accepted == valid, text


@thorough
@given(st.one_of(st.binary(max_size=100), st.text(max_size=50).map(str.encode)))
def test_given_any_bytes_as_json_then_nothing_raises(value: bytes) -> None:
    columns = JSON.decode(RecordBlock.from_lists([b"ann"], [value], [0], [RECORD_MS]))

    assert [r.reason in REASONS for r in columns.rejected] == [True]


@thorough
@given(valid_records(), st.integers(0, 1000), st.integers(0, 255))
def test_given_json_with_a_byte_changed_then_nothing_raises(record: tuple[bytes, bytes], at: int, byte: int) -> None:
    key, value = record
    written = bytearray(json.dumps(msgpack.unpackb(value)).encode())
    written[at % len(written)] = byte

    columns = JSON.decode(RecordBlock.from_lists([key], [bytes(written)], [0], [RECORD_MS]))

    assert all(r.reason in REASONS for r in columns.rejected)


@thorough
@given(valid_records())
def test_given_the_same_event_as_json_then_the_columns_are_the_same(record: tuple[bytes, bytes]) -> None:
    key, value = record
    content = msgpack.unpackb(value)
    if any(isinstance(item, float) and not math.isfinite(item) for item in content["fields"].values()):
        return
    written = json.dumps(content).encode()
    left = FAST.decode(RecordBlock.from_lists([key], [value], [0], [RECORD_MS]))
    right = JSON.decode(RecordBlock.from_lists([key], [written], [0], [RECORD_MS]))

    if len(written) <= SETTINGS.limits.record_bytes:
        assert described(left) == described(right)


@thorough
@given(st.one_of(st.binary(max_size=100), odd_records().map(lambda record: record[1])))
def test_given_any_bytes_then_the_other_decoders_raise_record_errors_only(value: bytes) -> None:
    for decode in (
        decode_embedding,
        lambda data: decode_feedback(b"ann", data, None, SETTINGS),
    ):
        with pytest.raises(RecordError) as refused:
            decode(value)
        assert refused.value.reason in REASONS
