"""What a team without live embeddings does: hand-made aggregates and a batch model, refitted per campaign.

For every campaign sent to a household, aggregates of what the stream knew before the send; at every campaign
start, a model (LightGBM, or a logistic regression) fitted on the sends of campaigns whose last day was over by
then, with the labels as they were when that day ended. So no prediction rests on anything later than itself.

Guarantees: deterministic (fixed seeds, one thread); a feature of a send reads purchases, sends and
redemptions strictly before it. A campaign is described by its type, and by how its coupons match what the
household bought: by category, which is worth .005 to LightGBM and .007 to the regression, and by product, which
is worth .005 more to each. Not by its length or number of coupons: nearly unique to each campaign, they let the
trees learn single campaigns by heart and rank later ones worse (AUC .815 instead of .820, both without the match).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import lightgbm
import numpy as np
from numpy.typing import NDArray

from trainer.demo.journey import DAY_MS, Journey

__all__ = ["Aggregates", "aggregates", "refitted_logistic", "retrained_lightgbm"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
#: For each campaign, for each of its coupons, what it is for.
Listed = Sequence[Sequence[Sequence[str | int]]]

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
#: Of the logistic regression's weights.
PRIOR_PRECISION = 100.0
#: Coupons that the mean of the best is over.
BEST = 16


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
    products, campaigns = journey.products, journey.campaigns
    _match_columns(journey, "category", products.product_category, campaigns.categories, columns)
    _match_columns(journey, "product", products.product_id, campaigns.products, columns)
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


def _match_columns(
    journey: Journey, what: str, of_product: NDArray[np.object_], listed: Listed, columns: dict[str, Floats]
) -> None:
    """How often the household bought what the campaign's coupons are for: by coupon, lines of its products or of their
    categories; of these counts, on a logarithmic scale, the mean of the best, the best, the mean, and the count over
    all coupons."""
    lines, sends = journey.purchases, journey.sends
    names, numbers = np.unique(of_product.astype(str), return_inverse=True)
    number = {name: at for at, name in enumerate(names.tolist())}
    # What nobody ever buys has a number, too: a coupon for it counts among the coupons.
    pairs = [
        np.array([(at, number.get(str(name), len(names))) for at, group in enumerate(groups) for name in group]).T
        for groups in listed
    ]
    union = [np.unique(items) for _, items in pairs]
    clients = _Clients(lines.household, lines.timestamp_ms)
    item = numbers[lines.product][clients.order]
    with_coupon = (lines.coupon_disc > 0.0)[clients.order]
    last = clients.before(sends.household, sends.timestamp_ms)
    for kind, days in (("all", 60), ("all", 365), ("coupon", 365)):
        first = clients.before(sends.household, sends.timestamp_ms - days * DAY_MS)
        found = np.zeros((len(sends), 4))
        for at, (begin, end, campaign) in enumerate(zip(first, last, sends.campaign.tolist(), strict=True)):
            bought = item[begin:end]
            bought = bought[with_coupon[begin:end]] if kind == "coupon" else bought
            count = np.bincount(bought, minlength=len(names) + 1)
            group, items = pairs[campaign]
            ranked = np.sort(np.log1p(np.bincount(group, count[items])))
            every = count[union[campaign]].sum()
            found[at] = ranked[-BEST:].mean(), ranked[-1], ranked.mean(), np.log1p(every)
        for at, part in enumerate(("best", "maximum", "mean", "union")):
            columns[f"match_{what}_{kind}_{days}d_{part}"] = found[:, at]


@dataclass(frozen=True)
class _Refit:
    """The sends of one day, and what may be learned from for them: bool[sends] each."""

    due: NDArray[np.bool_]
    closed: NDArray[np.bool_]


def _refits(journey: Journey, chances: Floats) -> Iterator[_Refit]:
    """A refit for each day on which campaigns start; where too little is known, the rate so far is in `chances`."""
    sends = journey.sends
    end = journey.campaigns.end_ms[sends.campaign]
    redeemed = sends.redeemed_ms >= 0
    # Campaigns that start on one day share a model.
    day = sends.timestamp_ms // DAY_MS
    for start in np.unique(day).tolist():
        due = day == start
        closed = end < start * DAY_MS
        labels = redeemed[closed]
        positives = int(labels.sum())
        if min(positives, len(labels) - positives) < LEAST_OF_EACH_CLASS:
            chances[due] = (positives + 1.0) / (len(labels) + 10.0)
        else:
            yield _Refit(due, closed)


def retrained_lightgbm(journey: Journey, features: Aggregates | None = None, seeds: int = 3) -> Floats:
    """float64[sends]: the probability that each send is redeemed, by the model fitted at its campaign's
    start.

    The model is `seeds` fits that differ in their random draws, their log-odds averaged.
    """
    values = (features or aggregates(journey)).values
    redeemed = journey.sends.redeemed_ms >= 0
    chances = np.empty(len(redeemed), np.float64)
    for refit in _refits(journey, chances):
        labels = redeemed[refit.closed]
        # Large leaves keep it calm; a share, as the first fits have a few hundred examples.
        leaf = int(np.clip(len(labels) // 20, 20, 100))
        log_odds = np.zeros(int(refit.due.sum()))
        for seed in range(seeds):
            parameters = {**PARAMETERS, "min_data_in_leaf": leaf, "seed": seed + 1}
            data = lightgbm.Dataset(values[refit.closed], labels.astype(np.float32), params=parameters)
            model = lightgbm.train(parameters, data, num_boost_round=TREES)
            log_odds += np.asarray(model.predict(values[refit.due], raw_score=True, num_threads=1)) / seeds
        chances[refit.due] = 1.0 / (1.0 + np.exp(-log_odds))
    return chances


def refitted_logistic(journey: Journey, features: Aggregates | None = None) -> Floats:
    """float64[sends]: the same by logistic regression on signed logarithms, standardised by the closed sends, with a
    Gaussian prior on the weights."""
    raw = (features or aggregates(journey)).values.astype(np.float64)
    there = np.isfinite(raw)
    scaled = np.where(there, np.copysign(np.log1p(np.abs(raw)), raw), 0.0)
    inputs = np.concatenate([scaled, ~there[:, ~there.all(axis=0)]], axis=1)
    redeemed = journey.sends.redeemed_ms >= 0
    chances = np.empty(len(redeemed), np.float64)
    for refit in _refits(journey, chances):
        known = inputs[refit.closed]
        deviation = known.std(axis=0)
        x = (inputs - known.mean(axis=0)) / np.where(deviation > 1e-3, deviation, 1.0)
        x = np.concatenate([np.clip(x, -6.0, 6.0), np.ones((len(x), 1))], axis=1)
        chances[refit.due] = _sigmoid(x[refit.due] @ _most_likely(x[refit.closed], redeemed[refit.closed]))
    return chances


def _sigmoid(score: Floats) -> Floats:
    return 0.5 * (1.0 + np.tanh(0.5 * score))


def _most_likely(x: Floats, labels: NDArray[np.bool_]) -> Floats:
    """Weights (inputs,), the last one the bias, by Newton's method."""
    precision = np.append(np.full(x.shape[1] - 1, PRIOR_PRECISION), 1e-3)
    weight = np.zeros(x.shape[1])
    for _ in range(50):
        chance = _sigmoid(x @ weight)
        gradient = x.T @ (labels - chance) - precision * weight
        curvature = (x * (chance * (1.0 - chance))[:, None]).T @ x + np.diag(precision)
        step = np.linalg.solve(curvature, gradient)
        weight += step
        if np.abs(step).max() < 1e-8:
            break
    return weight
