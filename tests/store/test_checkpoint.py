"""What the changelog is owed, through spills, crashes and changes that go on meanwhile."""

from __future__ import annotations

import numpy as np
import pytest

from stream.errors import StoreError
from stream.store import Checkpoint, EmbeddingStore, PackedKeys
from tests.store.conftest import Opener

Records = list[tuple[bytes, bytes | None]]


def put(store: EmbeddingStore, key: bytes, value: float, offset: int) -> None:
    store.upsert([key], np.full((1, 4), value), event_ms=offset + 1, offsets=offset)


def drain(checkpoint: Checkpoint, size: int = 2) -> Records:
    return [pair for keys, rows in checkpoint.slices(size) for pair in zip(keys, rows, strict=True)]


def value_of(row: bytes | None) -> float | None:
    return None if row is None else float(np.frombuffer(row, "<f4", 1, 32)[0])


def test_given_changes_then_a_checkpoint_gives_out_exactly_these(open_store: Opener) -> None:
    store = open_store(memory_rows=100)
    for i in range(10):
        put(store, f"{i}".encode(), i, i)
    checkpoint = store.checkpoint()
    first = drain(checkpoint)
    checkpoint.commit({"position": b"10"})
    put(store, b"3", 33, 11)
    store.delete([b"4"])
    checkpoint = store.checkpoint()
    second = drain(checkpoint)
    checkpoint.commit({"position": b"12"})

    assert {key: value_of(row) for key, row in first} == {f"{i}".encode(): i for i in range(10)}
    assert {key: value_of(row) for key, row in second} == {b"3": 33, b"4": None}
    assert store.meta("position") == b"12"
    assert drain(store.checkpoint()) == []


def test_given_a_change_after_the_freeze_then_it_is_owed_again(open_store: Opener) -> None:
    store = open_store(memory_rows=100)
    put(store, b"a", 1, 1)
    put(store, b"b", 1, 2)
    checkpoint = store.checkpoint()
    slices = checkpoint.slices(1)
    first = next(slices)
    put(store, first[0][0], 2, 3)
    rest = [pair for keys, rows in slices for pair in zip(keys, rows, strict=True)]
    checkpoint.commit()

    assert len(rest) == 1
    assert {key: value_of(row) for key, row in drain(store.checkpoint())} == {first[0][0]: 2}


def test_given_an_abandoned_checkpoint_then_everything_is_owed_again(open_store: Opener) -> None:
    store = open_store(memory_rows=100)
    put(store, b"a", 1, 1)
    store.delete([b"a"])
    put(store, b"b", 1, 2)
    checkpoint = store.checkpoint()
    given = drain(checkpoint)
    checkpoint.abandon()

    checkpoint = store.checkpoint()
    assert drain(checkpoint) == given
    checkpoint.commit()
    with pytest.raises(StoreError, match="already committed or abandoned"):
        checkpoint.commit()


def test_given_dirty_rows_spilled_before_a_crash_then_the_changelog_still_gets_them(open_store: Opener) -> None:
    """A spilled row is ahead of the changelog; its replay is skipped, so nothing but the debt would send it."""
    store = open_store(memory_rows=4)
    for i in range(200):
        put(store, f"{i}".encode(), i, i)
    spilled = store.stats.spilled
    assert spilled >= 190
    store.close()

    store = open_store(memory_rows=4)
    assert len(store) == spilled
    ahead = {key: i for keys, rows in store.scan() for i, key in zip(rows.applied_offset, keys, strict=True)}
    for i in range(200):
        found = store.lookup([f"{i}".encode()])
        if found.applied_offset[0] < i:
            put(store, f"{i}".encode(), i, i)
    checkpoint = store.checkpoint()
    records = drain(checkpoint, 7)
    checkpoint.commit()

    assert {key: value_of(row) for key, row in records} == {f"{i}".encode(): i for i in range(200)}
    assert len(ahead) == spilled
    assert drain(store.checkpoint()) == []


def test_given_a_row_spilled_while_the_checkpoint_is_taken_then_its_newer_state_survives_the_commit(
    open_store: Opener,
) -> None:
    store = open_store(memory_rows=1)
    put(store, b"a", 1, 1)
    checkpoint = store.checkpoint()
    records = drain(checkpoint)
    put(store, b"a", 2, 2)
    put(store, b"b", 1, 3)
    put(store, b"c", 1, 4)
    checkpoint.commit()
    store.close()

    store = open_store(memory_rows=1)
    assert {key: value_of(row) for key, row in records} == {b"a": 1}
    assert store.lookup([b"a"]).vectors[0, 0] == 2
    assert value_of(dict(drain(store.checkpoint()))[b"a"]) == 2


def test_given_rows_spilled_between_two_slices_then_the_checkpoint_still_gives_them_out(open_store: Opener) -> None:
    store = open_store(memory_rows=40)
    for i in range(40):
        put(store, f"{i:02}".encode(), i, i)
    checkpoint = store.checkpoint()
    slices = checkpoint.slices(4)
    records: Records = list(zip(*next(slices), strict=True))
    for i in range(200):
        put(store, f"other {i}".encode(), 1, 100 + i)
    assert store.stats.spilled >= 40
    records += [pair for keys, rows in slices for pair in zip(keys, rows, strict=True)]
    checkpoint.commit()

    given = {key: value_of(row) for key, row in records if not key.startswith(b"other")}
    assert given == {f"{i:02}".encode(): i for i in range(40)}


