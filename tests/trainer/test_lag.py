"""A trainer that is behind says so, and waits or samples; rows are exact either way."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stream.metrics import TrainerMetrics
from trainer.joiner import Example, Joined
from trainer.lag import Lag, sampled
from trainer.online import OnlineTrainer

from . import shop
from .conftest import NewShop
from .shop import START_MS, open_trainer, outcome, posterior
from .test_online import feed, merged, rows, year
from .test_service import CLIENTS, LEARNED, running, stream

PASSED_OVER = "livestate_examples_passed_over_total"
TOPICS = {"events": 7, "feedback": 3}


class Hands:
    """Clocks that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def behind(metrics: TrainerMetrics, hands: Hands, **overrides: str) -> Lag:
    return Lag(shop.settings(TRAINER__BEHIND_S="10", **overrides).trainer, metrics, hands, hands)


def test_how_far_behind_is_told_in_records_and_seconds_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    # Given a trainer whose oldest record is eleven seconds old
    metrics, hands = TrainerMetrics(), Hands()
    lag = behind(metrics, hands)
    caplog.set_level(logging.WARNING, "trainer.lag")
    for _ in range(3):
        lag.note(int((hands.now - 11) * 1000))
        lag.tell(TOPICS)
        hands.now += 1.0
    # Then it is told once, and by the gauges
    (told,) = caplog.messages
    assert "11 s behind: 7 records of events and 3 records of feedback" in told
    assert "all of them, in order" in told
    assert metrics.registry.get_sample_value("livestate_trainer_lag_seconds") == pytest.approx(11.0)
    assert metrics.registry.get_sample_value("livestate_trainer_lag_events", {"topic": "feedback"}) == 3
    assert lag.label_share == 1.0
    # And told again after a while
    hands.now += 30.0
    lag.note(0)
    lag.tell(TOPICS)
    assert len(caplog.messages) == 2


def test_labels_are_sampled_from_the_limit_on_until_half_of_it_is_left() -> None:
    hands = Hands()
    lag = behind(TrainerMetrics(), hands, TRAINER__WHEN_BEHIND="sample", TRAINER__SAMPLE_SHARE="0.25")
    shares = []
    for age_s in (9.0, 11.0, 6.0, 4.0, 9.0):
        lag.note(int((hands.now - age_s) * 1000))
        shares.append(lag.label_share)
    assert shares == [1.0, 0.25, 0.25, 1.0, 1.0]
    # And a trainer for which nothing waits is not behind
    lag.note(0)
    lag.note(None)
    assert (lag.seconds, lag.label_share) == (0.0, 1.0)


def test_a_sample_is_of_its_share_and_weighs_as_much_as_all() -> None:
    # Given labels of two kinds
    inputs = np.zeros(1, np.float32)
    labels = [
        Joined(Example("t", f"client-{i}".encode(), START_MS + i % 7, inputs, 0.5, 1), i % 10 == 0, 2.0, 0, 0, 0)
        for i in range(20_000)
    ]
    # When a quarter is drawn
    drawn = [one for label in labels if (one := sampled(label, 0.25)) is not None]
    # Then it weighs as much as all, of each kind, and is the same again
    for kind in (False, True):
        everything = sum(one.weight for one in labels if one.label is kind)
        assert sum(one.weight for one in drawn if one.label is kind) == pytest.approx(everything, rel=0.1)
    assert {one.weight for one in drawn} == {8.0}
    again = [sampled(label, 0.25) for label in labels]
    assert [one for one in again if one is not None] == drawn
    assert [replace(one, weight=2.0) for one in drawn] == [
        label for label, one in zip(labels, again, strict=True) if one is not None
    ]
    assert sampled(labels[0], 1.0) is labels[0]


def test_rows_and_outcomes_are_those_of_all_where_labels_are_sampled(tmp_path: Path) -> None:
    # Given the same stream, learned whole and by a sample of labels
    found: list[OnlineTrainer] = []
    counted = []
    for name, share in (("whole", 1.0), ("sample", 0.5)):
        metrics = TrainerMetrics()
        trainer = open_trainer(tmp_path / name, shop.settings(), metrics)
        trainer.teaching.label_share = share
        feed(trainer, merged(*year(800)))
        trainer.checkpoint(0)
        found.append(trainer)
        counted.append(metrics)
    whole, sample = (trainer.learners["redeemed"] for trainer in found)
    # Then every label is learned or counted as passed over
    passed = counted[1].registry.get_sample_value(PASSED_OVER, {"task": "redeemed"})
    assert sample.labels + passed == whole.labels
    assert 0.4 < passed / whole.labels < 0.6
    # And rows and outcomes are the same
    assert rows(found[0]) == rows(found[1])
    assert outcome(counted[0], "joined") == outcome(counted[1], "joined") > 0
    # And what is predicted keeps its level
    levels = [posterior(learner).mean[-1] for learner in (whole, sample)]
    assert levels[1] == pytest.approx(levels[0], abs=0.5)
    for trainer in found:
        trainer.close()


def test_a_service_that_is_behind_learns_from_a_sample_until_it_is_not(new_embedded_shop: NewShop) -> None:
    # Given a backlog that is years old
    live = new_embedded_shop(TRAINER__WHEN_BEHIND="sample", TRAINER__SAMPLE_SHARE="0.5")
    events, feedback = stream()
    live.publish(live.settings.topics.events, events)
    live.publish(live.settings.topics.feedback, feedback)
    # When the trainer reads it
    task = {"task": "redeemed"}
    with running(live) as trainer:
        trainer.wait("livestate_feedback_total", CLIENTS, outcome="joined", **task)
    # Then some of it is learned, and nothing is lost silently
    learned, passed = trainer.sample(LEARNED, **task), trainer.sample(PASSED_OVER, **task)
    assert learned + passed == CLIENTS
    assert min(learned, passed) > CLIENTS / 10
    assert trainer.sample("livestate_trainer_lag_seconds") == 0
    assert trainer.sample("livestate_trainer_label_share") == 1.0
