"""What a labelled example does: it is judged, learned from where it is in the sample, recorded and counted."""

from __future__ import annotations

from collections.abc import Mapping

from stream.metrics import TrainerMetrics
from trainer.examples import Joined
from trainer.guards import Guards
from trainer.lag import sampled
from trainer.learner import TaskLearner
from trainer.poison import Poison
from trainer.record import Recorder
from trainer.sampling import NegativeSampling
from trainer.trunk_training import TrunkTraining

__all__ = ["Teaching"]


class Teaching:
    """Teaches the learners, and the trunk where it learns too.

    Parameters
    ----------
    learners, sampling: by task.
    recorder: appends what was answered, where there is one.
    """

    def __init__(
        self,
        learners: Mapping[str, TaskLearner],
        sampling: Mapping[str, NegativeSampling],
        guards: Guards,
        poison: Poison,
        trunk: TrunkTraining | None,
        recorder: Recorder | None,
        metrics: TrainerMetrics,
    ) -> None:
        self._learners = learners
        self._sampling = sampling
        self._guards = guards
        self._poison = poison
        self._trunk = trunk
        self._recorder = recorder
        self._metrics = metrics
        #: Of the labels, how many are learned from; see `trainer.lag`.
        self.label_share = 1.0

    def learn(self, label: Joined) -> None:
        """Learn from an example whose label is final; one that is not in the sample is judged at most."""
        joined = sampled(label, self.label_share)
        if joined is None:
            self._metrics.passed_over.labels(label.example.task).inc()
            return
        example = joined.example
        learner = self._learners[example.task]
        if joined.early:
            self._metrics.early_labels.labels(example.task, "positive" if joined.label else "negative").inc()
        sampling = self._sampling[example.task]
        self._guards.take(joined)
        if joined.label is not False or sampling.keeps(example.client_id, example.as_of_ms):
            learner.learn(
                example.inputs, joined.label, joined.weight, example.prediction, joined.published_ms,
                log_odds_offset=sampling.log_odds_offset, others=example.others, final_ms=joined.final_ms,
                keys=example.keys,
            )  # fmt: skip
            self._poison.learned(joined, learner.dropped)
            if self._trunk is not None and not learner.dropped:
                self._trunk.note(joined)
        else:
            self._metrics.sampled_out.labels(example.task).inc()
            learner.judge(joined.label, example.prediction, example.others)
        if self._recorder is not None:
            self._recorder.example(joined)
        self.count(learner)
        self._guards.judge(example.task)

    def standardised(self, learner: TaskLearner) -> None:
        """The learner's inputs have another scale, and what it knows was learned under that."""
        self.count(learner)
        if learner.labels:
            self._guards.learned_again(learner.task)

    def count(self, learner: TaskLearner) -> None:
        """Count what the learner took and dropped since."""
        self._metrics.learned.labels(learner.task).inc(learner.learned)
        self._metrics.dropped.labels(learner.task).inc(learner.dropped)
        learner.learned = learner.dropped = 0
