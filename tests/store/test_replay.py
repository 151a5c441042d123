"""The store as the worker uses it: a log of events, checkpoints to a changelog, crashes at any step, replays.

A plain dict computed from the log alone says what every row must be, bit for bit, after every step.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stream.store import FOR_EVER, Checkpoint, EmbeddingStore, PackedKeys, StoreOptions

KEYS = [b"a", b"bb", b"a-key-of-more-than-sixteen-bytes", b"\x00", b"\x00\x00", b"e" * 1024, b"g", b"h", b"i", b"j"]
WIDTH = 3
NEVER = 2**50


@dataclass
class Event:
    key: bytes
    ms: int
    value: float
    delete: bool
    modality: int = 0


@dataclass
class Row:
    vector: np.ndarray = field(default_factory=lambda: np.zeros(WIDTH, np.float32))
    events: int = 0
    last: int = 0
    offset: int = -1
    #: When it expires.
    deadline: int = 0

    def apply(self, event: Event, offset: int, ttl: int | None) -> None:
        step(self.vector, event.value)
        self.events += 1
        self.last = max(self.last, event.ms)
        self.deadline = max(self.deadline, event.ms + (NEVER if ttl is None else ttl))
        self.offset = offset


def step(vector: np.ndarray, value: float) -> None:
    """A recurrence whose result depends on every event and on their order."""
    vector *= np.float32(0.7)
    vector += np.float32(value) * np.arange(1, WIDTH + 1, dtype=np.float32)


class Truth:
    """What one pass over the log makes of it, one event at a time."""

    def __init__(self, ttls: list[int | None], threshold: int) -> None:
        self.ttls, self.threshold = ttls, threshold
        self.watermark = -(2**62)
        self.rows: dict[bytes, Row] = {}
        self.waiting: dict[bytes, list[tuple[int, Event]]] = {}

    def live(self, deadline: int) -> bool:
        return self.watermark < deadline

    def ttl(self, event: Event) -> int | None:
        return self.ttls[event.modality % len(self.ttls)]

    def advance(self, offset: int, event: Event) -> None:
        if event.delete:
            self.rows.pop(event.key, None)
            self.waiting.pop(event.key, None)
            return
        self.watermark = max(self.watermark, event.ms)
        row = self.rows.get(event.key)
        if row is not None and not self.live(row.deadline):
            del self.rows[event.key]
            row = None
        if row is not None:
            row.apply(event, offset, self.ttl(event))
        else:
            held = self.waiting.get(event.key, [])
            ends = [NEVER if self.ttl(e) is None else e.ms + (self.ttl(e) or 0) for _, e in held]
            if held and not self.live(max(ends)):
                held = []
            held = [*held, (offset, event)]
            self.waiting[event.key] = held
            if len(held) >= self.threshold:
                row = self.rows[event.key] = Row()
                for at, one in self.waiting.pop(event.key):
                    row.apply(one, at, self.ttl(one))


class ReplayMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.log: list[Event] = []
        self.position = 0
        # The broker: what survives whatever happens here.
        self.changelog: list[tuple[bytes, bytes | None]] = []
        self.committed = 0
        self.committed_watermark = -(2**62)
        self.checkpoint: Checkpoint | None = None
        # Keys that have a record in the embeddings topic.
        self.published: set[bytes] = set()

    @initialize(
        memory_rows=st.sampled_from([1, 2, 4, 50]),
        ttl=st.sampled_from([None, 5, 20]),
        event_ttls=st.sampled_from([(), (), (9,), (3, 40), (12, None)]),
        threshold=st.sampled_from([1, 1, 2, 3]),
        cold_rows=st.sampled_from([None, 0, 2, 100]),
        one_hash=st.booleans(),
    )
    def open(
        self,
        memory_rows: int,
        ttl: int | None,
        event_ttls: tuple[int | None, ...],
        threshold: int,
        cold_rows: int | None,
        one_hash: bool,
    ) -> None:
        self.options = StoreOptions(
            width=WIDTH,
            memory_rows=memory_rows,
            ttl_ms=ttl,
            event_ttls_ms=event_ttls,
            admission_threshold=threshold,
            cold_rows=cold_rows,
        )
        self.hasher = (lambda keys: np.zeros(len(keys), np.uint64)) if one_hash else None
        self.truth = Truth([ttl, *event_ttls], threshold)
        self.store = EmbeddingStore.open(self.root / "db", self.options, hasher=self.hasher)

    # -- the stream ----------------------------------------------------------------------------------------

    @rule(
        events=st.lists(
            st.builds(
                Event,
                st.sampled_from(KEYS),
                st.integers(1, 60),
                st.floats(-2, 2, width=32),
                st.integers(0, 9).map(lambda i: i == 0),
                st.integers(0, 5),
            ),
            min_size=1,
            max_size=12,
        ),
        batch=st.integers(1, 8),
        jump=st.integers(0, 12),
    )
    def publish(self, events: list[Event], batch: int, jump: int) -> None:
        base = max(self.truth.watermark, 0) if self.truth.watermark > 0 else 0
        for i, event in enumerate(events):
            event.ms = max(1, base + event.ms - 50 + (jump if i == 0 else 0))
            self.truth.advance(len(self.log), event)
            self.log.append(event)
        self.consume(batch)

    def consume(self, batch: int) -> None:
        while self.position < len(self.log):
            stop = min(self.position + batch, len(self.log))
            events = self.log[self.position : stop]
            first_delete = next((i for i, event in enumerate(events) if event.delete), None)
            if first_delete == 0:
                self.store.delete([events[0].key], offsets=[self.position])
                self.published.discard(events[0].key)
                self.position += 1
                continue
            events = events[:first_delete]
            self.process([(self.position + i, event) for i, event in enumerate(events)])
            self.position += len(events)

    def process(self, events: list[tuple[int, Event]]) -> None:
        if self.options.admission_threshold == 1:
            return self.apply(events, events)
        while events:
            admission = self.store.observe(
                [event.key for _, event in events],
                [offset for offset, _ in events],
                [event.ms for _, event in events],
                [str(offset).encode() for offset, _ in events],
                self.lives(events),
            )
            self.published -= set(admission.gone)
            held = [int(data) for _, payloads in admission.released for data in payloads]
            admitted = [events[i] for i in np.flatnonzero(admission.admitted)]
            self.apply([(offset, self.log[offset]) for offset in held] + admitted, events[: admission.stop])
            events = events[admission.stop :]

    def lives(self, events: list[tuple[int, Event]]) -> np.ndarray:
        ttls = [self.truth.ttl(event) for _, event in events]
        return np.array([FOR_EVER if ttl is None else ttl for ttl in ttls], np.int64)

    def apply(self, events: list[tuple[int, Event]], seen: list[tuple[int, Event]]) -> None:
        """Apply events to their rows, then advance event time by those seen."""
        store = self.store
        watermark = store.watermark_ms
        with store.update([event.key for _, event in events]) as slots:
            for slot, (offset, event) in zip(slots.tolist(), events, strict=True):
                assert slot >= 0
                watermark = max(watermark, event.ms)
                if offset > store.applied_offset[slot]:
                    if self.options.admission_threshold == 1:
                        store.reset_expired(np.array([slot]), np.array([watermark]))
                    at = np.array([slot]), np.array([event.ms])
                    store.prolong(*at, self.lives([(offset, event)]))
                    step(store.vectors[slot], event.value)
                    store.events_seen[slot] += 1
                    store.last_event_ms[slot] = max(store.last_event_ms[slot], event.ms)
                    store.applied_offset[slot] = offset
        self.published |= {event.key for _, event in events}
        store.advance_watermark(max(event.ms for _, event in seen))

    # -- checkpoints ---------------------------------------------------------------------------------------

    @rule(atomic=st.booleans())
    @precondition(lambda self: self.checkpoint is None)
    def freeze(self, atomic: bool) -> None:
        self.checkpoint = self.store.checkpoint(atomic=atomic)
        self.frozen_position, self.frozen_watermark = self.position, self.store.watermark_ms
        self.slices = self.checkpoint.slices(2)
        self.records: list[tuple[bytes, bytes | None]] = []

    @rule(count=st.integers(1, 4))
    @precondition(lambda self: self.checkpoint is not None)
    def slice(self, count: int) -> None:
        for _ in range(count):
            self.records += zip(*next(self.slices, ([], [])), strict=True)

    @rule(crash=st.sampled_from(["no", "no", "no", "before the broker", "after the broker", "while writing"]))
    @precondition(lambda self: self.checkpoint is not None)
    def commit(self, crash: str) -> None:
        for keys, rows in self.slices:
            self.records += zip(keys, rows, strict=True)
        if crash == "before the broker":
            return self.kill(False)
        self.changelog += self.records
        self.committed, self.committed_watermark = self.frozen_position, self.frozen_watermark
        if crash == "after the broker":
            return self.kill(False)
        assert self.checkpoint is not None
        for i, _ in enumerate(self.checkpoint.commit_steps({"changelog": str(len(self.changelog)).encode()})):
            if crash == "while writing" and i == 1:
                return self.kill(False)
            # What is applied while the commit goes on is none of its business.
            self.store.upsert([b"bystander"], np.ones((1, WIDTH)), event_ms=self.truth.watermark)
            self.store.delete([b"bystander"])
        self.checkpoint = None

    @rule()
    @precondition(lambda self: self.checkpoint is not None)
    def abandon(self) -> None:
        assert self.checkpoint is not None
        self.checkpoint.abandon()
        self.checkpoint = None

    @rule(budget=st.sampled_from([0.0, 1000.0]))
    def sweep(self, budget: float) -> None:
        self.published -= set(self.store.sweep(budget))

    @rule(disk_lost=st.booleans())
    def kill(self, disk_lost: bool) -> None:
        """What was in memory is gone; the process comes back, and with it the replay."""
        self.store.close()
        self.checkpoint = None
        if disk_lost:
            shutil.rmtree(self.root / "db")
        self.store = EmbeddingStore.open(self.root / "db", self.options, hasher=self.hasher)
        start = int(self.store.meta("changelog") or b"0")
        for at in range(start, len(self.changelog), 3):
            part = self.changelog[at : at + 3]
            self.store.restore([k for k, _ in part], [v for _, v in part], {"changelog": str(at + len(part)).encode()})
        self.store.advance_watermark(self.committed_watermark)
        self.position = self.committed
        self.consume(3)
        # It is in no log: a deletion that was lost with the memory is for whoever made it to make again.
        self.store.delete([b"bystander"])

    # -- what must hold ------------------------------------------------------------------------------------

    @invariant()
    def rows_are_those_of_one_pass(self) -> None:
        if not hasattr(self, "store"):
            return
        found = self.store.lookup(KEYS)
        for i, key in enumerate(KEYS):
            row = self.truth.rows.get(key)
            if row is not None and not self.truth.live(row.deadline):
                row = None
            assert bool(found.found[i]) == (row is not None), key
            if row is not None:
                assert found.vectors[i].tobytes() == row.vector.tobytes(), key
                assert (found.events_seen[i], found.last_event_ms[i], found.applied_offset[i]) == (
                    row.events,
                    row.last,
                    row.offset,
                )
        assert self.store.stats.memory_rows <= (self.options.memory_rows or 0) + 16

    @invariant()
    def scan_is_complete(self) -> None:
        if hasattr(self, "store"):
            live = {key for key, row in self.truth.rows.items() if self.truth.live(row.deadline)}
            seen = [key for keys, _ in self.store.scan(3) for key in keys]
            assert sorted(seen) == sorted(live)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            # Given whatever happened, a store restored from the changelog alone ends equal.
            if self.checkpoint is not None:
                self.abandon()
            self.freeze(False)
            self.commit("no")
            live = len(self.store)
            self.kill(True)
            self.rows_are_those_of_one_pass()
            assert live == len(self.store) == len(self.rows_in_changelog())
            self.sweep(1000.0)
            assert self.published == {key for key, row in self.truth.rows.items() if self.truth.live(row.deadline)}
            self.store.close()
        shutil.rmtree(self.root)

    def rows_in_changelog(self) -> set[bytes]:
        """Rows that a restore finds: what expired unseen, on disk, may still be among them."""
        last = dict(self.changelog)
        return {key for key, value in last.items() if value is not None and value[1] == 0}


TestReplay = ReplayMachine.TestCase
TestReplay.settings = settings(
    # `LIVESTATE_EXAMPLES=400` searches for longer.
    max_examples=int(os.environ.get("LIVESTATE_EXAMPLES", "12")),
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture
def machine() -> Iterator[ReplayMachine]:
    made = ReplayMachine()
    yield made
    made.teardown()


def spill(machine: ReplayMachine) -> None:
    """Let what one row of memory has no room for leave it."""
    for _ in range(4):
        machine.store.lookup(KEYS)
        machine.freeze(False)
        machine.abandon()


@pytest.mark.parametrize("ttl", [None, 20])
@pytest.mark.parametrize("threshold", [1, 2])
def test_a_replay_leaves_nothing_of_a_short_lived_row_that_the_sweep_ended(
    machine: ReplayMachine, ttl: int | None, threshold: int
) -> None:
    machine.open(memory_rows=1, ttl=ttl, event_ttls=(9,), threshold=threshold, cold_rows=None, one_hash=False)
    machine.publish(events=[Event(b"a", 51, 1.0, False, 1) for _ in range(threshold)], batch=1, jump=0)
    spill(machine)
    machine.publish(events=[Event(b"bb", 60, 1.0, False, 0)], batch=1, jump=0)
    machine.sweep(1000.0)
    assert b"a" not in machine.published
    machine.kill(disk_lost=False)
    machine.rows_are_those_of_one_pass()
    machine.scan_is_complete()
    machine.sweep(1000.0)
    assert b"a" not in machine.published
    machine.freeze(False)
    machine.commit("no")
    assert dict(machine.changelog)[b"a"] is None


def test_a_replay_leaves_no_row_where_its_last_event_came_too_late(machine: ReplayMachine) -> None:
    machine.open(memory_rows=1, ttl=None, event_ttls=(9,), threshold=1, cold_rows=None, one_hash=False)
    machine.publish(events=[Event(b"a", 51, 1.0, False, 1), Event(b"bb", 60, 1.0, False, 0)], batch=1, jump=0)
    machine.freeze(False)
    machine.commit("no")
    machine.publish(events=[Event(b"a", 40, 1.0, False, 1)], batch=1, jump=0)
    spill(machine)
    machine.kill(disk_lost=False)
    machine.rows_are_those_of_one_pass()
    machine.scan_is_complete()


def test_a_restore_queues_a_row_made_again_by_a_late_event_at_its_own_age(machine: ReplayMachine) -> None:
    machine.open(memory_rows=1, ttl=20, event_ttls=(), threshold=1, cold_rows=None, one_hash=False)
    for events in (
        [Event(b"a", 61, 1.0, False)],
        [Event(b"a", 51, 1.0, True), Event(b"a", 40, 1.0, False)],
    ):
        machine.publish(events=events, batch=1, jump=0)
        # So that a restore, three records at a time, meets the second record by itself.
        machine.changelog += [(b"other", None)] * 3
        machine.freeze(False)
        machine.commit("no")
    machine.publish(events=[Event(b"bb", 61, 1.0, False)], batch=1, jump=0)
    machine.freeze(False)
    machine.commit("no")
    machine.kill(disk_lost=True)
    machine.sweep(1000.0)
    assert machine.published == {b"bb"}


def test_packed_keys_are_what_the_machine_uses() -> None:
    assert PackedKeys.from_list(KEYS).to_list() == KEYS
