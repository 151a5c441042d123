"""The sub-command `livestate run`."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

from stream.cli import add_settings
from stream.errors import SettingsError

__all__ = ["register"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `run`."""
    parser = subparsers.add_parser(
        "run",
        help="everything on this machine, on a real year of purchases",
        description="Starts an embedded broker, a worker and the trainer, replays a year of purchases of 2,469 "
        "households with coupon redemptions as delayed feedback, and reports. Ctrl-C stops everything.",
        epilog="example: livestate run --keep",
    )
    add_settings(parser)
    parser.add_argument("--directory", default="run", metavar="DIR", help="where data and the report go (%(default)s)")
    parser.add_argument(
        "--rate", type=float, default=10_000.0, metavar="N", help="events a second at most (%(default)g)"
    )
    parser.add_argument("--until", metavar="DATE", help="first day no longer replayed, for example 2017-04-01")
    parser.add_argument("--keep", action="store_true", help="leave it up at the end, until Ctrl-C")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if not arguments.rate > 0:
        raise SettingsError(f"--rate {arguments.rate:g}: expected a number above 0")
    until_ms = None if arguments.until is None else _day(arguments.until)

    # Imported here: the demo needs packages that a worker does not, and they take seconds.
    from trainer.demo.run import Options, run_demo

    directory = Path(arguments.directory)
    return run_demo(Options(Path(arguments.settings), directory, arguments.rate, arguments.keep, until_ms))


def _day(text: str) -> int:
    try:
        return int(datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp() * 1000)
    except ValueError as error:
        raise SettingsError(f"--until {text!r}: expected a day such as 2017-04-01") from error
