"""The optimisation step of a trunk that learns online: truncated backpropagation from stored states.

A step takes windows of events. Each one's first events bring its stored state, which older weights made, to the weights
as they are now; through the others the loss is led back. Source: S. Kapturowski et al., Recurrent experience replay in
distributed reinforcement learning, ICLR 2019 (stored state and burn-in). Weights are stepped by Adam with decoupled
weight decay (I. Loshchilov, F. Hutter, 2019), a warm-up and a bound on the gradient's norm; a row of a category's table
has moments and a step count of its own, and is stepped only where its value occurs.

Guaranteed: the same steps give the same bits, with one thread or several. A loss or gradient that is not finite changes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgpack
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stream.model.layout import Layout
from stream.model.parameters import ParameterSet, Tensor
from stream.settings import Online
from stream.store.optimizer import Adam
from trainer.checkpoint import pack_array, unpack_array
from trainer.trunk import encoded_events, one_thread
from trainer.windows import Sequences

__all__ = ["Reads", "TrunkLearner"]

_WEIGHT_DECAY = 0.01
_CELL = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

#: (j,) losses of hidden states (j, H), float64, of the reads with these numbers (j,).
Losses = Callable[[torch.Tensor, NDArray[np.int64]], torch.Tensor]
#: Of each tensor, which of its rows, and the gradient of each.
Gradients = dict[str, tuple[NDArray[np.int64], NDArray[np.float32]]]


@dataclass(frozen=True)
class Reads:
    """Where states are read: (k,) which window, and after how many of its events less one."""

    window: NDArray[np.int64]
    event: NDArray[np.int64]


class TrunkLearner:
    """Weights of encoder and cell, and the optimiser's state.

    Parameters
    ----------
    parameters: the trunk to go on from.
    """

    def __init__(self, layout: Layout, settings: Online, parameters: ParameterSet) -> None:
        self._settings = settings
        self._tables = tuple(f"trunk/embedding/{field.name}" for field in layout.embedded)
        self._cell = nn.GRU(layout.inputs, layout.hidden, batch_first=True)
        self._weights = dict(zip((f"trunk/{name}" for name in _CELL), self._cell.parameters(), strict=True))
        self.steps = 0
        self._shapes = {name: parameters[name].shape for name in (*self._weights, *self._tables)}
        #: (rows, 3 x width + 1) of each tensor: weights, two moments, step count; the cell's tensors are one row each.
        self._rows: dict[str, NDArray[np.float32]] = {}
        for name in self._shapes:
            weights = np.asarray(parameters[name], np.float32)
            weights = weights if name in self._tables else weights.reshape(1, -1)
            self._rows[name] = np.zeros((len(weights), 3 * weights.shape[1] + 1), np.float32)
            self._rows[name][:, : weights.shape[1]] = weights
        self._show()

    def _show(self) -> None:
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(torch.from_numpy(self._values(name).reshape(self._shapes[name]).copy()))

    def _values(self, name: str) -> NDArray[np.float32]:
        rows = self._rows[name]
        return rows[:, : (rows.shape[1] - 1) // 3]

    def tensors(self) -> dict[str, Tensor]:
        """The trunk's tensors that are learned, as they are now."""
        return {name: self._values(name).reshape(shape).copy() for name, shape in self._shapes.items()}

    def learn(self, windows: Sequences, reads: Reads, losses: Losses) -> NDArray[np.bool_]:
        """Take one step; (k,) which reads it could not take, as their loss, or the gradient of all, is not finite.

        Parameters
        ----------
        reads: k states in the windows.
        losses: of these states; no other call may change anything.
        """
        with one_thread():
            bad = np.zeros(len(reads.window), np.bool_)
            while not bad.all():
                chosen = np.flatnonzero(~bad)
                gradients, wrong = self.gradients(windows, reads, losses, chosen)
                if not wrong.any():
                    break
                bad[chosen[wrong]] = True
            else:
                return bad
            norm = float(np.sqrt(sum(np.square(g, dtype=np.float64).sum() for _, g in gradients.values())))
            if not np.isfinite(norm):
                return np.ones(len(bad), np.bool_)
            self._step(gradients, min(1.0, self._settings.clip_norm / max(norm, 1e-30)))
            self._show()
        return bad

    def gradients(
        self, windows: Sequences, reads: Reads, losses: Losses, chosen: NDArray[np.int64]
    ) -> tuple[Gradients, NDArray[np.bool_]]:
        """Of the chosen reads (j,): which rows of each tensor they move by how much, and whose loss or slope is not
        finite; nothing moves where there is one.

        Other windows than theirs have no part in it: zero times what is not finite would be no zero.
        """
        own, window = np.unique(reads.window[chosen], return_inverse=True)
        windows, reads = windows.take(own), Reads(window, reads.event[chosen])
        # A window's reads lie behind its burn-in. It needs none where the state before it is the client's first.
        earliest = np.full(len(windows.length), windows.dense.shape[1], np.int64)
        np.minimum.at(earliest, reads.window, reads.event)
        burn = np.where(windows.whole, 0, np.minimum(self._settings.burn_in, earliest))
        latest = np.zeros(len(windows.length), np.int64)
        np.maximum.at(latest, reads.window, reads.event + 1)
        rows: dict[str, NDArray[np.int64]] = {}
        leaves: list[torch.Tensor] = []
        codes = np.full(windows.codes.shape, -1, np.int64)
        for field, name in enumerate(self._tables):
            given = windows.codes[:, :, field].astype(np.int64)
            rows[name], codes[:, :, field][given >= 0] = np.unique(given[given >= 0], return_inverse=True)
            # A row more, so that there is one where no value occurs.
            leaf = torch.zeros((len(rows[name]) + 1, self._values(name).shape[1]))
            leaf[:-1] = torch.from_numpy(self._values(name)[rows[name]])
            leaves.append(leaf.requires_grad_())
        dense, coded = torch.from_numpy(windows.dense), torch.from_numpy(codes)
        first = torch.from_numpy(windows.first.copy())
        longest = int(burn.max())
        if longest:
            with torch.no_grad():
                events = encoded_events(dense[:, :longest], coded[:, :longest], leaves)
                warmed = self._cell(events, first[None])[0]
                burnt = torch.from_numpy(burn)
                last = warmed[torch.arange(len(burn)), (burnt - 1).clamp(min=0)]
                first = torch.where((burnt > 0)[:, None], last, first)
        span = int((latest - burn).max())
        at = np.minimum(burn[:, None] + np.arange(span), windows.dense.shape[1] - 1)
        place = (torch.arange(len(burn))[:, None], torch.from_numpy(at))
        states = self._cell(encoded_events(dense[place], coded[place], leaves), first[None])[0]
        where = (torch.from_numpy(reads.window), torch.from_numpy(reads.event - burn[reads.window]))
        hidden = states[where]
        asked = hidden.detach().double().requires_grad_()
        found = losses(asked, chosen)
        # A constant divisor: a label weighs the same whatever else is in its step.
        (slope,) = torch.autograd.grad(found.sum() / self._settings.labels, asked)
        slope = slope.float()
        wrong = ~(torch.isfinite(found) & torch.isfinite(slope).all(dim=1)).numpy()
        if wrong.any():
            return {}, wrong
        back = torch.autograd.grad(hidden, [*self._weights.values(), *leaves], slope)
        gradients: Gradients = {}
        for name, gradient in zip(self._weights, back, strict=False):
            gradients[name] = np.zeros(1, np.int64), gradient.numpy().reshape(1, -1)
        for name, gradient in zip(self._tables, back[len(self._weights) :], strict=True):
            moved = gradient[:-1].numpy()
            # Where a value occurs in burn-in alone, its row does not move; where nothing is a number, it shows.
            touched = np.flatnonzero((moved != 0).any(axis=1))
            gradients[name] = rows[name][touched], np.ascontiguousarray(moved[touched])
        return gradients, wrong

    def _step(self, gradients: Gradients, share: float) -> None:
        self.steps += 1
        settings = self._settings
        rate = settings.learning_rate * min(1.0, self.steps / max(1, settings.warm_up))
        for name, (touched, gradient) in gradients.items():
            values = self._values(name)
            values[touched] *= np.float32(1.0 - rate * _WEIGHT_DECAY)
            Adam(rate).step(self._rows[name], touched, gradient * np.float32(share))

    def state(self) -> bytes:
        """Everything, as bytes."""
        rows = {name: pack_array(rows) for name, rows in self._rows.items()}
        packed: bytes = msgpack.packb([self.steps, rows])
        return packed

    def restore(self, state: bytes) -> None:
        """Go back to what `state` wrote."""
        self.steps, rows = msgpack.unpackb(state)
        self._rows = {name: unpack_array(value) for name, value in rows.items()}
        self._show()
