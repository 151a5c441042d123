"""The partitions that a worker owns: taken over with the group's word, checkpointed in turn, and let go of.

Guaranteed: a partition is restored before it is owned, and from the changelog's end once its former owner is fenced;
one that is given up has a last checkpoint where time is left, and nothing of it is written afterwards. Not guaranteed:
that the group knows. Of two workers that both believe to own a partition, the broker lets one write.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor

from faust.types import TP

from stream.errors import BrokerError, Fenced, LivestateError
from stream.metrics import WorkerMetrics
from stream.model.layout import Layout
from stream.outputs import Outputs
from stream.owned import OwnedPartition
from stream.partition import Partition, Serving
from stream.renewal import Renewal
from stream.restore import restore_partition
from stream.settings import Settings
from stream.transport import BlockConsumer
from stream.wire import EmbeddingEncoder, EventDecoder

__all__ = ["CHECKPOINT_TIMEOUT_S", "Ownership"]

logger = logging.getLogger(__name__)

#: For the broker to confirm a checkpoint.
CHECKPOINT_TIMEOUT_S = 60.0
#: Share of a partition's time between the checkpoints of two partitions over which its work is spread: events come
#: the later the denser it is, and a slow broker needs some time as well.
_SPREAD = 0.8


class Ownership:
    """Takes partitions over, checkpoints them and lets go of them.

    Parameters
    ----------
    owned: by number; others may look, only this changes it.
    consumer: the group's; asked for when it is there.
    """

    def __init__(
        self,
        owned: dict[int, OwnedPartition],
        consumer: Callable[[], BlockConsumer],
        renewal: Renewal,
        settings: Settings,
        layout: Layout,
        decoder: EventDecoder,
        encoder: EmbeddingEncoder,
        outputs: Outputs,
        metrics: WorkerMetrics,
        executor: Executor,
    ) -> None:
        self._owned = owned
        self._consumer = consumer
        self._renewal = renewal
        self._settings = settings
        self._layout = layout
        self._decoder = decoder
        self._encoder = encoder
        self._outputs = outputs
        self._metrics = metrics
        self._executor = executor
        #: Given up, and still open for a checkpoint that was being written.
        self._closing: dict[int, OwnedPartition] = {}
        #: Held while partitions are taken or let go of: a rebalance may begin before the one before it is dealt with.
        self._changing_hands = asyncio.Lock()
        #: Whether all that the group assigned is owned.
        self.is_restored = False

    async def take_over(self, serving: Serving) -> None:
        """Own what the group assigned.

        Raises
        ------
        LivestateError: a partition cannot be restored.
        """
        async with self._changing_hands:
            numbers = self._assigned()
            self._metrics.rebalances.inc()
            loop = asyncio.get_running_loop()
            missing = [number for number in numbers if number not in self._owned]
            self._metrics.restoring.set(len(missing))
            await asyncio.gather(*(self._closing.pop(n).closed.wait() for n in missing if n in self._closing))
            restored = await asyncio.gather(
                *(loop.run_in_executor(self._executor, self._restore, number, serving) for number in missing),
                return_exceptions=True,
            )
            still = self._assigned()
            for number, result in zip(missing, restored, strict=True):
                if not isinstance(result, BaseException):
                    if number in still:
                        self._owned[number] = result
                        self._metrics.checkpoint_time.labels(str(number)).set(time.time())
                    else:
                        # Taken away while it was restored: who has it now opens it anew.
                        result.close()
                        self._outputs.give_up(number)
            for result in restored:
                if isinstance(result, BaseException):
                    raise result
            self._consumer().start_positions = self._start_positions
            self._metrics.partitions.set(len(self._owned))
            self._metrics.restoring.set(0)
            self.is_restored = True
            logger.info("serving partitions %s", sorted(self._owned))

    def _assigned(self) -> list[int]:
        return sorted({tp.partition for tp in self._consumer().assignment() if self._is_events(tp)})

    def _is_events(self, tp: TP) -> bool:
        return str(tp.topic) == self._settings.topics.events

    def _start_positions(self, assignment: Iterable[TP]) -> Mapping[TP, int]:
        return {
            tp: self._owned[tp.partition].partition.position
            for tp in assignment
            if self._is_events(tp) and tp.partition in self._owned
        }

    def _restore(self, number: int, serving: Serving) -> OwnedPartition:
        self._outputs.begin(number)
        restored = restore_partition(
            self._settings,
            number,
            width=self._layout.width,
            trunk=serving.latest.engine.trunk_id,
            layout=self._layout.fingerprint,
        )
        self._metrics.restored_rows.inc(restored.rows)
        self._metrics.restore_seconds.observe(restored.seconds)
        logger.info(
            "partition %d restored: %d rows from the changelog in %.2f s", number, restored.rows, restored.seconds
        )
        is_renewed = restored.store is None
        if restored.store is None:
            partition = self._renewal.rebuilt(number, serving.latest)
        else:
            partition = Partition(number, restored.store, restored.position, self._decoder, self._encoder)
        return OwnedPartition(
            self._settings,
            self._layout.fingerprint,
            partition,
            restored.writer,
            serving,
            self._outputs,
            self._executor,
            is_renewed,
        )

    async def release(self, budget_s: float) -> None:
        """Checkpoint what is owned, within the time budget, and let go of it."""
        async with self._changing_hands:
            owned = dict(self._owned)
            self._owned.clear()
            self.is_restored = False
            self._metrics.partitions.set(0)
            await asyncio.gather(*(self._let_go(number, one, budget_s) for number, one in owned.items()))

    async def _let_go(self, number: int, owned: OwnedPartition, budget_s: float) -> None:
        try:
            await asyncio.wait_for(self._checkpoint(owned, budget_s), timeout=budget_s + 1.0)
        except (LivestateError, TimeoutError) as error:
            # What is not checkpointed here is replayed by the next owner from the last checkpoint.
            logger.warning("partition %d is given up without a last checkpoint: %s", number, error)
        finally:
            self._close(number, owned)

    def _close(self, number: int, owned: OwnedPartition) -> None:
        """Let go of a partition, and of its metrics: another worker serves it."""
        owned.close()
        self._outputs.give_up(number)
        self._closing[number] = owned
        self._metrics.batches.lag.pop(number, None)
        self._metrics.checkpoint_time.remove_by_labels({"partition": str(number)})

    async def _checkpoint(self, owned: OwnedPartition, timeout_s: float, spread_s: float = 0.0) -> None:
        tp = TP(self._settings.topics.events, owned.partition.number)

        async def commit_position(position: int) -> bool:
            consumer = self._consumer()
            # Of a partition taken away meanwhile nothing is left to commit, which Faust would take for a crash.
            return tp in consumer.assignment() and await consumer.commit_positions({tp: position})

        try:
            done = await owned.checkpoint(commit_position, timeout_s, spread_s)
        except LivestateError:
            self._metrics.checkpoint_failures.inc()
            raise
        self._metrics.checkpoints.inc()
        self._metrics.checkpoint_rows.inc(done.rows)
        self._metrics.checkpoint_seconds.observe(done.seconds)
        self._metrics.checkpoint_time.labels(str(owned.partition.number)).set(time.time())

    async def checkpoint_regularly(self) -> None:
        """Checkpoint one partition after the other, each once in `worker.checkpoint_interval_s`, for ever.

        Raises
        ------
        BrokerError: what a checkpoint would confirm is lost, so that trying again is no use.
        """
        interval_s = self._settings.worker.checkpoint_interval_s
        clock = asyncio.get_running_loop().time
        due = clock()
        while True:
            numbers = sorted(self._owned)
            if not numbers:
                await asyncio.sleep(interval_s)
            # One partition after the other, evenly over the interval: no moment has the work of all.
            for number in numbers:
                share_s = interval_s / len(numbers)
                due = max(due + share_s, clock())
                await asyncio.sleep(due - clock())
                owned = self._owned.get(number)
                if owned is None:
                    continue
                try:
                    await self._checkpoint(owned, CHECKPOINT_TIMEOUT_S, _SPREAD * share_s)
                except Fenced as error:
                    # Another worker owns it; the group will tell this one in its next rebalance.
                    logger.warning("%s", error)
                    if self._owned.get(number) is owned:
                        del self._owned[number]
                        self._close(number, owned)
                except BrokerError as error:
                    is_mine = self._owned.get(number) is owned
                    if self._outputs.failure is not None or (is_mine and owned.writer.is_broken):
                        raise
                    logger.warning("checkpoint of partition %d is tried again later: %s", number, error)
