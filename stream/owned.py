"""A partition while this worker serves it: its rows, its changelog, and the parameters it is served with.

Guaranteed: a checkpoint and a switch to another trunk never overlap, and neither overlaps a micro-batch. After a
switch, the first checkpoint writes every row of the new trunk, and an end for each client that has none, in one
transaction, once all their embeddings are published again; until then the changelog is wholly of the old trunk.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import numpy as np

from stream.changelog import ChangelogWriter, read_changelog
from stream.checkpoint import Completed, run_checkpoint
from stream.errors import BrokerError
from stream.outputs import Outputs
from stream.partition import Partition, Served, Serving
from stream.restore import other_paths
from stream.settings import Settings
from stream.store import PackedKeys

__all__ = ["OwnedPartition"]

logger = logging.getLogger(__name__)

_PUBLISH_ROWS = 1024


class OwnedPartition:
    """One partition of a worker.

    Parameters
    ----------
    serving: of the trunk of its rows.
    is_renewed: its rows are of a trunk that neither changelog nor embeddings topic have yet.
    """

    def __init__(
        self,
        settings: Settings,
        layout: str,
        partition: Partition,
        writer: ChangelogWriter,
        serving: Serving,
        outputs: Outputs,
        executor: Executor,
        is_renewed: bool,
    ) -> None:
        self.partition = partition
        self.writer = writer
        self.serving = serving
        self.is_renewed = is_renewed
        #: Held by whoever applies a micro-batch, and by a switch.
        self.turn = asyncio.Lock()
        self._settings = settings
        self._layout = layout
        self._outputs = outputs
        self._executor = executor
        self._checkpointing = asyncio.Lock()
        self._is_given_up = False
        #: Somebody waits for the checkpoint in hand.
        self._is_urgent = False
        #: Set once rows and changelog are let go of: not before a checkpoint that is being written has ended.
        self.closed = asyncio.Event()

    @property
    def served(self) -> Served:
        """What its rows are advanced and its embeddings made with now."""
        return self.serving.latest

    async def checkpoint(
        self, commit_position: Callable[[int], Awaitable[bool]], timeout_s: float, spread_s: float = 0.0
    ) -> Completed:
        """Write what changed; see `stream.checkpoint`. The wait for one that is being written counts, too.

        spread_s: 0 also makes haste with one that is being written.

        Raises
        ------
        Fenced: another worker owns the partition now.
        BrokerError: the broker did not confirm, and the checkpoint can be tried again; or the partition is given up.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        self._is_urgent |= spread_s == 0
        async with self._holding():
            self._is_urgent = spread_s == 0
            ended = await self._renew() if self.is_renewed else []
            done = await run_checkpoint(
                self.partition,
                self.writer,
                trunk=self.served.engine.trunk_id,
                layout=self._layout,
                ended=ended,
                publish_ended=self._publish_ended,
                flush_outputs=partial(self._outputs.flush, self.partition.number),
                commit_position=commit_position,
                executor=self._executor,
                timeout_s=max(0.0, deadline - loop.time()),
                spread_s=spread_s,
                is_urgent=lambda: self._is_urgent,
            )
            if self.is_renewed:
                self.is_renewed = False
                others = other_paths(self._settings, self.partition.number, self.served.engine.trunk_id)
                await loop.run_in_executor(self._executor, _remove, others)
        return done

    async def switch(self, serving: Serving, finish: Callable[[int], Awaitable[Partition | None]]) -> bool:
        """Go on with other rows, at the very offset up to which these were applied.

        finish: brings the other rows to this offset; None if it could not.
        """
        async with self._holding(), self.turn:
            partition = await finish(self.partition.position)
            if partition is None:
                return False
            self.partition.store.close()
            self.partition, self.serving, self.is_renewed = partition, serving, True
        return True

    def close(self) -> None:
        """Let go of rows and changelog, without a checkpoint, as soon as none is being written; see `closed`."""
        self._is_given_up = self._is_urgent = True
        if not self._checkpointing.locked():
            self._let_go()

    @asynccontextmanager
    async def _holding(self) -> AsyncIterator[None]:
        async with self._checkpointing:
            try:
                self._check()
                yield
            finally:
                if self._is_given_up:
                    self._let_go()

    def _check(self) -> None:
        if self._is_given_up:
            # Above all nothing is published any more: it would come as from the partition's latest owner.
            raise BrokerError(f"partition {self.partition.number} is given up")

    def _let_go(self) -> None:
        if not self.closed.is_set():
            self.writer.abort()
            self.partition.store.close()
            self.closed.set()

    def _publish_ended(self, keys: list[bytes]) -> None:
        self._check()
        self._outputs.tombstones(self.partition.number, PackedKeys.from_list(keys))

    async def _renew(self) -> list[bytes]:
        """Publish the embeddings of all rows; returns the clients of the changelog that have no row any more."""
        number, store = self.partition.number, self.partition.store
        loop = asyncio.get_running_loop()
        for keys, found in store.scan(_PUBLISH_ROWS):
            self._check()
            self._outputs.embeddings(number, keys, self.partition.embeddings(keys, found, self.served))
            await asyncio.sleep(0)
        ended: list[bytes] = []
        absent = await loop.run_in_executor(self._executor, self._ended)
        for start in range(0, len(absent), _PUBLISH_ROWS):
            # Those that have come back meanwhile have an embedding that must stay.
            still = self._without_rows(absent[start : start + _PUBLISH_ROWS])
            self._publish_ended(still)
            ended += still
            await asyncio.sleep(0)
        logger.info("partition %d: all embeddings published under trunk %s", number, self.served.engine.trunk_id)
        return ended

    def _ended(self) -> list[bytes]:
        ended: set[bytes] = set()
        for batch in read_changelog(self._settings, self.partition.number, 0):
            keys = [key for key, row in zip(batch.keys, batch.rows, strict=True) if row is not None]
            ended.update(self._without_rows(keys))
        return sorted(ended)

    def _without_rows(self, keys: list[bytes]) -> list[bytes]:
        if not keys:
            return []
        missing = np.flatnonzero(~self.partition.store.lookup(keys).found)
        return [keys[i] for i in missing.tolist()]


def _remove(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
