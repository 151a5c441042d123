"""What a team without live embeddings does: hand-made aggregates and boosted trees, refitted per campaign.

For every campaign sent to a household, aggregates of what the stream knew before the send; at every campaign
start, a LightGBM model fitted on the sends of campaigns whose last day was over by then, with the labels as
they were when that day ended. So no prediction rests on anything later than itself.

Guarantees: deterministic (fixed seeds, one thread); a feature of a send reads purchases, sends and
redemptions strictly before it. Not used: which products a campaign's coupons are for. A campaign is described
by its type alone: with its length or number of coupons, nearly unique to each campaign, the trees learn
single campaigns by heart and rank later ones worse (AUC .815 instead of .820).
"""

from __future__ import annotations

from dataclasses import dataclass

import lightgbm
import numpy as np
from numpy.typing import NDArray

from trainer.demo.journey import DAY_MS, Journey

__all__ = ["Aggregates", "aggregates", "retrained_lightgbm"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

WINDOWS_DAYS = (14, 60, 365)
TYPES = ("Type A", "Type B", "Type C")
DEPARTMENTS = 21
#: A model needs this many closed examples of each class; before that, every send gets the rate so far.
LEAST_OF_EACH_CLASS = 10

PARAMETERS = {
    "objective": "binary",
    "learning_rate": 0.03,
    "num_leaves": 15,
    "bagging_fraction": 0.5,
    "bagging_freq": 1,
    "feature_fraction": 0.3,
    "lambda_l2": 10.0,
    "max_bin": 63,
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 1,
    "verbosity": -1,
}
TREES = 250


@dataclass(frozen=True)
class Aggregates:
    """Hand-made features of every send, in the order of `Journey.sends`."""

    names: list[str]
    #: float32[sends, len(names)]; NaN where there is nothing to say (no basket yet)
    values: NDArray[np.float32]


class _Clients:
    """One table of happenings sorted by household and time, for sums over any window before a moment."""

    def __init__(self, household: Ints, timestamp_ms: Ints) -> None:
        self.order = np.lexsort((timestamp_ms, household))
        self._household = household[self.order]
        self._time = timestamp_ms[self.order]
        # One sortable number for household and time: times of the year in ms take fewer than 42 bits.
        self._key = (self._household << 42) + self._time

    def before(self, household: Ints, moment_ms: Ints) -> Ints:
        """int64[m]: how many happenings, in sorted order, lie before each (household, moment)."""
        return np.searchsorted(self._key, (household << 42) + np.maximum(moment_ms, 0), "left")

    def sums(self, values: Floats) -> Floats:
        """float64[n + 1]: running sums of `values` (given in the original order), from 0, in hundredths.

        Whole cents add without rounding: a sum over one client does not depend on what others bought.
        """
        return np.concatenate([[0.0], np.cumsum(np.rint(values[self.order] * 100.0))])

    def last_time(self, chosen: NDArray[np.bool_], first: Ints, last: Ints) -> Floats:
        """float64[m]: time of the last chosen happening in [first, last), NaN where there is none."""
        at = np.where(chosen[self.order], np.arange(len(self.order)), -1)
        latest = np.concatenate([[-1], np.maximum.accumulate(at)])[last] if len(at) else last - last - 1
        return np.where(latest >= first, self._time[np.maximum(latest, 0)], np.nan)


def aggregates(journey: Journey) -> Aggregates:
    """The features of every send of `journey`."""
    sends = journey.sends
    columns: dict[str, Floats] = {}
    _campaign_columns(journey, columns)
    _purchase_columns(journey, columns)
    _history_columns(journey, columns)
    values = np.empty((len(sends), len(columns)), np.float32)
    for at, column in enumerate(columns.values()):
        values[:, at] = column
    return Aggregates(list(columns), values)


def _campaign_columns(journey: Journey, columns: dict[str, Floats]) -> None:
    campaigns, campaign = journey.campaigns, journey.sends.campaign
    for name in TYPES:
        columns[name] = (campaigns.campaign_type[campaign] == name).astype(np.float64)


def _purchase_columns(journey: Journey, columns: dict[str, Floats]) -> None:
    lines, sends, products = journey.purchases, journey.sends, journey.products
    clients = _Clients(lines.household, lines.timestamp_ms)
    first = clients.before(sends.household, np.zeros(len(sends), np.int64))
    last = clients.before(sends.household, sends.timestamp_ms)
    _, first_line = np.unique(lines.basket, return_index=True)
    new_basket = np.zeros(len(lines), bool)
    new_basket[first_line] = True
    coupon = lines.coupon_disc > 0.0
    couponed = np.unique(lines.basket[coupon])
    measures: dict[str, Floats] = {
        "lines": np.ones(len(lines)),
        "baskets": new_basket.astype(np.float64),
        "sales": lines.sales_value,
        "retail_disc": lines.retail_disc,
        "coupon_disc": lines.coupon_disc,
        "coupon_match_disc": lines.coupon_match_disc,
        "coupon_lines": coupon.astype(np.float64),
        "coupon_baskets": (new_basket & np.isin(lines.basket, couponed)).astype(np.float64),
        "private_sales": np.where(products.brand[lines.product] == "Private", lines.sales_value, 0.0),
    }
    for name, measure in measures.items():
        sums = clients.sums(measure)
        for days in WINDOWS_DAYS:
            since = clients.before(sends.household, sends.timestamp_ms - days * DAY_MS)
            columns[f"{name}_{days}d"] = (sums[last] - sums[since]) / 100.0
    for days in WINDOWS_DAYS:
        baskets = np.maximum(columns[f"baskets_{days}d"], 1.0)
        sales = np.maximum(columns[f"sales_{days}d"], 1.0)
        columns[f"sales_per_basket_{days}d"] = columns[f"sales_{days}d"] / baskets
        columns[f"coupon_share_{days}d"] = columns[f"coupon_baskets_{days}d"] / baskets
        columns[f"private_share_{days}d"] = columns[f"private_sales_{days}d"] / sales
        columns[f"discount_share_{days}d"] = columns[f"retail_disc_{days}d"] / sales
    # A product without a department counts as one of "None".
    names, of_product = np.unique(products.department.astype(str), return_inverse=True)
    department = of_product[lines.product]
    # Chosen from what came before the first label could be learned from: nothing later decides a feature.
    early = lines.timestamp_ms < int(journey.campaigns.end_ms.min())
    common = np.argsort(-np.bincount(department[early], minlength=len(names)), kind="stable")[:DEPARTMENTS]
    for code in np.sort(common).tolist():
        sums = clients.sums(np.where(department == code, lines.sales_value, 0.0))
        columns[f"sales_of_{names[code]}"] = (sums[last] - sums[first]) / 100.0
    now = sends.timestamp_ms.astype(np.float64)
    every = np.ones(len(lines), bool)
    columns["days_since_basket"] = (now - clients.last_time(every, first, last)) / DAY_MS
    columns["days_since_coupon"] = (now - clients.last_time(coupon, first, last)) / DAY_MS


def _history_columns(journey: Journey, columns: dict[str, Floats]) -> None:
    """What the household was sent before, and what it redeemed as far as that was known."""
    sends, now = journey.sends, journey.sends.timestamp_ms
    kind = journey.campaigns.campaign_type[sends.campaign]
    sent = _Clients(sends.household, now)
    zero = np.zeros(len(sends), np.int64)
    sent_first, sent_last = sent.before(sends.household, zero), sent.before(sends.household, now)
    was_redeemed = sends.redeemed_ms >= 0
    known = _Clients(sends.household[was_redeemed], sends.redeemed_ms[was_redeemed])
    known_first, known_last = known.before(sends.household, zero), known.before(sends.household, now)
    for name in TYPES:
        sums = sent.sums((kind == name).astype(np.float64))
        columns[f"sent_{name}"] = (sums[sent_last] - sums[sent_first]) / 100.0
        sums = known.sums((kind[was_redeemed] == name).astype(np.float64))
        columns[f"redeemed_{name}"] = (sums[known_last] - sums[known_first]) / 100.0
    columns["sent"] = (sent_last - sent_first).astype(np.float64)
    columns["redeemed"] = (known_last - known_first).astype(np.float64)
    columns["redeemed_share"] = columns["redeemed"] / np.maximum(columns["sent"], 1.0)
    last_redeemed = known.last_time(np.ones(int(was_redeemed.sum()), bool), known_first, known_last)
    columns["days_since_redeemed"] = (now - last_redeemed) / DAY_MS


def retrained_lightgbm(journey: Journey, features: Aggregates | None = None, seeds: int = 3) -> Floats:
    """float64[sends]: the probability that each send is redeemed, by the model fitted at its campaign's
    start.

    The model is `seeds` fits that differ in their random draws, their log-odds averaged.
    """
    values = (features or aggregates(journey)).values
    sends = journey.sends
    end = journey.campaigns.end_ms[sends.campaign]
    redeemed = sends.redeemed_ms >= 0
    # Campaigns that start on one day share a model.
    day = sends.timestamp_ms // DAY_MS
    chances = np.empty(len(sends), np.float64)
    for start in np.unique(day).tolist():
        due = day == start
        closed = end < start * DAY_MS
        labels = redeemed[closed]
        positives = int(labels.sum())
        if min(positives, len(labels) - positives) < LEAST_OF_EACH_CLASS:
            chances[due] = (positives + 1.0) / (len(labels) + 10.0)
            continue
        # Large leaves keep it calm; a share, as the first fits have a few hundred examples.
        leaf = int(np.clip(len(labels) // 20, 20, 100))
        log_odds = np.zeros(int(due.sum()))
        for seed in range(seeds):
            parameters = {**PARAMETERS, "min_data_in_leaf": leaf, "seed": seed + 1}
            data = lightgbm.Dataset(values[closed], labels.astype(np.float32), params=parameters)
            model = lightgbm.train(parameters, data, num_boost_round=TREES)
            log_odds += np.asarray(model.predict(values[due], raw_score=True, num_threads=1)) / seeds
        chances[due] = 1.0 / (1.0 + np.exp(-log_odds))
    return chances
