"""The closed set of words that say why a record was refused, and the one way to build such a refusal.

Guarantees: every `RecordError` and every rejected event of this package carries one of `REASONS`, so the
word is fit for a metric label; a detail names the field, the value cut to `VALUE_CHARACTERS`, and what would
be accepted, and can always be encoded as UTF-8. A detail may quote what a publisher sent: it belongs in a
dead-letter header, not in a metric.
"""

from __future__ import annotations

from typing import Final

from stream.errors import RecordError

__all__ = [
    "DUPLICATE_FIELD",
    "FUTURE",
    "INVALID_UTF8",
    "KEY_MISMATCH",
    "MISSING_FIELD",
    "NOT_A_MAP",
    "NOT_FINITE",
    "NULL_VALUE",
    "OUT_OF_RANGE",
    "REASONS",
    "TOO_DEEP",
    "TOO_LARGE",
    "UNDECODABLE",
    "UNKNOWN_FIELD",
    "UNKNOWN_MODALITY",
    "UNKNOWN_TASK",
    "VALUE_CHARACTERS",
    "WRONG_TYPE",
    "refusal",
    "show",
]

NULL_VALUE: Final = "null_value"
TOO_LARGE: Final = "too_large"
UNDECODABLE: Final = "undecodable"
TOO_DEEP: Final = "too_deep"
INVALID_UTF8: Final = "invalid_utf8"
NOT_A_MAP: Final = "not_a_map"
DUPLICATE_FIELD: Final = "duplicate_field"
MISSING_FIELD: Final = "missing_field"
UNKNOWN_FIELD: Final = "unknown_field"
WRONG_TYPE: Final = "wrong_type"
UNKNOWN_MODALITY: Final = "unknown_modality"
UNKNOWN_TASK: Final = "unknown_task"
OUT_OF_RANGE: Final = "out_of_range"
NOT_FINITE: Final = "not_finite"
FUTURE: Final = "future"
KEY_MISMATCH: Final = "key_mismatch"

REASONS: Final = frozenset(
    {
        NULL_VALUE,
        TOO_LARGE,
        UNDECODABLE,
        TOO_DEEP,
        INVALID_UTF8,
        NOT_A_MAP,
        DUPLICATE_FIELD,
        MISSING_FIELD,
        UNKNOWN_FIELD,
        WRONG_TYPE,
        UNKNOWN_MODALITY,
        UNKNOWN_TASK,
        OUT_OF_RANGE,
        NOT_FINITE,
        FUTURE,
        KEY_MISMATCH,
    }
)

VALUE_CHARACTERS: Final = 200


def show(value: object) -> str:
    """`value` in at most `VALUE_CHARACTERS` printable characters.

    Containers are named by kind and size: quoting one could recurse as deep as the publisher nested it.
    """
    if isinstance(value, dict):
        return f"a map of {len(value)}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, str | bytes):
        value = value[:VALUE_CHARACTERS]
    text = repr(value)
    return text if len(text) <= VALUE_CHARACTERS else text[: VALUE_CHARACTERS - 3] + "..."


def refusal(reason: str, name: str, value: object, accepted: str) -> RecordError:
    """The error that says: field `name` has this value, and this would be accepted."""
    return RecordError(reason, f"{name} = {show(value)}: expected {accepted}")
