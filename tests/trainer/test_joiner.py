"""What becomes of feedback, one outcome at a time, on a real database."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from stream.wire import FeedbackRecord
from trainer.checkpoint import Changes, Database
from trainer.joiner import Example, Joined, Joiner

HOUR = 3_600_000
TTL = 30 * 24 * HOUR
NOW = 1_500_000_000_000


class Desk:
    """A joiner with its database and what it counted."""

    def __init__(self, path: Path, **options: int) -> None:
        self.path = path
        self.options = options
        self.counts: Counter[str] = Counter()
        self.open()

    def open(self) -> None:
        self.database = Database(self.path)
        self.joiner = Joiner(
            self.database,
            {"t": TTL, "u": TTL},
            lambda task, outcome: self.counts.update([outcome]),
            ["t"],
            **self.options,
        )

    def checkpoint(self) -> None:
        changes: Changes = {}
        self.joiner.save(changes)
        self.database.write(changes)
        self.joiner.saved()

    def reopen(self) -> None:
        """What was not in a checkpoint is gone."""
        marks = self.joiner.watermarks, self.joiner.waiting
        self.database.close()
        self.open()
        self.joiner.watermarks, self.joiner.waiting = marks

    def event(self, client: str = "ann", as_of: int = NOW, value: float = 1.0, task: str = "t") -> Joined | None:
        inputs = np.array([value, 2.0], np.float32)
        return self.joiner.capture(0, Example(task, client.encode(), as_of, inputs, 0.25, 7))

    def feedback(
        self,
        label: bool = True,
        client: str = "ann",
        as_of: int = NOW,
        known: int | None = None,
        task: str = "t",
        window_end: int | None = None,
    ) -> Joined | None:
        known = as_of + HOUR if known is None else known
        return self.joiner.feedback(0, FeedbackRecord(client, known, as_of, task, label, 2.0, window_end), 99)

    def release(self, watermark: int, released: int = 98) -> list[str]:
        """Clients whose held labels the watermark releases."""
        return [one.example.client_id.decode() for one in self.joiner.finality.release(0, watermark, released)]


@pytest.fixture
def new_desk(tmp_path: Path) -> Iterator[Callable[..., Desk]]:
    desks: list[Desk] = []

    def make(**options: int) -> Desk:
        desks.append(Desk(tmp_path / f"db{len(desks)}", **options))
        return desks[-1]

    yield make
    for desk in desks:
        desk.database.close()


@pytest.fixture
def desk(new_desk: Callable[..., Desk]) -> Desk:
    return new_desk()


@pytest.mark.parametrize("stored", [False, True])
def test_feedback_after_its_event_is_joined_with_the_example_as_it_was(desk: Desk, stored: bool) -> None:
    # Given a prediction, in memory or in a checkpoint
    desk.event(value=5.0)
    if stored:
        desk.checkpoint()
        desk.reopen()
    # When its feedback comes
    joined = desk.feedback(label=True)
    # Then the example is the one captured, with the label, weight and times of the feedback
    assert joined is not None
    assert joined.example.inputs.tolist() == [5.0, 2.0]
    assert (joined.example.prediction, joined.example.version) == (0.25, 7)
    assert (joined.label, joined.weight, joined.known_ms, joined.published_ms) == (True, 2.0, NOW + HOUR, 99)
    assert desk.counts == {"joined": 1}
    assert desk.joiner.waiting == 0


@pytest.mark.parametrize("stored", [False, True])
def test_feedback_before_its_event_waits_and_is_joined_when_that_comes(desk: Desk, stored: bool) -> None:
    # Given feedback whose event is not here
    assert desk.feedback() is None
    assert (desk.joiner.pending, dict(desk.counts)) == (1, {})
    if stored:
        desk.checkpoint()
        desk.reopen()
        assert desk.joiner.pending == 1
    # When the event comes
    joined = desk.event(value=3.0)
    # Then they are joined, once
    assert joined is not None
    assert joined.example.inputs.tolist() == [3.0, 2.0]
    assert joined.published_ms == 99
    assert desk.counts == {"early": 1}
    assert (desk.joiner.pending, desk.joiner.waiting) == (0, 0)
    assert desk.feedback() is None
    assert desk.counts == {"early": 1, "duplicate": 1}


def test_feedback_of_no_prediction_is_unmatched_once_the_watermark_is_past_it(desk: Desk) -> None:
    # Given a watermark more than the grace past the prediction's time
    desk.joiner.advance(0, NOW + HOUR + 1)
    # When feedback comes for which there is no prediction
    assert desk.feedback() is None
    # Then it is unmatched at once
    assert desk.counts == {"unmatched": 1}
    assert desk.joiner.pending == 0


def test_waiting_feedback_becomes_unmatched_when_the_watermark_passes_it(desk: Desk) -> None:
    # Given feedback that waits for its event
    desk.feedback()
    desk.checkpoint()
    # When the watermark is at its time and the grace
    desk.joiner.advance(0, NOW + HOUR)
    # Then it still waits, and a millisecond later no more, also after a restart
    assert desk.counts == {}
    desk.joiner.advance(0, NOW + HOUR + 1)
    assert desk.counts == {"unmatched": 1}
    desk.checkpoint()
    desk.reopen()
    assert desk.joiner.pending == 0


def test_another_partition_watermark_decides_nothing_here(desk: Desk) -> None:
    desk.feedback()
    desk.joiner.advance(1, NOW + TTL)
    assert desk.counts == {}


def test_feedback_after_its_time_to_live_is_late_by_its_own_time(desk: Desk) -> None:
    # Given a prediction that still waits
    desk.event()
    # When feedback says it became known a millisecond after the time to live
    assert desk.feedback(known=NOW + TTL + 1) is None
    # Then it is late; at the time to live it is not
    assert desk.counts == {"late": 1}
    assert desk.feedback(known=NOW + TTL) is not None


def test_feedback_after_its_time_to_live_is_late_by_the_watermark(desk: Desk) -> None:
    desk.event()
    desk.checkpoint()
    desk.joiner.advance(0, NOW + TTL + 1)
    desk.joiner.sweep()
    assert desk.feedback() is None
    assert desk.counts == {"late": 1}


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(("second", "expected"), [(True, "duplicate"), (False, "contradicting")])
def test_a_second_answer_changes_nothing(desk: Desk, stored: bool, second: bool, expected: str) -> None:
    # Given an answered prediction
    desk.event()
    desk.feedback(label=True)
    if stored:
        desk.checkpoint()
        desk.reopen()
    # When it is answered again
    assert desk.feedback(label=second) is None
    # Then the first answer stays
    assert desk.counts == {"joined": 1, expected: 1}


@pytest.mark.parametrize(("second", "expected"), [(True, "duplicate"), (False, "contradicting")])
def test_a_second_answer_to_a_missing_event_changes_nothing(desk: Desk, second: bool, expected: str) -> None:
    desk.feedback(label=True)
    desk.feedback(label=second)
    joined = desk.event()
    assert joined is not None
    assert joined.label is True
    assert desk.counts == {expected: 1, "early": 1}


def test_feedback_is_matched_by_client_time_and_task(desk: Desk) -> None:
    # Given one prediction
    desk.event()
    # When feedback differs from it in one of the three
    for other in (
        desk.feedback(client="bob"),
        desk.feedback(as_of=NOW + 1),
        desk.feedback(task="u"),
    ):
        # Then it does not answer it
        assert other is None
    assert desk.joiner.pending == 3
    assert desk.feedback() is not None


def test_a_later_prediction_of_the_same_moment_replaces_the_earlier(desk: Desk) -> None:
    desk.event(value=1.0)
    desk.event(value=2.0)
    assert desk.joiner.waiting == 1
    joined = desk.feedback()
    assert joined is not None
    assert joined.example.inputs[0] == 2.0
    # An answered one is not asked again.
    assert desk.event(value=3.0) is None
    assert desk.joiner.waiting == 0
    desk.feedback()
    assert desk.counts == {"joined": 1, "duplicate": 1}


def test_examples_and_answers_are_forgotten_after_their_time_to_live(desk: Desk) -> None:
    # Given answered and waiting predictions on disk
    for i in range(10):
        desk.event(client=f"c{i}", as_of=NOW + i)
    for i in range(5):
        desk.feedback(client=f"c{i}", as_of=NOW + i)
    desk.checkpoint()
    # When the watermark is past the time to live of the first seven
    desk.joiner.advance(0, NOW + 7 + TTL)
    desk.joiner.sweep()
    desk.checkpoint()
    # Then only the others are left
    left = [key[-2:] for key, _ in desk.database.scan(b"e")]
    assert left == [b"c7", b"c8", b"c9"]
    assert desk.joiner.waiting == 3


def test_waiting_feedback_is_bounded_by_a_partition(new_desk: Callable[..., Desk]) -> None:
    # Given room for three
    desk = new_desk(pending_limit=3)
    for i in range(3):
        assert not desk.joiner.is_full(0)
        desk.feedback(as_of=NOW + i)
    # Then the joiner says that it is full, until an event comes
    assert desk.joiner.is_full(0)
    assert not desk.joiner.is_full(1)
    desk.event(as_of=NOW)
    assert not desk.joiner.is_full(0)


def test_what_was_not_in_a_checkpoint_is_gone_after_a_crash(desk: Desk) -> None:
    # Given a checkpoint with a waiting prediction
    desk.event()
    desk.checkpoint()
    # When it is answered and the process dies
    desk.feedback()
    desk.reopen()
    # Then the same feedback, read again, is joined again
    assert desk.feedback() is not None
    assert desk.counts == {"joined": 2}


@pytest.mark.parametrize("stored", [False, True])
def test_a_label_is_held_until_the_watermark_is_past_its_window(desk: Desk, stored: bool) -> None:
    # Given a label that is known while its window is open
    desk.event(value=5.0)
    assert desk.feedback(window_end=NOW + 9 * HOUR) is None
    # Then it is joined, and held, also after a restart
    if stored:
        desk.checkpoint()
        desk.reopen()
    assert (desk.counts, desk.joiner.finality.held, desk.joiner.waiting) == ({"joined": 1}, 1, 0)
    assert desk.joiner.finality.next_release_ms(0) == NOW + 9 * HOUR
    # When the watermark is at the window's end, then it is held still, and a millisecond later it is not
    assert desk.release(NOW + 9 * HOUR) == []
    (joined,) = desk.joiner.finality.release(0, NOW + 9 * HOUR + 1, 123)
    assert joined.example.inputs.tolist() == [5.0, 2.0]
    assert (joined.example.client_id, joined.example.as_of_ms, joined.example.task) == (b"ann", NOW, "t")
    assert (joined.example.prediction, joined.example.version) == (0.25, 7)
    assert (joined.label, joined.weight, joined.known_ms, joined.final_ms) == (True, 2.0, NOW + HOUR, NOW + 9 * HOUR)
    assert joined.published_ms == 123
    # And it is released once
    desk.checkpoint()
    desk.reopen()
    assert (desk.joiner.finality.held, desk.release(NOW + TTL)) == (0, [])
    assert desk.feedback(window_end=NOW + 9 * HOUR) is None
    assert desk.counts == {"joined": 1, "duplicate": 1}


def test_a_release_that_was_not_in_a_checkpoint_is_made_again(desk: Desk) -> None:
    desk.event()
    desk.feedback(window_end=NOW + 2 * HOUR)
    desk.checkpoint()
    assert desk.release(NOW + TTL) == ["ann"]
    desk.reopen()
    assert desk.release(NOW + TTL) == ["ann"]


def test_held_labels_are_released_in_the_order_of_their_windows(desk: Desk) -> None:
    # Given labels of three windows, known in another order
    for client, end, known in [("d", 5, 2), ("a", 3, 3), ("c", 5, 1), ("b", 3, 3), ("e", 8, 1)]:
        desk.event(client=client)
        desk.feedback(client=client, known=NOW + known * HOUR, window_end=NOW + end * HOUR)
    desk.checkpoint()
    desk.reopen()
    # Then the watermark releases them by window, then by when they were known, then by client
    assert desk.release(NOW + 6 * HOUR) == ["a", "b", "c", "d"]
    assert desk.joiner.finality.next_release_ms(0) == NOW + 8 * HOUR
    assert desk.joiner.finality.next_release_ms(1) is None


def test_a_label_is_final_at_once_when_nothing_is_to_be_waited_for(desk: Desk) -> None:
    # Given a window that the watermark has passed, no window, and a task that learns labels as they come
    desk.joiner.advance(0, NOW + HOUR)
    for client, task, window in [("a", "t", NOW + HOUR - 1), ("b", "t", None), ("c", "u", NOW + TTL)]:
        desk.event(client=client, task=task)
        # When their labels come, then they are final
        joined = desk.feedback(client=client, task=task, window_end=window)
        assert joined is not None
        assert (joined.final_ms, joined.published_ms) == (NOW + HOUR, 99)
    assert desk.joiner.finality.held == 0


@pytest.mark.parametrize("stored", [False, True])
def test_feedback_before_its_event_is_held_after_it(desk: Desk, stored: bool) -> None:
    # Given feedback with an open window, and no event yet
    desk.feedback(window_end=NOW + 3 * HOUR)
    if stored:
        desk.checkpoint()
        desk.reopen()
    # When the event comes, then the label is joined early, and held
    assert desk.event() is None
    assert (desk.counts, desk.joiner.finality.held, desk.joiner.pending) == ({"early": 1}, 1, 0)
    assert desk.release(NOW + 4 * HOUR) == ["ann"]


def test_held_labels_are_bounded_by_a_partition(new_desk: Callable[..., Desk]) -> None:
    # Given room for two
    desk = new_desk(held_limit=2)
    for i in range(2):
        assert not desk.joiner.is_full(0)
        desk.event(as_of=NOW + i)
        desk.feedback(as_of=NOW + i, window_end=NOW + 2 * HOUR)
    # Then the joiner is full until one is released, there alone
    assert desk.joiner.is_full(0)
    assert not desk.joiner.is_full(1)
    desk.release(NOW + 3 * HOUR)
    assert not desk.joiner.is_full(0)


def test_a_held_label_is_released_as_of_the_later_of_its_record_and_the_event(desk: Desk) -> None:
    desk.event()
    desk.feedback(window_end=NOW + 2 * HOUR)
    (joined,) = desk.joiner.finality.release(0, NOW + 3 * HOUR, 5)
    assert joined.published_ms == 99
