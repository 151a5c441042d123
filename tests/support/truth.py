"""The truth about a system, recomputed from its topics alone.

Every event topic is passed over once, from its start, by one engine on plain arrays: no worker, no store, no
checkpoint. States are compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from confluent_kafka import Consumer, KafkaError, Message, TopicPartition
from numpy.typing import NDArray

from stream.changelog import read_changelog
from stream.kafka import client_config
from stream.model.engine import Engine
from stream.model.layout import Layout
from stream.model.parameters import ParameterSet
from stream.settings import Settings
from stream.store import EmbeddingStore, StoreOptions
from stream.wire import EventColumns, EventDecoder, RecordBlock, Schema, decode_embedding


class PlainRows:
    """Rows in plain arrays, one slot for each client."""

    def __init__(self, rows: int, width: int) -> None:
        self.vectors = np.zeros((rows, width), np.float32)
        self.events_seen = np.zeros(rows, np.int64)
        self.last_event_ms = np.zeros(rows, np.int64)
        self.applied_offset = np.full(rows, -1, np.int64)


@dataclass(frozen=True)
class State:
    """One client's row."""

    vector: bytes
    events_seen: int
    last_event_ms: int
    applied_offset: int


@dataclass(frozen=True)
class Truth:
    """States by client after all events, hidden states by (client, offset) on the way, and accepted events."""

    states: Mapping[bytes, State]
    hidden: Mapping[tuple[bytes, int], bytes]
    events: int


def read_topic(settings: Settings, topic: str, partition: int) -> list[Message]:
    """Every committed record of a partition, from its start to its end now."""
    consumer = Consumer(
        client_config(
            settings, group_id="truth", isolation_level="read_committed", enable_partition_eof=True,
            enable_auto_commit=False, fetch_wait_max_ms=20,
        )
    )  # fmt: skip
    messages: list[Message] = []
    try:
        low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=30, cached=False)
        if high <= low:
            return []
        consumer.assign([TopicPartition(topic, partition, low)])
        while True:
            for message in consumer.consume(10_000, timeout=0.1):
                error = message.error()
                if error is None:
                    messages.append(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    return messages
                else:
                    raise AssertionError(error.str())
    finally:
        consumer.close()


def block_of(messages: list[Message]) -> RecordBlock:
    """A block of confluent-kafka messages."""
    return RecordBlock.from_lists(
        [m.key() for m in messages],
        [m.value() for m in messages],
        [m.offset() for m in messages],
        [m.timestamp()[1] for m in messages],
        [m.headers() for m in messages],
    )


def one_pass(settings: Settings, parameters: ParameterSet, block: RecordBlock) -> Truth:
    """One event after the other, from the start."""
    schema = Schema.compile(settings)
    layout = Layout.compile(settings, schema)
    engine = Engine(layout, parameters)
    columns = EventDecoder(schema, settings.limits, settings.topics.format).decode(block)
    keys = columns.keys.to_list()
    slot_of: dict[bytes, int] = {}
    slots = np.full(len(block), -1, np.int64)
    for i in np.flatnonzero(columns.accepted):
        slots[i] = slot_of.setdefault(keys[i], len(slot_of))
    rows = PlainRows(max(1, len(slot_of)), layout.width)
    hidden: dict[tuple[bytes, int], bytes] = {}
    for wave in _waves(columns, slots):
        alone = np.where(np.isin(np.arange(len(slots)), wave), slots, -1)
        engine.advance(columns, alone, rows)
        for i in wave:
            hidden[keys[i], int(columns.offsets[i])] = rows.vectors[slots[i], : layout.hidden].tobytes()
    states = {
        key: State(
            rows.vectors[slot].tobytes(), int(rows.events_seen[slot]), int(rows.last_event_ms[slot]),
            int(rows.applied_offset[slot]),
        )
        for key, slot in slot_of.items()
    }  # fmt: skip
    return Truth(states, hidden, int(columns.accepted.sum()))


def _waves(columns: EventColumns, slots: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Each client's first events, then their second ones, …: no call of the engine has a client twice."""
    depth: dict[int, int] = {}
    waves: list[list[int]] = []
    for i in np.flatnonzero(slots >= 0):
        d = depth.get(int(slots[i]), 0)
        depth[int(slots[i])] = d + 1
        if d == len(waves):
            waves.append([])
        waves[d].append(int(i))
    return [np.array(w, np.int64) for w in waves]


def changelog_states(settings: Settings, layout: Layout, partition: int) -> tuple[dict[bytes, State], int]:
    """States and position that a worker restoring from the changelog alone would have."""
    states: dict[bytes, State] = {}
    position = 0
    with EmbeddingStore.open(None, StoreOptions(width=layout.width)) as store:
        for batch in read_changelog(settings, partition, 0):
            store.restore(batch.keys, batch.rows)
            if batch.meta is not None:
                position = batch.meta.position
        for keys, found in store.scan():
            for i, key in enumerate(keys.to_list()):
                states[key] = State(
                    found.vectors[i].tobytes(), int(found.events_seen[i]), int(found.last_event_ms[i]),
                    int(found.applied_offset[i]),
                )  # fmt: skip
    return states, position


def check_partition(settings: Settings, parameters: ParameterSet, partition: int) -> Truth:
    """Assert that changelog and embeddings of a partition tell the truth about its events."""
    layout = Layout.compile(settings, Schema.compile(settings))
    events = read_topic(settings, settings.topics.events, partition)
    truth = one_pass(settings, parameters, block_of(events)) if events else Truth({}, {}, 0)
    states, position = changelog_states(settings, layout, partition)
    end = events[-1].offset() + 1 if events else 0
    assert position == end, f"partition {partition} was applied up to {position} of {end}"
    assert set(states) == set(truth.states)
    different = [key for key, state in states.items() if state != truth.states[key]]
    assert not different, f"{len(different)} of {len(states)} states of partition {partition} differ: {different[:3]}"
    assert sum(state.events_seen for state in states.values()) == truth.events
    last: dict[bytes, tuple[int, int]] = {}
    for message in read_topic(settings, settings.topics.embeddings, partition):
        embedding = decode_embedding(message.value())
        key = message.key()
        assert embedding.vector.tobytes() == truth.hidden[key, embedding.offset], (
            f"the embedding of {key!r} at offset {embedding.offset} is not its state then"
        )
        last[key] = (embedding.offset, embedding.events_seen)
    assert last == {key: (s.applied_offset, s.events_seen) for key, s in truth.states.items()}
    return truth
