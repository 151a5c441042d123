"""A partition's rows and embeddings do not depend on how its input is cut into blocks, expiry included."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.model.engine import Engine
from stream.model.heads import Questions
from stream.model.layout import Layout
from stream.partition import Applied, Partition, Served
from stream.store import EmbeddingStore, StoreOptions
from stream.transport import FetchedBlock
from stream.wire import EmbeddingEncoder, EventDecoder, RecordBlock, Schema, decode_embedding, encode_event
from stream.wire.values import PackedValues
from tests.support.settings import small_settings
from tests.support.trunk import random_head, random_trunk

SETTINGS = small_settings()
SCHEMA = Schema.compile(SETTINGS)
LAYOUT = Layout.compile(SETTINGS, SCHEMA)
QUESTIONS = Questions(LAYOUT)
PARAMETERS = random_trunk(LAYOUT).updated(random_head("accepted", QUESTIONS.tasks[0].width), 7)
SERVED = Served(Engine(LAYOUT, PARAMETERS), QUESTIONS, QUESTIONS.heads(PARAMETERS), 7)
START_MS = 1_600_000_000_000
TTL_MS = 60_000
AT_MS = np.full(9, 10**13)

Drawn = list[tuple[int, int, bool]]
Ttls = tuple[int | None, ...]
#: Of payments and offers.
EVENT_TTLS_MS: Ttls = (15_000, 120_000)
drawn_events = st.lists(
    st.tuples(st.integers(0, 4), st.one_of(st.integers(0, 20_000), st.integers(-90_000, 120_000)), st.booleans()),
    min_size=1,
    max_size=60,
)


event_ttls = st.sampled_from([(), EVENT_TTLS_MS, (None, 20_000)])


def _partition(ttl_ms: int | None, threshold: int = 1, event_ttls_ms: Ttls = ()) -> Partition:
    options = StoreOptions(
        width=LAYOUT.width, ttl_ms=ttl_ms, event_ttls_ms=event_ttls_ms, admission_threshold=threshold
    )
    store = EmbeddingStore.open(None, options)
    decoder = EventDecoder(SCHEMA, SETTINGS.limits, "msgpack")
    return Partition(0, store, 0, decoder, EmbeddingEncoder(LAYOUT.hidden, ["accepted"]))


def _records(drawn: Drawn) -> tuple[list[bytes], list[bytes]]:
    keys, values, at = [], [], START_MS
    for client, step, is_offer in drawn:
        at = max(1, at + step)
        keys.append(str(client).encode())
        fields: dict[str, str | float] = {"product": "loan"} if is_offer else {"amount": 3.0, "merchant": "fuel"}
        values.append(encode_event(str(client), at, "offer" if is_offer else "pay", fields))
    return keys, values


def _run(
    keys: list[bytes],
    values: list[bytes],
    bounds: list[int],
    ttl_ms: int | None,
    threshold: int = 1,
    event_ttls_ms: Ttls = (),
) -> tuple[dict[bytes, tuple[bytes, int, int, int]], dict[tuple[bytes, int], tuple[bytes, float | None]]]:
    partition = _partition(ttl_ms, threshold, event_ttls_ms)
    seen: dict[tuple[bytes, int], tuple[bytes, float | None]] = {}
    standing: set[bytes] = set()
    for begin, end in itertools.pairwise(bounds):
        offsets = np.arange(begin, end)
        block = RecordBlock.from_lists(keys[begin:end], values[begin:end], offsets, np.full(end - begin, 10**13))
        applied = partition.apply(FetchedBlock(0, begin, block), SERVED)
        for clients, records in applied.embeddings:
            if records is None:
                standing.difference_update(clients.to_list())
                continue
            for key, value in zip(clients.to_list(), records, strict=True):
                e = decode_embedding(value)
                seen[key, e.offset] = (e.vector.tobytes(), e.predictions.get("accepted"))
                standing.add(key)
    distinct = sorted(set(keys))
    found = partition.store.lookup(distinct)
    rows = {
        key: (
            found.vectors[i].tobytes(),
            int(found.events_seen[i]),
            int(found.last_event_ms[i]),
            int(found.applied_offset[i]),
        )
        for i, key in enumerate(distinct)
        if found.found[i]
    }
    # Whoever has a row has an embedding, and nobody else once the expired ones are swept.
    assert standing - set(partition.sweep(10_000.0)) == set(rows)
    partition.store.close()
    return rows, seen


def _oracle(drawn: Drawn, ttl_ms: int | None, event_ttls_ms: Ttls) -> dict[bytes, tuple[int, int]]:
    """Events seen and last time of each client's row, by the deadlines of its events alone."""
    rows: dict[bytes, tuple[int, int, float]] = {}
    at, now = START_MS, 0
    for client, step, is_offer in drawn:
        key, at = str(client).encode(), max(1, at + step)
        ttl = event_ttls_ms[is_offer] if event_ttls_ms else ttl_ms
        now = max(now, at)
        events, last, deadline = rows.get(key, (0, 0, 0.0))
        if now >= deadline:
            events, last, deadline = 0, 0, 0.0
        rows[key] = events + 1, max(last, at), max(deadline, math.inf if ttl is None else at + ttl)
    return {key: (events, last) for key, (events, last, deadline) in rows.items() if deadline > now}


