"""What the trunk is worth: the same memory and the same head over states of trunks that were made in different ways.

Rows are those that a worker would have, as they are computed by the same engine from the same events; heads learn each
label when the trainer's record says that it was learned, so all that differs is the trunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from stream.model.engine import Engine
from stream.model.heads import Questions
from stream.model.layout import Layout
from stream.model.parameters import ParameterSet
from stream.settings import Settings
from stream.wire import EventDecoder, Schema, decode_feedback
from tests.bench.quality.live import record_blocks
from tests.bench.quality.streams import NEVER_MS, Stream
from tests.support.truth import PlainRows
from trainer.learner import Standardiser
from trainer.pretrain import fit, random_trunk
from trainer.record import AnsweredExamples
from trainer.report.again import Again

__all__ = ["TRUNKS", "made_trunk", "under_trunk"]

Maker = Callable[[Settings, Stream], ParameterSet]


def _random(settings: Settings, stream: Stream) -> ParameterSet:
    return random_trunk(settings, record_blocks(stream, stream.trunk_until_ms))


def _next_event(settings: Settings, stream: Stream) -> ParameterSet:
    return fit(settings, record_blocks(stream, stream.trunk_until_ms)).parameters


def _labels(settings: Settings, stream: Stream) -> ParameterSet:
    only = msgspec.structs.replace(settings.pretrain, event_weight=0.0, label_weight=1.0)
    settings = msgspec.structs.replace(settings, pretrain=only)
    known = [
        decode_feedback(client, value, None, settings)
        for at, client, value in stream.feedback
        if at < stream.trunk_until_ms
    ]
    final = [one for one in known if (one.window_end_ms or one.timestamp_ms) < stream.trunk_until_ms]
    return fit(settings, record_blocks(stream, stream.trunk_until_ms), feedback=final).parameters


#: How a trunk may be made of the events before `Stream.trunk_until_ms`: not at all; to predict each client's next
#: event; to predict the labels that were known by then.
TRUNKS: dict[str, Maker] = {"random": _random, "next_event": _next_event, "labels": _labels}


def made_trunk(name: str, settings: Settings, stream: Stream) -> ParameterSet:
    """The trunk of that name; see `TRUNKS`."""
    return TRUNKS[name](settings, stream)


def under_trunk(
    settings: Settings, stream: Stream, parameters: ParameterSet, examples: AnsweredExamples, at: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(n,) what heads would have said of the answered examples, at the points `at` (n,), had this been the trunk.

    Of several parts of a head the first alone learns.
    """
    task = settings.tasks[stream.task]
    alone = msgspec.structs.replace(task, head=task.parts[0])
    settings = msgspec.structs.replace(settings, tasks={**settings.tasks, stream.task: alone})
    rows = _rows(settings, stream, parameters)
    standardiser = Standardiser(rows.shape[1], task.standardise_after, task.standardise_again)
    fixed = [standardiser.fixed for row in rows if standardiser.observe(row)]
    # A scale begins where the trainer's did, which counts predictions without an answer too.
    pairs = zip(examples.scales, fixed, strict=False)
    scales = tuple(replace(one, center=center, scale=scale) for one, (center, scale) in pairs)
    under = replace(examples, inputs=rows[at], scales=scales)
    question = Questions(Layout.compile(settings, Schema.compile(settings))).by_task[stream.task]
    (said,), _ = Again.of(settings, question, under).published_every([1000], stream.judged_from_ms)
    return said[:, 0]


def _rows(settings: Settings, stream: Stream, parameters: ParameterSet) -> NDArray[np.float32]:
    """(points, F) what the head sees at each point."""
    layout = Layout.compile(settings, Schema.compile(settings))
    question = Questions(layout).by_task[stream.task]
    decoder = EventDecoder(layout.schema, settings.limits, "msgpack")
    engine = Engine(layout, parameters)
    moments = zip(stream.points.client.tolist(), stream.points.as_of_ms.tolist(), strict=True)
    point = {(client.encode(), at): i for i, (client, at) in enumerate(moments)}
    slot: dict[bytes, int] = {}
    for _, client, _ in stream.events:
        slot.setdefault(client, len(slot))
    kept = PlainRows(len(slot), layout.width)
    out = np.full((len(point), len(question.names)), np.nan, np.float32)
    for block in record_blocks(stream, NEVER_MS):
        columns = decoder.decode(block)
        keys = [block.key(i) or b"" for i in range(columns.n)]
        triggers = engine.advance(columns, np.array([slot[key] for key in keys]), kept).triggers
        own, inputs = question.ask(columns, triggers)
        for i, row in zip(triggers.event[own].tolist(), inputs, strict=True):
            number = point.get((keys[i], int(columns.timestamp_ms[i])))
            if number is not None:
                out[number] = row
    return out
