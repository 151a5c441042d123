"""Tables for the store's tests: real ones, in memory or over a real RocksDB in a temporary directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stream.store import EmbeddingStore, StoreOptions

Opener = Callable[..., EmbeddingStore]


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Opener]:
    """Opens stores under tmp_path by name (None: in memory) and closes them at the end."""
    opened: list[EmbeddingStore] = []

    def opener(name: str | None = "table", *, hasher: Any = None, **options: Any) -> EmbeddingStore:
        path = None if name is None else tmp_path / name
        store = EmbeddingStore.open(path, StoreOptions(**{"width": 4, **options}), hasher=hasher)
        opened.append(store)
        return store

    yield opener
    for store in opened:
        store.close()
