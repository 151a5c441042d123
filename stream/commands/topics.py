"""The sub-command `livestate topics`."""

from __future__ import annotations

import argparse

from stream.commands.common import add_broker_timeout, add_json, add_settings, print_json, settings_of

__all__ = ["register"]


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `topics`."""
    parser = commands.add_parser(
        "topics",
        help="check the topics, or create them",
        description="Ends with code 3 where a topic is missing or has the wrong shape.",
        epilog="example: livestate topics --settings shop.toml --create",
    )
    add_settings(parser)
    add_broker_timeout(parser, 15.0)
    parser.add_argument("--create", action="store_true", help="create the missing ones")
    add_json(parser, "one JSON list, a map for each topic")
    parser.set_defaults(run=_topics)


def _topics(options: argparse.Namespace) -> int:
    from stream.kafka import ensure_topics, topic_plans, wait_until_reachable

    settings = settings_of(options)
    wait_until_reachable(settings, options.broker_timeout)
    created = ensure_topics(settings, create=options.create)
    found = [
        {
            "role": plan.role,
            "name": plan.name,
            "partitions": plan.partitions,
            "cleanup_policy": plan.config["cleanup.policy"],
            "created": plan.name in created,
        }
        for plan in topic_plans(settings)
    ]
    if options.json:
        print_json(found)
        return 0
    for one in found:
        state = "created" if one["created"] else "there"
        print(f"{one['name']}\t{one['partitions']} partitions\t{one['cleanup_policy']}\t{state}")
    return 0
