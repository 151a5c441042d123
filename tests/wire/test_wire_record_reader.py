"""Record batches read into blocks: beside aiokafka's own parser, record by record, and on damaged bytes."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from aiokafka.consumer.fetcher import READ_COMMITTED, READ_UNCOMMITTED, PartitionRecords
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.legacy_records import LegacyRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.record.util import calc_crc32c
from aiokafka.structs import TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from stream.errors import BrokerError
from stream.wire.checksum import crc32c, crc32c_by_tables
from stream.wire.record_reader import RecordReader, load_kernels
from tests.support.processes import ROOT

TP = TopicPartition("events", 3)
NOW_MS = 1_700_000_000_000
HEADER_BYTES = 61
ABORT, COMMIT = 0, 1

Record = tuple[int, int, bytes | None, bytes | None, tuple[tuple[str, bytes | None], ...]]


@dataclass(frozen=True)
class Batch:
    """One record batch to make: offsets count from the end of the one before it."""

    codec: int
    #: (offsets left out before it, milliseconds after the first, key, value, headers)
    records: list[tuple[int, int, bytes | None, bytes | None, list[tuple[str, bytes | None]]]]
    gap: int = 0
    left_out_at_end: int = 0
    append_time: bool = False
    producer: int = -1
    marker: int | None = None

    def at(self, base: int) -> tuple[bytes, int]:
        """(its bytes at that base offset, the offset after it)."""
        transactional = self.producer >= 0
        builder = DefaultRecordBatchBuilder(2, self.codec, transactional, self.producer, 0, 0, 2**30)
        offset = last = 0
        records = self.records
        if self.marker is not None:
            records = [(0, 0, struct.pack(">HH", 0, self.marker), struct.pack(">HI", 0, 0), [])]
        for left_out, later_ms, key, value, headers in records:
            offset += left_out
            builder.append(offset, NOW_MS + later_ms, key, value, headers)
            last, offset = offset, offset + 1
        last += self.left_out_at_end
        batch = builder.build()
        struct.pack_into(">q", batch, 0, base)
        (attributes,) = struct.unpack_from(">h", batch, 21)
        attributes |= 0x08 * self.append_time | 0x20 * (self.marker is not None)
        struct.pack_into(">hi", batch, 21, attributes, last)
        return sealed(batch), base + last + 1


def sealed(batch: bytes | bytearray) -> bytes:
    """The batch with the length and the checksum of its content."""
    batch = bytearray(batch)
    struct.pack_into(">i", batch, 8, len(batch) - 12)
    struct.pack_into(">I", batch, 17, calc_crc32c(bytes(batch[21:])))
    return bytes(batch)


def laid(batches: list[Batch], first: int = 0) -> list[bytes]:
    """The batches of a log, one after the other."""
    made, offset = [], first
    for batch in batches:
        data, offset = batch.at(offset + batch.gap)
        made.append(data)
    return made


def simple(*values: bytes, codec: int = 0) -> Batch:
    return Batch(codec, [(0, i, b"k", value, []) for i, value in enumerate(values)])


def as_aiokafka_reads(
    data: bytes, aborted: list[tuple[int, int]] | None, position: int = 0
) -> tuple[list[Record], int]:
    """(records, next offset) by aiokafka's own parser."""
    isolation = READ_UNCOMMITTED if aborted is None else READ_COMMITTED
    parsed = PartitionRecords(TP, MemoryRecords(data), aborted, position, None, None, True, isolation)
    return [(r.offset, r.timestamp, r.key, r.value, tuple(r.headers)) for r in parsed], parsed.next_fetch_offset


