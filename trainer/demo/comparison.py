"""The models of a run beside each other: as it served, frozen at mid-year, and batch models on hand-made aggregates.

Guaranteed: what is called live was read back from the embeddings topic, as any user would have; every model is
measured on the same predictions, and on all those of a campaign or on none. A campaign that was still open at
the end of the stream is left out: of its labels only the positive ones would be known.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from confluent_kafka import Consumer, KafkaError, TopicPartition
from numpy.typing import NDArray

from stream.errors import BrokerError
from stream.kafka import client_config
from stream.model.heads import Questions
from stream.model.layout import Layout
from stream.settings import Settings
from stream.wire import Schema, decode_embedding
from trainer.demo.baselines import aggregates, refitted_logistic, retrained_lightgbm
from trainer.demo.journey import TASK, Journey
from trainer.demo.report import Series, draw_auc_over_time
from trainer.evaluation import Interval, auc, auc_difference_interval
from trainer.record import read_record
from trainer.report.again import Again

__all__ = ["MIDYEAR_MS", "Comparison", "compare", "served_predictions"]

MIDYEAR_MS = int(np.datetime64("2017-07-01", "ms").astype(np.int64))
TITLE = "Will this household redeem a coupon of the campaign it was sent?"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """AUC by model, NaN where there is nothing to measure; how much live is ahead of each other one, with the 95 %
    interval over households; on what; where it is drawn; embeddings read."""

    auc: dict[str, float]
    ahead: dict[str, Interval]
    evaluated: str
    picture: Path | None
    embeddings: int


def compare(settings: Settings, journey: Journey, record: Path, picture: Path) -> Comparison:
    """Measure the models on the campaigns sent from July on, and draw the year.

    Parameters
    ----------
    record: the trainer's file of answered examples.
    picture: PNG file to draw to.

    Raises
    ------
    BrokerError: the embeddings topic cannot be read.
    DataError: the record cannot be read.
    """
    sends = journey.sends
    redeemed = sends.redeemed_ms >= 0
    served, embeddings = served_predictions(settings, TASK)
    closed = journey.campaigns.end_ms[sends.campaign] <= journey.end_ms
    judged = closed & (sends.timestamp_ms >= MIDYEAR_MS)
    unknown = np.full(len(sends), np.nan)
    scores = {
        "live": _of_sends(journey, served),
        # Before mid-year the frozen model would be asked about what it learned from.
        "frozen at mid-year": _frozen(settings, journey, record) if judged.any() else unknown,
        "LightGBM on aggregates, retrained": unknown,
        "logistic regression on aggregates, refitted": unknown,
    }
    if judged.any():
        features = aggregates(journey)
        scores["LightGBM on aggregates, retrained"] = retrained_lightgbm(journey, features)
        scores["logistic regression on aggregates, refitted"] = refitted_logistic(journey, features)
    for values in scores.values():
        judged &= np.isfinite(values)
    drawn = [
        Series(name, sends.timestamp_ms[closed], redeemed[closed], values[closed]) for name, values in scores.items()
    ]
    there = any(np.isfinite(one.scores).any() for one in drawn)
    live = scores["live"][judged]
    ahead = {
        name: auc_difference_interval(
            sends.household[judged], redeemed[judged], live, values[judged], np.random.default_rng(0)
        )
        for name, values in scores.items()
        if name != "live"
    }
    return Comparison(
        auc={name: auc(redeemed[judged], values[judged]) for name, values in scores.items()},
        ahead=ahead,
        evaluated=f"{int(judged.sum()):,} campaign sends from July on, of campaigns that ended within the stream",
        picture=draw_auc_over_time(picture, drawn, title=TITLE, evaluated_from_ms=MIDYEAR_MS) if there else None,
        embeddings=embeddings,
    )


def _of_sends(journey: Journey, said: dict[tuple[bytes, int], float]) -> Floats:
    """float64[sends]: what was said of each (client, moment); NaN where nothing was."""
    sends = journey.sends
    moments = zip(sends.household.tolist(), sends.timestamp_ms.tolist(), strict=True)
    return np.array([said.get((str(household).encode(), at), np.nan) for household, at in moments])


def served_predictions(settings: Settings, output: str) -> tuple[dict[tuple[bytes, int], float], int]:
    """The first prediction served at each (client, moment), from the embeddings topic, and the records there."""
    topic = settings.topics.embeddings
    # A map of predictions that is not empty holds the task's name; decoding the others can be spared.
    name = output.encode()
    served: dict[tuple[bytes, int], float] = {}
    records = 0
    consumer = Consumer(client_config(settings, group_id="report", enable_auto_commit=False, enable_partition_eof=True))
    try:
        open_partitions = set(range(settings.topics.partitions))
        consumer.assign([TopicPartition(topic, p, 0) for p in open_partitions])
        while open_partitions:
            for message in consumer.consume(20_000, timeout=1.0):
                error = message.error()
                if error is not None:
                    if error.code() != KafkaError._PARTITION_EOF:
                        raise BrokerError(f"topic {topic!r} cannot be read: {error.str()}")
                    open_partitions.discard(message.partition())
                    continue
                records += 1
                value = message.value()
                if value is not None and name in value[-64:]:
                    embedding = decode_embedding(value)
                    served.setdefault((message.key(), embedding.timestamp_ms), embedding.predictions[output])
    finally:
        consumer.close()
    return served, records


def _frozen(settings: Settings, journey: Journey, record: Path) -> Floats:
    """float64[sends]: what the head of mid-year says of every answered send from then on; NaN for the others."""
    examples = read_record(record)[TASK]
    question = Questions(Layout.compile(settings, Schema.compile(settings))).by_task[TASK]
    predictions = Again.of(settings, question, examples).frozen_at(MIDYEAR_MS)[:, 0].tolist()
    moments = zip(examples.client_id, examples.as_of_ms.tolist(), strict=True)
    later = {who: said for who, said in zip(moments, predictions, strict=True) if who[1] >= MIDYEAR_MS}
    return _of_sends(journey, later)
