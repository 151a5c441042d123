"""Optimizers in the row: torch's results, and bit-identical after every way a row can travel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stream.errors import StoreError
from stream.store import Adagrad, Adam, EmbeddingStore, Optimizer, Sgd, apply_gradients
from tests.store.conftest import Opener

WIDTH = 5
NAMES = [f"value {i}".encode() for i in range(40)]
CASES: list[Any] = [
    pytest.param(Sgd(0.1), lambda weights: torch.optim.SGD([weights], lr=0.1), id="sgd"),
    pytest.param(Adagrad(0.1), lambda weights: torch.optim.Adagrad([weights], lr=0.1), id="adagrad"),
    pytest.param(Adam(0.01), lambda weights: torch.optim.Adam([weights], lr=0.01), id="adam"),
]


def options(optimizer: Optimizer) -> dict[str, Any]:
    return {"width": WIDTH, "state_width": optimizer.state_width(WIDTH), "init_scale": 0.1}


def gradients(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(len(NAMES), WIDTH)).astype(np.float32)


@pytest.mark.parametrize(("optimizer", "reference"), CASES)
def test_given_dense_steps_then_the_rows_are_those_of_torch(
    open_store: Opener, optimizer: Optimizer, reference: Any
) -> None:
    store = open_store(None, **options(optimizer))
    with store.update(NAMES) as slots:
        weights = torch.tensor(store.vectors[slots], requires_grad=True)
    stepper = reference(weights)
    for seed in range(100):
        apply_gradients(store, optimizer, NAMES, gradients(seed), event_ms=seed + 1)
        weights.grad = torch.tensor(gradients(seed))
        stepper.step()

    found = store.lookup(NAMES)
    np.testing.assert_allclose(found.vectors, weights.detach().numpy(), rtol=2e-5, atol=2e-6)
    assert (found.events_seen == 100).all()
    assert (found.last_event_ms == 100).all()


@pytest.mark.parametrize(("optimizer", "reference"), CASES)
def test_given_eviction_restart_restore_and_snapshot_then_the_next_step_is_bit_identical(
    open_store: Opener, tmp_path: Path, optimizer: Optimizer, reference: Any
) -> None:
    steady = open_store(None, **options(optimizer))
    evicting = open_store("evicting", memory_rows=3, **options(optimizer))
    for seed in range(10):
        for store in (steady, evicting):
            apply_gradients(store, optimizer, NAMES, gradients(seed), event_ms=1)
    checkpoint = evicting.checkpoint()
    records = [pair for keys, rows in checkpoint.slices(7) for pair in zip(keys, rows, strict=True)]
    checkpoint.commit()
    evicting.snapshot().write(tmp_path / "snapshot")
    evicting.close()

    restarted = open_store("evicting", memory_rows=3, **options(optimizer))
    restored = open_store("restored", memory_rows=3, **options(optimizer))
    restored.restore([key for key, _ in records], [row for _, row in records])
    loaded = open_store(None, **options(optimizer))
    loaded.load([tmp_path / "snapshot"])

    for store in (steady, restarted, restored, loaded):
        apply_gradients(store, optimizer, NAMES, gradients(99), event_ms=1)
    for store in (restarted, restored, loaded):
        assert store.lookup(NAMES).vectors.tobytes() == steady.lookup(NAMES).vectors.tobytes()


def test_given_duplicates_then_each_takes_its_step_in_order(open_store: Opener) -> None:
    one, two = open_store(None, **options(Adam())), open_store(None, **options(Adam()))
    steps = gradients(1)[:3]
    apply_gradients(one, Adam(), [b"a", b"a", b"a"], steps, event_ms=1)
    for step in steps:
        apply_gradients(two, Adam(), [b"a"], step[None], event_ms=1)
    assert one.lookup([b"a"]).vectors.tobytes() == two.lookup([b"a"]).vectors.tobytes()


def test_given_init_scale_then_a_new_row_depends_on_its_key_and_the_seed_alone(open_store: Opener) -> None:
    def rows(store: EmbeddingStore, names: list[bytes]) -> np.ndarray:
        with store.update(names) as slots:
            store.last_event_ms[slots] = 1
            return store.vectors[slots].copy()

    first = rows(open_store(None, width=64, init_scale=0.5), NAMES)
    other_order = rows(open_store("disk", width=64, init_scale=0.5, memory_rows=2), NAMES[::-1])[::-1]
    other_seed = rows(open_store(None, width=64, init_scale=0.5, init_seed=1), NAMES)

    assert first.tobytes() == other_order.tobytes()
    assert not (first == other_seed).any()
    assert first.min() >= -0.5
    assert first.max() < 0.5
    assert abs(first.mean()) < 0.02
    assert abs(first.std() - 1 / np.sqrt(12)) < 0.01


def test_given_the_wrong_state_width_or_shape_then_it_is_refused(open_store: Opener) -> None:
    store = open_store(None, width=WIDTH, state_width=1)
    with pytest.raises(StoreError, match=r"store\.state_width: 1 with Adam; accepted: 11 for width 5"):
        apply_gradients(store, Adam(), [b"a"], np.ones((1, WIDTH)))
    with pytest.raises(StoreError, match="gradients: shape"):
        apply_gradients(open_store(None, width=WIDTH), Sgd(), [b"a"], np.ones((2, WIDTH)))
