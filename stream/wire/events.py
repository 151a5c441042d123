"""Events: blocks of records into columns, and single events into bytes.

Guarantees: `EventDecoder.decode` never raises for any bytes; every record is either accepted, its row
filled, or listed in `rejected` with one of `REASONS`; a bad record changes nothing about its neighbours.
What is accepted, and with which values, does not depend on how records are cut into blocks.

Two ways lead to the same columns: a compiled kernel for regular MessagePack records, and `EventReader`, one
record at a time, for everything else (JSON, unusual shapes, errors). `fast=False` takes the second alone.

Numbers are float64. An integer beyond 2**53 is refused (`out_of_range`): it would not survive unchanged.
Categories are text; an integer is its decimal text, a boolean `true` or `false`; items are categories. A null is
refused (`wrong_type`), also for an optional field: leave the field out.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from stream.errors import RecordError
from stream.settings import Limits
from stream.store.keys import MAX_KEY_BYTES, PackedKeys
from stream.wire.block import RecordBlock
from stream.wire.event_kernel import (
    CATEGORY,
    ITEMS,
    NUMBER,
    TEXT,
    clear_columns,
    decode_regular,
    hash_rows,
)
from stream.wire.formats import Format, format_of
from stream.wire.hashing import hash_bytes
from stream.wire.reader import EventReader, skew_ms
from stream.wire.schema import Schema

__all__ = ["EventColumns", "EventDecoder", "FieldValue", "Rejected", "encode_event", "encode_event_json"]

#: The items of a block where no field is of items, and the records to pass over where there are none.
_NO_ITEMS = np.empty(0, np.uint64), np.empty(0, np.int32)
_NOT_PASSED_OVER = np.empty(0, np.bool_)

FieldValue = str | int | float | bool | Sequence["str | int | bool | Sequence[str | int | bool]"]


@dataclass(frozen=True, slots=True)
class Rejected:
    """One record that is not an event: its index in the block, one of `REASONS`, and what was wrong."""

    index: int
    reason: str
    detail: str


@dataclass(frozen=True, slots=True, eq=False)
class EventColumns:
    """n records of a block as columns.

    accepted: bool[n]; where False, the other columns hold nothing of the record.
    keys: client ids, n of them; a record that was not accepted may have a stand-in.
    offsets: int64[n], offsets in the partition.
    timestamp_ms: int64[n], the events' own time, UTC milliseconds.
    modality: int32[n], index into `Schema.modality_names`; -1 where not accepted.
    numbers: float64[n, max_numbers]; NaN where a field is absent.
    text: uint8, read-only, the UTF-8 that categories lie in.
    category_start: int64[n, max_categories], first byte in `text`.
    category_length: int32[n, max_categories], bytes; -1 where a field is absent.
    category_hash: uint64[n, max_categories], `hash_bytes` of the bytes; 0 where a field is absent.
    item_start, item_count: int64[n, max_item_fields], int32, where the items of a field are in the next two; a count
        of -1 where a field is absent.
    item_hash, item_group: uint64[items], `hash_bytes` of each item; int32[items], the group it is in, rising from 0.
    rejected: the records not accepted, by rising index.
    """

    n: int
    accepted: NDArray[np.bool_]
    keys: PackedKeys
    offsets: NDArray[np.int64]
    timestamp_ms: NDArray[np.int64]
    modality: NDArray[np.int32]
    numbers: NDArray[np.float64]
    text: NDArray[np.uint8]
    category_start: NDArray[np.int64]
    category_length: NDArray[np.int32]
    category_hash: NDArray[np.uint64]
    item_start: NDArray[np.int64]
    item_count: NDArray[np.int32]
    item_hash: NDArray[np.uint64]
    item_group: NDArray[np.int32]
    rejected: list[Rejected]

    def category(self, row: int, column: int) -> bytes | None:
        """UTF-8 of one category value; None where the field is absent."""
        length = int(self.category_length[row, column])
        if length < 0:
            return None
        start = int(self.category_start[row, column])
        return self.text[start : start + length].tobytes()


class EventDecoder:
    """Decodes and validates events, a block at a time.

    Parameters
    ----------
    schema: compiled from the settings.
    limits: bounds on records, client ids and clock skew.
    default_format: how records without a known `content-type` header are written.
    fast: whether regular records take the kernel; the result is the same either way.

    A decoder keeps nothing between blocks; threads may share it.
    """

    def __init__(self, schema: Schema, limits: Limits, default_format: Format, *, fast: bool = True) -> None:
        self.schema = schema
        self._limits = limits
        self._default_format = default_format
        self._fast = fast
        self._skew_ms = skew_ms(limits)
        self._reader = EventReader(schema, limits)
        self._tables = _tables(schema)
        self._n_fields = int(self._tables.modality_fields[-1])

    def decode(self, block: RecordBlock) -> EventColumns:
        """The columns of a block."""
        n = len(block)
        shape = (n, self.schema.max_categories)
        lists = (n, self.schema.max_item_fields)
        accepted = np.empty(n, np.bool_)
        timestamp_ms = np.empty(n, np.int64)
        modality = np.empty(n, np.int32)
        numbers = np.empty((n, self.schema.max_numbers))
        category_start = np.empty(shape, np.int64)
        category_length = np.empty(shape, np.int32)
        category_hash = np.empty(shape, np.uint64)
        item_start = np.empty(lists, np.int64)
        item_count = np.empty(lists, np.int32)
        item_hash, item_group = _NO_ITEMS
        clear_columns(
            accepted, timestamp_ms, modality, numbers, category_start, category_length, category_hash, item_start,
            item_count,
        )  # fmt: skip
        text = block.value_bytes
        formats = self._formats(block)
        regular = 0
        if self._fast and (formats is not None or self._default_format == "msgpack"):
            extra = np.empty(20 * category_start.size + 25, np.uint8)
            if self.schema.max_item_fields:
                item_hash, item_group = np.empty(len(text), np.uint64), np.empty(len(text), np.int32)
            regular, used, items = decode_regular(
                _NOT_PASSED_OVER if formats is None else np.array([one != "msgpack" for one in formats], np.bool_),
                block.key_is_null,
                block.key_bytes,
                block.key_offsets,
                block.value_is_null,
                block.value_bytes,
                block.value_offsets,
                block.timestamps_ms,
                self._limits.record_bytes,
                self._limits.client_id_bytes,
                self._skew_ms,
                *self._tables,
                accepted,
                timestamp_ms,
                modality,
                numbers,
                category_start,
                category_length,
                category_hash,
                item_start,
                item_count,
                item_hash,
                item_group,
                extra,
                np.empty(self._n_fields + len(self._tables.modality_required), np.int64),
                np.empty(self._n_fields, np.int64),
                np.empty(1, np.int64),
            )
            if len(item_hash):
                item_hash, item_group = item_hash[:items].copy(), item_group[:items].copy()
            if used:
                text = np.concatenate((text, extra[:used]))
                text.flags.writeable = False
        rejected: list[Rejected] = []
        if regular < n:
            rest = np.flatnonzero(~accepted)
            more = bytearray()
            listed: list[tuple[int, bytes]] = []
            for row in rest.tolist():
                try:
                    event = self._reader.read(
                        block.key(row),
                        block.value(row),
                        int(block.timestamps_ms[row]),
                        self._default_format if formats is None else formats[row],
                    )
                except RecordError as error:
                    rejected.append(Rejected(row, error.reason, str(error)))
                    continue
                accepted[row] = True
                timestamp_ms[row] = event.timestamp_ms
                modality[row] = event.modality
                for column, number in event.numbers:
                    numbers[row, column] = number
                for column, value in event.categories:
                    category_start[row, column] = len(text) + len(more)
                    category_length[row, column] = len(value)
                    more += value
                for column, found in event.items:
                    item_start[row, column] = len(item_hash) + len(listed)
                    item_count[row, column] = len(found)
                    listed += found
            if listed:
                hashes = [hash_bytes(value) for _, value in listed]
                item_hash = np.concatenate((item_hash, np.array(hashes, dtype=np.uint64)))
                item_group = np.concatenate((item_group, np.array([group for group, _ in listed], dtype=np.int32)))
            if more:
                text = np.concatenate((text, np.frombuffer(bytes(more), dtype=np.uint8)))
                text.flags.writeable = False
            hash_rows(rest, text, category_start, category_length, category_hash)
        return EventColumns(
            n=n,
            accepted=accepted,
            keys=_packed_keys(block) if regular < n else _checked_keys(block),
            offsets=block.offsets,
            timestamp_ms=timestamp_ms,
            modality=modality,
            numbers=numbers,
            text=text,
            category_start=category_start,
            category_length=category_length,
            category_hash=category_hash,
            item_start=item_start,
            item_count=item_count,
            item_hash=item_hash,
            item_group=item_group,
            rejected=rejected,
        )

    def _formats(self, block: RecordBlock) -> list[Format] | None:
        if block.headers is None:
            return None
        default = self._default_format
        return [format_of(headers, default) if headers else default for headers in block.headers]


def _packed_keys(block: RecordBlock) -> PackedKeys:
    """The block's keys as store keys; what cannot be one, and so was not accepted, gets a stand-in."""
    lengths = np.diff(block.key_offsets)
    if len(lengths) and (lengths.min() < 1 or lengths.max() > MAX_KEY_BYTES):
        raw = block.key_bytes.tobytes()
        edges = block.key_offsets.tolist()
        keys = [raw[a:b] for a, b in itertools.pairwise(edges)]
        return PackedKeys.from_list([key if 1 <= len(key) <= MAX_KEY_BYTES else b"-" for key in keys])
    return _checked_keys(block)


