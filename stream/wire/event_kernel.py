"""The kernel that parses regular MessagePack events straight into columns.

Regular: a MessagePack map with every required key once, known keys only, flat fields of the declared types
within their bounds. The kernel accepts such a record or leaves it, its row blank, to `stream.wire.reader`;
it never decides why a record is bad. It accepts nothing that the reader would refuse, and reads no byte
outside a record.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

from typing import Any

import numpy as np

from stream.borrowing import borrowing
from stream.wire.checks import MAX_TIMESTAMP_MS
from stream.wire.formats import MAX_MEMBERS
from stream.wire.reader import EVENT_ID_BYTES
from stream.wire.scanning import (
    hash_range,
    is_utf8,
    read_array_header,
    read_integer,
    read_map_header,
    read_number,
    read_text,
    same_bytes,
    skip_scalar,
    write_decimal,
)

__all__ = ["CATEGORY", "ITEMS", "NUMBER", "TEXT", "clear_columns", "decode_regular", "hash_rows"]

NUMBER = 0
CATEGORY = 1
TEXT = 2
ITEMS = 3

_CLIENT_ID = np.frombuffer(b"client_id", dtype=np.uint8)
_TIMESTAMP_MS = np.frombuffer(b"timestamp_ms", dtype=np.uint8)
_MODALITY = np.frombuffer(b"modality", dtype=np.uint8)
_FIELDS = np.frombuffer(b"fields", dtype=np.uint8)
_EVENT_ID = np.frombuffer(b"event_id", dtype=np.uint8)
_TRUE_FALSE = np.frombuffer(b"truefalse", dtype=np.uint8)

_HAS_CLIENT_ID = 1
_HAS_TIMESTAMP = 2
_HAS_MODALITY = 4
_HAS_FIELDS = 8
_HAS_EVENT_ID = 16
_HAS_REQUIRED = _HAS_CLIENT_ID | _HAS_TIMESTAMP | _HAS_MODALITY | _HAS_FIELDS


@borrowing(forceinline=True)
def _is_name(values: Any, start: Any, length: Any, names: Any, name_offsets: Any, index: Any) -> Any:
    first = name_offsets[index]
    return length == name_offsets[index + 1] - first and same_bytes(values, start, names, first, length)


@borrowing(forceinline=True)
def _find_name(
    values: Any, start: Any, length: Any, names: Any, name_offsets: Any, first: Any, last: Any, guess: Any
) -> Any:
    """Index in [first, last) of the name that these bytes spell, `guess` tried first; -1 if there is none."""
    if guess >= 0 and _is_name(values, start, length, names, name_offsets, guess):
        return guess
    for index in range(first, last):
        if _is_name(values, start, length, names, name_offsets, index):
            return index
    return -1


@borrowing(forceinline=True)
def _skip_fields(values: Any, position: Any, end: Any) -> Any:
    pairs, position = read_map_header(values, position, end)
    if pairs < 0:
        return -1
    for _ in range(pairs):
        start, length = read_text(values, position, end)
        if length < 0:
            return -1
        position = skip_scalar(values, start + length, end)
        if position < 0:
            return -1
    return position


@borrowing(forceinline=True)
def _category(values: Any, position: Any, end: Any, max_bytes: Any, extra: Any, extra_used: Any) -> Any:
    """Start, length, position after, extra bytes used, of a category; start < 0: at -start - 1 in `extra`.

    Integers and booleans have no text in the record, so theirs is written to `extra`.
    """
    tag = values[position] if position < end else np.uint8(0xC1)
    if tag == 0xC2 or tag == 0xC3:
        first = 0 if tag == 0xC3 else 4
        length = 4 if tag == 0xC3 else 5
        for i in range(length):
            extra[extra_used + i] = _TRUE_FALSE[first + i]
        after = position + 1
    else:
        start, length = read_text(values, position, end)
        if length >= 0:
            if length > max_bytes or not is_utf8(values, start, length):
                return start, length, -1, extra_used
            return start, length, start + length, extra_used
        integer, after = read_integer(values, position, end)
        if after < 0:
            return position, 0, -1, extra_used
        length = write_decimal(integer, extra, extra_used) - extra_used
    if length > max_bytes:
        return position, 0, -1, extra_used
    return -extra_used - 1, length, after, extra_used + length


@borrowing()
def _read_items(
    values: Any,
    position: Any,
    end: Any,
    max_items: Any,
    max_bytes: Any,
    extra: Any,
    extra_used: Any,
    item_hash: Any,
    item_group: Any,
    used: Any,
) -> Any:
    """Position after a list of items (-1: not regular) and how many are in `item_hash` and `item_group` then."""
    first = used
    groups, position = read_array_header(values, position, end)
    if groups < 0 or groups > max_items:
        return -1, first
    for group in range(groups):
        members, after = read_array_header(values, position, end)
        if members < 0:
            members = 1
        elif members == 0 or members > max_items:
            return -1, first
        else:
            position = after
        for _ in range(members):
            if used - first == max_items:
                return -1, first
            # Only the hash of an item is kept: its text in `extra` is written over by the next one.
            start, length, position, _ = _category(values, position, end, max_bytes, extra, extra_used)
            if position < 0:
                return -1, first
            if start < 0:
                item_hash[used] = hash_range(extra, -start - 1, length)
            else:
                item_hash[used] = hash_range(values, start, length)
            item_group[used] = group
            used += 1
    return position, used


@borrowing(forceinline=True)
def _read_fields(
    row: Any,
    modality: Any,
    values: Any,
    position: Any,
    end: Any,
    modality_fields: Any,
    modality_required: Any,
    field_names: Any,
    field_name_offsets: Any,
    field_types: Any,
    field_required: Any,
    field_columns: Any,
    field_max_bytes: Any,
    field_max_items: Any,
    field_minimum: Any,
    field_maximum: Any,
    followers: Any,
    seen_in_row: Any,
    numbers: Any,
    category_start: Any,
    category_length: Any,
    category_hash: Any,
    item_start: Any,
    item_count: Any,
    item_hash: Any,
    item_group: Any,
    item_used: Any,
    extra: Any,
    extra_base: Any,
    extra_used: Any,
) -> Any:
    """Parse the map of fields into one row; the position after it (-1: not regular), extra bytes used."""
    pairs, position = read_map_header(values, position, end)
    if pairs < 0 or pairs > MAX_MEMBERS:
        return -1, extra_used
    first = modality_fields[modality]
    last = modality_fields[modality + 1]
    required = 0
    # Publishers keep to one order of fields, so the field that followed this one last time is tried first.
    previous = modality_fields[-1] + modality
    for _ in range(pairs):
        start, length = read_text(values, position, end)
        if length < 0:
            return -1, extra_used
        field = _find_name(values, start, length, field_names, field_name_offsets, first, last, followers[previous])
        if field < 0 or seen_in_row[field] == row:
            return -1, extra_used
        seen_in_row[field] = row
        followers[previous] = field
        previous = field
        required += field_required[field]
        position = start + length
        column = field_columns[field]
        if field_types[field] == NUMBER:
            number, position = read_number(values, position, end)
            if position < 0 or number < field_minimum[field] or number > field_maximum[field]:
                return -1, extra_used
            numbers[row, column] = number
        elif field_types[field] == CATEGORY:
            start, length, position, extra_used = _category(
                values, position, end, field_max_bytes[field], extra, extra_used
            )
            if position < 0:
                return -1, extra_used
            if start < 0:
                start = -start - 1
                category_hash[row, column] = hash_range(extra, start, length)
                start += extra_base
            else:
                category_hash[row, column] = hash_range(values, start, length)
            category_start[row, column] = start
            category_length[row, column] = length
        elif field_types[field] == ITEMS:
            begin = item_used[0]
            position, item_used[0] = _read_items(
                values,
                position,
                end,
                field_max_items[field],
                field_max_bytes[field],
                extra,
                extra_used,
                item_hash,
                item_group,
                begin,
            )
            if position < 0:
                return -1, extra_used
            item_start[row, column] = begin
            item_count[row, column] = item_used[0] - begin
        else:
            start, length = read_text(values, position, end)
            if length < 0 or length > field_max_bytes[field] or not is_utf8(values, start, length):
                return -1, extra_used
            position = start + length
    if required != modality_required[modality]:
        return -1, extra_used
    return position, extra_used


@borrowing(forceinline=True)
def _clear_row(
    row: Any,
    numbers: Any,
    category_start: Any,
    category_length: Any,
    category_hash: Any,
    item_start: Any,
    item_count: Any,
) -> Any:
    """No field of this record is there."""
    numbers[row, :] = np.nan
    category_start[row, :] = 0
    category_length[row, :] = -1
    category_hash[row, :] = 0
    item_start[row, :] = 0
    item_count[row, :] = -1


@borrowing()
def clear_columns(accepted: Any, timestamp_ms: Any, modalities: Any, *fields: Any) -> Any:
    """Make new columns those of records that are not accepted; `fields` are the last arrays of `_clear_row`."""
    for row in range(len(accepted)):
        accepted[row] = False
        timestamp_ms[row] = 0
        modalities[row] = -1
        _clear_row(row, *fields)


@borrowing()
def decode_regular(
    passed_over: Any,
    key_is_null: Any,
    keys: Any,
    key_offsets: Any,
    value_is_null: Any,
    values: Any,
    value_offsets: Any,
    record_ms: Any,
    record_bytes: Any,
    client_id_bytes: Any,
    skew_ms: Any,
    modality_names: Any,
    modality_name_offsets: Any,
    modality_fields: Any,
    modality_required: Any,
    field_names: Any,
    field_name_offsets: Any,
    field_types: Any,
    field_required: Any,
    field_columns: Any,
    field_max_bytes: Any,
    field_max_items: Any,
    field_minimum: Any,
    field_maximum: Any,
    accepted: Any,
    timestamp_ms: Any,
    modalities: Any,
    numbers: Any,
    category_start: Any,
    category_length: Any,
    category_hash: Any,
    item_start: Any,
    item_count: Any,
    item_hash: Any,
    item_group: Any,
    extra: Any,
    followers: Any,
    seen_in_row: Any,
    item_used: Any,
) -> Any:
    """Fill the rows of regular records in cleared columns and mark them in `accepted`.

    passed_over: bool[n], records that are not looked at; or of length 0, as none is.

    `extra` takes the text of categories that have none in the record: uint8, at least as many bytes as 20 a
    category column and record, and 25 more. Its byte 0 counts as the one after the last of `values`. `item_hash`
    and `item_group` have room for an item a byte of `values`. Scratch: `followers` (fields and modalities),
    `seen_in_row` (fields) and `item_used` (one), int64. The other arrays are those of `EventColumns` and of the
    compiled schema. Returns the numbers of records accepted, of bytes used of `extra` and of items.
    """
    followers[:] = -1
    seen_in_row[:] = -1
    item_used[0] = 0
    found = 0
    n_modalities = len(modality_required)
    extra_base = len(values)
    extra_used = 0
    last_modality = np.int64(0)
    for row in range(len(accepted)):
        if key_is_null[row] or value_is_null[row] or (len(passed_over) > 0 and passed_over[row]):
            continue
        position = value_offsets[row]
        end = value_offsets[row + 1]
        if end - position > record_bytes:
            continue
        pairs, position = read_map_header(values, position, end)
        if pairs < 4 or pairs > 5:
            continue
        extra_before = extra_used
        items_before = item_used[0]
        seen = 0
        moment = np.int64(0)
        modality = np.int64(-1)
        postponed = np.int64(-1)
        regular = True
        for _ in range(pairs):
            start, length = read_text(values, position, end)
            position = start + length
            bit = 0
            if length == 9 and same_bytes(values, start, _CLIENT_ID, 0, 9):
                bit = _HAS_CLIENT_ID
                start, length = read_text(values, position, end)
                position = start + length
                key_start = key_offsets[row]
                regular = (
                    0 < length <= client_id_bytes
                    and length == key_offsets[row + 1] - key_start
                    and same_bytes(values, start, keys, key_start, length)
                    and is_utf8(values, start, length)
                )
            elif length == 12 and same_bytes(values, start, _TIMESTAMP_MS, 0, 12):
                bit = _HAS_TIMESTAMP
                moment, position = read_integer(values, position, end)
                regular = (
                    position >= 0
                    and 0 <= moment <= MAX_TIMESTAMP_MS
                    and not (record_ms[row] > 0 and moment - skew_ms > record_ms[row])
                )
            elif length == 8 and same_bytes(values, start, _MODALITY, 0, 8):
                bit = _HAS_MODALITY
                start, length = read_text(values, position, end)
                position = start + length
                modality = _find_name(
                    values,
                    start,
                    length,
                    modality_names,
                    modality_name_offsets,
                    0,
                    n_modalities,
                    last_modality,
                )
                regular = modality >= 0
            elif length == 6 and same_bytes(values, start, _FIELDS, 0, 6):
                bit = _HAS_FIELDS
                if modality < 0:
                    postponed = position
                    position = _skip_fields(values, position, end)
                else:
                    position, extra_used = _read_fields(
                        row,
                        modality,
                        values,
                        position,
                        end,
                        modality_fields,
                        modality_required,
                        field_names,
                        field_name_offsets,
                        field_types,
                        field_required,
                        field_columns,
                        field_max_bytes,
                        field_max_items,
                        field_minimum,
                        field_maximum,
                        followers,
                        seen_in_row,
                        numbers,
                        category_start,
                        category_length,
                        category_hash,
                        item_start,
                        item_count,
                        item_hash,
                        item_group,
                        item_used,
                        extra,
                        extra_base,
                        extra_used,
                    )
                regular = position >= 0
            elif length == 8 and same_bytes(values, start, _EVENT_ID, 0, 8):
                bit = _HAS_EVENT_ID
                start, length = read_text(values, position, end)
                position = start + length
                regular = 0 <= length <= EVENT_ID_BYTES and is_utf8(values, start, length)
            if bit == 0 or seen & bit != 0:
                regular = False
            if not regular:
                break
            seen |= bit
        if regular and (seen & _HAS_REQUIRED != _HAS_REQUIRED or position != end):
            regular = False
        if regular and postponed >= 0:
            after, extra_used = _read_fields(
                row,
                modality,
                values,
                postponed,
                end,
                modality_fields,
                modality_required,
                field_names,
                field_name_offsets,
                field_types,
                field_required,
                field_columns,
                field_max_bytes,
                field_max_items,
                field_minimum,
                field_maximum,
                followers,
                seen_in_row,
                numbers,
                category_start,
                category_length,
                category_hash,
                item_start,
                item_count,
                item_hash,
                item_group,
                item_used,
                extra,
                extra_base,
                extra_used,
            )
            regular = after >= 0
        if regular:
            found += 1
            accepted[row] = True
            timestamp_ms[row] = moment
            modalities[row] = modality
            last_modality = modality
        else:
            extra_used = extra_before
            item_used[0] = items_before
            _clear_row(row, numbers, category_start, category_length, category_hash, item_start, item_count)
    return found, extra_used, item_used[0]


@borrowing()
def hash_rows(rows: Any, text: Any, category_start: Any, category_length: Any, category_hash: Any) -> Any:
    """Hash the categories of some rows; absent ones keep hash 0."""
    for row in rows:
        for column in range(category_start.shape[1]):
            if category_length[row, column] >= 0:
                category_hash[row, column] = hash_range(text, category_start[row, column], category_length[row, column])
