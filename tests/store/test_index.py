"""Packed keys and the index below the store: whole keys, no degradation, bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.errors import StoreError
from stream.store import PackedKeys
from stream.store.hashing import hash_keys
from stream.store.table import Table

names = st.binary(min_size=1, max_size=40)


@given(st.lists(names), st.data())
@settings(max_examples=50, deadline=None)
def test_given_byte_strings_then_packing_is_lossless(keys: list[bytes], data: st.DataObject) -> None:
    packed = PackedKeys.from_list(keys)
    assert packed.to_list() == list(packed) == keys
    assert len(packed) == len(keys)
    assert [packed[i] for i in range(-len(keys), len(keys))] == keys + keys
    chosen = data.draw(st.lists(st.integers(0, len(keys) - 1)) if keys else st.just([]))
    taken = packed.take(chosen)
    assert taken.to_list() == [keys[i] for i in chosen]
    assert PackedKeys.concatenate([packed, taken, packed]).to_list() == keys + taken.to_list() + keys


def test_given_wrong_keys_then_they_are_refused() -> None:
    with pytest.raises(StoreError, match="key 1: 0 bytes"):
        PackedKeys.from_list([b"a", b""])
    with pytest.raises(StoreError, match="key 0: 1025 bytes"):
        PackedKeys.from_list([b"a" * 1025])
    with pytest.raises(StoreError, match="integer keys: dtype float64"):
        PackedKeys.from_int64(np.array([1.5]))
    with pytest.raises(StoreError, match="integer keys: dtype uint64"):
        PackedKeys.from_int64(np.array([2**63], np.uint64))
    with pytest.raises(StoreError, match=r"keys\.offsets"):
        PackedKeys(np.zeros(3, np.uint8), np.array([0, 4]))
    with pytest.raises(IndexError):
        PackedKeys.from_list([b"a"])[1]


@given(st.lists(st.tuples(st.booleans(), st.lists(names, min_size=1, max_size=20)), max_size=30), st.booleans())
@settings(max_examples=60, deadline=None)
def test_given_any_insertions_and_removals_then_the_table_is_a_dict(
    steps: list[tuple[bool, list[bytes]]], one_hash: bool
) -> None:
    table = Table(2, 1, 3, (lambda keys: np.zeros(len(keys), np.uint64)) if one_hash else None)
    model: dict[bytes, int] = {}
    for insert, keys in steps:
        packed = PackedKeys.from_list(keys)
        hashes = table.hashes(packed)
        slots, missing = table.find(packed, hashes)
        assert slots.tolist() == [model.get(key, -1) for key in keys]
        if insert:
            created = table.insert(packed, hashes, slots, missing)
            assert len({keys[i] for i in created}) == len(created)
            for i in created.tolist():
                assert keys[i] not in model
                model[keys[i]] = int(slots[i])
        else:
            gone = {key for key in keys if key in model}
            table.remove(np.array([model.pop(key) for key in gone], np.int64))
        assert len(table) == len(model) == len(set(model.values()))
        every = PackedKeys.from_list(list(model))
        assert table.find(every, table.hashes(every))[0].tolist() == list(model.values())
        assert table.keys(np.array(list(model.values()), np.int64)).to_list() == list(model)


def test_given_keys_that_differ_anywhere_then_their_hashes_differ() -> None:
    base = bytes(range(100))
    keys = [base[:i] + bytes([base[i] ^ (1 << bit)]) + base[i + 1 :] for i in range(100) for bit in range(8)]
    keys += [base[:i] for i in range(1, 101)] + [bytes(i) for i in range(2, 1025)]
    packed = PackedKeys.from_list(keys)
    hashes = hash_keys(packed.buffer, packed.offsets, np.uint64(1))
    assert np.unique(hashes).shape[0] == len(keys)
    assert not (hashes == hash_keys(packed.buffer, packed.offsets, np.uint64(2))).any()
    # Each bit of the hash is set for about half of the keys.
    share = ((hashes[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).mean(axis=0)
    assert share.min() > 0.42
    assert share.max() < 0.58


@pytest.mark.parametrize("length", [*range(1, 26), 1024])
def test_given_a_key_then_it_is_the_same_wherever_it_lies(length: int) -> None:
    # The last bytes of a buffer are read in another way than those that others follow.
    key = bytes(range(1, 256)) * 5
    apart = PackedKeys.from_list([key[:length]])
    among = PackedKeys.from_list([b"before", key[:length], b"\xff" * 20])
    seed = np.uint64(1)
    assert hash_keys(apart.buffer, apart.offsets, seed)[0] == hash_keys(among.buffer, among.offsets, seed)[1]
    # It is found by either when it was put in as the other.
    for stored, asked, at in ((apart, among, 1), (among, apart, 0)):
        table = Table(1, 8, 3)
        table.insert(stored, table.hashes(stored), np.full(len(stored), -1, np.int64), len(stored))
        assert table.find(asked, table.hashes(asked))[0][at] >= 0


@pytest.mark.parametrize("size", [8, 16, 36, 200])
def test_given_endless_turnover_then_memory_stays_where_it_was(size: int) -> None:
    """Lengths change too: long keys of one length must not pin the room of another for ever."""
    table = Table(1, 1, 3)
    used = []
    for generation in range(12):
        length = size + 8 * (generation % 3)
        values = np.arange(20_000, dtype=np.int64) + generation * 10**9
        raw = np.zeros((values.shape[0], length), np.uint8)
        raw[:, :8] = values.view(np.uint8).reshape(-1, 8)
        packed = PackedKeys(raw.reshape(-1), np.arange(values.shape[0] + 1) * length)
        slots, missing = table.find(packed, table.hashes(packed))
        table.insert(packed, table.hashes(packed), slots, missing)
        assert table.find(packed, table.hashes(packed))[1] == 0
        table.remove(slots)
        used.append(table.overhead_bytes)
    assert len(table) == 0
    assert max(used[3:]) <= 1.6 * used[2]
    assert table.allocated == 20_000


def test_given_16_byte_keys_then_the_overhead_is_within_64_bytes_a_row() -> None:
    table = Table(1, 1 << 20, 3)
    rng = np.random.default_rng(0)
    for _ in range(10):
        packed = PackedKeys(rng.integers(0, 256, 16 * 30_000, dtype=np.uint8), np.arange(30_001) * 16)
        slots, missing = table.find(packed, table.hashes(packed))
        table.insert(packed, table.hashes(packed), slots, missing)
        assert table.overhead_bytes / len(table) <= 64


@pytest.mark.parametrize("tags", ["spread", "at the end", "at the start", "both ends", "one"])
def test_given_a_growing_index_then_every_key_is_found_wherever_its_home_is(tags: str) -> None:
    # Given hashes whose homes lie so that entries come round from the end of the index, in long runs
    n = 3000
    random = np.random.default_rng(5)
    bits = {
        "spread": random.integers(0, 2**32, n),
        "at the end": 2**32 - 1 - random.integers(0, 2**20, n),
        "at the start": random.integers(0, 2**20, n),
        "both ends": np.where(random.random(n) < 0.5, random.integers(0, 2**24, n), 2**32 - 1),
        "one": np.full(n, 2**32 - 1),
    }[tags]
    hashes = bits.astype(np.uint64) << np.uint64(32)
    keys = PackedKeys.from_int64(np.arange(n))
    table = Table(1, 64, 0)
    slots = np.full(n, -1, np.int64)
    for start in range(0, n, 37):
        part = np.arange(start, min(start + 37, n))
        # When the index grows with each batch, past what was reserved for it, and rows leave in between
        mine = slots[part]
        table.insert(keys.take(part), hashes[part], mine, len(part))
        slots[part] = mine
        gone = part[::5]
        table.remove(slots[gone])
        slots[gone] = -1
        # Then exactly the keys that are left are found, each in its slot
        found, missing = table.find(keys, hashes)
        assert found.tolist() == slots.tolist()
        assert missing == int((slots < 0).sum())