def _checked_keys(block: RecordBlock) -> PackedKeys:
    """The block's keys, each of which is a client id."""
    return PackedKeys.checked(block.key_bytes.copy(), block.key_offsets.copy())


class _Tables(NamedTuple):
    """The schema as arrays, in the order in which `decode_regular` takes them."""

    modality_names: NDArray[np.uint8]
    modality_name_offsets: NDArray[np.int64]
    modality_fields: NDArray[np.int64]
    modality_required: NDArray[np.int64]
    field_names: NDArray[np.uint8]
    field_name_offsets: NDArray[np.int64]
    field_types: NDArray[np.int64]
    field_required: NDArray[np.int64]
    field_columns: NDArray[np.int64]
    field_max_bytes: NDArray[np.int64]
    field_max_items: NDArray[np.int64]
    field_minimum: NDArray[np.float64]
    field_maximum: NDArray[np.float64]


def _tables(schema: Schema) -> _Tables:
    kinds = {"number": NUMBER, "category": CATEGORY, "text": TEXT, "items": ITEMS}
    fields = [field for modality in schema.modalities for field in modality.fields.values()]
    modality_names, modality_name_offsets = _names(schema.modality_names)
    field_names, field_name_offsets = _names([field.name for field in fields])
    counts = [0, *(len(modality.fields) for modality in schema.modalities)]
    return _Tables(
        modality_names,
        modality_name_offsets,
        np.cumsum(counts, dtype=np.int64),
        np.array([len(modality.required) for modality in schema.modalities], dtype=np.int64),
        field_names,
        field_name_offsets,
        np.array([kinds[field.type] for field in fields], dtype=np.int64),
        np.array([field.required for field in fields], dtype=np.int64),
        np.array([field.column for field in fields], dtype=np.int64),
        np.array([field.max_bytes for field in fields], dtype=np.int64),
        np.array([field.max_items for field in fields], dtype=np.int64),
        np.array([field.minimum for field in fields], dtype=np.float64),
        np.array([field.maximum for field in fields], dtype=np.float64),
    )


