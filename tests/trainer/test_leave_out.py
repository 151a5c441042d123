"""A part of a head that leaves inputs out learns and serves as if there were none of them."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from stream.errors import StoreError
from stream.model.heads import Head
from stream.model.parameters import ParameterSet
from stream.settings import Task
from trainer.checkpoint import Changes, Database
from trainer.learner import TaskLearner

from .test_heads import CASES, WIDTH, examples, task, teach

#: The groups of the four inputs.
GROUPS = np.array(["hidden", "bought", "seen", "bought"])
KEPT = np.array([0, 2])


def leaving_out(settings: Task, *names: str) -> Task:
    return msgspec.structs.replace(settings, leave_out={part: list(names) for part in settings.parts})


def learner_of(settings: Task, groups: NDArray[np.str_] = GROUPS) -> TaskLearner:
    return TaskLearner("answer", np.zeros(len(groups), np.bool_), settings, 3, groups)


@pytest.mark.parametrize(("kind", "head"), CASES)
def test_what_is_left_out_has_no_say(kind: str, head: str) -> None:
    # Given a task whose labels depend on the first two inputs, and a head that leaves out the second and the fourth
    settings = leaving_out(task(kind, head), "bought")
    x, labels = examples(kind, 400)
    ours, theirs = learner_of(settings), learner_of(task(kind, head), GROUPS[KEPT])
    # When it learns beside one of a task that has the other two only
    teach(ours, x, labels)
    teach(theirs, x[:, KEPT], labels)
    for learner in (ours, theirs):
        learner.close()
    served = Head("answer", settings, ParameterSet(ours.head()), np.ones(WIDTH, np.bool_))
    alone = Head("answer", task(kind, head), ParameterSet(theirs.head()), np.ones(len(KEPT), np.bool_))
    assert list(served.parts) == head.split(", ")
    # Then what it predicts is the same, bit for bit where the sums have the same terms, whatever is left out
    others, _ = examples(kind, 200, seed=1)
    said = served.predict(others)
    np.testing.assert_allclose(said, alone.predict(others[:, KEPT]), rtol=2e-6)
    random = np.random.default_rng(5)
    others[:, [1, 3]] = random.normal(scale=1e6, size=(200, 2))
    assert np.array_equal(said, served.predict(others))
    # And it has learned something
    assert said.std(axis=0).min() > 0.05


@pytest.mark.parametrize("parts", [("mlp",), ("gbdt",)])
def test_each_part_leaves_out_its_own(parts: tuple[str, ...]) -> None:
    # Given two parts, of which one leaves out what decides
    both = task("binary", "mlp, gbdt")
    settings = msgspec.structs.replace(both, leave_out={part: ["hidden"] for part in parts})
    x, labels = examples("binary", 400)
    learner, whole = learner_of(settings), learner_of(both)
    teach(learner, x, labels)
    teach(whole, x, labels)
    learner.close()
    whole.close()
    # When the first input changes, then its predictions stay and those of the other change
    others, _ = examples("binary", 50, seed=1)
    moved = others.copy()
    moved[:, 0] += 1.0
    head = Head("answer", settings, ParameterSet(learner.head()), np.ones(WIDTH, np.bool_))
    before, after = head.predict_parts(others)[1], head.predict_parts(moved)[1]
    for part in both.parts:
        assert np.array_equal(before[part], after[part]) == (part in parts)
    # And the other is what it is beside a part that sees everything
    plain = Head("answer", both, ParameterSet(whole.head()), np.ones(WIDTH, np.bool_)).predict_parts(others)[1]
    for part in both.parts:
        assert np.array_equal(before[part], plain[part]) == (part not in parts)


@pytest.mark.parametrize(("kind", "head"), [("binary", "logistic"), ("binary", "mlp, gbdt"), ("regression", "linear")])
def test_a_checkpoint_is_taken_over_only_where_the_same_is_left_out(kind: str, head: str, tmp_path: Path) -> None:
    # Given a checkpoint within steps and fits of a head that leaves something out
    settings = leaving_out(task(kind, head), "bought")
    x, labels = examples(kind, 300)
    first, straight = learner_of(settings), learner_of(settings)
    teach(first, x[:211], labels[:211])
    teach(straight, x, labels)
    database = Database(tmp_path / "db")
    changes: Changes = {}
    first.save(changes)
    database.write(changes)
    first.close()
    # When it is taken over, then it goes on bit for bit
    broken = learner_of(settings)
    broken.load(database)
    teach(broken, x[211:], labels[211:], 211)
    ours, theirs = straight.head(), broken.head()
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    straight.close()
    broken.close()
    # And where more, less or other things are left out, it is refused, and said what differs
    part = settings.parts[0]
    for names, now in ((("bought", "seen"), "bought, seen"), ((), "nothing"), (("seen",), "seen")):
        with pytest.raises(StoreError, match=f"its head {part} leaves out {now}, but .* with it leaving out bought: "):
            learner_of(leaving_out(task(kind, head), *names)).load(database)
    database.close()
