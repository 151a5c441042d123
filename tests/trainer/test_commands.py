"""The commands as a user types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stream.cli import main
from stream.wire import encode_event_json
from trainer.pretrain import load_parameters

from .shop import START_MS, TOML

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.trainer.program", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_pretrain_writes_a_trunk_and_says_how_good_it_is(tmp_path: Path) -> None:
    # Given events in two files
    (tmp_path / "shop.toml").write_text(TOML)
    for number in range(2):
        lines = [
            encode_event_json(
                f"c{c}", START_MS + number * 1000 + i, "purchase", {"amount": 1.5, "department": "AB"[i % 2]}
            )
            for i in range(10)
            for c in range(20)
        ]
        (tmp_path / f"{number}.jsonl").write_bytes(b"\n".join(lines))
    trunk = tmp_path / "trunk.msgpack"
    # When they are pretrained on
    done = run(
        "pretrain", "--settings", str(tmp_path / "shop.toml"), "--out", str(trunk),
        "--events", str(tmp_path / "0.jsonl"), str(tmp_path / "1.jsonl"),
    )  # fmt: skip
    # Then the file has the trunk that the line names
    assert done.returncode == 0, done.stderr
    assert f"trunk {load_parameters(trunk).trunk_id} written to {trunk}: 400 events, loss" in done.stdout
    # And nothing is said on the way where nobody watches
    assert "%" not in done.stderr


def test_pretrain_tells_its_progress_and_result_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Given some events
    (tmp_path / "shop.toml").write_text(TOML)
    fields = {"amount": 1.5, "department": "A"}
    lines = [encode_event_json(f"c{i % 9}", START_MS + i, "purchase", fields) for i in range(200)]
    (tmp_path / "events.jsonl").write_bytes(b"\n".join(lines))
    fields = {"timestamp_ms": START_MS + 300, "as_of_ms": START_MS + 199, "task": "redeemed", "label": True}
    (tmp_path / "feedback.jsonl").write_text(json.dumps({"client_id": "c1", **fields}))
    trunk, files = tmp_path / "trunk.msgpack", ["--events", str(tmp_path / "events.jsonl")]
    files += ["--feedback", str(tmp_path / "feedback.jsonl")]
    # When they are pretrained on, with progress and JSON asked for
    settings = ["--settings", str(tmp_path / "shop.toml")]
    assert main(["pretrain", *settings, "--out", str(trunk), *files, "--progress", "--json"]) == 0
    # Then the way is told beside the result
    done = capsys.readouterr()
    assert "%  " in done.err
    result = json.loads(done.out)
    assert result["trunk"] == load_parameters(trunk).trunk_id
    assert (result["file"], result["events"]) == (str(trunk), 200)
    assert result["loss"] > 0


def test_errors_are_one_line_and_an_exit_code(tmp_path: Path) -> None:
    (tmp_path / "shop.toml").write_text(TOML)
    arguments = ("--settings", str(tmp_path / "shop.toml"))
    missing = str(tmp_path / "missing")
    for command, code in (
        (("pretrain", *arguments, "--events", missing, "--out", missing), 7),
        (("trainer", *arguments, "--trunk", missing), 7),
        (("trainer", "--settings", missing), 2),
    ):
        done = run(*command)
        assert done.returncode == code, done.stderr
        assert done.stderr.count("\n") == 1
        assert missing in done.stderr


def test_help_has_an_example() -> None:
    for command in ("trainer", "pretrain"):
        assert f"example: livestate {command}" in run(command, "--help").stdout
