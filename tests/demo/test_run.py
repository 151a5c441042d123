"""`livestate run` as a user starts it: a part of the year end to end, and stopped in the middle."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trainer.demo.journey import Journey

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(240)

# Little of everything: what is tested is the run, not what the model has learned.
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "LIVESTATE_PRETRAIN__EPOCHS": "1",
    "LIVESTATE_PRETRAIN__MAX_SEQUENCES": "256",
    "LIVESTATE_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:0",
    "LIVESTATE_WORKER__HTTP_PORT": "0",
    "LIVESTATE_TRAINER__HTTP_PORT": "0",
}


class Run:
    """The command as a process, and what it has printed so far."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        directory.mkdir()
        self.output = directory / "output.txt"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stream.cli", "run", "--directory", str(directory / "run"), *arguments],
                env={**os.environ, **ENVIRONMENT},
                stdout=output,
                stderr=output,
                cwd=ROOT,
            )

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)

    def wait_for_text(self, wanted: str) -> None:
        self.wait_for(lambda: wanted in self.text())

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)


def processes() -> dict[int, int]:
    """Parents of all running processes; those that have ended and wait to be noticed are left out."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                parents[int(entry.name)] = int(parent)
    return parents


def descendants(pid: int) -> set[int]:
    parents = processes()
    found: set[int] = set()
    while True:
        more = {child for child, parent in parents.items() if parent in found | {pid}} - found
        if not more:
            return found
        found |= more


def test_a_part_of_the_year_runs_end_to_end(tmp_path: Path, journey: Journey) -> None:
    # Given the year until three campaigns have ended, the last one after a further one was sent
    until = int(np.datetime64("2017-02-21", "ms").astype(np.int64))
    run = Run(tmp_path / "here", "--until", "2017-02-21", "--rate", "40000")
    try:
        # When it has run
        assert run.process.wait(200) == 0, run.text()
    finally:
        run.end()
    # Then it says what it did, and nothing was lost on the way
    part = journey.until(until)
    directory = tmp_path / "here" / "run"
    report = json.loads((directory / "report.json").read_text())
    assert report["events_published"] == report["events_applied"] == len(part)
    assert report["dead_letters"] == 0
    assert report["clients"] == part.households
    assert report["feedback_published"] == report["feedback_joined"] == len(part.feedback())
    assert report["feedback_late"] == report["feedback_unmatched"] == 0
    assert report["versions_published"] == report["versions_applied"] > 1
    assert report["feedback_to_served_median_ms"] > 0
    assert report["embeddings_published"] >= sum(part.counts[1:]) > 0
    # And figures that need the second half of the year are not there
    assert set(report["auc"].values()) == {None}
    shown = run.text()
    assert f"{part.counts[0]:,} purchases of {part.households:,} households" in shown
    assert re.search(r"^AUC live +-$", shown, re.MULTILINE)
    assert "NOT EQUAL" not in shown
    assert "Traceback" not in shown
    assert "Pretraining the trunk on the days before 2017-01-14" in shown
    # And what is left behind is files
    names = {path.name for path in directory.iterdir()}
    assert names >= {"worker.log", "trainer.log", "trunk.msgpack", "answered.bin", "report.json"}


@pytest.mark.parametrize(
    ("moment", "number"),
    [("Pretraining", signal.SIGINT), ("Replaying", signal.SIGINT), ("Starting worker", signal.SIGTERM)],
)
def test_a_run_that_is_interrupted_leaves_no_process(tmp_path: Path, moment: str, number: int) -> None:
    # Given a run in the middle of something
    run = Run(tmp_path / "here", "--until", "2017-04-01")
    try:
        run.wait_for_text(moment)
        if moment == "Replaying":
            run.wait_for(lambda: "events/s" in run.text())
        run.wait_for(lambda: len(descendants(run.process.pid)) >= (2 if moment == "Pretraining" else 4))
        started = descendants(run.process.pid)
        # When Ctrl-C is pressed, twice by the impatient, or it is asked to end
        run.process.send_signal(number)
        run.process.send_signal(number)
        assert run.process.wait(60) == 130
    finally:
        run.end()
    # Then all that it started has ended, and it says no more than that it stops
    assert not started & set(processes())
    assert run.text().rstrip().endswith("Stopping …")
    assert "Traceback" not in run.text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--until", "soon"), "--until 'soon': expected a day such as 2017-04-01"),
        (("--until", "2016-05-01"), "no event before 2016-05-01"),
        (("--rate", "0"), "--rate 0: expected a number above 0"),
    ],
)
def test_wrong_arguments_are_refused_in_a_line(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    run = Run(tmp_path / "here", *arguments)
    try:
        assert run.process.wait(60) in (2, 7)
    finally:
        run.end()
    assert said in run.text()
    assert "Traceback" not in run.text()
