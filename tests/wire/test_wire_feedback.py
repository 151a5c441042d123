"""Feedback and dead letters."""

from __future__ import annotations

import json
import math
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.errors import RecordError
from stream.settings import parse
from stream.wire import REASONS, FeedbackRecord, dead_letter_headers, decode_feedback, encode_feedback

SETTINGS = parse(
    """
[limits]
record_bytes = 300
[modalities.send]
[tasks.redeemed]
on = "send"
"""
)
RECORD = FeedbackRecord("ann", 2000, 1000, "redeemed", True, 0.5, 3000)
ANYTHING = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=5)


def content(**changes: Any) -> dict[str, Any]:
    given = RECORD._asdict() | changes
    return {name: value for name, value in given.items() if value is not ...}


def decode(given: dict[str, Any], key: bytes | None = b"ann") -> FeedbackRecord:
    return decode_feedback(key, msgpack.packb(given), None, SETTINGS)


def test_given_a_record_when_encoded_and_decoded_then_it_is_the_same() -> None:
    assert decode_feedback(b"ann", encode_feedback(RECORD), [], SETTINGS) == RECORD
    assert msgpack.unpackb(encode_feedback(RECORD)) == content()


def test_json_is_read_where_the_header_says_so() -> None:
    value = json.dumps(content()).encode()

    assert decode_feedback(b"ann", value, [("Content-Type", b"application/json")], SETTINGS) == RECORD


def test_a_missing_weight_is_one() -> None:
    assert decode(content(weight=...)).weight == 1.0


def test_feedback_without_a_window_is_written_and_read_without_one() -> None:
    open_ended = RECORD._replace(window_end_ms=None)

    assert "window_end_ms" not in msgpack.unpackb(encode_feedback(open_ended))
    assert decode_feedback(b"ann", encode_feedback(open_ended), None, SETTINGS) == open_ended
    assert decode(content(window_end_ms=...)) == open_ended


@pytest.mark.parametrize("end_ms", [1000, 1999, 2000, 10**14])
def test_a_window_may_end_at_any_time_from_the_prediction_on(end_ms: int) -> None:
    assert decode(content(window_end_ms=end_ms)).window_end_ms == end_ms


@given(
    st.builds(
        FeedbackRecord,
        client_id=st.just("ann"),
        timestamp_ms=st.integers(5_000, 2**47),
        as_of_ms=st.integers(0, 5_000),
        task=st.just("redeemed"),
        label=st.booleans(),
        weight=st.floats(0, exclude_min=True, allow_nan=False, allow_infinity=False),
        window_end_ms=st.none() | st.integers(5_000, 2**47),
    )
)
def test_every_valid_record_is_read_as_it_was_written(record: FeedbackRecord) -> None:
    assert decode_feedback(b"ann", encode_feedback(record), None, SETTINGS) == record


@given(st.binary(max_size=300) | st.dictionaries(st.sampled_from(list(content())), ANYTHING).map(msgpack.packb))
def test_whatever_the_bytes_a_record_is_read_or_refused_with_a_reason(value: bytes) -> None:
    record, reason = None, None
    try:
        record = decode_feedback(b"ann", value, None, SETTINGS)
    except RecordError as refused:
        reason = refused.reason
    if record is None:
        assert reason in REASONS
    else:
        assert record.as_of_ms <= record.timestamp_ms
        assert record.window_end_ms is None or record.window_end_ms >= record.as_of_ms


@pytest.mark.parametrize(("label", "meant"), [(True, True), (False, False), (1, True), (0, False), (1.0, True)])
def test_a_binary_label_is_a_boolean_or_its_number(label: Any, meant: bool) -> None:
    assert decode(content(label=label)).label is meant


KINDS = parse(
    """
    [modalities.send]
    [tasks.channel]
    on = "send"
    kind = "multiclass"
    classes = ["post", "mail"]
    [tasks.spent]
    on = "send"
    kind = "regression"
    """
)


@pytest.mark.parametrize(("task", "label"), [("channel", "mail"), ("spent", -1.5), ("spent", 3)])
def test_labels_of_other_kinds_are_read(task: str, label: Any) -> None:
    value = msgpack.packb(content(task=task, label=label))
    assert decode_feedback(b"ann", value, None, KINDS).label == label


