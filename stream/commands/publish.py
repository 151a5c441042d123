"""The sub-command `livestate publish`: tables of events or feedback onto their topic."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stream.commands.common import (
    ProgressLine,
    add_broker_timeout,
    add_json,
    add_progress,
    add_settings,
    configure_logging,
    print_json,
    settings_of,
)
from stream.errors import BrokerError, DataError, LivestateError, RecordError, SettingsError

if TYPE_CHECKING:
    from stream.publishing import Chunk, RowFile, RowMapping, Sender
    from stream.publishing.sender import Checked, Checker

__all__ = ["register"]

_CHUNK_ROWS = 2_048
#: Bad rows that are named; the others are counted.
_NAMED = 20
_INTERRUPTED = 130


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `publish`."""
    parser = commands.add_parser(
        "publish",
        help="publish events or feedback from Parquet, CSV or JSON lines",
        description="Each row is checked as a worker (the trainer) would before it is sent; the first bad one ends the "
        "command with code 7, its file, row and reason, unless --skip-bad. Rows are numbered from 1. A file is never "
        "held whole. When it ends early it says with which --from-row to go on.",
        epilog="example: livestate publish payments.parquet --settings bank.toml --modality payment "
        "--map client_id=customer,timestamp_ms=booked_at,amount=value",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="in order; - is standard input, JSON lines")
    add_settings(parser)
    parser.add_argument("--feedback", action="store_true", help="rows are feedback, not events")
    parser.add_argument("--format", choices=("parquet", "csv", "jsonl"), help="of the files (default: by their ending)")
    parser.add_argument("--delimiter", metavar="C", help="of CSV files (default: a comma; of .tsv files a tab)")
    parser.add_argument(
        "--map", action="append", default=[], metavar="TARGET=COLUMN,…",
        help="which column is what: client_id, timestamp_ms, modality, event_id and the names of fields; of feedback "
        "client_id, timestamp_ms, as_of_ms, task, label, weight, window_end_ms. What is not named here is taken from "
        "the column of its own name",
    )  # fmt: skip
    parser.add_argument("--modality", metavar="NAME", help="of every event (default: a column of that name)")
    parser.add_argument("--task", metavar="NAME", help="of all feedback (default: a column of that name)")
    parser.add_argument(
        "--times", choices=("auto", "iso", "s", "ms"), default="auto",
        help="how moments are written: ISO 8601 text (UTC where it names no offset), epoch seconds or milliseconds; "
        "auto tells text from milliseconds and refuses what might be seconds",
    )  # fmt: skip
    parser.add_argument("--topic", metavar="NAME", help="another topic than the settings'")
    parser.add_argument("--rate", type=float, metavar="N", help="rows a second at most")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad rows out, name the first, count all")
    parser.add_argument("--from-row", type=int, default=1, metavar="N", help="of the first file (%(default)s)")
    parser.add_argument("--check", action="store_true", help="read and check everything, send nothing")
    add_broker_timeout(parser)
    add_progress(parser)
    add_json(parser, "what was done as one JSON object")
    parser.set_defaults(run=_run)


@dataclass
class _Summary:
    """What was done."""

    topic: str
    rows: int = 0
    sent: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    #: file and row to go on with
    stopped: tuple[str, int] | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "topic": self.topic,
            "rows": self.rows,
            "sent": self.sent,
            "bad": dict(self.bad),
            "seconds": round(self.seconds, 3),
            "rows_per_second": round(self.rows / max(self.seconds, 1e-9)),
            "go_on_with": None if self.stopped is None else {"file": self.stopped[0], "from_row": self.stopped[1]},
        }

    def __str__(self) -> str:
        left_out = f", {self.bad.total():,} bad rows left out" if self.bad else ""
        return f"{self.sent:,} of {self.rows:,} rows sent to {self.topic!r} in {self.seconds:.1f} s{left_out}"


class _BadRow(DataError):
    pass


def _run(options: argparse.Namespace) -> int:
    configure_logging()
    settings = settings_of(options)
    kind = "feedback" if options.feedback else "events"
    if options.rate is not None and not options.rate > 0:
        raise SettingsError(f"--rate {options.rate:g}: expected a number above 0")
    if options.from_row < 1:
        raise SettingsError(f"--from-row {options.from_row}: expected 1 or more")
    if options.modality is not None and options.feedback:
        raise SettingsError(f"--modality {options.modality!r}: feedback has none; say --task")
    if options.task is not None and not options.feedback:
        raise SettingsError(f"--task {options.task!r}: events have none; say --feedback, or --modality")

    # Imported here: numba takes seconds that a wrong argument need not wait for.
    from stream.publishing import RowFile, RowMapping
    from stream.publishing.sender import Checker

    columns = _columns(options.map)
    with contextlib.ExitStack() as opened, _Interrupts() as interrupts:
        inputs = []
        for path in options.files:
            file = RowFile(path, options.format, delimiter=options.delimiter, line_bytes=settings.limits.record_bytes)
            opened.callback(file.close)
            constant = options.task if options.feedback else options.modality
            mapping = RowMapping(settings, kind, file, columns, constant, options.times)
            unused = mapping.unused()
            if unused:
                print(f"{file.shown}: columns that nothing takes: {', '.join(unused)}", file=sys.stderr)
            inputs.append((file, mapping))
        publication = _Publication(options, settings, Checker(settings, kind), interrupts)
        publication.topic = options.topic or getattr(settings.topics, kind)
        return publication.run(inputs)


