"""`livestate report`: figures that follow from the record alone, nothing from the future, and pictures of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.optimize import minimize

from stream.cli import main
from stream.model.heads import Questions, sigmoid, standardise
from stream.model.layout import Layout
from stream.settings import Settings
from stream.wire import Schema
from trainer.evaluation import auc, log_loss
from trainer.examples import Example, Joined
from trainer.learner import BayesianLogistic, Standardiser, prior_variance
from trainer.record import AnsweredExamples, Recorder, read_record
from trainer.report.again import Again
from trainer.report.rows import fitted_anew

from .shop import DAY_MS, START_MS, TABLED, TOML, settings

N = 1_200


def question(of: Settings) -> list[str]:
    (found,) = Questions(Layout.compile(of, Schema.compile(of))).tasks
    return list(found.names)


def write_record(path: Path, n: int = N) -> AnsweredExamples:
    """n answered examples, one an hour, whose labels become final after ten days; what was spent decides them."""
    rng = np.random.default_rng(2)
    names = question(settings())
    inputs = rng.normal(0.0, 1.0, (n, len(names))).astype(np.float32)
    chance = sigmoid(2.0 * inputs[:, names.index("spent_30d")].astype(np.float64) - 1.0)
    recorder = Recorder(path)
    standardiser = Standardiser(len(names), 20)
    for i in range(n):
        if standardiser.observe(inputs[i]):
            recorder.standardiser("redeemed", standardiser, names, START_MS + i * 3_600_000)
        as_of = START_MS + i * 3_600_000
        # The live head has learned something after a while, and a little less than all there is to know.
        said = float(np.clip(chance[i] + rng.normal(0, 0.05), 0.01, 0.99)) if i > 100 else float("nan")
        example = Example("redeemed", f"c{i % 90}".encode(), as_of, inputs[i], said, 1)
        label = bool(rng.random() < chance[i])
        recorder.example(Joined(example, label, 1.0, as_of + DAY_MS, as_of + DAY_MS, as_of + 10 * DAY_MS))
    recorder.close()
    return read_record(path)["redeemed"]


def report(tmp_path: Path, *more: str, text: str = TOML) -> int:
    (tmp_path / "shop.toml").write_text(text)
    arguments = [str(tmp_path / "record"), "--settings", str(tmp_path / "shop.toml"), "--out", str(tmp_path / "out")]
    return main(["report", *arguments, *more])


def test_a_record_becomes_figures_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Given a record in which one memory decides the answer
    examples = write_record(tmp_path / "record")
    # When it is reported on
    assert report(tmp_path, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == figures
    found = figures["tasks"]["redeemed"]
    # Then what was served is measured as it was served, on the second half
    later = examples.as_of_ms >= found["split_ms"]
    live = found["rows"]["live"]
    assert found["evaluated"] == int(later.sum()) == N // 2
    assert live["auc"] == pytest.approx(auc(examples.label[later], examples.prediction[later]))
    assert live["log_loss"] == pytest.approx(log_loss(examples.label[later], examples.prediction[later]))
    assert live["auc_low"] < live["auc"] < live["auc_high"]
    # And heads that learn from the record find what decides, and cannot do without it
    for name in ("frozen at the split", "logistic fitted anew"):
        assert found["rows"][name]["auc"] > 0.8
    groups = {group["name"]: group for group in found["groups"]}
    assert set(groups) == {"hidden", "spent", "spent_30d", "departments", "last_purchase", "kind"}
    assert found["groups"][0]["name"] == "spent_30d"
    assert groups["spent_30d"]["low"] > 0.2
    assert all(abs(group["loss"]) < 0.03 for name, group in groups.items() if name != "spent_30d")
    assert sum(group["inputs"] for group in groups.values()) == len(question(settings()))
    # And before the split there is but the live head, once it was there
    curves = found["over_time"]
    half = len(found["times_ms"]) // 2
    assert set(curves["frozen at the split"]["auc"][: half - 1]) == {None}
    assert any(value is not None for value in curves["live"]["auc"][: half - 1])
    assert curves["live"]["auc"][0] is None
    # And its predictions come true as often as they say
    for one in found["reliability"]["live"]:
        assert one["low"] - 0.05 < one["predicted"] < one["high"] + 0.05
    # And each picture shows something
    for path in found["pictures"].values():
        picture = imread(path)
        assert min(picture.shape[:2]) > 400
        assert 0.5 < float(picture[..., :3].mean()) < 0.99
        assert len(np.unique(picture[..., 0])) > 20


def test_what_tables_add_is_left_out_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Given a task whose head reads a table, which a record does not say the rows of
    write_record(tmp_path / "record")
    assert report(tmp_path, "--json", "--group-examples", "200") == 0
    without = json.loads(capsys.readouterr().out)["tasks"]["redeemed"]
    # When it is reported on
    assert report(tmp_path, "--group-examples", "200", text=TABLED) == 0
    # Then heads learn again as if it had none, and the report says so
    assert "the rows below live do without what tables add (kind)" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "report.json").read_text())["tasks"]["redeemed"]
    assert found["left_out"] == "what tables add (kind)"
    assert found["rows"] == without["rows"]


def again(examples: AnsweredExamples) -> Again:
    of = settings()
    (question,) = Questions(Layout.compile(of, Schema.compile(of))).tasks
    return Again.of(of, question, examples)


def test_a_head_on_the_way_knows_what_was_final_and_no_more(tmp_path: Path) -> None:
    # Given a record
    examples = write_record(tmp_path / "record", 400)
    x = standardise(examples.inputs, examples.scales[0].center, examples.scales[0].scale)
    one = again(examples)
    # When its head learns again along it, and is published all the time
    (said,), _ = one.published_every([1], 0)
    # Then each prediction is that of a head which learned the labels final before, one after another
    assert np.isnan(said[0, 0])
    for i in (241, 242, 399):
        head = BayesianLogistic.of_task(one.settings, one.is_state)
        for j in np.flatnonzero(examples.final_ms < examples.as_of_ms[i]).tolist():
            head.learn(x[j], bool(examples.label[j]))
        assert said[i, 0] == pytest.approx(head.predict(x[i : i + 1])[0], abs=1e-7)
    # And labels final later change nothing before
    moment = examples.as_of_ms[300]
    examples.label[examples.final_ms >= moment] ^= True
    (changed,), _ = one.published_every([1], 0)
    np.testing.assert_array_equal(changed[:301], said[:301])
    assert (changed[350:] != said[350:]).any()


def test_a_head_fitted_anew_is_at_the_mode(tmp_path: Path) -> None:
    # Given a record and a prior
    examples = write_record(tmp_path / "record", 400)
    x = standardise(examples.inputs, examples.scales[0].center, examples.scales[0].scale)
    moments = examples.as_of_ms[[251, 350]]
    one = again(examples)
    precision = 1.0 / prior_variance(one.settings, one.is_state)
    # When a head is fitted at two moments
    said = fitted_anew(one, moments)[:, 0]
    # Then it says nothing before, and then what the weights of largest posterior say
    assert np.isnan(said[:251]).all()
    for moment, asked in zip(moments, (slice(251, 350), slice(350, 400)), strict=True):
        known = examples.final_ms < moment

        def loss(m: np.ndarray, known: np.ndarray = known) -> float:
            z = x[known] @ m
            return float((np.logaddexp(0.0, z) - examples.label[known] * z).sum() + 0.5 * precision @ np.square(m))

        best = minimize(loss, np.zeros(x.shape[1]), method="BFGS", options={"gtol": 1e-6}).x
        np.testing.assert_allclose(said[asked], sigmoid(x[asked] @ best), atol=1e-4)


def test_a_corrected_answer_counts_once_and_as_it_is_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Given a record in which an answer after the split was taken for negative, and corrected a day later
    examples = write_record(tmp_path / "record")
    at = int(np.flatnonzero(examples.label & (np.arange(N) > N // 2))[0])
    entries = (tmp_path / "record").read_bytes()
    recorder = Recorder(tmp_path / "record", len(entries))
    example = Example("redeemed", examples.client_id[at], int(examples.as_of_ms[at]), examples.inputs[at], 0.25, 1)
    recorder.example(Joined(example, False, 1.0, 0, 0, int(examples.final_ms[-1])))
    recorder.close()
    # When it is reported on
    assert report(tmp_path, "--json", "--group-examples", "200") == 0
    found = json.loads(capsys.readouterr().out)["tasks"]["redeemed"]
    # Then the prediction is judged once, by the last answer
    later = examples.as_of_ms >= found["split_ms"]
    assert found["evaluated"] == int(later.sum())
    assert found["evaluated_outcomes"]["true"] == int(examples.label[later].sum()) - 1


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--task", "bought"), 2, "--task 'bought': expected one of redeemed"),
        (("--split", "soon"), 2, "--split 'soon': expected a day such as"),
        (("--split", "2000-01-01"), 7, "no example before the split"),
        (("--split", "2100-01-01"), 7, "no example after the split"),
        (("--group-examples", "0"), 2, "--group-examples 0: expected 1 or more"),
    ],
)
def test_what_cannot_be_reported_on_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], code: int, said: str
) -> None:
    write_record(tmp_path / "record", 60)
    assert report(tmp_path, *more) == code
    assert said in capsys.readouterr().err


def test_a_record_of_other_settings_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_record(tmp_path / "record", 60)
    monkeypatch.setenv("LIVESTATE_MODEL__HIDDEN", "16")
    assert report(tmp_path) == 7
    assert "the settings describe" in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report(tmp_path) == 1
    assert "pip install 'livestate[demo]'" in capsys.readouterr().err