@settings(max_examples=120, deadline=None)
@given(drawn_events, st.lists(st.integers(0, 60), max_size=5), st.booleans(), event_ttls)
def test_cutting_differently_changes_no_row_and_no_embedding(
    drawn: Drawn, cuts: list[int], expire: bool, event_ttls_ms: Ttls
) -> None:
    # Given events of few clients that jump in time, so that rows expire within a batch
    keys, values = _records(drawn)
    n, ttl = len(drawn), TTL_MS if expire else None
    # When they are applied one at a time, in one block, and cut anywhere
    single_rows, single_seen = _run(keys, values, list(range(n + 1)), ttl, 1, event_ttls_ms)
    # (and are as an oracle that knows deadlines alone has them)
    assert {key: (row[1], row[2]) for key, row in single_rows.items()} == _oracle(drawn, ttl, event_ttls_ms)
    for bounds in ([0, n], sorted({0, n, *(min(c, n) for c in cuts)})):
        rows, seen = _run(keys, values, bounds, ttl, 1, event_ttls_ms)
        # Then rows are equal bit for bit, and every embedding that was published is the one of that event
        assert rows == single_rows
        assert seen.items() <= single_seen.items()
        # And every prediction that was asked for was published
        assert {at for at, (_, p) in single_seen.items() if p is not None} == {
            at for at, (_, p) in seen.items() if p is not None
        }


@settings(max_examples=150, deadline=None)
@given(drawn_events, st.lists(st.integers(0, 60), max_size=5), st.booleans(), st.sampled_from([2, 3, 7]), event_ttls)
def test_a_filtered_client_has_the_row_it_would_have_had(
    drawn: Drawn, cuts: list[int], expire: bool, threshold: int, event_ttls_ms: Ttls
) -> None:
    # Given events of few clients, applied one at a time without a filter
    keys, values = _records(drawn)
    n, ttl = len(drawn), TTL_MS if expire else None
    rows, seen = _run(keys, values, list(range(n + 1)), ttl, 1, event_ttls_ms)
    for bounds in (list(range(n + 1)), [0, n], sorted({0, n, *(min(c, n) for c in cuts)})):
        # When clients get a row at their n-th event, and the batches are cut anywhere
        filtered, published = _run(keys, values, bounds, ttl, threshold, event_ttls_ms)
        # Then exactly those that have had so many since they began have one, and it is the same, bit for bit
        assert filtered == {key: row for key, row in rows.items() if row[1] >= threshold}
        # And every embedding that was published is the one of that event
        assert published.items() <= seen.items()


def test_events_before_admission_are_applied_at_it() -> None:
    # Given a client whose first two events are held
    keys, values = _records([(1, 0, True), (1, 1000, False), (1, 1000, False)])
    _, unfiltered = _run(keys, values, [0, 1, 2, 3], None)
    # When the third one comes
    rows, seen = _run(keys, values, [0, 1, 2, 3], None, 3)
    # Then its row has all three, and the prediction that the first one asked for is published
    assert rows[b"1"][1] == 3
    assert seen == {at: unfiltered[at] for at in [(b"1", 0), (b"1", 2)]}


def test_a_returning_client_starts_from_zero() -> None:
    # Given a client with two events, whose time to live passes by another client's event
    steps: Drawn = [(1, 0, False), (1, 1000, False), (2, TTL_MS, False), (1, 0, False)]
    keys, values = _records(steps)
    # When it comes back in the same block
    rows, _ = _run(keys, values, [0, 4], TTL_MS)
    fresh, _ = _run(keys[3:], values[3:], [0, 1], TTL_MS)
    # Then its row is that of a new client, counts included
    assert rows[b"1"][:3] == fresh[b"1"][:3]
    assert rows[b"1"][1] == 1