@pytest.mark.parametrize("prefix", ["", "client-", "client-of-the-bank-"])
def test_given_keys_that_begin_alike_then_slices_come_in_their_order(open_store: Opener, prefix: str) -> None:
    store = open_store(memory_rows=1000)
    keys = [f"{prefix}{i:03}".encode() for i in range(500)]
    shuffled = np.random.default_rng(1).permutation(500).tolist()
    for i in shuffled:
        put(store, keys[i], i, i)

    given = [key for key, _ in drain(store.checkpoint(), 7)]

    assert set(given) == set(keys)
    # Of a long key the first sixteen bytes count.
    assert (given == keys) is (len(prefix) < 14)


def test_given_a_deletion_spilled_before_a_crash_then_a_replay_does_not_rebuild_the_row(open_store: Opener) -> None:
    store = open_store(memory_rows=1)
    put(store, b"a", 1, 5)
    store.flush()
    store.delete([b"a"])
    for i in range(5):
        put(store, f"{i}".encode(), 1, 10 + i)
    store.close()

    store = open_store(memory_rows=1)
    assert not store.lookup([b"a"]).found[0]
    with store.update([b"a"]) as slots:
        assert store.applied_offset[slots[0]] == 5, "so that the events before the deletion are skipped"
    checkpoint = store.checkpoint()
    drain(checkpoint)
    checkpoint.abandon()


def test_given_a_replayed_deletion_then_a_row_made_after_it_stays(open_store: Opener) -> None:
    store = open_store(memory_rows=1)
    put(store, b"a", 1, 5)
    assert store.delete([b"a"], offsets=[6]).tolist() == [True]
    put(store, b"a", 2, 7)
    assert store.delete([b"a"], offsets=[6]).tolist() == [False]
    assert store.lookup([b"a"]).vectors[0, 0] == 2


def test_given_commit_before_the_last_slice_then_it_is_refused(open_store: Opener) -> None:
    store = open_store(memory_rows=10)
    put(store, b"a", 1, 1)
    checkpoint = store.checkpoint()
    with pytest.raises(StoreError, match="walk slices"):
        checkpoint.commit()
    with pytest.raises(StoreError, match="open already"):
        store.checkpoint()
    drain(checkpoint)
    with pytest.raises(StoreError, match="were already given out"):
        drain(checkpoint)
    checkpoint.commit()


def test_given_a_commit_slice_by_slice_when_cut_off_then_a_restore_from_its_start_repairs_it(
    open_store: Opener,
) -> None:
    store = open_store(memory_rows=100)
    for i in range(20):
        put(store, f"{i}".encode(), i, i)
    checkpoint = store.checkpoint()
    records = drain(checkpoint, 3)
    steps = checkpoint.commit_steps({"position": b"20"})
    next(steps)
    next(steps)
    store.close()

    store = open_store(memory_rows=100)
    assert store.meta("position") is None
    assert len(store) == 6
    store.restore([key for key, _ in records], [row for _, row in records], {"position": b"20"})
    assert len(store) == 20
    assert store.meta("position") == b"20"
    assert [store.lookup([f"{i}".encode()]).vectors[0, 0] for i in range(20)] == list(range(20))


def test_given_an_atomic_commit_then_all_of_it_is_one_write(open_store: Opener) -> None:
    store = open_store(memory_rows=100)
    for i in range(20):
        put(store, f"{i}".encode(), i, i)
    checkpoint = store.checkpoint(atomic=True)
    drain(checkpoint, 3)
    assert list(checkpoint.commit_steps()) == []
    store.close()
    assert len(open_store(memory_rows=100)) == 20


@pytest.mark.parametrize("name", [None, "other"])
def test_given_changelog_records_then_restore_keeps_the_newest_of_each_key(
    open_store: Opener, name: str | None
) -> None:
    source = open_store(memory_rows=100)
    log: Records = []
    for offset, (key, value) in enumerate([(b"a", 1), (b"b", 1), (b"a", 2), (b"c", 1), (b"b", 2), (b"a", 3)]):
        put(source, key, value, offset)
        if offset == 4:
            source.delete([b"c"])
        checkpoint = source.checkpoint()
        log += drain(checkpoint)
        checkpoint.commit()
    store = open_store(name, memory_rows=None if name is None else 2, changelog=True)

    # When the whole log comes in one batch, and when a part of it comes again.
    assert store.restore([key for key, _ in log], [row for _, row in log], {"position": b"7"}) == 3
    assert store.restore([key for key, _ in log[:3]], [row for _, row in log[:3]]) == 0

    found = store.lookup([b"a", b"b", b"c"])
    assert found.found.tolist() == [True, True, False]
    assert found.vectors[:2, 0].tolist() == [3, 2]
    assert len(store) == 2
    assert store.meta("position") == b"7"
    assert drain(store.checkpoint()) == []


def test_given_records_of_another_program_then_restore_refuses_them(open_store: Opener) -> None:
    store = open_store(memory_rows=2)
    with pytest.raises(StoreError, match="changelog: a row is shorter than 32 bytes"):
        store.restore([b"a"], [b"short"])
    with pytest.raises(StoreError, match="row format 255"):
        store.restore([b"a"], [b"\xff" * 48])
    with pytest.raises(StoreError, match="2 keys with 1 rows"):
        store.restore([b"a", b"b"], [None])
    assert len(store) == 0


def test_given_the_freeze_then_its_watermark_is_what_a_restart_finds(open_store: Opener) -> None:
    store = open_store(memory_rows=2, ttl_ms=100)
    store.upsert([b"a"], np.ones((1, 4)), event_ms=50)
    store.advance_watermark(60)
    checkpoint = store.checkpoint()
    store.advance_watermark(500)
    records = drain(checkpoint)
    checkpoint.commit()
    store.close()

    assert value_of(dict(records)[b"a"]) == 1, "not expired at the freeze, so its replay must find it"
    store = open_store(memory_rows=2, ttl_ms=100)
    assert store.watermark_ms == 60
    assert store.lookup(PackedKeys.from_list([b"a"])).found[0]
