"""The memory of a row, for any description of it: what its definition says, and the same bits however it came about."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stream.errors import SettingsError
from stream.model.engine import Engine, EventEncoder
from stream.model.kernels import ring_code, tally_bins
from stream.model.layout import Layout
from stream.model.readout import Readout
from stream.settings import Memory, Where
from stream.wire import EventColumns, EventDecoder, RecordBlock, Schema, encode_event, hash_bytes
from tests.support.settings import small_settings
from tests.support.trunk import random_trunk
from tests.support.truth import PlainRows

SMALL = small_settings()
SCHEMA = Schema.compile(SMALL)
DECODER = EventDecoder(SCHEMA, SMALL.limits, "msgpack")
START_MS = 1_600_000_000_000
CLIENTS = 5
MERCHANTS = ("bakery", "fuel")
PRODUCTS = ("loan", "card")


class Event(NamedTuple):
    client: int
    at_ms: int
    modality: str
    fields: dict[str, Any]


conditions = st.one_of(
    st.none(),
    st.builds(Where, field=st.just("amount"), above=st.sampled_from([0.0, 50.0])),
    st.builds(Where, field=st.just("amount"), below=st.just(0.0)),
    st.builds(Where, field=st.just("merchant"), equals=st.sampled_from(["fuel", "shop-1"])),
)
half_lives = st.sampled_from([None, 1.0, 60.0, 86_400.0])
by_merchant = st.sampled_from([None, "merchant"])


def _kind(kind: str, **of: Any) -> st.SearchStrategy[Memory]:
    of.setdefault("modality", st.just("pay"))
    if "where" not in of:
        of["where"] = conditions
    return st.builds(Memory, name=st.just("unnamed"), kind=st.just(kind), **of)


sizes = st.integers(1, 5)
kinds = st.one_of(
    _kind("count", by=by_merchant, half_life_s=half_lives),
    _kind("sum", field=st.just("amount"), by=by_merchant, half_life_s=half_lives),
    _kind("visits", gap_s=st.sampled_from([0.0, 30.0]), half_life_s=half_lives),
    _kind("first_time", by=by_merchant),
    _kind("last_time", by=by_merchant),
    _kind("last", field=st.sampled_from(["amount", "merchant"]), size=sizes),
    _kind("last", modality=st.just("offer"), field=st.sampled_from(["product", "rate"]), where=st.none(), size=sizes),
    _kind("ring", field=st.sampled_from(["channel", "merchant"]), size=sizes),
    _kind("top", field=st.sampled_from(["channel", "merchant"]), size=sizes, half_life_s=half_lives),
    _kind(
        "tally", field=st.sampled_from(["channel", "merchant"]), dimensions=st.integers(1, 9), half_life_s=half_lives
    ),
    _kind(
        "sketch", field=st.sampled_from(["channel", "merchant"]), dimensions=st.integers(1, 64), half_life_s=half_lives
    ),
)
memories = st.lists(kinds, min_size=1, max_size=8).map(
    lambda drawn: [msgspec.structs.replace(one, name=f"m{at}") for at, one in enumerate(drawn)]
)
pays = st.fixed_dictionaries(
    {"amount": st.floats(-1e6, 1e6, width=32), "merchant": st.sampled_from([*MERCHANTS, "shop-1", "x" * 32])},
    optional={"channel": st.sampled_from(["web", "phone", "desk"])},
)
offers = st.fixed_dictionaries(
    {"product": st.sampled_from([*PRODUCTS, "house"])}, optional={"rate": st.floats(0, 9, width=32)}
)
steps = st.lists(
    st.tuples(
        st.integers(0, CLIENTS - 1),
        # Mostly forwards, sometimes far forwards or late.
        st.one_of(st.integers(0, 5_000), st.integers(0, 10**9), st.integers(-100_000, 0)),
        st.one_of(st.tuples(st.just("pay"), pays), st.tuples(st.just("offer"), offers)),
    ),
    max_size=50,
)


def _events(drawn: list[Any]) -> list[Event]:
    at, events = START_MS, []
    for client, step, (modality, fields) in drawn:
        at += step
        events.append(Event(client, at, modality, fields))
    return events


def _columns(events: list[Event]) -> EventColumns:
    n = len(events)
    values = [encode_event(str(e.client), e.at_ms, e.modality, e.fields) for e in events]
    block = RecordBlock.from_lists([str(e.client).encode() for e in events], values, np.arange(n), np.full(n, 10**13))
    columns = DECODER.decode(block)
    assert columns.accepted.all(), columns.rejected
    return columns


def _layout(described: list[Memory]) -> Layout:
    return Layout.compile(msgspec.structs.replace(SMALL, memory=described), SCHEMA)


def _bits(rows: PlainRows) -> bytes:
    return b"".join(a.tobytes() for a in (rows.vectors, rows.events_seen, rows.last_event_ms, rows.applied_offset))


def _holds(where: Where | None, fields: dict[str, Any]) -> bool:
    if where is None:
        return True
    value = fields[where.field]
    if where.above is not None:
        return bool(value > where.above)
    return bool(value < where.below) if where.below is not None else value == where.equals


def _expected(memory: Memory, events: list[Event]) -> NDArray[np.float64]:
    """A memory other than a sketch after a client's events, by its definition; times in milliseconds."""
    now = max(event.at_ms for event in events)
    taken = [e for e in events if e.modality == memory.modality and _holds(memory.where, e.fields)]
    slots = 3 if memory.by else 1
    out = np.zeros(slots)
    visited = 0
    latest: list[float] = []
    bins = np.zeros(2 * memory.dimensions)
    names: list[str] = []
    counts: list[float] = []
    for event in taken:
        value = event.fields.get(memory.field or "")
        slot = (*MERCHANTS, event.fields["merchant"]).index(event.fields["merchant"]) if memory.by else 0
        left = 1.0 if memory.half_life_s is None else math.pow(2.0, -(now - event.at_ms) / 1000 / memory.half_life_s)
        if memory.kind == "count":
            out[slot] += left
        elif memory.kind == "sum":
            out[slot] += left * value
        elif memory.kind == "visits":
            if not visited or event.at_ms - visited > memory.gap_s * 1000:
                out[0] += left
            visited = max(visited, event.at_ms)
        elif memory.kind == "first_time":
            out[slot] = min(out[slot] or math.inf, event.at_ms)
        elif memory.kind == "last_time":
            out[slot] = max(out[slot], event.at_ms)
        elif value is not None and memory.kind == "tally":
            one, other = tally_bins(np.uint64(hash_bytes(value.encode())), memory.dimensions)
            bins[[one, memory.dimensions + other]] += left
        elif value is not None and memory.kind == "top":
            if value not in names and len(names) == memory.size:
                smallest = counts.index(min(counts))
                names[smallest], counts[smallest] = value, 0.0
            elif value not in names:
                names.append(value)
                counts.append(0.0)
            counts[names.index(value)] += 1.0
        elif value is not None and memory.kind == "ring":
            latest = [*map(float, ring_code(np.uint64(hash_bytes(value.encode())))), *latest]
        elif value is not None and isinstance(value, str):
            declared = MERCHANTS if memory.field == "merchant" else PRODUCTS
            latest = [1.0 + (*declared, value).index(value), *latest]
        elif value is not None:
            latest = [value, *latest]
    if memory.kind == "tally":
        return bins
    if memory.kind == "top":
        codes = [float(half) for name in names for half in ring_code(np.uint64(hash_bytes(name.encode())))]
        out = np.zeros(3 * memory.size)
        out[: len(counts)] = counts
        out[memory.size : memory.size + len(codes)] = codes
        return out
    if memory.kind in ("last", "ring"):
        kept = memory.size * (2 if memory.kind == "ring" else 1)
        numbers = memory.field in ("amount", "rate")
        out = np.zeros(kept + numbers)
        out[: min(kept, len(latest))] = latest[:kept]
        if numbers:
            out[kept] = min(kept, len(latest))
    return out


