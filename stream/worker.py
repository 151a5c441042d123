"""The serving worker: a Faust app that applies the events of the partitions it owns, and publishes what comes of them.

Guaranteed: an event is applied to its row exactly once and in offset order, through crashes and rebalances; a
partition's stream does not resume before its rows are restored; parameters change between micro-batches only.
Not guaranteed: exactly-once embeddings. After a crash some are published again, with the same offset.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faust
from aiokafka.errors import KafkaConnectionError
from faust.types import TP

from stream.allocator import keep_freed_memory
from stream.clients import Clients
from stream.errors import BrokerError, LivestateError, StoreError
from stream.faust_app import make_app
from stream.kafka import ensure_topics, wait_until_reachable
from stream.membership import Membership, leave_for_good
from stream.metrics import WorkerMetrics
from stream.model.heads import Questions
from stream.model.layout import Layout
from stream.outputs import Outputs
from stream.owned import OwnedPartition
from stream.ownership import Ownership
from stream.parameter_log import ParameterReader
from stream.partition import Applied, Served
from stream.query import Health, QueryServer
from stream.rebuild import Rebuild
from stream.renewal import Renewal
from stream.restore import store_options
from stream.routing import Router
from stream.settings import Settings
from stream.store import PackedKeys
from stream.transport import BlockConsumer, FetchedBlock
from stream.versions import Versions
from stream.warmup import warm_up
from stream.wire import EmbeddingEncoder, EventDecoder, Schema
from stream.wire.record_reader import load_kernels

__all__ = ["Worker", "run_worker"]

logger = logging.getLogger(__name__)

#: For ending rows each partition has 4 % of this process's time, and all together at most 16 %: in pieces that keep no
#: block waiting for long, a partition's and all partitions' at least so far apart.
_SWEEP_INTERVAL_S, _SWEEP_PAUSE_S = 0.05, 0.0125
_CORRECTED_INTERVAL_S = 1.0
_SWEEP_BUDGET_MS = 2.0
#: Small blocks are applied for so long before others are let go. After each one would cost more: where partitions are
#: many, whoever waits for the interpreter takes it then, and the blocks that are left wait for all of them.
_STRETCH_S = 0.003


class Worker:
    """One serving worker process.

    Parameters
    ----------
    settings: as read.
    member: its lasting name in the group; without one, the group learns of a dead worker by its session's end.
    metrics: where to count; a registry of its own by default.
    """

    def __init__(self, settings: Settings, member: str | None = None, metrics: WorkerMetrics | None = None) -> None:
        self.settings = settings
        self._member = member
        self.metrics = metrics or WorkerMetrics()
        self.schema = Schema.compile(settings)
        self.layout = Layout.compile(settings, self.schema)
        self._questions = Questions(self.layout)
        width = self._questions.readout.width if settings.model.vector == "features" else self.layout.hidden
        self._decoder = EventDecoder(self.schema, settings.limits, settings.topics.format)
        self._encoder = EmbeddingEncoder(width, list(self._questions.outputs), settings.topics.embeddings_format)
        self._owned: dict[int, OwnedPartition] = {}
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._executor = ThreadPoolExecutor(max_workers=4, thread_name_prefix="checkpoint")
        self._parameters = ParameterReader(settings)
        self._outputs = Outputs(settings)
        self._warming: asyncio.Task[None] | None = None
        self._versions = Versions(self._parameters, self.layout, self._questions, self._owned, self.metrics)
        self._renewal = Renewal(
            self._versions, self._owned, self._new_rebuild, self.metrics, self._executor, self._stopping
        )
        self._ownership = Ownership(
            self._owned,
            lambda: self._consumer,
            self._renewal,
            settings,
            self.layout,
            self._decoder,
            self._encoder,
            self._outputs,
            self.metrics,
            self._executor,
        )
        self.app = self._make_app()
        self.metrics.data_dir.path = Path(settings.worker.data_dir)
        # Both are called from the thread that answers Prometheus.
        self.metrics.ready.set_function(lambda: not self._reasons())
        self.metrics.stores.read = lambda: [(n, o.partition.store.stats) for n, o in list(self._owned.items())]
        self._query = QueryServer(
            settings,
            self.metrics,
            self.health,
            Router(settings, Clients(self._owned, settings), self._address_of),
        )

    # ---------------------------------------------------------------- the Faust app

    def _make_app(self) -> faust.App:
        app = make_app(self.settings, self._member, self._take_or_fail)
        app.on_rebalance_complete.connect(self._on_assigned)
        app.on_partitions_revoked.connect(self._on_revoked)
        return app

    @property
    def _consumer(self) -> BlockConsumer:
        consumer: BlockConsumer = self.app.consumer
        return consumer

    def _fail(self, error: BaseException) -> None:
        """Remember the first failure; the process stops for it."""
        if self._failure is None:
            self._failure = error
            if not isinstance(error, LivestateError):
                logger.exception("worker failed", exc_info=error)

    # ---------------------------------------------------------------- parameters

    async def _warm_up(self) -> None:
        """Compile with the first version, which is there long before the group has assigned anything."""
        serving = await self._versions.first()
        seconds = await asyncio.get_running_loop().run_in_executor(
            self._executor,
            warm_up,
            self.schema,
            self._decoder,
            self._encoder,
            serving.latest,
            store_options(self.settings, self.layout.width),
            Path(self.settings.worker.data_dir),
        )
        # What there is now stays; the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        logger.info("kernels ready in %.1f s", seconds)

    def _new_rebuild(self, number: int, served: Served) -> Rebuild:
        return Rebuild(self.settings, number, served, self._decoder, self._encoder)

    # ---------------------------------------------------------------- ownership

    async def _on_assigned(self, *_: Any, **__: Any) -> None:
        """Restore the partitions assigned; Faust resumes the streams when this returns."""
        try:
            assert self._warming is not None
            await asyncio.shield(self._warming)
            serving = await self._versions.first()
            await self._ownership.take_over(serving)
        except Exception as error:
            self._fail(error)
            raise

    async def _on_revoked(self, *_: Any, **__: Any) -> None:
        """Let go of the partitions; who gets them next waits for this, and the group with it."""
        await self._ownership.release(self.settings.kafka.session_timeout_s * 0.5)

    # ---------------------------------------------------------------- events

    async def _take_or_fail(self, blocks: Sequence[FetchedBlock]) -> None:
        try:
            began = time.perf_counter()
            for block in blocks:
                # What else waits, questions and checkpoints among it, waits for one large block or a few small ones.
                if time.perf_counter() - began >= _STRETCH_S:
                    await asyncio.sleep(0)
                    began = time.perf_counter()
                await self._take(block)
        except Exception as error:
            self._fail(error)
            raise
        if not blocks[-1].more:
            self._outputs.hasten()
        # The next blocks may be here already.
        await asyncio.sleep(0)

    async def _take(self, block: FetchedBlock) -> None:
        owned = self._owned.get(block.partition)
        if owned is None:
            return
        async with owned.turn:
            partition = owned.partition
            if self._owned.get(block.partition) is not owned:
                return
            if not partition.follows(block):
                tp = TP(self.settings.topics.events, block.partition)
                logger.info("partition %d: reading again from %d", block.partition, partition.position)
                self._consumer.seek_block(tp, partition.position)
                return
            self._versions.swap()
            started = time.perf_counter()
            applied = partition.apply(block, owned.served)
            self._publish(block, applied)
            self._count(block, applied, time.perf_counter() - started)
        if self._failure is not None:
            raise self._failure

    def _publish(self, block: FetchedBlock, applied: Applied) -> None:
        for keys, embeddings in applied.embeddings:
            if embeddings is None:
                self._outputs.tombstones(block.partition, keys)
            else:
                self._outputs.embeddings(block.partition, keys, embeddings)
                self.metrics.batches.embeddings += len(embeddings)
        for records, rejected in applied.rejected:
            if rejected:
                self._outputs.dead_letters(block.partition, records, rejected)
            for one in rejected:
                self.metrics.dead_letters.labels(one.reason).inc()

    def _count(self, block: FetchedBlock, applied: Applied, seconds: float) -> None:
        end = self._consumer.highwater_or_none(TP(self.settings.topics.events, block.partition))
        self.metrics.batches.count(
            block.partition, len(block.records), applied.events, applied.replayed, applied.waves,
            seconds=seconds, age_s=time.time() - int(block.records.timestamps_ms[0]) / 1000.0,
            lag=None if end is None else end - block.end,
        )  # fmt: skip

    async def _sweep_regularly(self) -> None:
        """End expired rows in short slices, and delete their embeddings."""
        while True:
            numbers = sorted(self._owned)
            if not numbers:
                await asyncio.sleep(_SWEEP_INTERVAL_S)
            # One partition after the other, evenly: no block waits for the slices of all.
            for number in numbers:
                await asyncio.sleep(max(_SWEEP_INTERVAL_S / len(numbers), _SWEEP_PAUSE_S))
                owned = self._owned.get(number)
                ended = owned.partition.sweep(_SWEEP_BUDGET_MS) if owned is not None else []
                if ended:
                    self._outputs.tombstones(number, PackedKeys.from_list(ended))

    # ---------------------------------------------------------------- for HTTP

    def health(self) -> Health:
        """Whether this worker lives and whether it is ready, with the reason when it is not."""
        return Health(
            live=self._failure is None,
            reasons=tuple(self._reasons()),
            status={
                "partitions": sorted(self._owned),
                "parameter_version": self._versions.applied or None,
                "rebuilding": [number for number, _ in self._versions.outdated()],
                "positions": {str(n): o.partition.position for n, o in sorted(self._owned.items())},
                "lag": {str(n): self._lag(n, o) for n, o in sorted(self._owned.items())},
                "owners": {str(n): self._address_of(n) for n in range(self.settings.topics.partitions)},
                "trunk": None if self._versions.serving is None else self._versions.serving.latest.engine.trunk_id,
            },
        )

    def _reasons(self) -> list[str]:
        reasons = []
        if self._failure is not None:
            reasons.append(f"it ends: {self._failure}")
        elif self._stopping.is_set():
            reasons.append("it was told to stop")
        if self._versions.serving is None:
            reasons.append("no parameters yet: is the trainer running?")
        if self.app.assignor.lacks_topic:
            reasons.append(f"the brokers do not tell of topic {self.settings.topics.events!r}")
        if not self._ownership.is_restored:
            reasons.append("partitions are being assigned and restored")
        return reasons

    def _address_of(self, partition: int) -> str | None:
        address: str | None = self.app.assignor.address_of(self.settings.topics.events, partition)
        return address

    def _lag(self, number: int, owned: OwnedPartition) -> int | None:
        end = self._consumer.highwater_or_none(TP(self.settings.topics.events, number))
        return None if end is None else max(0, end - owned.partition.position)

    async def _correct_group(self) -> None:
        """Join the group again where it knows this worker by the address of a former life, and look for the topic's
        partitions again where there were none to assign: the group is joined again as soon as there are."""
        while True:
            await asyncio.sleep(_CORRECTED_INTERVAL_S)
            # Asked for until it has happened: a request that comes while the group is being joined is forgotten.
            if self.app.assignor.has_moved:
                logger.debug("the group is told of this worker's new address %s", self._query.address)
                thread = self._consumer._thread
                thread.thread_loop.call_soon_threadsafe(thread._consumer._coordinator.request_rejoin)
            # The client by itself would ask once in five minutes.
            if self.app.assignor.lacks_topic:
                logger.warning("the brokers do not tell of topic %r: asking again", self.settings.topics.events)
                thread = self._consumer._thread
                thread.thread_loop.call_soon_threadsafe(thread._consumer._client.force_metadata_update)

    # ---------------------------------------------------------------- life

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then checkpoint and leave the group.

        Raises
        ------
        LivestateError: what stopped the worker, if not a signal.
        """
        loop = asyncio.get_running_loop()
        stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        self.app.finalize()
        self._parameters.start()
        await self._query.start()
        self.app.conf.canonical_url = self._query.address
        # The consumer's thread needs these to start, and only one thread compiles at a time.
        await loop.run_in_executor(self._executor, load_kernels)
        self._warming = asyncio.create_task(self._warm_up())
        checkpoints = asyncio.create_task(self._ownership.checkpoint_regularly())
        background = [
            checkpoints,
            asyncio.create_task(self._versions.follow()),
            asyncio.create_task(self._sweep_regularly()),
            asyncio.create_task(self._renewal.run()),
            asyncio.create_task(self._correct_group()),
        ]
        try:
            await self._start_app()
            while not stopping.is_set():
                with_failure = [task for task in background if task.done()]
                for task in with_failure:
                    self._fail(task.exception() or RuntimeError("a background task ended"))
                if self._failure is None and self.app.crashed:
                    self._fail(self.app.crash_reason or RuntimeError("the Faust app crashed"))
                if self._failure is not None:
                    break
                try:
                    await asyncio.wait_for(stopping.wait(), timeout=0.2)
                except TimeoutError:
                    continue
        finally:
            self._stopping.set()
            for task in background[1:]:
                task.cancel()
            await asyncio.gather(*background[1:], return_exceptions=True)
            if self._failure is None:
                await self._stop_flow()
                # After the checkpoint that is being written, if there is one; the group still sees this worker.
                await self._ownership.release(self.settings.worker.stop_timeout_s)
            checkpoints.cancel()
            await asyncio.gather(checkpoints, return_exceptions=True)
            await self._leave()
            self._warming.cancel()
            await asyncio.gather(self._warming, return_exceptions=True)
            await self._query.stop()
            self._parameters.stop()
            self._outputs.close()
            self._executor.shutdown(wait=False, cancel_futures=True)
        if self._failure is not None:
            raise self._failure

    async def _start_app(self) -> None:
        try:
            await self.app.maybe_start()
        except KafkaConnectionError as error:
            # They were there a moment ago; see `run_worker`.
            raise BrokerError(f"the brokers at {self.settings.kafka.bootstrap_servers} went away: {error}") from error

    async def _stop_flow(self) -> None:
        """No more blocks reach the agent, so that the last checkpoint is the last."""
        self._consumer.stop_flow()
        self.app.flow_control.suspend()
        self.app.flow_control.clear()

    async def _leave(self) -> None:
        consumer = self._consumer._thread._consumer
        # Without brokers it was never made.
        if consumer is not None:
            leave_for_good(consumer)
        try:
            await asyncio.wait_for(self.app.stop(), timeout=self.settings.worker.stop_timeout_s)
        except TimeoutError:
            logger.warning("the group was not left in time; the broker will notice the silence")


def run_worker(settings: Settings, broker_timeout_s: float = 30.0) -> None:
    """Run a worker in this process until it is told to stop.

    Raises
    ------
    LivestateError: it cannot start or go on; the message says why.
    """
    keep_freed_memory()
    data_dir = Path(settings.worker.data_dir)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"worker.data_dir = {str(data_dir)!r} cannot be made: {error.strerror}") from error
    wait_until_reachable(settings, broker_timeout_s)
    ensure_topics(settings, create=False)
    with Membership(data_dir) as membership:
        member = membership.name if settings.kafka.static_membership else None
        asyncio.run(Worker(settings, member).run())
