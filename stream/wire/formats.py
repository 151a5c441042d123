"""Bytes of one record to a map, strictly: MessagePack, or JSON where a header or the topic says so.

Guarantees: `read_map` returns a map with text keys, or raises `RecordError`, for any bytes whatever. Refused
are trailing bytes, duplicate keys, invalid UTF-8, nesting beyond `MAX_DEPTH`, and in JSON `NaN` and
`Infinity`. Memory is bounded by a small multiple of the record's length: a header that announces a billion
items is refused before anything is set aside for them.
"""

from __future__ import annotations

import json
from typing import Any, Final, Literal

import msgpack

from stream.errors import RecordError
from stream.wire.block import Headers
from stream.wire.reasons import (
    DUPLICATE_FIELD,
    INVALID_UTF8,
    NOT_A_MAP,
    NULL_VALUE,
    TOO_DEEP,
    TOO_LARGE,
    UNDECODABLE,
    WRONG_TYPE,
    refusal,
    show,
)

__all__ = ["MAX_DEPTH", "MAX_MEMBERS", "Format", "format_of", "read_map"]

Format = Literal["msgpack", "json"]

#: Containers inside containers that a record may have; a valid one has two.
MAX_DEPTH: Final = 32

#: Members of one MessagePack container. Memory is set aside for as many as a header announces, at every
#: level of nesting.
MAX_MEMBERS: Final = 4096

_MEDIA_TYPES: Final[dict[str, Format]] = {
    "application/json": "json",
    "application/msgpack": "msgpack",
    "application/x-msgpack": "msgpack",
    "application/vnd.msgpack": "msgpack",
}


def format_of(headers: Headers, default: Format) -> Format:
    """How a record is written: by its last `content-type` header if that names a known type, else `default`.

    Case and parameters (`; charset=utf-8`) of the header do not matter.
    """
    found = default
    for name, value in headers:
        if value is not None and name.lower() == "content-type":
            media_type = value.split(b";", 1)[0].strip().lower().decode("latin-1")
            found = _MEDIA_TYPES.get(media_type, default)
    return found


def read_map(value: bytes | None, written_as: Format, record_bytes: int) -> dict[str, Any]:
    """The map that a record's value holds.

    Raises
    ------
    RecordError: `null_value`, `too_large` (longer than `record_bytes`), `undecodable`, `invalid_utf8`,
        `too_deep`, `duplicate_field`, `wrong_type` (a key that is not text), `not_a_map`.
    """
    if value is None:
        raise RecordError(NULL_VALUE, f"value is null: expected a {written_as} map")
    if len(value) > record_bytes:
        raise RecordError(
            TOO_LARGE, f"value has {len(value)} bytes: expected at most limits.record_bytes = {record_bytes}"
        )
    try:
        content = _read_json(value) if written_as == "json" else _read_msgpack(value)
    except UnicodeDecodeError as error:
        raise RecordError(INVALID_UTF8, f"text is not valid UTF-8: {error.reason}: {show(value)}") from error
    except (RecursionError, msgpack.StackError) as error:
        raise _too_deep() from error
    except (ValueError, TypeError, OverflowError) as error:
        raise RecordError(
            UNDECODABLE,
            f"value is not {written_as}: {show(str(error))}: {show(value)}: expected one {written_as} map",
        ) from error
    if _is_too_deep(content):
        raise _too_deep()
    if not isinstance(content, dict):
        raise refusal(NOT_A_MAP, "value", content, "a map")
    return content


def _too_deep() -> RecordError:
    return RecordError(TOO_DEEP, f"value is nested too deeply: expected at most {MAX_DEPTH} levels")


def _is_too_deep(content: Any) -> bool:
    level = [content]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(member for member in item.values() if isinstance(member, dict | list))
            elif isinstance(item, list):
                below.extend(member for member in item if isinstance(member, dict | list))
        if not below:
            return False
        level = below
    return True


def _read_json(value: bytes) -> Any:
    return _JSON.decode(value.decode("utf-8"))


def _read_msgpack(value: bytes) -> Any:
    return msgpack.unpackb(
        value,
        raw=False,
        strict_map_key=False,
        object_pairs_hook=_members,
        max_map_len=MAX_MEMBERS,
        max_array_len=MAX_MEMBERS,
    )


def _members(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise refusal(WRONG_TYPE, "map key", key, "text")
        if key in members:
            raise RecordError(DUPLICATE_FIELD, f"{show(key)} is there twice: expected every name once")
        members[key] = value
    return members


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


_JSON: Final = json.JSONDecoder(object_pairs_hook=_members, parse_constant=_refuse_constant)