def read(reader: RecordReader, most: int) -> list[Record]:
    """All records of all blocks; blocks are as large, and positions where, they should be."""
    records: list[Record] = []
    while (block := reader.take(most)) is not None:
        assert 1 <= len(block) <= most
        for i in range(len(block)):
            offset, time_ms = int(block.offsets[i]), int(block.timestamps_ms[i])
            records.append((offset, time_ms, block.key(i), block.value(i), tuple(block.headers_of(i))))
        assert reader.position > records[-1][0]
    assert reader.done
    return records


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    # Compiling takes longer than hypothesis waits.
    load_kernels()
    for way in (crc32c, crc32c_by_tables):
        way(np.uint32(0), np.frombuffer(b"", np.uint8), 0, 0)


some_bytes = st.one_of(st.none(), st.just(b""), st.binary(max_size=30), st.binary(min_size=100, max_size=300))
some_headers = st.lists(st.tuples(st.text(max_size=5), st.one_of(st.none(), st.binary(max_size=5))), max_size=3)
record = st.tuples(
    st.integers(0, 2),
    st.one_of(st.integers(-2000, 2000), st.integers(-(2**40), 2**40)),
    some_bytes,
    some_bytes,
    st.one_of(st.just([]), some_headers),
)
data_batch = st.builds(
    Batch,
    codec=st.sampled_from([0, 0, 0, 1, 2, 3, 4]),
    records=st.lists(record, min_size=1, max_size=12),
    gap=st.sampled_from([0, 0, 5]),
    left_out_at_end=st.sampled_from([0, 0, 3]),
    append_time=st.booleans(),
    producer=st.sampled_from([-1, -1, 7, 8]),
)
control_batch = st.builds(
    Batch, codec=st.just(0), records=st.just([]), producer=st.sampled_from([7, 8]), marker=st.sampled_from([0, 1])
)
log = st.lists(st.one_of(data_batch, data_batch, control_batch), max_size=8)
aborted_transactions = st.lists(st.tuples(st.sampled_from([7, 8]), st.integers(0, 120)), max_size=4)


@given(log, st.one_of(st.none(), aborted_transactions), st.integers(1, 20), st.integers(0, 60), st.integers(0, 10**10))
def test_given_any_log_then_blocks_hold_what_aiokafka_reads(
    batches: list[Batch], aborted: list[tuple[int, int]] | None, most: int, position: int, first: int
) -> None:
    # Given a log in all codecs, with holes, transactions and their markers, read from anywhere
    data = b"".join(laid(batches, first))
    if aborted is not None:
        aborted = [(producer, first + offset) for producer, offset in aborted]
    expected, end = as_aiokafka_reads(data, aborted, first)

    # When it is read in blocks
    reader = RecordReader(data, first + position, aborted=aborted)
    found = read(reader, most)

    # Then nothing from the position on is lost, doubled or changed
    assert found == [one for one in expected if one[0] >= first + position]
    assert reader.position == max(first + position, end)


@given(st.lists(data_batch, min_size=1, max_size=4), st.data())
def test_given_a_fetch_that_ends_anywhere_then_its_whole_batches_are_read(
    batches: list[Batch], drawn: st.DataObject
) -> None:
    made = laid(batches)
    cut = drawn.draw(st.integers(0, sum(map(len, made))))
    whole = next(n for n in range(len(made), -1, -1) if sum(map(len, made[:n])) <= cut)
    expected, end = as_aiokafka_reads(b"".join(made[:whole]), None)

    reader = RecordReader(b"".join(made)[:cut], 0)

    assert read(reader, 5) == expected
    assert reader.position == end


@given(st.lists(data_batch, min_size=1, max_size=4), st.data(), st.integers(1, 255))
def test_given_a_damaged_batch_then_those_before_it_are_read_and_it_raises(
    batches: list[Batch], drawn: st.DataObject, flipped: int
) -> None:
    # Given a byte changed anywhere that the checksum covers, or in the checksum
    made = laid(batches)
    which = drawn.draw(st.integers(0, len(made) - 1))
    damaged = bytearray(made[which])
    damaged[drawn.draw(st.integers(17, len(damaged) - 1))] ^= flipped
    expected, end = as_aiokafka_reads(b"".join(made[:which]), None)
    reader = RecordReader(b"".join([*made[:which], damaged, *made[which + 1 :]]), 0, name="partition 3 of events")

    # When everything before it is read
    found: list[int] = []
    while len(found) < len(expected):
        found += reader.take(7).offsets.tolist()
    assert found == [one[0] for one in expected]

    # Then it raises, and asking again does not help
    with pytest.raises(BrokerError, match=r"^partition 3 of events: record batch at offset .* CRC-32C is 0x"):
        reader.take(7)
    assert reader.position == end
    assert not reader.done
    with pytest.raises(BrokerError):
        reader.take(7)


