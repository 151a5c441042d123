"""The closing report: all figures shown, none invented, and a picture that can be opened."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from trainer.demo.report import RunReport, Series, draw_auc_over_time

REPORT = RunReport(
    events_published=1_475_896,
    events_applied=1_475_896,
    clients=2_469,
    embeddings_published=1_200_345,
    feedback_published=5_837,
    feedback_joined=5_830,
    feedback_late=4,
    feedback_unmatched=3,
    versions_published=410,
    versions_applied=410,
    feedback_to_served_median_ms=412.3,
    feedback_to_served_p99_ms=980.0,
    auc={"live": 0.8471, "frozen": 0.8432, "lightgbm": None},
    evaluated="campaigns from 2017-07-01",
    elapsed_s=251.0,
    picture="auc.png",
)


def test_the_table_shows_every_figure() -> None:
    lines = dict(line.split("  ", 1) for line in REPORT.table().replace("  joined", "joined").splitlines())
    shown = {name.strip(): value.strip() for name, value in lines.items()}
    assert shown["events published"] == "1,475,896"
    assert shown["events applied"] == "1,475,896  (equal)"
    assert shown["joined"] == "5,830"
    assert shown["AUC live"] == "0.8471"
    assert shown["AUC lightgbm"] == "-"
    assert shown["feedback to served, p99"] == "980 ms"
    assert shown["picture"] == "auc.png"


def test_a_loss_is_not_hidden() -> None:
    assert "NOT EQUAL" in replace(REPORT, events_applied=1_475_895).table()


def test_json_is_one_line_and_reads_back() -> None:
    text = REPORT.to_json()
    assert "\n" not in text
    assert RunReport.from_json(text) == REPORT


def test_figures_that_are_not_there_are_null_and_dashes() -> None:
    report = replace(REPORT, feedback_to_served_median_ms=math.nan, auc={"live": math.nan}, more={"rows": None})
    content = json.loads(report.to_json())
    assert content["feedback_to_served_median_ms"] is None
    assert content["auc"] == {"live": None}
    assert "nan" not in report.table().lower()
    assert replace(REPORT, picture=None).table().splitlines()[-1].split() == ["picture", "-"]


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    # Given a year of predictions of two models, one of which starts at mid-year
    generator = np.random.default_rng(0)
    times = np.sort(generator.integers(1_483_228_800_000, 1_514_764_800_000, 2000))
    labels = generator.random(2000) < 0.15
    live = labels + generator.standard_normal(2000)
    frozen = np.where(times < times[1000], np.nan, labels + 2 * generator.standard_normal(2000))
    # When they are drawn into a directory that is not there yet
    path = draw_auc_over_time(
        tmp_path / "new" / "auc.png",
        [Series("live", times, labels, live), Series("frozen", times, labels, frozen)],
        title="Coupon redemption",
        evaluated_from_ms=int(times[1000]),
    )
    # Then there is a picture with both models' colours in it
    pixels = imread(path)[:, :, :3]
    assert pixels.shape[0] > 600
    assert pixels.shape[1] > 900
    for colour in ((0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)):
        near = np.abs(pixels - np.array(colour) / 255).max(axis=2) < 0.02
        assert near.sum() > 300


def test_a_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one model with predictions"):
        draw_auc_over_time(tmp_path / "a.png", [Series("live", [1], [True], [math.nan])], title="none")
