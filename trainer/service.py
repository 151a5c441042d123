"""The trainer as a process: Kafka in, parameter versions out, checkpoints on the way.

What it reads is in `trainer.intake`. Versions go out every `publish_interval_s` when something changed, after a
rest two together; a version that is not confirmed is sent again before anything newer.

Guaranteed: what a checkpoint holds was read once; records refused since the last checkpoint are in
dead-letters before their positions are written (twice, perhaps, after a crash). A trainer that resumes behind
its last published version publishes nothing until it has read again what was there when it started, so
workers never go back.

How far it is behind is told, and what then: see `trainer.lag`.

Not guaranteed: progress without the broker. The process waits for it and says so; `/readyz` turns 503.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from stream.errors import BrokerError, Fenced, LivestateError, ParametersError
from stream.kafka import ensure_topics, wait_until_reachable
from stream.metrics import TrainerMetrics
from stream.model.parameters import ParameterSet, Tensor
from stream.settings import Settings
from trainer.gathering import Gathering
from trainer.intake import Intake
from trainer.lag import Lag
from trainer.monitoring import Health, Monitoring, RollbackRequest, Rollbacks
from trainer.online import OnlineTrainer
from trainer.pretrain import random_trunk
from trainer.publisher import Publisher, read_latest
from trainer.refusals import Refusals
from trainer.timer import Timer

__all__ = ["TrainerService"]

logger = logging.getLogger(__name__)

#: How long one partition that brings nothing may hold up the others.
_PATIENCE_S = 5.0
_RETRY_S = 1.0
_GAUGES_S = 1.0
_DEAD_LETTERS_S = 30.0
#: For more labels a version waits so long at least, and while they come at most, as shares of the time between two.
_GATHERING_SHARES = 0.1, 0.3
#: After a rest so many versions may follow each other: labels of one moment are now and then read in two parts, and the
#: larger one would wait for the whole time between two.
_TOGETHER = 2


class TrainerService:
    """One trainer.

    Parameters
    ----------
    settings: what to learn, and where the broker is.
    parameters: the trunk to start with. A checkpoint in `trainer.data_dir` goes before it; without both, the
        trunk of the last published version, and without that a random one.
    record: file to append answered examples to.
    takes_over: for another trunk: learn beside the trainer that is running, and publish nothing until everything that
        there was at the start has been read; then take over from it.
    metrics: counted into.
    clock, monotonic: UTC seconds, and seconds that never go back.
    """

    def __init__(
        self,
        settings: Settings,
        parameters: ParameterSet | None = None,
        record: Path | None = None,
        metrics: TrainerMetrics | None = None,
        takes_over: bool = False,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.metrics = metrics or TrainerMetrics()
        self.metrics.data_dir.path = Path(settings.trainer.data_dir)
        self.metrics.checkpoint_time.set(clock())
        self.health = Health()
        self.rollbacks = Rollbacks()
        self.trainer: OnlineTrainer | None = None
        self.http_port = 0
        self._parameters = parameters
        self._record = record
        self._takes_over = takes_over
        self._publisher: Publisher | None = None
        self._keeping = Timer(settings.trainer.history_interval_s)
        #: States that the version on its way was made from, where it is to be kept.
        self._states: Mapping[str, bytes] | None = None
        self._created_ms = 0
        self._rolled_back: RollbackRequest | None = None
        self._clock = clock
        self._monotonic = monotonic
        self._stopping = threading.Event()
        self._lag = Lag(settings.trainer, self.metrics, clock, monotonic)

    def stop(self) -> None:
        """Ask the running service to publish what changed, write a checkpoint and return."""
        self._stopping.set()

    def run(self, broker_timeout_s: float = 30.0) -> None:
        """Train until stopped.

        Raises
        ------
        BrokerError: the broker is not there at the start, or its topics are not.
        Fenced: another trainer has taken over.
        StoreError, ParametersError: what there is on disk does not fit the settings, or the versions published since.
        """
        settings = self.settings
        with Monitoring(
            settings.trainer.http_host, settings.trainer.http_port, self.metrics, self.health, self.rollbacks
        ) as monitoring:
            self.http_port = monitoring.port
            wait_until_reachable(settings, broker_timeout_s)
            ensure_topics(settings, create=False)
            try:
                self._train()
            finally:
                if self._publisher is not None:
                    self._publisher.close()
                self.health.ready = False

    def _train(self) -> None:
        settings = self.settings
        self._refusals = Refusals(settings)
        latest = read_latest(settings)
        published = latest[0] if latest is not None else None
        trainer = OnlineTrainer(
            settings,
            Path(settings.trainer.data_dir),
            self._initial(published),
            self.metrics,
            self._refusals.send,
            self._record,
        )
        self.trainer = trainer
        self.rollbacks.list_versions = lambda: [asdict(one) for one in trainer.history.kept]
        try:
            if self._takes_over:
                self.metrics.taking_over.set(1)
                logger.info("trunk %s is learned beside the trainer that runs", trainer.parameters.trunk_id)
            else:
                self._check_trunk(trainer, published)
                self._open_publisher(trainer)
            intake = Intake(settings, trainer.positions, self._clock)
            try:
                self._follow(intake, trainer)
            finally:
                intake.close()
        finally:
            trainer.close()

    def _check_trunk(self, trainer: OnlineTrainer, published: ParameterSet | None) -> None:
        """Before it fences anybody: a trainer whose trunk was replaced must not bring it back by being restarted.

        Raises
        ------
        ParametersError: it would.
        """
        own = trainer.parameters.trunk_id
        if published is None or not trainer.resumed or published.trunk_id == own:
            return
        if published.version > trainer.version_floor:
            raise ParametersError(
                f"version {published.version} in topic {self.settings.topics.parameters!r} has trunk "
                f"{published.trunk_id}, but the checkpoint in trainer.data_dir = "
                f"{self.settings.trainer.data_dir!r} has {own}: a rebuild has taken over; use its data directory, "
                f"or bring this trunk back with `livestate rebuild`"
            )

    def _open_publisher(self, trainer: OnlineTrainer) -> None:
        """Become the one trainer that publishes."""
        publisher = Publisher(self.settings)
        publisher.raise_floor(trainer.version_floor)
        if publisher.current is not None and publisher.current.trunk_id == trainer.parameters.trunk_id:
            trainer.serve(publisher.current)
        self._publisher = publisher
        trainer.touched.compare(publisher.current)
        self.metrics.taking_over.set(0)
        logger.info(
            "trainer publishes: %s, trunk %s, last version %d, epoch %d",
            "from its checkpoint" if trainer.resumed else "anew",
            trainer.parameters.trunk_id,
            publisher.version,
            publisher.epoch,
        )

    def _initial(self, published: ParameterSet | None) -> ParameterSet:
        if self._parameters is not None:
            return self._parameters
        if published is not None:
            return published
        return random_trunk(self.settings, [])

    def _follow(self, intake: Intake, trainer: OnlineTrainer) -> None:
        settings = self.settings
        published = self._publisher.current if self._publisher is not None else None
        if not self._takes_over and (published is None or published.trunk_id != trainer.parameters.trunk_id):
            # There is no version that an earlier one could follow.
            intake.take_as_caught_up()
        checkpoints = Timer(settings.trainer.checkpoint_interval_s)
        checkpoints.is_due(self._monotonic())
        publishing = Timer(settings.trainer.publish_interval_s, _TOGETHER)
        dense = Timer(settings.trainer.dense_interval_s, _TOGETHER)
        gauges, retries = Timer(_GAUGES_S), Timer(_RETRY_S)
        gathering = Gathering(*(share * settings.trainer.publish_interval_s for share in _GATHERING_SHARES))
        first = True
        moved_at = self._monotonic()
        self._observe(intake, trainer)
        self.health.ready = True
        while not self._stopping.is_set():
            now = self._monotonic()
            is_gathered = gathering.is_over(trainer.unpublished(), now)
            if self._publisher is None:
                if not intake.is_catching_up:
                    self._open_publisher(trainer)
            elif self._publisher.is_waiting:
                if retries.is_due(now):
                    first = not self._publish(trainer) and first
            elif not self.rollbacks.requests.empty():
                first = not self._roll_back(intake, trainer, self.rollbacks.requests.get()) and first
            elif (
                (first or trainer.has_changed or trainer.guards.holds_news)
                and (first or is_gathered)
                and not intake.is_catching_up
                and publishing.is_due(now)
            ):
                trainer.guards.count_held_back()
                with_tensors = dense.is_due(now) or first
                if first or (with_tensors and trainer.has_changed) or trainer.touched:
                    first = not self._publish(trainer, with_tensors) and first
            intake.fetch()
            self._lag.note(intake.oldest_ms)
            trainer.teaching.label_share = self._lag.label_share
            moved = self._apply(intake, trainer)
            now = self._monotonic()
            if moved or intake.is_empty:
                moved_at = now
            elif now - moved_at > _PATIENCE_S:
                intake.stop_waiting()
            if checkpoints.is_due(now) or trainer.needs_checkpoint:
                self._checkpoint(trainer)
            if gauges.is_due(now):
                self._observe(intake, trainer)
        if self._publisher is not None and (trainer.has_changed or self._publisher.is_waiting):
            self._publish(trainer)
        self._checkpoint(trainer, _DEAD_LETTERS_S)
        self._observe(intake, trainer)

    def _apply(self, intake: Intake, trainer: OnlineTrainer) -> bool:
        """Apply what is ready, until a checkpoint is wanted or time is up."""
        moved = False
        until = self._monotonic() + self.settings.trainer.publish_interval_s / 2
        while True:
            blocked = [p for p in range(self.settings.topics.partitions) if trainer.joiner.is_full(p)]
            ready = intake.take(blocked)
            if not ready:
                break
            moved = True
            trainer.apply_events(ready.events)
            trainer.apply_feedback(ready.feedback)
            if trainer.needs_checkpoint or self._monotonic() > until:
                break
        return moved

    def _publish(self, trainer: OnlineTrainer, with_tensors: bool = True) -> bool:
        """Publish what has changed, or what waits; tensors stay as they are published unless they are wanted."""
        publisher = self._publisher
        assert publisher is not None
        started = self._monotonic()
        try:
            if publisher.is_waiting:
                version = publisher.retry()
            else:
                tensors: Mapping[str, Tensor] = publisher.current or {}
                feedback_ms: list[int] = []
                self._included, self._states = {}, None
                if with_tensors:
                    tensors, feedback_ms = trainer.tensors(), trainer.feedback_ms()
                    self._included = trainer.unpublished()
                    # A version with a task's part of an earlier one has no state of its own.
                    may_keep = not trainer.guards.held and self._keeping.is_due(self._monotonic())
                    is_kept = self._rolled_back is not None or may_keep
                    self._states = trainer.states() if is_kept else None
                self._created_ms = int(self._clock() * 1000)
                version = publisher.publish(tensors, feedback_ms, self._created_ms, trainer.touched.offer())
        except Fenced:
            raise
        except BrokerError as error:
            self.metrics.publish_failures.inc()
            self.health.ready = False
            logger.warning("%s; it is tried again", error)
            return False
        self.health.ready = True
        trainer.confirm(self._included)
        trainer.touched.confirm()
        trainer.serve(version)
        request, self._rolled_back = self._rolled_back, None
        if self._states is not None:
            equals = request.version if request is not None else None
            trainer.keep(version, publisher.epoch, self._created_ms, self._states, equals)
        if request is not None:
            logger.info("version %d equals version %d: rolled back", version.version, request.version)
            request.published = version.version
            request.done.set()
        self.metrics.publish_seconds.observe(self._monotonic() - started)
        self.metrics.versions_published.inc()
        self.metrics.version.set(version.version)
        return True

    def _roll_back(self, intake: Intake, trainer: OnlineTrainer, request: RollbackRequest) -> bool:
        """Publish a version that equals an earlier one; returns whether it was confirmed.

        The learners' states are in a checkpoint before anybody is served from them: a trainer that is killed in
        between publishes the same.
        """
        try:
            if intake.is_catching_up:
                raise BrokerError("the trainer is still reading what there was when it started; ask again")
            trainer.roll_back(request.version)
        except LivestateError as error:
            request.error = error
            request.done.set()
            return False
        while not self._checkpoint(trainer, _DEAD_LETTERS_S):
            if self._stopping.is_set():
                request.error = BrokerError("the trainer was told to stop; ask again")
                request.done.set()
                return False
        self._rolled_back = request
        return self._publish(trainer)

    def _checkpoint(self, trainer: OnlineTrainer, patience_s: float = 1.0) -> bool:
        """Write a checkpoint; False, and none, where dead letters that belong before it are still on their way."""
        started = self._monotonic()
        waiting = self._refusals.flush(patience_s)
        if waiting:
            logger.warning("no checkpoint: %d dead letters wait for the broker", waiting)
            return False
        trainer.checkpoint(0 if self._publisher is None else self._publisher.version)
        self.metrics.checkpoint_seconds.observe(self._monotonic() - started)
        self.metrics.checkpoint_time.set(self._clock())
        return True

    def _observe(self, intake: Intake, trainer: OnlineTrainer) -> None:
        trainer.observe_metrics()
        self._lag.note(intake.oldest_ms)
        self._lag.tell(intake.waiting())