def _columns(given: list[str]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for entry in ",".join(given).split(",") if given else ():
        target, is_pair, column = entry.partition("=")
        if not (is_pair and target and column):
            raise SettingsError(f"--map {entry!r}: expected TARGET=COLUMN, such as amount=value")
        if target in columns:
            raise SettingsError(f"--map {entry!r}: {target} is mapped already, to {columns[target]!r}")
        columns[target] = column
    return columns


class _Publication:
    """One run of the command."""

    topic: str

    def __init__(self, options: argparse.Namespace, settings: Any, checker: Checker, interrupts: _Interrupts) -> None:
        self._options = options
        self._settings = settings
        self._checker = checker
        self._interrupts = interrupts
        self._line = ProgressLine(options.progress)
        self._sender: Sender | None = None
        #: the file being read, and the first of its rows that is not handed over
        self._file: RowFile | None = None
        self._next_row = options.from_row

    def run(self, inputs: list[tuple[RowFile, RowMapping]]) -> int:
        """Publish all files, one after the other; returns the exit code."""
        from stream.publishing import Sender

        options, summary = self._options, _Summary(self.topic)
        began = time.monotonic()
        problem: LivestateError | None = None
        try:
            for i, (file, mapping) in enumerate(inputs):
                self._file, self._next_row = file, options.from_row if i == 0 else 1
                if not options.check:
                    self._sender = Sender(self._settings, self.topic, self._next_row, options.broker_timeout)
                self._send_file(file, mapping, summary, began)
                if self._sender is not None:
                    self._sender.finish()
                if self._interrupts.came:
                    break
        except LivestateError as error:
            problem = error
        self._line.end()
        summary.seconds = time.monotonic() - began
        code = 0
        if problem is not None or self._interrupts.came:
            code = _INTERRUPTED if problem is None else problem.exit_code
            self._explain(problem, summary)
        if options.json:
            print_json(summary.as_json())
        elif options.check:
            print(f"{summary.rows - summary.bad.total():,} of {summary.rows:,} rows are good; nothing was sent")
        else:
            print(summary)
        return code

    def _send_file(self, file: RowFile, mapping: RowMapping, summary: _Summary, began: float) -> None:
        options = self._options
        size = _CHUNK_ROWS if options.rate is None else max(1, min(_CHUNK_ROWS, int(options.rate / 10)))
        for chunk in file.chunks(size, self._next_row):
            if self._interrupts.came:
                return
            self._pace(summary.rows, began)
            now_ms = int(time.time() * 1000)
            checked = self._checker.check(mapping.records(chunk), now_ms)
            self._send(file, chunk, checked, now_ms, summary)
            passed = (
                f"{file.shown}: {self._next_row - 1:,} rows, {summary.rows / (time.monotonic() - began):,.0f} a second"
            )
            self._line.show(file.share(self._next_row - 1), passed)

    def _send(self, file: RowFile, chunk: Chunk, checked: Checked, now_ms: int, summary: _Summary) -> None:
        errors = checked.errors
        until = chunk.n if self._options.skip_bad else min(errors, default=chunk.n)
        good = range(until) if not errors else [i for i in range(until) if i not in errors]
        keys, values = ([part[i] for i in good] for part in (checked.keys, checked.values))
        if self._sender is not None:
            self._sender.send(keys, values, now_ms, chunk.first + until - 1)
            summary.sent += len(keys)
        summary.rows += until
        self._next_row = chunk.first + until
        for i in sorted(errors) if errors else ():
            error = errors[i]
            if not self._options.skip_bad:
                raise _BadRow(_named(file, chunk.first + i, error))
            if summary.bad.total() < _NAMED:
                self._line.end()
                print(_named(file, chunk.first + i, error), file=sys.stderr)
            summary.bad[error.reason] += 1

    def _pace(self, rows: int, began: float) -> None:
        rate = self._options.rate
        while rate is not None and not self._interrupts.came:
            ahead = rows / rate - (time.monotonic() - began)
            if ahead <= 0:
                return
            wait = min(ahead, 0.1)
            if self._sender is not None:
                self._sender.poll(wait)
            else:
                time.sleep(wait)

    def _explain(self, problem: LivestateError | None, summary: _Summary) -> None:
        """What went wrong, and how to go on."""
        file, sender, row = self._file, self._sender, self._next_row
        text = "interrupted" if problem is None else str(problem)
        if sender is not None and not isinstance(problem, BrokerError):
            try:
                sender.finish()
            except BrokerError as error:
                text = f"{text}; {error}"
        if file is not None and sender is not None:
            doubtful = row - 1 - sender.confirmed
            row = sender.confirmed + 1
            text += f"\nrows of {file.shown} to {row - 1:,} are sent; go on with --from-row {row}"
            if doubtful:
                text += f" (of the {doubtful:,} rows after them some may be on the topic already, and would be twice)"
        if file is not None:
            summary.stopped = (file.path, row)
        print(f"livestate publish: {text}", file=sys.stderr)


def _named(file: RowFile, row: int, error: RecordError) -> str:
    return f"{file.shown} row {row}: {error.reason}: {error}"


class _Interrupts:
    """Takes note of SIGINT and SIGTERM, so that what was handed over is still confirmed."""

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> _Interrupts:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        if self.came:
            # Twice: at once.
            raise KeyboardInterrupt
        self.came = True
