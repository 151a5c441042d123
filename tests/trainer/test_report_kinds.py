"""Reports on every kind of task and head, from the record of a real trainer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from numpy.typing import NDArray

from stream.cli import main
from stream.model.heads import Head, Questions
from stream.model.parameters import ParameterSet, Tensor
from stream.settings import Settings, parse
from stream.wire import FeedbackRecord, Label, encode_event, encode_feedback
from trainer.evaluation import auc, log_loss
from trainer.record import AnsweredExamples, read_record
from trainer.report.again import Again
from trainer.report.groups import contributions
from trainer.report.measures import Judge

from .shop import DAY_MS, open_trainer, records

HOUR_MS = 3_600_000
#: 2017-07-14, and 14 and 28 days later.
START_MS = 1_499_990_400_000
SPLIT_MS = START_MS + 14 * DAY_MS
SENDS = 28 * 24
CLASSES = ("little", "some", "much")
TOML = """
[modalities.purchase.fields]
amount = { type = "number" }
[modalities.send.fields]
luck = { type = "number" }
[[memory]]
name = "spent"
modality = "purchase"
kind = "sum"
field = "amount"
half_life_s = 3600
[model]
hidden = 8
"""
TASK = """
[tasks.NAME]
on = "send"
kind = "KIND"
head = HEAD
inputs = ["luck"]
labels = "as_they_come"
standardise_after = 50
standardise_again = [120, 400]
prior_variance = 1.0
[tasks.NAME.mlp]
members = 2
hidden = 8
learning_rate = 0.02
average = 0.9
warm_up = 5
dropout = 0.0
hidden_dropout = 0.0
[tasks.NAME.gbdt]
refit_interval_s = 259200
least_examples = 100
leaf_examples = 5
trees = 30
learning_rate = 0.2
columns = 1.0
"""
#: name -> kind, head
TASKS = {
    "bought": ("binary", '["logistic"]'),
    "came": ("binary", '["mlp", "gbdt"]'),
    "size": ("multiclass", '["logistic", "mlp"]'),
    "worth": ("regression", '["linear", "gbdt"]'),
    "sampled": ("binary", '["mlp"]'),
}
REPORTED = tuple(TASKS)[:-1]


def toml(names: Iterable[str] = tuple(TASKS)) -> str:
    tasks = []
    for name in names:
        kind, head = TASKS[name]
        tasks.append(TASK.replace("NAME", name).replace("KIND", kind).replace("HEAD", head))
    return (
        (TOML + "".join(tasks))
        .replace("[tasks.size]", f"[tasks.size]\nclasses = {json.dumps(CLASSES)}")
        .replace("[tasks.sampled]", "[tasks.sampled]\nnegative_rate = 0.5")
        .replace("[tasks.came]", '[tasks.came]\nleave_out = { mlp = ["hidden"], gbdt = ["hidden"] }')
        .replace("[tasks.worth]", '[tasks.worth]\nleave_out = { linear = ["hidden"] }')
    )


@dataclass(frozen=True)
class Recorded:
    """What a trainer recorded, and the heads that it had at the split."""

    directory: Path
    settings: Settings
    questions: Questions
    examples: dict[str, AnsweredExamples]
    tensors: dict[str, Tensor]

    def again(self, task: str) -> Again:
        return Again.of(self.settings, self.questions.by_task[task], self.examples[task])

    def head(self, task: str) -> Head:
        one = self.questions.by_task[task]
        return Head(task, one.settings, ParameterSet(self.tensors), np.ones(one.width, np.bool_))


def labels_of(amount: float, random: np.random.Generator) -> dict[str, Label]:
    """What is spent decides everything."""
    value = amount + float(random.normal(0.0, 0.3))
    return {
        "bought": value > 2.0,
        "came": value > 2.0,
        "size": CLASSES[int(np.digitize(value, (1.5, 3.0)))],
        "worth": value,
        "sampled": value > 2.0,
    }


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A send an hour, each after a purchase, answered a day later; 60 clients."""
    directory = tmp_path_factory.mktemp("report")
    (directory / "settings.toml").write_text(toml())
    settings = parse(toml(), {})
    trainer = open_trainer(directory / "db", settings, record=directory / "record")
    random = np.random.default_rng(1)
    answers: list[tuple[int, str, bytes]] = []
    tensors: dict[str, Tensor] = {}
    told = {"events": 0, "feedback": 0}
    step = 24
    for start in range(0, SENDS, step):
        events: list[tuple[str, bytes]] = []
        for number in range(start, start + step):
            at, client = START_MS + number * HOUR_MS, f"c{number % 60}"
            amount = float(random.uniform(0.0, 4.0))
            events.append((client, encode_event(client, at - 1000, "purchase", {"amount": amount})))
            events.append((client, encode_event(client, at, "send", {"luck": float(random.normal())})))
            for task, label in labels_of(amount, random).items():
                known = at + DAY_MS
                answers.append((known, client, encode_feedback(FeedbackRecord(client, known, at, task, label))))
        trainer.apply_events(records(events, told["events"]))
        told["events"] += len(events)
        # What is known by the last of these events; the next one comes an hour later.
        end = START_MS + (start + step) * HOUR_MS
        known_now = [(client, value) for known, client, value in answers if known < end]
        answers = [one for one in answers if one[0] >= end]
        trainer.apply_feedback(records(known_now, told["feedback"]))
        told["feedback"] += len(known_now)
        trainer.serve(ParameterSet(trainer.tensors(), start + 1))
        if end == SPLIT_MS:
            tensors = trainer.tensors()
    questions = trainer.questions
    trainer.close()
    return Recorded(directory, settings, questions, read_record(directory / "record"), tensors)


