"""The `livestate` command.

Exit codes: 0 done; 1 failed; 2 wrong settings or arguments; 3 broker; 4 fenced; 5 store; 6 parameters; 7 data;
130 interrupted. Other packages add commands through the entry point group `livestate.commands`: a function that
takes argparse's subparsers.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from stream.errors import BrokerError, DataError, LivestateError, SettingsError
from stream.settings import Settings, Worker, load

__all__ = ["add_settings", "configure_logging", "main", "settings_of"]

EXAMPLE = Path(__file__).parent / "examples" / "shop.toml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="livestate", description="A learned embedding of every client, current to the last event."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _register(commands)
    for entry in sorted(entry_points(group="livestate.commands"), key=lambda e: e.name):
        entry.load()(commands)
    options = parser.parse_args(arguments)
    try:
        code = options.run(options)
        return int(code or 0)
    except LivestateError as error:
        print(f"livestate {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add `--settings`, which every command that talks to the system takes."""
    parser.add_argument(
        "--settings", metavar="FILE", default=str(EXAMPLE), help="settings file (default: the shop example)"
    )


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings a command was given, with the environment over them."""
    return load(options.settings)


def configure_logging(level: int = logging.INFO) -> None:
    """One line for each record on standard error; libraries only from warnings up."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    for name in ("stream", "trainer"):
        logging.getLogger(name).setLevel(level)
    # Faust reports each rebalance of a healthy group as a warning or error of its recovery service.
    logging.getLogger("faust.tables.recovery").setLevel(logging.ERROR)


def _register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    worker = commands.add_parser(
        "worker",
        help="run a serving worker",
        epilog="example: livestate worker --settings shop.toml",
    )
    add_settings(worker)
    worker.add_argument(
        "--broker-timeout", type=float, default=30.0, metavar="S", help="wait so long for the broker (%(default)s)"
    )
    worker.set_defaults(run=_worker)

    topics = commands.add_parser(
        "topics",
        help="check the topics, or create them",
        epilog="example: livestate topics --settings shop.toml --create",
    )
    add_settings(topics)
    topics.add_argument("--create", action="store_true", help="create the missing ones")
    topics.set_defaults(run=_topics)

    get = commands.add_parser(
        "get", help="read clients' live embeddings and predictions", epilog="example: livestate get 1228 900 --json"
    )
    add_settings(get)
    get.add_argument("client_ids", nargs="+", metavar="CLIENT_ID", help="up to 1,000")
    get.add_argument("--worker", metavar="URL", help="any worker's address (default: from the settings)")
    get.add_argument("--json", action="store_true", help="print the whole answer, one JSON object for each client")
    get.set_defaults(run=_get)


def _worker(options: argparse.Namespace) -> int:
    # Imported here: torch and numba take seconds that other commands need not wait for.
    from stream.worker import run_worker

    configure_logging()
    run_worker(settings_of(options), options.broker_timeout)
    return 0


def _topics(options: argparse.Namespace) -> int:
    from stream.kafka import ensure_topics, topic_plans, wait_until_reachable

    settings = settings_of(options)
    wait_until_reachable(settings, timeout_s=15.0)
    created = ensure_topics(settings, create=options.create)
    for plan in topic_plans(settings):
        state = "created" if plan.name in created else "there"
        print(f"{plan.name}\t{plan.partitions} partitions\t{plan.config['cleanup.policy']}\t{state}")
    return 0


def _get(options: argparse.Namespace) -> int:
    settings = settings_of(options)
    answer = _ask_worker(settings.worker, options.worker, {"client_ids": options.client_ids})
    for view in answer["clients"]:
        print(json.dumps(view) if options.json else _described(view))
    if answer["missing"]:
        raise DataError("no state of " + ", ".join(f"client {client_id!r}" for client_id in answer["missing"]))
    return 0


def _ask_worker(worker: Worker, address: str | None, question: dict[str, Any]) -> dict[str, Any]:
    from stream.security import http_client_tls, http_token

    base = address or worker.http_advertise or _address(worker)
    headers = {"Content-Type": "application/json"}
    token = http_token(worker)
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    url = f"{base.rstrip('/')}/v1/clients:batchGet"
    try:
        request = urllib.request.Request(url, json.dumps(question).encode(), headers)
        with urllib.request.urlopen(request, timeout=30, context=http_client_tls(worker)) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise SettingsError(
                f"{base} asks for another token than worker.http_token_file = {worker.http_token_file!r} holds"
            ) from error
        raise BrokerError(f"{url} answered {error.code}: {_detail(error)}") from error
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        raise BrokerError(
            f"no worker answers at {base}: {error}; is it running? give its address with --worker"
        ) from error


def _address(worker: Worker) -> str:
    host = "127.0.0.1" if worker.http_host in ("0.0.0.0", "::", "") else worker.http_host
    scheme = "http" if worker.http_certificate_file is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{worker.http_port}"


def _detail(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["detail"])
    except (ValueError, KeyError, TypeError):
        return error.reason


def _described(view: dict[str, Any]) -> str:
    vector = view["vector"]
    lines = [
        f"client {view['client_id']}: {view['events_seen']} events",
        f"last event: {view['timestamp_ms']} ms UTC, {view['age_s']:,.0f} s ago, offset {view['offset']}",
        f"parameters: version {view['parameter_version']}",
        f"vector ({len(vector)}): " + " ".join(f"{x:+.3f}" for x in vector[:8]) + (" …" if len(vector) > 8 else ""),
    ]
    return "\n".join(lines + [f"{task}: {value:.4f}" for task, value in sorted(view["predictions"].items())])


if __name__ == "__main__":
    sys.exit(main())
