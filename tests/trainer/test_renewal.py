"""Inputs are standardised anew as more examples come, and labels learned again as if that had been the scale."""

import math
from collections.abc import Iterable
from pathlib import Path

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from numpy.typing import NDArray

from stream.model.parameters import ParameterSet
from stream.settings import Trainer, parse
from trainer.checkpoint import Changes, Database, pack_array
from trainer.guard import Guard
from trainer.learner import Standardiser, TaskLearner
from trainer.record import read_record

from .shop import START_MS, TOML, answer, open_trainer, outcome, records, send
from .test_heads import WIDTH, examples, task

#: First examples that fix the scale, and those that renew it.
FIRST, AGAIN = 20, (60, 150)
N = 300
KINDS = [
    ("binary", "logistic"), ("binary", "logistic, mlp"), ("binary", "gbdt"), ("multiclass", "mlp"),
    ("regression", "linear"),
]  # fmt: skip


def renewed(kind: str, head: str, after: int = FIRST, again: Iterable[int] = AGAIN, tables: int = 0) -> TaskLearner:
    settings = msgspec.structs.replace(
        task(kind, head, keep=300),
        standardise_after=after,
        standardise_again=list(again),
        tables=["shop", "city"][:tables],
        table_admission=3,
    )
    return TaskLearner("answer", np.zeros(WIDTH, np.bool_), settings, seed=3)


def growing(kind: str, n: int = N) -> tuple[NDArray[np.float32], list[object]]:
    """Examples whose inputs vary more and more."""
    x, labels = examples(kind, n)
    return x * np.linspace(0.2, 3.0, n, dtype=np.float32)[:, None] + 1.0, list(labels)


def keys(i: int, learner: TaskLearner) -> list[bytes]:
    return [b"=%d" % (i % 7), b"=%d" % (i % 40)][: len(learner.tables)]


def see(learner: TaskLearner, x: NDArray[np.float32], which: Iterable[int]) -> None:
    for i in which:
        learner.observe(x[i], keys(i, learner), 1000 * i)


