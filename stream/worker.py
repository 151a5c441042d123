"""The serving worker: a Faust app that owns partitions, restores, applies, publishes and checkpoints them.

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
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faust
from faust.types import TP

from stream.addresses import AddressAssignor
from stream.allocator import keep_freed_memory
from stream.clients import Clients
from stream.errors import BrokerError, Fenced, LivestateError, StoreError
from stream.kafka import ensure_topics, wait_until_reachable
from stream.membership import Membership, leave_for_good
from stream.metrics import WorkerMetrics
from stream.model.heads import Questions
from stream.model.layout import Layout
from stream.outputs import Outputs
from stream.owned import OwnedPartition
from stream.parameter_log import ParameterReader
from stream.partition import Applied, Partition, Served, Serving
from stream.query import Health, QueryServer
from stream.rebuild import Rebuild
from stream.renewal import Renewal
from stream.restore import restore_partition, store_options
from stream.routing import Router
from stream.settings import Settings
from stream.store import PackedKeys
from stream.transport import BlockConsumer, BlockSchema, BlockTransport, FetchedBlock, broker_credentials
from stream.versions import Versions
from stream.warmup import warm_up
from stream.wire import EmbeddingEncoder, EventDecoder, Schema
from stream.wire.record_reader import load_kernels

__all__ = ["CHECKPOINT_TIMEOUT_S", "Worker", "run_worker"]

logger = logging.getLogger(__name__)

#: For the broker to confirm a checkpoint.
CHECKPOINT_TIMEOUT_S = 60.0
_SWEEP_INTERVAL_S = 0.1
_MOVED_INTERVAL_S = 1.0
_SWEEP_BUDGET_MS = 4.0


class _App(faust.App):
    def _new_transport(self) -> Any:
        return BlockTransport(self.conf.broker_consumer, self)


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
        #: Given up, and still open for a checkpoint that was being written.
        self._closing: dict[int, OwnedPartition] = {}
        #: Held while partitions are taken or let go of: a rebalance may begin before the one before it is dealt with.
        self._changing_hands = asyncio.Lock()
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._restored = False
        self._executor = ThreadPoolExecutor(max_workers=4, thread_name_prefix="checkpoint")
        self._parameters = ParameterReader(settings)
        self._outputs = Outputs(settings)
        self._warming: asyncio.Task[None] | None = None
        self._versions = Versions(self._parameters, self.layout, self._questions, self._owned, self.metrics)
        self._renewal = Renewal(
            self._versions, self._owned, self._new_rebuild, self.metrics, self._executor, self._stopping
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

    def _make_app(self) -> _App:
        settings = self.settings
        servers = settings.kafka.bootstrap_servers.replace(",", ";kafka://")
        app = _App(
            f"{settings.kafka.group}-workers",
            broker=f"kafka://{servers}",
            broker_credentials=broker_credentials(settings.kafka),
            broker_max_poll_records=settings.worker.batch_records,
            broker_session_timeout=settings.kafka.session_timeout_s,
            broker_heartbeat_interval=settings.kafka.session_timeout_s / 5.0,
            broker_request_timeout=max(60.0, settings.kafka.session_timeout_s + 5.0),
            broker_commit_livelock_soft_timeout=24 * 3600.0,
            stream_processing_timeout=24 * 3600.0,
            consumer_auto_offset_reset="earliest",
            consumer_group_instance_id=self._member,
            consumer_max_fetch_size=max(1_048_576, 2 * settings.limits.record_bytes),
            stream_buffer_maxsize=4,
            stream_wait_empty=False,
            topic_disable_leader=True,
            topic_allow_declare=False,
            web_enabled=False,
            store="memory://",
            datadir=str(Path(settings.worker.data_dir) / "faust"),
            PartitionAssignor=AddressAssignor,
        )
        events = app.topic(settings.topics.events, schema=BlockSchema(), acks=False)

        async def advance_states(stream: Any) -> None:
            async for block in stream:
                try:
                    await self._take(block)
                except Exception as error:
                    self._fail(error)
                    raise

        app.agent(events, name="advance_states")(advance_states)
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
            async with self._changing_hands:
                await self._take_over(serving)
        except Exception as error:
            self._fail(error)
            raise

    async def _take_over(self, serving: Serving) -> None:
        numbers = self._assigned()
        self.metrics.rebalances.inc()
        loop = asyncio.get_running_loop()
        missing = [number for number in numbers if number not in self._owned]
        self.metrics.restoring.set(len(missing))
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
                    self.metrics.checkpoint_time.labels(str(number)).set(time.time())
                else:
                    # Taken away while it was restored: who has it now opens it anew.
                    result.close()
                    self._outputs.give_up(number)
        for result in restored:
            if isinstance(result, BaseException):
                raise result
        self._consumer.start_positions = self._start_positions
        self.metrics.partitions.set(len(self._owned))
        self.metrics.restoring.set(0)
        self._restored = True
        logger.info("serving partitions %s", sorted(self._owned))

    def _assigned(self) -> list[int]:
        return sorted({tp.partition for tp in self._consumer.assignment() if self._is_events(tp)})

    def _is_events(self, tp: TP) -> bool:
        return str(tp.topic) == self.settings.topics.events

    def _start_positions(self, assignment: Iterable[TP]) -> Mapping[TP, int]:
        return {
            tp: self._owned[tp.partition].partition.position
            for tp in assignment
            if self._is_events(tp) and tp.partition in self._owned
        }

    def _restore(self, number: int, serving: Serving) -> OwnedPartition:
        self._outputs.begin(number)
        restored = restore_partition(
            self.settings,
            number,
            width=self.layout.width,
            trunk=serving.latest.engine.trunk_id,
            layout=self.layout.fingerprint,
        )
        self.metrics.restored_rows.inc(restored.rows)
        self.metrics.restore_seconds.observe(restored.seconds)
        logger.info(
            "partition %d restored: %d rows from the changelog in %.2f s", number, restored.rows, restored.seconds
        )
        is_renewed = restored.store is None
        if restored.store is None:
            partition = self._renewal.rebuilt(number, serving.latest)
        else:
            partition = Partition(number, restored.store, restored.position, self._decoder, self._encoder)
        return OwnedPartition(
            self.settings,
            self.layout.fingerprint,
            partition,
            restored.writer,
            serving,
            self._outputs,
            self._executor,
            is_renewed,
        )

    async def _on_revoked(self, *_: Any, **__: Any) -> None:
        """Checkpoint what is owned, within the time budget, and let go of it."""
        async with self._changing_hands:
            # Whoever gets them next waits for this, and the group with it.
            await self._release(self.settings.kafka.session_timeout_s * 0.5)

    async def _release(self, budget_s: float) -> None:
        owned = dict(self._owned)
        self._owned.clear()
        self._restored = False
        self.metrics.partitions.set(0)
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
        self.metrics.batches.lag.pop(number, None)
        self.metrics.checkpoint_time.remove_by_labels({"partition": str(number)})

    # ---------------------------------------------------------------- events

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

    # ---------------------------------------------------------------- checkpoints

    async def _checkpoint(self, owned: OwnedPartition, timeout_s: float, spread_s: float = 0.0) -> None:
        tp = TP(self.settings.topics.events, owned.partition.number)

        async def commit_position(position: int) -> bool:
            # Of a partition taken away meanwhile nothing is left to commit, which Faust would take for a crash.
            return tp in self._consumer.assignment() and await self._consumer.commit_positions({tp: position})

        try:
            done = await owned.checkpoint(commit_position, timeout_s, spread_s)
        except LivestateError:
            self.metrics.checkpoint_failures.inc()
            raise
        self.metrics.checkpoints.inc()
        self.metrics.checkpoint_rows.inc(done.rows)
        self.metrics.checkpoint_seconds.observe(done.seconds)
        self.metrics.checkpoint_time.labels(str(owned.partition.number)).set(time.time())

    async def _checkpoint_regularly(self) -> None:
        interval_s = self.settings.worker.checkpoint_interval_s
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
                    await self._checkpoint(owned, CHECKPOINT_TIMEOUT_S, 0.5 * share_s)
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

    async def _sweep_regularly(self) -> None:
        """End expired rows in short slices, and delete their embeddings."""
        while True:
            await asyncio.sleep(_SWEEP_INTERVAL_S)
            for number, owned in list(self._owned.items()):
                if self._owned.get(number) is not owned:
                    continue
                ended = owned.partition.sweep(_SWEEP_BUDGET_MS)
                if ended:
                    self._outputs.tombstones(number, PackedKeys.from_list(ended))
                await asyncio.sleep(0)

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
        if self._versions.serving is None:
            reasons.append("no parameters yet: is the trainer running?")
        if not self._restored:
            reasons.append("partitions are being assigned and restored")
        return reasons

    def _address_of(self, partition: int) -> str | None:
        address: str | None = self.app.assignor.address_of(self.settings.topics.events, partition)
        return address

    def _lag(self, number: int, owned: OwnedPartition) -> int | None:
        end = self._consumer.highwater_or_none(TP(self.settings.topics.events, number))
        return None if end is None else max(0, end - owned.partition.position)

    async def _tell_address(self) -> None:
        """Join the group again where it knows this worker by the address of a former life."""
        while True:
            await asyncio.sleep(_MOVED_INTERVAL_S)
            # Asked for until it has happened: a request that comes while the group is being joined is forgotten.
            if self.app.assignor.has_moved:
                logger.debug("the group is told of this worker's new address %s", self._query.address)
                thread = self._consumer._thread
                thread.thread_loop.call_soon_threadsafe(thread._consumer._coordinator.request_rejoin)

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
        checkpoints = asyncio.create_task(self._checkpoint_regularly())
        background = [
            checkpoints,
            asyncio.create_task(self._versions.follow()),
            asyncio.create_task(self._sweep_regularly()),
            asyncio.create_task(self._renewal.run()),
            asyncio.create_task(self._tell_address()),
        ]
        try:
            await self.app.maybe_start()
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
                async with self._changing_hands:
                    # After the one that is being written, if there is one; the group still sees this worker.
                    await self._release(self.settings.worker.stop_timeout_s)
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

    async def _stop_flow(self) -> None:
        """No more blocks reach the agent, so that the last checkpoint is the last."""
        self._consumer.stop_flow()
        self.app.flow_control.suspend()
        self.app.flow_control.clear()

    async def _leave(self) -> None:
        leave_for_good(self._consumer._thread._consumer)
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