@given(st.lists(data_batch, min_size=1, max_size=3), st.lists(st.tuples(st.integers(0), st.integers(1, 255))))
def test_given_any_bytes_then_only_a_broker_error_is_raised(
    batches: list[Batch], changes: list[tuple[int, int]]
) -> None:
    # Given a log with any bytes changed, and no checksums to tell
    data = bytearray(b"".join(laid(batches)))
    for where, flipped in changes:
        data[where % len(data)] ^= flipped
    reader = RecordReader(bytes(data), 0, check_crcs=False, aborted=[(7, 0)])

    # When it is read, then it comes out as blocks that hold together, or is refused
    last = -1
    with contextlib.suppress(BrokerError):
        while (block := reader.take(4)) is not None:
            assert block.offsets[0] > last
            assert (np.diff(block.offsets) > 0).all()
            last = int(block.offsets[-1])
            assert reader.position > last


_GUARDED = """
import ctypes, mmap
import numpy as np
from stream.wire.record_reader_kernel import count_undamaged, pack_records, read_batches, read_headers, read_records
from tests.wire.test_wire_record_reader import HEADER_BYTES, Batch, laid

# Given memory that ends where nothing may be read
size = 8 * mmap.PAGESIZE
memory = mmap.mmap(-1, size + mmap.PAGESIZE)
whole = np.frombuffer(memory, np.uint8)
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mprotect(ctypes.c_void_p(whole.ctypes.data + size), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0

def at_the_edge(data):
    room = whole[size - len(data) : size]
    room[:] = np.frombuffer(data, np.uint8)
    room.flags.writeable = False
    return room

rng = np.random.default_rng(11)

def changed(data, times, cut):
    data = bytearray(data)
    for _ in range(times):
        data[rng.integers(len(data))] = rng.choice([0x00, 0x01, 0x7F, 0x80, 0xFE, 0xFF, rng.integers(256)])
    return data[: rng.integers(len(data) + 1)] if cut else data

headers = [("name", b"value"), ("", None)]
records = [(0, i * 300, bytes(i % 9) if i % 5 else None, bytes(i % 90), headers if i % 3 else []) for i in range(40)]
counts = [40, 3, 1]
good = laid([Batch(0, records[-count:]) for count in counts])
faults = read = 0
for turn in range(6000):
    # When batches are read, damaged or cut off
    text = at_the_edge(changed(b"".join(good[turn % 3 :]), turn % 4, turn % 2))
    batches = read_batches(text)
    count_undamaged(text, batches[(batches[:, 2] == 2) & (batches[:, 3] == 1)])
    # And the records of one, with a count that may be wrong
    which = turn % 3
    text = at_the_edge(changed(good[which][HEADER_BYTES:], turn // 3 % 3, turn % 5 == 0))
    count = counts[which] if turn % 7 else 100
    regions = np.array([[0, len(text), count, 0, 1, 0, -1]])
    n = int(regions[0, 2])
    offsets, times, spans = np.empty(n, np.int64), np.empty(n, np.int64), np.empty((n, 5), np.int64)
    found, _, _, fault, _ = read_records(text, regions, 0, offsets, times, spans)
    faults, read = faults + (fault > 0), read + (fault == 0)
    pack_records(text, spans[:found])
    read_headers(text, spans[:found, 4][spans[:found, 4] >= 0])
# Then this is still alive, and both happened
assert faults > 1000 and read > 1000, (faults, read)
print("alive")
"""


