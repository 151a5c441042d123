"""A trunk that learns online (`model.trunk = "online"`): from which labels, when, and what of it resumes.

Each label that a head has learned is noted. Right after a feedback record, once `model.online.labels` of them wait,
they teach the trunk in one step: from the window of each one's client, whose state is read after the event that was
asked about, through the task's head as it is now. Steps come at feedback records alone, since between these events may
be applied in any batches; rows, windows and weights so depend on the order of the input and not on how it is cut.

A label whose event has left its client's window teaches nothing, nor does one that comes while its head has learned
nothing, or while too many wait; each is counted.

Guaranteed: weights, optimiser, windows and waiting labels are of the checkpoint's instant. An example sees the events
up to the one that asked, and none after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import msgpack
import numpy as np
import torch
from numpy.typing import NDArray

from stream.metrics import TrainerMetrics
from stream.model.layout import Layout
from stream.model.parameters import ParameterSet, Tensor
from stream.partitioner import partition_of
from stream.settings import Settings
from trainer.checkpoint import Changes, Database
from trainer.examples import Joined, key_of, pack_joined, unpack_joined
from trainer.learner import TaskLearner
from trainer.learner.scores import can_teach, losses, scores
from trainer.learner.trunk import Reads, TrunkLearner
from trainer.replica import Replica
from trainer.windows import Windows

__all__ = ["OUTCOMES", "STATE", "TrunkTraining"]

OUTCOMES = ("learned", "outside", "no_head", "not_finite", "crowded")

#: Under which its state lies among those of tasks; no task is called so.
STATE = "trunk/online"
_WEIGHTS, _WAITING = b"k/weights", b"k/waiting"
#: Most labels that wait, in steps.
_STEPS_WAITING = 64


class TrunkTraining:
    """What an online trunk learns.

    Parameters
    ----------
    parameters: the trunk to go on from.
    learners: of every task.
    log_odds_offset: of each task's labels.
    poison: takes what is not finite.
    """

    def __init__(
        self,
        layout: Layout,
        database: Database,
        parameters: ParameterSet,
        learners: Mapping[str, TaskLearner],
        log_odds_offset: Mapping[str, float],
        metrics: TrainerMetrics,
        poison: Callable[[Joined, str], None],
    ) -> None:
        settings: Settings = layout.settings
        self._labels = settings.model.online.labels
        self._partitions = settings.topics.partitions
        self._modality = {name: layout.schema.by_name[task.on].index for name, task in settings.tasks.items()}
        self._learners = learners
        self._log_odds_offset = log_odds_offset
        self._metrics = metrics
        self._poison = poison
        self.windows = Windows(layout, database, settings.model.online.length)
        self._learner = TrunkLearner(layout, settings.model.online, parameters)
        self._waiting: list[Joined] = []
        #: Of each task's labels, as numbers: how many there were, their mean, and the sum of squares around it.
        self._moments = {name: [0.0, 0.0, 0.0] for name in settings.tasks}
        self._changed = True
        #: Steps in it when a version was last made of it, and in the last one that was confirmed.
        self._offered = self._confirmed = 0
        weights = database.get(_WEIGHTS)
        if weights is not None:
            self._learner.restore(weights)
            waiting, moments = msgpack.unpackb(database.get(_WAITING) or b"")
            self._waiting = [unpack_joined(*pair) for pair in waiting]
            self._moments |= {name: moments[name] for name in self._moments if name in moments}
            self._offered = self._confirmed = self._learner.steps
            self._changed = False

    @property
    def steps(self) -> int:
        """Steps taken."""
        return self._learner.steps

    def note(self, joined: Joined) -> None:
        """Take a label that its task's head has learned."""
        self._changed = True
        moments = self._moments[joined.example.task]
        difference = self._learners[joined.example.task].target(joined.label) - moments[1]
        moments[0] += 1.0
        moments[1] += difference / moments[0]
        moments[2] += difference * difference * (1.0 - 1.0 / moments[0])
        if len(self._waiting) >= _STEPS_WAITING * self._labels:
            self._count(joined, "crowded")
        else:
            self._waiting.append(joined)

    def learn(self, replica: Replica, watermarks: dict[int, int]) -> dict[str, Tensor] | None:
        """Right after a feedback record: step while enough labels wait; the tensors, if there was a step.

        Parameters
        ----------
        replica: of the rows that the windows lie beside.
        """
        before = self._learner.steps
        while len(self._waiting) >= self._labels:
            taken, self._waiting = self._waiting[: self._labels], self._waiting[self._labels :]
            self._changed = True
            self._step(taken, replica, watermarks)
        self._metrics.trunk_steps.inc(self._learner.steps - before)
        return self._learner.tensors() if self._learner.steps > before else None

    def _step(self, taken: list[Joined], replica: Replica, watermarks: dict[int, int]) -> None:
        teaching = {task for task, learner in self._learners.items() if can_teach(learner)}
        ready = [one for one in taken if one.example.task in teaching]
        for one in taken:
            if one.example.task not in teaching:
                self._count(one, "no_head")
        if not ready:
            return
        clients = [one.example.client_id for one in ready]
        slots = replica.look(clients, [partition_of(client, self._partitions) for client in clients], watermarks)
        as_of_ms = np.array([one.example.as_of_ms for one in ready], np.int64)
        modality = np.array([self._modality[one.example.task] for one in ready], np.int64)
        event = np.full(len(ready), -1, np.int64)
        there = slots >= 0
        event[there] = self.windows.find(slots[there], as_of_ms[there], modality[there])
        for i in np.flatnonzero(event < 0).tolist():
            self._count(ready[i], "outside")
        kept = np.flatnonzero(event >= 0)
        if not len(kept):
            return
        batch = [ready[i] for i in kept.tolist()]
        # In the order of the labels: which slot a client has depends on how the input is cut, and a sum on its order.
        numbered: dict[int, int] = {}
        window = np.array([numbered.setdefault(slot, len(numbered)) for slot in slots[kept].tolist()], np.int64)

        def loss(hidden: torch.Tensor, chosen: NDArray[np.int64]) -> torch.Tensor:
            return self._loss(hidden, [batch[i] for i in chosen.tolist()])

        bad = self._learner.learn(self.windows.sequences(np.array(list(numbered))), Reads(window, event[kept]), loss)
        for one, dropped in zip(batch, bad.tolist(), strict=True):
            self._count(one, "not_finite" if dropped else "learned")
            if dropped:
                self._poison(one, "the trunk did not learn from it")

    def _loss(self, hidden: torch.Tensor, batch: Sequence[Joined]) -> torch.Tensor:
        """(k,) weighted losses of labels with these states."""
        found = torch.zeros(len(batch), dtype=torch.float64)
        for task, learner in self._learners.items():
            own = [i for i, one in enumerate(batch) if one.example.task == task]
            if not own:
                continue
            examples = [batch[i].example for i in own]
            inputs = np.stack([one.inputs for one in examples])
            said = scores(learner, hidden[own], inputs, [one.keys for one in examples])
            target = torch.tensor([learner.target(batch[i].label) for i in own], dtype=torch.float64)
            weight = torch.tensor([batch[i].weight for i in own], dtype=torch.float64)
            count, _, squares = self._moments[task]
            variance = squares / count if 0.0 < squares < math.inf else 1.0
            each = losses(said, learner.kind, target, self._log_odds_offset[task], variance)
            found = found.index_put((torch.tensor(own),), weight * each)
        return found

    def _count(self, joined: Joined, outcome: str) -> None:
        self._metrics.trunk_labels.labels(joined.example.task, outcome).inc()

    # ---------------------------------------------------------------- versions

    @property
    def has_changed(self) -> bool:
        """Whether it has taken a step that no confirmed version has."""
        return self._learner.steps != self._confirmed

    def offer(self) -> None:
        """A version is made of it as it is."""
        self._offered = self._learner.steps

    def confirm(self) -> None:
        """The version that was made last is confirmed."""
        self._confirmed = self._offered

    def state(self) -> bytes:
        """Weights and optimiser, as bytes; for `restore`."""
        return self._learner.state()

    def restore(self, state: bytes) -> dict[str, Tensor]:
        """Go back to what `state` wrote; labels that wait are forgotten. Returns the tensors."""
        self._learner.restore(state)
        self._waiting = []
        self._changed = True
        return self._learner.tensors()

    # ---------------------------------------------------------------- checkpoint

    def save(self, changes: Changes) -> None:
        """Add what changed since the last checkpoint; windows go with their rows."""
        if self._changed:
            changes[_WEIGHTS] = self._learner.state()
            waiting = [
                [key_of(0, one.example.task, one.example.as_of_ms, one.example.client_id), pack_joined(one)]
                for one in self._waiting
            ]
            changes[_WAITING] = msgpack.packb([waiting, self._moments])

    def saved(self) -> None:
        """The checkpoint is written."""
        self._changed = False
