"""The sub-command `livestate report`."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from stream.commands.common import ProgressLine, add_json, add_progress, add_settings, as_json, print_json, settings_of
from stream.errors import DataError, LivestateError, SettingsError
from stream.settings import Settings

__all__ = ["register", "write_report"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `report`."""
    parser = subparsers.add_parser(
        "report",
        help="how good the predictions were, from a trainer's record: figures and pictures",
        description="Compares the predictions as they were served with a head that stopped learning at the split and "
        "with one fitted anew again and again: AUC, log loss and calibration over time, reliability, and what each "
        "group of the row's memory contributes. Writes report.json and three pictures for each task.",
        epilog="example: livestate report answered.bin --settings bank.toml --out report",
    )
    parser.add_argument("record", metavar="RECORD", help="file of `livestate trainer --record`")
    add_settings(parser)
    parser.add_argument("--out", default="report", metavar="DIR", help="directory to write to (%(default)s)")
    parser.add_argument("--task", metavar="NAME", help="only this one (default: all that are in the record)")
    parser.add_argument("--split", metavar="DATE", help="compare from this day on (default: the middle of the record)")
    parser.add_argument(
        "--group-examples", type=int, default=20_000, metavar="N",
        help="measure groups on clients drawn at random with so many examples (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of intervals and draws (%(default)s)")
    add_progress(parser)
    add_json(parser, "the figures as one JSON object too")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    settings = settings_of(options)
    split_ms = None if options.split is None else _day(options.split)
    if options.group_examples < 1:
        raise SettingsError(f"--group-examples {options.group_examples}: expected 1 or more")
    if options.task is not None and options.task not in settings.tasks:
        raise SettingsError(f"--task {options.task!r}: expected one of {', '.join(settings.tasks)}")
    line = ProgressLine(options.progress)
    figures = write_report(
        settings, Path(options.record), Path(options.out), task=options.task, split_ms=split_ms,
        most_for_groups=options.group_examples, seed=options.seed, line=line,
    )  # fmt: skip
    line.end()
    if options.json:
        print_json(figures)
        return 0
    for task, report in figures["tasks"].items():
        print(
            f"{task}: {report['evaluated']:,} predictions after the split, {report['evaluated_positives']:,} came true"
        )
        for name, row in report["rows"].items():
            print(
                f"  {name:<20} AUC {row['auc']:.4f} ({row['auc_low']:.4f} to {row['auc_high']:.4f})  "
                f"log loss {row['log_loss']:.4f}  calibration error {row['calibration_error']:.4f}"
            )
        for group in report["groups"][:5]:
            print(
                f"  without {group['name']:<18} {100 * group['loss']:+.2f} AUC points lost "
                f"({100 * group['low']:+.2f} to {100 * group['high']:+.2f})"
            )
    print(f"written to {options.out}: report.json, {', '.join(figures['pictures'])}")
    return 0


def write_report(
    settings: Settings,
    record: Path,
    directory: Path,
    *,
    task: str | None = None,
    split_ms: int | None = None,
    most_for_groups: int = 20_000,
    seed: int = 0,
    line: ProgressLine,
) -> dict[str, Any]:
    """Measure and draw the tasks of a record file; `report.json` and pictures go to a directory, the figures back.

    Raises
    ------
    DataError: the record cannot be read, is of other settings, or has too little to compare.
    LivestateError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise LivestateError("pictures need matplotlib: pip install 'livestate[demo]'")
    # Imported here: torch, numba and matplotlib take seconds that wrong arguments need not wait for.
    from trainer.record import read_record
    from trainer.report.drawing import draw
    from trainer.report.figures import report_on

    examples = read_record(record)
    binary = [name for name, one in settings.tasks.items() if one.kind == "binary"]
    tasks = [name for name in binary if name in examples and task in (None, name)]
    if not tasks:
        found = ", ".join(examples) or "nothing"
        raise DataError(
            f"record {str(record)!r} has no example of {task or 'any task of these settings'} that is binary, only "
            f"{found}"
        )
    figures: dict[str, Any] = {"record": str(record), "tasks": {}, "pictures": []}
    for name in tasks:
        report = report_on(
            settings, name, examples[name], split_ms=split_ms, most_for_groups=most_for_groups,
            generator=np.random.default_rng(seed), progress=line.show,
        )  # fmt: skip
        try:
            pictures = draw(report, directory)
        except OSError as error:
            raise DataError(f"{str(directory)!r} cannot be written: {error.strerror}") from error
        figures["tasks"][name] = report.as_json() | {"pictures": {what: str(path) for what, path in pictures.items()}}
        figures["pictures"] += [path.name for path in pictures.values()]
    with (directory / "report.json").open("w") as file:
        file.write(as_json(figures) + "\n")
    return figures


def _day(text: str) -> int:
    try:
        return int(datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp() * 1000)
    except ValueError as error:
        raise SettingsError(f"--split {text!r}: expected a day such as 2017-07-01") from error
