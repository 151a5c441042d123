"""A broker that is away does not fill the log."""

from __future__ import annotations

import logging
from typing import Any

from stream.seldom import Seldom


def written(seldom: Seldom, name: str, at: float, text: str, *args: Any, level: int = logging.ERROR) -> str | None:
    """The line as it is written, None if it is not."""
    record = logging.LogRecord(name, level, __file__, 1, text, args, None)
    record.created = at
    return record.getMessage() if seldom.filter(record) else None


def test_lines_of_one_kind_are_written_once_in_an_interval_and_counted() -> None:
    seldom = Seldom(30.0)
    # Given a client that cannot connect, now to one broker and now to another
    text = "Unable connect to node with id %s: %s"
    lines = [written(seldom, "aiokafka", 1000.0 + i, text, i % 2, "refused") for i in range(31)]
    # Then the first line is written, and the next one after the interval tells of those between
    assert lines[0] == "Unable connect to node with id 0: refused"
    assert lines[1:30] == [None] * 29
    assert lines[30] == "Unable connect to node with id 0: refused (29 more like it before)"
    assert written(seldom, "aiokafka", 1031.0, text, 1, "refused") is None


def test_lines_of_another_kind_are_written() -> None:
    seldom = Seldom(30.0)
    text = "%s [%s] %s"
    assert written(seldom, "stream.kafka", 0.0, text, "FAIL", "rdkafka#consumer-1", "Connect failed") is not None
    assert written(seldom, "stream.kafka", 0.1, text, "FAIL", "rdkafka#producer-2", "Connect failed") is None
    # Another event of librdkafka, another level, and another part of aiokafka
    assert written(seldom, "stream.kafka", 0.1, text, "GETPID", "rdkafka#producer-2", "no id") is not None
    assert written(seldom, "stream.kafka", 0.1, text, "FAIL", "rdkafka#producer-2", "…", level=10) is not None
    assert written(seldom, "aiokafka.conn", 0.1, "closed") is not None


def test_livestates_own_lines_are_all_written() -> None:
    seldom = Seldom(30.0)
    for number in range(3):
        assert written(seldom, "stream.ownership", 0.0, "partition %d restored", number) is not None
