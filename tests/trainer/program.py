"""The trainer's commands as a program, whether the package is installed or not."""

import argparse
import sys

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


if __name__ == "__main__":
    sys.exit(main())
