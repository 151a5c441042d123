"""The sub-commands `livestate versions` and `livestate rollback`, which ask the trainer that runs."""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from typing import Any

from stream.commands.asking import local_address
from stream.commands.common import add_json, add_settings, print_json, settings_of
from stream.errors import BrokerError, ParametersError

__all__ = ["register"]

_TIMEOUT_S = 90.0


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both commands."""
    versions = subparsers.add_parser(
        "versions",
        help="list the parameter versions that can be gone back to",
        description="Lists the versions that the running trainer keeps, oldest first: when each was made, how many "
        "labels were in it, and the loss of predictions before they were answered. Recent versions lie close, "
        "older ones further and further apart.",
        epilog="example: livestate versions --json",
    )
    add_settings(versions)
    _add_trainer(versions)
    add_json(versions, "one JSON object for each version")
    versions.set_defaults(run=_versions)
    rollback = subparsers.add_parser(
        "rollback",
        help="go back to an earlier parameter version",
        description="The running trainer publishes a version that equals an earlier one, and learns on from there: "
        "what it learned since is forgotten. It answers to its own machine alone.",
        epilog="example: livestate rollback 1200",
    )
    add_settings(rollback)
    rollback.add_argument("version", type=int, metavar="VERSION", help="one that `livestate versions` lists")
    _add_trainer(rollback)
    rollback.set_defaults(run=_rollback)


def _add_trainer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trainer", metavar="URL", help="the trainer's address (default: from the settings)")


def _versions(options: argparse.Namespace) -> int:
    versions = _ask(options, "/v1/versions")["versions"]
    if options.json:
        for one in versions:
            print_json(one)
        return 0
    for one in versions:
        print(_described(one))
    if not versions:
        print("no version is kept yet")
    return 0


def _described(one: dict[str, Any]) -> str:
    tasks = [
        f"{task}: {labels:,} labels" + (f", loss {one['loss'][task]:.4f}" if one["loss"][task] is not None else "")
        for task, labels in one["labels"].items()
    ]
    equals = [f"equals version {one['equals']}"] if one["equals"] is not None else []
    about = [f"epoch {one['epoch']}", f"made {one['created_ms']} ms UTC", f"trunk {one['trunk']}", *tasks, *equals]
    return f"version {one['version']}: " + "; ".join(about)


def _rollback(options: argparse.Namespace) -> int:
    answer = _ask(options, "/v1/rollback", {"version": options.version})
    print(f"version {answer['published']} equals version {answer['version']} and is served from now on")
    return 0


def _ask(options: argparse.Namespace, path: str, question: dict[str, Any] | None = None) -> dict[str, Any]:
    """The trainer's answer to a GET, or with a question to a POST of it as JSON.

    Raises
    ------
    ParametersError: it says why it does not do that.
    BrokerError: nobody answers.
    """
    trainer = settings_of(options).trainer
    base = options.trainer or local_address("http", trainer.http_host, trainer.http_port)
    try:
        body = None if question is None else json.dumps(question).encode()
        request = urllib.request.Request(f"{base.rstrip('/')}{path}", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        text = error.read(10_000).decode("utf-8", "replace")
        try:
            detail = str(json.loads(text)["detail"])
        except (ValueError, KeyError, TypeError):
            detail = f"{base} answered {error.code}: {text.strip()}"
        raise ParametersError(detail) from error
    except (urllib.error.URLError, TimeoutError, ValueError, OSError) as error:
        raise BrokerError(
            f"no trainer answers at {base}: {error}; is it running? give its address with --trainer"
        ) from error