def test_nothing_outside_the_bytes_given_is_read() -> None:
    run = subprocess.run(
        [sys.executable, "-c", _GUARDED],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "alive\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:16] + b"\x03" + b[17:], "format 3: expected 0 to 2"),
        (lambda b: b[:22] + b"\x07" + b[23:], r"codec 7: expected 0 \(none\) to 4 \(zstd\)"),
        (lambda b: b[:22] + b"\x01" + b[23:], "its records cannot be decompressed"),
        (lambda b: b[:22] + b"\x02" + b[23:], "its records cannot be decompressed"),
        (lambda b: b[:22] + b"\x03" + b[23:], "its records cannot be decompressed"),
        (lambda b: b[:22] + b"\x04" + b[23:], "its records cannot be decompressed"),
        (lambda b: b[:57] + b"\x00\x00\x00\x01" + b[61:], "bytes are left over after the last record"),
        (lambda b: b[:57] + b"\x00\x00\x00\x03" + b[61:], "3 records in 18 bytes"),
        (lambda b: b[:61] + b"\x7e" + b[62:], r"a record's length does not fit .* \(at byte 1 of its records\)"),
        (lambda b: b[:61] + b"\xff" * 18, "a record's length does not fit"),
        (lambda b: b[:63] + b"\x80" * 7 + b[70:], "a record's time or offset is not a number"),
        (lambda b: b[:65] + b"\x40" + b[66:], "a record's key does not fit"),
        (lambda b: b[:67] + b"\x40" + b[68:], "a record's value does not fit"),
        (lambda b: b[:69] + b"\x02" + b[70:], "a record's headers do not fit"),
        (lambda b: b[:69] + b"\x01" + b[70:], "a record's headers do not fit"),
        (lambda b: b[:67] + b"\x00\x00" + b[69:], "a record is shorter or longer"),
        (lambda b: b[:57] + b"\x7f\xff\xff\xff" + b[61:], "2147483647 records in 18 bytes"),
        (lambda b: b[:57] + b"\xff\xff\xff\xff" + b[61:], "-1 records in 18 bytes"),
        (lambda b: b"\x80" + b[1:], "last offset 1 after its first"),
        (lambda b: b[:23] + b"\xff\xff\xff\x00" + b[27:], "last offset -256 after its first"),
        (lambda b: b[:60], "60 bytes are too few for a batch and its header"),
    ],
)
def test_what_cannot_be_is_refused_by_what_it_is(change: Any, message: str) -> None:
    # Given a batch that is wrong and has the right checksum, after a good one
    good, batch = laid([simple(b"1"), simple(b"2", b"3")])
    reader = RecordReader(good + sealed(change(batch)), 0)
    assert len(reader.take(10)) == 1

    with pytest.raises(BrokerError, match=message):
        reader.take(10)


def test_a_length_that_leads_nowhere_is_refused() -> None:
    batch = bytearray(laid([simple(b"1")])[0])
    for length in (-1, 0, 13):
        struct.pack_into(">i", batch, 8, length)
        with pytest.raises(BrokerError, match="too few"):
            RecordReader(bytes(batch), 0).take(10)


def test_checksums_are_compared_only_when_asked_for() -> None:
    (batch,) = laid([simple(b"1")])
    damaged = batch[:17] + b"\x00\x00\x00\x00" + batch[21:]

    assert RecordReader(damaged, 0, check_crcs=False).take(10).value(0) == b"1"
    with pytest.raises(BrokerError, match="0x00000000"):
        RecordReader(damaged, 0).take(10)


