"""Kafka record batches, as a broker sent them, read into blocks: no Python object for each record.

Guaranteed: every record at or after the position is given out once, in offset order, with the bytes that were sent;
records of aborted transactions are left out where only committed ones are asked for, control records always. A batch
that is damaged raises when everything before it has been given out; nothing outside the bytes given is read. Records
are parsed once, however many blocks they are given out in. Not guaranteed: anything about batches of formats 0 and 1
beyond what aiokafka does with them, one object a record. Layout: Kafka's protocol guide, "Record Batch".
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import numpy as np
from aiokafka.codec import gzip_decode, lz4_decode, snappy_decode, zstd_decode
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from numpy.typing import NDArray

from stream.errors import BrokerError
from stream.wire.block import Headers, RecordBlock
from stream.wire.checksum import crc32c
from stream.wire.record_reader_kernel import (
    CHECKED_FROM,
    CODEC,
    CONTROL,
    FAULTS,
    HEADER_BYTES,
    LEAST_RECORD_BYTES,
    MOST_OFFSET,
    TRANSACTIONAL,
    count_undamaged,
    pack_records,
    plan_batches,
    read_batches,
    read_headers,
    read_records,
)

__all__ = ["RecordReader", "load_kernels"]

_ALL_ONES = 0xFFFFFFFF
#: Version 0, kind 0.
_ABORT = bytes(4)
_DECODERS: Final[dict[int, Callable[[Any], bytes]]] = {
    1: gzip_decode,
    2: snappy_decode,
    3: lz4_decode,
    4: zstd_decode,
}


class _Batch(NamedTuple):
    """One row of `read_batches`."""

    begin: int
    end: int
    magic: int
    whole: int
    base: int
    crc: int
    attributes: int
    last_delta: int
    first_ms: int
    greatest_ms: int
    producer: int
    records: int

    @property
    def next_offset(self) -> int:
        return self.base + self.last_delta + 1


class _Found(NamedTuple):
    """Records of some batches: where they lie in `text`, as `read_records` tells."""

    text: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    timestamps_ms: NDArray[np.int64]
    spans: NDArray[np.int64]


class RecordReader:
    """What one fetch returned of one partition.

    Parameters
    ----------
    data: the record set of a fetch response: whole batches, the last of which may be cut off.
    position: the offset asked for; a batch may begin before it.
    check_crcs: whether to compare checksums.
    aborted: (producer id, first offset) of each aborted transaction, to read only what is committed; None reads
        everything.
    name: of the partition, for errors.
    """

    def __init__(
        self,
        data: bytes,
        position: int,
        *,
        check_crcs: bool = True,
        aborted: Iterable[tuple[int, int]] | None = None,
        name: str = "a partition",
    ) -> None:
        self.position = position
        """Offset to fetch next, or to go on from in here."""
        self._data = data
        self._bytes = np.frombuffer(data, np.uint8)
        self._batches = read_batches(self._bytes)
        self._next = 0
        self._check_crcs = check_crcs
        self._aborted = None if aborted is None else sorted(aborted, key=lambda one: one[1])
        self._aborting: set[int] = set()
        self._name = name
        self._regions, run_end, before = plan_batches(self._batches, aborted is not None)
        self._run_end: list[int] = run_end.tolist()
        self._before: list[int] = before.tolist()
        self._failure: BrokerError | None = None
        self._found: _Found | None = None
        self._given = 0
        self._floor = position

    @property
    def done(self) -> bool:
        """Whether everything has been given out."""
        return self._found is None and self._failure is None and self._next == len(self._batches)

    def take(self, max_records: int) -> RecordBlock | None:
        """The next records, at most so many; None when there are no more.

        Where more are at hand than fit into one block, the next blocks are of about equal size.

        Raises
        ------
        BrokerError: a batch is damaged, or of a format or codec that does not exist; every later call raises too.
        """
        while self._found is None:
            if self._failure is not None:
                raise self._failure
            if self._next == len(self._batches):
                return None
            self._read(max_records)
            if self._found is None:
                self.position = self._floor
        found, begin = self._found, self._given
        left = len(found.offsets) - begin
        self._given = begin + -(-left // -(-left // max_records))
        block = _block(found, slice(begin, self._given))
        if self._given == len(found.offsets):
            self._found = None
            self.position = self._floor
        else:
            self.position = int(block.offsets[-1]) + 1
        return block

    def _read(self, max_records: int) -> None:
        """Parse the next batches: a batch as a whole, and about as many records as asked for."""
        parts: list[Any] = []
        size = count = 0
        begin = self._next
        while self._next < len(self._batches):
            at = self._next
            stop = self._stop(count, max_records)
            if stop == at:
                break
            try:
                if self._run_end[at] > at:
                    stop = self._check_run(stop)
                    first = int(self._batches[at, 0])
                    parts.append(memoryview(self._data)[first : self._batches[stop - 1, 1]])
                    self._regions[at:stop, :2] += size - first
                else:
                    batch = self._batch(at)
                    self._check(batch)
                    if batch.magic < 2:
                        if not parts:
                            self._give_out(self._read_legacy(batch))
                            self._next += 1
                        break
                    records = b"" if self._is_passed_over(batch) else self._records_of(batch)
                    parts.append(records)
                    self._regions[at, :3] = (size, size + len(records), batch.records if records else 0)
            except BrokerError as failure:
                self._failure = failure
                break
            self._next = stop
            size += len(parts[-1])
            count += self._before[stop] - self._before[at]
        if parts:
            text = np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), np.uint8)
            found, self._floor, fault, faulty = _parse(text, self._regions[begin : self._next], self._floor)
            if fault:
                self._failure = self._error(self._batch(begin + faulty), fault)
            self._give_out(found)

    def _stop(self, count: int, max_records: int) -> int:
        """The batch to read up to: those that fit, and one more if they are less than half of what is asked for."""
        at, before = self._next, self._before
        end = max(self._run_end[at], at + 1)
        stop = bisect_right(before, before[at] + max_records - count, at, end + 1) - 1
        if at - 1 < stop < end and 2 * (count + before[stop] - before[at]) < max_records:
            stop += 1
        return max(stop, at)

    def _give_out(self, found: _Found) -> None:
        if len(found.offsets):
            self._found, self._given = found, 0

    def _batch(self, number: int) -> _Batch:
        return _Batch._make(self._batches[number].tolist())

    def _check_run(self, stop: int) -> int:
        """The batch up to which plain batches are undamaged.

        Raises
        ------
        BrokerError: the first one is damaged.
        """
        if not self._check_crcs:
            return stop
        undamaged = self._next + int(count_undamaged(self._bytes, self._batches[self._next : stop]))
        if undamaged == self._next:
            self._check(self._batch(undamaged))
        return undamaged

    def _check(self, batch: _Batch) -> None:
        """Raise for a batch that is wrong as a whole."""
        if not batch.whole:
            raise self._error(batch, f"{batch.end - batch.begin} bytes are too few for a batch and its header")
        if batch.magic < 2:
            return
        if batch.magic > 2:
            raise self._error(batch, f"format {batch.magic}: expected 0 to 2")
        if self._check_crcs:
            crc = _ALL_ONES ^ int(crc32c(_ALL_ONES, self._bytes, batch.begin + CHECKED_FROM, batch.end))
            if crc != batch.crc:
                raise self._error(batch, f"its CRC-32C is {crc:#010x}: expected {batch.crc:#010x}, as its header says")
        if not 0 <= batch.base < MOST_OFFSET or batch.last_delta < -1:
            raise self._error(batch, f"last offset {batch.last_delta} after its first: expected none below 0")

    def _is_passed_over(self, batch: _Batch) -> bool:
        """Whether a batch holds no records for users: control records, or those of an aborted transaction."""
        control = bool(batch.attributes & CONTROL)
        if self._aborted is None:
            return control
        while self._aborted and self._aborted[0][1] <= batch.base:
            self._aborting.add(self._aborted.pop(0)[0])
        if control and self._is_abort_marker(batch):
            # It need not be there: a broker may send the marker of a transaction that wrote nothing here.
            self._aborting.discard(batch.producer)
        return control or bool(batch.attributes & TRANSACTIONAL and batch.producer in self._aborting)

    def _is_abort_marker(self, batch: _Batch) -> bool:
        records = self._records_of(batch)
        region = np.array([[0, len(records), batch.records, batch.base, batch.next_offset, 0, -1]])
        found, _, fault, _ = _parse(np.frombuffer(records, np.uint8), region, batch.base)
        if fault or not len(found.offsets):
            raise self._error(batch, fault or "a control batch without a record")
        # The key is version and kind, 16 bits each; a later version may be longer.
        key = _block(found, slice(0, 1)).key(0)
        return key is not None and key[:4] == _ABORT

    def _records_of(self, batch: _Batch) -> bytes:
        """A batch's records, uncompressed."""
        records = self._data[batch.begin + HEADER_BYTES : batch.end]
        codec = batch.attributes & CODEC
        if codec:
            decode = _DECODERS.get(codec)
            if decode is None:
                raise self._error(batch, f"codec {codec}: expected 0 (none) to {max(_DECODERS)} (zstd)")
            try:
                records = decode(records)
            except Exception as error:  # each codec has errors of its own
                raise self._error(batch, f"its records cannot be decompressed: {error!r}") from error
        if not 0 <= batch.records <= len(records) // LEAST_RECORD_BYTES:
            raise self._error(batch, f"{batch.records} records in {len(records)} bytes")
        return records

    def _read_legacy(self, batch: _Batch) -> _Found:
        """The records of a batch of format 0 or 1."""
        data = self._data[batch.begin : batch.end]
        if self._check_crcs:
            stated, crc = int.from_bytes(data[12:16]), zlib.crc32(data[16:])
            if crc != stated:
                raise self._error(batch, f"its CRC is {crc:#010x}: expected {stated:#010x}, as its header says")
        try:
            one = MemoryRecords(data).next_batch()
            records = [record for record in one if record.offset >= self._floor]
        except Exception as error:  # aiokafka's parser and each codec have errors of their own
            raise self._error(batch, f"its records cannot be read: {error!r}") from error
        keys_and_values = [item for record in records for item in (record.key, record.value)]
        lengths = np.array([-1 if item is None else len(item) for item in keys_and_values], np.int64).reshape(-1, 2)
        edges = np.concatenate(([0], np.cumsum(np.maximum(lengths, 0).ravel())))[:-1].reshape(-1, 2)
        self._floor = max(self._floor, one.next_offset, *(record.offset + 1 for record in records))
        return _Found(
            np.frombuffer(b"".join(item or b"" for item in keys_and_values), np.uint8),
            np.array([record.offset for record in records], np.int64),
            np.array([-1 if record.timestamp is None else record.timestamp for record in records], np.int64),
            np.column_stack((edges[:, 0], lengths[:, 0], edges[:, 1], lengths[:, 1], np.full(len(records), -1))),
        )

    def _error(self, batch: _Batch, text: str) -> BrokerError:
        return BrokerError(f"{self._name}: record batch at offset {batch.base} is damaged: {text}")


