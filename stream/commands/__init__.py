"""The sub-commands of `livestate` that a serving system needs; the trainer adds its own."""

from __future__ import annotations

import argparse

from stream.commands import doctor, export, get, publish, topics, worker

__all__ = ["register"]


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add them."""
    for module in (worker, topics, get, publish, export, doctor):
        module.register(commands)
