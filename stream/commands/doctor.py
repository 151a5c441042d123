"""The sub-command `livestate doctor`."""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict

from stream.commands.common import (
    add_broker_timeout,
    add_json,
    add_settings,
    configure_logging,
    print_json,
    settings_of,
)
from stream.errors import SettingsError

__all__ = ["register"]


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `doctor`."""
    parser = commands.add_parser(
        "doctor",
        help="check settings, broker, topics, disks, versions, clock and health, and say what to do",
        description="Changes nothing. Each check is ok, a warning, or failed, with what to do. Ends with code 1 where "
        "one has failed.",
        epilog="example: livestate doctor --settings bank.toml --clients 5000000",
    )
    add_settings(parser)
    parser.add_argument(
        "--clients", type=int, metavar="N",
        help="clients to estimate the disk for (default: store.max_rows in all partitions, or those there are)",
    )  # fmt: skip
    parser.add_argument("--worker", metavar="URL", help="any worker's address (default: from the settings)")
    parser.add_argument("--trainer", metavar="URL", help="the trainer's address (default: from the settings)")
    add_broker_timeout(parser, 10.0)
    add_json(parser, "one JSON list, a map for each check")
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    configure_logging(logging.ERROR)
    settings = settings_of(options)
    if options.clients is not None and options.clients < 1:
        raise SettingsError(f"--clients {options.clients}: expected 1 or more")
    from stream.doctor import Doctor

    doctor = Doctor(
        settings,
        broker_timeout_s=options.broker_timeout,
        clients=options.clients,
        worker=options.worker,
        trainer=options.trainer,
    )
    findings = []
    for finding in doctor.findings():
        findings.append(finding)
        if not options.json:
            print(f"{finding.state:<7}  {finding.check}: {finding.detail}", flush=True)
            if finding.advice:
                print(f"{'':<9}{finding.advice}", flush=True)
    if options.json:
        print_json([asdict(finding) for finding in findings])
    return 1 if any(finding.state == "failed" for finding in findings) else 0
