"""Rows after a batch equal rows after the same events one at a time, bit for bit."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.errors import ParametersError
from stream.model.engine import Engine
from stream.model.layout import Layout
from stream.wire import EventDecoder, RecordBlock, Schema, encode_event
from tests.support.settings import small_settings
from tests.support.trunk import random_trunk
from tests.support.truth import PlainRows

SETTINGS = small_settings()
SCHEMA = Schema.compile(SETTINGS)
LAYOUT = Layout.compile(SETTINGS, SCHEMA)
ENGINE = Engine(LAYOUT, random_trunk(LAYOUT))
DECODER = EventDecoder(SCHEMA, SETTINGS.limits, "msgpack")
START_MS = 1_600_000_000_000
CLIENTS = 12

Event = tuple[int, int, str, dict[str, str | float]]

pays = st.fixed_dictionaries(
    {
        "amount": st.floats(-1e6, 1e6, width=32),
        "merchant": st.sampled_from(["bakery", "fuel", "shop-1", "unknown", "x" * 32]),
    },
    optional={"note": st.text(max_size=20), "channel": st.sampled_from(["web", "phone"])},
)
offers = st.fixed_dictionaries(
    {"product": st.sampled_from(["loan", "card", "house"])}, optional={"rate": st.floats(0, 9)}
)
events = st.lists(
    st.tuples(
        st.integers(0, CLIENTS - 1),
        # Mostly forwards, sometimes far forwards or late.
        st.one_of(st.integers(0, 5_000), st.integers(0, 10**10), st.integers(-100_000, 0)),
        st.one_of(st.tuples(st.just("pay"), pays), st.tuples(st.just("offer"), offers)),
    ),
    max_size=80,
)


def _block(drawn: list[tuple[int, int, tuple[str, dict[str, str | float]]]]) -> tuple[RecordBlock, np.ndarray]:
    at = START_MS
    keys, values, slots = [], [], []
    for client, step, (modality, fields) in drawn:
        at = max(0, at + step)
        keys.append(str(client).encode())
        values.append(encode_event(str(client), at, modality, fields))
        slots.append(client)
    n = len(drawn)
    block = RecordBlock.from_lists(keys, values, np.arange(n), np.full(n, 10**13))
    return block, np.array(slots, np.int64)


_OF_TRIGGERS = ("event", "events_seen", "hidden", "memory")


def _bits(rows: PlainRows) -> bytes:
    return b"".join(a.tobytes() for a in (rows.vectors, rows.events_seen, rows.last_event_ms, rows.applied_offset))


@settings(max_examples=150, deadline=None)
@given(events, st.lists(st.integers(0, 80), max_size=6))
def test_any_cut_into_batches_gives_the_same_bits(
    drawn: list[tuple[int, int, tuple[str, dict[str, str | float]]]], cuts: list[int]
) -> None:
    # Given events of several clients, some late
    block, slots = _block(drawn)
    columns = DECODER.decode(block)
    assert columns.accepted.all(), columns.rejected
    # When they are applied one at a time, as one batch, and cut anywhere
    results, asked = [], []
    n = len(drawn)
    for bounds in (list(range(n + 1)), [0, n], sorted({0, n, *(min(c, n) for c in cuts)})):
        rows = PlainRows(CLIENTS, LAYOUT.width)
        triggers = []
        for begin, end in itertools.pairwise(bounds):
            inside = (np.arange(n) >= begin) & (np.arange(n) < end)
            triggers.append(ENGINE.advance(columns, np.where(inside, slots, -1), rows).triggers)
        results.append(_bits(rows))
        asked.append([b"".join(getattr(one, name).tobytes() for one in triggers) for name in _OF_TRIGGERS])
    # Then all rows are equal, bit for bit, and finite, and so are those that predictions are made from
    assert results[0] == results[1] == results[2]
    assert asked[0] == asked[1] == asked[2]
    assert np.isfinite(rows.vectors).all()


@settings(max_examples=50, deadline=None)
@given(events, st.integers(0, 80))
def test_replayed_events_change_nothing(
    drawn: list[tuple[int, int, tuple[str, dict[str, str | float]]]], applied: int
) -> None:
    # Given rows that have applied some of the events
    block, slots = _block(drawn)
    columns = DECODER.decode(block)
    rows, whole = PlainRows(CLIENTS, LAYOUT.width), PlainRows(CLIENTS, LAYOUT.width)
    ENGINE.advance(columns, slots, whole)
    ENGINE.advance(columns, np.where(np.arange(len(drawn)) < applied, slots, -1), rows)
    # When all of them come again
    result = ENGINE.advance(columns, slots, rows)
    # Then each row has applied each of its events once
    assert _bits(rows) == _bits(whole)
    assert result.events == max(0, len(drawn) - applied)


def test_memory_follows_its_definition() -> None:
    # Given payments and offers of one client at known times
    rows = PlainRows(1, LAYOUT.width)
    steps = [
        (0, "pay", {"amount": 10.0, "merchant": "bakery"}),
        (60, "pay", {"amount": 100.0, "merchant": "fuel"}),
        (10, "pay", {"amount": -4.0, "merchant": "other"}),
        (30, "offer", {"product": "card"}),
    ]
    at, values = START_MS, []
    for seconds, modality, fields in steps:
        at += seconds * 1000
        values.append(encode_event("0", at, modality, fields))
    n = len(steps)
    block = RecordBlock.from_lists([b"0"] * n, values, np.arange(n), np.full(n, 10**13))
    # When they are applied
    ENGINE.advance(DECODER.decode(block), np.zeros(n, np.int64), rows)
    # Then each memory is what the settings say, decayed to the last event
    memory = rows.vectors[0, LAYOUT.hidden :].astype(float)
    place = {o.memory.name: o for o in LAYOUT.operations}

    def of(name: str, slot: int = 0) -> float:
        return float(memory[place[name].start + slot])

    def left(seconds: float, half_life: float) -> float:
        return math.pow(2.0, -seconds / half_life)

    assert of("payments") == 3.0
    assert of("spend_1h") == pytest.approx(10 * left(100, 3600) + 100 * left(40, 3600) - 4 * left(30, 3600), rel=1e-5)
    assert of("spend_by_merchant", 0) == pytest.approx(10 * left(100, 60), rel=1e-5)
    assert of("spend_by_merchant", 1) == pytest.approx(100 * left(40, 60), rel=1e-5)
    assert of("spend_by_merchant", 2) == pytest.approx(-4 * left(30, 60), rel=1e-5)
    assert of("sessions") == pytest.approx(left(100, 3600) + left(40, 3600), rel=1e-5)
    assert of("large") == 1.0
    assert of("refunds") == pytest.approx(left(30, 60), rel=1e-5)

    def time_of(name: str, slot: int = 0) -> float:
        start = place[name].start + 2 * slot
        return memory[start] * 2**24 + memory[start + 1]

    assert time_of("last_fuel") == START_MS + 60_000
    assert time_of("last_by_product", 1) == START_MS + 100_000
    assert time_of("last_by_product", 0) == 0
    sketch = memory[place["merchants"].start : place["merchants"].start + 8]
    assert np.abs(sketch).max() <= 3.0
    assert np.abs(sketch).sum() > 0


def test_a_late_event_counts_for_what_would_be_left_of_it_and_moves_no_time_back() -> None:
    # Given a payment, and another one an hour late
    rows = PlainRows(1, LAYOUT.width)
    values = [
        encode_event("0", START_MS, "pay", {"amount": 8.0, "merchant": "fuel"}),
        encode_event("0", START_MS - 3_600_000, "pay", {"amount": 8.0, "merchant": "fuel"}),
    ]
    block = RecordBlock.from_lists([b"0"] * 2, values, np.arange(2), np.full(2, 10**13))
    # When both are applied
    ENGINE.advance(DECODER.decode(block), np.zeros(2, np.int64), rows)
    # Then the late one counts half at a half-life of an hour, and the last time stays
    place = {o.memory.name: o for o in LAYOUT.operations}
    memory = rows.vectors[0, LAYOUT.hidden :].astype(float)
    assert memory[place["spend_1h"].start] == pytest.approx(12.0, rel=1e-6)
    assert rows.last_event_ms[0] == START_MS
    start = place["last_fuel"].start
    assert memory[start] * 2**24 + memory[start + 1] == START_MS


def test_triggers_hold_the_row_right_after_the_event() -> None:
    # Given an offer between payments of the same client in one batch
    pay = {"amount": 5.0, "merchant": "bakery"}
    values = [
        encode_event("0", START_MS, "pay", pay),
        encode_event("0", START_MS + 1000, "offer", {"product": "loan"}),
        encode_event("0", START_MS + 2000, "pay", pay),
    ]
    block = RecordBlock.from_lists([b"0"] * 3, values, np.arange(3), np.full(3, 10**13))
    columns = DECODER.decode(block)
    # When the batch is applied at once, and up to the offer only
    advanced = ENGINE.advance(columns, np.zeros(3, np.int64), PlainRows(1, LAYOUT.width))
    rows = PlainRows(1, LAYOUT.width)
    ENGINE.advance(columns, np.array([0, 0, -1]), rows)
    # Then the captured row is the one up to the offer
    assert advanced.triggers.event.tolist() == [1]
    assert advanced.triggers.events_seen.tolist() == [2]
    assert advanced.triggers.hidden[0].tobytes() == rows.vectors[0, : LAYOUT.hidden].tobytes()
    assert advanced.triggers.memory[0].tobytes() == rows.vectors[0, LAYOUT.hidden :].tobytes()


def test_the_cell_is_a_gated_recurrent_unit() -> None:
    # Given torch's own GRU cell with the same weights
    import torch

    parameters = random_trunk(LAYOUT)
    cell = torch.nn.GRUCell(LAYOUT.inputs, LAYOUT.hidden)
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(cell, name).copy_(torch.from_numpy(np.array(parameters[f"trunk/{name}"])))
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(37, LAYOUT.inputs)).astype(np.float32)
    state = rng.uniform(-1, 1, (37, LAYOUT.hidden)).astype(np.float32)
    # When both step the same rows
    ours = torch.from_numpy(ENGINE.cell._one_wave(inputs, state))
    with torch.no_grad():
        theirs = cell(torch.from_numpy(inputs), torch.from_numpy(state))
    # Then they agree to rounding
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_wave_wider_than_the_cache_is_the_same_as_narrow_ones() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(1000, LAYOUT.inputs)).astype(np.float32)
    state = rng.uniform(-1, 1, (1000, LAYOUT.hidden)).astype(np.float32)
    wide = ENGINE.cell._one_wave(inputs, state)
    narrow = [ENGINE.cell._one_wave(inputs[at : at + 90], state[at : at + 90]) for at in range(0, 1000, 90)]
    assert np.concatenate(narrow).tobytes() == wide.tobytes()


@pytest.mark.parametrize("hidden", [8, 24, 64, 100, 256])
def test_a_row_does_not_depend_on_its_neighbours(hidden: int) -> None:
    configured = small_settings(MODEL__HIDDEN=str(hidden))
    layout = Layout.compile(configured, SCHEMA)
    Engine(layout, random_trunk(layout)).cell.self_check(np.random.default_rng(0))


def test_a_trunk_of_other_settings_is_refused() -> None:
    other = small_settings(MODEL__HIDDEN="32")
    with pytest.raises(ParametersError, match=r"weight_ih.*settings describe \(96, "):
        Engine(Layout.compile(other, SCHEMA), random_trunk(LAYOUT))
