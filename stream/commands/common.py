"""What commands have in common: their settings, what they write while they work, and in which form they answer."""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stream.seldom import Seldom
from stream.settings import Settings, load

__all__ = [
    "EXAMPLE",
    "ProgressLine",
    "add_broker_timeout",
    "add_json",
    "add_progress",
    "add_settings",
    "as_json",
    "configure_logging",
    "print_json",
    "settings_of",
]

EXAMPLE = Path(__file__).parents[1] / "examples" / "shop.toml"


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add `--settings`, which every command that talks to the system takes."""
    parser.add_argument(
        "--settings", metavar="FILE", default=str(EXAMPLE), help="settings file (default: the shop example)"
    )


def add_broker_timeout(parser: argparse.ArgumentParser, seconds: float = 30.0) -> None:
    """Add `--broker-timeout`."""
    parser.add_argument(
        "--broker-timeout", type=float, default=seconds, metavar="S", help="wait so long for the broker (%(default)s)"
    )


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `--json`, for commands whose output is data."""
    parser.add_argument("--json", action="store_true", help=f"print {what}")


def add_progress(parser: argparse.ArgumentParser) -> None:
    """Add `--progress`, for commands that take long."""
    parser.add_argument(
        "--progress", action="store_true", help="say how far it is on standard error, also where that is no terminal"
    )


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings a command was given, with the environment over them."""
    return load(options.settings)


def configure_logging(level: int = logging.INFO) -> None:
    """One line for each record on standard error; libraries only from warnings up, and not the same on and on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Seldom())
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", handlers=[handler]
    )
    for name in ("stream", "trainer"):
        logging.getLogger(name).setLevel(level)
    # Faust reports each rebalance of a healthy group as a warning or error of its recovery service.
    logging.getLogger("faust.tables.recovery").setLevel(logging.ERROR)


def as_json(value: Any) -> str:
    """One line of JSON; numbers that are not finite are null."""
    return json.dumps(_finite(value), allow_nan=False, ensure_ascii=False)


def print_json(value: Any) -> None:
    """`as_json` on standard output."""
    print(as_json(value), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class ProgressLine:
    """How far work is, on standard error: one line written over itself on a terminal, else one now and then if asked.

    Parameters
    ----------
    asked: `--progress`.
    clock: seconds, monotonic.
    """

    def __init__(self, asked: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._live = sys.stderr.isatty()
        self._shown = self._live or asked
        self._clock = clock
        self._told = -math.inf
        self._open = False

    def show(self, share: float | None, text: str) -> None:
        """Say how far it is, 0 to 1 or None where nobody knows; most calls show nothing."""
        now = self._clock()
        if not self._shown or now - self._told < (0.2 if self._live else 5.0):
            return
        self._told = now
        line = text if share is None else f"{min(share, 1.0):4.0%}  {text}"
        if self._live:
            columns = shutil.get_terminal_size().columns
            print(f"\r{line[: columns - 1]:<{columns - 1}}", end="", file=sys.stderr, flush=True)
            self._open = True
        else:
            print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line, so that what is written next has its own."""
        if self._open:
            print(file=sys.stderr, flush=True)
            self._open = False
