"""The bench of quality, on loan files of the same form as the real ones."""

import gzip
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.bench.quality.__main__ import INTERVALS_MS, main
from tests.bench.quality.coupon import coupon_stream
from tests.bench.quality.streams import NEVER_MS
from tests.support.loans import load_loans

START = datetime(2011, 10, 1, 9, tzinfo=UTC)


def write_loans(directory: Path, cases: int) -> Path:
    """Cases of three steps, an hour apart, of which those of a large amount are declined two days later."""
    random = np.random.default_rng(0)
    events, ends = ["case_id,timestamp,activity,lifecycle,resource"], ["case_id,amount_req,outcome,outcome_ts"]
    for case in range(cases):
        amount = int(random.integers(1, 50)) * 1000
        at = START + timedelta(hours=6 * case)
        end = at + timedelta(days=2)
        outcome = "DECLINED" if amount > 25_000 else "APPROVED"
        steps = [(at, "A_SUBMITTED"), (at, "A_PARTLYSUBMITTED"), (at + timedelta(hours=1), "O_CANCELLED")]
        # The last two come with the outcome, and after it.
        steps += [(end - timedelta(milliseconds=500), "W_Valideren aanvraag"), (end, f"A_{outcome}")]
        events += [f"{case},{when.isoformat(timespec='milliseconds')},{what},COMPLETE,112" for when, what in steps]
        ends.append(f"{case},{amount},{outcome},{end.isoformat(timespec='milliseconds')}")
    ends.append(f"{cases},100,OPEN,{START.isoformat()}")
    events.append(f"{cases},{START.isoformat()},A_SUBMITTED,COMPLETE,112")
    for name, lines in (("events", events), ("cases", ends)):
        with gzip.open(directory / f"{name}.csv.gz", "wt") as file:
            file.write("\n".join(lines) + "\n")
    return directory


def test_nothing_that_gives_the_answer_away_is_published_or_asked(tmp_path: Path) -> None:
    # Given a case with an offer withdrawn on the way, a step half a second before its outcome, and one open case
    loans = load_loans(write_loans(tmp_path, 1))
    # Then only what lies before is published, the withdrawn offer is not asked about, and no two times are the same
    assert loans.activity.tolist() == ["A_SUBMITTED.COMPLETE", "A_PARTLYSUBMITTED.COMPLETE", "O_CANCELLED.COMPLETE"]
    assert loans.asked.tolist() == [True, True, False]
    assert np.diff(loans.timestamp_ms).tolist() == [1, 3_599_999]
    assert (loans.outcome_ms - loans.timestamp_ms[0]).tolist() == [2 * 86_400_000] * 3
    assert loans.hour.tolist()[0] == 9.0


@pytest.mark.timeout(600)
def test_the_bench_judges_every_row_on_the_same_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Given some cases, and a head that soon knows enough
    monkeypatch.setenv("BPIC2012_HOME", str(write_loans(tmp_path, 240)))
    monkeypatch.setenv("LIVESTATE_TASKS__APPROVED__STANDARDISE_AFTER", "50")
    monkeypatch.setenv("LIVESTATE_TASKS__APPROVED__GBDT__LEAST_EXAMPLES", "100")
    monkeypatch.setenv("LIVESTATE_TASKS__APPROVED__MLP__NEW_EXAMPLES", "8")
    monkeypatch.setenv("LIVESTATE_TASKS__APPROVED__MLP__LEARNING_RATE", "0.001")
    monkeypatch.setenv("LIVESTATE_MODEL__HIDDEN", "8")
    # When the stream goes through Kafka and the baselines are fitted
    sizes = ["--cases", "240", "--refit-days", "10", "--rounds", "20"]
    main(["--stream", "loan", *sizes, "--pace", "150", "--behind", "20", "--trunks", "random", "labels"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["loan"]
    # Then each row is there, and what the amount decides is found
    names = ("live", "frozen", "retrained_daily", "aggregates_lightgbm", "logistic_refit", "river")
    assert set(names) <= set(figures["rows"])
    assert figures["points"] > 100
    for name, least in (("live", 0.55), ("frozen", 0.55), ("aggregates_lightgbm", 0.8), ("logistic_refit", 0.8)):
        row = figures["rows"][name]
        assert row["auc"] > least, name
        assert row["auc_interval"][0] <= row["auc"] <= row["auc_interval"][1]
    assert set(figures["publish_interval"]) == {"never", *INTERVALS_MS}
    assert figures["publish_interval"]["never"] == figures["rows"]["frozen"]["auc"]
    assert figures["trunks"]["random"]["ahead_of_first"] == [0.0, 0.0, 0.0]
    assert figures["trunks"]["labels"]["auc"] > 0.55
    assert figures["versions"] > 3
    assert len(figures["gain_over_frozen"]) == 3


def test_the_shop_is_asked_at_every_send_and_judged_where_the_campaign_is_over() -> None:
    # Given the events of some households
    stream = coupon_stream(cases=40)
    points = stream.points
    # Then each of their sends is a point, in order
    assert len(np.unique(points.client)) == 40
    assert (np.diff(points.as_of_ms) >= 0).all()
    asking = [time_of(value) for _, _, value in stream.events if b"campaign_send" in value]
    assert sorted(asking) == sorted(points.as_of_ms.tolist())
    assert {client.decode() for _, client, _ in stream.events} == set(points.client.tolist())
    assert [at for at, _, _ in stream.events] == sorted(at for at, _, _ in stream.events)
    # And a label is final when its campaign is over, which is never before it is told
    told = [msgspec.msgpack.decode(value) for _, _, value in stream.feedback]
    final = dict(zip(zip(points.client.tolist(), points.as_of_ms.tolist(), strict=True), points.known_ms, strict=True))
    assert all(one["timestamp_ms"] <= final[one["client_id"], one["as_of_ms"]] for one in told)
    over = points.known_ms < NEVER_MS
    assert 0.5 < over.mean() < 1.0
    assert points.known_ms[over].max() <= stream.events[-1][0]


def time_of(value: bytes) -> int:
    decoded: int = msgspec.msgpack.decode(value)["timestamp_ms"]
    return decoded
