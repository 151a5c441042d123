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
from functools import partial
from typing import TypeVar

import msgpack

from stream.changelog import ChangelogWriter, PartitionMeta
from stream.partition import Partition
from stream.store import Checkpoint

__all__ = ["META_NAME", "Completed", "LocalMeta", "Pace", "run_checkpoint"]

#: Where the local database keeps what belongs to the partition.
META_NAME = "partition"
_SLICE_ROWS = 256
#: Where the work is behind its time, it lets others go after so long.
_STRETCH_S = 0.004
#: A thread that lets go of a lock for less has it back before anybody who waits for it.
_SHORTEST_PAUSE_S = 0.0005
#: A transaction must not stay open for as long as the broker lets it.
_LONGEST_SPREAD_S = 10.0
#: Few rows do not wait for their time to be over, nor does anybody for a pause in the middle of it.
_LONGEST_SLICE_S = 0.05
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
    is_urgent: Callable[[], bool] = lambda: False,
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
    is_urgent: whether somebody waits for its end by now, so that it is spread no longer.

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
    pace = partial(Pace, min(0.5 * min(spread_s, _LONGEST_SPREAD_S) / slices, _LONGEST_SLICE_S), is_urgent)
    pending = partition.store.checkpoint()
    rows = 0
    try:
        writer.begin()
        for start in range(0, len(ended), _SLICE_ROWS):
            chunk = ended[start : start + _SLICE_ROWS]
            writer.write(chunk, [None] * len(chunk))
            await asyncio.sleep(0)
        writing = pace()
        for keys, encoded in pending.slices(_SLICE_ROWS):
            writer.write(keys, encoded)
            gone = [key for key, row in zip(keys, encoded, strict=True) if row is None]
            if gone:
                publish_ended(gone)
            rows += len(keys)
            if (pause_s := writing.next()) is not None:
                await asyncio.sleep(pause_s)
                writing.go_on()
        deadline = time.perf_counter() + timeout_s
        await _to_its_end(executor, flush_outputs, timeout_s)
        left_s = max(0.0, deadline - time.perf_counter())
        offset = await _to_its_end(executor, writer.commit, meta, left_s)
        await _to_its_end(executor, _settle, pending, {META_NAME: LocalMeta(meta, offset).encode()}, pace)
    except BaseException:
        pending.abandon()
        writer.abort()
        raise
    await commit_position(position)
    return Completed(position, rows, time.perf_counter() - started)


def _settle(pending: Checkpoint, meta: dict[str, bytes], pace: Callable[[], Pace]) -> None:
    """Write rows and meta to the local database, letting others have the store between slices."""
    settling = pace()
    for _ in pending.commit_steps(meta):
        if (pause_s := settling.next()) is not None:
            time.sleep(max(pause_s, _SHORTEST_PAUSE_S))
            settling.go_on()


class Pace:
    """Spreads slices of work evenly over a time.

    Where pauses take longer than they should, as they do beside large blocks, slices come together until the work is
    on time again, so that a checkpoint does not stretch.

    Parameters
    ----------
    slice_s: time for each slice, pause included; 0: as fast as it goes, others going now and then.
    is_urgent: whether it is to go as fast as it can from now on.
    """

    def __init__(
        self, slice_s: float, is_urgent: Callable[[], bool], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._slice_s, self._is_urgent, self._clock = slice_s, is_urgent, clock
        self._due = self._resumed = clock()

    def next(self) -> float | None:
        """To be called after each slice: seconds to pause now, 0 to let others go for a moment; None to go on."""
        self._due += self._slice_s
        now = self._clock()
        if self._due > now and not self._is_urgent():
            return self._due - now
        return 0.0 if now - self._resumed >= _STRETCH_S else None

    def go_on(self) -> None:
        """The pause is over."""
        self._resumed = self._clock()


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
