"""Embeddings: what Livestate publishes about a client after each micro-batch.

A record is a MessagePack map: `client_id` (text), `timestamp_ms`, `offset`, `parameter_version`,
`events_seen` (integers), `vector` (binary, float32 little-endian), `predictions` (map from task, or
`task.class` for each class of a multiclass task, to float32).
Any MessagePack library reads it. A task without a prediction is left out of the map. As JSON, where the settings
ask for it, the names are the same and `vector` is a list of numbers.

Guarantees: vectors and predictions arrive bit for bit, as JSON too. Not checked when encoding: that keys are UTF-8, as
the ids of accepted events are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from stream.borrowing import read_only
from stream.store.keys import PackedKeys
from stream.wire import checks
from stream.wire.embedding_kernel import encode_embeddings, record_bound
from stream.wire.formats import MAX_MEMBERS, Format, read_map
from stream.wire.reasons import WRONG_TYPE, refusal
from stream.wire.values import PackedValues

__all__ = ["Embedding", "EmbeddingEncoder", "decode_embedding"]

_REQUIRED: Final = (
    "client_id",
    "timestamp_ms",
    "offset",
    "parameter_version",
    "events_seen",
    "vector",
    "predictions",
)
_RECORD_BYTES: Final = 64 * 1024 * 1024
_FLOAT32: Final = np.dtype("<f4")


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """One client's embedding.

    timestamp_ms: of the last event in it, UTC milliseconds; offset: that event's, so that duplicates can be
        dropped.
    parameter_version: of the parameters it was made with. events_seen: how many events it holds.
    vector: float32[width]. predictions: by task; a task without one is not there.
    """

    client_id: str
    timestamp_ms: int
    offset: int
    parameter_version: int
    events_seen: int
    vector: NDArray[np.float32]
    predictions: dict[str, float]


class EmbeddingEncoder:
    """Encodes embeddings of one width and one set of tasks, a batch at a time.

    JSON costs some twenty times as much as MessagePack.

    Raises
    ------
    ValueError: a width below 0, or more tasks than one record holds.
    """

    def __init__(self, vector_width: int, task_names: Sequence[str], written_as: Format = "msgpack") -> None:
        if vector_width < 0:
            raise ValueError(f"vector_width = {vector_width}: expected 0 or more")
        if len(task_names) > MAX_MEMBERS or len(set(task_names)) != len(task_names):
            raise ValueError(f"task_names has {len(task_names)} names: expected at most {MAX_MEMBERS}, each once")
        self._written_as = written_as
        self._width = vector_width
        self._tasks = len(task_names)
        names = [msgspec.msgpack.encode(name) for name in task_names]
        self._names = read_only(np.frombuffer(b"".join(names), dtype=np.uint8), np.uint8)
        self._name_offsets = read_only(np.cumsum([0, *map(len, names)]), np.int64)
        self._bound = record_bound(vector_width, len(self._names), self._tasks)

    def encode(
        self,
        keys: PackedKeys,
        timestamp_ms: ArrayLike,
        offset: ArrayLike,
        parameter_version: ArrayLike,
        events_seen: ArrayLike,
        vectors: NDArray[np.float32],
        predictions: NDArray[np.float32],
    ) -> PackedValues:
        """One record for every key.

        Parameters
        ----------
        keys: n client ids, UTF-8.
        timestamp_ms, offset, events_seen: int64[n]. parameter_version: int64[n] or one integer.
        vectors: float32[n, vector_width]. predictions: float32[n, tasks]; NaN leaves a task out.

        Raises
        ------
        ValueError: an array of another shape.
        """
        n = len(keys)
        vectors = np.ascontiguousarray(vectors, _FLOAT32)
        scores = np.ascontiguousarray(predictions, np.float32)
        for name, array, width in (("vectors", vectors, self._width), ("predictions", scores, self._tasks)):
            if array.shape != (n, width):
                raise ValueError(f"{name} has shape {array.shape}: expected {(n, width)}")
        moments, positions, versions, counts = (
            _integers(name, column, n)
            for name, column in (
                ("timestamp_ms", timestamp_ms),
                ("offset", offset),
                ("parameter_version", parameter_version),
                ("events_seen", events_seen),
            )
        )
        key_bytes = int(keys.offsets[-1] - keys.offsets[0])
        out = np.empty(n * self._bound + key_bytes, dtype=np.uint8)
        starts = np.empty(n + 1, dtype=np.int64)
        encode_embeddings(
            read_only(keys.buffer, np.uint8),
            read_only(keys.offsets, np.int64),
            moments,
            positions,
            versions,
            counts,
            read_only(vectors.reshape(-1).view(np.uint8), np.uint8),
            4 * self._width,
            scores.view(np.uint32),
            self._names,
            self._name_offsets,
            out,
            starts,
        )
        records = PackedValues(out, starts)
        return records if self._written_as == "msgpack" else PackedValues.from_list([*map(_as_json, records)])


def _as_json(record: bytes) -> bytes:
    content = msgspec.msgpack.decode(record)
    # float32 to float64 is exact, and JSON keeps every digit of a float64.
    content["vector"] = np.frombuffer(content["vector"], dtype="<f4").astype(np.float64).tolist()
    return msgspec.json.encode(content)


def _integers(name: str, column: ArrayLike, n: int) -> NDArray[Any]:
    array = np.asarray(column, dtype=np.int64)
    if array.shape != (n,) and not (name == "parameter_version" and array.shape == ()):
        raise ValueError(f"{name} has shape {array.shape}: expected {(n,)}")
    # One for all is an array of one.
    return read_only(array)


def decode_embedding(value: bytes) -> Embedding:
    """The embedding in one record's value, MessagePack or JSON.

    Raises
    ------
    RecordError: with one of `REASONS`; never anything else, whatever the bytes.
    """
    # A MessagePack map never begins with the byte of "{".
    written_as: Format = "json" if value[:1] == b"{" else "msgpack"
    content = read_map(value, written_as, _RECORD_BYTES)
    checks.keys(content, _REQUIRED, ())
    vector = _vector(content["vector"], written_as)
    predictions: dict[str, float] = {}
    for task, prediction in checks.mapping("predictions", content["predictions"]).items():
        if not isinstance(prediction, float):
            raise refusal(WRONG_TYPE, "predictions", prediction, "a float for every task")
        predictions[task] = prediction
    client_id = content["client_id"]
    if not isinstance(client_id, str):
        raise refusal(WRONG_TYPE, "client_id", client_id, "text")
    return Embedding(
        client_id=client_id,
        timestamp_ms=_integer("timestamp_ms", content),
        offset=_integer("offset", content),
        parameter_version=_integer("parameter_version", content),
        events_seen=_integer("events_seen", content),
        vector=vector,
        predictions=predictions,
    )


def _vector(vector: Any, written_as: Format) -> NDArray[np.float32]:
    if written_as == "json":
        if not isinstance(vector, list) or not all(isinstance(x, float) for x in vector):
            raise refusal(WRONG_TYPE, "vector", vector, "a list of floats")
        return np.array(vector, dtype=np.float32)
    if not isinstance(vector, bytes) or len(vector) % 4:
        raise refusal(WRONG_TYPE, "vector", vector, "binary of 4 bytes a number, float32 little-endian")
    return np.frombuffer(vector, dtype="<f4").astype(np.float32, copy=False)


def _integer(name: str, content: dict[str, Any]) -> int:
    value = content[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise refusal(WRONG_TYPE, name, value, "an integer")
    return value