def _kept(layout: Layout, number: int, memory: NDArray[np.float32]) -> NDArray[np.float64]:
    operation = layout.operations[number]
    width = operation.slots * (2 if operation.memory.is_time else 1)
    floats = memory[operation.start : operation.start + width].astype(np.float64)
    if operation.memory.kind == "top":
        values = memory[operation.time_start : operation.time_start + 2 * operation.slots]
        return np.concatenate([floats, values.astype(np.float64)])
    return floats[0::2] * 2.0**24 + floats[1::2] if operation.memory.is_time else floats


@settings(max_examples=120, deadline=None)
@given(memories, steps)
def test_any_memory_is_what_its_definition_says(described: list[Memory], drawn: list[Any]) -> None:
    # Given any description and any events, some late
    layout, events = _layout(described), _events(drawn)
    rows = PlainRows(CLIENTS, layout.width)
    # When they are applied as one batch
    Engine(layout, random_trunk(layout)).advance(_columns(events), np.array([e.client for e in events], np.int64), rows)
    # Then each memory of each client is what its events say, to float32's rounding
    for client in {event.client for event in events}:
        own = [event for event in events if event.client == client]
        memory = rows.vectors[client, layout.hidden :]
        assert np.isfinite(memory).all()
        for number, one in enumerate(described):
            # Which count is the smallest is a matter of float32's rounding where counts decay.
            if one.kind != "sketch" and not (one.kind == "top" and one.half_life_s):
                expected, kept = _expected(one, own), _kept(layout, number, memory)
                largest = sum(abs(e.fields.get("amount", 0.0)) for e in own) if one.kind == "sum" else 1.0
                exact = one.is_time or one.kind in ("last", "ring", "top")
                np.testing.assert_allclose(
                    kept, expected, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5 * largest
                )


