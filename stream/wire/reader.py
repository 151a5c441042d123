"""One event at a time: the reading of a record that defines what is accepted and why anything else is not.

The columns' kernel is a fast way to the same answer for regular records; whatever it does not take comes
here.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from stream.settings import Limits
from stream.wire import checks
from stream.wire.checks import MAX_TIMESTAMP_MS
from stream.wire.formats import Format, read_map
from stream.wire.reasons import FUTURE, OUT_OF_RANGE, TOO_LARGE, UNKNOWN_MODALITY, WRONG_TYPE, refusal, show
from stream.wire.schema import FieldSchema, Schema

__all__ = ["EVENT_ID_BYTES", "EventReader", "ReadEvent", "skew_ms"]

EVENT_ID_BYTES: Final = 256

_REQUIRED: Final = ("client_id", "timestamp_ms", "modality", "fields")
_OPTIONAL: Final = ("event_id",)


class ReadEvent(NamedTuple):
    """A valid event: its values by column; items as pairs of group and value."""

    timestamp_ms: int
    modality: int
    numbers: list[tuple[int, float]]
    categories: list[tuple[int, bytes]]
    items: list[tuple[int, list[tuple[int, bytes]]]]


def skew_ms(limits: Limits) -> int:
    """`limits.max_skew_s` in milliseconds, capped where no timestamp reaches."""
    return int(min(limits.max_skew_s * 1000.0, float(MAX_TIMESTAMP_MS)))


class EventReader:
    """Reads and validates one event against a schema and limits."""

    def __init__(self, schema: Schema, limits: Limits) -> None:
        self._schema = schema
        self._limits = limits
        self._skew_ms = skew_ms(limits)

    def read(self, key: bytes | None, value: bytes | None, record_ms: int, written_as: Format) -> ReadEvent:
        """The event in one record.

        Parameters
        ----------
        key, value: as received from Kafka.
        record_ms: the record's own Kafka timestamp, UTC milliseconds; 0 or less when it has none.
        written_as: how `value` is written.

        Raises
        ------
        RecordError: with one of `REASONS`; never anything else, whatever the bytes.
        """
        content = read_map(value, written_as, self._limits.record_bytes)
        checks.keys(content, _REQUIRED, _OPTIONAL)
        checks.client_id(content["client_id"], key, self._limits.client_id_bytes)
        timestamp_ms = checks.timestamp_ms("timestamp_ms", content["timestamp_ms"])
        if record_ms > 0 and timestamp_ms - self._skew_ms > record_ms:
            raise refusal(
                FUTURE,
                "timestamp_ms",
                timestamp_ms,
                f"at most {self._limits.max_skew_s} s (limits.max_skew_s) after the record's {record_ms}",
            )
        name = content["modality"]
        if not isinstance(name, str):
            raise refusal(WRONG_TYPE, "modality", name, "text")
        modality = self._schema.by_name.get(name)
        if modality is None:
            known = show(", ".join(self._schema.modality_names))
            raise refusal(UNKNOWN_MODALITY, "modality", name, f"one of {known}")
        if "event_id" in content:
            checks.text("event_id", content["event_id"], EVENT_ID_BYTES)
        fields = checks.mapping("fields", content["fields"])
        checks.keys(fields, modality.required, modality.fields, prefix="fields.")
        numbers: list[tuple[int, float]] = []
        categories: list[tuple[int, bytes]] = []
        items: list[tuple[int, list[tuple[int, bytes]]]] = []
        for field_name, item in fields.items():
            field = modality.fields[field_name]
            label = f"fields.{field_name}"
            if field.type == "number":
                numbers.append((field.column, checks.number(label, item, field.minimum, field.maximum)))
            elif field.type == "category":
                categories.append((field.column, _category(label, item, field)))
            elif field.type == "items":
                items.append((field.column, _items(label, item, field)))
            else:
                checks.text(label, item, field.max_bytes)
        return ReadEvent(timestamp_ms, modality.index, numbers, categories, items)


def _items(name: str, value: Any, field: FieldSchema) -> list[tuple[int, bytes]]:
    """(group, category) of each item of a list."""
    if not isinstance(value, list):
        raise refusal(WRONG_TYPE, name, value, "a list of categories, or of lists of them")
    if sum(len(member) if isinstance(member, list) else 1 for member in value) > field.max_items:
        raise refusal(TOO_LARGE, name, value, f"at most max_items = {field.max_items} categories in all")
    found: list[tuple[int, bytes]] = []
    for group, member in enumerate(value):
        if isinstance(member, list) and not member:
            raise refusal(OUT_OF_RANGE, f"{name}[{group}]", member, "a group of at least one category")
        for item in member if isinstance(member, list) else [member]:
            found.append((group, _category(f"{name}[{group}]", item, field)))
    return found


def _category(name: str, value: Any, field: FieldSchema) -> bytes:
    """The text that a category value is compared as."""
    if isinstance(value, bool):
        value = "true" if value else "false"
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise refusal(OUT_OF_RANGE, name, value, "an integer of 64 bits, signed")
        value = str(value)
    elif not isinstance(value, str):
        raise refusal(WRONG_TYPE, name, value, "text, an integer or a boolean")
    return checks.text(name, value, field.max_bytes)
