"""The checkpoint: the only place where rows, changelog and input positions meet.

Steps, in this order, for one partition:

1. Note the position and freeze the set of changed rows.
2. Write them to the changelog in slices, letting events be applied between slices.
3. Wait until every embedding and dead letter of events below the position is confirmed.
4. Commit the changelog transaction (rows and position together). A worker that lost the partition fails here.
5. Write the same rows to the local database in slices, with the last one the position and the changelog's offset.
6. Commit the position to the consumer group.

A crash between any two steps leaves rows that are at or ahead of the committed position; each says up to which
offset it is, so replayed events are skipped by exactly the rows that have them. A step that fails ends the
checkpoint: nothing after it happens, and the rows stay due for the next one. So does a cancellation, once the step
in hand has ended: the next checkpoint never meets what this one left running.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

import msgpack

from stream.changelog import ChangelogWriter, PartitionMeta
from stream.partition import Partition
from stream.store import Checkpoint

__all__ = ["META_NAME", "Completed", "LocalMeta", "run_checkpoint"]

#: Where the local database keeps what belongs to the partition.
META_NAME = "partition"
_SLICE_ROWS = 512
#: Long enough to apply what has come during a slice.
_LONGEST_PAUSE_S = 0.002
#: Work for each second of pause: where blocks are large a pause is as long as one takes, and slices come together.
_SHARE = 0.25
#: A transaction must not stay open for as long as the broker lets it.
_LONGEST_SPREAD_S = 10.0
_T = TypeVar("_T")


@dataclass(frozen=True)
class LocalMeta:
    """What the local database knows beside rows: the partition's record and the changelog offset after it."""

    partition: PartitionMeta
    changelog_offset: int

    def encode(self) -> bytes:
        """MessagePack list of the two."""
        packed: bytes = msgpack.packb([self.partition.encode(), self.changelog_offset])
        return packed

    @classmethod
    def decode(cls, data: bytes) -> LocalMeta:
        """Inverse of `encode`."""
        partition, offset = msgpack.unpackb(data)
        return cls(PartitionMeta.decode(partition), int(offset))


@dataclass(frozen=True)
class Completed:
    """A finished checkpoint."""

    position: int
    rows: int
    seconds: float


async def run_checkpoint(
    partition: Partition,
    writer: ChangelogWriter,
    *,
    trunk: str,
    layout: str,
    ended: Sequence[bytes] = (),
    publish_ended: Callable[[list[bytes]], None],
    flush_outputs: Callable[[float], None],
    commit_position: Callable[[int], Awaitable[bool]],
    executor: Executor,
    timeout_s: float,
    spread_s: float = 0.0,
) -> Completed:
    """Run the steps above.

    Parameters
    ----------
    ended: clients beyond the store's own tombstones whose rows end with this checkpoint.
    publish_ended: deletes the embeddings of clients whose rows end; the checkpoint itself ends rows it finds expired.
    flush_outputs: blocks until embeddings and dead letters produced so far are confirmed, for at most so many seconds;
        runs on `executor`.
    commit_position: commits the next input offset to the group.
    timeout_s: how long the broker may take to confirm all of it.
    spread_s: over how long its work on many rows may be spread, so that events are applied meanwhile.

    Raises
    ------
    Fenced: another worker owns the partition now.
    BrokerError: the broker did not confirm; the checkpoint can be tried again.
    """
    started = time.perf_counter()
    position = partition.position
    meta = PartitionMeta(position, partition.store.watermark_ms, trunk, layout)
    slices = 1 + partition.store.stats.unsaved_rows // _SLICE_ROWS
    # They are walked twice: for the changelog, and for the local database.
    pause_s = min(_LONGEST_PAUSE_S, 0.5 * min(spread_s, _LONGEST_SPREAD_S) / slices)
    pending = partition.store.checkpoint()
    rows = 0
    try:
        writer.begin()
        for start in range(0, len(ended), _SLICE_ROWS):
            chunk = ended[start : start + _SLICE_ROWS]
            writer.write(chunk, [None] * len(chunk))
            await asyncio.sleep(0)
        pace = _Pace()
        for keys, encoded in pending.slices(_SLICE_ROWS):
            writer.write(keys, encoded)
            gone = [key for key, row in zip(keys, encoded, strict=True) if row is None]
            if gone:
                publish_ended(gone)
            rows += len(keys)
            if pace.is_due():
                await asyncio.sleep(pause_s)
                pace.go_on()
        deadline = time.perf_counter() + timeout_s
        await _to_its_end(executor, flush_outputs, timeout_s)
        left_s = max(0.0, deadline - time.perf_counter())
        offset = await _to_its_end(executor, writer.commit, meta, left_s)
        await _to_its_end(executor, _settle, pending, {META_NAME: LocalMeta(meta, offset).encode()}, pause_s)
    except BaseException:
        pending.abandon()
        writer.abort()
        raise
    await commit_position(position)
    return Completed(position, rows, time.perf_counter() - started)


def _settle(pending: Checkpoint, meta: dict[str, bytes], pause_s: float) -> None:
    """Write rows and meta to the local database, letting others have the store between slices."""
    pace = _Pace()
    for _ in pending.commit_steps(meta):
        if pace.is_due():
            time.sleep(pause_s)
            pace.go_on()


class _Pace:
    """When work that lets others go first has to pause: after a share of what its last pause took."""

    def __init__(self) -> None:
        self._allowed_s = 0.0
        self._began = self._paused = time.perf_counter()

    def is_due(self) -> bool:
        """Whether to pause now."""
        self._paused = time.perf_counter()
        return self._paused - self._began >= self._allowed_s

    def go_on(self) -> None:
        """The pause is over."""
        self._began = time.perf_counter()
        self._allowed_s = _SHARE * (self._began - self._paused)


async def _to_its_end(executor: Executor, step: Callable[..., _T], *arguments: object) -> _T:
    """Run a blocking step on a thread; a cancellation takes effect when the step has ended."""
    future = asyncio.get_running_loop().run_in_executor(executor, step, *arguments)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        if not future.cancelled():
            # Looked at, so that nobody is told of an error that no one asked for.
            future.exception()
        raise
