"""What every task gives to the next version: what it learned last, or, where its guard holds that back, what is served.

Guaranteed: numbers that are not finite are never given, whether there is a guard or not; one task that is held back
holds up no other.
"""

from __future__ import annotations

from collections.abc import Mapping

from stream.metrics import TrainerMetrics
from stream.model.heads import part_names
from stream.model.parameters import ParameterSet, Tensor
from stream.settings import Settings
from trainer.checkpoint import Changes, Database
from trainer.examples import Joined
from trainer.guard import Guard, is_finite
from trainer.learner import TaskLearner

__all__ = ["Guards"]

_PREFIX = b"g/"


class Guards:
    """The guards of all tasks; none where `trainer.guard` is off.

    Parameters
    ----------
    learners: by task.
    """

    def __init__(self, learners: Mapping[str, TaskLearner], settings: Settings, metrics: TrainerMetrics) -> None:
        self._learners = learners
        self._metrics = metrics
        self._settings = settings
        self._guards = {
            task: Guard(learner, settings.tasks[task], settings.trainer)
            for task, learner in (learners.items() if settings.trainer.guard else ())
        }
        #: Tasks whose head was found not to be finite when a version was made.
        self._broken: set[str] = set()
        #: Tasks that went back, or learned again, and that no version has as they are now.
        self._renewed: set[str] = set()
        #: Tasks that went back while a version was on its way, and those that learned again.
        self._overtaken: set[str] = set()
        self._again: set[str] = set()
        #: Labels of a task when a version without it was counted last.
        self._counted: dict[str, int] = {}
        self._stale: list[bytes] = []

    @property
    def held(self) -> frozenset[str]:
        """Tasks that are held back."""
        return frozenset(self._broken | {task for task, guard in self._guards.items() if guard.is_holding})

    def take(self, joined: Joined) -> None:
        """An answered example, before it is learned from."""
        guard = self._guards.get(joined.example.task)
        if guard is not None:
            target = self._learners[joined.example.task].target(joined.label)
            guard.take(joined.example.inputs, target, joined.example.keys)

    def judge(self, task: str) -> None:
        """The same one, after that."""
        guard = self._guards.get(task)
        if guard is not None and guard.judge():
            self._metrics.guard_returns.labels(task).inc()
            self._broken.discard(task)
            self._renewed.add(task)
            self._overtaken.add(task)

    def learned_again(self, task: str) -> None:
        """A task has learned its labels again, under another scale: that is to be published, though none is new."""
        self._renewed.add(task)
        self._again.add(task)

    def trust(self) -> None:
        """Somebody else has changed all learners' states and vouches for them."""
        self._broken.clear()
        for guard in self._guards.values():
            guard.trust()

    def tensors(self, served: ParameterSet) -> dict[str, Tensor]:
        """The heads of the next version.

        Parameters
        ----------
        served: the version before.
        """
        self._overtaken.clear()
        self._again.clear()
        found: dict[str, Tensor] = {}
        for task, learner in self._learners.items():
            head = learner.head()
            if is_finite(head):
                self._broken.discard(task)
            else:
                self._broken.add(task)
            if task in self.held:
                names = frozenset().union(*(part_names(task, part) for part in self._settings.tasks[task].parts))
                head = {name: served[name] for name in names if name in served}
            found |= head
        return found

    def held_tables(self) -> list[tuple[str, int]]:
        """Name and width of the tables of tasks that are held back."""
        return [(table.name, table.width) for task in sorted(self.held) for table in self._learners[task].tables]

    def unpublished(self) -> dict[str, int]:
        """By task, how many labels it has learned that no confirmed version has and that may be published; a task that
        went back is among them with what it learned since, one that learned again even with nothing new."""
        held = self.held
        return {
            task: len(learner.included)
            for task, learner in self._learners.items()
            if task not in held and (learner.included or task in self._renewed)
        }

    def confirm(self, included: Mapping[str, int]) -> None:
        """These many labels of each task are in a confirmed version."""
        for task, count in included.items():
            # One that went back meanwhile has none of them any more.
            if task not in self._overtaken:
                self._learners[task].confirm(count)
                self._renewed -= {task} - self._again

    @property
    def holds_news(self) -> bool:
        """Whether a task that is held back has learned since a version without it was counted last."""
        return any(self._counted.get(task) != self._learners[task].labels for task in self.held)

    def count_held_back(self) -> None:
        """A version would be published now."""
        for task in self.held:
            labels = self._learners[task].labels
            if self._counted.get(task) != labels:
                self._counted[task] = labels
                self._metrics.guard_held_back.labels(task).inc()

    def observe_metrics(self) -> None:
        """Set the gauges."""
        held = self.held
        for task in self._learners:
            self._metrics.guard_holding.labels(task).set(task in held)
            # So that they are there, and 0, before there is anything to count.
            self._metrics.guard_held_back.labels(task)
            self._metrics.guard_returns.labels(task)
        for task, guard in self._guards.items():
            self._metrics.guard_evidence.labels(task).set(guard.log10_evidence)

    def save(self, changes: Changes) -> None:
        """Add everything to a checkpoint."""
        changes.update(dict.fromkeys(self._stale))
        for guard in self._guards.values():
            guard.save(changes)

    def saved(self) -> None:
        """The checkpoint is written."""
        self._stale.clear()
        for guard in self._guards.values():
            guard.saved()

    def load(self, database: Database) -> None:
        """Take over what the last checkpoint holds. A good state from before the guard was off is forgotten."""
        if not self._guards:
            self._stale = [key for key, _ in database.scan(_PREFIX)]
        for guard in self._guards.values():
            guard.load(database)
