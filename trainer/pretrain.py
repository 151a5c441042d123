"""Pretraining of the trunk: category tables and recurrent cell, from past events and the labels known by then.

The events go through the same encoder as in the worker, so what is trained is what is served. Guaranteed: the
same events, settings and machine give the same trunk; category values below their field's `min_count` are
learned as the field's `rare` row, as is a small random share of the others.

Not guaranteed: that states in the middle of a long history are trained on: a sequence starts from a zero
state wherever it is cut.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stream.errors import DataError
from stream.model.engine import EventEncoder, pack_values
from stream.model.layout import Layout
from stream.model.parameters import ParameterSet, Tensor
from stream.settings import Settings
from stream.wire import EventDecoder, FeedbackRecord, RecordBlock, Schema
from trainer.files import load_parameters, read_event_file, save_parameters
from trainer.labelled import History, placed_labels
from trainer.objectives import Answer, Answers, NextEvent, Targets, baseline_loss
from trainer.trunk import encoded_events, one_thread
from trainer.vocabulary import Survey

__all__ = [
    "Fit",
    "fit",
    "load_parameters",
    "pretrain",
    "random_trunk",
    "read_event_file",
    "save_parameters",
]

logger = logging.getLogger(__name__)

Progress = Callable[[float, str], None]

#: Share of known category values that are shown as rare in training, so that the rare row means something.
_RARE_SHARE = 0.02
_HELD_OUT = 0.05
_CLIP_NORM = 1.0
_WEIGHT_DECAY = 0.01
_ENCODING_SHARE = 0.25


@dataclass(frozen=True)
class Fit:
    """A trained trunk, its loss per event on held-out sequences, and that of the best constant."""

    parameters: ParameterSet
    loss: float
    baseline: float
    events: int
    sequences: int


def pretrain(settings: Settings, blocks: Iterable[RecordBlock], progress: Progress | None = None) -> ParameterSet:
    """Train a trunk on events in stream order; see `fit`."""
    return fit(settings, blocks, progress).parameters


def random_trunk(settings: Settings, blocks: Iterable[RecordBlock]) -> ParameterSet:
    """A trunk of random weights; values and scales are those of the events, if there are any."""
    layout = Layout.compile(settings, Schema.compile(settings))
    decoder = EventDecoder(layout.schema, settings.limits, settings.topics.format)
    survey = Survey(layout)
    survey.extend(decoder.decode(block) for block in blocks)
    with one_thread():
        return _Trunk(layout, survey, torch.Generator().manual_seed(settings.model.seed)).parameters_set()


def fit(
    settings: Settings,
    blocks: Iterable[RecordBlock],
    progress: Progress | None = None,
    feedback: Iterable[FeedbackRecord] = (),
) -> Fit:
    """Train a trunk.

    Parameters
    ----------
    blocks: events in stream order, offsets rising from block to block. What is no event is skipped.
    progress: called with the share done, 0 to 1, and a line of text.
    feedback: labels to train on as well. What answers no event of the task is skipped; of two for the same prediction
    the later one counts.

    Raises
    ------
    DataError: no client has two events, so nothing can be learned.
    """
    tell = progress or (lambda share, text: None)
    layout = Layout.compile(settings, Schema.compile(settings))
    decoder = EventDecoder(layout.schema, settings.limits, settings.topics.format)
    kept = list(blocks)
    survey = Survey(layout)
    survey.extend(decoder.decode(block) for block in kept)
    tell(0.05, f"{survey.events:,} events read")
    with one_thread():
        generator = torch.Generator().manual_seed(settings.model.seed)
        trunk = _Trunk(layout, survey, generator)
        history, slot = _encode(layout, decoder, survey, kept)
        labels = placed_labels(layout, history, slot, feedback)
        windows = _windows(history, settings, np.random.default_rng(settings.model.seed), bool(labels))
        tell(_ENCODING_SHARE, f"{len(windows.start):,} sequences of {survey.events:,} events encoded")
        loss, baseline = _train(layout, settings, trunk, history, windows, labels, generator, tell)
    logger.info("pretrained: loss %.4f, constant %.4f, %d events", loss, baseline, survey.events)
    return Fit(trunk.parameters_set(), loss, baseline, survey.events, len(windows.start))


class _Trunk(nn.Module):
    """The learned part of the encoder and the cell, as `stream.model` computes them."""

    def __init__(self, layout: Layout, survey: Survey, generator: torch.Generator) -> None:
        super().__init__()
        self._layout = layout
        self._values = survey.values
        self._scale = survey.scale
        self.tables = nn.ParameterList(
            nn.Parameter(torch.randn(len(values) + 1, field.width, generator=generator) * 0.1)
            for values, field in zip(self._values, layout.embedded, strict=True)
        )
        with torch.random.fork_rng(devices=[]):
            self.cell = nn.GRU(layout.inputs, layout.hidden, batch_first=True)
        bound = layout.hidden**-0.5
        with torch.no_grad():
            for weight in self.cell.parameters():
                weight.uniform_(-bound, bound, generator=generator)

    def forward(self, dense: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """States (b, t, H) of sequences from zero; dense (b, t, inputs), codes (b, t, fields), -1 absent."""
        states: torch.Tensor = self.cell(encoded_events(dense, codes, list(self.tables)))[0]
        return states

    def parameters_by_name(self) -> dict[str, torch.Tensor]:
        return {
            "trunk/weight_ih": self.cell.weight_ih_l0,
            "trunk/weight_hh": self.cell.weight_hh_l0,
            "trunk/bias_ih": self.cell.bias_ih_l0,
            "trunk/bias_hh": self.cell.bias_hh_l0,
            **{
                f"trunk/embedding/{field.name}": table
                for field, table in zip(self._layout.embedded, self.tables, strict=True)
            },
        }

    def parameters_set(self) -> ParameterSet:
        tensors: dict[str, Tensor] = {"trunk/scale": self._scale}
        for field, values in zip(self._layout.embedded, self._values, strict=True):
            tensors.update(pack_values(field.name, values))
        for name, tensor in self.parameters_by_name().items():
            tensors[name] = tensor.detach().numpy().astype(np.float32)
        return ParameterSet(tensors)


class _Rows:
    """Rows of every client, for the encoder; only times are read back."""

    def __init__(self, clients: int, width: int) -> None:
        self.vectors = np.zeros((clients, width), np.float32)
        self.events_seen = np.zeros(clients, np.int64)
        self.last_event_ms = np.zeros(clients, np.int64)
        self.applied_offset = np.full(clients, -1, np.int64)


def _encode(
    layout: Layout, decoder: EventDecoder, survey: Survey, blocks: list[RecordBlock]
) -> tuple[History, dict[bytes, int]]:
    """All events, and the number of each client."""
    encoder = EventEncoder(layout, survey.values, survey.scale)
    slot: dict[bytes, int] = {}
    batches = []
    for block in blocks:
        columns = decoder.decode(block)
        slots = np.full(columns.n, -1, np.int64)
        for i in np.flatnonzero(columns.accepted).tolist():
            slots[i] = slot.setdefault(block.key(i) or b"", len(slot))
        batches.append((columns, slots))
    rows = _Rows(max(1, len(slot)), layout.width)
    dense, codes, owners, times, kinds = [], [], [], [], []
    for columns, slots in batches:
        encoded = encoder.encode(columns, slots, rows)
        used = np.flatnonzero(encoded.position >= 0)
        dense.append(encoded.dense[encoded.position[used]])
        codes.append(encoded.codes[used])
        owners.append(slots[used])
        times.append(columns.timestamp_ms[used])
        kinds.append(columns.modality[used].astype(np.int64))
    owner = np.concatenate([*owners, np.zeros(0, np.int64)])
    order = np.argsort(owner, kind="stable")
    counts = np.bincount(owner, minlength=len(slot))
    history = History(
        torch.from_numpy(np.concatenate(dense)[order]) if dense else torch.zeros((0, layout.dense_inputs)),
        torch.from_numpy(np.concatenate(codes)[order].astype(np.int64))
        if codes
        else torch.zeros((0, len(layout.embedded)), dtype=torch.int64),
        np.concatenate([*times, np.zeros(0, np.int64)])[order],
        np.concatenate([*kinds, np.zeros(0, np.int64)])[order],
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )
    return history, slot


@dataclass(frozen=True)
class _Windows:
    """Sequences: `start` (k,) in the history and `length` (k,) of positions."""

    start: NDArray[np.int64]
    length: NDArray[np.int64]


def _windows(history: History, settings: Settings, random: np.random.Generator, to_the_last: bool) -> _Windows:
    """Sequences of all events that have a next one, and, `to_the_last`, of those that have none."""
    size, spare = settings.pretrain.sequence, int(not to_the_last)
    starts, lengths = [], []
    for begin, end in zip(history.first[:-1].tolist(), history.first[1:].tolist(), strict=True):
        at = np.arange(begin, end - spare, size) if end - begin > 1 else np.zeros(0, np.int64)
        starts.append(at)
        lengths.append(np.minimum(size, end - spare - at))
    start = np.concatenate([*starts, np.zeros(0, np.int64)]).astype(np.int64)
    length = np.concatenate([*lengths, np.zeros(0, np.int64)]).astype(np.int64)
    if not len(start):
        raise DataError("pretraining needs at least one client with two events; the events given have none")
    chosen = random.permutation(len(start))[: settings.pretrain.max_sequences]
    return _Windows(start[chosen], length[chosen])


def _target_fields(layout: Layout) -> list[int]:
    names = [field.name for field in layout.embedded]
    return [names.index(target) for target in layout.settings.pretrain.targets]


def _targets(layout: Layout, history: History, position: torch.Tensor, there: torch.Tensor) -> Targets:
    is_last = torch.zeros(len(history.timestamp_ms), dtype=torch.bool)
    is_last[history.first[1:][np.diff(history.first) > 0] - 1] = True
    valid = there & ~is_last[position]
    following = (position + 1).clamp(max=len(history.timestamp_ms) - 1)
    times = torch.from_numpy(history.timestamp_ms)
    elapsed_s = (times[following] - times[position]).clamp(min=0).double() / 1000.0
    log_time = elapsed_s.log1p()
    seen = log_time[valid]
    log_time = (log_time - seen.mean()) / seen.std(unbiased=False).clamp(min=1e-3)
    return Targets(history.codes[following][..., _target_fields(layout)], log_time.float(), valid)


def _train(
    layout: Layout,
    settings: Settings,
    trunk: _Trunk,
    history: History,
    windows: _Windows,
    labels: list[Answer],
    generator: torch.Generator,
    tell: Progress,
) -> tuple[float, float]:
    """Train in place; returns the held-out loss and the constant's."""
    span = int(windows.length.max())
    last = len(history.timestamp_ms) - 1
    position = (torch.from_numpy(windows.start)[:, None] + torch.arange(span)[None, :]).clamp(max=last)
    there = torch.arange(span)[None, :] < torch.from_numpy(windows.length)[:, None]
    targets = _targets(layout, history, position, there)
    answers = [Answer(one.classes, one.target[position], one.weight[position] * there) for one in labels]
    held_out = torch.arange(max(1, int(len(position) * _HELD_OUT)))
    learned = torch.arange(len(held_out) if len(position) > 1 else 0, len(position))
    classes = [len(trunk.tables[field]) for field in _target_fields(layout)]
    next_event = NextEvent(layout.hidden, classes, generator)
    next_event.start_from(targets.take(learned))
    answered = Answers(layout.hidden, [one.take(learned) for one in answers], generator)

    def objective(states: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        of_events: torch.Tensor = next_event(states, targets.take(which))
        of_labels: torch.Tensor = answered(states, [one.take(which) for one in answers])
        return settings.pretrain.event_weight * of_events + settings.pretrain.label_weight * of_labels

    weights = [*trunk.parameters_by_name().values(), *next_event.parameters(), *answered.parameters()]
    batch = settings.pretrain.batch_clients
    steps = settings.pretrain.epochs * -(-len(learned) // batch)
    optimiser = torch.optim.AdamW(weights, lr=settings.pretrain.learning_rate, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.pretrain.learning_rate, total_steps=steps + 1, pct_start=0.1
    )
    step = 0
    for _ in range(settings.pretrain.epochs):
        order = learned[torch.randperm(len(learned), generator=generator)]
        for chosen in torch.split(order, batch):
            at = position[chosen]
            codes = history.codes[at]
            hide = (torch.rand(codes.shape, generator=generator) < _RARE_SHARE) & (codes > 0)
            states = trunk(history.dense[at], codes.masked_fill(hide, 0))
            loss = objective(states, chosen)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(weights, _CLIP_NORM)
            optimiser.step()
            schedule.step()
            step += 1
            share = _ENCODING_SHARE + (1.0 - _ENCODING_SHARE) * step / steps
            tell(share, f"step {step} of {steps}, loss {loss.item():.4f}")
    with torch.no_grad():
        at = position[held_out]
        states = trunk(history.dense[at], history.codes[at])
        loss = objective(states, held_out)
    constant = settings.pretrain.event_weight * baseline_loss(targets.take(held_out))
    return float(loss), constant + settings.pretrain.label_weight * answered.constant_loss(
        [one.take(held_out) for one in answers]
    )
