"""The truth about a system, recomputed from its topics alone.

Every event topic is passed over once, from its start, by one engine on plain arrays: no worker, no store, no
checkpoint. States are compared bit for bit. A row expires at the event that moves event time to the end of what each
of its events gave it, `ttl_s` of the modality or else of the store, and starts anew; `store.max_rows` is not modelled.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from confluent_kafka import Consumer, KafkaError, Message, TopicPartition
from numpy.typing import NDArray

from stream.changelog import read_changelog
from stream.kafka import client_config, log_range
from stream.model.engine import Engine, Triggers
from stream.model.heads import Questions
from stream.model.layout import Layout
from stream.model.parameters import ParameterSet
from stream.settings import Settings
from stream.store import EmbeddingStore, StoreOptions
from stream.wire import EventColumns, EventDecoder, RecordBlock, Schema, decode_embedding

#: Milliseconds that never pass.
_NEVER_MS = 2**61


class PlainRows:
    """Rows in plain arrays, one slot for each client."""

    def __init__(self, rows: int, width: int) -> None:
        self.vectors = np.zeros((rows, width), np.float32)
        self.events_seen = np.zeros(rows, np.int64)
        self.last_event_ms = np.zeros(rows, np.int64)
        self.applied_offset = np.full(rows, -1, np.int64)

    def grown(self, rows: int) -> PlainRows:
        """These rows and room for more, `rows` in all."""
        more = PlainRows(rows, self.vectors.shape[1])
        for name in ("vectors", "events_seen", "last_event_ms", "applied_offset"):
            array = getattr(self, name)
            getattr(more, name)[: len(array)] = array
        return more


@dataclass(frozen=True)
class State:
    """One client's row."""

    vector: bytes
    events_seen: int
    last_event_ms: int
    applied_offset: int

    @property
    def digest(self) -> bytes:
        """16 bytes that differ where any of the row's bits do."""
        counts = b"%d %d" % (self.events_seen, self.last_event_ms)
        return hashlib.blake2b(self.vector + counts, digest_size=16).digest()


@dataclass(frozen=True)
class Truth:
    """What one undisturbed pass over a partition's events makes of them.

    states: by client after all events, those expired by then left out; they are in `expired`.
    hidden, digests: hidden state and `State.digest` by (client, offset of the event that made it).
    predictions: by (client, offset) of each event that asks for one, then by parameter version, float32[tasks].
    rejected: reason and `record_digest` of each record that is no event, by offset.
    events: accepted ones. end: the offset after the last record.
    """

    states: Mapping[bytes, State]
    hidden: Mapping[tuple[bytes, int], bytes]
    events: int
    expired: Mapping[bytes, State] = dataclasses.field(default_factory=dict)
    digests: Mapping[tuple[bytes, int], bytes] = dataclasses.field(default_factory=dict)
    predictions: Mapping[tuple[bytes, int], Mapping[int, NDArray[np.float32]]] = dataclasses.field(default_factory=dict)
    rejected: Mapping[int, tuple[str, bytes]] = dataclasses.field(default_factory=dict)
    end: int = 0


def record_digest(key: bytes | None, value: bytes | None) -> bytes:
    """16 bytes that tell records apart by key and value."""
    key_bytes, value_bytes = (b"-" if part is None else b"+" + part for part in (key, value))
    return hashlib.blake2b(b"%d " % len(key_bytes) + key_bytes + value_bytes, digest_size=16).digest()


