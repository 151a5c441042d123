"""A row that changes and is spilled while a checkpoint is open is in the next one, whatever was owed before."""

from __future__ import annotations

from pathlib import Path

from stream.store import EmbeddingStore, StoreOptions
from stream.store.checkpoint import Checkpoint
from stream.store.rows import read_headers


def _change(store: EmbeddingStore, numbers: range, offset: int) -> None:
    with store.update([b"%d" % number for number in numbers]) as slots:
        store.vectors[slots] = offset
        store.events_seen[slots] += 1
        store.last_event_ms[slots] = offset
        store.applied_offset[slots] = offset


def _given_out(checkpoint: Checkpoint) -> dict[bytes, int]:
    """Offsets of the rows that the changelog is given."""
    rows = {key: row for keys, given in checkpoint.slices(4) for key, row in zip(keys, given, strict=True)}
    return {key: int(read_headers([row], "test")[0]["applied_offset"]) for key, row in rows.items() if row is not None}


def test_rows_spilled_while_a_checkpoint_is_open_reach_the_changelog(tmp_path: Path) -> None:
    # Given more changed rows than memory holds: all are spilled, some are in memory too
    with EmbeddingStore.open(tmp_path / "rows", StoreOptions(width=2, memory_rows=64)) as store:
        for first in range(0, 200, 20):
            _change(store, range(first, first + 20), 1)
        # When those change again, are given out by a checkpoint, and are changed and spilled before it is committed
        _change(store, range(150, 200), 2)
        checkpoint = store.checkpoint()
        changelog = _given_out(checkpoint)
        _change(store, range(150, 200), 3)
        _change(store, range(100), 4)
        checkpoint.commit()
        # Then the next checkpoint gives out what they are now
        checkpoint = store.checkpoint()
        changelog |= _given_out(checkpoint)
        checkpoint.commit()
        keys = [b"%d" % number for number in range(200)]
        assert [changelog[key] for key in keys] == store.lookup(keys).applied_offset.tolist()