def report(recorded: Recorded, *more: str, text: str | None = None) -> int:
    file = recorded.directory / "other.toml"
    file.write_text(text or toml())
    place = ["--settings", str(file), "--out", str(recorded.directory / "out")]
    return main(["report", str(recorded.directory / "record"), *place, *more])


@pytest.fixture(scope="module")
def figures(recorded: Recorded) -> dict[str, Any]:
    """What the command makes of it, for all tasks but the last one."""
    assert report(recorded, "--split", "2017-07-28", text=toml(REPORTED)) == 0
    found: dict[str, Any] = json.loads((recorded.directory / "out" / "report.json").read_text())
    assert found["not_reported"] == {}
    return found["tasks"]


def judged(recorded: Recorded, task: str) -> tuple[AnsweredExamples, NDArray[np.bool_], NDArray[np.float64]]:
    examples = recorded.examples[task]
    return examples, examples.as_of_ms >= SPLIT_MS, recorded.again(task).targets()


@pytest.mark.parametrize("task", TASKS)
def test_the_frozen_head_is_the_one_that_the_trainer_had(recorded: Recorded, task: str) -> None:
    # Given the head that a trainer had at the split, whatever its parts
    head = recorded.head(task)
    assert set(head.parts) == set(json.loads(TASKS[task][1]))
    # When it is learned again from the record
    said = recorded.again(task).frozen_at(SPLIT_MS)
    # Then it says the same of everything, bit for bit
    np.testing.assert_array_equal(said, head.predict(recorded.examples[task].inputs))
    # And labels final later are not in it
    again = recorded.again(task)
    label = again.examples.label.copy()
    label[again.examples.final_ms >= SPLIT_MS] = label[0]
    other = replace(again, examples=replace(again.examples, label=label))
    np.testing.assert_array_equal(other.frozen_at(SPLIT_MS), said)


@pytest.mark.parametrize("task", TASKS)
def test_a_head_published_all_the_time_is_the_one_that_was_served(recorded: Recorded, task: str) -> None:
    # Given a trainer that served a new head at every midnight
    again = recorded.again(task)
    # When its record is learned again, and published as often
    (daily, always), parts = again.published_every([DAY_MS, 1], SPLIT_MS)
    # Then it said what was recorded, and published at once it knows more
    later = again.examples.as_of_ms >= SPLIT_MS
    np.testing.assert_array_equal(daily[later], again.examples.said(again.outputs)[later])
    assert np.isnan(daily[~later]).all()
    assert (always[later] != daily[later]).any()
    assert set(parts) == set(json.loads(TASKS[task][1]))


