"""Headers of a dead letter: why a record was refused and where it came from.

The record itself (key, value, its own headers) goes to the dead-letter topic as received; these headers are
added to its own.
"""

from __future__ import annotations

__all__ = ["dead_letter_headers"]


def dead_letter_headers(reason: str, detail: str, topic: str, partition: int, offset: int) -> list[tuple[str, bytes]]:
    """Headers to add: reason and detail of the refusal; topic, partition and offset of the refused record."""
    return [
        ("livestate-reason", reason.encode("utf-8", "backslashreplace")),
        ("livestate-detail", detail.encode("utf-8", "backslashreplace")),
        ("livestate-topic", topic.encode("utf-8", "backslashreplace")),
        ("livestate-partition", str(partition).encode("ascii")),
        ("livestate-offset", str(offset).encode("ascii")),
    ]