def topic_batches(settings: Settings, topic: str, partition: int) -> Iterator[list[Message]]:
    """Every committed record of a partition, from its start to its end now, up to 10,000 at once."""
    consumer = Consumer(
        client_config(
            settings, group_id="truth", isolation_level="read_committed", enable_partition_eof=True,
            enable_auto_commit=False, fetch_wait_max_ms=20,
        )
    )  # fmt: skip
    try:
        low, high = log_range(consumer, topic, partition)
        if high <= low:
            return
        consumer.assign([TopicPartition(topic, partition, low)])
        while True:
            messages: list[Message] = []
            ended = False
            for message in consumer.consume(10_000, timeout=0.1):
                error = message.error()
                if error is None:
                    messages.append(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    ended = True
                else:
                    raise AssertionError(error.str())
            if messages:
                yield messages
            if ended:
                return
    finally:
        consumer.close()


def read_topic(settings: Settings, topic: str, partition: int) -> list[Message]:
    """Every committed record of a partition, from its start to its end now."""
    return [message for batch in topic_batches(settings, topic, partition) for message in batch]


def block_of(messages: list[Message]) -> RecordBlock:
    """A block of confluent-kafka messages."""
    return RecordBlock.from_lists(
        [m.key() for m in messages],
        [m.value() for m in messages],
        [m.offset() for m in messages],
        [m.timestamp()[1] for m in messages],
        [m.headers() for m in messages],
    )


class OnePass:
    """One event after the other, from the start, block by block.

    Parameters
    ----------
    parameters: the trunk.
    versions: parameter sets by version, to predict with.
    """

    def __init__(
        self, settings: Settings, parameters: ParameterSet, versions: Mapping[int, ParameterSet] | None = None
    ) -> None:
        schema = Schema.compile(settings)
        self._layout = Layout.compile(settings, schema)
        self._engine = Engine(self._layout, parameters)
        # The slow reader is the one that defines what an event is.
        self._decoder = EventDecoder(schema, settings.limits, settings.topics.format, fast=False)
        self._questions = Questions(self._layout)
        self._heads = {version: self._questions.heads(held) for version, held in (versions or {}).items()}
        self._ttl_ms = [
            _NEVER_MS if ttl_s is None else int(ttl_s * 1000)
            for ttl_s in (one.ttl_s or settings.store.ttl_s for one in settings.modalities.values())
        ]
        self._deadline_ms: dict[int, int] = {}
        self._watermark_ms = 0
        self._rows = PlainRows(1024, self._layout.width)
        self._slot_of: dict[bytes, int] = {}
        self._hidden: dict[tuple[bytes, int], bytes] = {}
        self._digests: dict[tuple[bytes, int], bytes] = {}
        self._predictions: dict[tuple[bytes, int], dict[int, NDArray[np.float32]]] = {}
        self._rejected: dict[int, tuple[str, bytes]] = {}
        self._events = 0
        self._end = 0

    def feed(self, block: RecordBlock) -> None:
        """Pass over the next records."""
        columns = self._decoder.decode(block)
        keys = columns.keys.to_list()
        accepted = np.flatnonzero(columns.accepted)
        slots = np.full(columns.n, -1, np.int64)
        for i in accepted:
            slots[i] = self._slot_of.setdefault(keys[i], len(self._slot_of))
        if len(self._slot_of) > len(self._rows.events_seen):
            self._rows = self._rows.grown(2 * len(self._slot_of))
        expires = self._expiries(columns, slots, accepted)
        triggers: list[Triggers] = []
        for wave in _waves(slots, accepted):
            triggers.append(self._advance(columns, keys, slots, expires, wave))
        self._predict(columns, keys, triggers)
        for one in columns.rejected:
            digest = record_digest(block.key(one.index), block.value(one.index))
            self._rejected[int(columns.offsets[one.index])] = (one.reason, digest)
        self._events += len(accepted)
        self._end = int(columns.offsets[-1]) + 1

    def _expiries(
        self, columns: EventColumns, slots: NDArray[np.int64], accepted: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Which events find the row of their client expired."""
        expires = np.zeros(columns.n, np.bool_)
        for i in accepted.tolist():
            slot, at = int(slots[i]), int(columns.timestamp_ms[i])
            self._watermark_ms = max(self._watermark_ms, at)
            deadline_ms = at + self._ttl_ms[int(columns.modality[i])]
            before = self._deadline_ms.get(slot)
            if before is not None and self._watermark_ms >= before:
                expires[i] = True
                before = None
            self._deadline_ms[slot] = deadline_ms if before is None else max(before, deadline_ms)
        return expires

    def _advance(
        self,
        columns: EventColumns,
        keys: list[bytes],
        slots: NDArray[np.int64],
        expires: NDArray[np.bool_],
        wave: NDArray[np.int64],
    ) -> Triggers:
        rows, chosen = self._rows, slots[wave]
        fresh = chosen[expires[wave]]
        rows.vectors[fresh] = 0.0
        rows.events_seen[fresh] = 0
        rows.last_event_ms[fresh] = 0
        triggers = self._engine.advance(_taken(columns, wave), chosen, rows).triggers
        for i, slot in zip(wave.tolist(), chosen.tolist(), strict=True):
            at = keys[i], int(columns.offsets[i])
            self._hidden[at] = rows.vectors[slot, : self._layout.hidden].tobytes()
            self._digests[at] = self._state(slot).digest
        return dataclasses.replace(triggers, event=wave[triggers.event])

    def _predict(self, columns: EventColumns, keys: list[bytes], triggers: list[Triggers]) -> None:
        if not triggers:
            return
        merged = Triggers(
            *(np.concatenate([getattr(t, f.name) for t in triggers]) for f in dataclasses.fields(Triggers))
        )
        at = [(keys[i], int(columns.offsets[i])) for i in merged.event.tolist()]
        self._predictions.update({one: {} for one in at})
        for version, heads in self._heads.items():
            for one, values in zip(at, self._questions.predict(heads, columns, merged), strict=True):
                self._predictions[one][version] = values

    def _state(self, slot: int) -> State:
        rows = self._rows
        return State(
            rows.vectors[slot].tobytes(), int(rows.events_seen[slot]), int(rows.last_event_ms[slot]),
            int(rows.applied_offset[slot]),
        )  # fmt: skip

    def truth(self) -> Truth:
        """What the events so far have led to."""
        states = {key: self._state(slot) for key, slot in self._slot_of.items()}
        over = {key for key, slot in self._slot_of.items() if self._deadline_ms[slot] <= self._watermark_ms}
        return Truth(
            {key: state for key, state in states.items() if key not in over},
            self._hidden,
            self._events,
            {key: state for key, state in states.items() if key in over},
            self._digests,
            self._predictions,
            self._rejected,
            self._end,
        )


def one_pass(settings: Settings, parameters: ParameterSet, block: RecordBlock) -> Truth:
    """One event after the other, from the start."""
    only = OnePass(settings, parameters)
    only.feed(block)
    return only.truth()


def _waves(slots: NDArray[np.int64], accepted: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Each client's first events, then their second ones, …: no call of the engine has a client twice."""
    depth: dict[int, int] = {}
    waves: list[list[int]] = []
    for i in accepted.tolist():
        d = depth.get(int(slots[i]), 0)
        depth[int(slots[i])] = d + 1
        if d == len(waves):
            waves.append([])
        waves[d].append(i)
    return [np.array(w, np.int64) for w in waves]


def _taken(columns: EventColumns, at: NDArray[np.int64]) -> EventColumns:
    """Some rows of the columns."""
    arrays = ("accepted", "offsets", "timestamp_ms", "modality", "numbers")
    arrays += ("category_start", "category_length", "category_hash")
    taken = {name: getattr(columns, name)[at] for name in arrays}
    return dataclasses.replace(columns, n=len(at), keys=columns.keys.take(at), rejected=[], **taken)


def changelog_states(settings: Settings, layout: Layout, partition: int) -> tuple[dict[bytes, State], int]:
    """States and position that a worker restoring from the changelog alone would have."""
    position = 0
    with EmbeddingStore.open(None, StoreOptions(width=layout.width)) as store:
        for batch in read_changelog(settings, partition, 0):
            store.restore(batch.keys, batch.rows)
            if batch.meta is not None:
                position = batch.meta.position
        return store_states(store), position


def store_states(store: EmbeddingStore) -> dict[bytes, State]:
    """The rows of a store, those expired left out."""
    states: dict[bytes, State] = {}
    for keys, found in store.scan():
        for i, key in enumerate(keys.to_list()):
            states[key] = State(
                found.vectors[i].tobytes(), int(found.events_seen[i]), int(found.last_event_ms[i]),
                int(found.applied_offset[i]),
            )  # fmt: skip
    return states


def check_partition(settings: Settings, parameters: ParameterSet, partition: int) -> Truth:
    """Assert that changelog and embeddings of a partition tell the truth about its events."""
    layout = Layout.compile(settings, Schema.compile(settings))
    events = read_topic(settings, settings.topics.events, partition)
    truth = one_pass(settings, parameters, block_of(events)) if events else Truth({}, {}, 0)
    states, position = changelog_states(settings, layout, partition)
    assert position == truth.end, f"partition {partition} was applied up to {position} of {truth.end}"
    assert set(states) == set(truth.states)
    different = [key for key, state in states.items() if state != truth.states[key]]
    assert not different, f"{len(different)} of {len(states)} states of partition {partition} differ: {different[:3]}"
    last: dict[bytes, tuple[int, int]] = {}
    for message in read_topic(settings, settings.topics.embeddings, partition):
        if message.value() is None:
            last.pop(message.key(), None)
            continue
        embedding = decode_embedding(message.value())
        key = message.key()
        assert embedding.vector.tobytes() == truth.hidden[key, embedding.offset], (
            f"the embedding of {key!r} at offset {embedding.offset} is not its state then"
        )
        last[key] = (embedding.offset, embedding.events_seen)
    expected = {key: (s.applied_offset, s.events_seen) for key, s in truth.states.items()}
    wrong = {
        key: (last.get(key), expected.get(key)) for key in last.keys() | expected if last.get(key) != expected.get(key)
    }
    assert not wrong, f"last embeddings of partition {partition}: (offset, events) found and expected: {wrong}"
    return truth
