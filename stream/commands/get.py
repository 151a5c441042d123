"""The sub-command `livestate get`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from stream.commands.asking import ask, worker_address
from stream.commands.common import add_json, add_settings, print_json, settings_of
from stream.errors import UnknownClientError

__all__ = ["register"]


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `get`."""
    parser = commands.add_parser(
        "get",
        help="read clients' live embeddings and predictions",
        description="Asks any worker. Clients that are known are printed; where one is not, it ends with code 8.",
        epilog="example: livestate get 1228 900 --json",
    )
    add_settings(parser)
    parser.add_argument("client_ids", nargs="+", metavar="CLIENT_ID", help="up to 1,000")
    parser.add_argument("--worker", metavar="URL", help="any worker's address (default: from the settings)")
    add_json(parser, "the whole answer, one JSON object for each client")
    parser.set_defaults(run=_get)


def _get(options: argparse.Namespace) -> int:
    settings = settings_of(options)
    base = options.worker or worker_address(settings.worker)
    answer = json.loads(ask(settings.worker, base, "/v1/clients:batchGet", {"client_ids": options.client_ids}))
    for view in answer["clients"]:
        print_json(view) if options.json else print(_described(view))
    if answer["missing"]:
        raise UnknownClientError("no state of " + ", ".join(f"client {client_id!r}" for client_id in answer["missing"]))
    return 0


def _described(view: dict[str, Any]) -> str:
    vector = view["vector"]
    lines = [
        f"client {view['client_id']}: {view['events_seen']} events",
        f"last event: {view['timestamp_ms']} ms UTC, {view['age_s']:,.0f} s ago, offset {view['offset']}",
        f"parameters: version {view['parameter_version']}",
        f"vector ({len(vector)}): " + " ".join(f"{x:+.3f}" for x in vector[:8]) + (" …" if len(vector) > 8 else ""),
    ]
    return "\n".join(lines + [f"{task}: {value:.4f}" for task, value in sorted(view["predictions"].items())])
