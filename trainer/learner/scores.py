"""Scores of a task's head as torch computes them, led back to the hidden state alone.

The head's weights, the memory and the event are constants. So what a trunk learns lowers the loss of the very
predictions that are served, is about what memory and event do not say already, and needs no network of its own that
nobody serves; head and trunk take turns. A part without a gradient (`gbdt`) is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stream.model.heads import knots
from stream.model.heads.scores import CLIP
from stream.model.parameters import Tensor
from trainer.learner.task import TaskLearner
from trainer.tables import read_effects

__all__ = ["can_teach", "losses", "scores"]


def _constants(learner: TaskLearner) -> list[dict[str, Tensor]]:
    """The tensors of each part that a loss can be led back through."""
    if learner.standardiser.center is None or not learner.labels:
        return []
    fixed = learner.standardiser.fixed
    found = [part.tensors(*fixed) for name, part in learner.parts.items() if name != "gbdt"]
    return [tensors for tensors in found if tensors]


def can_teach(learner: TaskLearner) -> bool:
    """Whether the task has a head by now that a loss can be led back through."""
    return bool(_constants(learner))


def scores(
    learner: TaskLearner, hidden: torch.Tensor, inputs: NDArray[np.float32], keys: Sequence[Sequence[bytes]]
) -> torch.Tensor:
    """(k, outputs) scores with other hidden states than those in the inputs; of a task that `can_teach`.

    Parameters
    ----------
    hidden: (k, H), float64.
    inputs: (k, F) of the head; hidden states first.
    keys: of the rows of tables that each one uses.
    """
    center, scale = learner.standardiser.fixed
    task, width = learner.task, hidden.shape[1]
    whole = torch.cat([hidden, torch.from_numpy(inputs[:, width:].astype(np.float64))], dim=1)
    scaled = ((whole - torch.from_numpy(center)) / torch.from_numpy(scale)).clamp(-CLIP, CLIP)
    x = torch.cat([scaled, torch.ones((len(scaled), 1), dtype=torch.float64)], dim=1)
    found = []
    for tensors in _constants(learner):
        if f"head/{task}/mlp/input" in tensors:
            first = torch.from_numpy(tensors[f"head/{task}/mlp/input"].astype(np.float64))
            last = torch.from_numpy(tensors[f"head/{task}/mlp/output"].astype(np.float64))
            units = (_with_pieces(learner, x) @ first).relu().reshape(len(x), len(last), -1)
            found.append(torch.einsum("kmh,mho->ko", units, last[:, :-1]) / len(last) + last[:, -1].mean(dim=0))
        else:
            weight = torch.from_numpy(np.atleast_2d(tensors[f"head/{task}/weight"]).astype(np.float64))
            effects = [read_effects(learner.tables, own, len(weight))[1][:, :, 0].sum(axis=0) for own in keys]
            sums = x @ weight.T + torch.from_numpy(np.stack(effects))
            found.append(sums if len(weight) == 1 else nn.functional.logsigmoid(sums))
    return torch.stack(found).mean(dim=0)


def _with_pieces(learner: TaskLearner, x: torch.Tensor) -> torch.Tensor:
    """`stream.model.heads.with_pieces` as torch computes it."""
    if not learner.pieces or not learner.is_number.any():
        return x
    at = torch.from_numpy(knots(learner.pieces))
    numbers = torch.from_numpy(np.flatnonzero(learner.is_number))
    through = ((x[:, numbers, None] - at[:-1]) / (at[1] - at[0])).clamp(0.0, 1.0).reshape(len(x), -1)
    return torch.cat([x[:, :-1], through, x[:, -1:]], dim=1)


def losses(said: torch.Tensor, kind: str, target: torch.Tensor, offset: float, variance: float) -> torch.Tensor:
    """(k,) loss of scores (k, outputs) with targets (k,) as `Labelled` has them: what the task is judged by.

    Parameters
    ----------
    offset: added to the log-odds of a binary task.
    variance: of a regression's labels, by which its squared errors are measured.
    """
    if kind == "binary":
        return nn.functional.binary_cross_entropy_with_logits(said[:, 0] + offset, target, reduction="none")
    if kind == "multiclass":
        return nn.functional.cross_entropy(said, target.long(), reduction="none")
    return 0.5 * (said[:, 0] - target).square() / variance
