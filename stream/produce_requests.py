"""The two requests of a producer of whole record batches, as aiokafka's connections send them.

aiokafka's own ProduceRequest copies its batches some eight times while it encodes them, and its InitProducerId is
version 0, which not every broker answers. Source of the layouts: Kafka's protocol guide.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.produce import ProduceRequest_v7, ProduceResponse_v7
from aiokafka.protocol.transaction import InitProducerIdRequest_v0
from aiokafka.protocol.types import CompactString, Int16, Int32, Int64, Schema, TaggedFields

__all__ = ["InitProducerId", "ProduceBatches"]

_ALL_IN_SYNC: Final = -1
_NONE: Final = -1
#: No transaction is ever begun, but a broker wants to know how long one might take.
_TRANSACTION_MS: Final = 60_000


class _InitProducerIdResponse(Response):  # type: ignore[misc]
    API_KEY = 22
    API_VERSION = 4
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("error_code", Int16),
        ("producer_id", Int64),
        ("producer_epoch", Int16),
        ("tags", TaggedFields),
    )


class _InitProducerIdStruct(RequestStruct):  # type: ignore[misc]
    API_KEY = 22
    API_VERSION = 4
    RESPONSE_TYPE = _InitProducerIdResponse
    FLEXIBLE_VERSION = True
    SCHEMA = Schema(
        ("transactional_id", CompactString("utf-8")),
        ("transaction_timeout_ms", Int32),
        ("producer_id", Int64),
        ("producer_epoch", Int16),
        ("tags", TaggedFields),
    )


class InitProducerId(Request[InitProducerIdRequest_v0 | _InitProducerIdStruct]):  # type: ignore[misc]
    """Asks the coordinator of a transactional id for its producer id, under a new epoch.

    Version 4, or 0 of brokers before Kafka 2.7.

    Parameters
    ----------
    transactional_id: whoever asks for it later is the only one that may still write.
    """

    API_KEY = 22

    def __init__(self, transactional_id: str) -> None:
        self._transactional_id = transactional_id

    def build(self, request_struct_class: Any) -> Any:
        """The request in the version that the broker takes."""
        if request_struct_class.API_VERSION == 0:
            return request_struct_class(self._transactional_id, _TRANSACTION_MS)
        return request_struct_class(self._transactional_id, _TRANSACTION_MS, _NONE, _NONE, {})


class _ProduceStruct(RequestStruct):  # type: ignore[misc]
    API_KEY = 0
    API_VERSION = 7
    RESPONSE_TYPE = ProduceResponse_v7
    SCHEMA = ProduceRequest_v7.SCHEMA

    def __init__(self, parts: Sequence[bytes]) -> None:
        self._parts = parts

    def encode(self) -> bytes:
        """The request's body; each batch is copied once."""
        return b"".join(self._parts)

    def __repr__(self) -> str:
        return f"Produce({sum(map(len, self._parts))} bytes)"


class ProduceBatches(Request[_ProduceStruct]):  # type: ignore[misc]
    """Sealed record batches, at most one of each partition of one topic, to be confirmed by all in-sync replicas.

    Version 7: Kafka 2.1 and later, the first that takes every codec.
    """

    API_KEY = 0

    def __init__(self, topic: str, batches: Sequence[tuple[int, bytes]], timeout_ms: int) -> None:
        name = topic.encode()
        # No transactional id (length -1), acks, timeout, one topic.
        head = struct.pack(f">hhiih{len(name)}si", -1, _ALL_IN_SYNC, timeout_ms, 1, len(name), name, len(batches))
        self._parts = [head]
        for partition, batch in batches:
            self._parts += (struct.pack(">ii", partition, len(batch)), batch)

    def build(self, request_struct_class: Any) -> Any:
        """The request in the one version there is."""
        return request_struct_class(self._parts)
