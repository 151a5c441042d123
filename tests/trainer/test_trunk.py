"""A trunk that learns online: its gradient, what it can learn, what it cannot take, and its way into versions."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stream.errors import RecordError
from stream.metrics import TrainerMetrics
from stream.model.heads.scores import predictions
from stream.model.layout import Layout
from stream.model.parameters import ParameterSet
from stream.model.rows import RowTable, value_key
from stream.settings import Online, Settings, parse
from stream.store import PackedKeys
from stream.wire import FeedbackRecord, Label, RecordBlock, Schema, encode_event, encode_feedback
from trainer.learner.scores import scores
from trainer.learner.trunk import Reads, TrunkLearner
from trainer.online import OnlineTrainer
from trainer.pretrain import random_trunk
from trainer.timeline import Record
from trainer.trunk_training import OUTCOMES
from trainer.windows import Sequences

from .shop import START_MS, refuse_nothing

#: What came first, a or b? Nothing counts here, and what comes after both hides it.
TOML = """
[modalities.step.fields]
what = { type = "category", embedding = 4, min_count = 1 }
[modalities.ask.fields]
kind = { type = "category" }
[tasks.first]
on = "ask"
standardise_after = 50
labels = "as_they_come"
prior_variance = 0.1
state_prior_variance = 1.0
[tasks.first.mlp]
hidden = 16
[model]
hidden = 16
[model.online]
length = 8
burn_in = 2
labels = 16
learning_rate = 0.01
warm_up = 10
[topics]
partitions = 1
"""


def settings(**overrides: str) -> Settings:
    return parse(TOML, {f"LIVESTATE_{name}": value for name, value in overrides.items()})


def trunk_of(found: Settings) -> ParameterSet:
    values = [encode_event("x", START_MS + i, "step", {"what": what}) for i, what in enumerate("abc")]
    return random_trunk(found, [RecordBlock.from_lists([b"x"] * 3, values, [0, 1, 2], [2 * START_MS] * 3)])


class Clients:
    """Gives one client after the other to a trainer, each with a, b, some c, a question, and its answer."""

    def __init__(self, directory: Path, found: Settings, refuse: Callable[[Record, RecordError], None]) -> None:
        self.metrics = TrainerMetrics()
        self.trainer = OnlineTrainer(found, directory, trunk_of(found), self.metrics, refuse)
        self._random = np.random.default_rng(0)
        self._given = self._events = 0

    def give(self, number: int, label: Label | None = None, weight: float = 1.0) -> None:
        kind = self.trainer.settings.tasks["first"].kind
        for _ in range(number):
            client, at = f"c{self._given}", START_MS + 1_000_000 * self._given
            key, a_first = client.encode(), bool(self._random.random() < 0.5)
            values = []
            for what in ("ab" if a_first else "ba") + "c" * int(self._random.integers(1, 5)):
                at += int(self._random.integers(1, 60_000))
                values.append(encode_event(client, at, "step", {"what": what}))
            values.append(encode_event(client, at + 1, "ask", {"kind": "x"}))
            self.trainer.apply_events(
                [Record(0, self._events + i, at, key, value, ()) for i, value in enumerate(values)]
            )
            answers: dict[str, Label] = {"binary": a_first, "multiclass": "uv"[a_first], "regression": float(a_first)}
            given = answers[kind] if label is None else label
            answer = encode_feedback(FeedbackRecord(client, at + 10, at + 1, "first", given, weight))
            self.trainer.apply_feedback([Record(0, self._given, at, key, answer, ())])
            self._given += 1
            self._events += len(values)
            if self._given % 50 == 0:
                self.trainer.serve(ParameterSet(self.trainer.tensors(), self._given))

    def tables(self) -> dict[str, RowTable]:
        found = {}
        for name, given in self.trainer.touched.offer().items():
            found[name] = RowTable(given.width)
            found[name].stage(given.rows)
        return found

    def outcome(self, name: str) -> float:
        labels = {"task": "first", "outcome": name}
        return self.metrics.registry.get_sample_value("livestate_trunk_labels_total", labels) or 0.0

    def loss(self, last: int) -> float:
        found = self.trainer.learners["first"].prequential
        said, target = np.array(found._predictions)[-last:, 0], np.array(found._targets)[-last:]
        return float(-np.log(np.where(target > 0.5, said, 1.0 - said).clip(1e-12)).mean())


def test_what_only_a_trained_trunk_sees_is_learned(tmp_path: Path) -> None:
    # Given a question that a random trunk hardly answers
    fixed = Clients(tmp_path / "fixed", settings(), refuse_nothing)
    moving = Clients(tmp_path / "online", settings(MODEL__TRUNK="online"), refuse_nothing)
    # When both learn from the same clients
    for one in (fixed, moving):
        one.give(900)
        one.trainer.close()
    # Then the fixed one is not far from guessing (.69), and the other one knows
    assert fixed.loss(200) > 0.4
    assert moving.loss(200) < 0.5 * fixed.loss(200)
    assert sum(moving.outcome(name) for name in OUTCOMES) == 896
    assert moving.outcome("learned") > 750


def sequences(layout: Layout, clients: int, length: int, whole: bool) -> Sequences:
    random = np.random.default_rng(1)
    return Sequences(
        np.zeros((clients, layout.hidden), np.float32) if whole
        else random.uniform(-0.5, 0.5, (clients, layout.hidden)).astype(np.float32),
        random.normal(size=(clients, length, layout.dense_inputs)).astype(np.float32),
        random.integers(-1, 3, (clients, length, 1)).astype(np.int32),
        np.full(clients, length),
        np.full(clients, whole),
    )  # fmt: skip


def full_backpropagation(
    layout: Layout, parameters: ParameterSet, windows: Sequences, reads: Reads, cut: int
) -> dict[str, NDArray[np.float64]]:
    """In float64, an event at a time, gates written out; nothing is led back through the first `cut` events."""
    weight = {
        name: torch.from_numpy(parameters[f"trunk/{name}"].astype(np.float64)).requires_grad_()
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "embedding/step.what")
    }
    total = torch.zeros(())
    for window, event in zip(reads.window.tolist(), reads.event.tolist(), strict=True):
        state = torch.from_numpy(windows.first[window].astype(np.float64))
        for t in range(event + 1):
            code = int(windows.codes[window, t, 0])
            row = weight["embedding/step.what"][code] if code >= 0 else torch.zeros(4, dtype=torch.float64)
            x = torch.cat([torch.from_numpy(windows.dense[window, t].astype(np.float64)), row])
            from_x = weight["weight_ih"] @ x + weight["bias_ih"]
            from_state = weight["weight_hh"] @ state + weight["bias_hh"]
            h = layout.hidden
            reset = torch.sigmoid(from_x[:h] + from_state[:h])
            update = torch.sigmoid(from_x[h : 2 * h] + from_state[h : 2 * h])
            new = torch.tanh(from_x[2 * h :] + reset * from_state[2 * h :])
            state = update * state + (1.0 - update) * new
            if t + 1 == cut:
                state = state.detach()
        total = total + state.square().sum() / settings().model.online.labels
    found = torch.autograd.grad(total, list(weight.values()))
    return {f"trunk/{name}": one.numpy() for name, one in zip(weight, found, strict=True)}


@pytest.mark.parametrize(("whole", "burn_in", "cut"), [(True, 0, 0), (True, 3, 0), (False, 0, 0), (False, 3, 3)])
def test_the_gradient_is_that_of_full_backpropagation(whole: bool, burn_in: int, cut: int) -> None:
    # Given windows that are whole histories, or go on from stored states, read in several places
    found = settings()
    layout = Layout.compile(found, Schema.compile(found))
    parameters = trunk_of(found)
    windows = sequences(layout, 3, 7, whole)
    reads = Reads(np.array([0, 0, 1, 2]), np.array([6, 4, 5, 3]))
    learner = TrunkLearner(layout, Online(length=7, burn_in=burn_in, labels=16), parameters)
    # When their losses are led back
    gradients, wrong = learner.gradients(
        windows, reads, lambda hidden, chosen: hidden.square().sum(dim=1), np.arange(len(reads.window))
    )
    # Then the gradient is the one of all events behind the burn-in, of which whole histories need none
    assert not wrong.any()
    expected = full_backpropagation(layout, parameters, windows, reads, cut)
    for name, (rows, gradient) in gradients.items():
        full = expected[name].reshape(1, -1) if rows.tolist() == [0] and "embedding" not in name else expected[name]
        assert np.abs(full).max() > 1e-3
        np.testing.assert_allclose(gradient, full[rows], rtol=1e-3, atol=1e-6)
        untouched = np.setdiff1d(np.arange(len(full)), rows)
        assert not full[untouched].any()


def test_a_rows_moments_are_its_own() -> None:
    # Given windows in which one value occurs, and then ones in which another does
    found = settings()
    layout = Layout.compile(found, Schema.compile(found))
    parameters = trunk_of(found)
    learner = TrunkLearner(layout, Online(length=7, warm_up=0), parameters)
    windows = sequences(layout, 2, 7, whole=True)
    reads = Reads(np.array([0, 1]), np.array([6, 6]))
    before = parameters["trunk/embedding/step.what"]
    for value in (1, 1, 2):
        windows.codes[:] = value
        assert not learner.learn(windows, reads, lambda hidden, chosen: hidden.sum(dim=1)).any()
    # Then each row has moved by the steps of its own, whose first is of the learning rate, and the rest has not
    after = learner.tensors()["trunk/embedding/step.what"]
    assert np.array_equal(after[[0, 3]], before[[0, 3]])
    np.testing.assert_allclose(np.abs(after[2] - before[2] * (1 - 1e-5)), 0.001, rtol=1e-3)
    assert (np.abs(after[1] - before[1]) > 0.0015).all()
    # And what was learned comes back
    other = TrunkLearner(layout, Online(length=7, warm_up=0), parameters)
    other.restore(learner.state())
    assert (other.steps, other.state()) == (3, learner.state())


def test_a_label_that_is_not_finite_for_the_trunk_is_dropped_and_told_of(tmp_path: Path) -> None:
    # Given a trunk that learns from a regression
    refused: list[tuple[Record, RecordError]] = []
    found = settings(MODEL__TRUNK="online", TASKS__FIRST__KIND="regression")
    clients = Clients(tmp_path, found, lambda record, error: refused.append((record, error)))
    clients.give(160)
    trunk = clients.trainer.trunk
    assert trunk is not None
    steps, learned = trunk.steps, clients.outcome("learned")
    assert learned > 0
    # When one of the next labels has a weight that the head can take, and that makes the trunk's loss infinite
    clients.give(1, label=1e6, weight=1e308)
    clients.give(15)
    # Then the others teach the trunk, and that one is counted and in the dead letters
    assert trunk.steps == steps + 1
    assert clients.outcome("not_finite") == 1
    assert clients.outcome("learned") == learned + 15
    (letter,) = refused
    assert letter[0].key == b"c160"
    assert letter[1].reason == "not_finite"
    assert "the trunk did not learn from it" in str(letter[1])
    clients.trainer.close()


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    found = settings()
    layout = Layout.compile(found, Schema.compile(found))
    learner = TrunkLearner(layout, Online(), trunk_of(found))
    before = learner.state()
    windows, reads = sequences(layout, 2, 7, whole=True), Reads(np.zeros(40, np.int64), np.full(40, 6))
    # Given losses whose slopes float32 can hold, and not their sum
    assert learner.learn(windows, reads, lambda hidden, chosen: hidden.sum(dim=1) * 1.9e40).all()
    assert learner.state() == before


HEADS = {
    "several": 'head = ["logistic", "mlp"]',
    "classes": 'kind = "multiclass"\nclasses = ["u", "v", "w"]\nhead = ["logistic", "mlp"]',
    "values": 'kind = "regression"\nhead = ["linear", "mlp"]',
    "tables": 'tables = ["kind"]\ntable_admission = 1',
    "pieces": 'head = "mlp"',
}


@pytest.mark.parametrize("head", HEADS)
def test_losses_are_of_the_predictions_that_are_served(tmp_path: Path, head: str) -> None:
    # Given heads of every kind that have learned something
    text = TOML.replace('on = "ask"', f'on = "ask"\n{HEADS[head]}')
    if head == "pieces":
        text = text.replace("[tasks.first.mlp]", "[tasks.first.mlp]\npieces = 4")
        text += '[[memory]]\nname = "steps"\nmodality = "step"\nkind = "count"\n'
    found = parse(text, {})
    clients = Clients(tmp_path, found, refuse_nothing)
    clients.give(200)
    trainer = clients.trainer
    learner, question = trainer.learners["first"], trainer.questions.by_task["first"]
    served = trainer.questions.heads(ParameterSet(trainer.tensors(), 1, clients.tables()))["first"]
    inputs = np.random.default_rng(2).normal(size=(20, question.width)).astype(np.float32)
    keys = [value_key(b"x")] * 20
    packed = [PackedKeys.from_list(keys)] if found.tasks["first"].tables else []
    # When they are asked the torch way
    hidden = torch.from_numpy(inputs[:, :16].astype(np.float64))
    said = scores(learner, hidden, inputs, [keys[:1] if packed else []] * 20).numpy()
    # Then they say the same, and of two states only the asked one matters
    np.testing.assert_allclose(predictions(learner.kind, said), served.predict(inputs, packed), rtol=1e-5, atol=1e-6)
    other = np.concatenate([np.zeros((20, 16), np.float32), inputs[:, 16:]], axis=1)
    assert np.array_equal(scores(learner, hidden, other, [keys[:1] if packed else []] * 20).numpy(), said)
    clients.trainer.close()
