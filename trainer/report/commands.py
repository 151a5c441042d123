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

#: Of the groups that contribute most; all are in the files.
_GROUPS_SHOWN = 5


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `report`."""
    parser = subparsers.add_parser(
        "report",
        help="how good the predictions were, from a trainer's record: figures and pictures",
        description="Compares the predictions as they were served with those of the same head, had it stopped "
        "learning at the split, and with a model fitted anew again and again: AUC and log loss (of numbers: R² and "
        "squared error) and calibration over time, reliability, and what each group of the row's memory contributes. "
        "Writes report.json and three pictures for each task.",
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
        _print_task(task, report)
    for task, reason in figures["not_reported"].items():
        print(f"{task}: not reported: {reason}")
    print(f"written to {options.out}: report.json, {', '.join(figures['pictures'])}")
    return 0


def _print_task(task: str, report: dict[str, Any]) -> None:
    chief, name = ("r2", "R²") if report["kind"] == "regression" else ("auc", "AUC")
    outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in report["evaluated_outcomes"].items())
    head = " + ".join(report["head"])
    print(f"{task} ({report['kind']}, {head}): {report['evaluated']:,} predictions after the split: {outcomes}")
    width = max(map(len, report["rows"]))
    for row_name, row in report["rows"].items():
        others = "squared error {squared_error:.4g}" if chief == "r2" else "log loss {log_loss:.4f}"
        low, high = row[f"{chief}_low"], row[f"{chief}_high"]
        print(
            f"  {row_name:<{width}}  {name} {row[chief]:.4f} ({low:.4f} to {high:.4f})  "
            f"{others.format(**row)}  calibration error {row['calibration_error']:.4g}"
        )
        for one, of_class in row.get("by_class", {}).items():
            figures = f"AUC {of_class['auc']:.4f}  calibration error {of_class['calibration_error']:.4g}"
            print(f"    {one:<{width - 2}}  {figures}")
    live = report["rows"]["live"]
    print(f"  live above frozen: {_points(live['gain'], live['gain_low'], live['gain_high'], name)}")
    if report["left_out"]:
        print(f"  the rows below live do without {report['left_out']}")
    print(f"  what groups of inputs contribute, on {report['group_examples']:,} examples, by {report['group_head']}:")
    groups = report["groups"][:_GROUPS_SHOWN]
    width = max((len(group["name"]) for group in groups), default=0)
    for group in groups:
        print(f"    without {group['name']:<{width}}  {_points(-group['loss'], -group['high'], -group['low'], name)}")


def _points(value: float, low: float, high: float, name: str) -> str:
    return f"{100 * value:+.2f} {name} points ({100 * low:+.2f} to {100 * high:+.2f})"


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
    DataError: the record cannot be read, or each of its tasks is of other settings, or has too little to compare. Where
        only some are, `not_reported` says why.
    LivestateError: matplotlib is not installed, or LightGBM where a task needs it.
    """
    if find_spec("matplotlib") is None:
        raise LivestateError("pictures need matplotlib: pip install 'livestate[demo]'")
    heads = {part for name, one in settings.tasks.items() if task in (None, name) for part in one.parts}
    if "mlp" in heads and find_spec("lightgbm") is None:
        raise LivestateError("a head 'mlp' is compared with LightGBM: pip install 'livestate[demo]'")
    # Imported here: torch, numba and matplotlib take seconds that wrong arguments need not wait for.
    from trainer.record import read_record
    from trainer.report.drawing import draw
    from trainer.report.figures import report_on

    examples = read_record(record)
    tasks = [name for name in settings.tasks if name in examples and task in (None, name)]
    if not tasks:
        found = ", ".join(examples) or "nothing"
        raise DataError(
            f"record {str(record)!r} has no example of {task or 'any task of these settings'}, only {found}"
        )
    figures: dict[str, Any] = {"record": str(record), "tasks": {}, "not_reported": {}, "pictures": []}
    failed: dict[str, DataError] = {}
    for name in tasks:
        try:
            report = report_on(
                settings, name, examples[name], split_ms=split_ms, most_for_groups=most_for_groups,
                generator=np.random.default_rng(seed), progress=line.show,
            )  # fmt: skip
        except DataError as error:
            failed[name] = error
            continue
        try:
            pictures = draw(report, directory)
        except OSError as error:
            raise DataError(f"{str(directory)!r} cannot be written: {error.strerror}") from error
        figures["tasks"][name] = report.as_json() | {"pictures": {what: str(path) for what, path in pictures.items()}}
        figures["pictures"] += [path.name for path in pictures.values()]
    if len(failed) == len(tasks):
        raise DataError("; ".join(map(str, failed.values())))
    figures["not_reported"] = {name: str(error) for name, error in failed.items()}
    with (directory / "report.json").open("w") as file:
        file.write(as_json(figures) + "\n")
    return figures


def _day(text: str) -> int:
    try:
        return int(datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp() * 1000)
    except ValueError as error:
        raise SettingsError(f"--split {text!r}: expected a day such as 2017-07-01") from error
