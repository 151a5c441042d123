"""Checks of one value, shared by every record that is read one at a time.

Each takes the name to report and the value, and returns it or raises `RecordError` with one of `REASONS`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Final

from stream.errors import RecordError
from stream.wire.reasons import (
    INVALID_UTF8,
    KEY_MISMATCH,
    MISSING_FIELD,
    NOT_A_MAP,
    NOT_FINITE,
    OUT_OF_RANGE,
    TOO_LARGE,
    UNKNOWN_FIELD,
    WRONG_TYPE,
    refusal,
    show,
)

__all__ = [
    "EXACT_INTEGER",
    "MAX_TIMESTAMP_MS",
    "client_id",
    "keys",
    "mapping",
    "number",
    "text",
    "timestamp_ms",
]

#: The last millisecond of the year 9999, UTC.
MAX_TIMESTAMP_MS: Final = 253_402_300_799_999
#: Integers beyond this are not exact as float64 and are refused, not rounded.
EXACT_INTEGER: Final = 2**53


def keys(content: Mapping[str, Any], required: Collection[str], optional: Collection[str], prefix: str = "") -> None:
    """Every key of `content` is known and no required one is missing."""
    for name in content:
        if name not in required and name not in optional:
            accepted = ", ".join([*required, *optional])
            raise refusal(UNKNOWN_FIELD, f"{prefix}{_plain(name)}", content[name], f"one of {show(accepted)}")
    for name in required:
        if name not in content:
            raise RecordError(MISSING_FIELD, f"{prefix}{name} is missing: expected a value, it is required")


def _plain(name: str) -> str:
    return show(name)[1:-1]


def mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise refusal(NOT_A_MAP, name, value, "a map")
    return value


def text(name: str, value: Any, max_bytes: int, min_bytes: int = 0) -> bytes:
    """UTF-8 of a text of `min_bytes` to `max_bytes` bytes."""
    if not isinstance(value, str):
        raise refusal(WRONG_TYPE, name, value, "text")
    try:
        encoded = value.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can escape half of a surrogate pair, which no UTF-8 text holds.
        raise refusal(INVALID_UTF8, name, value, "valid Unicode text") from error
    if len(encoded) > max_bytes:
        raise refusal(TOO_LARGE, name, value, f"at most {max_bytes} bytes of UTF-8, got {len(encoded)}")
    if len(encoded) < min_bytes:
        raise refusal(OUT_OF_RANGE, name, value, f"at least {min_bytes} byte of UTF-8")
    return encoded


def client_id(value: Any, key: bytes | None, max_bytes: int) -> bytes:
    """UTF-8 of a client id that equals the record's Kafka key."""
    encoded = text("client_id", value, max_bytes, min_bytes=1)
    if encoded != key:
        raise refusal(KEY_MISMATCH, "client_id", value, f"the record's Kafka key, which is {show(key)}")
    return encoded


def timestamp_ms(name: str, value: Any) -> int:
    """UTC milliseconds, 0 to the end of the year 9999."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise refusal(WRONG_TYPE, name, value, "an integer, UTC milliseconds")
    if not 0 <= value <= MAX_TIMESTAMP_MS:
        raise refusal(OUT_OF_RANGE, name, value, f"UTC milliseconds from 0 to {MAX_TIMESTAMP_MS}")
    return value


def number(name: str, value: Any, minimum: float, maximum: float) -> float:
    """A finite number within inclusive bounds."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise refusal(WRONG_TYPE, name, value, "a number")
    if isinstance(value, int) and abs(value) > EXACT_INTEGER:
        raise refusal(OUT_OF_RANGE, name, value, "an integer within ±2**53, or a float")
    converted = float(value)
    if not math.isfinite(converted):
        raise refusal(NOT_FINITE, name, value, "a finite number")
    if converted < minimum or converted > maximum:
        raise refusal(OUT_OF_RANGE, name, value, f"a number from {minimum} to {maximum}")
    return converted
