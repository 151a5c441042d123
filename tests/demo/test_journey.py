"""The year of real data as a stream: counts, order, and labels known no sooner than they could be."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from stream.errors import DataError
from trainer.demo import journey as demo
from trainer.demo.journey import DAY_MS, YEAR_START_MS, Journey


def ms(day: str) -> int:
    return int(np.datetime64(day, "ms").astype(np.int64))


def test_the_counts_are_those_of_the_data_set(journey: Journey) -> None:
    assert len(journey.purchases) == 1_469_307
    assert journey.households == 2_469
    assert len(journey.sends) == 6_589
    assert len(journey.redemptions) == 2_102
    assert journey.counts == (1_469_307, 6_589, 2_102)
    assert len(journey) == 1_469_307 + 6_589 + 2_102
    assert len(journey.campaigns.campaign_id) == 27


def test_events_come_in_order_of_time_then_household(journey: Journey) -> None:
    kinds = (journey.purchases, journey.sends, journey.redemptions)
    households = np.concatenate([kind.household for kind in kinds])[journey.order]
    steps = np.diff(journey.timestamp_ms)
    assert (steps >= 0).all()
    assert (np.diff(households)[steps == 0] >= 0).all()
    assert np.array_equal(np.sort(journey.order), np.arange(len(journey)))


def test_lines_of_one_moment_keep_the_order_of_the_file(journey: Journey) -> None:
    # Given the file's own lines of one household at one moment
    file = pq.read_table(demo._package_data() / "transactions.parquet", columns=["household_id", "product_id"])
    household = journey.purchases.household[journey.order[5000]]
    mine = file.column("household_id").to_numpy() == household
    # Then the stream has that household's products in the file's order, which is by time
    stream = journey.purchases.product[journey.purchases.household == household]
    assert journey.products.product_id[stream].tolist() == [
        str(product) for product in file.column("product_id").to_numpy()[mine]
    ]


def test_events_carry_what_the_files_say(journey: Journey) -> None:
    events = list(journey.events(slice(0, 2000)))
    kinds = {event.modality for event in events}
    assert kinds == {"purchase", "campaign_send"}
    assert {event.modality for event in journey.events(slice(-5000, None))} == {"purchase", "coupon_redemption"}
    purchase = next(event for event in events if event.modality == "purchase")
    # the first line of transactions.parquet: household 900, product 1095275, 2017-01-01 11:53:26
    assert purchase.client_id == "900"
    assert purchase.timestamp_ms == ms("2017-01-01T11:53:26")
    assert purchase.fields == {
        "quantity": 1,
        "sales_value": 0.5,
        "retail_disc": 0.0,
        "coupon_disc": 0.0,
        "coupon_match_disc": 0.0,
        "store_id": "330",
        "product_id": "1095275",
        "department": "PASTRY",
        "product_category": "ROLLS",
        "brand": "National",
    }


def test_sends_happen_at_the_campaigns_start_or_at_the_years(journey: Journey) -> None:
    sends, campaigns = journey.sends, journey.campaigns
    ids = campaigns.campaign_id[sends.campaign]
    start = campaigns.start_ms[sends.campaign]
    assert np.array_equal(sends.timestamp_ms, np.maximum(start, YEAR_START_MS) + ids)
    assert set(ids[start < YEAR_START_MS].tolist()) == {24, 25, 26}
    # Two sends of one household are two moments
    moments = np.stack([sends.household, sends.timestamp_ms])
    assert len(np.unique(moments, axis=1).T) == len(sends)
    send = next(event for event in journey.events() if event.modality == "campaign_send")
    fields = dict(send.fields)
    # A coupon lists its products, each once: 5,541 pairs at most where all would be 38,000
    groups = fields.pop("products")
    assert isinstance(groups, tuple)
    assert groups == campaigns.products[sends.campaign[0]]
    assert [len(one) for one in campaigns.products] == campaigns.coupons.tolist()
    assert all(0 < len(set(group)) == len(group) <= 200 for one in campaigns.products for group in one)
    assert max(sum(map(len, one)) for one in campaigns.products) == 5_541
    assert fields == {"campaign_id": "24", "campaign_type": "Type C", "duration_days": 63, "coupons": 27}


def test_a_coupon_lists_what_sold_most_before_its_campaign(journey: Journey) -> None:
    # Given a coupon for more products than a send lists, and the lines of the 120 days before its campaign
    data = demo._package_data()
    rows = pq.read_table(data / "coupons.parquet", filters=[("campaign_id", "=", 13)]).to_pylist()
    of: dict[str, set[int]] = {}
    for row in rows:
        of.setdefault(row["coupon_upc"], set()).add(int(row["product_id"]))
    at = journey.campaigns.campaign_id.tolist().index(13)
    which = max(range(len(of)), key=lambda number: len(of[sorted(of, key=int)[number]]))
    every = of[sorted(of, key=int)[which]]
    start, lines = ms("2017-08-08"), journey.purchases
    before = (lines.timestamp_ms < start) & (lines.timestamp_ms >= start - 120 * DAY_MS)
    sold = Counter(journey.products.product_id[lines.product[before]].tolist())
    # When it is listed, then most sold first, and what is left out sold no more often
    listed = journey.campaigns.products[at][which]
    counts = [sold[str(product)] for product in listed]
    assert counts == sorted(counts, reverse=True)
    assert set(listed) < every
    assert counts[-1] >= max(sold[str(product)] for product in every - set(listed))
    # And of a campaign before anything was sold, the first by their ids
    first = journey.campaigns.products[journey.campaigns.campaign_id.tolist().index(24)]
    assert all(list(group) == sorted(group) for group in first)


def test_a_label_is_known_no_sooner_than_it_could_be(journey: Journey) -> None:
    # Given the redemptions and campaigns of the files
    data = demo._package_data()
    rows = pq.read_table(data / "coupon_redemptions.parquet").to_pylist()
    first: dict[tuple[str, int], int] = {}
    for row in rows:
        pair = (str(row["household_id"]), row["campaign_id"])
        when = ms(str(row["redemption_date"])[:10])
        first[pair] = min(when, first.get(pair, when))
    ends = dict(zip(journey.campaigns.campaign_id.tolist(), journey.campaigns.end_ms.tolist(), strict=True))
    # When feedback is made, then each label has its day behind it, and says what the files say
    feedback = journey.feedback()
    for record in feedback:
        campaign = record.as_of_ms % DAY_MS
        redeemed = first.get((record.client_id, campaign))
        assert record.label == (redeemed is not None)
        day_over = (redeemed + DAY_MS if redeemed is not None else ends[campaign] + 1) - 1
        assert record.timestamp_ms == day_over
        # And its window is the campaign's: over no sooner than the label is known
        assert record.window_end_ms == ends[campaign] >= record.timestamp_ms
        assert record.as_of_ms < record.timestamp_ms <= journey.end_ms
    assert sum(record.label for record in feedback) == len(first) == 792
    times = [record.timestamp_ms for record in feedback]
    assert times == sorted(times)


def test_a_redemption_follows_its_send_and_never_precedes_its_label(journey: Journey) -> None:
    # Given every send, and every label of a redeemed campaign, by household and campaign
    sends, campaigns = journey.sends, journey.campaigns
    ids = campaigns.campaign_id[sends.campaign].tolist()
    moments = zip(sends.household.tolist(), ids, sends.timestamp_ms.tolist(), strict=True)
    sent = {(str(household), str(campaign)): at for household, campaign, at in moments}
    known = {
        (record.client_id, str(record.as_of_ms % DAY_MS)): record.timestamp_ms
        for record in journey.feedback()
        if record.label
    }
    # When redemptions come as events
    first = len(journey.purchases) + len(journey.sends)
    positions = np.flatnonzero(journey.order >= first).tolist()
    redeemed = [next(journey.events(slice(at, at + 1))) for at in positions]
    assert len(redeemed) == 2_102
    seen: set[tuple[str, str]] = set()
    for event in redeemed:
        assert event.modality == "coupon_redemption"
        assert set(event.fields) == {"campaign_id", "campaign_type", "coupon_upc"}
        pair = (event.client_id, str(event.fields["campaign_id"]))
        # Then each is the last moment of a day that began before or with its send, after that send
        assert event.timestamp_ms % DAY_MS == DAY_MS - 1
        assert sent[pair] < event.timestamp_ms
        # And the first of a campaign comes when its label does, further ones not before
        assert event.timestamp_ms >= known[pair]
        assert (event.timestamp_ms == known[pair]) or pair in seen
        seen.add(pair)
    assert seen == set(known)


def test_a_stream_that_ends_early_has_nothing_of_later(journey: Journey) -> None:
    # Given the stream until the first of March
    end = ms("2017-03-01")
    short = journey.until(end)
    # Then its events are the same ones, and labels are those known by its last
    assert len(short) == journey.between(None, end).stop == sum(short.counts)
    assert short.end_ms < end
    assert list(short.events(slice(-50, None))) == list(journey.events(slice(len(short) - 50, len(short))))
    assert short.feedback() == [record for record in journey.feedback() if record.timestamp_ms <= short.end_ms]
    assert 0 < short.households < journey.households
    # And a stream that ends before it begins is refused
    with pytest.raises(DataError, match="no event before 2016-12-31: its first is of 2017-01-01"):
        journey.until(ms("2016-12-31"))


def test_labels_that_nobody_knew_within_the_year_are_left_out(journey: Journey) -> None:
    known = journey.known_ms() <= journey.end_ms
    assert len(journey.feedback()) == int(known.sum()) == 5_837
    late = set(journey.campaigns.campaign_id[journey.sends.campaign[~known]].tolist())
    assert late == {15, 20, 21, 22, 23}


def test_a_part_of_the_stream_is_chosen_by_time(journey: Journey) -> None:
    part = journey.between(ms("2017-03-01"), ms("2017-03-02"))
    times = journey.timestamp_ms[part]
    assert times.min() >= ms("2017-03-01")
    assert times.max() < ms("2017-03-02")
    assert part.stop - part.start == int(
        ((journey.timestamp_ms >= ms("2017-03-01")) & (journey.timestamp_ms < ms("2017-03-02"))).sum()
    )
    assert journey.between() == slice(0, len(journey))


def test_purchases_of_unlisted_products_go_without_what_is_not_known(journey: Journey) -> None:
    # Given the purchases of products that the product list does not have
    unlisted = np.equal(journey.products.department[journey.purchases.product], None)
    assert int(unlisted.sum()) == 4_836
    # Then their events lack those fields, and no others
    at = int(np.flatnonzero(journey.order == np.flatnonzero(unlisted)[0])[0])
    (event,) = journey.events(slice(at, at + 1))
    assert "product_id" in event.fields
    assert {"department", "product_category", "brand"}.isdisjoint(event.fields)
    assert len(event.fields) == 7


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"transactions\.parquet cannot be read"):
        demo.load(tmp_path)
    (tmp_path / "transactions.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"transactions\.parquet cannot be read"):
        demo.load(tmp_path)