@pytest.mark.parametrize("task", ["bought", "came"])
def test_a_binary_task_is_judged_by_what_was_served(recorded: Recorded, figures: dict[str, Any], task: str) -> None:
    examples, later, target = judged(recorded, task)
    rows, found = figures[task]["rows"], figures[task]
    assert found["evaluated"] == later.sum() == sum(found["evaluated_outcomes"].values())
    for name, said in (
        ("live", examples.prediction),
        ("frozen at the split", recorded.again(task).frozen_at(SPLIT_MS)),
    ):
        score = said.reshape(len(examples), -1)[later, 0]
        assert rows[name]["auc"] == pytest.approx(auc(target[later], score))
        assert rows[name]["log_loss"] == pytest.approx(log_loss(target[later], score))
    assert rows["live"]["gain"] == pytest.approx(rows["live"]["auc"] - rows["frozen at the split"]["auc"])
    assert rows["live"]["gain_low"] <= rows["live"]["gain"] <= rows["live"]["gain_high"]
    anew = "logistic fitted anew" if task == "bought" else "LightGBM fitted anew"
    assert list(rows) == ["live", "frozen at the split", anew]
    assert all(row["auc"] > 0.9 for row in rows.values())


def test_a_multiclass_task_is_judged_class_by_class(recorded: Recorded, figures: dict[str, Any]) -> None:
    examples, later, target = judged(recorded, "size")
    found = figures["size"]
    live = found["rows"]["live"]
    # The predictions of all classes are in the record
    said = examples.said(3)[later]
    np.testing.assert_allclose(said.sum(axis=1), 1.0, atol=1e-6)
    true = target[later].astype(int)
    each = [auc(true == one, said[:, one]) for one in range(3)]
    shares = np.bincount(true, minlength=3) / len(true)
    assert live["auc"] == pytest.approx(float(np.average(each, weights=shares)))
    assert live["auc_low"] < live["auc"] < live["auc_high"]
    assert live["log_loss"] == pytest.approx(float(-np.log(said[np.arange(len(true)), true]).mean()))
    for number, name in enumerate(CLASSES):
        assert live["by_class"][name]["auc"] == pytest.approx(each[number])
        assert live["by_class"][name]["share"] == pytest.approx(shares[number])
        assert sum(one["n"] for one in found["reliability"]["live"][name]) == len(true)
    errors = [one["calibration_error"] for one in live["by_class"].values()]
    assert live["calibration_error"] == pytest.approx(float(np.mean(errors)))
    assert found["evaluated_outcomes"] == dict(zip(CLASSES, np.bincount(true).tolist(), strict=True))


def test_a_regression_is_judged_by_its_errors(recorded: Recorded, figures: dict[str, Any]) -> None:
    examples, later, target = judged(recorded, "worth")
    found = figures["worth"]
    live = found["rows"]["live"]
    error = float(np.square(target[later] - examples.prediction[later]).mean())
    assert live["squared_error"] == pytest.approx(error)
    assert live["r2"] == pytest.approx(1.0 - error / float(target[later].var()))
    assert live["r2"] > 0.8
    assert live["r2_low"] < live["r2"] < live["r2_high"]
    assert "auc" not in live
    bins = found["reliability"]["live"]
    assert [one["predicted"] for one in bins] == sorted(one["predicted"] for one in bins)
    assert sum(one["observed"] * one["n"] for one in bins) == pytest.approx(float(target[later].sum()))
    assert all(one["low"] < one["observed"] < one["high"] for one in bins)
    assert list(found["rows"])[-1] == "LightGBM fitted anew"


@pytest.mark.parametrize("task", REPORTED)
def test_what_decides_contributes_and_noise_does_not(figures: dict[str, Any], task: str) -> None:
    found = figures[task]
    groups = {group["name"]: group for group in found["groups"]}
    assert set(groups) == {"hidden", "spent", "luck"}
    assert found["group_head_is_own"]
    assert found["group_head"] == "the task's own head: " + " + ".join(json.loads(TASKS[task][1]))
    assert groups["spent"]["low"] > 0.05
    assert abs(groups["luck"]["loss"]) < 0.05


