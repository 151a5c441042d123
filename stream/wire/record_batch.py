"""Kafka record batches, format 2, written from arrays: no Python object for each record.

Guaranteed: `RecordBatch.seal` gives the bytes that a broker takes and any Kafka client reads: header, checksum and
records in the order they were added, at offsets one after the other. Not checked: that the broker allows a batch
of that size. Source of the layout: Kafka's protocol guide, "Record Batch".
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final, Literal

import numpy as np
from aiokafka.codec import gzip_encode, lz4_encode, snappy_encode, zstd_encode
from numpy.typing import NDArray

from stream.borrowing import read_only
from stream.store.keys import PackedKeys
from stream.wire.checksum import crc32c
from stream.wire.record_batch_kernel import RECORD_OVERHEAD, write_records
from stream.wire.values import PackedValues

__all__ = ["Codec", "RecordBatch"]

Codec = Literal["none", "gzip", "snappy", "lz4", "zstd"]

#: Base offset (the broker's), length, leader epoch (the broker's), format.
_HEAD: Final = struct.Struct(">qiib")
#: Attributes, last offset delta, first and last time, producer id and epoch, base sequence, records: what the
#: checksum between the two covers, with the records.
_TAIL: Final = struct.Struct(">hiqqqhii")
_CRC: Final = struct.Struct(">I")
_HEADER_BYTES: Final = _HEAD.size + _CRC.size + _TAIL.size
_NO_VALUES: Final = (np.empty(0, np.uint8), np.zeros(1, np.int64))

#: Attribute bits, and the levels that librdkafka and the broker use. LZ4's higher levels take ten times as long to
#: save half a per cent of an embedding.
_CODECS: Final[dict[str, tuple[int, Callable[[bytes], bytes]]]] = {
    "gzip": (1, lambda data: gzip_encode(data, 6)),
    "snappy": (2, snappy_encode),
    "lz4": (3, lambda data: lz4_encode(data, 1)),
    "zstd": (4, lambda data: zstd_encode(data, 3)),
}


class RecordBatch:
    """Records of one partition, until they are sealed.

    Parameters
    ----------
    limit: most bytes of header and uncompressed records; a single larger record is taken all the same, alone.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit - _HEADER_BYTES
        self._chunks: list[NDArray[np.uint8]] = []
        self._first_ms = self._last_ms = 0
        self.count = 0
        self.size = _HEADER_BYTES

    def add(self, keys: PackedKeys, values: PackedValues | None, first: int, now_ms: int) -> int:
        """Take records from row `first` on as long as they fit; None for values writes tombstones.

        Returns the row after the last one taken.

        Raises
        ------
        ValueError: not as many values as keys.
        """
        if values is not None and len(values) != len(keys):
            raise ValueError(f"{len(values)} values for {len(keys)} keys: expected one each")
        if not self.count:
            self._first_ms = self._last_ms = now_ms
        taken, chunk = self._write(keys, values, first, now_ms, self._left)
        if taken == first and first < len(keys) and not self.count:
            one = PackedKeys(keys.buffer, keys.offsets[: first + 2])
            taken, chunk = self._write(one, values, first, now_ms, np.iinfo(np.int64).max)
        if taken > first:
            self._chunks.append(chunk)
            self._left -= len(chunk)
            self._last_ms = max(self._last_ms, now_ms)
            self.count += taken - first
            self.size += len(chunk)
        return taken

    def _write(
        self, keys: PackedKeys, values: PackedValues | None, first: int, now_ms: int, limit: int
    ) -> tuple[int, NDArray[np.uint8]]:
        bytes_left = int(keys.offsets[-1] - keys.offsets[first]) + RECORD_OVERHEAD * (len(keys) - first)
        if values is not None:
            bytes_left += int(values.offsets[len(keys)] - values.offsets[first])
        buffer, offsets = _NO_VALUES if values is None else (values.buffer, values.offsets)
        out = np.empty(max(0, min(bytes_left, limit)), np.uint8)
        taken, written = write_records(
            read_only(keys.buffer),
            read_only(keys.offsets),
            read_only(buffer),
            read_only(offsets),
            values is not None,
            first,
            self.count,
            now_ms - self._first_ms,
            limit,
            out,
        )
        return int(taken), out[:written]

    def seal(self, codec: Codec, producer_id: int, producer_epoch: int, base_sequence: int) -> bytes:
        """The batch as it goes over the wire; nothing can be added afterwards."""
        records = b"".join(chunk.data for chunk in self._chunks)
        self._chunks.clear()
        self._left = 0
        attributes = 0
        if codec != "none":
            attributes, compress = _CODECS[codec]
            records = compress(records)
        tail = _TAIL.pack(
            attributes,
            self.count - 1,
            self._first_ms,
            self._last_ms,
            producer_id,
            producer_epoch,
            base_sequence,
            self.count,
        )
        state = 0xFFFFFFFF
        for part in (tail, records):
            state = int(crc32c(state, np.frombuffer(part, np.uint8), 0, len(part)))
        length = _HEADER_BYTES + len(records) - 12
        return b"".join([_HEAD.pack(0, length, -1, 2), _CRC.pack(state ^ 0xFFFFFFFF), tail, records])
