"""Feedback: the answer to one prediction of one task, as it became known.

Guarantees: `decode_feedback` returns a record whose every value is within its range and whose task is
configured, or raises `RecordError` with one of `REASONS`, for any bytes.
"""

from __future__ import annotations

import sys
from typing import Any, Final, NamedTuple

import msgspec

from stream.settings import Settings, Task
from stream.wire import checks
from stream.wire.block import Headers
from stream.wire.formats import format_of, read_map
from stream.wire.reasons import OUT_OF_RANGE, UNKNOWN_TASK, WRONG_TYPE, refusal, show

__all__ = ["FeedbackRecord", "Label", "decode_feedback", "encode_feedback"]

_REQUIRED: Final = ("client_id", "timestamp_ms", "as_of_ms", "task", "label")
_OPTIONAL: Final = ("weight", "window_end_ms")


#: Of a binary task, a class of a multiclass one, of a regression.
Label = bool | str | float


class FeedbackRecord(NamedTuple):
    """One label.

    timestamp_ms: when it became known; as_of_ms: the prediction it answers, not later; both UTC milliseconds.
    label: true or false of a binary task, the class of a multiclass one, the number of a regression.
    weight: finite, above 0. window_end_ms: when the answer is final for every client
    who was asked at the same time, not before as_of_ms, UTC milliseconds; None: it is final as it comes.
    """

    client_id: str
    timestamp_ms: int
    as_of_ms: int
    task: str
    label: Label
    weight: float = 1.0
    window_end_ms: int | None = None


def decode_feedback(
    key: bytes | None, value: bytes | None, headers: Headers | None, settings: Settings
) -> FeedbackRecord:
    """The feedback in one record, as received from Kafka.

    A binary label is a boolean, or a number equal to 0 or 1; one of several classes is one of the declared names; one
    of a regression is a finite number.

    Raises
    ------
    RecordError: with one of `REASONS`; never anything else, whatever the bytes.
    """
    written_as = format_of(headers or (), settings.topics.format)
    content = read_map(value, written_as, settings.limits.record_bytes)
    checks.keys(content, _REQUIRED, _OPTIONAL)
    client_id = checks.client_id(content["client_id"], key, settings.limits.client_id_bytes)
    timestamp_ms = checks.timestamp_ms("timestamp_ms", content["timestamp_ms"])
    as_of_ms = checks.timestamp_ms("as_of_ms", content["as_of_ms"])
    if as_of_ms > timestamp_ms:
        raise refusal(OUT_OF_RANGE, "as_of_ms", as_of_ms, f"at most timestamp_ms = {timestamp_ms}")
    task = content["task"]
    if not isinstance(task, str):
        raise refusal(WRONG_TYPE, "task", task, "text")
    if task not in settings.tasks:
        known = show(", ".join(settings.tasks)) if settings.tasks else "nothing: no task is configured"
        raise refusal(UNKNOWN_TASK, "task", task, f"one of {known}" if settings.tasks else known)
    weight = checks.number("weight", content.get("weight", 1.0), 0.0, float("inf"))
    if weight == 0.0:
        raise refusal(OUT_OF_RANGE, "weight", weight, "a number above 0")
    return FeedbackRecord(
        client_id.decode("utf-8"),
        timestamp_ms,
        as_of_ms,
        task,
        _label(content["label"], settings.tasks[task]),
        weight,
        _window_end_ms(content["window_end_ms"], as_of_ms) if "window_end_ms" in content else None,
    )


def _window_end_ms(value: Any, as_of_ms: int) -> int:
    end_ms = checks.timestamp_ms("window_end_ms", value)
    if end_ms < as_of_ms:
        raise refusal(OUT_OF_RANGE, "window_end_ms", end_ms, f"at least as_of_ms = {as_of_ms}")
    return end_ms


def _label(label: Any, task: Task) -> Label:
    if task.kind == "regression":
        return checks.number("label", label, -sys.float_info.max, sys.float_info.max)
    if task.kind == "binary":
        return _binary_label(label)
    if not isinstance(label, str):
        raise refusal(WRONG_TYPE, "label", label, f"one of {show(', '.join(task.classes))}")
    if label not in task.classes:
        raise refusal(OUT_OF_RANGE, "label", label, f"one of {show(', '.join(task.classes))}")
    return label


def _binary_label(label: Any) -> bool:
    if not isinstance(label, bool | int | float):
        raise refusal(WRONG_TYPE, "label", label, "true, false, 1 or 0")
    if label not in (0, 1):
        raise refusal(OUT_OF_RANGE, "label", label, "true, false, 1 or 0")
    return bool(label)


def encode_feedback(record: FeedbackRecord) -> bytes:
    """One label as MessagePack, for the topic `feedback` under the key `client_id` in UTF-8.

    Nothing is checked against settings here: whoever reads the record does that.
    """
    content = {name: value for name, value in record._asdict().items() if value is not None}
    return msgspec.msgpack.encode(content)
