"""Examples as the joiner keeps them: under which keys, and as which bytes.

A key is partition (4 bytes), task, 0, time (8 bytes), client: in order of time within a partition and task.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import msgpack
import numpy as np
from numpy.typing import NDArray

from stream.wire import Label

__all__ = [
    "ANSWERED",
    "ASSUMED",
    "EXAMPLE",
    "WAITING",
    "Answer",
    "Example",
    "Joined",
    "as_of_ms",
    "key_of",
    "pack_answered",
    "pack_example",
    "pack_joined",
    "partition_of",
    "prefix_of",
    "stratum_of",
    "task_of",
    "unpack_answered",
    "unpack_example",
    "unpack_joined",
]

#: Before the keys of predictions, in the database.
EXAMPLE = b"e"
#: States of a prediction: unanswered; unanswered and learned as negative; answered. The first two are followed by the
#: example, the last by `pack_answered`.
WAITING, ASSUMED, ANSWERED = b"w", b"n", b"a"
#: Prediction, version, stratum, how many other predictions follow, and then how many bytes of keys.
_HEAD = struct.Struct("<fqHHI")


@dataclass(frozen=True)
class Example:
    """One prediction as it was made.

    `inputs` (F,) of the head; `prediction`, the first of its predictions, NaN where there was no head yet; `version` of
    the parameters that made it; `stratum`, the index of its value of the task's `final_by`; `others`, what else was
    said: of the other classes, then of each part of the head; `keys`, of the rows that its event used, one for each of
    the task's tables.
    """

    task: str
    client_id: bytes
    as_of_ms: int
    inputs: NDArray[np.float32]
    prediction: float
    version: int
    stratum: int = 0
    others: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    keys: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Joined:
    """An example and its label.

    `known_ms`: when the label became known; `final_ms`: when it could be learned, as the task's `labels` say;
    `published_ms`: Kafka's time of the feedback record, or of the event that released it; `early`: final before its
    window closed.
    """

    example: Example
    label: Label
    weight: float
    known_ms: int
    published_ms: int
    final_ms: int
    early: bool = False


@dataclass(frozen=True)
class Answer:
    """One feedback record; `published_ms` is Kafka's time of it."""

    label: Label
    weight: float
    known_ms: int
    published_ms: int
    window_end_ms: int | None

    def to(self, example: Example) -> Joined:
        """The example with this label, final when it is known."""
        return Joined(example, self.label, self.weight, self.known_ms, self.published_ms, self.known_ms)


def prefix_of(partition: int, task: str) -> bytes:
    """What all keys of a partition and task begin with."""
    return struct.pack(">I", partition) + task.encode() + b"\0"


def key_of(partition: int, task: str, as_of_ms: int, client: bytes) -> bytes:
    """The key of one prediction."""
    return prefix_of(partition, task) + struct.pack(">q", as_of_ms) + client


def partition_of(key: bytes) -> int:
    """The partition in a key."""
    partition: int = struct.unpack_from(">I", key)[0]
    return partition


def task_of(key: bytes) -> str:
    """The task in a key."""
    return key[4 : key.index(b"\0", 4)].decode()


def as_of_ms(key: bytes) -> int:
    """The time in a key."""
    found: int = struct.unpack_from(">q", key, key.index(b"\0", 4) + 1)[0]
    return found


def _client_of(key: bytes) -> bytes:
    return key[key.index(b"\0", 4) + 9 :]


def pack_example(example: Example) -> bytes:
    """An example without what its key says."""
    keys: bytes = msgpack.packb(example.keys) if example.keys else b""
    head = _HEAD.pack(example.prediction, example.version, example.stratum, len(example.others), len(keys))
    return head + example.others.tobytes() + keys + example.inputs.tobytes()


def unpack_example(key: bytes, value: bytes) -> Example:
    """The example of `pack_example` under its key."""
    prediction, version, stratum, count, key_bytes = _HEAD.unpack_from(value)
    others = np.frombuffer(value, np.float32, count, _HEAD.size)
    at = _HEAD.size + others.nbytes
    keys = tuple(msgpack.unpackb(value[at : at + key_bytes])) if key_bytes else ()
    # The floats may begin anywhere among the bytes.
    inputs = np.frombuffer(value[at + key_bytes :], np.float32)
    return Example(task_of(key), _client_of(key), as_of_ms(key), inputs, prediction, version, stratum, others, keys)


def stratum_of(value: bytes) -> int:
    """The stratum in what `pack_example` wrote."""
    stratum: int = _HEAD.unpack_from(value)[2]
    return stratum


def pack_answered(label: Label, stratum: int | None = None) -> bytes:
    """What is kept of an answered prediction: its label, and its stratum while that is held and may come of age."""
    packed: bytes = msgpack.packb([label] if stratum is None else [label, stratum])
    return ANSWERED + packed


def unpack_answered(value: bytes) -> tuple[Label, int | None]:
    """(label, stratum or None) of `pack_answered`."""
    label, *stratum = msgpack.unpackb(value[1:])
    return label, stratum[0] if stratum else None


def pack_joined(joined: Joined) -> bytes:
    """An answered example without what its key says."""
    packed: bytes = msgpack.packb(
        [
            joined.label, joined.weight, joined.known_ms, joined.published_ms, joined.final_ms,
            pack_example(joined.example),
        ]
    )  # fmt: skip
    return packed


def unpack_joined(key: bytes, value: bytes) -> Joined:
    """The answered example of `pack_joined` under its key."""
    label, weight, known_ms, published_ms, final_ms, example = msgpack.unpackb(value)
    return Joined(unpack_example(key, example), label, weight, known_ms, published_ms, final_ms)
