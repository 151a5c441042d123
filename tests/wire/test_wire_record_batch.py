"""Record batches written from arrays: what aiokafka's own parser reads is what was put in, whatever the codec."""

from __future__ import annotations

from typing import Any, get_args

import msgpack
import numpy as np
import pytest
from aiokafka.record.memory_records import MemoryRecords
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stream.store.keys import PackedKeys
from stream.wire import EmbeddingEncoder, PackedValues
from stream.wire.record_batch import Codec, RecordBatch

CODECS = get_args(Codec)
START_MS = 1_700_000_000_000
LARGE = 1 << 40

codecs = st.sampled_from(CODECS)
seeds = st.integers(0, 2**32 - 1)


def parse(sealed: bytes) -> Any:
    """The one batch in these bytes, its checksum verified; iterating it gives the records."""
    records = MemoryRecords(sealed)
    batch = records.next_batch()
    assert batch is not None
    assert batch.validate_crc()
    assert records.next_batch() is None
    return batch


def random_bytes(rng: np.random.Generator, lengths: Any) -> list[bytes]:
    # Half of them repeat, so that codecs have something to do.
    return [rng.bytes(int(n)) if rng.random() < 0.5 else b"r" * int(n) for n in lengths]


def split(keys: PackedKeys, values: PackedValues | None, limit: int, now_ms: int = START_MS) -> list[RecordBatch]:
    batches, row = [RecordBatch(limit)], 0
    while row < len(keys):
        row = batches[-1].add(keys, values, row, now_ms)
        if row < len(keys):
            batches.append(RecordBatch(limit))
    return batches


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(codecs, seeds, st.sampled_from([1, 2, 63, 64, 65, 700, 5000]), st.sampled_from([1, 63, 64, 1024]), st.booleans())
def test_given_any_records_when_parsed_then_they_are_the_ones_put_in(
    codec: Codec, seed: int, n: int, longest_key: int, deletes: bool
) -> None:
    # Given keys and values of many lengths, or tombstones
    rng = np.random.default_rng(seed)
    keys = random_bytes(rng, rng.integers(1, longest_key + 1, n))
    values = random_bytes(rng, np.where(rng.random(n) < 0.02, rng.integers(0, 20_000, n), rng.integers(0, 300, n)))
    batch = RecordBatch(LARGE)
    # When they are written as one batch
    assert batch.add(PackedKeys.from_list(keys), None if deletes else PackedValues.from_list(values), 0, START_MS) == n
    parsed = parse(batch.seal(codec, 77, 3, 12))
    # Then a stranger's parser reads the same
    assert (parsed.producer_id, parsed.producer_epoch, parsed.base_sequence) == (77, 3, 12)
    assert parsed.compression_type == CODECS.index(codec)
    read = list(parsed)
    assert [record.offset for record in read] == list(range(n))
    assert [record.key for record in read] == keys
    assert [record.value for record in read] == ([None] * n if deletes else values)
    assert {record.timestamp for record in read} == {START_MS}
    assert all(record.headers == [] for record in read)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(codecs, seeds, st.integers(1, 400), st.sampled_from([0, 1, 64, 300]), st.integers(0, 3))
def test_embeddings_in_batches_are_the_maps_that_any_library_packs(
    codec: Codec, seed: int, n: int, width: int, tasks: int
) -> None:
    # Given embeddings, some with predictions, some without
    rng = np.random.default_rng(seed)
    names = [f"task_{i}" for i in range(tasks)]
    ids = [f"клиент-{i}" if rng.random() < 0.3 else "c" * int(rng.integers(1, 1025)) for i in range(n)]
    columns = {
        name: rng.integers(0, 2 ** rng.integers(1, 63, n), n)
        for name in ("timestamp_ms", "offset", "parameter_version", "events_seen")
    }
    vectors = rng.standard_normal((n, width), dtype=np.float32)
    predictions = rng.random((n, tasks), dtype=np.float32)
    predictions[rng.random(predictions.shape) < 0.4] = np.nan
    keys = PackedKeys.from_list([one.encode() for one in ids])
    encoded = EmbeddingEncoder(width, names).encode(keys, vectors=vectors, predictions=predictions, **columns)
    # When they go through batches of limited size
    batches = split(keys, encoded, 20_000)
    read = [record for batch in batches for record in parse(batch.seal(codec, 1, 0, 0))]
    # Then each value is, byte for byte, what msgpack makes of the same map
    assert [record.key.decode() for record in read] == ids
    for row, record in enumerate(read):
        assert record.value == msgpack.packb(
            {
                "client_id": ids[row],
                **{name: int(column[row]) for name, column in columns.items()},
                "vector": vectors[row].astype("<f4").tobytes(),
                "predictions": {
                    name: float(p) for name, p in zip(names, predictions[row], strict=True) if not np.isnan(p)
                },
            },
            use_single_float=True,
        )