def test_a_control_batch_without_a_record_is_refused_where_transactions_count() -> None:
    batch = bytearray(Batch(0, [], producer=7, marker=ABORT).at(0)[0][:HEADER_BYTES])
    struct.pack_into(">i", batch, 57, 0)
    data = sealed(batch)

    with pytest.raises(BrokerError, match="a control batch without a record"):
        RecordReader(data, 0, aborted=[]).take(10)
    assert RecordReader(data, 0).take(10) is None


def test_blocks_of_one_fetch_are_of_about_equal_size() -> None:
    # Given small batches and large ones, in a fetch of more than one block
    tens = [simple(*[b"v"] * 10, codec=codec) for codec in [0, 3] * 40]

    def sizes(batches: list[Batch], most: int) -> list[int]:
        reader = RecordReader(b"".join(laid(batches)), 0)
        return [len(block) for block in iter(lambda: reader.take(most), None)]

    # Then batches are put together up to the most, and none leaves a few records behind
    assert sizes(tens, 100) == [100] * 8
    assert sizes([simple(*[b"v"] * 101)], 100) == [51, 50]
    assert sizes([simple(b"v"), simple(*[b"v"] * 100)], 100) == [51, 50]
    assert sizes([simple(*[b"v"] * 60), simple(*[b"v"] * 60)], 100) == [60, 60]
    assert sizes([simple(b"v")] * 1000, 400) == [400, 400, 200]


@pytest.mark.parametrize(("magic", "codec"), [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)])
def test_older_formats_are_read_as_aiokafka_reads_them(magic: int, codec: int) -> None:
    # Given batches of an older format before one of the newer
    old, offset = [], 0
    for size in (1, 5, 30):
        builder = LegacyRecordBatchBuilder(magic, codec, 2**20)
        for i in range(size):
            key = None if i % 4 == 3 else b"k%d" % i
            builder.append(offset, NOW_MS + i, key, None if i % 5 == 4 else b"v" * i)
            offset += 1
        batch = builder.build()
        if codec:
            # A broker gives the message around compressed ones the offset of the last.
            struct.pack_into(">q", batch, 0, offset - 1)
        old.append(bytes(batch))
    expected, end = as_aiokafka_reads(b"".join(old), None)
    expected = [(o, -1 if t is None else t, k, v, h) for o, t, k, v, h in expected[2:]]
    (new,) = laid([simple(b"new")], end)

    # When all of it is read
    reader = RecordReader(b"".join([*old, new]), 2)

    # Then it comes out whole
    assert read(reader, 8) == [*expected, (end, NOW_MS, b"k", b"new", ())]
    # And damage is noticed
    damaged = bytearray(b"".join(old))
    damaged[-1] ^= 1
    reader = RecordReader(bytes(damaged), 0)
    with pytest.raises(BrokerError, match="its CRC is 0x"):
        [reader.take(1) for _ in range(offset)]


def test_a_header_name_that_is_no_utf8_does_not_stop_the_reader() -> None:
    (batch,) = laid([Batch(0, [(0, 0, b"k", b"v", [("name", b"1"), ("other", None)])])])

    block = RecordReader(sealed(batch.replace(b"name", b"n\xffme")), 0).take(10)

    assert block.headers_of(0) == [("n\ufffdme", b"1"), ("other", None)]


def test_records_of_megabytes_are_read() -> None:
    big = np.random.default_rng(1).bytes(3_000_000)
    for codec in range(5):
        data = b"".join(laid([simple(b"a", big, b"", codec=codec), simple(big)]))

        block = RecordReader(data, 0).take(10)

        assert [block.value(i) for i in range(len(block))] == [b"a", big, b"", big]


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_the_checksum_is_crc32c_by_either_way_and_in_pieces(one: bytes, two: bytes) -> None:
    expected = calc_crc32c(one + two)
    data = np.frombuffer(one + two + b"more", np.uint8)
    for way in (crc32c, crc32c_by_tables):
        state = way(np.uint32(0xFFFFFFFF), data, 0, len(one))
        state = way(state, data, len(one), len(one) + len(two))
        assert int(state) ^ 0xFFFFFFFF == expected
