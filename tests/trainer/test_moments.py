"""Labels that are final at one moment: one update of the logistic head, in whatever order they come."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import root

from stream.wire import FeedbackRecord, Label
from trainer.checkpoint import Changes, Database
from trainer.joiner import Example, Joiner
from trainer.learner import BayesianLogistic, TaskLearner
from trainer.learner.laplace import joint_update
from trainer.timeline import EVENTS, FEEDBACK, Record

from . import shop
from .shop import DAY_MS, START_MS, answer, open_trainer, purchase, send
from .test_heads import examples, task
from .test_online import feed

Floats = NDArray[np.float64]
Labelling = tuple[NDArray[np.float32], list[Label]]

WIDTH = 4
CLOSED = {"TASKS__REDEEMED__LABELS": "closed"}


def drawn(n: int, seed: int, width: int = 4) -> tuple[Floats, Floats, Floats, Floats]:
    """n labels: inputs with a one, labels, weights and offsets."""
    random = np.random.default_rng(seed)
    x = np.concatenate([random.normal(size=(n, width - 1)), np.ones((n, 1))], axis=1)
    return x, (random.random(n) < 0.3).astype(float), random.uniform(0.2, 3, n), random.normal(size=n)


@given(n=st.integers(1, 12), seed=st.integers(0, 1000))
@budget(deadline=None, max_examples=40)
def test_the_update_is_the_laplace_approximation_of_prior_times_all_likelihoods(n: int, seed: int) -> None:
    # Given a posterior of what was learned before, and labels fewer or more than weights
    head = BayesianLogistic(4, 0.5)
    for row, one in zip(*drawn(3, seed + 1)[:2], strict=True):
        head.learn(row, one > 0)
    x, label, weight, offset = drawn(n, seed)
    precision = np.linalg.inv(head.covariance)

    # When the mode is looked for by a general method, where the slope is zero
    def slope(b: Floats) -> Floats:
        chance = 1.0 / (1.0 + np.exp(-(x @ b + offset)))
        return precision @ (b - head.mean) + x.T @ (weight * (chance - label))

    def curvature(b: Floats) -> Floats:
        chance = 1.0 / (1.0 + np.exp(-(x @ b + offset)))
        return np.asarray(precision + (x.T * (weight * chance * (1 - chance))) @ x)

    mode = root(slope, head.mean, jac=curvature, tol=1e-12).x
    # Then both are found
    after = head.after(x, label, weight, offset)
    np.testing.assert_allclose(after.mean, mode, atol=1e-8)
    np.testing.assert_allclose(after.covariance, np.linalg.inv(curvature(mode)), atol=1e-8)
    assert np.abs(slope(after.mean)).max() < 1e-8


@given(seed=st.integers(0, 1000), width=st.integers(1, 6), before=st.integers(0, 5))
@budget(deadline=None)
def test_of_one_label_it_is_the_update_by_that_label(seed: int, width: int, before: int) -> None:
    head = BayesianLogistic(width, 0.5)
    for row, one in zip(*drawn(before, seed + 1, width)[:2], strict=True):
        head.learn(row, one > 0)
    x, label, weight, offset = drawn(1, seed, width)
    found = joint_update(head.mean, head.covariance, x, label, weight, offset)
    head.learn(x[0], label[0] > 0, float(weight[0]), float(offset[0]))
    assert found is not None
    np.testing.assert_allclose(found[0], head.mean, atol=1e-12)
    np.testing.assert_allclose(found[1], head.covariance, atol=1e-12)


def test_a_weight_without_variance_stays_where_it_is() -> None:
    head = BayesianLogistic(4, np.array([0.5, 0.0, 0.5, 4.0]))
    for n in (3, 50):
        after = head.after(*drawn(n, 1))
        assert after.mean[1] == 0.0
        assert not after.covariance[1].any()
        assert np.abs(after.mean[[0, 2, 3]]).min() > 0.0


@pytest.mark.parametrize("weight", [1e-300, 1e9, 1e100])
@pytest.mark.parametrize("n", [2, 3, 20])
def test_extreme_weights_leave_the_posterior_finite(weight: float, n: int) -> None:
    # Given labels at the same inputs that contradict each other
    x = np.tile([6.0, -6.0, 6.0, 1.0], (n, 1))
    head = BayesianLogistic(4, 0.01).after(x, np.arange(n) % 2.0, np.full(n, weight), np.zeros(n))
    assert np.isfinite(head.mean).all()
    assert np.isfinite(head.covariance).all()
    assert (np.diagonal(head.covariance) >= 0.0).all()


def learner(kind: str = "binary", after: int = 20) -> TaskLearner:
    found = TaskLearner("answer", np.zeros(WIDTH, np.bool_), task(kind, "logistic"))
    random = np.random.default_rng(3)
    for row in random.normal(size=(after, WIDTH)).astype(np.float32):
        found.observe(row)
    return found


def teach(one: TaskLearner, which: Sequence[int], taught: Labelling, moment: int) -> None:
    for i in which:
        one.learn(taught[0][i], taught[1][i], 1.0 + i % 3, math.nan, i, log_odds_offset=0.1 * (i % 2), final_ms=moment)


def tensors(one: TaskLearner) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in one.head().items()}


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_the_order_within_a_moment_does_not_matter(kind: str, tmp_path: Path) -> None:
    # Given two moments of labels
    taught = examples(kind, 90)
    first, second = np.arange(40), np.arange(40, 90)
    # One learner gets the positives first and is asked all the time
    straight = learner(kind)
    for own, moment in ((sorted(first, key=lambda i: str(taught[1][i])), 1000), (second, 2000)):
        for i in own:
            teach(straight, [i], taught, moment)
            straight.head()
    # And others in other orders are saved and loaded, or brought back to what they were, on the way
    random = np.random.default_rng(4)
    database = Database(tmp_path / "db")
    for _ in range(3):
        other = learner(kind)
        for own, moment in ((random.permutation(first), 1000), (random.permutation(second), 2000)):
            for part in np.array_split(own, 5):
                teach(other, part.tolist(), taught, moment)
                state = other.state()
                teach(other, [0, 1, 2], taught, moment + 1)
                other.restore(state)
                changes: Changes = {}
                other.save(changes)
                database.write(changes)
                other = learner(kind)
                other.load(database)
        # Then all serve the same, bit for bit
        assert tensors(other) == tensors(straight)
        assert other.labels == straight.labels == 90
    database.close()


def test_what_is_served_within_a_moment_is_the_update_by_the_labels_that_have_come() -> None:
    # Given a learner in the middle of a moment
    taught = examples("binary", 60)
    half = learner()
    teach(half, range(20), taught, 1000)
    teach(half, range(20, 40), taught, 2000)
    # Then it serves as if the moment had been that long
    direct = BayesianLogistic.of_task(task("binary", "logistic"), np.zeros(WIDTH, np.bool_))
    center, scale = half.standardiser.fixed
    z = np.clip((taught[0] - center) / scale, -6, 6)
    x = np.concatenate([z, np.ones((60, 1))], axis=1)
    label, number = np.array(taught[1], float), np.arange(60)
    for part in (slice(0, 20), slice(20, 40)):
        direct = direct.after(x[part], label[part], 1.0 + number[part] % 3, 0.1 * (number[part] % 2))
    np.testing.assert_allclose(half.head()["head/answer/weight"], direct.mean, atol=1e-12)


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_the_settled_head_has_the_moments_that_are_over(kind: str) -> None:
    # Given a learner in the middle of its second moment, and one that has only the first
    taught = examples(kind, 60)
    half, first = learner(kind), learner(kind)
    teach(half, range(20), taught, 1000)
    teach(half, range(20, 40), taught, 2000)
    teach(first, range(20), taught, 1000)
    # Then without what may still grow it is what that one serves, and its own head is another
    settled = {name: tensor.tobytes() for name, tensor in half.head(settled=True).items()}
    assert settled == tensors(first)
    assert settled != tensors(half)


def test_a_moment_of_more_labels_than_are_kept_is_an_update_for_each_so_many() -> None:
    # Given more labels of one moment than are kept for it
    n, most = 5000, 4096
    taught = examples("binary", n)
    together, apart = learner(), learner()
    teach(together, range(n), taught, 1000)
    teach(apart, range(most), taught, 1000)
    teach(apart, range(most, n), taught, 2000)
    # Then the first of them are one update, and the others the next
    assert tensors(together) == tensors(apart)
    assert together.labels == n
    assert len(together.parts["logistic"].save()["moment"]) < (n - most + 1) * 80


def test_a_label_too_heavy_to_reckon_with_is_dropped_at_once() -> None:
    one = learner()
    taught = examples("binary", 3)
    teach(one, [0, 1], taught, 1000)
    before = tensors(one)
    one.learn(taught[0][2], True, 1e300, math.nan, 2, final_ms=1000)
    assert one.dropped == 1
    assert tensors(one) == before


def campaign(tmp_path: Path, backwards: bool) -> dict[str, bytes]:
    """What a trainer serves after a campaign whose answers become final when it ends."""
    trainer = open_trainer(tmp_path, shop.settings(**CLOSED))
    random = np.random.default_rng(7)
    end = START_MS + 30 * DAY_MS
    offsets = {(kind, partition): 0 for kind in (EVENTS, FEEDBACK) for partition in (0, 1)}

    def give(kind: int, partition: int, client: str, value: bytes) -> None:
        offset = offsets[kind, partition]
        offsets[kind, partition] += 1
        feed(trainer, [(kind, Record(partition, offset, 2_000_000_000_000, client.encode(), value, ()))])

    clients = [(f"client-{c}", c % 2) for c in range(60)]
    for client, partition in clients:
        give(EVENTS, partition, client, purchase(client, START_MS - 5, float(random.exponential(10))))
        give(EVENTS, partition, client, send(client, START_MS, "x" if random.random() < 0.5 else "y"))
    answers = []
    for client, partition in clients:
        redeems = random.random() < 0.3
        known = START_MS + int(random.integers(20 * DAY_MS)) if redeems else end
        answers.append((partition, client, answer(client, START_MS, redeems, known, window_end_ms=end)))
    for one in reversed(answers) if backwards else answers:
        give(FEEDBACK, *one)
    assert trainer.learners["redeemed"].labels == 0
    # The campaign is over in one partition before the other.
    for partition in (1, 0) if backwards else (0, 1):
        give(EVENTS, partition, clients[partition][0], purchase(clients[partition][0], end + 1))
    assert trainer.learners["redeemed"].labels == 60
    found = {name: tensor.tobytes() for name, tensor in trainer.tensors().items()}
    trainer.close()
    return found


def test_a_campaign_is_learned_the_same_in_whatever_order_its_answers_come(tmp_path: Path) -> None:
    assert campaign(tmp_path / "one", False) == campaign(tmp_path / "other", True)


def test_labels_of_one_moment_are_released_in_the_order_of_clients_whatever_they_are(tmp_path: Path) -> None:
    # Given three predictions; the positive is known long before the window closes, and waits for it as the others do
    database = Database(tmp_path / "db")
    joiner = Joiner(database, {"t": 50 * DAY_MS}, lambda task, outcome: None, ["t"])
    end = START_MS + 30 * DAY_MS
    for client, label in (("cid", True), ("bob", False), ("ann", False)):
        joiner.capture(0, Example("t", client.encode(), START_MS, np.ones(2, np.float32), 0.25, 7))
        known = START_MS + DAY_MS if label else end - ord(client[0])
        assert joiner.feedback(0, FeedbackRecord(client, known, START_MS, "t", label, 1.0, end), 99) is None
    # Then it is not the first to be learned
    released = joiner.finality.release(0, end + 1, 99)
    assert [one.example.client_id for one in released] == [b"ann", b"bob", b"cid"]
    database.close()