@settings(max_examples=120, deadline=None)
@given(memories, steps, st.lists(st.integers(0, 50), max_size=5))
def test_any_memory_has_the_same_bits_served_replayed_and_trained_on(
    described: list[Memory], drawn: list[Any], cuts: list[int]
) -> None:
    # Given any description and any events, some late
    layout, events = _layout(described), _events(drawn)
    columns, n = _columns(events), len(events)
    slots = np.array([event.client for event in events], np.int64)
    engine = Engine(layout, random_trunk(layout))
    # When they are applied one at a time, as one batch, and cut anywhere with each batch delivered twice
    results, triggers = [], []
    for bounds in (list(range(n + 1)), [0, n], sorted({0, n, *(min(cut, n) for cut in cuts)})):
        rows, seen = PlainRows(CLIENTS, layout.width), []
        for begin, end in itertools.pairwise(bounds):
            inside = (np.arange(n) >= begin) & (np.arange(n) < end)
            for _ in range(2):
                seen.append(engine.advance(columns, np.where(inside, slots, -1), rows).triggers.memory)
        results.append(_bits(rows))
        triggers.append(b"".join(memory.tobytes() for memory in seen))
    # Then rows, and the memory that examples hold, are equal bit for bit
    assert results[0] == results[1] == results[2]
    assert triggers[0] == triggers[1] == triggers[2]
    # And so is the memory where a trunk is trained, which has no trunk yet
    scale = np.stack([np.full(layout.numbers, 3.0), np.full(layout.numbers, 2.0)])
    rows = PlainRows(CLIENTS, layout.width)
    EventEncoder(layout, [[b"web"] for _ in layout.embedded], scale).encode(columns, slots, rows)
    served = PlainRows(CLIENTS, layout.width)
    engine.advance(columns, slots, served)
    assert rows.vectors[:, layout.hidden :].tobytes() == served.vectors[:, layout.hidden :].tobytes()


def test_the_latest_values_read_out_one_hot_and_as_signed_logarithms() -> None:
    # Given the last two merchants and amounts of a client that has paid once, in a shop nobody declared
    described = [
        Memory(name="merchants", modality="pay", kind="last", field="merchant", size=2),
        Memory(name="amounts", modality="pay", kind="last", field="amount", size=2),
        Memory(name="first", modality="pay", kind="first_time"),
        Memory(name="ring", modality="pay", kind="ring", field="merchant", size=2),
    ]
    layout = _layout(described)
    events = [Event(0, START_MS, "pay", {"amount": -4.0, "merchant": "shop-1"})]
    rows = PlainRows(1, layout.width)
    Engine(layout, random_trunk(layout)).advance(_columns(events), np.zeros(1, np.int64), rows)
    # When it is read an hour later
    readout = Readout(layout)
    now = np.array([START_MS + 3_600_000])
    row = readout.features(rows.vectors[:, : layout.hidden], rows.vectors[:, layout.hidden :], now)[0]
    read = dict(zip(readout.names, row.tolist(), strict=True))
    # Then there is one of each, and nothing before it; the ring says nothing by itself
    assert [read[f"merchants[1].{value}"] for value in (*MERCHANTS, "other")] == [0, 0, 1]
    assert [read[f"merchants[2].{value}"] for value in (*MERCHANTS, "other")] == [0, 0, 0]
    assert read["amounts[1].value"] == pytest.approx(-math.log1p(4.0))
    assert (read["amounts[1].seen"], read["amounts[2].value"], read["amounts[2].seen"]) == (1, 0, 0)
    assert read["first.hours"] == pytest.approx(math.log1p(1.0))
    assert not any(name.startswith("ring") for name in readout.names)


def test_a_value_takes_the_place_of_the_smallest_count_as_it_has_decayed() -> None:
    # Given places for two values, of counts that halve in an hour, and three payments by phone, then two on the web
    kept = Memory(name="top", modality="pay", kind="top", field="channel", size=2, half_life_s=3600)
    layout = _layout([kept])
    hours = [(0, "phone")] * 3 + [(0, "web")] * 2
    # When one is made at a desk, two hours later, and two more on the web, one of them late by an hour
    hours += [(2, "desk"), (2, "phone"), (2, "web"), (1, "web")]
    events = [
        Event(0, START_MS + 3_600_000 * at, "pay", {"amount": 1.0, "merchant": "fuel", "channel": channel})
        for at, channel in hours
    ]
    rows = PlainRows(1, layout.width)
    Engine(layout, random_trunk(layout)).advance(_columns(events), np.zeros(len(events), np.int64), rows)
    # Then the desk took the web's place, and the web the desk's, beginning anew; what is late counts by what is left
    counts, codes = np.split(_kept(layout, 0, rows.vectors[0, layout.hidden :]), [2])
    assert counts.tolist() == [3 / 4 + 1, 1 + 1 / 2]
    halves = [ring_code(np.uint64(hash_bytes(name))) for name in (b"phone", b"web")]
    assert codes.tolist() == [float(half) for two in halves for half in two]


