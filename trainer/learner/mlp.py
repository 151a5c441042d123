"""The head `mlp`: an ensemble of networks that learns a step at a time, with replay, and serves averaged weights.

A step takes the labels that are new, and for each of them some earlier examples; its loss is divided by a constant, so
that no label counts more for the company it is learned in. Optimised by AdamW (Loshchilov & Hutter, arXiv 1711.05101)
with clipped gradients and a warm-up; an exponential average of the weights is served (Polyak & Juditsky, Acceleration
of stochastic approximation by averaging, 1992). Dropout (Srivastava et al., 2014) leaves out inputs, the same for all
members, and hidden units, of each member its own.

Guaranteed: random draws depend on the seed and the number of the step alone, so a learner goes on from a checkpoint bit
for bit, on one thread. A step whose gradient is not finite changes nothing. Not guaranteed: that a label is learned
before `new_examples` of them have come.
"""

from __future__ import annotations

import msgpack
import numpy as np
from numpy.typing import NDArray

from stream.errors import StoreError
from stream.model.heads import mlp_tensors, standardise, with_pieces
from stream.model.parameters import Tensor
from stream.settings import Task
from trainer.checkpoint import pack_array, unpack_array
from trainer.learner.examples import Batch, Examples
from trainer.learner.part import Floats, Labelled, Load
from trainer.learner.standardiser import Standardiser

__all__ = ["MlpLearner"]

Singles = NDArray[np.float32]

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8


