"""The order of records does not depend on how they were fetched."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.timeline import CELL_MS, EVENTS, FEEDBACK, Record, Timeline

PARTITIONS = 2
NOW = 10**15
Log = dict[tuple[int, int], list[Record]]


def record(partition: int, offset: int, time_ms: int) -> Record:
    return Record(partition, offset, time_ms, None, None, ())


@st.composite
def logs(draw: st.DrawFn) -> Log:
    found: Log = {}
    for kind in (EVENTS, FEEDBACK):
        for p in range(PARTITIONS):
            times = draw(st.lists(st.integers(0, 5 * CELL_MS), max_size=12))
            found[kind, p] = [record(p, i, t) for i, t in enumerate(times)]
    return found


def drain(timeline: Timeline) -> list[tuple[int, Record]]:
    out: list[tuple[int, Record]] = []
    while part := timeline.take():
        out += [(EVENTS, one) for one in part.events]
        out += [(FEEDBACK, one) for one in part.feedback]
    return out


def whole(log: Log) -> list[tuple[int, Record]]:
    timeline = Timeline(PARTITIONS)
    for (kind, p), found in log.items():
        timeline.add(kind, p, found, NOW)
        timeline.end(kind, p)
    return drain(timeline)


@given(logs(), st.data())
def test_any_way_to_fetch_a_backlog_gives_the_same_order(log: Log, data: st.DataObject) -> None:
    # Given logs that are fetched in pieces, in any order of partitions, drained at any time
    timeline = Timeline(PARTITIONS)
    at = dict.fromkeys(log, 0)
    out: list[tuple[int, Record]] = []
    open_places = list(log)
    while open_places:
        place = data.draw(st.sampled_from(open_places))
        size = data.draw(st.integers(1, 5))
        piece = log[place][at[place] : at[place] + size]
        if piece:
            timeline.add(*place, piece, NOW)
            at[place] += len(piece)
        if at[place] == len(log[place]):
            timeline.end(*place)
            open_places.remove(place)
        if data.draw(st.booleans()):
            out += drain(timeline)
    out += drain(timeline)
    # Then the order is that of the whole, and nothing is left
    assert out == whole(log)
    assert timeline.is_empty


@given(logs())
def test_everything_comes_once_in_the_order_of_its_partition(log: Log) -> None:
    out = whole(log)
    for (kind, p), expected in log.items():
        assert [one for k, one in out if k == kind and one.partition == p] == expected


def test_events_of_a_cell_come_before_its_feedback() -> None:
    timeline = Timeline(1)
    timeline.add(FEEDBACK, 0, [record(0, 0, 10), record(0, 1, CELL_MS + 10)], NOW)
    timeline.add(EVENTS, 0, [record(0, 0, 20), record(0, 1, CELL_MS + 20)], NOW)
    timeline.end(EVENTS, 0)
    timeline.end(FEEDBACK, 0)
    first = timeline.take()
    assert [one.timestamp_ms for one in first.events] == [20]
    assert [one.timestamp_ms for one in first.feedback] == [10]


def test_nothing_is_handed_out_while_a_partition_may_still_bring_something_earlier() -> None:
    # Given events of one partition, and another that has brought nothing
    timeline = Timeline(2)
    timeline.add(EVENTS, 0, [record(0, 0, 10)], NOW)
    for kind, p in ((FEEDBACK, 0), (FEEDBACK, 1)):
        timeline.end(kind, p)
    # Then they wait
    assert not timeline.take()
    # Until that partition is past them
    timeline.add(EVENTS, 1, [record(1, 0, 11)], NOW)
    assert [one.timestamp_ms for one in timeline.take().events] == [10]


def test_a_partition_that_brings_nothing_can_be_left_behind() -> None:
    timeline = Timeline(2)
    timeline.add(EVENTS, 0, [record(0, 0, 10)], NOW)
    assert timeline.stop_waiting() == [(EVENTS, 1), (FEEDBACK, 0), (FEEDBACK, 1)]
    assert len(timeline.take().events) == 1
    # What it brings later is taken then.
    timeline.add(EVENTS, 1, [record(1, 0, 5)], NOW)
    timeline.end(EVENTS, 1)
    timeline.end(EVENTS, 0)
    assert len(timeline.take().events) == 1


def test_blocked_feedback_stays_and_holds_nothing_up() -> None:
    timeline = Timeline(1)
    timeline.add(FEEDBACK, 0, [record(0, 0, 10)], NOW)
    timeline.add(EVENTS, 0, [record(0, 0, 5 * CELL_MS)], NOW)
    timeline.end(EVENTS, 0)
    blocked = timeline.take(blocked=[0])
    assert (len(blocked.events), len(blocked.feedback)) == (1, 0)
    timeline.end(FEEDBACK, 0)
    assert len(timeline.take().feedback) == 1


@pytest.mark.parametrize("ahead", [1, 10**9])
def test_a_publisher_whose_clock_is_ahead_does_not_hold_its_records_back(ahead: int) -> None:
    # Given a record from the future, and a busy partition that is never at its end
    timeline = Timeline(1)
    timeline.add(EVENTS, 0, [record(0, 0, NOW + ahead)], NOW)
    timeline.add(FEEDBACK, 0, [record(0, 0, NOW + CELL_MS)], NOW + CELL_MS)
    # Then it counts as of when it was seen
    assert len(timeline.take().events) == 1


def test_a_record_that_is_older_than_the_one_before_it_keeps_its_place() -> None:
    timeline = Timeline(1)
    timeline.add(EVENTS, 0, [record(0, 0, 500), record(0, 1, 100)], NOW)
    timeline.add(FEEDBACK, 0, [record(0, 0, 300)], NOW)
    timeline.end(EVENTS, 0)
    timeline.end(FEEDBACK, 0)
    assert [(kind, one.offset) for kind, one in drain(timeline)] == [(FEEDBACK, 0), (EVENTS, 0), (EVENTS, 1)]
