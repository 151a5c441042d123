"""Records on topics: schemas, decoding, validation, encoding.

Events come in as blocks of one partition and leave as columns (`RecordBlock`, `EventDecoder`,
`EventColumns`); embeddings go out a batch at a time (`EmbeddingEncoder`); feedback and dead letters are
handled one by one.

Guarantees: no bytes from a topic make a decoder raise anything but `RecordError`, or, for events, anything
at all; every refusal carries one of `REASONS`. Not decided here: what becomes of a refused record.
"""

from __future__ import annotations

from stream.wire.block import Headers, RecordBlock
from stream.wire.dead_letters import dead_letter_headers
from stream.wire.embeddings import Embedding, EmbeddingEncoder, decode_embedding
from stream.wire.events import (
    EventColumns,
    EventDecoder,
    FieldValue,
    Rejected,
    encode_event,
    encode_event_json,
)
from stream.wire.feedback import FeedbackRecord, Label, decode_feedback, encode_feedback
from stream.wire.formats import Format
from stream.wire.hashing import hash_bytes
from stream.wire.reasons import REASONS
from stream.wire.schema import FieldSchema, ModalitySchema, Schema
from stream.wire.values import PackedValues

__all__ = [
    "REASONS",
    "Embedding",
    "EmbeddingEncoder",
    "EventColumns",
    "EventDecoder",
    "FeedbackRecord",
    "FieldSchema",
    "FieldValue",
    "Format",
    "Headers",
    "Label",
    "ModalitySchema",
    "PackedValues",
    "RecordBlock",
    "Rejected",
    "Schema",
    "dead_letter_headers",
    "decode_embedding",
    "decode_feedback",
    "encode_event",
    "encode_event_json",
    "encode_feedback",
    "hash_bytes",
]
