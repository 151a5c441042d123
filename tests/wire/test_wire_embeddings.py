"""Embeddings: one kernel writes them, any MessagePack library reads them."""

from __future__ import annotations

import json
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.errors import RecordError
from stream.store.keys import PackedKeys
from stream.wire import EmbeddingEncoder, decode_embedding


def encode(encoder: EmbeddingEncoder, n: int, vectors: Any, predictions: Any, **changes: Any) -> list[bytes]:
    given: dict[str, Any] = {
        "timestamp_ms": np.arange(n),
        "offset": np.arange(n) + 10,
        "parameter_version": 7,
        "events_seen": np.arange(n) + 1,
    }
    given.update(changes)
    keys = given.pop("keys", None) or PackedKeys.from_list([f"client-{i}".encode() for i in range(n)])
    return encoder.encode(keys, vectors=vectors, predictions=predictions, **given)


def test_given_predictions_of_any_bits_then_all_but_nan_are_there() -> None:
    bits = np.array([0x7F800000, 0xFF800000, 0x7F800001, 0xFFC00001, 0x7FFFFFFF, 0x80000000, 0x7F7FFFFF], np.uint32)
    predictions = bits.view(np.float32).reshape(1, -1)
    tasks = [f"task-{i}" for i in range(len(bits))]

    record = encode(EmbeddingEncoder(0, tasks), 1, np.empty((1, 0), np.float32), predictions)[0]

    largest = float(np.finfo(np.float32).max)
    expected = {"task-0": np.inf, "task-1": -np.inf, "task-5": 0.0, "task-6": largest}
    assert msgpack.unpackb(record)["predictions"] == expected


def test_given_a_version_for_each_client_then_each_record_has_its_own() -> None:
    versions = np.array([3, 1, 2])

    records = encode(
        EmbeddingEncoder(0, []),
        3,
        np.empty((3, 0), np.float32),
        np.empty((3, 0), np.float32),
        parameter_version=versions,
    )

    assert [msgpack.unpackb(record)["parameter_version"] for record in records] == [3, 1, 2]


def test_given_two_clients_then_each_record_is_a_plain_map() -> None:
    vectors = np.array([[1.5, -2.0], [0.1, 3e38]], dtype=np.float32)
    predictions = np.array([[0.25, np.nan], [np.nan, np.nan]], dtype=np.float32)

    records = encode(EmbeddingEncoder(2, ["churn", "redeemed"]), 2, vectors, predictions)

    assert [msgpack.unpackb(record) for record in records] == [
        {
            "client_id": "client-0",
            "timestamp_ms": 0,
            "offset": 10,
            "parameter_version": 7,
            "events_seen": 1,
            "vector": vectors[0].astype("<f4").tobytes(),
            "predictions": {"churn": 0.25},
        },
        {
            "client_id": "client-1",
            "timestamp_ms": 1,
            "offset": 11,
            "parameter_version": 7,
            "events_seen": 2,
            "vector": vectors[1].astype("<f4").tobytes(),
            "predictions": {},
        },
    ]


integers = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**63 - 1, -1, -(2**63)]),
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_given_any_batch_when_decoded_then_everything_is_as_it_was(data: Any) -> None:
    n = data.draw(st.integers(0, 5))
    width = data.draw(st.sampled_from([0, 1, 3, 63, 64, 65, 16_384]))
    tasks = [f"task_{'x' * data.draw(st.integers(0, 40))}_{i}" for i in range(data.draw(st.integers(0, 18)))]
    ids = [data.draw(st.text(min_size=1, max_size=300)) for _ in range(n)]
    columns = {
        name: np.array([data.draw(integers) for _ in range(n)], dtype=np.int64)
        for name in ("timestamp_ms", "offset", "parameter_version", "events_seen")
    }
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    vectors = rng.integers(0, 2**32, (n, width), dtype=np.uint32).view(np.float32)
    predictions = rng.random((n, len(tasks)), dtype=np.float32)
    predictions[rng.random(predictions.shape) < 0.3] = np.nan
    keys = PackedKeys.from_list([text.encode() for text in ids])

    records = encode(EmbeddingEncoder(width, tasks), n, vectors, predictions, keys=keys if n else None, **columns)

    assert len(records) == n
    for row, record in enumerate(records):
        embedding = decode_embedding(record)
        assert embedding.client_id == ids[row]
        for name, column in columns.items():
            assert getattr(embedding, name) == column[row]
        assert embedding.vector.dtype == np.float32
        assert embedding.vector.tobytes() == vectors[row].tobytes()
        expected = {task: float(p) for task, p in zip(tasks, predictions[row], strict=True) if not np.isnan(p)}
        assert embedding.predictions == expected