def label(learner: TaskLearner, x: NDArray[np.float32], labels: list[object], which: Iterable[int]) -> None:
    """Some of them at a moment together, all with a prediction to be judged."""
    for i in which:
        said = 0.5 if learner.kind != "multiclass" else 0.2
        learner.learn(
            x[i], labels[i], 1.0 + i % 3, said, i, 0.0, [0.5] * 8, 5000 * (i // 5), keys(i, learner)  # type: ignore[arg-type]
        )  # fmt: skip


def teach(learner: TaskLearner, x: NDArray[np.float32], labels: list[object], which: Iterable[int]) -> None:
    """Each label comes right after its example."""
    for i in which:
        see(learner, x, [i])
        label(learner, x, labels, [i])


def judged(learner: TaskLearner) -> dict[str, bytes]:
    return {name: quality.save() for name, quality in learner.quality.items()}


def test_the_standardiser_is_what_the_examples_so_far_say_at_each_size(tmp_path: Path) -> None:
    x, _ = growing("binary")
    straight, broken = Standardiser(WIDTH, FIRST, AGAIN), Standardiser(WIDTH, FIRST, AGAIN)
    changed = []
    for i, row in enumerate(x, 1):
        # One of them is saved and loaded after each example.
        saved = broken.save()
        broken = Standardiser(WIDTH, FIRST, AGAIN)
        broken.load(saved)
        assert straight.observe(row) == broken.observe(row)
        if straight.center is not None:
            size = max(size for size in (FIRST, *AGAIN) if size <= i)
            changed += [i] * (i == size)
            center, scale = straight.fixed
            np.testing.assert_allclose(center, x[:size].astype(float).mean(axis=0))
            np.testing.assert_allclose(scale, x[:size].astype(float).std(axis=0))
            assert [one.tobytes() for one in straight.fixed] == [one.tobytes() for one in broken.fixed]
    assert changed == [FIRST, *AGAIN]
    assert (straight.is_final, straight.count) == (True, AGAIN[-1])


@pytest.mark.parametrize(
    ("kind", "head", "tables"),
    [
        *((*one, 0) for one in KINDS),
        ("binary", "logistic", 2),
        ("binary", "logistic, mlp", 2),
        ("regression", "linear", 1),
    ],
)
def test_after_a_renewal_a_learner_is_what_it_would_be_had_it_waited(kind: str, head: str, tables: int) -> None:
    # Given a learner whose scale is renewed, and others that wait for each of its scales
    x, labels = growing(kind)
    one = renewed(kind, head, tables=tables)
    learned = 0
    start = 0
    for size in AGAIN:
        waited = renewed(kind, head, size, [more for more in AGAIN if more > size], tables)
        teach(waited, x, labels, range(size - 1))
        teach(one, x, labels, range(start, size - 1))
        # When the example comes that renews it
        before = one.head()
        see(one, x, [size - 1])
        see(waited, x, [size - 1])
        # Then they are the same, bit for bit: parts, rows of tables, what waits, and which labels these are
        assert one.state() == waited.state()
        assert any(not np.array_equal(before[name], tensor) for name, tensor in one.head().items()) == bool(before)
        assert one.labels == waited.labels == size - 1
        # And nothing is counted, included or judged twice
        learned += one.learned
        one.learned = 0
        assert (learned, one.dropped) == (waited.learned, 0)
        assert one.included == waited.included
        assert judged(one) == judged(waited)
        label(one, x, labels, [size - 1])
        start = size
    # And so they stay
    label(waited, x, labels, [AGAIN[-1] - 1])
    for learner in (one, waited):
        teach(learner, x, labels, range(start, N))
        learner.close()
    assert one.state() == waited.state()


def test_labels_of_a_confirmed_version_are_not_new_again() -> None:
    # Given labels of which half are in a confirmed version
    x, labels = growing("binary")
    for head in ("logistic", "mlp"):
        one = renewed("binary", head)
        teach(one, x, labels, range(AGAIN[0] - 1))
        one.confirm(30)
        there = list(one.included)
        assert there == list(range(30, AGAIN[0] - 1 if head == "logistic" else 56))
        # When they are learned again, then the others are still to be published
        see(one, x, [AGAIN[0] - 1])
        assert one.included == there
        label(one, x, labels, range(AGAIN[0] - 1, 64))
        assert one.included == list(range(30, 64))


@pytest.mark.parametrize(("kind", "head"), KINDS)
def test_a_state_from_before_a_renewal_serves_what_it_served_and_is_learned_again_with_the_next(
    kind: str, head: str
) -> None:
    # Given a learner that learned wrong labels after a state, through a renewal, and one that got none of them
    x, labels = growing(kind)
    wrong = list(reversed(labels))
    one, right = renewed(kind, head), renewed(kind, head)
    teach(one, x, labels, range(50))
    state, before = one.state(), one.head()
    for i in range(50, 100):
        see(one, x, [i])
        label(one, x, wrong, [i])
    astray, led = one.state(), one.head()
    # When it goes back
    one.restore(state)
    # Then it serves what it served, under the scale of then
    after = one.head()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], tensor) for name, tensor in after.items())
    # When it learns on until the next renewal, then that is as if there had been no wrong labels
    label(one, x, labels, range(100, 140))
    see(one, x, range(100, AGAIN[1]))
    teach(right, x, labels, range(50))
    see(right, x, range(50, AGAIN[1] - 1))
    label(right, x, labels, range(100, 140))
    see(right, x, [AGAIN[1] - 1])
    ours, theirs = one.head(), right.head()
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert one.labels == right.labels == 90
    # And the state of the wrong labels serves what it served as well
    one.restore(astray)
    assert all(np.array_equal(led[name], tensor) for name, tensor in one.head().items())
    for learner in (one, right):
        learner.close()


def test_labels_given_up_are_there_for_a_state_that_has_them() -> None:
    # Given two states, each with labels of its own after the same first ones
    x, labels = growing("binary")
    one, direct = renewed("binary", "logistic, mlp"), renewed("binary", "logistic, mlp")
    teach(one, x, labels, range(30))
    first = one.state()
    label(one, x, labels, range(200, 210))
    second = one.state()
    one.restore(first)
    label(one, x, labels, range(220, 235))
    # When the learner goes on from the second one, through a renewal
    one.restore(second)
    label(one, x, labels, range(240, 245))
    see(one, x, range(30, AGAIN[0]))
    # Then it has learned its labels again, and no others
    see(direct, x, range(AGAIN[0] - 1))
    label(direct, x, labels, [*range(30), *range(200, 210), *range(240, 245)])
    see(direct, x, [AGAIN[0] - 1])
    assert one.labels == direct.labels == 45
    assert all(np.array_equal(tensor, one.head()[name]) for name, tensor in direct.head().items())


