"""The sub-commands `livestate trainer`, `livestate rebuild`, `livestate pretrain`, `versions` and `rollback`."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import structs

from stream.commands.common import (
    ProgressLine,
    add_json,
    add_progress,
    add_settings,
    configure_logging,
    print_json,
    settings_of,
)
from stream.errors import SettingsError
from trainer import version_commands
from trainer.report import commands as report

if TYPE_CHECKING:
    from stream.wire import RecordBlock
    from trainer.service import TrainerService

__all__ = ["register"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the trainer's commands; each sets `run`, which takes the parsed arguments and returns a status."""
    _add_trainer(subparsers)
    _add_rebuild(subparsers)
    _add_pretrain(subparsers)
    report.register(subparsers)
    version_commands.register(subparsers)


def _add_trainer(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "trainer",
        help="learn from events and delayed feedback, publish parameter versions",
        description="Learns online from events and feedback and publishes parameter versions to the workers. "
        "SIGTERM and SIGINT publish what changed, write a checkpoint and end the process.",
        epilog="example: livestate trainer --settings shop.toml --trunk trunk.msgpack",
    )
    add_settings(parser)
    parser.add_argument(
        "--trunk", metavar="FILE", help="trunk to start with, from `livestate pretrain`; a checkpoint goes first"
    )
    parser.add_argument("--record", metavar="FILE", help="append every answered example to this file")
    parser.add_argument(
        "--broker-timeout", type=float, default=30.0, metavar="S", help="wait so long for the broker (%(default)s)"
    )
    parser.set_defaults(run=_trainer)


def _add_rebuild(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "rebuild",
        help="bring a new trunk in: learn beside the running trainer, then take over from it",
        description="Reads all events and feedback under another trunk, beside the trainer that runs. When it has "
        "caught up it takes over: the other trainer ends when it next wants to publish, and this one goes on in its "
        "place. Each worker then "
        "recomputes its states from the events, beside its live traffic, and switches each partition at one offset.",
        epilog="example: livestate rebuild --settings shop.toml --trunk next.msgpack",
    )
    add_settings(parser)
    parser.add_argument("--trunk", metavar="FILE", required=True, help="the new trunk, from `livestate pretrain`")
    parser.add_argument(
        "--data-dir", metavar="DIR", help="its database (default: trainer.data_dir, a dash and the trunk's id)"
    )
    parser.add_argument("--http-port", type=int, default=0, metavar="PORT", help="0 takes a free one (%(default)s)")
    parser.add_argument(
        "--broker-timeout", type=float, default=30.0, metavar="S", help="wait so long for the broker (%(default)s)"
    )
    parser.set_defaults(run=_rebuild)


def _add_pretrain(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "pretrain",
        help="train a trunk on past events",
        description="Trains the trunk (encoder and recurrent cell) to foresee each client's next event, and what "
        "became of the predictions that were asked for.",
        epilog="example: livestate pretrain --settings shop.toml --events january.jsonl --out trunk.msgpack",
    )
    add_settings(parser)
    parser.add_argument(
        "--events", required=True, nargs="+", metavar="FILE", help="events in order, one JSON map a line"
    )
    parser.add_argument(
        "--feedback", default=[], nargs="+", metavar="FILE", help="labels to train on as well, one JSON map a line"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="parameter file to write")
    add_progress(parser)
    add_json(parser, "what was learned as one JSON object")
    parser.set_defaults(run=_pretrain)


def _trainer(arguments: argparse.Namespace) -> int:
    # Imported here: torch and numba take seconds that other commands need not wait for.
    import torch

    from trainer.files import load_parameters
    from trainer.service import TrainerService

    configure_logging()
    # One thread: the trainer's products are small, and the order of their sums must not depend on the
    # machine.
    torch.set_num_threads(1)
    settings = settings_of(arguments)
    parameters = load_parameters(arguments.trunk) if arguments.trunk else None
    _run(TrainerService(settings, parameters, Path(arguments.record) if arguments.record else None), arguments)
    return 0


def _rebuild(arguments: argparse.Namespace) -> int:
    import torch

    from trainer.files import load_parameters
    from trainer.service import TrainerService

    configure_logging()
    torch.set_num_threads(1)
    settings = settings_of(arguments)
    parameters = load_parameters(arguments.trunk)
    directory = arguments.data_dir or f"{settings.trainer.data_dir.rstrip('/')}-{parameters.trunk_id}"
    if Path(directory).resolve() == Path(settings.trainer.data_dir).resolve():
        raise SettingsError(f"--data-dir {directory!r}: expected another directory than trainer.data_dir")
    trainer = structs.replace(settings.trainer, data_dir=directory, http_port=arguments.http_port)
    print(f"trunk {parameters.trunk_id} is learned in {directory}; from then on trainer.data_dir has to name it")
    _run(TrainerService(structs.replace(settings, trainer=trainer), parameters, takes_over=True), arguments)
    return 0


def _run(service: TrainerService, arguments: argparse.Namespace) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.stop())
    service.run(arguments.broker_timeout)


def _pretrain(arguments: argparse.Namespace) -> int:
    from trainer.files import read_feedback_file, save_parameters
    from trainer.pretrain import fit

    configure_logging()
    settings = settings_of(arguments)

    line = ProgressLine(arguments.progress)
    feedback = (one for path in arguments.feedback for one in read_feedback_file(path, settings))
    result = fit(settings, _events(arguments.events), line.show, feedback)
    save_parameters(arguments.out, result.parameters)
    line.end()
    if arguments.json:
        figures = {"events": result.events, "loss": result.loss, "baseline": result.baseline}
        print_json({"trunk": result.parameters.trunk_id, "file": arguments.out, **figures})
        return 0
    print(
        f"trunk {result.parameters.trunk_id} written to {arguments.out}: {result.events:,} events, loss "
        f"{result.loss:.4f}, the best constant {result.baseline:.4f}"
    )
    return 0


def _events(paths: list[str]) -> Iterator[RecordBlock]:
    from trainer.files import read_event_file

    offset = 0
    for path in paths:
        for block in read_event_file(path, offset):
            offset += len(block)
            yield block