def test_pictures_show_something_and_curves_end_where_figures_are(figures: dict[str, Any]) -> None:
    for found in figures.values():
        for path in found["pictures"].values():
            picture = imread(path)
            assert min(picture.shape[:2]) > 250
            # Lines on white, and text.
            assert 0.5 < float(picture[..., :3].mean()) < 0.99
            assert len(np.unique(picture[..., 0])) > 20
        chief = "r2" if found["kind"] == "regression" else "auc"
        assert all(curves[chief][-1] is not None for curves in found["over_time"].values())


def test_where_its_own_head_has_too_few_examples_another_stands_in(
    recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    # Given groups that are measured on fewer examples than trees want
    assert report(recorded, "--task", "came", "--group-examples", "80", "--split", "2017-07-28", "--json") == 0
    found = json.loads(capsys.readouterr().out)["tasks"]["came"]
    # Then the report says that something else learned
    assert found["group_examples"] <= 80
    assert not found["group_head_is_own"]
    assert found["group_head"].startswith("logistic, which stands in")
    assert math.isfinite(found["groups"][0]["loss"])


def test_where_its_own_head_would_take_too_long_another_stands_in(recorded: Recorded) -> None:
    # Given three groups, and room for four times 150 examples
    examples = recorded.examples["worth"]
    # When networks or trees would have to learn more
    found = contributions(
        recorded.again("worth"), Judge("regression"),
        examples.as_of_ms >= SPLIT_MS, SPLIT_MS, most=200, most_learned=600, generator=np.random.default_rng(0),
    )  # fmt: skip
    # Then a linear head does, and it is said
    assert 150 < found.examples <= 200
    assert not found.is_own
    assert found.head == "linear, which stands in: the task's own head would take too long with over 150 examples"
    assert found.groups[0].name == "spent"
    assert found.groups[0].low > 0.1


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            'kind = "binary"\nhead = ["logistic"]',
            'kind = "regression"\nhead = ["linear"]',
            "tasks.bought.kind is 'regression'",
        ),
        ('name = "spent"', 'name = "paid"', "only the record has 'spent'; only the settings have 'paid'"),
        (
            'inputs = ["luck"]',
            "inputs = []",
            "the record has 10 inputs, the settings describe 9: only the record has 'luck'",
        ),
        ("[model]\nhidden = 8", "[model]\nhidden = 9", "settings describe"),
    ],
)
def test_a_record_of_other_settings_is_refused_with_what_differs(
    recorded: Recorded, capsys: pytest.CaptureFixture[str], before: str, after: str, said: str
) -> None:
    text = toml().replace(before, after)
    assert text != toml()
    assert report(recorded, "--task", "bought", text=text) == 7
    assert said in capsys.readouterr().err


def test_a_class_that_the_settings_lack_is_named(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(recorded, "--task", "size", text=toml().replace('"much"]', '"huge"]')) == 7
    assert "the record has labels 'much', tasks.size.classes are little, some, huge" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ("2017-07-15", "too few final labels before the split at 2017-07-15"),
        ("2017-08-11", "no example after the split"),
        # Trees want a hundred labels.
        (
            "2017-07-17",
            "too few were predicted in every way (576 live, 0 frozen at the split, 576 LightGBM fitted anew)",
        ),
    ],
)
def test_too_little_on_a_side_of_the_split_is_said(
    recorded: Recorded, capsys: pytest.CaptureFixture[str], split: str, said: str
) -> None:
    trees_alone = toml().replace('["mlp", "gbdt"]', '["gbdt"]').replace('mlp = ["hidden"], ', "")
    assert report(recorded, "--task", "came", "--split", split, text=trees_alone) == 7
    assert said in capsys.readouterr().err


def test_a_task_that_cannot_be_reported_on_does_not_keep_others_from_it(
    recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    # Given a record of which one task is described otherwise now, and two of which there is no example
    tasks = toml().split("[tasks.came]\n")[0]
    text = tasks + TASK.replace("NAME", "worth").replace("KIND", "binary").replace("HEAD", '["logistic"]')
    # When it is reported on
    assert report(recorded, "--split", "2017-07-28", text=text) == 0
    # Then the other one is there, and what is amiss is said
    printed = capsys.readouterr().out
    assert "bought (binary, logistic): 312 predictions after the split" in printed
    assert "worth: not reported: task 'worth': the labels of the record are numbers" in printed
