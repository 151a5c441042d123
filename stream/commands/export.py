"""The sub-commands `livestate export` and `livestate import`."""

from __future__ import annotations

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

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
from stream.errors import DataError, SettingsError

__all__ = ["register"]


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `export` and `import`."""
    _add_export(commands)
    _add_import(commands)


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "export",
        help="write all clients' embeddings to Parquet, or a backup of rows, embeddings and parameters",
        description="Reads a system that runs, beside it. With --out: every client's latest embedding, with its "
        "prediction where the last event asked for one. With --backup: all that workers restore from, for "
        "`livestate import`. With --data-dir: the rows in a stopped worker's database, one file a partition.",
        epilog="example: livestate export --out clients.parquet --settings bank.toml",
    )
    add_settings(parser)
    parser.add_argument("--out", metavar="PATH", help="Parquet file to write; with --data-dir a directory")
    parser.add_argument("--backup", metavar="DIR", help="write a backup to this new directory instead")
    parser.add_argument("--data-dir", metavar="DIR", help="worker.data_dir of a worker that is stopped")
    add_broker_timeout(parser, 15.0)
    add_progress(parser)
    add_json(parser, "what was written as one JSON object")
    parser.set_defaults(run=_export)


def _add_import(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "import",
        help="bring a backup into an empty system",
        description="Writes a backup of `livestate export --backup` into new topics (`livestate topics --create`), "
        "before any worker or trainer is started; workers then restore from it. Nothing is written unless every file "
        "is whole and fits.",
        epilog="example: livestate import backup-2026-01-31 --settings bank.toml",
    )
    parser.add_argument("backup", metavar="DIR", help="directory of the backup")
    add_settings(parser)
    parser.add_argument(
        "--events", choices=("same", "new"), default="same",
        help="same: the events topic is the backup's, and workers go on at its positions (this is verified); new: all "
        "of its events came after the backup (%(default)s)",
    )  # fmt: skip
    add_broker_timeout(parser, 15.0)
    add_progress(parser)
    add_json(parser, "what was read as one JSON object")
    parser.set_defaults(run=_import)


def _export(options: argparse.Namespace) -> int:
    configure_logging()
    settings = settings_of(options)
    if (options.out is None) == (options.backup is None) or (options.data_dir and options.backup):
        raise SettingsError("expected either --out PATH, with or without --data-dir DIR, or --backup DIR")

    # Imported here: what they need takes longer than wrong arguments should wait.
    from stream.backup import write_backup
    from stream.export import export_embeddings, export_rows
    from stream.kafka import wait_until_reachable

    began, line = time.monotonic(), ProgressLine(options.progress)
    if options.data_dir is not None:
        files = export_rows(settings, Path(options.data_dir), Path(options.out))
        done = {"files": files, "rows": sum(files.values())}
        text = f"{done['rows']:,} rows written to {len(files)} files in {options.out}"
    elif options.backup is not None:
        wait_until_reachable(settings, options.broker_timeout)
        manifest = write_backup(settings, Path(options.backup), line.show)
        done = manifest | {"directory": options.backup}
        text = f"{_described(manifest)} written to {options.backup}"
    else:
        wait_until_reachable(settings, options.broker_timeout)
        found = export_embeddings(settings, Path(options.out), line.show)
        done = {"file": options.out, "clients": found.rows, "refused": found.refused}
        text = f"{found.rows:,} clients written to {options.out}"
        if found.refused:
            print(f"{found.refused:,} records of {settings.topics.embeddings!r} are no embeddings", file=sys.stderr)
    line.end()
    if options.json:
        print_json(done | {"seconds": round(time.monotonic() - began, 3)})
    else:
        print(text)
    return 0


def _import(options: argparse.Namespace) -> int:
    configure_logging()
    settings = settings_of(options)
    if not Path(options.backup).is_dir():
        raise DataError(f"{options.backup!r} is no directory: expected one of `livestate export --backup`")
    from stream.backup import restore_backup
    from stream.kafka import ensure_topics, wait_until_reachable
    from stream.model.layout import Layout
    from stream.wire import Schema

    began, line = time.monotonic(), ProgressLine(options.progress)
    wait_until_reachable(settings, options.broker_timeout)
    ensure_topics(settings, create=False)
    layout = Layout.compile(settings, Schema.compile(settings)).fingerprint
    manifest = restore_backup(settings, Path(options.backup), options.events, layout, line.show)
    line.end()
    if options.json:
        print_json(manifest | {"events": options.events, "seconds": round(time.monotonic() - began, 3)})
    else:
        print(f"{_described(manifest)} are in the system; start the workers")
    return 0


def _described(manifest: dict[str, object]) -> str:
    files = manifest["files"]
    assert isinstance(files, dict)
    rows = sum(size["records"] for name, size in files.items() if name.startswith("changelog-"))
    created_ms = manifest["created_ms"]
    assert isinstance(created_ms, int)
    made = datetime.fromtimestamp(created_ms / 1000, UTC).isoformat(timespec="seconds")
    return f"{rows:,} rows and parameter version {manifest['parameter_version']}, as of {made},"