@budget(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, N - 1), max_size=6, unique=True).map(sorted), lag=st.integers(0, 40))
def test_crashes_between_renewals_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], lag: int
) -> None:
    # Given labels that come some examples later, a learner that goes back to a state on its way, and the same one that
    # is saved, loses what came after and is loaded again now and then
    directory = tmp_path_factory.mktemp("db")
    database = Database(directory)
    x, labels = growing("binary")
    states: dict[int, bytes] = {}

    def give(learner: TaskLearner, i: int) -> None:
        see(learner, x, [i])
        if i >= lag:
            label(learner, x, labels, [i - lag])
        if i == 45:
            states[0] = learner.state()
        elif i == 70:
            learner.restore(states[0])

    straight, broken = renewed("binary", "logistic, mlp"), renewed("binary", "logistic, mlp")
    for i in range(N):
        give(straight, i)
    at = 0
    for cut in [*cuts, N]:
        for i in range(at, cut):
            give(broken, i)
        changes: Changes = {}
        broken.save(changes)
        database.write(changes)
        broken.saved()
        for i in range(cut, min(cut + 9, N)):
            give(broken, i)
        broken = renewed("binary", "logistic, mlp")
        broken.load(database)
        at = cut
    # Then both are the same, bit for bit
    assert straight.state() == broken.state()
    assert judged(straight) == judged(broken)
    # And no labels are left on the disk once they will not be learned again
    assert not list(database.scan(b"t/answer/label/#"))
    database.close()


def written_earlier(learner: TaskLearner, database: Database, queue: list[object]) -> None:
    """What a trainer without renewals would have written."""
    changes: Changes = {}
    learner.save(changes)
    changes = {key: value for key, value in changes.items() if b"/label/" not in key}
    standardiser = learner.standardiser
    moments = [np.full(WIDTH, standardiser.count), standardiser._mean, standardiser._squares]
    changes[b"t/answer/standardiser"] = pack_array(np.stack(moments))
    changes[b"t/answer/queue"] = msgpack.packb(queue)
    database.write(changes)


def test_what_an_earlier_trainer_wrote_is_gone_on_from(tmp_path: Path) -> None:
    x, labels = growing("binary")
    # Given a checkpoint of an earlier trainer with a fixed scale, and a state that does not say its scale
    fixed = renewed("binary", "logistic", again=[])
    teach(fixed, x, labels, range(40))
    state: bytes = msgpack.packb(msgpack.unpackb(fixed.state())[:5])
    database = Database(tmp_path / "fixed")
    written_earlier(fixed, database, [])
    # When it is gone on from with renewals, then its scale stays, as its labels are gone
    one = renewed("binary", "logistic")
    one.load(database)
    for learner in (one, fixed):
        teach(learner, x, labels, range(40, N))
    assert one.state() == fixed.state()
    # And the state serves as of the present scale, and nothing is learned again from there
    other = renewed("binary", "logistic")
    teach(other, x, labels, range(50))
    other.restore(state)
    teach(other, x, labels, range(40, N))
    assert one.state() == other.state()
    database.close()
    # Given one whose labels still waited, then they are learned, and learned again
    database = Database(tmp_path / "waiting")
    waiting = renewed("binary", "logistic")
    see(waiting, x, range(FIRST - 1))
    queue: list[object] = [[x[i].tobytes(), float(bool(labels[i])), 1.0, i, 0, 0.0, []] for i in range(10)]
    written_earlier(waiting, database, queue)
    one, direct = renewed("binary", "logistic"), renewed("binary", "logistic", AGAIN[0], AGAIN[1:])
    one.load(database)
    see(one, x, range(FIRST - 1, AGAIN[0]))
    for i in range(10):
        direct.learn(x[i], bool(labels[i]), 1.0, math.nan, i)
    see(direct, x, range(AGAIN[0]))
    assert one.labels == direct.labels == 10
    assert one.state() == direct.state()
    changes: Changes = {}
    one.save(changes)
    assert changes[b"t/answer/queue"] is None
    database.close()


