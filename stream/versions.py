"""The parameters a worker serves with: the latest whole version, swapped in between micro-batches.

Guaranteed: a partition is served by the latest version whose trunk its rows were made by; no micro-batch sees parts of
two versions. A version counts as applied once every partition here is served by it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

import numpy as np

from stream.errors import BrokerError
from stream.metrics import WorkerMetrics
from stream.model.engine import Engine
from stream.model.heads import Questions
from stream.model.layout import Layout
from stream.owned import OwnedPartition
from stream.parameter_log import Marker, ParameterReader
from stream.partition import Served

__all__ = ["Versions"]

logger = logging.getLogger(__name__)

_POLL_S = 0.02


class Versions:
    """Follows the parameters topic for the partitions in `owned`, by number.

    Parameters
    ----------
    wall_clock: seconds since 1970, for how fresh what is served is.
    """

    def __init__(
        self,
        reader: ParameterReader,
        layout: Layout,
        questions: Questions,
        owned: Mapping[int, OwnedPartition],
        metrics: WorkerMetrics,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._reader = reader
        self._layout = layout
        self._questions = questions
        self._owned = owned
        self._metrics = metrics
        self._wall_clock = wall_clock
        self._marker: Marker | None = None
        self._torn_seen = 0
        #: Of the latest version; partitions that are still being rebuilt are served by an earlier one.
        self.latest: Served | None = None
        #: Number of the last version that every partition here was served by; 0 before the first.
        self.applied = 0

    def outdated(self) -> list[tuple[int, OwnedPartition]]:
        """Partitions whose rows are of another trunk than the latest version's."""
        latest = self.latest
        if latest is None:
            return []
        return [(n, one) for n, one in sorted(self._owned.items()) if one.served.engine is not latest.engine]

    def swap(self) -> None:
        """Between micro-batches: serve the latest whole version, where the rows are of its trunk."""
        staged = self._reader.staged
        if staged is None or (self.latest is not None and staged[0].version <= self.latest.version):
            return
        parameters, marker = staged
        if self.latest is None or parameters.trunk_id != self.latest.engine.trunk_id:
            engine = Engine(self._layout, parameters)
            tile = engine.cell.self_check(np.random.default_rng(0))
            logger.info("trunk %s, matrix tiles of %d rows", engine.trunk_id, tile)
        else:
            engine = self.latest.engine
        latest = Served(engine, self._questions, self._questions.heads(parameters), parameters.version)
        for owned in self._owned.values():
            if owned.served.engine is engine:
                owned.served = latest
        self.latest = latest
        self._marker = marker
        self.note()

    def note(self) -> None:
        """Count the latest version as applied, if every partition here is served by it."""
        metrics, latest, marker, now = self._metrics, self.latest, self._marker, self._wall_clock()
        if latest is None or marker is None or self.applied == latest.version or self.outdated():
            return
        self.applied = latest.version
        metrics.version.set(latest.version)
        metrics.version_time.set(marker.created_ms / 1000.0)
        metrics.versions_applied.inc()
        for published_ms in marker.feedback_ms:
            metrics.feedback_to_served.observe(max(0.0, now - published_ms / 1000.0))

    async def first(self) -> Served:
        """The latest version, once the topic has been read to its end.

        Raises
        ------
        BrokerError: the topic cannot be read.
        """
        # An earlier version than the last one may have another trunk, whose rows are no more.
        while self.latest is None or not self._reader.has_caught_up:
            self._check()
            if self._reader.has_caught_up:
                self.swap()
            if self.latest is None:
                await asyncio.sleep(_POLL_S)
        return self.latest

    async def follow(self) -> None:
        """Swap also while no events come, so that the version served is never older than it need be."""
        while True:
            await asyncio.sleep(_POLL_S)
            self._check()
            if self.latest is not None:
                self.swap()
            torn = self._reader.torn
            self._metrics.versions_torn.inc(torn - self._torn_seen)
            self._torn_seen = torn

    def _check(self) -> None:
        if self._reader.error is not None:
            raise BrokerError(f"parameters cannot be read: {self._reader.error}")
