"""The row encoding, the same bytes on disk, in the changelog and in snapshots.

Layout, little-endian: format u8, kind u8, reserved u16, width u32, events_seen i64, last_event_ms i64,
applied_offset i64, then float32[width] and, where the table has one, float32[state_width] of optimizer state.
A waiting row (a key that is not admitted yet) has width 0 and is followed by the events held for it.

Guarantees: floats keep their bits. Does not checksum: RocksDB, Kafka and the snapshot file each do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stream.errors import StoreError

__all__ = [
    "FORMAT",
    "HEADER",
    "HEADER_BYTES",
    "ROW",
    "TOMBSTONE",
    "WAITING",
    "decode_rows",
    "encode_headers",
    "encode_rows",
    "pack_held",
    "read_headers",
    "unpack_held",
    "without_offsets",
]

FORMAT = 1
ROW = 0
TOMBSTONE = 1  # on disk only: deleted, not yet a tombstone in the changelog
WAITING = 2

HEADER = np.dtype(
    [
        ("format", "u1"),
        ("kind", "u1"),
        ("reserved", "<u2"),
        ("width", "<u4"),
        ("events_seen", "<i8"),
        ("last_event_ms", "<i8"),
        ("applied_offset", "<i8"),
    ]
)
HEADER_BYTES = HEADER.itemsize

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


def _fill(header: npt.NDArray[np.void], kind: int, width: int, meta: Int64) -> None:
    header["format"] = FORMAT
    header["kind"] = kind
    header["reserved"] = 0
    header["width"] = width
    header["events_seen"] = meta[:, 0]
    header["last_event_ms"] = meta[:, 1]
    header["applied_offset"] = meta[:, 2]


def encode_rows(meta: Int64, floats: Float32, width: int) -> list[bytes]:
    """Encoded rows of meta int64[n, 3] and floats float32[n, width + state_width]."""
    n = meta.shape[0]
    size = HEADER_BYTES + 4 * floats.shape[1]
    out = np.empty((n, size), np.uint8)
    header = np.empty(n, HEADER)
    _fill(header, ROW, width, meta)
    out[:, :HEADER_BYTES] = header.view(np.uint8).reshape(n, HEADER_BYTES)
    out[:, HEADER_BYTES:] = np.ascontiguousarray(floats, np.dtype("<f4")).view(np.uint8).reshape(n, size - HEADER_BYTES)
    data = out.tobytes()
    return [data[i : i + size] for i in range(0, n * size, size)]


def encode_headers(meta: Int64, kind: int) -> list[bytes]:
    """Encoded rows without floats, of kind TOMBSTONE or WAITING."""
    header = np.empty(meta.shape[0], HEADER)
    _fill(header, kind, 0, meta)
    data = header.tobytes()
    return [data[i : i + HEADER_BYTES] for i in range(0, len(data), HEADER_BYTES)]


def read_headers(rows: Sequence[bytes], origin: str) -> npt.NDArray[np.void]:
    """Headers (dtype HEADER, [n]) of encoded rows. Raises StoreError naming `origin` where one is not a row."""
    data = b"".join([row[:HEADER_BYTES] for row in rows])
    if len(data) != len(rows) * HEADER_BYTES:
        raise StoreError(f"{origin}: a row is shorter than {HEADER_BYTES} bytes; it was not written by this store")
    headers = np.frombuffer(data, HEADER)
    bad = np.flatnonzero(headers["format"] != FORMAT)
    if bad.size:
        raise StoreError(f"{origin}: row format {int(headers['format'][bad[0]])}; this version reads format {FORMAT}")
    return headers


def decode_rows(rows: Sequence[bytes], width: int, state_width: int, origin: str) -> tuple[Int64, Float32]:
    """Meta int64[n, 3] and floats float32[n, width + state_width] of encoded rows of kind ROW.

    Raises StoreError naming `origin` where a row has another width than the table.
    """
    n = len(rows)
    size = HEADER_BYTES + 4 * (width + state_width)
    data = b"".join(rows)
    if len(data) != n * size or any(len(row) != size for row in rows):
        other = next((len(row) for row in rows if len(row) != size), size)
        raise StoreError(
            f"{origin}: a row of {other} bytes where width {width} and state_width {state_width} make {size}; "
            "open the table with the widths it was written with, or rebuild it"
        )
    cells = np.frombuffer(data, np.uint8).reshape(n, size)
    header = np.ascontiguousarray(cells[:, :HEADER_BYTES]).view(HEADER).reshape(n)
    if n and int(header["width"].max()) != width:
        raise StoreError(f"{origin}: rows of width {int(header['width'].max())} in a table of width {width}")
    meta = np.stack([header["events_seen"], header["last_event_ms"], header["applied_offset"]], axis=1)
    floats = np.ascontiguousarray(cells[:, HEADER_BYTES:]).view("<f4").astype(np.float32, copy=False)
    return meta, floats.reshape(n, width + state_width)


def pack_held(events: Sequence[bytes]) -> bytes:
    """Held events as one byte string: each with its length (u32) before it."""
    return b"".join([len(event).to_bytes(4, "little") + event for event in events])


def unpack_held(data: bytes) -> list[bytes]:
    """Inverse of pack_held."""
    events: list[bytes] = []
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        events.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return events


def without_offsets(rows: Sequence[bytes]) -> list[bytes]:
    """The same records with applied_offset -1."""
    none = (-1).to_bytes(8, "little", signed=True)
    return [row[: HEADER_BYTES - 8] + none + row[HEADER_BYTES:] for row in rows]
