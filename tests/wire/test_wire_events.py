"""Events into columns: what is accepted, what is refused and with which word."""

from __future__ import annotations

import json
import math
import threading
from typing import Any

import msgpack
import numpy as np
import pytest

from stream.settings import Settings, parse
from stream.wire import (
    REASONS,
    EventColumns,
    EventDecoder,
    RecordBlock,
    Schema,
    encode_event,
    encode_event_json,
    hash_bytes,
)

SETTINGS = """
[limits]
record_bytes = 2000
client_id_bytes = 20
max_skew_s = 60.0

[modalities.purchase.fields]
amount = { type = "number", min = 0.0, max = 1000.0 }
channel = { type = "category", max_bytes = 8 }
note = { type = "text", required = false, max_bytes = 10 }
discount = { type = "number", required = false }
store = { type = "category", required = false, max_bytes = 20 }

[modalities.login.fields]
device = { type = "category" }

[modalities.ping]
"""
RECORD_MS = 1_700_000_000_000


@pytest.fixture(scope="module")
def settings() -> Settings:
    return parse(SETTINGS)


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def decoder(request: pytest.FixtureRequest, settings: Settings) -> EventDecoder:
    return EventDecoder(Schema.compile(settings), settings.limits, "msgpack", fast=request.param)


def event(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "client_id": "ann",
        "timestamp_ms": RECORD_MS,
        "modality": "purchase",
        "fields": {"amount": 12.5, "channel": "web"},
    }
    base.update(changes)
    return {name: value for name, value in base.items() if value is not ...}


def fields(**changes: Any) -> dict[str, Any]:
    given = {"amount": 12.5, "channel": "web"} | changes
    return event(fields={name: value for name, value in given.items() if value is not ...})


def block(*values: bytes | None, key: bytes | None = b"ann", headers: Any = None) -> RecordBlock:
    n = len(values)
    return RecordBlock.from_lists([key] * n, values, range(n), [RECORD_MS] * n, headers)


def decode_one(decoder: EventDecoder, content: Any, key: bytes | None = b"ann") -> EventColumns:
    value = content if isinstance(content, bytes) else msgpack.packb(content)
    return decoder.decode(block(value, key=key))


def test_schema_counts_columns_within_each_modality_in_the_order_of_the_settings(settings: Settings) -> None:
    schema = Schema.compile(settings)

    assert schema.modality_names == ("purchase", "login", "ping")
    assert (schema.max_numbers, schema.max_categories) == (2, 2)
    purchase = schema.by_name["purchase"]
    assert dict(purchase.number_fields) == {"amount": 0, "discount": 1}
    assert dict(purchase.category_fields) == {"channel": 0, "store": 1}
    assert purchase.text_fields == ("note",)
    assert schema.by_name["login"].category_fields == {"device": 0}


def test_given_a_full_event_when_decoded_then_every_value_is_in_its_column(decoder: EventDecoder) -> None:
    given = {"amount": 3, "channel": "café", "note": "naïve", "discount": -0.5, "store": 4711}

    columns = decode_one(decoder, event(fields=given, event_id="e1"))

    assert columns.n == 1
    assert columns.accepted.tolist() == [True]
    assert columns.rejected == []
    assert columns.timestamp_ms.tolist() == [RECORD_MS]
    assert columns.modality.tolist() == [0]
    assert columns.numbers.tolist() == [[3.0, -0.5]]
    assert columns.category(0, 0) == "café".encode()
    assert columns.category(0, 1) == b"4711"
    assert columns.category_hash.tolist() == [[hash_bytes("café".encode()), hash_bytes(b"4711")]]
    assert columns.keys.to_list() == [b"ann"]
    assert columns.offsets.tolist() == [0]


def test_given_absent_optional_fields_then_numbers_are_nan_and_categories_have_length_minus_one(
    decoder: EventDecoder,
) -> None:
    columns = decode_one(decoder, event())

    assert math.isnan(columns.numbers[0, 1])
    assert columns.category_length.tolist() == [[3, -1]]
    assert columns.category(0, 1) is None
    assert columns.category_hash[0, 1] == 0


