"""The embedding store: collisionless, expirable, frequency-filtered tables of float rows.

from stream.store import EmbeddingStore, PackedKeys, StoreOptions

with EmbeddingStore.open(path, StoreOptions(width=64, ttl_ms=90 * 86_400_000)) as store:
    store.upsert([b"client-1"], vectors, event_ms=now_ms)
    vectors, found, *_ = store.lookup([b"client-1", b"client-2"])
    store.flush()
"""

from __future__ import annotations

from stream.store.access import Lookup, Stats, Update
from stream.store.admission import Admission
from stream.store.checkpoint import Checkpoint
from stream.store.faults import StoreCorrupt, StoreFull, StoreLocked, StoreReadOnly
from stream.store.keys import MAX_KEY_BYTES, PackedKeys
from stream.store.lives import FOR_EVER
from stream.store.optimizer import Adagrad, Adam, Optimizer, Sgd, apply_gradients
from stream.store.options import StoreOptions
from stream.store.snapshot import Snapshot
from stream.store.store import EmbeddingStore

__all__ = [
    "FOR_EVER",
    "MAX_KEY_BYTES",
    "Adagrad",
    "Adam",
    "Admission",
    "Checkpoint",
    "EmbeddingStore",
    "Lookup",
    "Optimizer",
    "PackedKeys",
    "Sgd",
    "Snapshot",
    "Stats",
    "StoreCorrupt",
    "StoreFull",
    "StoreLocked",
    "StoreOptions",
    "StoreReadOnly",
    "Update",
    "apply_gradients",
]
