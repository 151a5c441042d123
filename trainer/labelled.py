"""Which past events have labels: what pretraining learns from beside the events themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from stream.model.layout import Layout
from stream.wire import FeedbackRecord
from trainer.objectives import Answer

__all__ = ["History", "placed_labels"]


@dataclass(frozen=True)
class History:
    """All events, client by client, each client's in stream order.

    `dense` (n, inputs), `codes` (n, fields), `timestamp_ms`, `modality` (n,), `first` (clients + 1,) where each begins.
    """

    dense: torch.Tensor
    codes: torch.Tensor
    timestamp_ms: NDArray[np.int64]
    modality: NDArray[np.int64]
    first: NDArray[np.int64]


def placed_labels(
    layout: Layout, history: History, slot: Mapping[bytes, int], feedback: Iterable[FeedbackRecord]
) -> list[Answer]:
    """For each task with labels, what they say of each event (n,).

    Parameters
    ----------
    slot: the number of each client in the history.
    feedback: what answers no event of its task is left out; of two for the same event the later one counts.
    """
    n = len(history.timestamp_ms)
    target: dict[str, NDArray[np.float32]] = {}
    weight: dict[str, NDArray[np.float32]] = {}
    for one in feedback:
        task = layout.settings.tasks.get(one.task)
        at = None if task is None else _event(layout, history, slot.get(one.client_id.encode()), one.as_of_ms, task.on)
        if task is None or at is None:
            continue
        if one.task not in target:
            target[one.task], weight[one.task] = np.zeros(n, np.float32), np.zeros(n, np.float32)
        target[one.task][at] = task.classes.index(one.label) if isinstance(one.label, str) else float(one.label)
        weight[one.task][at] = one.weight
    return [
        _answer(layout.settings.tasks[name].kind, len(layout.settings.tasks[name].classes), target[name], weight[name])
        for name in target
    ]


def _event(layout: Layout, history: History, client: int | None, as_of_ms: int, modality: str) -> int | None:
    """The client's last event of the modality at that time."""
    if client is None:
        return None
    begin, end = history.first[client : client + 2].tolist()
    here = (history.timestamp_ms[begin:end] == as_of_ms) & (
        history.modality[begin:end] == layout.schema.by_name[modality].index
    )
    found = np.flatnonzero(here)
    return begin + int(found[-1]) if len(found) else None


def _answer(kind: str, classes: int, target: NDArray[np.float32], weight: NDArray[np.float32]) -> Answer:
    if kind == "regression":
        known = target[weight > 0].astype(np.float64)
        target = ((target - known.mean()) / max(float(known.std()), 1e-6)).astype(np.float32)
    of = {"binary": 2, "multiclass": classes, "regression": 0}[kind]
    return Answer(of, torch.from_numpy(target), torch.from_numpy(weight))
