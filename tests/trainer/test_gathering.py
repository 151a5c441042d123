"""Labels that become final together go out together."""

from __future__ import annotations

from trainer.gathering import Gathering


def test_a_version_waits_while_labels_come() -> None:
    gathering = Gathering(0.05, 0.15)
    assert gathering.is_over({}, 5.0)
    assert not gathering.is_over({"redeemed": 2}, 5.02)
    # A look that brings none says little after so short a time
    assert not gathering.is_over({"redeemed": 2}, 5.04)
    assert not gathering.is_over({"redeemed": 40}, 5.08)
    assert gathering.is_over({"redeemed": 40}, 5.1)


def test_it_waits_for_so_long_at_most() -> None:
    gathering = Gathering(0.05, 0.15)
    said = [gathering.is_over({"redeemed": n}, 5.0 + 0.04 * n) for n in range(1, 6)]
    assert said == [False, False, False, False, True]
    # The next ones begin anew, once a version has these.
    assert gathering.is_over({}, 5.3)
    assert not gathering.is_over({"redeemed": 3}, 6.0)


def test_labels_of_another_task_count_as_well() -> None:
    gathering = Gathering(0.05, 0.15)
    assert not gathering.is_over({"redeemed": 2}, 5.0)
    assert not gathering.is_over({"redeemed": 2, "opened": 1}, 5.06)
    assert gathering.is_over({"redeemed": 2, "opened": 1}, 5.08)
