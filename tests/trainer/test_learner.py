"""The Bayesian logistic head against its definition, and the learner around it."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize

from stream.errors import StoreError
from stream.model.heads import standardise
from trainer.checkpoint import Changes, Database
from trainer.learner import BayesianLogistic, Prequential, Standardiser, TaskLearner

from . import shop

Floats = NDArray[np.float64]
inputs = st.lists(st.floats(-6, 6), min_size=3, max_size=3).map(lambda v: np.array([*v, 1.0]))
labelled = st.tuples(inputs, st.booleans(), st.floats(0.1, 10))


def brute_force(head: BayesianLogistic, x: Floats, label: bool, weight: float) -> tuple[Floats, Floats]:
    """Mode of prior times likelihood by general minimisation, and the inverse of the curvature there."""
    precision = np.linalg.inv(head.covariance)
    sign = 1.0 if label else -1.0

    def negative(b: Floats) -> float:
        difference = b - head.mean
        return float(0.5 * difference @ precision @ difference + weight * np.logaddexp(0.0, -sign * (x @ b)))

    def slope(b: Floats) -> Floats:
        return precision @ (b - head.mean) - weight * sign * x / (1.0 + np.exp(sign * (x @ b)))

    mode = minimize(negative, head.mean, jac=slope, method="BFGS", options={"gtol": 1e-10}).x
    p = 1.0 / (1.0 + math.exp(-float(x @ mode)))
    return mode, np.linalg.inv(precision + weight * p * (1 - p) * np.outer(x, x))


@given(st.lists(labelled, min_size=1, max_size=6))
def test_each_update_is_the_laplace_approximation_of_prior_times_likelihood(
    labels: list[tuple[Floats, bool, float]],
) -> None:
    head = BayesianLogistic(4, 0.5)
    for x, label, weight in labels:
        mode, covariance = brute_force(head, x, label, weight)
        assert head.learn(x, label, weight)
        np.testing.assert_allclose(head.mean, mode, atol=2e-5)
        np.testing.assert_allclose(head.covariance, covariance, atol=2e-5)


@given(st.lists(labelled, min_size=1, max_size=20))
def test_the_covariance_stays_symmetric_and_only_shrinks(labels: list[tuple[Floats, bool, float]]) -> None:
    head = BayesianLogistic(4, 1.0)
    for x, label, weight in labels:
        before = head.covariance.copy()
        head.learn(x, label, weight)
        assert np.array_equal(head.covariance, head.covariance.T)
        assert np.linalg.eigvalsh(head.covariance).min() > 0
        assert np.linalg.eigvalsh(before - head.covariance).min() > -1e-12


@given(st.lists(labelled, min_size=1, max_size=10))
def test_turning_labels_and_inputs_round_leaves_the_posterior_as_it_is(
    labels: list[tuple[Floats, bool, float]],
) -> None:
    # The likelihood of y at x is that of not y at -x.
    one, other = BayesianLogistic(4, 1.0), BayesianLogistic(4, 1.0)
    for x, label, weight in labels:
        one.learn(x, label, weight)
        other.learn(-x, not label, weight)
    np.testing.assert_allclose(one.mean, other.mean, atol=1e-12)
    np.testing.assert_allclose(one.covariance, other.covariance, atol=1e-12)


@given(labelled)
def test_a_label_moves_its_own_prediction_towards_it(one: tuple[Floats, bool, float]) -> None:
    x, label, weight = one
    head = BayesianLogistic(4, 1.0)
    before = float(head.predict(x[None, :])[0])
    head.learn(x, label, weight)
    after = float(head.predict(x[None, :])[0])
    assert (after > before) == label


def test_many_labels_come_near_the_mode_of_all_of_them_together() -> None:
    # Given 400 labels of a logistic model
    random = np.random.default_rng(1)
    x = np.concatenate([random.normal(size=(400, 3)), np.ones((400, 1))], axis=1)
    truth = np.array([1.0, -0.5, 0.0, 0.3])
    y = random.random(400) < 1 / (1 + np.exp(-x @ truth))
    # When they are learned one after the other
    head = BayesianLogistic(4, 1.0)
    for i in range(400):
        head.learn(x[i], bool(y[i]))

    # Then the mean is near the exact mode of prior and all likelihoods
    def negative(b: Floats) -> float:
        return float(0.5 * b @ b + np.logaddexp(0.0, np.where(y, -1, 1) * (x @ b)).sum())

    mode = minimize(negative, np.zeros(4), method="BFGS").x
    np.testing.assert_allclose(head.mean, mode, atol=0.1)


def test_the_prior_of_a_task_is_tight_on_state_and_wide_on_the_bias() -> None:
    # Given a task with inputs of which the first two are hidden state
    is_state = np.array([True, True, False])
    plain = BayesianLogistic.of_task(shop.settings().tasks["redeemed"], is_state)
    # Then by default state has a tenth of the variance, and the bias its own
    assert np.diag(plain.covariance).tolist() == pytest.approx([0.01, 0.01, 0.1, 4.0])
    assert np.count_nonzero(plain.covariance) == 4
    chosen = shop.settings(TASKS__REDEEMED__STATE_PRIOR_VARIANCE="0.5", TASKS__REDEEMED__BIAS_VARIANCE="2")
    given = BayesianLogistic.of_task(chosen.tasks["redeemed"], is_state)
    assert np.diag(given.covariance).tolist() == [0.5, 0.5, 0.1, 2.0]


@pytest.mark.parametrize("weight", [1e-300, 1e6, 1e300])
def test_extreme_weights_leave_the_posterior_finite(weight: float) -> None:
    head = BayesianLogistic(4, 0.01)
    head.learn(np.array([6.0, -6.0, 6.0, 1.0]), True, weight)
    head.learn(np.array([6.0, -6.0, 6.0, 1.0]), False, weight)
    assert np.isfinite(head.mean).all()
    assert np.isfinite(head.covariance).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_label_that_is_not_finite_changes_nothing(poison: float) -> None:
    head = BayesianLogistic(2, 0.01)
    assert not head.learn(np.array([poison, 1.0]), True)
    assert not head.learn(np.array([1.0, 1.0]), True, poison)
    assert head.mean.tolist() == [0.0, 0.0]
    assert head.covariance.tolist() == [[0.01, 0.0], [0.0, 0.01]]


def test_the_standardiser_is_fixed_by_the_first_examples_alone() -> None:
    random = np.random.default_rng(0)
    rows = random.normal([0, 100, 5], [1, 30, 0], (50, 3)).astype(np.float32)
    standardiser = Standardiser(3, 20)
    fixed = [standardiser.observe(row) for row in rows]
    assert fixed.index(True) == 19
    assert sum(fixed) == 1
    assert standardiser.center is not None
    assert standardiser.scale is not None
    np.testing.assert_allclose(standardiser.center, rows[:20].astype(float).mean(axis=0))
    np.testing.assert_allclose(standardiser.scale[:2], rows[:20, :2].astype(float).std(axis=0))
    # A constant input keeps its own scale, so that noise on it does not fill the range.
    assert standardiser.scale[2] == 1.0


def learner(width: int = 3, after: int = 4) -> TaskLearner:
    task = shop.settings(TASKS__REDEEMED__STANDARDISE_AFTER=str(after)).tasks["redeemed"]
    return TaskLearner("redeemed", np.zeros(width, np.bool_), task)


def rows(n: int, width: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(5).normal(size=(n, width)).astype(np.float32)


def test_labels_before_the_standardiser_are_learned_in_order_when_it_is_fixed() -> None:
    # Given two labels while only three of four examples were seen
    x = rows(6)
    waiting = learner()
    for row in x[:3]:
        waiting.observe(row)
    waiting.learn(x[0], True, 1.0, math.nan, 10, final_ms=1)
    waiting.learn(x[1], False, 1.0, math.nan, 11, final_ms=2)
    assert (waiting.learned, waiting.queued, waiting.head(), waiting.included) == (0, 2, {}, [])
    # When the fourth is seen
    assert waiting.observe(x[3])
    # Then both are learned, as if they had come after it
    assert (waiting.learned, waiting.queued, waiting.included) == (2, 0, [10, 11])
    direct = BayesianLogistic(4, np.array([0.1, 0.1, 0.1, 4.0]))
    center, scale = waiting.standardiser.center, waiting.standardiser.scale
    assert center is not None
    assert scale is not None
    for row, label in ((x[0], True), (x[1], False)):
        direct.learn(standardise(row[None, :], center, scale)[0], label)
    assert np.array_equal(direct.mean, shop.posterior(waiting).mean)
    assert set(waiting.head()) == {f"head/redeemed/{part}" for part in ("center", "scale", "weight")}


def test_poison_is_dropped_and_counted() -> None:
    poisoned = learner(after=2)
    for row in rows(2):
        poisoned.observe(row)
    before = shop.posterior(poisoned).mean.copy()
    poisoned.learn(np.array([math.nan, 0, 0], np.float32), True, 1.0, 0.5, 0)
    poisoned.learn(np.array([math.inf, 0, 0], np.float32), True, 1.0, 0.5, 0)
    assert (poisoned.learned, poisoned.dropped) == (0, 2)
    assert np.array_equal(shop.posterior(poisoned).mean, before)
    # Nor does it reach the standardiser.
    fresh = learner(after=2)
    fresh.observe(np.array([math.nan, 0, 0], np.float32))
    assert fresh.standardiser.count == 0


def test_a_learner_goes_on_bit_for_bit_from_its_checkpoint(tmp_path: Path) -> None:
    # Given one learner, and one that is saved and loaded after each label
    x = rows(30)
    labels = np.random.default_rng(6).random(30) < 0.5
    database = Database(tmp_path / "db")
    straight, saved = learner(after=10), learner(after=10)
    for i in range(30):
        for one in (straight, saved):
            one.observe(x[i])
            one.learn(x[i], bool(labels[i]), 1.0, 0.5, i)
        changes: Changes = {}
        saved.save(changes)
        database.write(changes)
        saved = learner(after=10)
        saved.load(database)
    # Then they are the same
    assert np.array_equal(shop.posterior(straight).mean, shop.posterior(saved).mean)
    assert np.array_equal(shop.posterior(straight).covariance, shop.posterior(saved).covariance)
    assert (straight.labels, straight.included) == (saved.labels, saved.included)
    assert straight.prequential.log_loss() == saved.prequential.log_loss()
    with pytest.raises(StoreError, match="has 5 inputs"):
        learner(width=5).load(database)
    database.close()


def test_prequential_quality_is_over_a_window_of_answered_predictions() -> None:
    quality = Prequential(window=4)
    assert math.isnan(quality.log_loss())
    assert math.isnan(quality.auc())
    for prediction, label in [(0.1, True), (0.9, True), (0.2, False), (math.nan, True), (0.8, True), (0.9, False)]:
        quality.add(prediction, label)
    # The first has left the window, and the one without a head never was in it.
    assert len(quality) == 4
    expected = -np.mean(np.log([0.9, 0.8, 0.8, 0.1]))
    assert quality.log_loss() == pytest.approx(expected)
    # Positives .9, .8; negatives .2, .9: won 1 + .5, 1 + 0 of 4.
    assert quality.auc() == pytest.approx(2.5 / 4)
