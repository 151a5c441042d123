"""How often something is due."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trainer.timer import Timer


def times(timer: Timer, looks: list[float]) -> list[float]:
    return [now for now in looks if timer.is_due(now)]


def test_without_a_burst_each_time_is_so_long_after_the_one_before() -> None:
    assert times(Timer(0.5), [7.0, 7.1, 7.4, 7.6, 8.0, 8.2]) == [7.0, 7.6, 8.2]


def test_after_a_rest_two_may_follow_each_other() -> None:
    timer = Timer(0.5, burst=2)
    # The third waits until there have been two in a second
    assert times(timer, [7.0, 7.1, 7.2, 7.4, 7.5, 7.6, 7.9, 8.0]) == [7.0, 7.1, 7.5, 8.0]
    # And a long rest saves up no more than two
    assert times(timer, [60.0, 60.1, 60.2, 60.3]) == [60.0, 60.1]


@given(
    st.floats(0.01, 10.0),
    st.integers(1, 4),
    st.lists(st.floats(0.0, 3.0), min_size=1, max_size=60),
)
def test_no_stretch_has_more_than_its_share_and_a_burst(seconds: float, burst: int, gaps: list[float]) -> None:
    # Given looks at any times
    now, looks = 100.0, []
    for gap in gaps:
        now += gap
        looks.append(now)
    # When it is due at some of them
    due = times(Timer(seconds, burst), looks)
    assert due[0] == looks[0]
    # Then any stretch between two of them has as many as fit, and those saved up
    for first in range(len(due)):
        for last in range(first, len(due)):
            assert last - first + 1 <= (due[last] - due[first]) / seconds + burst + 1e-6
