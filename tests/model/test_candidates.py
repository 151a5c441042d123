"""What a head sees of the candidates an event lists: counted by hand, and however the events were cut."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stream.errors import SettingsError
from stream.model.candidates import BEST, Matches
from stream.model.engine import Engine
from stream.model.heads import Questions
from stream.model.layout import Layout
from stream.settings import Memory, Settings
from stream.wire import EventColumns, EventDecoder, RecordBlock, Schema, encode_event
from tests.support.settings import small_settings
from tests.support.trunk import random_trunk
from tests.support.truth import PlainRows

START_MS = 1_600_000_000_000
SHOPS = [f"shop-{number}" for number in range(12)]


def _settings() -> Settings:
    small = small_settings()
    described = [
        # So many bins that no two of the twelve shops share both of theirs.
        Memory(name="bought", modality="pay", kind="tally", field="merchant", dimensions=1024, half_life_s=1e9),
        Memory(name="recent", modality="pay", kind="ring", field="merchant", size=4),
        Memory(name="most", modality="pay", kind="top", field="merchant", size=3),
    ]
    task = msgspec.structs.replace(small.tasks["accepted"], candidates={"channels": ["bought", "recent", "most"]})
    return msgspec.structs.replace(small, memory=described, tasks={"accepted": task})


SETTINGS = _settings()
LAYOUT = Layout.compile(SETTINGS, Schema.compile(SETTINGS))
ENGINE = Engine(LAYOUT, random_trunk(LAYOUT))
MATCHES = Matches(LAYOUT, SETTINGS.tasks["accepted"])


def _columns(bought: list[str], *listed: Any) -> EventColumns:
    """Payments of one client and then offers, each with its candidates, at one moment."""
    fields: list[tuple[str, dict[str, Any]]] = [("pay", {"amount": 1.0, "merchant": shop}) for shop in bought]
    fields += [
        ("offer", {"product": "card", "channels": groups} if groups is not None else {"product": "card"})
        for groups in listed
    ]
    values = [encode_event("0", START_MS, modality, given) for modality, given in fields]
    n = len(values)
    block = RecordBlock.from_lists([b"0"] * n, values, np.arange(n), np.full(n, 10**13))
    columns = EventDecoder(LAYOUT.schema, SETTINGS.limits, "msgpack").decode(block)
    assert columns.accepted.all(), columns.rejected
    return columns


def _seen(bought: list[str], groups: Any) -> NDArray[np.float32]:
    """What the head sees at an offer of these groups after those payments."""
    columns = _columns(bought, groups)
    advanced = ENGINE.advance(columns, np.zeros(columns.n, np.int64), PlainRows(1, LAYOUT.width))
    return MATCHES.values(columns, advanced.triggers.event, advanced.triggers.memory)[0]


def _by_hand(held: dict[str, int], groups: list[list[str]]) -> list[float]:
    per = sorted((math.log1p(sum(held.get(shop, 0) for shop in group)) for group in groups), reverse=True)
    union = math.log1p(sum(held.get(shop, 0) for shop in {shop for group in groups for shop in group}))
    best = per[:BEST]
    return [sum(best) / len(best), per[0], sum(per) / len(per), union]


groups_of_shops = st.lists(st.lists(st.sampled_from(SHOPS), min_size=1, max_size=3), min_size=1, max_size=2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(SHOPS), max_size=20), groups_of_shops)
def test_candidates_are_counted_by_group_in_all_memory_in_the_ring_and_in_the_top(
    bought: list[str], groups: list[list[str]]
) -> None:
    # Given payments in some shops, and an offer that lists groups of shops
    seen = _seen(bought, groups)
    # When they are counted by hand, all of them, the last four, and those three that have not made way for another
    everything = {shop: bought.count(shop) for shop in bought}
    latest = {shop: bought[-4:].count(shop) for shop in bought}
    most: dict[str, int] = {}
    for shop in bought:
        if shop not in most and len(most) == 3:
            # In the order of their places.
            place = min(most, key=lambda name: most[name])
            most = {shop if name == place else name: 0 if name == place else count for name, count in most.items()}
        most[shop] = most.get(shop, 0) + 1
    # Then mean of the best, best, mean and union of each are what the head sees
    expected = [part for held in (everything, latest, most) for part in _by_hand(held, groups)]
    np.testing.assert_allclose(seen, expected, rtol=1e-6, atol=1e-6)


def test_an_offer_that_lists_nothing_matches_nothing() -> None:
    assert _seen(SHOPS, []).tolist() == _seen(SHOPS, None).tolist() == [0.0] * 12


def test_what_is_seen_of_an_event_does_not_depend_on_the_others_of_its_batch() -> None:
    # Given three offers with different candidates in one batch
    listed = [[["shop-1", "shop-2"], ["shop-1"]], None, ["shop-3", "shop-0"]]
    columns = _columns(SHOPS[:5], *listed)
    advanced = ENGINE.advance(columns, np.zeros(columns.n, np.int64), PlainRows(1, LAYOUT.width))
    together = MATCHES.values(columns, advanced.triggers.event, advanced.triggers.memory)
    # Then each is seen as if it were alone, bit for bit
    for seen, groups in zip(together, listed, strict=True):
        assert seen.tobytes() == _seen(SHOPS[:5], groups).tobytes()


def test_the_head_of_a_task_sees_its_candidates() -> None:
    # Given the question of the task, as worker and trainer ask it
    question = Questions(LAYOUT).by_task["accepted"]
    columns = _columns(["shop-1"], [["shop-1"]])
    advanced = ENGINE.advance(columns, np.zeros(columns.n, np.int64), PlainRows(1, LAYOUT.width))
    _, inputs = question.ask(columns, advanced.triggers)
    # Then the inputs have a name each, and say that the client has been there once
    assert inputs.shape == (1, question.width) == (1, len(question.names))
    assert inputs[0, question.names.index("bought.union")] == pytest.approx(math.log(2.0))
    assert not question.is_state[question.names.index("recent.best")]


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        (
            "{ product = [] }",
            r"tasks\.other\.candidates = 'product': expected fields of offer of type items: \['channels'\]",
        ),
        (
            '{ channels = ["merchants"] }',
            r"candidates\.channels = 'merchants': expected rings, tops and tallies: \['channel_c",
        ),
    ],
)
def test_candidates_that_cannot_be_matched_are_refused(candidates: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        small_settings(f'\n[tasks.other]\non = "offer"\ncandidates = {candidates}\n')
