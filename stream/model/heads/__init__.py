"""Heads: what turns a row's features into the predictions of a task.

Until the trainer has published a task's head, the task has no prediction.
"""

from stream.model.heads.categories import table_names
from stream.model.heads.head import Head, output_names, part_names
from stream.model.heads.linear import linear_tensors
from stream.model.heads.mlp import knots, mlp_tensors, with_pieces
from stream.model.heads.questions import Questions, TaskQuestion
from stream.model.heads.scores import CLIP, Part, predictions, sigmoid, standardise
from stream.model.heads.trees import lightgbm, trees_tensors

__all__ = [
    "CLIP",
    "Head",
    "Part",
    "Questions",
    "TaskQuestion",
    "knots",
    "lightgbm",
    "linear_tensors",
    "mlp_tensors",
    "output_names",
    "part_names",
    "predictions",
    "sigmoid",
    "standardise",
    "table_names",
    "trees_tensors",
    "with_pieces",
]
