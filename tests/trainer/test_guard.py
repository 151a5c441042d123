"""The guard without Kafka: what it finds, what it leaves alone, and that a crash changes nothing of it."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.metrics import TrainerMetrics
from stream.model.parameters import ParameterSet
from stream.settings import Settings, Trainer, parse
from stream.wire import Label
from trainer.evidence import Evidence
from trainer.guard import CHUNK, Guard
from trainer.learner import MlpLearner, TaskLearner
from trainer.online import OnlineTrainer

from .shop import open_trainer
from .spoilt import AGAIN, OPTIONS, PIECE, RIGHT, SPOILT, WRONG, give, returns
from .test_heads import WIDTH, examples, task

losses = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=30)


@given(pieces=st.lists(losses, min_size=1, max_size=5), tolerance=st.floats(0.0, 2.0), seed=st.integers(0, 9))
def test_evidence_is_the_mean_wealth_of_gamblers_who_begin_anew_below_one(
    pieces: list[list[float]], tolerance: float, seed: int
) -> None:
    # Given losses in pieces, and gamblers who stake one share each, one loss after the other
    random = np.random.default_rng(seed)
    evidence = Evidence(tolerance, 1.0)
    shares = (0.8, 0.4, 0.1, 0.025)
    wealth = [1.0] * len(shares)
    for piece in pieces:
        later, earlier = np.array(piece), random.random(len(piece))
        for a, b in zip(later.tolist(), earlier.tolist(), strict=True):
            worse = (a - (1.0 + tolerance) * b) / (1.0 + tolerance)
            wealth = [max(1.0, one) * (1.0 + share * worse) for one, share in zip(wealth, shares, strict=True)]
        # Then the evidence is their mean wealth
        evidence.add(later, earlier)
        assert evidence.log == pytest.approx(math.log(np.mean(wealth)), abs=1e-9)
    # And it is carried on bit for bit
    again = Evidence(tolerance, 1.0)
    again.load(evidence.save())
    for one in (evidence, again):
        one.add(np.array([1.0, 0.5]), np.array([0.0, 0.5]))
    assert again.log == evidence.log


def alarms(threshold: float, labels: int, later: float, seed: int) -> int:
    """How often the evidence reaches the threshold where the earlier forecaster loses all or nothing, half the time
    each, and the later one as well, whose mean loss is `later`."""
    random = np.random.default_rng(seed)
    evidence = Evidence(0.05, 1.0)
    found = 0
    for _ in range(labels // CHUNK):
        evidence.add((random.random(CHUNK) < later).astype(float), (random.random(CHUNK) < 0.5).astype(float))
        if evidence.log >= math.log(threshold):
            found += 1
            evidence.forget()
    return found


def test_false_alarms_are_as_seldom_as_the_threshold_says() -> None:
    # Given 2,000 windows of 300 labels in which the present is worse by exactly the tolerance, so that any more would
    # be worth an alarm; then alarms are further apart than the threshold
    labels = 600_000
    edge = alarms(1e3, labels, 0.525, seed=1)
    assert 0 < edge <= labels / 1e3
    # And where it is not worse at all there is none for the threshold that holds back by default
    assert alarms(1e8, labels, 0.5, seed=2) == 0
    assert alarms(1e3, labels, 0.5, seed=3) <= edge / 2
    # And what is a third worse is found again and again
    assert alarms(1e8, 40_000, 0.7, seed=4) >= 5


def wrong(kind: str, labels: Sequence[Label]) -> list[Label]:
    """The other way round."""
    if kind == "regression":
        return [200.0 - float(label) for label in labels]
    if kind == "binary":
        return [not label for label in labels]
    return [{"no": "yes", "yes": "no"}.get(str(label), str(label)) for label in labels]


class Guarded:
    """A learner and its guard, and what became of it."""

    def __init__(self, kind: str, head: str, **options: float) -> None:
        settings = task(kind, head, keep=2000, pieces=2)
        self._kind = kind
        # Its last input is yes or no.
        is_number = np.arange(WIDTH) < WIDTH - 1
        self.learner = TaskLearner("answer", np.zeros(WIDTH, np.bool_), settings, is_number=is_number)
        self.guard = Guard(self.learner, settings, Trainer(**{"guard_labels": 640, **options}))  # type: ignore[arg-type]
        self.taken = 0
        #: Labels by the time it held back first, and went back first.
        self.held_at = self.returned_at = 0

    def give(self, count: int, spoilt: bool = False, moment: int = 1) -> None:
        """moment: how many labels are final together."""
        x, labels = examples(self._kind, count, seed=self.taken)
        for row, label in zip(x, wrong(self._kind, labels) if spoilt else labels, strict=True):
            self.taken += 1
            self.learner.observe(row)
            self.guard.take(row, self.learner.target(label), ())
            self.learner.learn(row, label, 1.0, math.nan, 0, final_ms=1000 * (self.taken // moment))
            if self.guard.judge():
                self.returned_at = self.returned_at or self.taken
            if self.guard.is_holding:
                self.held_at = self.held_at or self.taken


HEADS = [
    ("binary", "logistic"), ("binary", "mlp"), ("binary", "gbdt"), ("multiclass", "logistic, mlp"),
    ("regression", "linear"), ("regression", "mlp, gbdt"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "head"), HEADS)
def test_a_stretch_of_wrong_labels_is_given_up_and_a_changed_world_is_not(
    kind: str, head: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Given a learner that knows its task
    one = Guarded(kind, head)
    one.give(2_000)
    assert (one.held_at, one.returned_at) == (0, 0)
    # When wrong labels come, fewer than it takes for a good state, and right ones again
    one.give(600, spoilt=True)
    known = one.taken
    assert (one.held_at, one.returned_at) == (0, 0)
    with caplog.at_level(logging.WARNING, logger="trainer.guard"):
        one.give(1_300)
    # Then what it learned from them is given up, and the log says why
    assert known < one.returned_at
    assert one.guard.returns == 1
    assert "is given up and learning goes on from there" in caplog.text
    assert one.learner.labels < one.taken - 600
    # When the same labels come for good
    other = Guarded(kind, head)
    other.give(1_500)
    other.give(2_500, spoilt=True)
    # Then they are learned
    assert (other.held_at, other.returned_at, other.guard.returns) == (0, 0, 0)
    for guarded in (one, other):
        guarded.learner.close()


def test_a_campaign_of_wrong_labels_is_given_up() -> None:
    # Given a learner of campaigns, each of which is one update, that knows its task
    one = Guarded("binary", "logistic")
    one.give(2_000, moment=200)
    assert (one.held_at, one.returned_at) == (0, 0)
    # When all labels of some campaigns are wrong, and of those after them right
    one.give(600, spoilt=True, moment=200)
    assert (one.held_at, one.returned_at) == (0, 0)
    one.give(1_400, moment=200)
    # Then what was learned from them is given up
    assert one.guard.returns == 1


def test_a_new_learner_is_left_alone() -> None:
    # Given nothing to compare with, then wrong labels from the start are learned, and right ones after them
    one = Guarded("binary", "logistic", guard_labels=64, guard_false_alarm_labels=1e3)
    one.give(60, spoilt=True)
    one.give(400)
    assert one.guard.returns == 0


def test_what_is_not_finite_is_given_up_at_once() -> None:
    # Given a network that knows its task
    one = Guarded("binary", "mlp")
    one.give(1_500)
    assert one.learner.labels > 1_450
    # When its weights are no numbers any more
    part = one.learner.parts["mlp"]
    assert isinstance(part, MlpLearner)
    part._average[3] = np.nan
    one.give(CHUNK)
    # Then it goes back to the good state
    assert one.guard.returns == 1
    assert 600 < one.learner.labels < 1_300
    assert all(np.isfinite(tensor).all() for tensor in one.learner.head().values())


def shop(**more: str) -> Settings:
    return parse(SPOILT, {f"LIVESTATE_{name}": value for name, value in {**OPTIONS, **more}.items()})


def everything(trainer: OnlineTrainer) -> dict[bytes, bytes]:
    """What a checkpoint holds of learners, tables and guards."""
    trainer.checkpoint(0)
    return {
        key: value for prefix in (b"t/", b"c/", b"a/", b"g/") for key, value in trainer.database.scan(prefix)
    }  # fmt: skip


def test_a_crash_at_any_point_of_it_changes_nothing(tmp_path: Path) -> None:
    # Given a trainer that is left alone while its labels are wrong for a while
    calm = open_trainer(tmp_path / "calm", shop())
    give(calm, 0, RIGHT)
    give(calm, RIGHT, WRONG, wrong=True)
    first = RIGHT + WRONG
    held: list[int] = []
    for number in range(first, first + AGAIN, PIECE):
        give(calm, number, PIECE)
        if "redeemed" in calm.guards.held:
            held.append(number)
    assert returns(calm) == 1
    assert CHUNK <= PIECE * len(held) < AGAIN
    # When another one reads the same and loses everything since its last checkpoint: before, in the middle of being
    # held back, and after it has gone back, always with a chunk half taken
    in_time = [held[0] + PIECE, held[-1] + PIECE]
    cuts = [0, RIGHT + PIECE, first + PIECE, *in_time, in_time[-1] + 2 * PIECE]
    crashed = open_trainer(tmp_path / "crashed", shop())

    def play(begin: int, end: int) -> None:
        for number in range(begin, end, PIECE):
            give(crashed, number, PIECE, wrong=RIGHT <= number < first)

    for begin, end in zip(cuts, [*cuts[1:], first + AGAIN], strict=True):
        crashed.checkpoint(0)
        play(begin, min(begin + 3 * PIECE, end))
        crashed.close()
        crashed = open_trainer(tmp_path / "crashed", shop())
        assert (begin in in_time) == ("redeemed" in crashed.guards.held)
        play(begin, end)
    # Then both are the same, bit for bit
    assert everything(crashed) == everything(calm)
    crashed.close()
    calm.close()


def test_a_version_has_what_is_served_of_a_task_that_is_held_back(tmp_path: Path) -> None:
    # Given a trainer whose labels were right, and that serves what they taught
    metrics = TrainerMetrics()
    trainer = open_trainer(tmp_path, shop(), metrics)
    give(trainer, 0, RIGHT)
    good = ParameterSet(trainer.tensors(), 7)
    trainer.touched.offer()
    included = trainer.unpublished()
    trainer.serve(good)
    trainer.confirm(included)
    trainer.touched.confirm()
    assert not trainer.has_changed
    # When they are wrong for a while, and it is found out
    give(trainer, RIGHT, WRONG, wrong=True)
    number = RIGHT + WRONG
    assert trainer.tensors()["head/redeemed/weight"].tobytes() != good["head/redeemed/weight"].tobytes()
    while "redeemed" not in trainer.guards.held:
        give(trainer, number, PIECE)
        number += PIECE
    # Then there is nothing to publish of it, however much was learned
    assert not trainer.has_changed
    assert (trainer.unpublished(), trainer.feedback_ms()) == ({}, [])
    assert {name: one.tobytes() for name, one in trainer.tensors().items()} == {
        name: one.tobytes() for name, one in good.items()
    }
    assert {name: table.rows for name, table in trainer.touched.offer().items()} == {"redeemed.kind": {}}
    assert trainer.guards.holds_news
    trainer.guards.count_held_back()
    assert not trainer.guards.holds_news
    trainer.observe_metrics()

    def sample(name: str) -> float | None:
        return metrics.registry.get_sample_value(f"livestate_trainer_guard_{name}", {"task": "redeemed"})

    assert (sample("holding"), sample("held_back_versions_total"), sample("returns_total")) == (1, 1, 0)
    # When the proof is strong enough, while a version is on its way
    on_its_way = trainer.unpublished()
    while not returns(trainer):
        give(trainer, number, PIECE)
        number += PIECE
    trainer.confirm(on_its_way)
    # Then the good state is to be published, with its rows, and what is learned from now on
    learner = trainer.learners["redeemed"]
    assert learner.labels < RIGHT
    assert 0 <= trainer.unpublished()["redeemed"] < PIECE
    assert trainer.tensors()["head/redeemed/weight"].tobytes() == learner.head()["head/redeemed/weight"].tobytes()
    assert trainer.touched.offer()["redeemed.kind"].rows.keys() == {b"*", b"=x", b"=y"}
    included = trainer.unpublished()
    trainer.confirm(included)
    trainer.touched.confirm()
    assert not trainer.has_changed
    give(trainer, number, PIECE)
    assert trainer.unpublished() == {"redeemed": PIECE}
    trainer.observe_metrics()
    assert (sample("holding"), sample("returns_total")) == (0, 1)
    trainer.close()


def test_labels_of_a_version_on_its_way_are_not_taken_for_those_after_it_went_back(tmp_path: Path) -> None:
    # Given a version on its way with labels of a learner that is about to go back
    trainer = open_trainer(tmp_path, shop())
    give(trainer, 0, RIGHT)
    give(trainer, RIGHT, WRONG, wrong=True)
    trainer.tensors()
    on_its_way = trainer.unpublished()
    assert on_its_way["redeemed"] > 100
    number = RIGHT + WRONG
    while not returns(trainer):
        give(trainer, number, PIECE)
        number += PIECE
    # When labels come, and the version is confirmed
    give(trainer, number, PIECE)
    to_publish = trainer.unpublished()
    trainer.confirm(on_its_way)
    # Then those labels are still to be published
    assert trainer.unpublished() == to_publish
    assert PIECE <= to_publish["redeemed"] < 2 * PIECE
    trainer.close()


def test_without_a_guard_nothing_is_held_back_but_what_is_not_finite(tmp_path: Path) -> None:
    # Given a trainer with a guard, and what that keeps
    trainer = open_trainer(tmp_path, shop())
    give(trainer, 0, RIGHT)
    assert any(key.startswith(b"g/") for key in everything(trainer))
    trainer.close()
    # When it goes on without one
    trainer = open_trainer(tmp_path, shop(TRAINER__GUARD="false"))
    good = ParameterSet(trainer.tensors(), 7)
    trainer.serve(good)
    give(trainer, RIGHT, WRONG, wrong=True)
    give(trainer, RIGHT + WRONG, AGAIN)
    # Then everything is learned, and what the guard kept is gone
    assert trainer.learners["redeemed"].labels == RIGHT + WRONG + AGAIN
    assert trainer.guards.held == frozenset()
    assert not any(key.startswith(b"g/") for key in everything(trainer))
    # And weights that are no numbers are not published all the same
    learner = trainer.learners["redeemed"]
    head = learner.parts["logistic"]
    head.posteriors[0].mean[2] = np.inf  # type: ignore[attr-defined]
    served = {name: one.tobytes() for name, one in good.items()}
    assert {name: one.tobytes() for name, one in trainer.tensors().items()} == served
    assert trainer.guards.held == {"redeemed"}
    assert not trainer.has_changed
    trainer.close()
