"""Kinds of tasks and of heads: what each learns is what it serves, and a checkpoint loses nothing of it."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from stream.errors import ParametersError, SettingsError, StoreError
from stream.metrics import TrainerMetrics
from stream.model.heads import Head, Questions, with_pieces
from stream.model.layout import Layout
from stream.model.parameters import ParameterSet
from stream.settings import Task, parse
from stream.wire import FeedbackRecord, Label, Schema, encode_feedback
from trainer.checkpoint import Changes, Database
from trainer.evaluation import auc
from trainer.learner import BayesianLinear, BayesianLogistic, Examples, Labelled, TaskLearner

from . import shop
from .shop import START_MS

Floats = NDArray[np.float64]

WIDTH = 4
HEADS = {
    "binary": ("logistic", "mlp", "gbdt", "mlp, gbdt"),
    "multiclass": ("logistic", "mlp", "gbdt", "logistic, mlp"),
    "regression": ("linear", "mlp", "gbdt", "linear, gbdt"),
}
CASES = [(kind, head) for kind, heads in HEADS.items() for head in heads]


def task(kind: str, head: str, keep: int = 400, pieces: int = 0) -> Task:
    parts = ", ".join(f'"{part}"' for part in head.split(", "))
    text = f"""
    [modalities.send]
    [tasks.answer]
    on = "send"
    kind = "{kind}"
    classes = {["no", "later", "yes"] if kind == "multiclass" else []}
    head = [{parts}]
    standardise_after = 20
    prior_variance = 1.0
    keep_examples = {keep}
    [tasks.answer.mlp]
    hidden = 8
    pieces = {pieces}
    dropout = 0.1
    hidden_dropout = 0.1
    learning_rate = 0.02
    average = 0.9
    warm_up = 5
    [tasks.answer.gbdt]
    least_examples = 100
    leaf_examples = 5
    trees = 20
    learning_rate = 0.2
    columns = 1.0
    refit_interval_s = 100
    delay_s = 10
    """
    return parse(text).tasks["answer"]


def examples(kind: str, n: int, seed: int = 0) -> tuple[NDArray[np.float32], list[Label]]:
    """Inputs (n, 4), of which two decide, and labels."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, WIDTH)).astype(np.float32)
    z = 2.0 * x[:, 0] - x[:, 1] + 0.5 * random.normal(size=n)
    if kind == "regression":
        return x, (100.0 + 10.0 * z).tolist()
    if kind == "binary":
        return x, (z > 0).tolist()
    return x, [("no", "later", "yes")[c] for c in np.digitize(z, [-1.0, 1.0]).tolist()]


def teach(learner: TaskLearner, x: NDArray[np.float32], labels: Sequence[Label], start: int = 0) -> None:
    """One label a second."""
    for i, (row, label) in enumerate(zip(x, labels, strict=True), start):
        learner.observe(row)
        learner.learn(row, label, 1.0, math.nan, i, final_ms=1000 * i)


def served(learner: TaskLearner, settings: Task) -> Head:
    return Head("answer", settings, ParameterSet(learner.head()), np.ones(WIDTH, np.bool_))


