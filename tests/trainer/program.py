"""The trainer's commands as a program, whether the package is installed or not."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from stream.errors import LivestateError
from trainer.commands import register


def main() -> int:
    parser = argparse.ArgumentParser(prog="livestate")
    register(parser.add_subparsers(required=True))
    options = parser.parse_args()
    try:
        return int(options.run(options))
    except LivestateError as error:
        print(f"livestate: {error}", file=sys.stderr)
        return error.exit_code


def run_as(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
    """Be that program, in a process that was made for it."""
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    sys.argv = ["livestate", *arguments]
    sys.exit(main())


if __name__ == "__main__":
    sys.exit(main())
