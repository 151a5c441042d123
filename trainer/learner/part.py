"""What each part of a task's head must do to learn; how it serves is in `stream.model.heads`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stream.model.parameters import Tensor
from stream.settings import Task

__all__ = ["Labelled", "Load", "PartLearner", "seen_by"]

Floats = NDArray[np.float64]

#: The bytes that `save` gave under a name; raises StoreError where the checkpoint lacks them.
Load = Callable[[str], bytes]


def seen_by(part: str, settings: Task, groups: NDArray[np.str_] | None, width: int) -> NDArray[np.bool_]:
    """(width,) which of the task's inputs a part of its head sees; see `leave_out`.

    Parameters
    ----------
    groups: (width,) of each input; None only where the part leaves nothing out.
    """
    left = settings.leave_out.get(part)
    if not left:
        return np.ones(width, np.bool_)
    assert groups is not None
    return ~np.isin(groups, left)


@dataclass(frozen=True)
class Labelled:
    """An answered example: `inputs` (F,) as they were; `target` 0 or 1, the index of a class, or a value.

    `final_ms`: stream time at which it may be learned; `published_ms`: Kafka's time of the feedback;
    `keys`: of the rows of each of the task's tables.
    """

    inputs: NDArray[np.float32]
    target: float
    weight: float
    published_ms: int
    final_ms: int
    log_odds_offset: float
    keys: tuple[bytes, ...] = ()


class PartLearner(Protocol):
    """Learns one part.

    Guaranteed of each: the same labels in the same order give the same tensors, bit for bit, on one thread of one
    machine, wherever it is saved and loaded in between. Of inputs that the part leaves out (`seen_by`) nothing is
    learned, and what it serves is the same whatever they are. `behind` counts labels taken that `tensors` does not have
    yet.
    """

    behind: int

    def learn(self, one: Labelled, x: Floats) -> int:
        """Take one label, with its inputs standardised and a one (F + 1,); returns how many labels had to be dropped,
        as they would have made something not finite."""
        ...

    def tensors(self, center: Floats, scale: Floats, *, settled: bool = False) -> dict[str, Tensor]:
        """What it serves now; empty while it serves nothing. See `TaskLearner.head` for `settled`."""
        ...

    def save(self) -> dict[str, bytes]:
        """Everything, by names of its own."""
        ...

    def load(self, load: Load) -> None:
        """Take over what `save` gave."""
        ...

    def close(self) -> None:
        """End what it started."""
        ...