def test_given_fields_before_the_modality_when_decoded_then_it_is_accepted(decoder: EventDecoder) -> None:
    turned = dict(reversed(event().items()))

    assert decode_one(decoder, turned).accepted.all()


def test_given_a_modality_without_fields_then_an_empty_map_is_an_event(decoder: EventDecoder) -> None:
    columns = decode_one(decoder, event(modality="ping", fields={}))

    assert columns.modality.tolist() == [2]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, b"true"),
        (False, b"false"),
        (0, b"0"),
        (-1, b"-1"),
        (2**63 - 1, b"9223372036854775807"),
        (-(2**63), b"-9223372036854775808"),
        ("", b""),
        ("x" * 20, b"x" * 20),
    ],
)
def test_categories_are_compared_as_text(decoder: EventDecoder, value: Any, text: bytes) -> None:
    columns = decode_one(decoder, fields(store=value))

    assert columns.category(0, 1) == text
    assert columns.category_hash[0, 1] == hash_bytes(text)


REFUSED = [
    ("null_value", None),
    ("too_large", msgpack.packb(event(event_id="x" * 2000))),
    ("undecodable", b""),
    ("undecodable", msgpack.packb(event())[:-1]),
    ("undecodable", msgpack.packb(event()) + b"\x00"),
    ("undecodable", b"\xc1"),
    ("undecodable", b"\xdf\xff\xff\xff\xff"),
    ("undecodable", b"\xdd\xff\xff\xff\xff"),
    ("too_deep", b"\x91" * 900 + b"\x90"),
    ("too_deep", b"\x91" * 1900 + b"\x90"),
    ("invalid_utf8", msgpack.packb(event()).replace(b"web", b"w\xffb")),
    ("invalid_utf8", msgpack.packb(event()).replace(b"web", b"\xed\xa0\x80")),
    ("not_a_map", msgpack.packb([1])),
    ("not_a_map", msgpack.packb(event(fields=[1, 2]))),
    ("duplicate_field", b"\x85" + msgpack.packb(event())[1:] + b"\xa8modality\xa8purchase"),
    ("wrong_type", msgpack.packb({1: 2})),
    ("wrong_type", b"\x81" + msgpack.packb([1]) + b"\x01"),
    ("missing_field", event(client_id=...)),
    ("missing_field", event(timestamp_ms=...)),
    ("missing_field", event(modality=...)),
    ("missing_field", event(fields=...)),
    ("missing_field", fields(amount=...)),
    ("unknown_field", event(clientid="ann")),
    ("unknown_field", fields(amuont=1)),
    ("wrong_type", event(client_id=7)),
    ("wrong_type", event(client_id=b"ann")),
    ("wrong_type", event(timestamp_ms=1.5)),
    ("wrong_type", event(timestamp_ms=True)),
    ("wrong_type", event(timestamp_ms="now")),
    ("wrong_type", event(modality=1)),
    ("wrong_type", event(event_id=1)),
    ("wrong_type", fields(amount="12")),
    ("wrong_type", fields(amount=True)),
    ("wrong_type", fields(amount=None)),
    ("wrong_type", fields(discount=None)),
    ("wrong_type", fields(amount=[1])),
    ("wrong_type", fields(channel=1.0)),
    ("wrong_type", fields(channel={"a": 1})),
    ("wrong_type", fields(channel=b"web")),
    ("wrong_type", fields(note=1)),
    ("wrong_type", fields(note=msgpack.ExtType(5, b"x"))),
    ("unknown_modality", event(modality="purchases")),
    ("out_of_range", event(client_id="")),
    ("out_of_range", event(timestamp_ms=-1)),
    ("out_of_range", event(timestamp_ms=253_402_300_800_000)),
    ("out_of_range", fields(amount=-0.5)),
    ("out_of_range", fields(amount=1000.5)),
    ("out_of_range", fields(discount=2**53 + 1)),
    ("out_of_range", fields(discount=2**64 - 1)),
    ("out_of_range", fields(store=2**63)),
    ("not_finite", fields(discount=math.nan)),
    ("not_finite", fields(discount=math.inf)),
    ("not_finite", fields(discount=-math.inf)),
    ("too_large", event(client_id="x" * 21)),
    ("too_large", event(event_id="x" * 257)),
    ("too_large", fields(channel="ninebytes")),
    ("too_large", fields(channel=123456789)),
    ("too_large", fields(note="elevenbytes")),
    ("future", event(timestamp_ms=RECORD_MS + 60_001)),
    ("key_mismatch", event(client_id="bob")),
    ("key_mismatch", event(client_id="an")),
]