def test_a_block_that_does_not_follow_is_recognised() -> None:
    partition = _partition(None)
    keys, values = _records([(0, 0, False)] * 3)
    block = RecordBlock.from_lists(keys, values, [5, 6, 7], [10**13] * 3)
    assert not partition.follows(FetchedBlock(0, 5, block))
    assert partition.follows(FetchedBlock(0, 0, block))
    partition.apply(FetchedBlock(0, 0, block), SERVED)
    assert partition.position == 8


class _FailingEncoder(EmbeddingEncoder):
    """Encodes so many batches and no more."""

    left = 0

    def encode(self, *arguments: Any) -> PackedValues:
        self.left -= 1
        if self.left < 0:
            raise ValueError("no more")
        return super().encode(*arguments)


@pytest.mark.parametrize(("ttl_ms", "threshold", "encoded"), [(None, 1, 0), (TTL_MS, 1, 1), (None, 2, 0)])
def test_a_block_that_fails_leaves_every_row_as_it_was(ttl_ms: int | None, threshold: int, encoded: int) -> None:
    # Given rows, and a block with more events of each client, the last ones after their rows have expired
    keys, values = _records([(i % 3, 1_000 + (2 * TTL_MS if i == 14 else 0), i % 5 == 0) for i in range(18)])
    whole, _ = _run(keys, values, [0, 9, 18], ttl_ms, threshold)
    partition = _partition(ttl_ms, threshold)
    blocks = [
        FetchedBlock(0, begin, RecordBlock.from_lists(keys[begin:end], values[begin:end], np.arange(begin, end), AT_MS))
        for begin, end in ((0, 9), (9, 18))
    ]
    partition.apply(blocks[0], SERVED)
    before = partition.store.lookup(sorted(set(keys)))
    # When it cannot be published
    failing = _FailingEncoder(LAYOUT.hidden, ["accepted"])
    failing.left = encoded
    decoder = EventDecoder(SCHEMA, SETTINGS.limits, "msgpack")
    with pytest.raises(ValueError, match="no more"):
        Partition(0, partition.store, 9, decoder, failing).apply(blocks[1], SERVED)
    # Then nothing of it is in the rows
    after = partition.store.lookup(sorted(set(keys)))
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    # And it can be applied again
    partition.apply(blocks[1], SERVED)
    found = partition.store.lookup(sorted(set(keys)))
    assert {key: found.vectors[i].tobytes() for i, key in enumerate(sorted(set(keys)))} == {
        key: row[0] for key, row in whole.items()
    }


def _published(applied: Applied) -> dict[str, tuple[int, bytes]]:
    ((_, records),) = applied.embeddings
    assert records is not None
    return {e.client_id: (e.offset, e.vector.tobytes()) for e in map(decode_embedding, records)}


def test_replayed_events_publish_their_clients_again() -> None:
    # Given a partition that has applied a block
    partition = _partition(None)
    keys, values = _records([(0, 0, False), (1, 5, False), (0, 5, True)])
    block = RecordBlock.from_lists(keys, values, [0, 1, 2], [10**13] * 3)
    first = partition.apply(FetchedBlock(0, 0, block), SERVED)
    # When the same block comes again
    again = partition.apply(FetchedBlock(0, 3, block), SERVED)
    # Then nothing is applied, and the states are published once more with the same offsets
    assert (again.events, again.replayed) == (0, 3)
    assert _published(again) == _published(first)


def test_served_features_can_replace_the_hidden_state() -> None:
    configured = small_settings(MODEL__VECTOR="features")
    layout = Layout.compile(configured, SCHEMA)
    questions = Questions(layout)
    served = Served(Engine(layout, PARAMETERS), questions, {}, 1)
    store = EmbeddingStore.open(None, StoreOptions(width=layout.width))
    encoder = EmbeddingEncoder(questions.readout.width, ["accepted"])
    partition = Partition(0, store, 0, EventDecoder(SCHEMA, configured.limits, "msgpack"), encoder)
    keys, values = _records([(0, 0, False)])
    block = RecordBlock.from_lists(keys, values, [0], [10**13])
    ((_, (record,)),) = partition.apply(FetchedBlock(0, 0, block), served).embeddings
    vector = decode_embedding(record).vector
    assert vector.shape == (questions.readout.width,)
    at = questions.readout.names.index("payments")
    assert vector[at] == pytest.approx(np.log1p(1.0))
