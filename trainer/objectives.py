"""What the trunk is pretrained for: the next event of each client, from the events before it, and the labels of tasks.

The loss of a position is the cross entropy of each target field of the client's next event, where that has
it, plus the squared error of the logarithm of the time until it, in units of its standard deviation.
`baseline` is the loss of the best constant answer, so that what was learned shows as the difference. The loss of a
label is the cross entropy, or the squared error in units of the standard deviation, of what a linear readout of the
state right after the event that asked says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

__all__ = ["Answer", "Answers", "NextEvent", "Targets", "baseline_loss"]


@dataclass(frozen=True)
class Targets:
    """What comes next at each position.

    `codes` (..., targets) int64 row of the value, -1 where the next event has none; `log_time` (...)
    standardised log seconds until it; `valid` (...) False on padding.
    """

    codes: torch.Tensor
    log_time: torch.Tensor
    valid: torch.Tensor

    def take(self, index: torch.Tensor) -> Targets:
        """Targets of some sequences."""
        return Targets(self.codes[index], self.log_time[index], self.valid[index])


class NextEvent(nn.Module):
    """Linear readouts of the hidden state; used in pretraining only.

    Parameters
    ----------
    hidden: width of the state. classes: number of rows of each target field. generator: of the first weights.
    """

    def __init__(self, hidden: int, classes: list[int], generator: torch.Generator) -> None:
        super().__init__()
        self.outputs = nn.ParameterList(
            nn.Parameter(torch.randn(size, hidden, generator=generator) * 0.02) for size in [*classes, 1]
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in [*classes, 1])

    def start_from(self, targets: Targets) -> None:
        """Begin at the best constant answer, so that training has only to learn what is better."""
        with torch.no_grad():
            for field, bias in enumerate(list(self.biases)[:-1]):
                codes = targets.codes[..., field]
                known = codes[targets.valid & (codes >= 0)]
                counts = torch.bincount(known, minlength=len(bias)).float() + 0.5
                bias.copy_((counts / counts.sum()).log())

    def forward(self, states: torch.Tensor, targets: Targets) -> torch.Tensor:
        """Mean loss over valid positions; states (..., hidden)."""
        positions = targets.valid.sum().clamp(min=1)
        loss = states.new_zeros(())
        for field in range(targets.codes.shape[-1]):
            known = targets.valid & (targets.codes[..., field] >= 0)
            logits = functional.linear(states[known], self.outputs[field], self.biases[field])
            loss = loss + functional.cross_entropy(logits, targets.codes[..., field][known], reduction="sum")
        told = states[targets.valid]
        time = functional.linear(told, self.outputs[-1], self.biases[-1])[:, 0]
        loss = loss + functional.mse_loss(time, targets.log_time[targets.valid], reduction="sum")
        return loss / positions


def baseline_loss(targets: Targets) -> float:
    """The same loss for each field's own distribution and the mean time, those of `targets` itself."""
    positions = max(1, int(targets.valid.sum()))
    total = 0.0
    for field in range(targets.codes.shape[-1]):
        codes = targets.codes[..., field]
        known = codes[targets.valid & (codes >= 0)]
        counts = torch.bincount(known, minlength=1).double()
        counts = counts[counts > 0]
        total -= float((counts * (counts / max(1, len(known))).log()).sum())
    times = targets.log_time[targets.valid].double()
    total += float((times - times.mean()).square().sum()) if len(times) else 0.0
    return total / positions


@dataclass(frozen=True)
class Answer:
    """The labels of one task along sequences.

    `target` (...) the index of the class (0 and 1 of a binary task), or of a regression, `classes` 0, the standardised
    value; `weight` (...) of each, 0 where there is no label.
    """

    classes: int
    target: torch.Tensor
    weight: torch.Tensor

    def take(self, index: torch.Tensor) -> Answer:
        """Those of some sequences."""
        return Answer(self.classes, self.target[index], self.weight[index])


class Answers(nn.Module):
    """Linear readouts of the hidden state, one for each task; used in pretraining only.

    The loss of some sequences is divided by the weight of labels that so many have on average and not by their own:
    else a label would count more in a client with few of them.

    Parameters
    ----------
    answers: of all sequences to learn from.
    """

    def __init__(self, hidden: int, answers: list[Answer], generator: torch.Generator) -> None:
        super().__init__()
        self._usual = [float(one.weight.sum()) / max(1, len(one.weight)) for one in answers]
        self.outputs = nn.ParameterList(
            nn.Parameter(torch.randn(max(1, one.classes), hidden, generator=generator) * 0.02) for one in answers
        )
        self.biases = nn.ParameterList(nn.Parameter(_constant(one)) for one in answers)

    def forward(self, states: torch.Tensor, answers: list[Answer]) -> torch.Tensor:
        """Loss of these sequences (b, ...); states (b, ..., hidden)."""
        said = [
            functional.linear(states[one.weight > 0], output, bias)
            for one, output, bias in zip(answers, self.outputs, self.biases, strict=True)
        ]
        return self._loss(said, answers)

    def constant_loss(self, answers: list[Answer]) -> float:
        """The same with the best constants, those of `answers` itself."""
        return float(self._loss([_constant(one).expand(int((one.weight > 0).sum()), -1) for one in answers], answers))

    def _loss(self, said: list[torch.Tensor], answers: list[Answer]) -> torch.Tensor:
        loss = torch.zeros(())
        for one, usual, heard in zip(answers, self._usual, said, strict=True):
            known = one.weight > 0
            each = _surprise(one, heard, one.target[known]) * one.weight[known]
            loss = loss + each.sum() / max(usual * len(one.weight), 1e-6)
        return loss


def _surprise(answer: Answer, said: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if answer.classes:
        return functional.cross_entropy(said, target.long(), reduction="none")
    return (said[:, 0] - target).square()


def _constant(answer: Answer) -> torch.Tensor:
    """The best constant answer."""
    known = answer.weight > 0
    if not answer.classes:
        return torch.zeros(1)
    counts = torch.bincount(answer.target[known].long(), answer.weight[known], minlength=answer.classes) + 0.5
    return (counts / counts.sum()).log().float()
