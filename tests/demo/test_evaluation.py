"""Measures against brute force and known values."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.evaluation import (
    auc,
    auc_difference_interval,
    auc_interval,
    class_log_loss,
    cumulative_auc,
    expected_calibration_error,
    interval,
    log_loss,
    mean_calibration_error,
    measure_of_auc,
    measure_of_class_auc,
    measure_of_r2,
    rolling_auc,
)

#: Few different scores, so that ties are common.
examples = st.lists(st.tuples(st.booleans(), st.integers(0, 8).map(lambda n: n / 8)), min_size=0, max_size=60)


def pairs_auc(labels: list[bool], scores: list[float]) -> float:
    positive = [score for label, score in zip(labels, scores, strict=True) if label]
    negative = [score for label, score in zip(labels, scores, strict=True) if not label]
    if not positive or not negative:
        return math.nan
    won = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return won / (len(positive) * len(negative))


@given(examples)
def test_auc_is_the_share_of_pairs_in_the_right_order(drawn: list[tuple[bool, float]]) -> None:
    labels, scores = [label for label, _ in drawn], [score for _, score in drawn]
    assert auc(labels, scores) == pytest.approx(pairs_auc(labels, scores), nan_ok=True)


@given(examples, st.randoms())
def test_auc_knows_neither_order_nor_scale(drawn: list[tuple[bool, float]], random: object) -> None:
    shuffled = list(drawn)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    stretched = [(label, math.exp(3 * score) - 7) for label, score in shuffled]
    expected = auc([label for label, _ in drawn], [score for _, score in drawn])
    assert auc(*zip(*stretched, strict=True) if stretched else ([], [])) == pytest.approx(expected, nan_ok=True)


def test_auc_of_known_cases() -> None:
    assert auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == 0.75
    assert auc([0, 1], [1.0, 2.0]) == 1.0
    assert auc([1, 0], [1.0, 2.0]) == 0.0
    assert auc([1, 0, 1, 0], [5.0] * 4) == 0.5
    assert math.isnan(auc([1, 1], [0.1, 0.2]))


@pytest.mark.parametrize(
    ("labels", "scores", "said"),
    [
        ([0, 1], [0.5], "one length"),
        ([0, 2], [0.5, 0.5], "0 and 1"),
        ([0, 1], [0.5, math.nan], "NaN"),
    ],
)
def test_unusable_input_is_refused(labels: list[int], scores: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        auc(labels, scores)


@given(st.lists(st.tuples(st.booleans(), st.floats(0.001, 0.999)), min_size=1, max_size=50))
def test_log_loss_is_the_mean_of_the_logarithms(drawn: list[tuple[bool, float]]) -> None:
    expected = -sum(math.log(chance if label else 1 - chance) for label, chance in drawn) / len(drawn)
    assert log_loss(*zip(*drawn, strict=True)) == pytest.approx(expected)


def test_log_loss_of_a_wrong_certainty_is_large_and_finite() -> None:
    assert 25 < log_loss([1], [0.0]) < 30
    with pytest.raises(ValueError, match="from 0 to 1"):
        log_loss([1], [1.5])


def test_calibration_error_of_known_cases() -> None:
    # Given predictions that come true as often as they say, then the error is 0
    assert expected_calibration_error([1, 0, 0, 0] * 5, [0.25] * 20) == pytest.approx(0.0)
    # Given one constant prediction, then it is the distance from the observed rate
    assert expected_calibration_error([1, 0] * 10, [0.2] * 20) == pytest.approx(0.3)
    # Given two groups that err in opposite directions, then errors do not cancel
    labels, chances = [1, 1, 0, 0] * 5, [0.4, 0.4, 0.6, 0.6] * 5
    assert expected_calibration_error(labels, chances, bins=2) == pytest.approx(0.6)


@given(examples.filter(bool), st.integers(1, 12))
def test_calibration_error_is_at_least_the_error_of_the_mean(drawn: list[tuple[bool, float]], bins: int) -> None:
    labels, chances = [label for label, _ in drawn], [chance for _, chance in drawn]
    error = expected_calibration_error(labels, chances, bins)
    assert abs(float(np.mean(labels)) - float(np.mean(chances))) - 1e-12 <= error <= 1.0


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans(), st.integers(0, 5)), max_size=40))
def test_auc_over_time_is_auc_of_the_examples_inside(drawn: list[tuple[int, bool, int]]) -> None:
    times, labels, scores = ([row[i] for row in drawn] for i in range(3))
    at = [0, 7, 20]
    so_far = cumulative_auc(times, labels, scores, at)
    recent = rolling_auc(times, labels, scores, at, window=5)
    for i, end in enumerate(at):
        past = [row for row in drawn if row[0] <= end]
        inside = [row for row in past if row[0] > end - 5]
        for value, rows in ((so_far[i], past), (recent[i], inside)):
            expected = pairs_auc([bool(row[1]) for row in rows], [float(row[2]) for row in rows])
            assert value == pytest.approx(expected, nan_ok=True)


def test_the_interval_covers_the_value_and_narrows_with_clients() -> None:
    # Given scores that separate two classes by one standard deviation (AUC about .76)
    generator = np.random.default_rng(0)
    widths = []
    for n in (200, 3200):
        labels = generator.random(n) < 0.5
        scores = labels + generator.standard_normal(n)
        interval = auc_interval(np.arange(n), labels, scores, np.random.default_rng(1), rounds=300)
        assert interval.low < interval.value < interval.high
        assert interval.value == auc(labels, scores)
        widths.append(interval.high - interval.low)
    # Then sixteen times the clients make it about a quarter as wide
    assert 2.5 < widths[0] / widths[1] < 6.5


def test_the_interval_is_over_clients_and_not_over_examples() -> None:
    # Given each example four times over under one client
    generator = np.random.default_rng(0)
    labels = generator.random(300) < 0.5
    scores = labels + generator.standard_normal(300)
    once = auc_interval(np.arange(300), labels, scores, np.random.default_rng(1), rounds=200)
    four = auc_interval(
        np.repeat(np.arange(300), 4),
        np.repeat(labels, 4),
        np.repeat(scores, 4),
        np.random.default_rng(1),
        rounds=200,
    )
    # Then nothing is known better than before
    assert four.low == pytest.approx(once.low)
    assert four.high == pytest.approx(once.high)


def test_a_difference_to_itself_is_nothing_and_to_noise_is_all() -> None:
    generator = np.random.default_rng(0)
    labels = generator.random(500) < 0.3
    scores = labels + generator.standard_normal(500)
    clients = np.arange(500) // 2
    same = auc_difference_interval(clients, labels, scores, scores * 2, np.random.default_rng(1), rounds=50)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    gain = auc_difference_interval(clients, labels, scores, generator.random(500), np.random.default_rng(1), rounds=100)
    assert gain.low > 0.1
    with pytest.raises(ValueError, match="clients has length 3"):
        auc_interval([1, 2, 3], labels, scores, generator)


@given(st.integers(0, 2**32 - 1))
def test_weights_count_examples_so_often(seed: int) -> None:
    # Given examples, and how often each one counts
    random = np.random.default_rng(seed)
    times = random.integers(0, 4, 40)
    classes, values = random.integers(0, 3, 40), random.normal(size=40)
    chances, said = random.dirichlet(np.ones(3), 40), values + random.normal(size=40)
    often = np.repeat(np.arange(40), times)
    # Then each measure is that of the examples written out
    for measure, written in (
        (measure_of_class_auc(classes, chances), measure_of_class_auc(classes[often], chances[often])),
        (measure_of_auc(classes == 1, chances[:, 1]), measure_of_auc(classes[often] == 1, chances[often, 1])),
        (measure_of_r2(values, said), measure_of_r2(values[often], said[often])),
    ):
        assert measure(times.astype(np.float64)) == pytest.approx(written(None), nan_ok=True)


def test_classes_are_weighted_by_their_share() -> None:
    # Given one class that is told from the rest, one that is not, and one that never comes
    classes = np.array([0, 0, 0, 1])
    chances = np.array([[0.9, 0.1, 0], [0.8, 0.2, 0], [0.1, 0.9, 0], [0.3, 0.7, 0]])
    # Then the mean is theirs by share, and the third is left out
    first, second = auc(classes == 0, chances[:, 0]), auc(classes == 1, chances[:, 1])
    assert measure_of_class_auc(classes, chances)(None) == pytest.approx(0.75 * first + 0.25 * second)
    assert class_log_loss(classes, chances) == pytest.approx(-float(np.log([0.9, 0.8, 0.1, 0.7]).mean()))
    assert math.isnan(measure_of_class_auc(np.zeros(4), chances)(None))
    assert math.isnan(class_log_loss([], np.zeros((0, 2))))


def test_r2_is_zero_for_the_mean_and_nothing_for_equal_labels() -> None:
    assert measure_of_r2([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])(None) == 0.0
    assert measure_of_r2([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])(None) == 1.0
    assert math.isnan(measure_of_r2([2.0, 2.0], [1.0, 3.0])(None))
    assert math.isnan(measure_of_r2([], [])(None))
    found = interval([1, 1, 2], 3, measure_of_r2([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]), None, np.random.default_rng(0), 20)
    assert (found.low, found.high) == (1.0, 1.0)


def test_numbers_are_calibrated_where_means_agree() -> None:
    assert mean_calibration_error([1.0, 3.0, 11.0, 13.0], [2.0, 2.0, 12.0, 12.0], 2) == 0.0
    assert mean_calibration_error([2.0, 2.0, 14.0, 14.0], [2.0, 2.0, 12.0, 12.0], 2) == 1.0
    assert math.isnan(mean_calibration_error([], []))
