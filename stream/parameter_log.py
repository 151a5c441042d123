"""The parameters topic: versions as the trainer writes them and as readers put them together.

A version is one Kafka transaction: a record for each tensor that changed, under the tensor's name, a null for
each one removed, and last a marker under `version`. The marker lists every tensor of the version with the
version it was last written in and the checksum of that record. So one rule covers the live stream, a late start
on a compacted log, duplicates and records of aborted transactions: a version is complete exactly when every
tensor its marker lists is there with that checksum; anything else is never served.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgpack
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from stream.errors import BrokerError, ParametersError
from stream.kafka import client_config
from stream.model.parameters import ParameterSet, Tensor, decode_tensor, tensor_checksum
from stream.settings import Settings

__all__ = ["MARKER_KEY", "Marker", "ParameterReader", "VersionAssembler", "decode_marker", "encode_marker"]

logger = logging.getLogger(__name__)

MARKER_KEY = b"version"
#: Writings of one tensor kept at once: a broker that shows aborted transactions can put a few between two versions.
_CANDIDATES = 4


@dataclass(frozen=True)
class Marker:
    """The closing record of a version.

    `tensors`: name to (version it was last written in, checksum of that record). `feedback_ms`: when the feedback
    that is new in this version was published, UTC milliseconds.
    """

    epoch: int
    version: int
    previous: int
    tensors: dict[str, tuple[int, int]]
    feedback_ms: tuple[int, ...]
    created_ms: int


def encode_marker(marker: Marker) -> bytes:
    """MessagePack map with the marker's names."""
    packed: bytes = msgpack.packb(
        {
            "epoch": marker.epoch,
            "version": marker.version,
            "previous": marker.previous,
            "tensors": {name: list(entry) for name, entry in marker.tensors.items()},
            "feedback_ms": list(marker.feedback_ms),
            "created_ms": marker.created_ms,
        }
    )
    return packed


def decode_marker(record: bytes) -> Marker:
    """Raises ParametersError when the record is not a marker."""
    try:
        value = msgpack.unpackb(record)
        return Marker(
            epoch=int(value["epoch"]),
            version=int(value["version"]),
            previous=int(value["previous"]),
            tensors={str(name): (int(v), int(c)) for name, (v, c) in value["tensors"].items()},
            feedback_ms=tuple(int(t) for t in value["feedback_ms"]),
            created_ms=int(value["created_ms"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, msgpack.UnpackException) as error:
        raise ParametersError(f"a version marker cannot be read: {error}") from error


class VersionAssembler:
    """Turns records of the parameters topic, in order, into whole versions.

    `torn` counts markers whose tensors were not all there.
    """

    def __init__(self) -> None:
        self._written: dict[str, deque[tuple[int, int, Tensor]]] = {}
        self.current: ParameterSet | None = None
        self.marker: Marker | None = None
        self.torn = 0

    def feed(self, key: bytes | None, value: bytes | None) -> ParameterSet | None:
        """Take one record; returns the version it completes, if it completes a later one.

        Raises
        ------
        ParametersError: the record is neither tensor nor marker; the assembler is unchanged.
        """
        if key == MARKER_KEY and value is not None:
            return self._close(decode_marker(value))
        if value is not None:
            name, version, tensor = decode_tensor(value)
            kept = self._written.setdefault(name, deque(maxlen=_CANDIDATES))
            kept.append((version, tensor_checksum(value), tensor))
        return None

    def _close(self, marker: Marker) -> ParameterSet | None:
        if self.marker is not None and marker.version <= self.marker.version:
            return None
        tensors: dict[str, Tensor] = {}
        for name, (version, checksum) in marker.tensors.items():
            for written, summed, tensor in self._written.get(name, ()):
                if written == version and summed == checksum:
                    tensors[name] = tensor
        if len(tensors) != len(marker.tensors):
            self.torn += 1
            missing = sorted(set(marker.tensors) - set(tensors))
            logger.warning("version %d is not complete, waiting for a later one: %s", marker.version, missing)
            return None
        self.marker = marker
        self.current = ParameterSet(tensors, marker.version)
        for name in set(self._written) - set(tensors):
            del self._written[name]
        return self.current


class ParameterReader(threading.Thread):
    """Follows the parameters topic on a thread of its own and stages the latest whole version.

    `staged` is replaced in one assignment, so a reader of it never sees half a version.

    Parameters
    ----------
    on_version: called on this thread with each version and its marker, after it is staged.
    """

    def __init__(self, settings: Settings, on_version: Callable[[ParameterSet, Marker], None] | None = None) -> None:
        super().__init__(name="parameters", daemon=True)
        self._settings = settings
        self._on_version = on_version
        self._stopping = threading.Event()
        self._caught_up = threading.Event()
        self._assembler = VersionAssembler()
        self.staged: tuple[ParameterSet, Marker] | None = None
        self.error: BaseException | None = None

    @property
    def torn(self) -> int:
        """Versions that were not complete when their marker came."""
        return self._assembler.torn

    @property
    def has_caught_up(self) -> bool:
        """Whether everything that was in the topic at the start has been read."""
        return self._caught_up.is_set()

    def wait_until_caught_up(self, timeout_s: float) -> bool:
        """True once everything that was in the topic at the start has been read."""
        return self._caught_up.wait(timeout_s)

    def stop(self) -> None:
        """Stop the thread and wait for it."""
        self._stopping.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        """Read until stopped; an unexpected error is kept in `error`."""
        try:
            self._follow()
        except BaseException as error:
            self.error = error
            logger.exception("reading parameters failed")

    def _follow(self) -> None:
        topic = self._settings.topics.parameters
        consumer = Consumer(
            client_config(
                self._settings,
                group_id=f"{self._settings.kafka.group}-parameters",
                enable_auto_commit=False,
                isolation_level="read_committed",
                auto_offset_reset="earliest",
                enable_partition_eof=True,
                fetch_wait_max_ms=20,
                fetch_message_max_bytes=64 * 1024 * 1024,
            )
        )
        try:
            consumer.assign([TopicPartition(topic, 0, 0)])
            while not self._stopping.is_set():
                for message in consumer.consume(500, timeout=0.05):
                    error = message.error()
                    if error is None:
                        self._take(message.key(), message.value())
                    elif error.code() == KafkaError._PARTITION_EOF:
                        self._caught_up.set()
                    elif error.fatal():
                        raise BrokerError(f"topic {topic!r} cannot be read: {error.str()}")
                    else:
                        logger.warning("topic %s: %s", topic, error.str())
        except KafkaException as error:
            raise BrokerError(f"topic {topic!r} cannot be read: {error.args[0].str()}") from error
        finally:
            consumer.close()

    def _take(self, key: bytes | None, value: bytes | None) -> None:
        try:
            complete = self._assembler.feed(key, value)
        except ParametersError as error:
            logger.warning("topic %s: %s", self._settings.topics.parameters, error)
            return
        marker = self._assembler.marker
        if complete is not None and marker is not None:
            self.staged = (complete, marker)
            if self._on_version is not None:
                self._on_version(complete, marker)
