"""Learning: what each task's labels make of the heads that serve it."""

from trainer.learner.examples import Batch, Examples
from trainer.learner.logistic import (
    BayesianLinear,
    BayesianLogistic,
    LinearLearner,
    LogisticLearner,
    prior_variance,
)
from trainer.learner.mlp import MlpLearner
from trainer.learner.part import Labelled, PartLearner, seen_by
from trainer.learner.prequential import Prequential
from trainer.learner.standardiser import Standardiser
from trainer.learner.task import AVERAGE, TaskLearner
from trainer.learner.trees import TreesLearner, fit_trees

__all__ = [
    "AVERAGE",
    "Batch",
    "BayesianLinear",
    "BayesianLogistic",
    "Examples",
    "Labelled",
    "LinearLearner",
    "LogisticLearner",
    "MlpLearner",
    "PartLearner",
    "Prequential",
    "Standardiser",
    "TaskLearner",
    "TreesLearner",
    "fit_trees",
    "prior_variance",
    "seen_by",
]