@pytest.mark.parametrize(("reason", "content"), REFUSED, ids=[f"{i}-{r}" for i, (r, _) in enumerate(REFUSED)])
def test_given_a_bad_record_between_good_ones_then_it_alone_is_refused(
    decoder: EventDecoder, reason: str, content: Any
) -> None:
    good = msgpack.packb(event())
    bad = content if content is None or isinstance(content, bytes) else msgpack.packb(content)

    columns = decoder.decode(block(good, bad, good))

    assert [(r.index, r.reason) for r in columns.rejected] == [(1, reason)]
    assert columns.accepted.tolist() == [True, False, True]
    assert columns.modality.tolist() == [0, -1, 0]
    assert np.isnan(columns.numbers[1]).all()
    assert columns.category_length.tolist() == [[3, -1], [-1, -1], [3, -1]]
    assert columns.numbers[:, 0].tolist()[::2] == [12.5, 12.5]
    assert 0 < len(columns.rejected[0].detail) < 1000


def test_every_reason_that_an_event_can_have_is_tried_above() -> None:
    assert {reason for reason, _ in REFUSED} == REASONS - {"unknown_task"}


def test_boundaries_are_accepted(decoder: EventDecoder) -> None:
    for content in (
        event(timestamp_ms=0),
        event(timestamp_ms=RECORD_MS + 60_000),
        event(event_id="x" * 256),
        event(event_id=""),
        fields(amount=0),
        fields(amount=1000.0),
        fields(channel="12345678"),
        fields(channel=12345678),
        fields(discount=2**53),
        fields(discount=-(2**53)),
        fields(note="ten bytes!"),
    ):
        assert decode_one(decoder, content).rejected == [], content


def test_given_no_record_timestamp_then_no_event_is_from_the_future(decoder: EventDecoder) -> None:
    value = msgpack.packb(event(timestamp_ms=253_402_300_799_999))

    for record_ms in (0, -1):
        columns = decoder.decode(RecordBlock.from_lists([b"ann"], [value], [0], [record_ms]))
        assert columns.accepted.all()


@pytest.mark.parametrize("key", [None, b"", b"bob", b"x" * 2000])
def test_given_another_key_then_the_event_is_refused(decoder: EventDecoder, key: bytes | None) -> None:
    columns = decode_one(decoder, event(), key=key)

    assert columns.rejected[0].reason == "key_mismatch"
    assert len(columns.keys) == 1


def test_the_detail_names_the_field_the_value_and_what_would_do(decoder: EventDecoder) -> None:
    detail = decode_one(decoder, fields(amount=2000.0)).rejected[0].detail
    assert detail == "fields.amount = 2000.0: expected a number from 0.0 to 1000.0"

    detail = decode_one(decoder, fields(amuont=1)).rejected[0].detail
    assert detail.startswith("fields.amuont = 1: expected one of ")
    assert "amount" in detail


def test_a_quoted_value_is_cut(decoder: EventDecoder) -> None:
    detail = decode_one(decoder, fields(**{"y" * 1000: "x" * 500})).rejected[0].detail

    assert len(detail) < 700


JSON_REFUSED = [
    ("undecodable", b"{"),
    ("undecodable", b'{"client_id":"ann"} x'),
    ("undecodable", b"\xef\xbb\xbf{}"),
    ("undecodable", json.dumps(fields(amount=math.nan)).encode()),
    ("undecodable", json.dumps(fields(amount=math.inf)).encode()),
    ("undecodable", json.dumps(fields(amount=-math.inf)).encode()),
    ("not_finite", json.dumps(fields(amount=1.5)).replace("1.5", "1e999").encode()),
    ("invalid_utf8", b'{"client_id":"\xff"}'),
    ("invalid_utf8", json.dumps(fields(channel="\ud800")).encode()),
    ("duplicate_field", b'{"client_id":"ann","client_id":"ann"}'),
    ("duplicate_field", json.dumps(fields(store=0)).replace('"store"', '"amount"').encode()),
    ("too_deep", b"[" * 1500),
    ("too_deep", b"[" * 40 + b"]" * 40),
    ("not_a_map", b"[]"),
    ("not_a_map", b"null"),
    ("wrong_type", json.dumps(event(timestamp_ms=1.0)).encode()),
    ("out_of_range", json.dumps(fields(store=2**70)).encode()),
    ("out_of_range", json.dumps(fields(amount=10**100)).encode()),
]


