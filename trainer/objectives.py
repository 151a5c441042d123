"""What the trunk is pretrained for: the next event of each client, from the events before it.

The loss of a position is the cross entropy of each target field of the client's next event, where that has
it, plus the squared error of the logarithm of the time until it, in units of its standard deviation.
`baseline` is the loss of the best constant answer, so that what was learned shows as the difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

__all__ = ["NextEvent", "Targets", "baseline_loss"]


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