@settings(max_examples=80, deadline=None)
@given(seeds, st.integers(1, 300), st.integers(61, 3000), st.sampled_from([0, 100, 2000]))
def test_batches_keep_their_limit_and_lose_nothing(seed: int, n: int, limit: int, longest: int) -> None:
    # Given records, a few of which may be larger than a batch
    rng = np.random.default_rng(seed)
    keys = random_bytes(rng, rng.integers(1, 20, n))
    values = random_bytes(rng, rng.integers(0, longest + 1, n))
    # When they are split
    batches = split(PackedKeys.from_list(keys), PackedValues.from_list(values), limit)
    # Then every batch is as large as it says, within the limit unless it holds one record, and together they are all
    read = []
    for batch in batches:
        sealed = batch.seal("none", 1, 0, 0)
        assert len(sealed) == batch.size
        assert batch.size <= limit or batch.count == 1
        read += [(record.key, record.value) for record in parse(sealed)]
    assert read == list(zip(keys, values, strict=True))


@settings(max_examples=60, deadline=None)
@given(codecs, st.lists(st.tuples(st.integers(0, 40), st.integers(-(10**6), 10**12), st.booleans()), max_size=8), seeds)
def test_what_is_added_later_follows_with_its_own_time(
    codec: Codec, additions: list[tuple[int, int, bool]], seed: int
) -> None:
    # Given several additions at different times, a clock set back among them
    rng = np.random.default_rng(seed)
    batch, expected = RecordBatch(LARGE), []
    for n, after_ms, deletes in [(1, 0, False), *additions]:
        keys, values = random_bytes(rng, rng.integers(1, 9, n)), random_bytes(rng, rng.integers(0, 99, n))
        packed = PackedKeys.from_list(keys)
        batch.add(packed, None if deletes else PackedValues.from_list(values), 0, START_MS + after_ms)
        expected += [(k, None if deletes else v, START_MS + after_ms) for k, v in zip(keys, values, strict=True)]
    # When the batch is sealed
    parsed = parse(batch.seal(codec, 1, 0, 0))
    # Then records are in order, each with the time at which it was added
    assert [(record.key, record.value, record.timestamp) for record in parsed] == expected
    assert parsed.max_timestamp == max(time for *_, time in expected)


def test_slices_of_keys_and_values_are_taken_from_where_they_begin() -> None:
    keys = PackedKeys.from_list([b"aa", b"b", b"cccc"])
    values = PackedValues.from_list([b"1", b"22", b"333"])
    part = PackedKeys(keys.buffer, keys.offsets[1:]), PackedValues(values.buffer, values.offsets[1:])
    batch = RecordBatch(LARGE)
    batch.add(*part, 0, START_MS)
    assert [(r.key, r.value) for r in parse(batch.seal("none", 1, 0, 0))] == [(b"b", b"22"), (b"cccc", b"333")]


def test_another_number_of_values_than_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="1 values for 2 keys"):
        RecordBatch(LARGE).add(PackedKeys.from_list([b"a", b"b"]), PackedValues.from_list([b"1"]), 0, START_MS)


@given(st.lists(st.lists(st.binary(max_size=20), max_size=5), max_size=4))
def test_packed_values_are_a_sequence_of_bytes(parts: list[list[bytes]]) -> None:
    values = [value for part in parts for value in part]
    packed = PackedValues.concatenate([PackedValues.from_list(part) for part in parts])
    assert list(packed) == values
    assert len(packed) == len(values)
    assert [packed[i - len(values)] for i in range(len(values))] == values
    with pytest.raises(IndexError):
        packed[len(values)]
