"""Hand-made aggregates: equal to plain sums over what lies before a send, and to nothing else."""

from dataclasses import replace

import numpy as np
import pytest

from trainer.demo.baselines import Aggregates, aggregates, refitted_logistic, retrained_lightgbm
from trainer.demo.journey import DAY_MS, Journey
from trainer.evaluation import auc


@pytest.fixture(scope="module")
def features(journey: Journey) -> Aggregates:
    return aggregates(journey)


def test_aggregates_equal_plain_sums_before_the_send(journey: Journey, features: Aggregates) -> None:
    # Given a few sends of different campaigns
    lines, sends = journey.purchases, journey.sends
    column = {name: at for at, name in enumerate(features.names)}
    for i in np.random.default_rng(0).choice(len(sends), 25, replace=False).tolist():
        now, who = sends.timestamp_ms[i], sends.household[i]
        row = features.values[i]
        # When the household's lines are summed one window at a time
        for days in (14, 60, 365):
            mine = (lines.household == who) & (lines.timestamp_ms < now) & (lines.timestamp_ms >= now - days * DAY_MS)
            coupon = mine & (lines.coupon_disc > 0)
            # Then the features are those sums
            assert row[column[f"lines_{days}d"]] == mine.sum()
            assert row[column[f"baskets_{days}d"]] == len(np.unique(lines.basket[mine]))
            assert row[column[f"sales_{days}d"]] == pytest.approx(lines.sales_value[mine].sum(), abs=0.05)
            assert row[column[f"coupon_baskets_{days}d"]] == len(np.unique(lines.basket[coupon]))
        mine = (lines.household == who) & (lines.timestamp_ms < now)
        grocery = mine & (journey.products.department[lines.product] == "GROCERY")
        assert row[column["sales_of_GROCERY"]] == pytest.approx(lines.sales_value[grocery].sum(), abs=0.05)
        last = lines.timestamp_ms[mine].max() if mine.any() else np.nan
        assert row[column["days_since_basket"]] == pytest.approx((now - last) / DAY_MS, rel=1e-5, nan_ok=True)
        # And of the campaign's coupons, as many lines as were bought of their categories, and of their products
        year = (lines.household == who) & (lines.timestamp_ms < now) & (lines.timestamp_ms >= now - 365 * DAY_MS)
        campaigns, at = journey.campaigns, sends.campaign[i]
        for what, of_product, listed in (
            ("category", journey.products.product_category, campaigns.categories[at]),
            ("product", journey.products.product_id, campaigns.products[at]),
        ):
            of = of_product[lines.product[year]].astype(str)
            groups = [[str(name) for name in group] for group in listed]
            counts = sorted((np.log1p(np.isin(of, group).sum()) for group in groups), reverse=True)
            matched = {part: row[column[f"match_{what}_all_365d_{part}"]] for part in ("best", "maximum", "mean")}
            by_hand = {"best": np.mean(counts[:16]), "maximum": counts[0], "mean": np.mean(counts)}
            assert matched == pytest.approx(by_hand, abs=1e-5)
            union = np.isin(of, [name for group in groups for name in group]).sum()
            assert row[column[f"match_{what}_all_365d_union"]] == pytest.approx(np.log1p(union), abs=1e-5)
        before = (sends.household == who) & (sends.timestamp_ms < now)
        known = (sends.household == who) & (sends.redeemed_ms >= 0) & (sends.redeemed_ms < now)
        assert row[column["sent"]] == before.sum()
        assert row[column["redeemed"]] == known.sum()


def test_the_future_changes_no_feature(journey: Journey, features: Aggregates) -> None:
    # Given the year with everything from July on made different
    cut = int(np.datetime64("2017-07-01", "ms").astype(np.int64))
    lines, sends = journey.purchases, journey.sends
    after = lines.timestamp_ms >= cut
    changed = replace(
        lines,
        sales_value=np.where(after, lines.sales_value * 7 + 3, lines.sales_value),
        coupon_disc=np.where(after, 9.0, lines.coupon_disc),
        product=np.where(after, 0, lines.product),
    )
    redeemed = np.where(sends.redeemed_ms >= cut, -1, sends.redeemed_ms)
    other = replace(journey, purchases=changed, sends=replace(sends, redeemed_ms=redeemed))
    # When aggregates are made of it, then those of earlier sends are the same
    early = sends.timestamp_ms < cut
    found = aggregates(other)
    assert found.names == features.names
    assert np.array_equal(found.values[early], features.values[early], equal_nan=True)
    assert not np.array_equal(found.values[~early], features.values[~early], equal_nan=True)


def test_labels_of_open_campaigns_change_no_prediction(journey: Journey, features: Aggregates) -> None:
    # Given labels turned round in every campaign that is not over by the first of August
    cut = int(np.datetime64("2017-08-01", "ms").astype(np.int64))
    sends = journey.sends
    still_open = journey.campaigns.end_ms[sends.campaign] >= cut
    turned = np.where(sends.redeemed_ms >= 0, -1, sends.timestamp_ms + 1)
    other = replace(journey, sends=replace(sends, redeemed_ms=np.where(still_open, turned, sends.redeemed_ms)))
    # When models are refitted, then predictions for sends before that day are the same
    early = sends.timestamp_ms < cut
    chances = retrained_lightgbm(journey, features, seeds=1)
    assert np.array_equal(chances[early], retrained_lightgbm(other, features, seeds=1)[early])
    # And every send has a prediction, and they are worth something from July on
    assert ((chances > 0) & (chances < 1)).all()
    judged = journey.campaigns.start_ms[sends.campaign] >= int(np.datetime64("2017-07-01", "ms").astype(np.int64))
    assert auc((sends.redeemed_ms >= 0)[judged], chances[judged]) > 0.79
    # And the same holds of logistic regression
    chances = refitted_logistic(journey, features)
    assert np.array_equal(chances[early], refitted_logistic(other, features)[early])
    assert ((chances > 0) & (chances < 1)).all()
    assert auc((sends.redeemed_ms >= 0)[judged], chances[judged]) > 0.80