@pytest.mark.parametrize(("kind", "head"), CASES)
def test_a_head_of_each_kind_learns_and_serves(kind: str, head: str) -> None:
    # Given a task whose labels depend on two inputs
    settings = task(kind, head)
    x, labels = examples(kind, 400)
    learner = TaskLearner("answer", np.zeros(WIDTH, np.bool_), settings)
    # When its labels are learned
    teach(learner, x, labels)
    learner.close()
    # Then what is published predicts others
    parts = served(learner, settings)
    assert list(parts.parts) == head.split(", ")
    others, truth = examples(kind, 500, seed=1)
    said, alone = parts.predict_parts(others)
    assert np.array_equal(said, parts.predict(others))
    assert said.dtype == np.float32
    for predicted in (said, *alone.values()):
        if kind == "regression":
            assert np.corrcoef(predicted[:, 0], np.array(truth, float))[0, 1] > 0.9
            assert predicted.mean() == pytest.approx(np.mean(np.array(truth, float)), abs=3)
        elif kind == "binary":
            assert auc(truth, predicted[:, 0]) > 0.93
        else:
            np.testing.assert_allclose(predicted.sum(axis=1), 1.0, atol=1e-6)
            assert auc(np.array(truth) == "yes", predicted[:, 2]) > 0.9
    # And one row at a time as many at once, and the average row's event as one at the center
    assert np.array_equal(np.concatenate([parts.predict(row[None]) for row in others[:40]]), parts.predict(others)[:40])
    center = learner.standardiser.fixed[0]
    typical = np.concatenate([others[:5, :2], np.tile(center[2:], (5, 1))], axis=1).astype(np.float32)
    np.testing.assert_allclose(parts.predict_typical(others[:5, :2]), parts.predict(typical), atol=1e-5)


@pytest.mark.parametrize(("kind", "head"), CASES)
def test_a_head_goes_on_bit_for_bit_from_its_checkpoint(kind: str, head: str, tmp_path: Path) -> None:
    # Given a learner, and one that is closed and opened again after every 37th label, within steps and fits
    settings = task(kind, head, keep=300)
    x, labels = examples(kind, 500)
    database = Database(tmp_path / "db")
    straight, broken = (TaskLearner("answer", np.zeros(WIDTH, np.bool_), settings, seed=3) for _ in range(2))
    teach(straight, x, labels)
    for start in range(0, 500, 37):
        until = slice(start, start + 37)
        teach(broken, x[until], labels[until], start)
        changes: Changes = {}
        broken.save(changes)
        database.write(changes)
        broken.saved()
        # What comes after the checkpoint is lost.
        teach(broken, x[:9], labels[:9], start + 37)
        broken.close()
        broken = TaskLearner("answer", np.zeros(WIDTH, np.bool_), settings, seed=3)
        broken.load(database)
    # Then both serve the same, bit for bit
    ours, theirs = straight.head(), broken.head()
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert (straight.labels, straight.included) == (broken.labels, broken.included)
    straight.close()
    broken.close()
    # And another head does not take it over
    other = task(kind, "mlp" if head != "mlp" else "gbdt", keep=300)
    with pytest.raises(StoreError, match="was made with"):
        TaskLearner("answer", np.zeros(WIDTH, np.bool_), other).load(database)
    database.close()


