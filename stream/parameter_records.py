"""Records of the parameters topic: rows of category tables, and the marker that closes a version.

Guaranteed: what is decoded is what was encoded; anything else raises ParametersError. Tensors have a codec of their
own in `stream.model.parameters`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgpack

from stream.errors import ParametersError
from stream.model.rows import row_hash

__all__ = [
    "MARKER_KEY",
    "Headers",
    "Marker",
    "TableState",
    "Tag",
    "decode_marker",
    "decode_row",
    "encode_marker",
    "encode_row",
    "is_row",
    "row_headers",
    "row_key",
    "rows_checksum",
]

MARKER_KEY = b"version"
_ROW_PREFIX = b"row/"
_VERSION_HEADER = "version"
#: Of markers; 1 had no tables.
_FORMAT = 2
Headers = Sequence[tuple[str, bytes | None]]
#: Epoch and version.
Tag = tuple[int, int]


@dataclass(frozen=True)
class TableState:
    """A table at one version: written from nothing in version `since`, `rows` of `width` floats now, and the sum of
    their hashes."""

    since: int
    width: int
    rows: int
    checksum: int


@dataclass(frozen=True)
class Marker:
    """The closing record of a version.

    `tensors`: name to (version it was last written in, checksum of that record). `feedback_ms`: when the feedback
    that is new in this version was published, UTC milliseconds. `tables`: each table by name. `records`, `checksum`:
    number of the version's own row records, nulls among them, and the sum of their hashes.
    """

    epoch: int
    version: int
    previous: int
    tensors: dict[str, tuple[int, int]]
    feedback_ms: tuple[int, ...]
    created_ms: int
    tables: dict[str, TableState] = field(default_factory=dict)
    records: int = 0
    checksum: int = 0

    @property
    def tag(self) -> Tag:
        """Epoch and version, by which versions are in order."""
        return self.epoch, self.version


def encode_marker(marker: Marker) -> bytes:
    """MessagePack map with the marker's names."""
    packed: bytes = msgpack.packb(
        {
            "format": _FORMAT,
            "epoch": marker.epoch,
            "version": marker.version,
            "previous": marker.previous,
            "tensors": {name: list(entry) for name, entry in marker.tensors.items()},
            "tables": {
                name: {"since": one.since, "width": one.width, "rows": one.rows, "checksum": one.checksum}
                for name, one in marker.tables.items()
            },
            "records": marker.records,
            "checksum": marker.checksum,
            "feedback_ms": list(marker.feedback_ms),
            "created_ms": marker.created_ms,
        }
    )
    return packed


def decode_marker(record: bytes) -> Marker:
    """Raises ParametersError when the record is not a marker, or of a later format."""
    try:
        value = msgpack.unpackb(record)
        written = value.get("format", 1)
        if written not in (1, _FORMAT):
            raise ParametersError(
                f"a version marker has format {written!r}, this release reads 1 to {_FORMAT}: use the release that "
                f"wrote it, or a later one"
            )
        return Marker(
            epoch=int(value["epoch"]),
            version=int(value["version"]),
            previous=int(value["previous"]),
            tensors={str(name): (int(v), int(c)) for name, (v, c) in value["tensors"].items()},
            feedback_ms=tuple(int(t) for t in value["feedback_ms"]),
            created_ms=int(value["created_ms"]),
            tables={
                str(name): TableState(int(t["since"]), int(t["width"]), int(t["rows"]), int(t["checksum"]))
                for name, t in value.get("tables", {}).items()
            },
            records=int(value.get("records", 0)),
            checksum=int(value.get("checksum", 0)),
        )
    except (ValueError, KeyError, TypeError, AttributeError, msgpack.UnpackException) as error:
        raise ParametersError(f"a version marker cannot be read: {error}") from error


def row_key(table: str, key: bytes) -> bytes:
    """The Kafka key of a row."""
    return _ROW_PREFIX + table.encode() + b"/" + key


def encode_row(row: bytes) -> bytes:
    """The record of a row, float32 little-endian: a MessagePack map."""
    packed: bytes = msgpack.packb({"row": row})
    return packed


def row_headers(epoch: int, version: int) -> list[tuple[str, bytes]]:
    """Which version a row, or its null, belongs to."""
    return [(_VERSION_HEADER, b"%d/%d" % (epoch, version))]


def rows_checksum(rows: Iterable[tuple[str, bytes, bytes | None]]) -> int:
    """Sum of the hashes of a version's own row records: table, key, and row or None."""
    return sum(row_hash(row_key(table, key), row or b"") for table, key, row in rows) % 2**64


def is_row(key: bytes) -> bool:
    """Whether a Kafka key is that of a row."""
    return key.startswith(_ROW_PREFIX)


def decode_row(key: bytes, value: bytes | None, headers: Headers) -> tuple[str, bytes, bytes | None, Tag]:
    """Table, key, row (None: taken away), epoch and version.

    Raises
    ------
    ParametersError: the record is not what `encode_row` and `row_headers` write.
    """
    try:
        table, _, own = key[len(_ROW_PREFIX) :].partition(b"/")
        epoch, _, version = dict(headers)[_VERSION_HEADER].partition(b"/")  # type: ignore[union-attr]
        row = None if value is None else msgpack.unpackb(value)["row"]
        if row is not None and not isinstance(row, bytes):
            raise ValueError(f"row is of type {type(row).__name__}")
        return table.decode(), own, row, (int(epoch), int(version))
    except (ValueError, KeyError, TypeError, AttributeError, msgpack.UnpackException) as error:
        raise ParametersError(f"a row of the parameters topic cannot be read: {error!r}") from error