class MlpLearner:
    """The part `mlp` of a task's head.

    Parameters
    ----------
    sees: (F,) which of the task's inputs it sees.
    is_number: (F,) which inputs it reads in pieces as well.
    standardiser: fixed before the first label is given to `learn`.
    examples: where each label is before it is given to `learn`.
    seed: of every random choice.
    """

    def __init__(
        self,
        task: str,
        settings: Task,
        sees: NDArray[np.bool_],
        is_number: NDArray[np.bool_],
        standardiser: Standardiser,
        examples: Examples,
        seed: int,
    ) -> None:
        self._task = task
        self._kind = settings.kind
        self._mlp = settings.mlp
        self._sees = sees
        self._numbers = np.flatnonzero(is_number[sees])
        #: Which of the columns that are served it reads.
        self._reads = np.concatenate([sees, np.repeat(sees[is_number], self._mlp.pieces), [True]])
        self._width = width = int(self._reads.sum()) - 1
        self._outputs = max(1, len(settings.classes))
        self._standardiser = standardiser
        self._examples = examples
        self._seed = seed
        members, hidden = self._mlp.members, self._mlp.hidden
        self._first = (width + 1, members * hidden)
        self._last = (members, hidden + 1, self._outputs)
        self._weights = self._initial()
        self._momentum = np.zeros_like(self._weights)
        self._squares = np.zeros_like(self._weights)
        self._average = self._weights.copy()
        self._steps = 0
        self._taken = 0
        self.behind = 0
        #: Of a regression's labels: count, mean, sum of squared deviations.
        self._moments = np.zeros(3)

    def _initial(self) -> Singles:
        random = np.random.default_rng([self._seed, 0])
        first = random.uniform(-1.0, 1.0, self._first).astype(np.float32) * np.float32((self._width + 1) ** -0.5)
        last = random.uniform(-1.0, 1.0, self._last).astype(np.float32) * np.float32((self._last[1]) ** -0.5)
        first[-1] = 0.0
        last[:, -1] = 0.0
        return np.concatenate([first.reshape(-1), last.reshape(-1)])

    def _layers(self, flat: Singles) -> tuple[Singles, Singles]:
        cut = self._first[0] * self._first[1]
        return flat[:cut].reshape(self._first), flat[cut:].reshape(self._last)

    def learn(self, one: Labelled, x: Floats) -> int:
        if self._kind == "regression":
            count, mean, squares = self._moments.tolist()
            difference = one.target - mean
            mean += difference / (count + 1)
            self._moments[:] = count + 1, mean, squares + difference * (one.target - mean)
        self.behind += 1
        return self._step() if self.behind >= self._mlp.new_examples else 0

    def _step(self) -> int:
        center, scale = self._standardiser.fixed
        new = np.arange(self._taken, self._taken + self.behind)
        self._taken += self.behind
        self.behind = 0
        self._steps += 1
        random = np.random.default_rng([self._seed, self._steps])
        first = self._examples.first(self._taken)
        earlier = int(new[0]) - first
        replayed = random.integers(first, new[0], len(new) * self._mlp.replay) if earlier > 0 else new[:0]
        batch = self._examples.take(np.concatenate([new, replayed]))
        sees = self._sees
        inputs = batch.inputs if sees.all() else batch.inputs[:, sees]
        x = with_pieces(standardise(inputs, center[sees], scale[sees]), self._numbers, self._mlp.pieces)
        with np.errstate(over="ignore", invalid="ignore"):
            gradient = self._gradient(x.astype(np.float32), batch, len(new) * (1 + self._mlp.replay), random)
            norm = float(np.sqrt(np.square(gradient, dtype=np.float64).sum()))
        if not np.isfinite(norm):
            return len(new)
        if norm > self._mlp.clip_norm:
            gradient *= np.float32(self._mlp.clip_norm / norm)
        self._update(gradient)
        return 0

    def _gradient(self, x: Singles, batch: Batch, divisor: int, random: np.random.Generator) -> Singles:
        mlp = self._mlp
        members, hidden = mlp.members, mlp.hidden
        n = len(x)
        first, last = self._layers(self._weights)
        kept = random.random((n, self._width), np.float32) >= mlp.dropout
        x[:, :-1] *= kept / np.float32(1.0 - mlp.dropout)
        before = x @ first
        passed = (random.random((n, members * hidden), np.float32) >= mlp.hidden_dropout) & (before > 0)
        through = passed / np.float32(1.0 - mlp.hidden_dropout)
        units = (before * through).reshape(n, members, hidden).transpose(1, 0, 2)
        scores = (units @ last[:, :-1] + last[:, -1:]).astype(np.float32, copy=False)
        error = self._error(scores, batch) * (batch.weight / divisor).astype(np.float32)[None, :, None]
        gradient = np.empty_like(self._weights)
        to_first, to_last = self._layers(gradient)
        to_last[:, :-1] = units.transpose(0, 2, 1) @ error
        to_last[:, -1] = error.sum(axis=1)
        back = (error @ last[:, :-1].transpose(0, 2, 1)).transpose(1, 0, 2).reshape(n, members * hidden)
        to_first[:] = x.T @ (back * through)
        return gradient

    def _error(self, scores: Singles, batch: Batch) -> Singles:
        """(members, n, outputs): what the loss of each score rises by."""
        target = batch.target.astype(np.float32)
        if self._kind == "binary":
            shifted = scores[..., 0] + batch.offset.astype(np.float32)
            error: Singles = (0.5 + 0.5 * np.tanh(0.5 * shifted) - target)[..., None]
            return error
        if self._kind == "regression":
            center, spread = self._spread()
            return scores - ((batch.target - center) / spread).astype(np.float32)[None, :, None]
        powers = np.exp(scores - scores.max(axis=2, keepdims=True))
        chances: Singles = powers / powers.sum(axis=2, keepdims=True)
        chances[:, np.arange(len(target)), batch.target.astype(np.int64)] -= 1.0
        return chances

    def _update(self, gradient: Singles) -> None:
        mlp, steps = self._mlp, self._steps
        rate = mlp.learning_rate * min(1.0, steps / max(1, mlp.warm_up))
        self._momentum += (gradient - self._momentum) * np.float32(1.0 - _BETA_1)
        self._squares += (np.square(gradient) - self._squares) * np.float32(1.0 - _BETA_2)
        self._weights *= np.float32(1.0 - rate * mlp.weight_decay)
        spread = np.sqrt(self._squares * np.float32(1.0 / (1.0 - _BETA_2**steps))) + np.float32(_EPSILON)
        self._weights -= self._momentum * np.float32(rate / (1.0 - _BETA_1**steps)) / spread
        # At first the average is one of few steps, not of the random start.
        stays = min(mlp.average, steps / (steps + 10.0))
        self._average += (self._weights - self._average) * np.float32(1.0 - stays)

    def _spread(self) -> tuple[float, float]:
        count, mean, squares = self._moments.tolist()
        deviation = (squares / count) ** 0.5 if count else 0.0
        return mean, deviation if deviation > 0.0 else 1.0

    def tensors(self, center: Floats, scale: Floats, *, settled: bool = False) -> dict[str, Tensor]:
        if not self._steps:
            return {}
        first, last = self._layers(self._average)
        if self._kind == "regression":
            mean, spread = self._spread()
            last = last * np.float32(spread)
            last[:, -1] += np.float32(mean)
        whole = np.zeros((len(self._reads), first.shape[1]), np.float32)
        whole[self._reads] = first
        return mlp_tensors(self._task, center, scale, {"input": whole, "output": last.copy()})

    def save(self) -> dict[str, bytes]:
        flat = np.stack([self._weights, self._momentum, self._squares, self._average])
        counts: bytes = msgpack.packb([self._steps, self._taken, self.behind, self._moments.tolist()])
        return {"mlp": pack_array(flat), "mlp-counts": counts}

    def load(self, load: Load) -> None:
        flat = unpack_array(load("mlp"))
        if flat.shape[1] != len(self._weights):
            raise StoreError(
                f"task {self._task!r}: the networks of its head mlp have {len(self._weights)} weights, those of the "
                f"checkpoint {flat.shape[1]}: restore members, hidden and pieces of tasks.{self._task}.mlp, or use "
                f"another trainer.data_dir"
            )
        self._weights, self._momentum, self._squares, self._average = (row.copy() for row in flat)
        self._steps, self._taken, self.behind, moments = msgpack.unpackb(load("mlp-counts"))
        self._moments = np.array(moments)

    def close(self) -> None:
        pass
