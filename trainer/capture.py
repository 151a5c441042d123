"""Examples: what a task's head saw of row and event at each event that asks, caught as the event is applied.

Guaranteed: an example has what was known at its event and nothing later; the labels that events before it make final
are learned before it is judged, wherever batches are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from stream.metrics import TrainerMetrics
from stream.model.engine import Triggers
from stream.model.heads import Questions, TaskQuestion
from stream.model.parameters import ParameterSet
from stream.store import PackedKeys
from stream.wire import EventColumns
from trainer.crossings import Crossings
from trainer.joiner import Example, Joiner
from trainer.learner import TaskLearner
from trainer.record import Recorder
from trainer.teaching import Teaching
from trainer.timeline import Record

__all__ = ["Capture"]


class Capture:
    """Catches examples.

    Parameters
    ----------
    learners: by task; they see each example's inputs, labelled or not.
    recorder: appends each center and scale that the inputs get, where there is one.
    """

    def __init__(
        self,
        questions: Questions,
        joiner: Joiner,
        learners: Mapping[str, TaskLearner],
        teaching: Teaching,
        recorder: Recorder | None,
        metrics: TrainerMetrics,
    ) -> None:
        self._questions = questions
        self._joiner = joiner
        self._learners = learners
        self._teaching = teaching
        self._recorder = recorder
        self._metrics = metrics

    def serve(self, parameters: ParameterSet) -> None:
        """Predict with these parameters' heads from now on."""
        self._version = parameters.version
        self._heads = self._questions.heads(parameters)

    def take(
        self,
        records: Sequence[Record],
        columns: EventColumns,
        triggers: Triggers,
        late: NDArray[np.bool_],
    ) -> None:
        """Catch the examples of a batch of events that has been applied.

        Parameters
        ----------
        records: the batch, of any partitions; columns: the same, decoded.
        triggers: the events that ask, and their rows right after them.
        late: (n,) events that came after a later one of their client: no example is made of them.
        """
        watermark_before = self._watermarks_before(records, columns)
        asked: list[tuple[int, str, NDArray[np.float32], NDArray[np.float32], int, tuple[bytes, ...]]] = []
        for question in self._questions.tasks if len(triggers.event) else ():
            own, inputs = question.ask(columns, triggers)
            events = triggers.event[own]
            keys = question.keys(columns, events)
            said = self._said(question, inputs, keys)
            strata = question.strata_of(columns, events).tolist()
            tasks = [question.task] * len(own)
            own_keys = list(zip(*(one.to_list() for one in keys), strict=True)) if keys else [()] * len(own)
            asked += zip(events.tolist(), tasks, inputs, said, strata, own_keys, strict=True)
        asked.sort(key=lambda one: one[0])
        crossings = Crossings(self._joiner, records, columns, watermark_before)
        for event, task, inputs, said, stratum, keys_there in asked:
            self._release(crossings, event)
            record = records[event]
            if late[event]:
                self._metrics.late_predictions.labels(task).inc()
                continue
            learner = self._learners[task]
            if learner.observe(inputs, keys_there, int(columns.timestamp_ms[event])):
                self._teaching.standardised(learner)
                if self._recorder is not None:
                    names = self._questions.by_task[task].names
                    self._recorder.standardiser(task, learner.standardiser, names, int(columns.timestamp_ms[event]))
            self._joiner.advance(record.partition, int(watermark_before[event]))
            joined = self._joiner.capture(
                record.partition,
                Example(
                    task,
                    record.key or b"",
                    int(columns.timestamp_ms[event]),
                    inputs,
                    float(said[0]),
                    self._version,
                    stratum,
                    said[1:],
                    keys_there,
                ),
            )
            if joined is not None:
                self._teaching.learn(joined)
            crossings.pass_by(event)
        self._release(crossings, columns.n)

    def settle(self, watermarks: Callable[[], dict[int, int]], released_ms: int) -> None:
        """Learn the labels that are final because of what the last ones told about delays."""
        if self._joiner.finality.is_unsettled:
            for joined in self._joiner.finality.settle(watermarks(), released_ms):
                self._teaching.learn(joined)

    def _watermarks_before(self, records: Sequence[Record], columns: EventColumns) -> NDArray[np.int64]:
        """(n,) each event's partition's watermark just before it, so that batches may be cut anywhere."""
        partitions = np.array([record.partition for record in records], np.int64)
        before = np.zeros(columns.n, np.int64)
        for partition in np.unique(partitions).tolist():
            own = np.flatnonzero((partitions == partition) & columns.accepted)
            times = np.concatenate([[self._joiner.watermarks.get(partition, 0)], columns.timestamp_ms[own[:-1]]])
            before[own] = np.maximum.accumulate(times)[: len(own)]
        return before

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
        self.settle(crossings.watermarks, crossings.passed_ms)
        while (found := crossings.first()) is not None and found.event < before:
            crossings.pass_by(found.event)
            for joined in self._joiner.finality.release(found.partition, found.watermark_ms, found.released_ms):
                self._teaching.learn(joined)
            self.settle(crossings.watermarks, found.released_ms)
