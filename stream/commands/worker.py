"""The sub-command `livestate worker`."""

from __future__ import annotations

import argparse
import signal
import sys

from stream.commands.common import add_broker_timeout, add_settings, configure_logging, settings_of

__all__ = ["register"]


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `worker`."""
    parser = commands.add_parser(
        "worker",
        help="run a serving worker",
        description="Applies events to its partitions' rows, publishes embeddings, answers questions by HTTP. SIGTERM "
        "writes a last checkpoint and ends the process.",
        epilog="example: livestate worker --settings shop.toml",
    )
    add_settings(parser)
    add_broker_timeout(parser)
    parser.set_defaults(run=_worker)


def _worker(options: argparse.Namespace) -> int:
    # Until the worker itself takes it there is nothing to checkpoint: that it was told to end is no failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # Imported here: torch and numba take seconds that other commands need not wait for.
    from stream.worker import run_worker

    configure_logging()
    run_worker(settings_of(options), options.broker_timeout)
    return 0
