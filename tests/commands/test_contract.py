"""What every command keeps to: help with an example that it accepts, and one line and a code for what is wrong."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from stream.cli import new_parser
from tests.commands.conftest import Run


def _commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = [one for one in new_parser()._actions if isinstance(one, argparse._SubParsersAction)]
    return dict(found.choices)


COMMANDS = _commands()


def _example(name: str) -> list[str]:
    epilog = COMMANDS[name].epilog or ""
    assert epilog.startswith("example: livestate "), epilog
    return shlex.split(epilog.removeprefix("example: livestate "))


def test_the_commands_that_are_promised_are_there() -> None:
    promised = "run worker trainer publish get pretrain rebuild topics doctor report export import"
    promised += " versions rollback"
    assert set(COMMANDS) >= set(promised.split())


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_shows_an_example_that_is_accepted(name: str, run: Run) -> None:
    # Given the example that a user copies from the help
    done = run(name, "--help")
    assert done.code == 0
    assert f"example: livestate {name} " in " ".join(done.out.split())
    # Then it is accepted as it stands, by the command it is for
    assert new_parser().parse_args(_example(name)).command == name


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_wrong_settings_are_one_line_and_code_2(name: str, run: Run, tmp_path: Path) -> None:
    # Given settings with a value that is out of range, and settings that are not there
    wrong, missing = tmp_path / "wrong.toml", tmp_path / "missing.toml"
    wrong.write_text("[topics]\npartitions = 0\n")
    for file, said in ((wrong, "topics.partitions"), (missing, "missing.toml")):
        # When the command is run with them
        done = run(*_example(name), "--settings", file)
        # Then it says what is wrong with what
        assert done.code == 2, done.err
        assert said in done.err
        assert done.err.startswith(f"livestate {name}: ")
        assert done.err.count("\n") == 1, done.err


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_an_unknown_argument_is_code_2(name: str, run: Run) -> None:
    done = run(*_example(name), "--no-such-option")
    assert done.code == 2
    assert "unrecognized arguments: --no-such-option" in done.err


def test_an_unknown_command_is_code_2(run: Run) -> None:
    done = run("no-such-command")
    assert done.code == 2
    assert "invalid choice: 'no-such-command'" in done.err


@pytest.mark.skipif(sys.platform != "linux" and "CI" not in os.environ, reason="counts threads as Linux does")
def test_a_command_does_products_on_one_thread() -> None:
    # Given a process that is a command, with an environment that says nothing of it
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    product = "import numpy as np; a = np.ones((700, 700)); a @ a"
    count = "import os; print(len(os.listdir('/proc/self/task')))"
    counted = {
        first: subprocess.run(
            [sys.executable, "-c", f"{first}; {product}; {count}"],
            env=environment, check=True, capture_output=True, text=True,
        ).stdout.strip()
        for first in ("pass", "import stream.cli")
    }  # fmt: skip
    # Then it has one thread, where another program has more if there are cores
    assert counted["import stream.cli"] == "1"
    assert (int(counted["pass"]) > 1) == (len(os.sched_getaffinity(0)) > 1)