def _names(names: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    encoded = [name.encode("utf-8") for name in names]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets


def encode_event(
    client_id: str,
    timestamp_ms: int,
    modality: str,
    fields: Mapping[str, FieldValue],
    event_id: str | None = None,
) -> bytes:
    """One event as MessagePack, for the topic `events` under the key `client_id` in UTF-8.

    Nothing is checked against settings here: whoever reads the event does that.
    """
    return msgspec.msgpack.encode(_event(client_id, timestamp_ms, modality, fields, event_id))


def encode_event_json(
    client_id: str,
    timestamp_ms: int,
    modality: str,
    fields: Mapping[str, FieldValue],
    event_id: str | None = None,
) -> bytes:
    """One event as JSON, to be sent with the header `content-type: application/json`.

    Raises
    ------
    ValueError: a number is not finite, which JSON cannot hold.
    """
    event = _event(client_id, timestamp_ms, modality, fields, event_id)
    return json.dumps(event, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def _event(
    client_id: str, timestamp_ms: int, modality: str, fields: Mapping[str, FieldValue], event_id: str | None
) -> dict[str, Any]:
    event: dict[str, Any] = {"client_id": client_id, "timestamp_ms": timestamp_ms, "modality": modality}
    if event_id is not None:
        event["event_id"] = event_id
    # Last, so that a reader in one pass knows the modality before its fields.
    event["fields"] = dict(fields)
    return event