@pytest.mark.parametrize(("reason", "value"), JSON_REFUSED, ids=[f"{i}-{r}" for i, (r, _) in enumerate(JSON_REFUSED)])
def test_bad_json_is_refused(settings: Settings, reason: str, value: bytes) -> None:
    decoder = EventDecoder(Schema.compile(settings), settings.limits, "json")

    columns = decoder.decode(block(value))

    assert [r.reason for r in columns.rejected] == [reason]


@pytest.mark.parametrize(
    "header",
    [
        ("content-type", b"application/json"),
        ("Content-Type", b"Application/JSON"),
        ("CONTENT-TYPE", b" application/json ; charset=utf-8"),
    ],
)
def test_given_a_json_header_then_that_record_is_read_as_json(decoder: EventDecoder, header: tuple[str, bytes]) -> None:
    packed = encode_event("ann", RECORD_MS, "purchase", {"amount": 1, "channel": "web"})
    written = encode_event_json("ann", RECORD_MS, "purchase", {"amount": 1, "channel": "web"}, "id")

    columns = decoder.decode(block(packed, written, packed, headers=[None, [header], [("trace", None)]]))

    assert columns.rejected == []
    assert [columns.category(row, 0) for row in range(3)] == [b"web"] * 3
    assert len(set(columns.category_hash[:, 0].tolist())) == 1


def test_given_a_json_topic_then_a_msgpack_header_says_otherwise(settings: Settings) -> None:
    decoder = EventDecoder(Schema.compile(settings), settings.limits, "json")
    packed = msgpack.packb(event())
    written = json.dumps(event()).encode()

    columns = decoder.decode(block(written, packed, headers=[(), [("content-type", b"application/vnd.msgpack")]]))

    assert columns.rejected == []


def test_an_unknown_content_type_leaves_the_topics_format(decoder: EventDecoder) -> None:
    columns = decoder.decode(block(msgpack.packb(event()), headers=[[("content-type", b"text/\xff")]]))

    assert columns.accepted.all()


def test_json_and_msgpack_give_the_same_columns(decoder: EventDecoder, settings: Settings) -> None:
    given = {"amount": 3, "channel": "café", "note": "ü", "discount": 0.1, "store": -7}
    as_json = EventDecoder(Schema.compile(settings), settings.limits, "json")

    left = decoder.decode(block(encode_event("ann", RECORD_MS, "purchase", given, "i")))
    right = as_json.decode(block(encode_event_json("ann", RECORD_MS, "purchase", given, "i")))

    assert left.numbers.tolist() == right.numbers.tolist()
    assert [left.category(0, c) for c in (0, 1)] == [right.category(0, c) for c in (0, 1)]
    assert left.category_hash.tolist() == right.category_hash.tolist()


def test_json_cannot_hold_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        encode_event_json("ann", 0, "purchase", {"amount": math.nan})


def test_an_encoded_event_is_plain_messagepack() -> None:
    value = encode_event("ann", 5, "login", {"device": "ios"}, event_id="7")

    assert msgpack.unpackb(value) == {
        "client_id": "ann",
        "timestamp_ms": 5,
        "modality": "login",
        "event_id": "7",
        "fields": {"device": "ios"},
    }


def test_an_empty_block_is_decoded(decoder: EventDecoder) -> None:
    columns = decoder.decode(block())

    assert columns.n == 0
    assert columns.numbers.shape == (0, 2)
    assert columns.rejected == []


def test_given_settings_without_any_field_then_events_are_decoded() -> None:
    bare = parse("[modalities.ping]")
    decoder = EventDecoder(Schema.compile(bare), bare.limits, "msgpack")

    columns = decode_one(decoder, event(modality="ping", fields={}))

    assert columns.accepted.all()
    assert columns.numbers.shape == (1, 0)


