"""The row encoding, the same bytes on disk, in the changelog and in snapshots.

Layout, little-endian: format u8, kind u8, reserved u16, width u32, events_seen i64, last_event_ms i64,
applied_offset i64, then float32[width] and, where the table has one, float32[state_width] of optimizer state.
A waiting row (a key that is not admitted yet) has width 0 and is followed by the events held for it.
Format 2, of tables whose rows live differently long: the six bytes of reserved and width hold how long the row lives
after last_event_ms, in milliseconds, 2^48 - 1 for ever.

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
    "accounts",
    "decode_rows",
    "encode_headers",
    "encode_rows",
    "lives_of",
    "pack_held",
    "read_headers",
    "unpack_held",
    "without_offsets",
]

FORMAT = 1
FORMAT_LIVES = 2
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


def _fill(header: npt.NDArray[np.void], kind: int, width: int, account: Int64) -> None:
    header["kind"] = kind
    header["events_seen"] = account[:, 0]
    header["last_event_ms"] = account[:, 1]
    header["applied_offset"] = account[:, 2]
    life = account[:, 3]
    lives = life != 0
    header["format"] = np.where(lives, FORMAT_LIVES, FORMAT)
    header["reserved"] = life & 0xFFFF
    header["width"] = np.where(lives, life >> 16, width)


def lives_of(headers: npt.NDArray[np.void]) -> Int64:
    """How long rows live after their last_event_ms, int64[n] in milliseconds; 0 where they do not say."""
    life = headers["reserved"] | headers["width"].astype(np.int64) << 16
    return np.where(headers["format"] == FORMAT_LIVES, life, 0)


def accounts(headers: npt.NDArray[np.void]) -> Int64:
    """What headers say, int64[n, 4]; see Table.account."""
    columns = [headers[name] for name in ("events_seen", "last_event_ms", "applied_offset")]
    return np.stack([*columns, lives_of(headers)], axis=1)


def encode_rows(account: Int64, floats: Float32, width: int) -> list[bytes]:
    """Encoded rows of account int64[n, 4] (see Table.account) and floats float32[n, width + state_width]."""
    n = account.shape[0]
    size = HEADER_BYTES + 4 * floats.shape[1]
    out = np.empty((n, size), np.uint8)
    header = np.empty(n, HEADER)
    _fill(header, ROW, width, account)
    out[:, :HEADER_BYTES] = header.view(np.uint8).reshape(n, HEADER_BYTES)
    out[:, HEADER_BYTES:] = np.ascontiguousarray(floats, np.dtype("<f4")).view(np.uint8).reshape(n, size - HEADER_BYTES)
    data = out.tobytes()
    return [data[i : i + size] for i in range(0, n * size, size)]


def encode_headers(account: Int64, kind: int) -> list[bytes]:
    """Encoded rows without floats, of kind TOMBSTONE or WAITING."""
    header = np.empty(account.shape[0], HEADER)
    _fill(header, kind, 0, account)
    data = header.tobytes()
    return [data[i : i + HEADER_BYTES] for i in range(0, len(data), HEADER_BYTES)]


def read_headers(rows: Sequence[bytes], origin: str) -> npt.NDArray[np.void]:
    """Headers (dtype HEADER, [n]) of encoded rows. Raises StoreError naming `origin` where one is not a row."""
    data = b"".join([row[:HEADER_BYTES] for row in rows])
    if len(data) != len(rows) * HEADER_BYTES:
        raise StoreError(f"{origin}: a row is shorter than {HEADER_BYTES} bytes; it was not written by this store")
    headers = np.frombuffer(data, HEADER)
    bad = np.flatnonzero((headers["format"] != FORMAT) & (headers["format"] != FORMAT_LIVES))
    if bad.size:
        raise StoreError(
            f"{origin}: row format {int(headers['format'][bad[0]])}; this version reads formats {FORMAT} and "
            f"{FORMAT_LIVES}"
        )
    return headers


def decode_rows(rows: Sequence[bytes], width: int, state_width: int, origin: str) -> tuple[Int64, Float32]:
    """Account int64[n, 4] and floats float32[n, width + state_width] of encoded rows of kind ROW.

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
    other_width = header["width"][(header["format"] == FORMAT) & (header["width"] != width)]
    if other_width.shape[0]:
        raise StoreError(f"{origin}: rows of width {int(other_width[0])} in a table of width {width}")
    floats = np.ascontiguousarray(cells[:, HEADER_BYTES:]).view("<f4").astype(np.float32, copy=False)
    return accounts(header), floats.reshape(n, width + state_width)


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
