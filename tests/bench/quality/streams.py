"""Real streams to measure quality on: what is published, what is asked, and what baselines are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["EXAMPLES", "NEVER_MS", "Points", "Record", "Stream"]

EXAMPLES = Path(__file__).resolve().parents[3] / "stream" / "examples"
#: When a label is known that is not known within the stream.
NEVER_MS = 2**62
#: Time, client, value.
Record = tuple[int, bytes, bytes]


@dataclass(frozen=True)
class Points:
    """What is asked, n points in order of time: `client`, `as_of_ms`, `label`, and when that is final, `known_ms`.

    `aggregates` (n, A): hand-made features of the client up to the point, for baselines; of these the last `codes`
    are categories.
    """

    client: NDArray[np.str_]
    as_of_ms: NDArray[np.int64]
    label: NDArray[np.bool_]
    known_ms: NDArray[np.int64]
    aggregates: NDArray[np.float32]
    codes: int

    def __len__(self) -> int:
        return len(self.client)


@dataclass(frozen=True)
class Stream:
    """A stream: the settings it is served with, its records, its points.

    `events` and `feedback` in order of time. Rows are judged on points from `judged_from_ms` whose label is known
    within the stream; the `trunk` that serves, see `TRUNKS`, is made of what lies before `trunk_until_ms`. Of the
    baselines: `fits` of LightGBM are averaged, its well regularised setting has leaves of at most `leaf_examples`;
    `penalty` is that of logistic regression, `rate` and `intercept_rate` are the steps of its online
    kind.
    """

    settings: Path
    task: str
    #: Which of its predictions is judged.
    output: str
    events: Sequence[Record]
    feedback: Sequence[Record]
    points: Points
    judged_from_ms: int
    trunk: str
    trunk_until_ms: int
    #: Records a second, and how many more than those applied may be published.
    pace: float
    behind: int
    fits: int
    leaf_examples: int
    penalty: float
    rate: float
    intercept_rate: float
