"""The store beside a plain dict: the same random operations, restarts, expiries, evictions and clock jumps."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stream.store import FOR_EVER, EmbeddingStore, PackedKeys, StoreOptions

WIDTH = 2
NEVER = 2**50
KEYS = [f"k{i}".encode() for i in range(12)] + [b"q" * 17, b"z" * 1024]
keys = st.sampled_from(KEYS)


@dataclass
class Row:
    vector: bytes
    events: int
    last: int
    #: When it expires; None: never.
    deadline: int | None = 0


class Model:
    """Rows in a dict; expired ones may stay in it, as they may in the store, and are never seen."""

    def __init__(
        self, ttl: int | None, event_ttls: tuple[int | None, ...], max_rows: int | None, min_rows: int
    ) -> None:
        self.ttl, self.max_rows, self.min_rows = ttl, max_rows, min_rows
        #: Rows that would expire last come last; event time is behind the horizon by this.
        self.behind = max((one for one in (ttl, *event_ttls) if one is not None), default=None)
        self.rows: dict[bytes, Row] = {}
        self.horizon = self.watermark = -(2**63)

    def advance(self, ms: int) -> None:
        if ms <= self.watermark:
            return
        self.watermark = ms
        self.hold()

    def hold(self) -> None:
        """Move the horizon to where watermark and floor have it."""
        if self.behind is None:
            return
        horizon = self.watermark - self.behind
        if self.min_rows:
            newest = sorted(map(self.age, self.rows.values()), reverse=True)
            horizon = min(horizon, newest[self.min_rows - 1] - 1) if len(newest) > self.min_rows else self.horizon
        self.horizon = max(self.horizon, horizon)

    def age(self, row: Row) -> int:
        """By this rows are ordered, and expired where it is not above the horizon."""
        return NEVER + row.last if row.deadline is None else row.deadline - (self.behind or 0)

    def live(self) -> dict[bytes, Row]:
        return {key: row for key, row in self.rows.items() if self.age(row) > self.horizon}

    def upsert(self, key: bytes, vector: bytes, ms: int, ttl: int | None) -> None:
        row = self.rows.get(key)
        if row is None or self.age(row) <= self.horizon:
            row = self.rows[key] = Row(b"", 0, 0)
        row.vector, row.events, row.last = vector, row.events + 1, max(row.last, ms)
        row.deadline = None if ttl is None or row.deadline is None else max(row.deadline, ms + ttl)

    def cap(self) -> set[bytes]:
        ended = set()
        while self.max_rows is not None and len(self.live()) > self.max_rows:
            oldest = min(self.live(), key=lambda key: self.age(self.rows[key]))
            del self.rows[oldest]
            ended.add(oldest)
        return ended


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.tick = 0
        self.store: Any = None

    @initialize(
        memory_rows=st.sampled_from([None, 1, 3, 100]),
        ttl=st.sampled_from([None, 3_000, 20_000]),
        event_ttls=st.sampled_from([(), (), (5_000,), (1_000, 40_000), (3_000, 9_000, None)]),
        max_rows=st.sampled_from([None, 2, 5]),
        min_rows=st.sampled_from([0, 0, 2]),
        cold_rows=st.sampled_from([None, 0, 2, 100]),
        one_hash=st.booleans(),
    )
    def open(
        self,
        memory_rows: int | None,
        ttl: int | None,
        event_ttls: tuple[int | None, ...],
        max_rows: int | None,
        min_rows: int,
        cold_rows: int | None,
        one_hash: bool,
    ) -> None:
        self.path = None if memory_rows is None else self.root / "table"
        if memory_rows is not None:
            min_rows = min(min_rows, memory_rows)
        if max_rows is not None:
            min_rows = min(min_rows, max_rows)
        self.options = StoreOptions(
            width=WIDTH,
            memory_rows=memory_rows,
            ttl_ms=ttl,
            event_ttls_ms=event_ttls,
            max_rows=max_rows,
            min_rows=min_rows,
            reserve_rows=1,
            cold_rows=cold_rows,
        )
        self.hasher = (lambda packed: np.full(len(packed), 7, np.uint64)) if one_hash else None
        self.store = EmbeddingStore.open(self.path, self.options, hasher=self.hasher)
        self.store.take_capped()
        self.model = Model(ttl, event_ttls, max_rows, min_rows)

    @rule(
        rows=st.lists(
            st.tuples(keys, st.floats(width=32, allow_nan=False), st.integers(-9, 9), st.integers(0, 9)), max_size=8
        ),
        as_list=st.booleans(),
        with_ttls=st.booleans(),
    )
    def upsert(self, rows: list[tuple[bytes, float, int, int]], as_list: bool, with_ttls: bool) -> None:
        base = max(self.model.watermark, 10_000)
        vectors = np.zeros((len(rows), WIDTH), np.float32)
        times = np.zeros(len(rows), np.int64)
        lives = np.zeros(len(rows), np.int64)
        for i, (key, value, late, modality) in enumerate(rows):
            self.tick += 1
            vectors[i] = value
            times[i] = base + late * 1000 + self.tick
            ttl = self.ttl_of(modality if with_ttls else 0)
            lives[i] = FOR_EVER if ttl is None else ttl
            self.model.upsert(key, vectors[i].tobytes(), int(times[i]), ttl)
        names = [key for key, *_ in rows]
        packed = names if as_list else PackedKeys.from_list(names)
        self.store.upsert(packed, vectors, event_ms=times, ttl_ms=lives if with_ttls else None)
        capped = self.model.cap()
        assert set(self.store.take_capped()) >= capped

    def ttl_of(self, modality: int) -> int | None:
        every = (self.options.ttl_ms, *self.options.event_ttls_ms)
        return every[modality % len(every)]

    @rule(names=st.lists(keys, max_size=6), value=st.floats(-4, 4, width=32), modality=st.integers(0, 9))
    def read_modify_write(self, names: list[bytes], value: float, modality: int) -> None:
        self.tick += 1
        ms = max(self.model.watermark, 10_000) + self.tick
        live = self.model.live()
        ttl = self.ttl_of(modality)
        with self.store.update(names) as slots:
            life = np.full(len(names), FOR_EVER if ttl is None else ttl)
            self.store.prolong(slots, np.arange(ms, ms + len(names)), life)
            for i, slot in enumerate(slots):
                self.store.vectors[slot] += np.float32(value)
                self.store.events_seen[slot] += 1
                self.store.last_event_ms[slot] = max(self.store.last_event_ms[slot], ms + i)
        for i, key in enumerate(names):
            before = live[key].vector if key in live else bytes(4 * WIDTH)
            after = np.frombuffer(before, np.float32) + np.float32(value)
            self.model.upsert(key, after.astype(np.float32).tobytes(), ms + i, ttl)
            live = self.model.live()
            self.tick += 1
        self.model.cap()

    @rule(names=st.lists(keys, min_size=1, max_size=4))
    def failed_update_changes_nothing(self, names: list[bytes]) -> None:
        try:
            with self.store.update(names) as slots:
                self.store.vectors[slots] = 99
                self.store.events_seen[slots] = 99
                self.store.prolong(
                    slots, np.full(len(names), 10**9), np.full(len(names), self.store.longest_ttl_ms or 1)
                )
                raise KeyError("the caller's own error")
        except KeyError:
            pass

    @rule(names=st.lists(keys, max_size=4))
    def delete(self, names: list[bytes]) -> None:
        live = self.model.live()
        had = self.store.delete(names)
        first = [key in live and key not in names[:i] for i, key in enumerate(names)]
        assert had.tolist() == first
        for key in names:
            self.model.rows.pop(key, None)

    @rule(ms=st.integers(-2_000, 12_000))
    def clock_jump(self, ms: int) -> None:
        to = max(self.model.watermark, 10_000) + ms
        self.store.advance_watermark(to)
        self.model.advance(to)

    @rule()
    def sweep(self) -> None:
        live = self.model.live()
        ended = self.store.sweep(1000.0)
        assert not set(ended) & set(live)
        assert len(set(ended)) == len(ended)
        if self.path is None or self.store.stats.unsaved_rows == 0:
            self.store.sweep(1000.0)
        self.model.rows = live

    @rule()
    def flush(self) -> None:
        self.store.flush({"tick": str(self.tick).encode()})

    @rule()
    @precondition(lambda self: self.store is not None and self.path is not None)
    def restart(self) -> None:
        self.store.flush()
        self.store.close()
        self.store = EmbeddingStore.open(self.path, self.options, hasher=self.hasher)
        self.store.take_capped()
        assert self.store.watermark_ms == max(self.model.watermark, -(2**62))
        if self.options.min_rows:
            # The floor is exact once the sweep has read the disk, and is then held to what came late meanwhile.
            self.model.hold()
            self.sweep()

    @rule()
    def snapshot_and_load(self) -> None:
        self.store.snapshot({"tick": b"1"}).write(self.root / "snapshot")
        options = StoreOptions(
            width=WIDTH,
            ttl_ms=self.options.ttl_ms,
            event_ttls_ms=self.options.event_ttls_ms,
            min_rows=self.options.min_rows,
        )
        other = EmbeddingStore.open(None, options)
        assert other.load([self.root / "snapshot"]) == [{"tick": b"1"}]
        assert {k: v[0] for k, v in contents(other).items()} == {k: r.vector for k, r in self.model.live().items()}

    @invariant()
    def same_as_the_dict(self) -> None:
        if self.store is None:
            return
        live = self.model.live()
        found = self.store.lookup(KEYS, default=np.full(WIDTH, 5.0))
        for i, key in enumerate(KEYS):
            assert bool(found.found[i]) == (key in live), key
            if key in live:
                row = live[key]
                assert found.vectors[i].tobytes() == row.vector
                assert (found.events_seen[i], found.last_event_ms[i]) == (row.events, row.last)
            else:
                assert (found.vectors[i] == 5.0).all()
                assert (found.events_seen[i], found.applied_offset[i]) == (0, -1)

    @invariant()
    def scan_and_counts_agree(self) -> None:
        if self.store is None:
            return
        live = self.model.live()
        assert contents(self.store) == {key: (row.vector, row.events, row.last) for key, row in live.items()}
        assert len(self.store) >= len(live)
        if self.options.max_rows is not None:
            assert len(self.store) <= self.options.max_rows
        if self.options.memory_rows is not None:
            assert self.store.stats.memory_rows <= self.options.memory_rows + len(KEYS)
        if self.store.longest_ttl_ms is None:
            assert len(self.store) == len(live)

    def teardown(self) -> None:
        if self.store is not None:
            self.store.close()
        shutil.rmtree(self.root)


def contents(store: EmbeddingStore) -> dict[bytes, tuple[bytes, int, int]]:
    out: dict[bytes, tuple[bytes, int, int]] = {}
    for packed, rows in store.scan(3):
        for i, key in enumerate(packed):
            assert key not in out
            out[key] = (rows.vectors[i].tobytes(), int(rows.events_seen[i]), int(rows.last_event_ms[i]))
    return out


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    # `LIVESTATE_EXAMPLES=400` searches for longer.
    max_examples=int(os.environ.get("LIVESTATE_EXAMPLES", "25")),
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