@pytest.mark.parametrize(
    ("task", "label", "reason", "said"),
    [
        ("channel", "fax", "out_of_range", "label = 'fax': expected one of 'post, mail'"),
        ("channel", True, "wrong_type", "label = True: expected one of 'post, mail'"),
        ("spent", "much", "wrong_type", "label = 'much': expected a number"),
        ("spent", True, "wrong_type", "label = True: expected a number"),
        ("spent", math.nan, "not_finite", "label = nan: expected a finite number"),
    ],
)
def test_labels_of_another_kind_are_refused_by_what_would_do(task: str, label: Any, reason: str, said: str) -> None:
    with pytest.raises(RecordError) as refused:
        decode_feedback(b"ann", msgpack.packb(content(task=task, label=label)), None, KINDS)
    assert refused.value.reason == reason
    assert str(refused.value).startswith(said)


def test_feedback_may_be_known_at_the_moment_it_answers() -> None:
    assert decode(content(as_of_ms=2000)).as_of_ms == 2000


@pytest.mark.parametrize(
    ("reason", "given", "key"),
    [
        ("unknown_task", content(task="churn"), b"ann"),
        ("wrong_type", content(task=1), b"ann"),
        ("wrong_type", content(label="yes"), b"ann"),
        ("wrong_type", content(label=None), b"ann"),
        ("out_of_range", content(label=2), b"ann"),
        ("out_of_range", content(label=0.5), b"ann"),
        ("out_of_range", content(label=math.nan), b"ann"),
        ("out_of_range", content(as_of_ms=2001), b"ann"),
        ("out_of_range", content(timestamp_ms=-1), b"ann"),
        ("wrong_type", content(as_of_ms=1.5), b"ann"),
        ("out_of_range", content(window_end_ms=999), b"ann"),
        ("out_of_range", content(window_end_ms=2**60), b"ann"),
        ("wrong_type", content(window_end_ms=None), b"ann"),
        ("wrong_type", content(window_end_ms=3000.0), b"ann"),
        ("wrong_type", content(window_end_ms=True), b"ann"),
        ("out_of_range", content(weight=0), b"ann"),
        ("out_of_range", content(weight=-1.0), b"ann"),
        ("not_finite", content(weight=math.inf), b"ann"),
        ("not_finite", content(weight=math.nan), b"ann"),
        ("wrong_type", content(weight="1"), b"ann"),
        ("missing_field", content(label=...), b"ann"),
        ("unknown_field", content(wieght=1.0), b"ann"),
        ("key_mismatch", content(), b"bob"),
        ("key_mismatch", content(), None),
        ("too_large", content(task="x" * 400), b"ann"),
    ],
)
def test_bad_feedback_is_refused(reason: str, given: dict[str, Any], key: bytes | None) -> None:
    with pytest.raises(RecordError) as refused:
        decode(given, key)

    assert refused.value.reason == reason
    assert str(refused.value)


def test_given_no_tasks_then_every_task_is_unknown() -> None:
    with pytest.raises(RecordError, match="no task is configured"):
        decode_feedback(b"ann", encode_feedback(RECORD), None, parse("[modalities.send]"))


def test_a_null_value_is_refused() -> None:
    with pytest.raises(RecordError) as refused:
        decode_feedback(b"ann", None, None, SETTINGS)
    assert refused.value.reason == "null_value"


def test_dead_letter_headers_say_why_and_from_where() -> None:
    headers = dead_letter_headers("wrong_type", "fields.ä = 'x': expected a number", "events", 3, 2**40)

    assert headers == [
        ("livestate-reason", b"wrong_type"),
        ("livestate-detail", "fields.ä = 'x': expected a number".encode()),
        ("livestate-topic", b"events"),
        ("livestate-partition", b"3"),
        ("livestate-offset", b"1099511627776"),
    ]


def test_a_detail_with_half_a_surrogate_pair_still_makes_a_header() -> None:
    assert dict(dead_letter_headers("r", "\ud800", "t", 0, 0))["livestate-detail"] == rb"\ud800"
