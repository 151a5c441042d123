"""The `livestate` command.

Exit codes: 0 done; 1 failed; 2 wrong settings or arguments; 3 broker; 4 fenced; 5 store; 6 parameters; 7 data;
8 no such client; 130 interrupted. Other packages add commands through the entry point group `livestate.commands`: a
function that takes argparse's subparsers.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

# Read when numpy is imported. Products here are small: a second thread saves little on a core of its own, waits for one
# where there is none, and adds in another order, so that bits would depend on the machine.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from stream.commands import register
from stream.commands.common import EXAMPLE, add_settings, configure_logging, settings_of
from stream.errors import LivestateError

__all__ = ["EXAMPLE", "add_settings", "configure_logging", "main", "new_parser", "settings_of"]


def new_parser() -> argparse.ArgumentParser:
    """The parser of all commands, those of other packages included."""
    parser = argparse.ArgumentParser(
        prog="livestate",
        description="A learned embedding of every client, current to the last event.",
        epilog="exit codes: 0 done, 1 failed, 2 wrong settings or arguments, 3 broker, 4 another process took over, "
        "5 store, 6 parameters, 7 data, 8 no such client, 130 interrupted",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    register(commands)
    for entry in sorted(entry_points(group="livestate.commands"), key=lambda e: e.name):
        entry.load()(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = new_parser().parse_args(arguments)
    try:
        code = options.run(options)
        return int(code or 0)
    except LivestateError as error:
        print(f"livestate {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read the output has gone, as `head` does; nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
