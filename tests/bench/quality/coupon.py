"""Coupon campaigns of a shop as a stream to measure quality on; see `trainer.demo.journey`."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from stream.wire import encode_feedback
from tests.bench.quality.streams import EXAMPLES, NEVER_MS, Points, Record, Stream
from trainer.demo.baselines import aggregates
from trainer.demo.comparison import MIDYEAR_MS
from trainer.demo.encoding import EventPacker
from trainer.demo.journey import DAY_MS, TASK, YEAR_START_MS, Journey, load

__all__ = ["coupon_stream"]

_PACK_EVENTS = 20_000


def coupon_stream(cases: int | None = None, directory: Path | None = None) -> Stream:
    """Will this household redeem a coupon of the campaign it has just been sent?

    One point for each send. Its label is final when the campaign is over, whatever it is: positives that are known
    earlier are a biased sample. A campaign that was still open at the end of the year has none.

    Parameters
    ----------
    cases: only the first so many households.
    directory: of the data; by default the installed package's.
    """
    journey = load(directory)
    if cases is not None:
        journey = _of_first(journey, cases)
    sends = journey.sends
    end_ms = journey.campaigns.end_ms[sends.campaign]
    points = Points(
        sends.household.astype(np.str_), sends.timestamp_ms, sends.redeemed_ms >= 0,
        np.where(end_ms <= journey.end_ms, end_ms, NEVER_MS), aggregates(journey).values, codes=0,
    )  # fmt: skip
    feedback = [(one.timestamp_ms, one.client_id.encode(), encode_feedback(one)) for one in journey.feedback()]
    return Stream(
        settings=EXAMPLES / "shop.toml",
        task=TASK,
        output=TASK,
        events=_records(journey),
        feedback=feedback,
        points=points,
        judged_from_ms=MIDYEAR_MS,
        trunk="next_event",
        trunk_until_ms=YEAR_START_MS + 91 * DAY_MS,
        pace=10_000.0,
        behind=8_000,
        fits=3,
        leaf_examples=100,
        penalty=100.0,
        rate=0.003,
        intercept_rate=0.01,
    )


def _of_first(journey: Journey, households: int) -> Journey:
    kept = np.unique(journey.sends.household)[:households]

    def own(table: Any) -> Any:
        chosen = np.isin(table.household, kept)
        return replace(table, **{one.name: getattr(table, one.name)[chosen] for one in fields(table)})

    tables = [own(table) for table in (journey.purchases, journey.sends, journey.redemptions)]
    times = np.concatenate([table.timestamp_ms for table in tables])
    owner = np.concatenate([table.household for table in tables])
    order = np.lexsort((np.arange(len(times)), owner, times))
    return Journey(journey.products, tables[0], journey.campaigns, tables[1], tables[2], order, times[order])


def _records(journey: Journey) -> list[Record]:
    packer = EventPacker(journey)
    records: list[Record] = []
    for at in range(0, len(journey), _PACK_EVENTS):
        part = slice(at, min(at + _PACK_EVENTS, len(journey)))
        records += zip(journey.timestamp_ms[part].tolist(), *packer.pack(part), strict=True)
    return records
