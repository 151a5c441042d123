"""Compiling the kernels before the first event waits for them.

Guaranteed: made-up events of every modality have gone all the way through decoder, engine, store, checkpoint and
encoder, so that a process whose kernels are not cached yet compiles them here, on a thread, while it answers its
health checks. Nothing of it is left on disk, and it changes no row of anybody. Not guaranteed: that every kernel is
met; rare ways (a batch that expires rows in its middle) compile when they are first taken.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from stream.model.engine import Triggers
from stream.partition import Partition, Served
from stream.store import EmbeddingStore, StoreOptions
from stream.transport import FetchedBlock
from stream.wire import EmbeddingEncoder, EventDecoder, RecordBlock, Schema, encode_event
from stream.wire.record_batch import RecordBatch
from stream.wire.schema import FieldSchema

__all__ = ["warm_up"]

_AT_MS = 1_600_000_000_000
#: So many that the store's index grows once.
_CLIENTS = 100
_BATCH_BYTES = 1 << 20


def warm_up(
    schema: Schema,
    decoder: EventDecoder,
    encoder: EmbeddingEncoder,
    served: Served,
    options: StoreOptions,
    directory: Path,
) -> float:
    """Apply events of every modality to a store of its own in `directory`, gone afterwards; returns seconds.

    Raises
    ------
    StoreError: the directory cannot be used.
    """
    started = time.perf_counter()
    clients = [str(number) for number in range(_CLIENTS)]
    values = [
        encode_event(client, _AT_MS, modality.name, {name: _value(field) for name, field in modality.fields.items()})
        for client in clients
        for modality in schema.modalities
    ]
    n = len(values)
    keys = [client.encode() for client in clients for _ in schema.modalities]
    with tempfile.TemporaryDirectory(dir=directory, prefix="warm-up-") as scratch:
        with EmbeddingStore.open(Path(scratch) / "store", options) as store:
            partition = Partition(0, store, 0, decoder, encoder)
            block = RecordBlock.from_lists(keys, values, np.arange(n), np.full(n, _AT_MS))
            batch = RecordBatch(_BATCH_BYTES)
            for published, embeddings in partition.apply(FetchedBlock(0, 0, block), served).embeddings:
                batch.add(published, embeddings, 0, _AT_MS)
            batch.seal("none", -1, -1, -1)
            _ask(decoder, block, served)
            frozen = store.checkpoint()
            rows = [row for keys_and_rows in frozen.slices(256) for row in zip(*keys_and_rows, strict=True)]
            frozen.commit({})
            partition.sweep(1.0)
            store.lookup([b"0", b"b"])
        with EmbeddingStore.open(Path(scratch) / "restored", options) as store:
            store.restore([key for key, _ in rows], [row for _, row in rows], {})
    return time.perf_counter() - started


def _ask(decoder: EventDecoder, block: RecordBlock, served: Served) -> None:
    """Make the inputs of every task's head, also of those that nobody has learned yet."""
    columns, layout = decoder.decode(block), served.engine.layout
    rows = np.zeros((columns.n, layout.width), np.float32)
    hidden, memory = rows[:, : layout.hidden].copy(), rows[:, layout.hidden :].copy()
    triggers = Triggers(np.arange(columns.n), np.ones(columns.n, np.int64), hidden, memory)
    for question in served.questions.tasks:
        question.ask(columns, triggers)


def _value(field: FieldSchema) -> str | float | list[str]:
    if field.type == "items":
        return ["a"]
    return min(max(1.0, field.minimum), field.maximum) if field.type == "number" else "a"