def test_numbers_are_read_in_pieces_between_two_standard_deviations() -> None:
    # Given two inputs and a one, of which the second is a number
    x = np.array([[7.0, -3.0, 1.0], [7.0, -0.5, 1.0], [7.0, 1.0, 1.0], [7.0, 6.0, 1.0]])
    # Then four pieces are each passed in turn, and the one stays last
    found = with_pieces(x, np.array([1]), 4)
    pieces = [[0.0, 0.0, 0.0, 0.0], [1.0, 0.5, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    np.testing.assert_array_equal(found[:, 2:6], pieces)
    np.testing.assert_array_equal(found[:, [0, 1, 6]], x)
    # And without pieces or numbers all stays as it is
    assert with_pieces(x, np.array([1]), 0) is x
    assert with_pieces(x, np.zeros(0, np.int64), 4) is x


def test_what_turns_twice_is_learned_in_pieces(tmp_path: Path) -> None:
    # Given labels that are true where the first input is about one standard deviation from its mean, either way
    random = np.random.default_rng(5)
    x = random.normal(size=(3000, WIDTH)).astype(np.float32)
    labels = (np.abs(np.abs(x[:, 0]) - 1.0) < 0.4).tolist()
    is_number = np.array([True, False, True, False])
    heads = {}
    database = Database(tmp_path / "db")
    for pieces in (0, 8):
        settings = task("binary", "mlp", keep=3000, pieces=pieces)
        learner = TaskLearner("answer", np.zeros(WIDTH, np.bool_), settings, is_number=is_number)
        teach(learner, x[:2000], labels[:2000])
        # When each goes on from its checkpoint after two thirds of them
        changes: Changes = {}
        learner.save(changes)
        database.write(changes)
        learner = TaskLearner("answer", np.zeros(WIDTH, np.bool_), settings, is_number=is_number)
        learner.load(database)
        heads[pieces] = Head("answer", settings, ParameterSet(learner.head()), is_number)
    # Then pieces tell what so few hidden units do not
    said = {pieces: auc(np.array(labels[2000:]), head.predict(x[2000:])[:, 0]) for pieces, head in heads.items()}
    assert said[8] > said[0] + 0.03
    # And one row at a time as many at once
    each = [heads[8].predict(row[None]) for row in x[:20]]
    assert np.array_equal(np.concatenate(each), heads[8].predict(x[:20]))
    # And a checkpoint of other pieces, or a head of other numbers, is refused
    with pytest.raises(StoreError, match=r"restore members, hidden and pieces of tasks\.answer\.mlp"):
        TaskLearner("answer", np.zeros(WIDTH, np.bool_), task("binary", "mlp", keep=3000)).load(database)
    with pytest.raises(ParametersError, match="the settings describe"):
        Head("answer", settings, ParameterSet(learner.head()), np.ones(WIDTH, np.bool_))
    database.close()


@pytest.mark.parametrize(("kind", "head"), CASES)
def test_a_head_goes_back_to_a_state_as_if_it_had_learned_nothing_since(kind: str, head: str) -> None:
    # Given a learner that learned wrong labels after a state, and one that did not
    settings = task(kind, head, keep=300)
    x, labels = examples(kind, 500)
    straight, other = (TaskLearner("answer", np.zeros(WIDTH, np.bool_), settings, seed=3) for _ in range(2))
    teach(straight, x, labels)
    teach(other, x[:347], labels[:347])
    state, before = other.state(), other.head()
    teach(other, x[:50], labels[200:250], 347)
    # When it goes back, then it serves what it served
    other.restore(state)
    after = other.head()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    # And when it learns on, then both end the same, bit for bit
    teach(other, x[347:], labels[347:], 347)
    ours, theirs = straight.head(), other.head()
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert straight.labels == other.labels
    # And back to the start
    other.restore(None)
    assert (other.labels, other.head(), other.included) == (0, {}, [])
    for learner in (straight, other):
        learner.close()


def test_feedback_counts_as_included_when_a_step_has_learned_it() -> None:
    # Given the head `mlp`, which takes eight labels in a step
    learner = TaskLearner("answer", np.zeros(WIDTH, np.bool_), task("binary", "mlp"))
    x, labels = examples("binary", 30)
    for row in x:
        learner.observe(row)
    # When seven labels come, nothing is new; with the eighth all are
    for i in range(7):
        learner.learn(x[i], labels[i], 1.0, math.nan, 100 + i)
    assert (learner.included, learner.head()) == ([], {})
    learner.learn(x[7], labels[7], 1.0, math.nan, 107)
    assert learner.included == list(range(100, 108))
    assert learner.head()


def test_a_fit_serves_from_the_moment_its_labels_decide() -> None:
    # Given the head `gbdt`, first fitted at the hundredth label, serving ten seconds later, refitted after a hundred
    learner = TaskLearner("answer", np.zeros(WIDTH, np.bool_), task("binary", "gbdt"))
    x, labels = examples("binary", 320)
    text = []
    for i in range(320):
        teach(learner, x[i : i + 1], labels[i : i + 1], i)
        text.append(bytes(learner.head().get("head/answer/gbdt/text", np.zeros(0, np.uint8))))
    learner.close()
    changes = [i for i in range(1, 320) if text[i] != text[i - 1]]
    assert changes == [109, 209, 309]


def test_a_steps_poison_is_dropped_and_the_rest_learned() -> None:
    # Given a weight that makes a step's gradient infinite
    learner = TaskLearner("answer", np.zeros(WIDTH, np.bool_), task("binary", "mlp"))
    x, labels = examples("binary", 64)
    teach(learner, x[:24], labels[:24])
    before = learner.head()
    learner.learn(x[24], labels[24], 1e300, math.nan, 0)
    teach(learner, x[25:32], labels[25:32])
    # Then the step changes nothing and its eight labels are counted as dropped
    assert learner.dropped == 8
    assert all(np.array_equal(before[name], tensor) for name, tensor in learner.head().items())


def test_known_log_odds_keep_a_sample_of_the_negatives_calibrated() -> None:
    # Given labels of which one in five negatives is kept
    random = np.random.default_rng(2)
    x = random.normal(size=(6000, WIDTH)).astype(np.float32)
    y = random.random(6000) < 0.05
    kept = y | (random.random(6000) < 0.2)
    chances = {}
    for offset in (0.0, math.log(5.0)):
        for head in ("logistic", "mlp"):
            settings = task("binary", head, keep=3000)
            learner = TaskLearner("answer", np.zeros(WIDTH, np.bool_), settings)
            for row, label in zip(x[kept], y[kept].tolist(), strict=True):
                learner.observe(row)
                learner.learn(row, label, 1.0, math.nan, 0, log_odds_offset=offset)
            chances[head, offset > 0] = float(served(learner, settings).predict(x).mean())
    # Then the log-odds that were given bring the predictions back to the true rate
    assert y.mean() == pytest.approx(0.05, abs=0.01)
    for head in ("logistic", "mlp"):
        assert chances[head, False] > 0.15
        assert chances[head, True] == pytest.approx(0.05, abs=0.02)


def test_the_linear_posterior_is_that_of_all_labels_at_once() -> None:
    random = np.random.default_rng(4)
    x, y, w = random.normal(size=(50, 3)), random.normal(size=50), random.uniform(0.5, 2.0, 50)
    posterior = BayesianLinear(3, 0.5)
    for row, value, weight in zip(x, y.tolist(), w.tolist(), strict=True):
        assert posterior.learn(row, value, weight)
    precision = x.T @ (w[:, None] * x) + np.eye(3) / 0.5
    np.testing.assert_allclose(posterior.mean, np.linalg.solve(precision, x.T @ (w * y)), atol=1e-10)
    np.testing.assert_allclose(posterior.covariance, np.linalg.inv(precision), atol=1e-10)
    assert not posterior.learn(x[0], math.inf)


def test_an_offset_is_learned_as_an_input_of_a_fixed_weight() -> None:
    # Given one head with an offset, and one whose last input, of weight one and no variance, is the offset
    x = np.array([0.5, -1.0, 1.0])
    one, other = BayesianLogistic(3, 1.0), BayesianLogistic(4, np.array([1.0, 1.0, 1.0, 0.0]))
    other.mean[3] = 1.0
    one.learn(x, True, 1.0, offset=0.7)
    other.learn(np.append(x, 0.7), True)
    np.testing.assert_allclose(one.mean, other.mean[:3], atol=1e-12)


def test_kept_examples_are_the_newest_ones() -> None:
    kept = Examples(2, 300, 100)
    for i in range(1000):
        kept.add(Labelled(np.array([i, -i], np.float32), float(i), 1.0, 0, 0, 0.0))
    numbers = np.arange(kept.first(950), 1000)
    assert numbers[0] == 650
    batch = kept.take(numbers)
    assert np.array_equal(batch.target, numbers)
    assert np.array_equal(batch.inputs[:, 1], -numbers)


def test_a_task_with_trees_needs_lightgbm_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given an installation without LightGBM
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    settings = parse('[modalities.send]\n[tasks.answer]\non = "send"\nhead = ["mlp", "gbdt"]')
    with pytest.raises(SettingsError, match=r"tasks\.answer\.head = 'gbdt': the package lightgbm is not installed"):
        Questions(Layout.compile(settings, Schema.compile(settings)))


def test_a_model_of_other_inputs_is_refused() -> None:
    settings = task("binary", "gbdt")
    learner = TaskLearner("answer", np.zeros(WIDTH, np.bool_), settings)
    teach(learner, *examples("binary", 120))
    tensors = learner.head()
    wrong = {**tensors, "head/answer/center": np.zeros(WIDTH + 1)}
    with pytest.raises(ParametersError, match="a model of 4 inputs and 1 outputs: the settings describe 5 and 1"):
        Head("answer", settings, ParameterSet(wrong), np.ones(WIDTH + 1, np.bool_))
    with pytest.raises(ParametersError, match="no model that LightGBM can read"):
        Head(
            "answer",
            settings,
            ParameterSet({**tensors, "head/answer/gbdt/text": np.zeros(5, np.uint8)}),
            np.ones(WIDTH, np.bool_),
        )


TASKS = """
[tasks.channel]
on = "send"
kind = "multiclass"
classes = ["post", "mail"]
head = ["logistic", "mlp"]
standardise_after = 20
labels = "as_they_come"
[tasks.spent]
on = "send"
kind = "regression"
standardise_after = 20
labels = "as_they_come"
[topics]"""


def test_tasks_of_all_kinds_learn_side_by_side(tmp_path: Path) -> None:
    # Given a shop that asks three things at every send
    settings = parse(shop.TOML.replace("[topics]", TASKS))
    metrics, refused = TrainerMetrics(), []
    trainer = shop.open_trainer(tmp_path / "db", settings, metrics, lambda record, error: refused.append(str(error)))
    random = np.random.default_rng(3)
    feedback: list[tuple[str, bytes]] = []
    for i in range(200):
        client, at = f"c{i % 20}", START_MS + i * 1000
        amount = float(random.integers(1, 50))
        events = [(client, shop.purchase(client, at, amount)), (client, shop.send(client, at + 1))]
        trainer.apply_events(shop.records(events, first=2 * i))
        answers: dict[str, Label] = {"channel": "post" if amount > 25 else "mail", "spent": amount}
        answers["redeemed"] = amount > 25
        feedback = [
            (client, encode_feedback(FeedbackRecord(client, at + 500, at + 1, name, label)))
            for name, label in answers.items()
        ]
        trainer.apply_feedback(shop.records(feedback, first=3 * i))
        trainer.serve(ParameterSet(trainer.tensors(), i + 1))
    # When labels of another kind come
    client = "c1"
    bad: dict[str, Label] = {"channel": "fax", "spent": "much", "redeemed": 3.0}
    wrong = [
        (client, encode_feedback(FeedbackRecord(client, START_MS + 9, START_MS + 9, name, label)))
        for name, label in bad.items()
    ]
    trainer.apply_feedback(shop.records(wrong, first=600))
    # Then they are refused by name
    for said, accepted in zip(refused, ("one of 'post, mail'", "a number", "true, false, 1 or 0"), strict=True):
        assert accepted in said
    # And each task has its predictions, under its own name or that of its classes
    questions = Questions(trainer.layout)
    assert questions.outputs == ("redeemed", "channel.post", "channel.mail", "spent")
    heads = questions.heads(ParameterSet(trainer.tensors()))
    assert set(heads) == {"redeemed", "channel", "spent"}
    # And each part its quality
    trainer.observe_metrics()

    def value(name: str, task: str, head: str) -> float | None:
        return metrics.registry.get_sample_value(f"livestate_prequential_{name}", {"task": task, "head": head})

    for head in ("average", "logistic", "mlp"):
        quality = value("auc", "channel", head)
        assert quality is not None
        assert quality > 0.6
        assert value("log_loss", "channel", head) is not None
    assert value("auc", "redeemed", "logistic") is not None
    error = value("squared_error", "spent", "linear")
    assert error is not None
    assert error < 14.0**2
    assert value("log_loss", "spent", "linear") is None
    trainer.close()