def test_a_late_event_moves_a_first_time_back() -> None:
    layout = _layout([Memory(name="first", modality="pay", kind="first_time")])
    fields = {"amount": 1.0, "merchant": "fuel"}
    events = [Event(0, START_MS, "pay", fields), Event(0, START_MS - 1, "pay", fields)]
    rows = PlainRows(1, layout.width)
    Engine(layout, random_trunk(layout)).advance(_columns(events), np.zeros(2, np.int64), rows)
    assert _kept(layout, 0, rows.vectors[0, layout.hidden :]).tolist() == [START_MS - 1]


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ('kind = "last"', r"memory\[wrong\]\.field = None: expected a number field of pay, or a category"),
        ('kind = "last"\nfield = "channel"', r"field = 'channel': expected a number field of pay, or a category"),
        ('kind = "last"\nfield = "amount"\nhalf_life_s = 5', r"half_life_s = 5\.0: expected nothing: kind 'last' does"),
        ('kind = "last"\nfield = "amount"\nby = "merchant"', r"by = 'merchant': expected nothing: kind 'last' keeps"),
        ('kind = "ring"\nfield = "amount"', r"field = 'amount': expected a category field of pay"),
        ('kind = "ring"\nfield = "channel"\nsize = 0', r"memory\[17\]\.size: Expected `int` >= 1"),
        ('kind = "first_time"\nhalf_life_s = 5', r"half_life_s = 5\.0: expected nothing: kind 'first_time'"),
        ('kind = "first_time"\nfield = "amount"', r"field = 'amount': expected nothing: kind 'first_time' reads"),
        ('kind = "tally"\nfield = "amount"', r"field = 'amount': expected a category field of pay"),
        ('kind = "sketch"\nfield = "channel"\ndimensions = 65', r"dimensions = 65: expected at most 64"),
        ('kind = "count"\nper = "large_channels"', r"per = 'large_channels': expected a count, sum or visits without"),
        ('kind = "last_time"\nper = "sessions"', r"per = 'sessions': expected nothing: kind 'last_time' is no share"),
        ('kind = "count"\nsize = 4', r"size = 4: expected nothing: only `last`, `ring` and `top` have a size"),
        ('kind = "top"\nfield = "amount"\nsize = 4', r"field = 'amount': expected a category field of pay"),
    ],
)
def test_a_memory_that_cannot_be_is_refused(memory: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        small_settings(f'\n[[memory]]\nname = "wrong"\nmodality = "pay"\n{memory}\n')


def test_of_no_rows_as_many_features_are_read() -> None:
    # Given a memory of every kind that is read by itself, and a micro-batch in which nothing asks
    layout = _layout(small_settings().memory)
    nothing = np.zeros((0, layout.width), np.float32)
    readout = Readout(layout)
    features = readout.features(nothing[:, : layout.hidden], nothing[:, layout.hidden :], np.zeros(0, np.int64))
    assert features.shape == (0, readout.width)


def test_a_layout_is_told_apart_by_what_it_keeps() -> None:
    # Given a memory, and the same with one setting changed
    one = Memory(name="one", modality="pay", kind="ring", field="merchant", size=2)
    other = msgspec.structs.replace(one, field="channel")
    # Then rows of the two cannot be exchanged
    assert _layout([one]).fingerprint == _layout([one]).fingerprint != _layout([other]).fingerprint


def test_a_share_is_read_against_its_whole() -> None:
    # Given a refund and three other payments, all at one time
    described = [
        Memory(name="all", modality="pay", kind="count"),
        Memory(name="refunds", modality="pay", kind="count", where=Where(field="amount", below=0.0), per="all"),
    ]
    layout = _layout(described)
    readout, none = Readout(layout), np.zeros((1, layout.width), np.float32)
    events = [Event(0, START_MS, "pay", {"amount": amount, "merchant": "fuel"}) for amount in (-1.0, 2.0, 3.0, 4.0)]
    rows = PlainRows(1, layout.width)
    Engine(layout, random_trunk(layout)).advance(_columns(events), np.zeros(4, np.int64), rows)
    # When a row is read, and one that knows nothing yet
    both = np.concatenate([rows.vectors, none])
    features = readout.features(both[:, : layout.hidden], both[:, layout.hidden :], np.full(2, START_MS))
    # Then it is a quarter, and nothing of nothing
    assert features[:, readout.names.index("refunds")].tolist() == pytest.approx([math.log1p(0.25), 0.0])