def test_threads_share_a_decoder(settings: Settings) -> None:
    decoder = EventDecoder(Schema.compile(settings), settings.limits, "msgpack")
    blocks = [block(*[msgpack.packb(fields(amount=a, store=a))] * 500) for a in range(4)]
    found: list[set[Any]] = [set() for _ in blocks]

    def work(i: int) -> None:
        for _ in range(10):
            columns = decoder.decode(blocks[i])
            found[i] |= {(columns.numbers[r, 0], columns.category(r, 1)) for r in range(columns.n)}

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == [{(float(a), str(a).encode())} for a in range(4)]


def test_the_hash_is_fixed_for_all_releases() -> None:
    assert hash_bytes(b"") == 0xF52A15E9A9B5E89B
    assert hash_bytes(b"web") == 0xC850F03F92A375F3


LISTS = """
[modalities.offer.fields]
products = { type = "items", max_items = 4, max_bytes = 8 }
also = { type = "items", required = false }
"""


def decode_lists(fast: bool, content: bytes, written_as: str = "msgpack") -> EventColumns:
    settings = parse(LISTS)
    decoder = EventDecoder(Schema.compile(settings), settings.limits, "msgpack", fast=fast)
    headers = [[("content-type", f"application/{written_as}".encode())]]
    return decoder.decode(block(content, headers=headers))


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "slow"])
@pytest.mark.parametrize("written_as", ["msgpack", "json"])
def test_given_items_in_groups_then_each_has_its_hash_and_its_group(fast: bool, written_as: str) -> None:
    # Given a list of a group, a category beside it and another group
    content = event(modality="offer", fields={"products": [["milk", 4711], True, ["milk"]]})
    value = msgpack.packb(content) if written_as == "msgpack" else json.dumps(content).encode()
    # When it is decoded
    columns = decode_lists(fast, value, written_as)
    # Then its items are those categories, in order, by group; the field that is absent has none
    assert columns.accepted.all(), columns.rejected
    assert columns.item_start.tolist() == [[0, 0]]
    assert columns.item_count.tolist() == [[4, -1]]
    assert columns.item_group.tolist() == [0, 0, 1, 2]
    assert columns.item_hash.tolist() == [hash_bytes(text) for text in (b"milk", b"4711", b"true", b"milk")]


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "slow"])
@pytest.mark.parametrize(
    ("products", "reason", "detail"),
    [
        ("milk", "wrong_type", "fields.products = 'milk': expected a list of categories, or of lists of them"),
        (["a"] * 5, "too_large", "fields.products = a list of 5: expected at most max_items = 4 categories in all"),
        ([["a"] * 3, ["b"] * 2], "too_large", "expected at most max_items = 4 categories in all"),
        ([["a"], []], "out_of_range", "fields.products[1] = a list of 0: expected a group of at least one category"),
        ([[["a"]]], "wrong_type", "fields.products[0] = a list of 1: expected text, an integer or a boolean"),
        (["a", None], "wrong_type", "fields.products[1] = None: expected text, an integer or a boolean"),
        ([1.5], "wrong_type", "fields.products[0] = 1.5: expected text, an integer or a boolean"),
        (["x" * 9], "too_large", "fields.products[0] = 'xxxxxxxxx': expected at most 8 bytes of UTF-8, got 9"),
    ],
)
def test_given_items_that_are_none_then_the_reason_names_what_would_be(
    fast: bool, products: Any, reason: str, detail: str
) -> None:
    columns = decode_lists(fast, msgpack.packb(event(modality="offer", fields={"products": products})))

    assert [one.reason for one in columns.rejected] == [reason]
    assert detail in columns.rejected[0].detail


def test_given_a_list_that_announces_more_than_it_holds_then_it_is_refused() -> None:
    value = msgpack.packb(event(modality="offer", fields={"products": ["a", "b"]}))
    announced = value.replace(b"\x92\xa1a\xa1b", b"\xdd\xff\xff\xff\xff\xa1a\xa1b")
    assert announced != value

    columns = decode_lists(True, announced)

    assert [one.reason for one in columns.rejected] == ["undecodable"]
