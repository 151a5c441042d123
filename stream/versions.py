"""The parameters a worker serves with: the latest whole version, swapped in between micro-batches.

Guaranteed: a partition is served by the latest version whose trunk its rows were made by; no micro-batch sees parts of
two versions. A version counts as applied once every partition here is served by it. Of an online trunk, later versions
move rows on from where they are; a trunk of the other kind than `model.trunk` is refused.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

import numpy as np

from stream.errors import BrokerError, ParametersError
from stream.metrics import WorkerMetrics
from stream.model.engine import Engine
from stream.model.heads import Questions
from stream.model.layout import Layout
from stream.model.parameters import ParameterSet
from stream.owned import OwnedPartition
from stream.parameter_log import Marker, ParameterReader
from stream.partition import Served, Serving

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
        #: Of the latest version's trunk; partitions that are still being rebuilt have that of an earlier one.
        self.serving: Serving | None = None
        #: Number of the last version that every partition here was served by; 0 before the first.
        self.applied = 0

    def outdated(self) -> list[tuple[int, OwnedPartition]]:
        """Partitions whose rows are of another trunk than the latest version's."""
        if self.serving is None:
            return []
        return [(n, one) for n, one in sorted(self._owned.items()) if one.serving is not self.serving]

    def swap(self) -> None:
        """Between micro-batches: serve the latest whole version, where the rows are of its trunk.

        Raises
        ------
        ParametersError: it does not fit the settings.
        """
        staged = self._reader.staged
        before = self.serving.latest if self.serving is not None else None
        if staged is None or (before is not None and staged[0].version <= before.version):
            return
        settled = self._reader.settle(before.engine.trunk_id if before is not None else None)
        assert settled is not None
        parameters, self._marker = settled
        self._check_kind(parameters)
        heads = self._questions.heads(parameters)
        if self.serving is not None and before is not None and parameters.trunk_id == before.engine.trunk_id:
            engine = before.engine.moved(parameters) if parameters.is_online else before.engine
            self.serving.latest = Served(engine, self._questions, heads, parameters.version)
        else:
            engine = Engine(self._layout, parameters)
            engine.cell.self_check(np.random.default_rng(0))
            logger.info("trunk %s", engine.trunk_id)
            self.serving = Serving(Served(engine, self._questions, heads, parameters.version))
        self.note()

    def _check_kind(self, parameters: ParameterSet) -> None:
        kind, wanted = "online" if parameters.is_online else "fixed", self._layout.settings.model.trunk
        if kind != wanted:
            raise ParametersError(
                f"version {parameters.version} has a trunk that is {kind}, but model.trunk = {wanted!r}: expected the "
                f"same setting for trainer and workers; where it is changed, rows are rebuilt from the events"
            )

    def note(self) -> None:
        """Count the latest version as applied, if every partition here is served by it."""
        metrics, marker, now = self._metrics, self._marker, self._wall_clock()
        if marker is None or self.applied == marker.version or self.outdated():
            return
        self.applied = marker.version
        metrics.version.set(marker.version)
        metrics.version_time.set(marker.created_ms / 1000.0)
        metrics.versions_applied.inc()
        for published_ms in marker.feedback_ms:
            metrics.feedback_to_served.observe(max(0.0, now - published_ms / 1000.0))

    async def first(self) -> Serving:
        """Of the latest version's trunk, once the topic has been read to its end.

        Raises
        ------
        BrokerError: the topic cannot be read.
        """
        # An earlier version than the last one may have another trunk, whose rows are no more.
        while self.serving is None or not self._reader.has_caught_up:
            self._check()
            if self._reader.has_caught_up:
                self.swap()
            if self.serving is None:
                await asyncio.sleep(_POLL_S)
        return self.serving

    async def follow(self) -> None:
        """Swap also while no events come, so that the version served is never older than it need be."""
        while True:
            await asyncio.sleep(_POLL_S)
            self._check()
            if self.serving is not None:
                self.swap()
            torn = self._reader.torn
            self._metrics.versions_torn.inc(torn - self._torn_seen)
            self._torn_seen = torn

    def _check(self) -> None:
        if self._reader.error is not None:
            raise BrokerError(f"parameters cannot be read: {self._reader.error}")
