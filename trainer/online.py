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
from numpy.typing import NDArray

from stream.errors import ParametersError, RecordError, StoreError
from stream.metrics import TrainerMetrics
from stream.model.engine import Engine, Triggers
from stream.model.heads import Questions, TaskQuestion
from stream.model.layout import Layout
from stream.model.parameters import ParameterSet, Tensor
from stream.settings import Settings, row_ttls
from stream.store import PackedKeys
from stream.wire import EventColumns, EventDecoder, Schema, decode_feedback
from trainer.checkpoint import Changes, Database, pack_array, unpack_array
from trainer.crossings import Crossings
from trainer.delays import Delays
from trainer.guards import Guards
from trainer.history import History, KeptVersion
from trainer.joiner import Example, Joined, Joiner
from trainer.lag import sampled
from trainer.learner import TaskLearner
from trainer.poison import Poison
from trainer.publisher import TableRows
from trainer.record import Recorder
from trainer.replica import Replica, late_events
from trainer.sampling import NegativeSampling
from trainer.tables import CategoryTable
from trainer.timeline import EVENTS, FEEDBACK, Record, block_of
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
        #: Of the labels, how many are learned from; see `trainer.lag`.
        self.label_share = 1.0
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
            question.task: TaskLearner(question.task, question.is_state, question.settings, settings.model.seed)
            for question in self.questions.tasks
        }
        for learner in self.learners.values():
            learner.load(database)
        self._sampling = {
            name: NegativeSampling(name, task.negative_rate, settings.model.seed)
            for name, task in settings.tasks.items()
        }
        self._poison = Poison(settings, self.metrics, self._refuse)
        self.trunk = (
            TrunkTraining(
                self.layout, database, parameters, self.learners,
                {name: sampling.log_odds_offset for name, sampling in self._sampling.items()},
                self.metrics, self._poison.send,
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
        self._ticks: dict[str, int] = {}
        self.recorder = Recorder(record, recorded) if record is not None else None
        self._recorded = recorded
        self.serve(parameters)

    def serve(self, parameters: ParameterSet) -> None:
        """Predict with these parameters' heads from now on: those that the workers have."""
        self._served = self._fitting(parameters)
        self._heads = self.questions.heads(self._served)

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
            partitions = np.array([record.partition for record in records], np.int64)
            before = self._watermarks_before(partitions, columns)
            self._capture(records, columns, advanced.triggers, late, before)
            for partition in np.unique(partitions[accepted]).tolist():
                own = columns.timestamp_ms[columns.accepted & (partitions == partition)]
                self.joiner.advance(partition, int(own.max()))
            self.metrics.stream_time.set(max(self.joiner.watermarks.values()) / 1000.0)
        self._move(EVENTS, records)
        return events

    def _watermarks_before(self, partitions: NDArray[np.int64], columns: EventColumns) -> NDArray[np.int64]:
        """(n,) each event's partition's watermark just before it, so that batches may be cut anywhere."""
        before = np.zeros(columns.n, np.int64)
        for partition in np.unique(partitions).tolist():
            own = np.flatnonzero((partitions == partition) & columns.accepted)
            times = np.concatenate([[self.joiner.watermarks.get(partition, 0)], columns.timestamp_ms[own[:-1]]])
            before[own] = np.maximum.accumulate(times)[: len(own)]
        return before

    def _capture(
        self,
        records: Sequence[Record],
        columns: EventColumns,
        triggers: Triggers,
        late: NDArray[np.bool_],
        watermark_before: NDArray[np.int64],
    ) -> None:
        asked: list[tuple[int, str, NDArray[np.float32], NDArray[np.float32], int, tuple[bytes, ...]]] = []
        for question in self.questions.tasks if len(triggers.event) else ():
            own, inputs = question.ask(columns, triggers)
            events = triggers.event[own]
            keys = question.keys(columns, events)
            said = self._said(question, inputs, keys)
            strata = question.strata_of(columns, events).tolist()
            tasks = [question.task] * len(own)
            own_keys = list(zip(*(one.to_list() for one in keys), strict=True)) if keys else [()] * len(own)
            asked += zip(events.tolist(), tasks, inputs, said, strata, own_keys, strict=True)
        asked.sort(key=lambda one: one[0])
        crossings = Crossings(self.joiner, records, columns, watermark_before)
        for event, task, inputs, said, stratum, keys_there in asked:
            self._release(crossings, event)
            record = records[event]
            if late[event]:
                self.metrics.late_predictions.labels(task).inc()
                continue
            learner = self.learners[task]
            if learner.observe(inputs, keys_there, int(columns.timestamp_ms[event])):
                self._count_learned(learner)
                if self.recorder is not None:
                    self.recorder.standardiser(task, learner.standardiser)
            self.joiner.advance(record.partition, int(watermark_before[event]))
            joined = self.joiner.capture(
                record.partition,
                Example(
                    task,
                    record.key or b"",
                    int(columns.timestamp_ms[event]),
                    inputs,
                    float(said[0]),
                    self._served.version,
                    stratum,
                    said[1:],
                    keys_there,
                ),
            )
            if joined is not None:
                self._learn(joined)
            crossings.pass_by(event)
        self._release(crossings, columns.n)

    def _said(
        self, question: TaskQuestion, inputs: NDArray[np.float32], keys: Sequence[PackedKeys]
    ) -> NDArray[np.float32]:
        """(k, values) of each example: the predictions, and where the head has several parts what each one alone says;
        NaN for what is not there yet."""
        head, outputs = self._heads.get(question.task), len(question.outputs)
        parts = question.settings.parts
        if head is None:
            return np.full((len(inputs), 1), np.nan, np.float32)
        if len(parts) == 1:
            return head.predict(inputs, keys)
        said, alone = head.predict_parts(inputs, keys)
        missing = np.full((len(inputs), outputs), np.nan, np.float32)
        return np.concatenate([said, *(alone.get(part, missing) for part in parts)], axis=1)

    def _release(self, crossings: Crossings, before: int) -> None:
        """Learn the labels that events before the one at index `before` make final."""
        self._settle(crossings.watermarks, crossings.passed_ms)
        while (found := crossings.first()) is not None and found.event < before:
            crossings.pass_by(found.event)
            for joined in self.joiner.finality.release(found.partition, found.watermark_ms, found.released_ms):
                self._learn(joined)
            self._settle(crossings.watermarks, found.released_ms)

    def _settle(self, watermarks: Callable[[], dict[int, int]], released_ms: int) -> None:
        """Learn the labels that are final because of what the last ones told about delays."""
        if self.joiner.finality.is_unsettled:
            for joined in self.joiner.finality.settle(watermarks(), released_ms):
                self._learn(joined)

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
                self._learn(joined)
            self._settle(lambda: self.joiner.watermarks, record.timestamp_ms)
            if self.trunk is not None:
                self._go_on_with(self.trunk.learn(self.replica, self.joiner.watermarks))
        self._move(FEEDBACK, records)

    def _go_on_with(self, learned: Mapping[str, Tensor] | None) -> None:
        """Move rows on under a trunk with these tensors; None: as it is."""
        if learned is not None:
            self.parameters = self.parameters.updated(learned, self.parameters.version)
            self.engine = self.engine.moved(self.parameters)

    def _learn(self, label: Joined) -> None:
        joined = sampled(label, self.label_share)
        if joined is None:
            self.metrics.passed_over.labels(label.example.task).inc()
            return
        example = joined.example
        learner = self.learners[example.task]
        if joined.early:
            self.metrics.early_labels.labels(example.task, "positive" if joined.label else "negative").inc()
        sampling = self._sampling[example.task]
        self.guards.take(joined)
        if joined.label is not False or sampling.keeps(example.client_id, example.as_of_ms):
            learner.learn(
                example.inputs, joined.label, joined.weight, example.prediction, joined.published_ms,
                log_odds_offset=sampling.log_odds_offset, others=example.others, final_ms=joined.final_ms,
                keys=example.keys,
            )  # fmt: skip
            self._poison.learned(joined, learner.dropped)
            if self.trunk is not None and not learner.dropped:
                self.trunk.note(joined)
        else:
            self.metrics.sampled_out.labels(example.task).inc()
            learner.judge(joined.label, example.prediction, example.others)
        if self.recorder is not None:
            self.recorder.example(joined)
        self._count_learned(learner)
        self.guards.judge(example.task)

    def _count_learned(self, learner: TaskLearner) -> None:
        self.metrics.learned.labels(learner.task).inc(learner.learned)
        self.metrics.dropped.labels(learner.task).inc(learner.dropped)
        learner.learned = learner.dropped = 0

    def _move(self, kind: int, records: Sequence[Record]) -> None:
        for record in records:
            self.positions[kind, record.partition] = record.offset + 1

    def tensors(self) -> dict[str, Tensor]:
        """What a version published now would hold: the trunk, and every task's head; of one that is held back, what is
        served. Then `tables`, and the rest."""
        if self.trunk is not None:
            self.trunk.offer()
        return {**self.parameters, **self.guards.tensors(self._served)}

    def tables(self) -> dict[str, TableRows]:
        """The tables that heads read, with the rows that changed since the last confirmed version, if they may be
        published."""
        found = {}
        for table in self._tables():
            rows, self._ticks[table.name] = table.touched()
            found[table.name] = TableRows(table.width, rows)
        for name, width in self.guards.held_tables():
            found[name] = TableRows(width, {})
        return found

    def _tables(self) -> list[CategoryTable]:
        """Those that are not held back."""
        held = self.guards.held
        return [table for task, learner in self.learners.items() if task not in held for table in learner.tables]

    def compare(self, published: ParameterSet | None) -> None:
        """Take rows that differ from the published ones for changed."""
        for learner in self.learners.values():
            for table in learner.tables:
                table.compare(published.tables.get(table.name) if published is not None else None)

    @property
    def has_changed(self) -> bool:
        """Whether something was learned that no confirmed version has and that may be published."""
        moved = self.trunk is not None and self.trunk.has_changed
        return moved or bool(self.unpublished()) or self.has_touched

    @property
    def has_touched(self) -> bool:
        """Whether a row of a table has changed since the last confirmed version."""
        return any(table.has_touched for table in self._tables())

    def confirm_rows(self) -> None:
        """The rows that `tables` gave last are in a confirmed version."""
        ticks, self._ticks = self._ticks, {}
        for learner in self.learners.values():
            for table in learner.tables:
                if table.name in ticks:
                    table.confirm(ticks[table.name])

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
