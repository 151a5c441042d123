"""The programs in the store's README run word for word and do what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import stream.store
from stream.store import EmbeddingStore
from tests.store.conftest import Opener

PROGRAMS = re.findall(r"```python\n(.*?)```", (Path(stream.store.__file__).parent / "README.md").read_text(), re.S)


class Event(NamedTuple):
    key: bytes
    offset: int
    ms: int


def test_given_the_first_program_then_it_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(PROGRAMS[0], names)
    vectors, found = names["vectors"], names["found"]
    assert isinstance(vectors, np.ndarray)
    assert isinstance(found, np.ndarray)
    assert found.tolist() == [True, False]
    assert (vectors[0] == 1).all()


def test_given_the_program_for_admission_then_any_cut_of_the_events_makes_the_same_rows(open_store: Opener) -> None:
    rng = np.random.default_rng(5)
    times = np.maximum(1, np.cumsum(rng.integers(0, 12, 400)) - rng.integers(0, 30, 400))
    events = [Event(f"client {rng.integers(12)}".encode(), i, int(ms)) for i, ms in enumerate(times)]

    def run(cuts: list[int], threshold: int) -> EmbeddingStore:
        store = open_store(None, admission_threshold=threshold, ttl_ms=60)

        def apply(batch: list[Event], slots: np.ndarray) -> None:
            for event, slot in zip(batch, slots.tolist(), strict=True):
                if event.offset > store.applied_offset[slot]:
                    store.vectors[slot] = store.vectors[slot] * np.float32(0.5) + event.offset
                    store.events_seen[slot] += 1
                    store.last_event_ms[slot] = max(store.last_event_ms[slot], event.ms)
                    store.applied_offset[slot] = event.offset

        for start, stop in zip([0, *cuts], [*cuts, len(events)], strict=True):
            names: dict[str, object] = {
                "store": store,
                "batch": events[start:stop],
                "pack": lambda event: str(event.offset).encode(),
                "unpack": lambda data: events[int(data)],
                "apply": apply,
            }
            exec(PROGRAMS[1], names)
        return store

    for threshold in (2, 3, 5):
        one_by_one = run(list(range(1, 400)), threshold).lookup([f"client {i}".encode() for i in range(12)])
        assert 0 < one_by_one.found.sum() <= 12
        for size in (400, 37, 7):
            rows = run(list(range(size, 400, size)), threshold).lookup([f"client {i}".encode() for i in range(12)])
            for got, wanted in zip(rows, one_by_one, strict=True):
                assert got.tobytes() == wanted.tobytes()