def load_kernels() -> None:
    """Compile the kernels, or load them from numba's cache, so that the first fetch does not wait for it."""
    # Compressed batches are checked one by one, others in runs.
    for codec in (0, 1):
        builder = DefaultRecordBatchBuilder(2, codec, 0, -1, -1, -1, 1024)
        builder.append(0, 0, b"", bytes(100), [("name", b"value")])
        RecordReader(bytes(builder.build()), 0).take(1)


def _parse(text: NDArray[np.uint8], regions: NDArray[np.int64], floor: int) -> tuple[_Found, int, str, int]:
    """(The records of uncompressed batches, next offset, what is wrong, in which of them)."""
    n = int(regions[:, 2].sum())
    offsets, timestamps_ms, spans = np.empty(n, np.int64), np.empty(n, np.int64), np.empty((n, 5), np.int64)
    n, floor, faulty, fault, at = read_records(text, regions, floor, offsets, timestamps_ms, spans)
    what = f"{FAULTS[fault]} (at byte {at - regions[faulty, 0]} of its records)" if fault else ""
    return _Found(text, offsets[:n], timestamps_ms[:n], spans[:n]), floor, what, faulty


def _block(found: _Found, part: slice) -> RecordBlock:
    spans = found.spans[part]
    keys, values, with_headers = pack_records(found.text, spans)
    headers = _headers(found.text, spans[:, 4]) if with_headers else None
    return RecordBlock.checked(keys, values, found.offsets[part], found.timestamps_ms[part], headers)


def _headers(text: NDArray[np.uint8], starts: NDArray[np.int64]) -> list[Headers | None]:
    """The headers of records, None where the start is -1. A name that is not UTF-8 is read with U+FFFD for what is
    not."""
    raw = text.data
    which = np.flatnonzero(starts >= 0)
    counts, spans = read_headers(text, starts[which])
    pairs = [
        (str(raw[a : a + b], "utf-8", "replace"), None if d < 0 else bytes(raw[c : c + d]))
        for a, b, c, d in spans.tolist()
    ]
    headers: list[Headers | None] = [None] * len(starts)
    end = 0
    for record, count in zip(which.tolist(), counts.tolist(), strict=True):
        headers[record] = pairs[end : end + count]
        end += count
    return headers
