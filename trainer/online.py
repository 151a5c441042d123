"""The trainer itself, without Kafka: events and feedback in, heads out, checkpoints on the way.

Events advance the trainer's own rows with the workers' engine and leave an example at each event that asks
for a prediction; feedback answers examples; answered examples are learned. Positions of both inputs move with
what was applied, and a checkpoint writes all of it as one.

Guaranteed: after `OnlineTrainer` is opened again on the same directory, everything in it is of the last
checkpoint's instant, and applying the input from `positions` again leads to the same state, bit for bit, if
it comes in the same order. An event applied twice changes nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgpack
import numpy as np

from stream.errors import ParametersError, RecordError, StoreError
from stream.metrics import TrainerMetrics
from stream.model.engine import Engine
from stream.model.heads import Questions
from stream.model.layout import Layout
from stream.model.parameters import ParameterSet, Tensor
from stream.settings import Settings, row_ttls
from stream.wire import EventDecoder, Schema, decode_feedback
from trainer.capture import Capture
from trainer.checkpoint import Changes, Database, pack_array, unpack_array
from trainer.delays import Delays
from trainer.guards import Guards
from trainer.history import History, KeptVersion
from trainer.joiner import Joiner
from trainer.learner import TaskLearner
from trainer.poison import Poison
from trainer.record import Recorder
from trainer.replica import Replica, late_events
from trainer.sampling import NegativeSampling
from trainer.teaching import Teaching
from trainer.timeline import EVENTS, FEEDBACK, Record, block_of
from trainer.touched import TouchedRows
from trainer.trunk_training import STATE, TrunkTraining

__all__ = ["BATCH_RECORDS", "OnlineTrainer"]

logger = logging.getLogger(__name__)

BATCH_RECORDS = 5_000
_STATE = b"m/state"
_PARAMETER = b"p/"

#: Called with a feedback record that cannot be used, and why.
Refuse = Callable[[Record, RecordError], None]


class OnlineTrainer:
    """Everything the trainer knows.

    Parameters
    ----------
    settings: what to learn.
    directory: of its database; one trainer at a time.
    parameters: the trunk to start with, where the directory has no checkpoint; ignored otherwise. Heads in it
        are served until they are learned here, where they fit the settings.
    metrics: counted into.
    refuse: called for each feedback record that is no valid feedback.
    record: file to append answered examples to.

    Raises
    ------
    StoreError: the directory is locked, damaged, or was written under other settings.
    ParametersError: the parameters do not fit the settings.
    """

    def __init__(
        self,
        settings: Settings,
        directory: Path,
        parameters: ParameterSet | None,
        metrics: TrainerMetrics,
        refuse: Refuse,
        record: Path | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self._refuse = refuse
        self.layout = Layout.compile(settings, Schema.compile(settings))
        self._decoder = EventDecoder(self.layout.schema, settings.limits, settings.topics.format)
        self.questions = Questions(self.layout)
        self.database = Database(directory)
        try:
            self._resume(parameters, record)
        except BaseException:
            self.database.close()
            raise

    def _resume(self, parameters: ParameterSet | None, record: Path | None) -> None:
        settings, database = self.settings, self.database
        state = database.get(_STATE)
        self.resumed = state is not None
        self.positions: dict[tuple[int, int], int] = {}
        self.version_floor = 0
        recorded = 0
        watermarks: dict[int, int] = {}
        waiting = 0
        if state is not None:
            loaded = msgpack.unpackb(state, strict_map_key=False)
            if loaded["layout"] != self.layout.fingerprint:
                raise StoreError(
                    f"the checkpoint in {str(database.path)!r} was made with other model, memory or field "
                    f"settings: restore them, or use another trainer.data_dir and start anew"
                )
            self.positions = {(kind, p): offset for kind, p, offset in loaded["positions"]}
            self.version_floor = loaded["version"]
            written, wanted = "online" if loaded.get("online") else "fixed", settings.model.trunk
            if written != wanted:
                raise StoreError(
                    f"the checkpoint in {str(database.path)!r} was made with model.trunk = {written!r}, which is "
                    f"{wanted!r} now: restore it, or bring the trunk in with `livestate rebuild`"
                )
            recorded = loaded["recorded"]
            watermarks = dict(loaded["watermarks"])
            waiting = loaded["waiting"]
            parameters = ParameterSet(
                {key.removeprefix(_PARAMETER).decode(): unpack_array(value) for key, value in database.scan(_PARAMETER)}
            )
        if parameters is None:
            raise StoreError(
                f"the trainer's database {str(database.path)!r} has no checkpoint and no parameters were given"
            )
        parameters = self._fitting(parameters).of_kind(settings.model.trunk)
        self.parameters = parameters
        #: As the database has them.
        self._saved: Mapping[str, Tensor] = parameters if self.resumed else {}
        self.engine = Engine(self.layout, parameters)
        self.engine.cell.self_check(np.random.default_rng(settings.model.seed))
        self.joiner = Joiner(
            database,
            {name: int(task.feedback_ttl_s * 1000) for name, task in settings.tasks.items()},
            lambda task, outcome: self.metrics.feedback.labels(task, outcome).inc(),
            [name for name, task in settings.tasks.items() if task.labels != "as_they_come"],
            {
                question.task: Delays(
                    question.strata,
                    int(settings.tasks[question.task].feedback_ttl_s * 1000),
                    settings.tasks[question.task].final_share,
                )
                for question in self.questions.tasks
                if settings.tasks[question.task].labels == "final" and settings.tasks[question.task].kind == "binary"
            },
        )
        self.joiner.watermarks = watermarks
        self.joiner.waiting = waiting
        self.learners = {
            question.task: TaskLearner(
                question.task,
                question.is_state,
                question.settings,
                settings.model.seed,
                question.groups,
                question.is_number,
            )
            for question in self.questions.tasks
        }
        for learner in self.learners.values():
            learner.load(database)
        sampling = {
            name: NegativeSampling(name, task.negative_rate, settings.model.seed)
            for name, task in settings.tasks.items()
        }
        poison = Poison(settings, self.metrics, self._refuse)
        self.trunk = (
            TrunkTraining(
                self.layout, database, parameters, self.learners,
                {name: one.log_odds_offset for name, one in sampling.items()},
                self.metrics, poison.send,
            )
            if parameters.is_online else None
        )  # fmt: skip
        beside = None if self.trunk is None else self.trunk.windows
        self.replica = Replica(
            database, self.layout.width, settings.store.memory_rows, *row_ttls(settings), beside=beside
        )
        self.history = History(database, settings.trainer.history_versions)
        self.guards = Guards(self.learners, settings, metrics=self.metrics)
        self.guards.load(database)
        self.touched = TouchedRows(self.learners, self.guards)
        self.recorder = Recorder(record, recorded) if record is not None else None
        self._recorded = recorded
        self.teaching = Teaching(self.learners, sampling, self.guards, poison, self.trunk, self.recorder, self.metrics)
        self._capture = Capture(self.questions, self.joiner, self.learners, self.teaching, self.recorder, self.metrics)
        self.serve(parameters)

    def serve(self, parameters: ParameterSet) -> None:
        """Predict with these parameters' heads from now on: those that the workers have."""
        self._served = self._fitting(parameters)
        self._capture.serve(self._served)

    def _fitting(self, parameters: ParameterSet) -> ParameterSet:
        """Without the heads of tasks that the settings no longer have, or have otherwise."""
        return parameters.updated({}, parameters.version, self.questions.unfit(parameters))

    @property
    def needs_checkpoint(self) -> bool:
        """True when memory wants one before its time."""
        return self.replica.is_full or self.joiner.needs_checkpoint

    def apply_events(self, records: Sequence[Record]) -> int:
        """Apply event records in order, of any partitions; returns how many changed a row."""
        applied = 0
        for start in range(0, len(records), BATCH_RECORDS):
            applied += self._apply_batch(records[start : start + BATCH_RECORDS])
        self.metrics.events.inc(applied)
        return applied

    def _apply_batch(self, records: Sequence[Record]) -> int:
        # The engine compares offsets within a row, and a row is of one partition: the batch may mix
        # partitions.
        columns = self._decoder.decode(block_of(records))
        accepted = np.flatnonzero(columns.accepted).tolist()
        events = 0
        if accepted:
            slots = np.full(columns.n, -1, np.int64)
            slots[accepted] = self.replica.slots(
                [records[i].key or b"" for i in accepted],
                [records[i].partition for i in accepted],
                self.joiner.watermarks,
            )
            late = late_events(slots, columns.timestamp_ms, columns.offsets, self.replica)
            self.replica.prolong(slots, columns.timestamp_ms, columns.offsets, columns.modality)
            advanced = self.engine.advance(columns, slots, self.replica)
            events = advanced.events
            if self.trunk is not None:
                self.trunk.windows.extend(advanced.encoded, columns.timestamp_ms, self.engine)
            self._capture.take(records, columns, advanced.triggers, late)
            partitions = np.array([record.partition for record in records], np.int64)
            for partition in np.unique(partitions[accepted]).tolist():
                own = columns.timestamp_ms[columns.accepted & (partitions == partition)]
                self.joiner.advance(partition, int(own.max()))
            self.metrics.stream_time.set(max(self.joiner.watermarks.values()) / 1000.0)
        self._move(EVENTS, records)
        return events

    def apply_feedback(self, records: Sequence[Record]) -> None:
        """Apply feedback records in order, of any partitions."""
        for record in records:
            try:
                feedback = decode_feedback(record.key, record.value, record.headers, self.settings)
            except RecordError as error:
                self.metrics.dead_letters.labels(error.reason).inc()
                self._refuse(record, error)
                continue
            joined = self.joiner.feedback(record.partition, feedback, record.timestamp_ms)
            if joined is not None:
                self.teaching.learn(joined)
            self._capture.settle(lambda: self.joiner.watermarks, record.timestamp_ms)
            if self.trunk is not None:
                self._go_on_with(self.trunk.learn(self.replica, self.joiner.watermarks))
        self._move(FEEDBACK, records)

    def _go_on_with(self, learned: Mapping[str, Tensor] | None) -> None:
        """Move rows on under a trunk with these tensors; None: as it is."""
        if learned is not None:
            self.parameters = self.parameters.updated(learned, self.parameters.version)
            self.engine = self.engine.moved(self.parameters)

    def _move(self, kind: int, records: Sequence[Record]) -> None:
        for record in records:
            self.positions[kind, record.partition] = record.offset + 1

    def tensors(self) -> dict[str, Tensor]:
        """What a version published now would hold: the trunk, and every task's head; of one that is held back, what is
        served. The rows of tables are `touched`."""
        if self.trunk is not None:
            self.trunk.offer()
        return {**self.parameters, **self.guards.tensors(self._served)}

    @property
    def has_changed(self) -> bool:
        """Whether something was learned that no confirmed version has and that may be published."""
        moved = self.trunk is not None and self.trunk.has_changed
        return moved or bool(self.unpublished()) or bool(self.touched)

    def unpublished(self) -> dict[str, int]:
        """By task, how many labels its posterior has that no confirmed version has; none of one that is held back."""
        return self.guards.unpublished()

    def feedback_ms(self) -> list[int]:
        """Kafka's times of the feedback that the next version is the first to include."""
        return [at for task in self.unpublished() for at in self.learners[task].included]

    def confirm(self, included: dict[str, int]) -> None:
        """These many labels of each task are in a confirmed version."""
        self.guards.confirm(included)
        if self.trunk is not None:
            self.trunk.confirm()

    def states(self) -> dict[str, bytes]:
        """By task, what a version published now is made from; for `keep`."""
        states = {task: learner.state() for task, learner in self.learners.items()}
        return states if self.trunk is None else {**states, STATE: self.trunk.state()}

    def keep(
        self, version: ParameterSet, epoch: int, created_ms: int, states: Mapping[str, bytes], equals: int | None = None
    ) -> None:
        """Keep a published version, so that it can be gone back to.

        Parameters
        ----------
        states: what it was made from.
        equals: the version it went back to.
        """
        losses = {task: learner.loss() for task, learner in self.learners.items()}
        about = KeptVersion(
            version.version, epoch, created_ms, version.trunk_id,
            {task: learner.labels for task, learner in self.learners.items()},
            {task: loss if math.isfinite(loss) else None for task, loss in losses.items()}, equals,
        )  # fmt: skip
        self.history.add(about, states)

    def roll_back(self, version: int) -> None:
        """Go on from the learners' states of a kept version: a version published now equals it.

        What was learned since is forgotten; examples that wait, rows and positions stay as they are. A task that the
        version does not know begins anew.

        Raises
        ------
        ParametersError: it is not kept, or has another trunk.
        """
        about = self.history[version]
        if about.trunk != self.parameters.trunk_id:
            raise ParametersError(
                f"version {version} has trunk {about.trunk}, this trainer's is {self.parameters.trunk_id}: "
                f"bring that back with `livestate rebuild`"
            )
        states = self.history.states(version)
        for task, learner in self.learners.items():
            learner.restore(states.get(task))
        self.guards.trust()
        if self.trunk is not None:
            self._go_on_with(self.trunk.restore(states[STATE]))

    def checkpoint(self, version: int) -> None:
        """Write everything as one.

        Parameters
        ----------
        version: the last published.

        Raises
        ------
        StoreError: the disk refuses; the last checkpoint stands, and everything is still to be written.
        """
        self.replica.sweep(self.joiner.watermarks)
        self.joiner.sweep()
        changes: Changes = {}
        self.replica.save(changes)
        self.joiner.save(changes)
        self.history.save(changes)
        for learner in self.learners.values():
            learner.save(changes)
        self.guards.save(changes)
        for name, tensor in self.parameters.items():
            if name not in self._saved or self._saved[name] is not tensor:
                changes[_PARAMETER + name.encode()] = pack_array(tensor)
        if self.trunk is not None:
            self.trunk.save(changes)
        if self.recorder is not None:
            self._recorded = self.recorder.length
        changes[_STATE] = msgpack.packb(
            {
                "layout": self.layout.fingerprint,
                "trunk": self.parameters.trunk_id,
                "online": self.trunk is not None,
                "positions": [[kind, p, offset] for (kind, p), offset in self.positions.items()],
                "watermarks": self.joiner.watermarks,
                "waiting": self.joiner.waiting,
                "version": max(version, self.version_floor),
                "recorded": self._recorded,
            }
        )
        self.database.write(changes)
        self._saved = self.parameters
        if self.trunk is not None:
            self.trunk.saved()
        self.replica.saved()
        self.joiner.saved()
        self.history.saved()
        for learner in self.learners.values():
            learner.saved()
        self.guards.saved()

    def observe_metrics(self) -> None:
        """Set the gauges."""
        self.metrics.pending_examples.set(self.joiner.waiting)
        self.metrics.pending_feedback.set(self.joiner.pending)
        self.metrics.held_labels.set(self.joiner.finality.held)
        self.guards.observe_metrics()
        for task, learner in self.learners.items():
            for head, quality in learner.quality.items():
                if not len(quality):
                    continue
                if learner.kind == "regression":
                    self.metrics.prequential_error.labels(task, head).set(quality.squared_error())
                else:
                    self.metrics.prequential_loss.labels(task, head).set(quality.log_loss())
                    self.metrics.prequential_auc.labels(task, head).set(quality.auc())

    def close(self) -> None:
        """Release the directory and the record file, without a checkpoint."""
        if self.recorder is not None:
            self.recorder.close()
        for learner in self.learners.values():
            learner.close()
        self.database.close()