def test_given_a_slice_of_keys_and_strided_columns_then_rows_still_match() -> None:
    keys = PackedKeys.from_list([b"aa", b"b", b"cccc"])
    part = PackedKeys(keys.buffer, keys.offsets[1:])
    vectors = np.arange(8, dtype=np.float32).reshape(2, 4)[:, ::2]

    records = encode(
        EmbeddingEncoder(2, []), 2, vectors, np.empty((2, 0), np.float32), keys=part, offset=np.arange(4)[::2]
    )

    decoded = [decode_embedding(record) for record in records]
    assert [embedding.client_id for embedding in decoded] == ["b", "cccc"]
    assert [embedding.vector.tolist() for embedding in decoded] == [[0.0, 2.0], [4.0, 6.0]]
    assert [embedding.offset for embedding in decoded] == [0, 2]


def test_arrays_of_another_shape_are_refused() -> None:
    encoder = EmbeddingEncoder(2, ["a"])
    vectors, predictions = np.zeros((3, 2), np.float32), np.zeros((3, 1), np.float32)

    with pytest.raises(ValueError, match=r"vectors has shape \(3, 3\): expected \(3, 2\)"):
        encode(encoder, 3, np.zeros((3, 3), np.float32), predictions)
    with pytest.raises(ValueError, match="predictions has shape"):
        encode(encoder, 3, vectors, np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match="offset has shape"):
        encode(encoder, 3, vectors, predictions, offset=np.arange(2))
    with pytest.raises(ValueError, match="events_seen has shape"):
        encode(encoder, 3, vectors, predictions, events_seen=1)


def test_a_task_named_twice_or_a_negative_width_is_refused() -> None:
    with pytest.raises(ValueError, match="each once"):
        EmbeddingEncoder(2, ["a", "a"])
    with pytest.raises(ValueError, match="vector_width = -1"):
        EmbeddingEncoder(-1, [])


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("wrong_type", {"vector": b"abc"}),
        ("wrong_type", {"vector": "abcd"}),
        ("wrong_type", {"client_id": 1}),
        ("wrong_type", {"offset": 1.5}),
        ("wrong_type", {"offset": True}),
        ("wrong_type", {"predictions": {"a": "x"}}),
        ("not_a_map", {"predictions": [1]}),
        ("unknown_field", {"more": 1}),
    ],
)
def test_a_record_that_is_no_embedding_is_refused(reason: str, changes: dict[str, Any]) -> None:
    vectors, predictions = np.zeros((1, 2), np.float32), np.zeros((1, 1), np.float32)
    record = msgpack.unpackb(encode(EmbeddingEncoder(2, ["a"]), 1, vectors, predictions)[0])

    with pytest.raises(RecordError) as refused:
        decode_embedding(msgpack.packb(record | changes))

    assert refused.value.reason == reason


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3),
    st.floats(0, 1, width=32),
)
def test_json_carries_the_same_bits(numbers: list[float], prediction: float) -> None:
    # Given the same embedding written both ways
    vectors, predictions = np.array([numbers], np.float32), np.array([[prediction]], np.float32)
    (packed,) = encode(EmbeddingEncoder(3, ["churn"]), 1, vectors, predictions)
    (text,) = encode(EmbeddingEncoder(3, ["churn"], "json"), 1, vectors, predictions)
    # When any JSON library reads the one, and we read both
    assert json.loads(text)["vector"] == vectors[0].astype(float).tolist()
    first, second = decode_embedding(packed), decode_embedding(text)
    # Then nothing differs
    assert first.vector.tobytes() == second.vector.tobytes()
    assert (first.predictions, first.offset) == (second.predictions, second.offset)
