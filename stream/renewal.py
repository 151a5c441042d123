"""Bringing a worker's partitions to another trunk, beside their live traffic.

Guaranteed: partitions are rebuilt one after another, each on a thread, and switched at the offset up to which its old
rows were applied; if that does not come about (the partition was given up, a still newer trunk came, the worker
stops), nothing of the attempt remains. Not guaranteed: time. A rebuild shares the worker's processor with its traffic.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor

from stream.errors import BrokerError
from stream.metrics import WorkerMetrics
from stream.owned import OwnedPartition
from stream.partition import Partition, Served, Serving
from stream.rebuild import Rebuild
from stream.versions import Versions

__all__ = ["Renewal"]

logger = logging.getLogger(__name__)

_POLL_S = 0.2
#: A rebuild is this close behind the live rows when these wait for it.
_SWITCH_RECORDS = 4_096
_ROUND_RECORDS = 200_000


class Renewal:
    """Rebuilds partitions.

    Parameters
    ----------
    begin: starts a partition's rebuild under what is served; blocks.
    stopping: ends every rebuild.
    """

    def __init__(
        self,
        versions: Versions,
        owned: Mapping[int, OwnedPartition],
        begin: Callable[[int, Served], Rebuild],
        metrics: WorkerMetrics,
        executor: Executor,
        stopping: threading.Event,
    ) -> None:
        self._versions = versions
        self._owned = owned
        self._begin = begin
        self._metrics = metrics
        self._executor = executor
        self._stopping = stopping

    def rebuilt(self, number: int, served: Served) -> Partition:
        """A partition that nothing is served from yet, under a trunk that its changelog does not have; blocks.

        Raises
        ------
        BrokerError: the events cannot be read, or the worker is told to stop.
        """
        logger.info("partition %d: its states are of another trunk and are rebuilt", number)
        rebuild = self._begin(number, served)
        try:
            if not rebuild.run(rebuild.log_end, self._stopping, self._metrics.rebuilt.inc):
                raise BrokerError(f"partition {number} was not rebuilt before the worker was told to stop")
        except BaseException:
            rebuild.discard()
            raise
        return rebuild.finish(rebuild.log_end)

    async def run(self) -> None:
        """Rebuild what is outdated, for ever, one partition right after the other."""
        while True:
            if not await self._renew_one():
                await asyncio.sleep(_POLL_S)

    async def _renew_one(self) -> bool:
        """Whether a partition was rebuilt, so that the next one need not wait."""
        outdated, serving = self._versions.outdated(), self._versions.serving
        self._metrics.rebuilding.set(len(outdated))
        if not outdated or serving is None:
            return False
        number, owned = outdated[0]
        try:
            if not await self._renew(number, owned, serving):
                return False
        except BrokerError as error:
            logger.warning("the rebuild of partition %d is tried again: %s", number, error)
            return False
        logger.info("partition %d goes on under trunk %s", number, serving.latest.engine.trunk_id)
        self._versions.note()
        return True

    async def _renew(self, number: int, owned: OwnedPartition, serving: Serving) -> bool:
        loop = asyncio.get_running_loop()
        rebuild = await loop.run_in_executor(self._executor, self._begin, number, serving.latest)

        def is_wanted() -> bool:
            return self._owned.get(number) is owned and self._versions.serving is serving

        async def advance(stop: int) -> bool:
            return await loop.run_in_executor(
                self._executor, rebuild.run, stop, self._stopping, self._metrics.rebuilt.inc
            )

        async def finish(position: int) -> Partition | None:
            if not is_wanted() or not await advance(position):
                return None
            return await loop.run_in_executor(self._executor, rebuild.finish, position)

        switched = False
        try:
            # Live traffic goes on meanwhile; what is left after the last round is read while it waits.
            while is_wanted() and owned.partition.position - rebuild.partition.position > _SWITCH_RECORDS:
                stop = min(owned.partition.position, rebuild.partition.position + _ROUND_RECORDS)
                if not await advance(stop):
                    return False
            if is_wanted():
                switched = await owned.switch(serving, finish)
        finally:
            if not switched:
                await loop.run_in_executor(self._executor, rebuild.discard)
        return switched