def test_a_good_state_stays_a_forecaster_across_a_renewal() -> None:
    # Given a guarded learner, whose scale is renewed between its good states
    settings = msgspec.structs.replace(task("binary", "logistic"), standardise_again=[700, 2_100])
    one = TaskLearner("answer", np.zeros(WIDTH, np.bool_), settings)
    guard = Guard(one, settings, Trainer(guard_labels=640))
    x, right = examples("binary", 3_400)

    def give(which: Iterable[int], wrong: bool = False) -> int:
        returned = 0
        for i in which:
            one.observe(x[i])
            truth = bool(right[i]) is not wrong
            guard.take(x[i], truth, ())
            one.learn(x[i], truth, 1.0, math.nan, 0, final_ms=1000 * i)
            returned += guard.judge()
        return returned

    assert give(range(2_000)) == 0
    assert not guard.is_holding
    # When wrong labels come, another renewal, and right ones again
    assert give(range(2_000, 2_600), wrong=True) == 0
    before = one.standardiser.fixed[0].copy()
    assert give(range(2_600, 3_400)) == 1
    # Then it goes back across the renewal, to the scale of then
    assert not np.array_equal(one.standardiser.fixed[0], before)
    assert one.labels < 3_400 - 600


def test_a_renewal_is_published_and_recorded_though_no_label_is_new(tmp_path: Path) -> None:
    # Given a trainer whose labels are all in a confirmed version
    settings = parse(TOML.replace("standardise_after = 20", "standardise_after = 4\nstandardise_again = [8, 12]"))
    trainer = open_trainer(tmp_path / "db", settings, record=tmp_path / "record")
    names = [f"c{i}" for i in range(12)]
    sends = records([(name, send(name, START_MS + i)) for i, name in enumerate(names)])
    answers = records([(name, answer(name, START_MS + i, i % 2 == 0)) for i, name in enumerate(names)])
    trainer.apply_events(sends[:6])
    trainer.apply_feedback(answers[:6])
    trainer.tensors()
    trainer.confirm(trainer.unpublished())
    assert not trainer.has_changed
    # When the example comes that renews its scale
    trainer.apply_events(sends[6:8])
    # Then there is something to publish, which includes no label again
    assert trainer.has_changed
    assert trainer.unpublished() == {"redeemed": 0}
    assert trainer.feedback_ms() == []
    # And if the scale is renewed once more while that is on its way, then that is still to be published
    version = ParameterSet(trainer.tensors(), 1)
    included = trainer.unpublished()
    trainer.apply_events(sends[8:])
    trainer.confirm(included)
    trainer.serve(version)
    assert trainer.unpublished() == {"redeemed": 0}
    trainer.tensors()
    trainer.confirm(trainer.unpublished())
    assert not trainer.has_changed
    # And the record says from where on each scale is in force
    trainer.apply_feedback(answers[6:])
    assert outcome(trainer.metrics, "joined") == 12
    assert trainer.metrics.registry.get_sample_value("livestate_examples_learned_total", {"task": "redeemed"}) == 12
    found = read_record(tmp_path / "record")["redeemed"]
    assert [(one.after, one.as_of_ms - START_MS) for one in found.scales] == [(0, 3), (6, 7), (6, 11)]
    for one, size in zip(found.scales, (4, 8, 12), strict=True):
        np.testing.assert_allclose(one.center, found.inputs[:size].astype(float).mean(axis=0), atol=1e-12)
    trainer.close()


def test_a_task_without_renewals_keeps_no_labels(tmp_path: Path) -> None:
    # Given a learner whose first scale stays
    x, labels = growing("binary")
    one = renewed("binary", "logistic", again=[])
    teach(one, x, labels, range(FIRST - 1))
    assert one.queued == FIRST - 1
    teach(one, x, labels, range(FIRST - 1, N))
    # Then its checkpoint has none of them
    changes: Changes = {}
    one.save(changes)
    assert not [key for key in changes if b"/label/#" in key]
