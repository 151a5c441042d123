"""Labels that are final before their window closes: what is learned when, and the same however the stream is cut."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as budget
from hypothesis import strategies as st

from stream.errors import SettingsError
from stream.metrics import TrainerMetrics
from stream.settings import Settings
from stream.wire import FeedbackRecord
from trainer import ages
from trainer.checkpoint import Changes, Database
from trainer.delays import BINS, LEAST_POSITIVES, Delays
from trainer.joiner import Example, Joined, Joiner
from trainer.online import OnlineTrainer
from trainer.record import read_record
from trainer.timeline import EVENTS, FEEDBACK, Record

from . import shop
from .shop import DAY_MS, START_MS, answer, open_trainer, outcome, purchase, send
from .test_online import after_crashes, feed

HOUR = 3_600_000
TTL = BINS * HOUR
NOW = 1_500_000_000_000


def test_nothing_is_said_before_enough_positives_have_come() -> None:
    delays = Delays(2, TTL, 0.85)
    for _ in range(LEAST_POSITIVES - 1):
        delays.add(0, 5 * HOUR)
    assert delays.age_ms(0) is None
    delays.add(0, 5 * HOUR)
    # Then every stratum knows what is common: all had come within the sixth hour
    assert (delays.age_ms(0), delays.age_ms(1)) == (6 * HOUR, 6 * HOUR)


def test_the_age_is_that_at_which_the_share_of_positives_is_exceeded() -> None:
    # Given 100 positives, one in each hour
    delays = Delays(1, TTL, 0.85)
    for hour in range(100):
        delays.add(0, hour * HOUR)
    # Then 85 of them do not exceed .85, and 86 do
    assert delays.age_ms(0) == 86 * HOUR


def test_a_stratum_is_drawn_towards_all_as_far_as_it_has_few_positives_of_its_own() -> None:
    # Given a slow stratum of many positives, and a quick one of few
    delays = Delays(2, TTL, 0.85)
    for _ in range(1000):
        delays.add(0, 100 * HOUR)
    for _ in range(5):
        delays.add(1, 0)
    # Then the few are not believed: (5 + 20 * 5 / 1005) / 25 is below .85, and the rest is common to all
    assert delays.age_ms(1) == 101 * HOUR
    # And 200 are: (200 + 20 * 200 / 1200) / 220 is above it
    for _ in range(195):
        delays.add(1, 0)
    assert (delays.age_ms(0), delays.age_ms(1)) == (101 * HOUR, HOUR)


def test_delays_come_back_as_they_were_and_are_learned_anew_under_other_settings(
    caplog: pytest.LogCaptureFixture,
) -> None:
    delays = Delays(2, TTL, 0.85)
    for hour in range(100):
        delays.add(hour % 2, hour * HOUR)
    again, other = Delays(2, TTL, 0.85), Delays(3, TTL, 0.85)
    again.load(delays.save(), "t")
    assert not caplog.records
    other.load(delays.save(), "t")
    assert [again.age_ms(s) for s in (0, 1)] == [delays.age_ms(s) for s in (0, 1)]
    assert other.age_ms(0) is None
    assert "learned anew" in caplog.text


class Desk:
    """A joiner of one task whose positives mostly come within ten hours; its windows last for a hundred."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.learned: list[tuple[str, bool, int]] = []
        self.open()
        for _ in range(LEAST_POSITIVES):
            self.joiner.finality._count_delay("t", 0, 10 * HOUR - 1)
        self.joiner.finality.settle({}, 0)

    def open(self) -> None:
        self.database = Database(self.path)
        self.joiner = Joiner(
            self.database, {"t": TTL}, lambda task, outcome: self.counts.update([outcome]), (),
            {"t": Delays(1, TTL, 0.85)},
        )  # fmt: skip

    def reopen(self) -> None:
        """Written, and read back."""
        changes: Changes = {}
        self.joiner.save(changes)
        self.database.write(changes)
        marks = self.joiner.watermarks, self.joiner.waiting
        self.database.close()
        self.open()
        self.joiner.watermarks, self.joiner.waiting = marks

    def event(self, client: str, as_of: int = NOW) -> None:
        self._learn(self.joiner.capture(0, Example("t", client.encode(), as_of, np.ones(2, np.float32), 0.25, 7)))

    def feedback(self, client: str, label: bool, known: int, window_end: int | None = NOW + 100 * HOUR) -> None:
        record = FeedbackRecord(client, known, NOW, "t", label, 2.0, window_end)
        self._learn(self.joiner.feedback(0, record, 99))

    def until(self, watermark: int) -> None:
        for one in self.joiner.finality.release(0, watermark, 98):
            self._learn(one)
        self.joiner.advance(0, watermark)

    def _learn(self, joined: Joined | None) -> None:
        if joined is not None:
            self.learned.append((joined.example.client_id.decode(), joined.label, (joined.final_ms - NOW) // HOUR))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    one = Desk(tmp_path / "db")
    yield one
    one.database.close()


@pytest.mark.parametrize("stored", [False, True])
def test_at_the_age_positives_are_learned_that_came_and_negatives_where_none_did(desk: Desk, stored: bool) -> None:
    # Given two predictions, and a positive for one of them after an hour
    desk.event("ann")
    desk.event("bob")
    desk.feedback("ann", True, NOW + HOUR)
    if stored:
        desk.reopen()
    # When their age is that at which more than .85 have come, then nothing is learned; and a millisecond later both
    desk.until(NOW + 10 * HOUR)
    assert (desk.learned, desk.joiner.finality.held) == ([], 1)
    desk.until(NOW + 10 * HOUR + 1)
    assert desk.learned == [("ann", True, 10), ("bob", False, 10)]
    assert (desk.joiner.finality.held, desk.joiner.waiting) == (0, 1)
    # And at the end of the window nothing is learned again
    desk.feedback("bob", False, NOW + 100 * HOUR)
    desk.until(NOW + 200 * HOUR)
    assert len(desk.learned) == 2
    assert desk.counts == {"joined": 2}
    assert desk.joiner.waiting == 0


@pytest.mark.parametrize("stored", [False, True])
def test_a_positive_after_its_negative_was_learned_is_a_correction(desk: Desk, stored: bool) -> None:
    # Given a prediction that was learned as negative
    desk.event("ann")
    desk.until(NOW + 11 * HOUR)
    if stored:
        desk.reopen()
    # When its positive comes, twice
    desk.feedback("ann", True, NOW + 50 * HOUR)
    desk.feedback("ann", True, NOW + 50 * HOUR)
    # Then it is learned at once, once
    assert desk.learned == [("ann", False, 10), ("ann", True, 50)]
    assert desk.counts == {"corrected": 1, "duplicate": 1}
    # And when its window closes, its delay is counted
    delays = desk.joiner.finality._delays["t"]
    before = delays._counts.sum()
    desk.until(NOW + 100 * HOUR)
    assert delays._counts.sum() == before
    desk.until(NOW + 100 * HOUR + 1)
    assert delays._counts[0, 50] == 1


def test_delays_of_open_windows_say_nothing(desk: Desk) -> None:
    # Given a positive that was learned at its age
    desk.event("ann")
    desk.feedback("ann", True, NOW + 3 * HOUR)
    desk.until(NOW + 11 * HOUR)
    assert desk.learned == [("ann", True, 10)]
    counts = desk.joiner.finality._delays["t"]._counts
    assert counts[0, 3] == 0
    # When its window closes, then it is counted, also after a restart
    desk.reopen()
    desk.until(NOW + 101 * HOUR)
    assert desk.joiner.finality._delays["t"]._counts[0, 3] == 1


def test_feedback_before_its_event_of_that_age_is_learned_at_once(desk: Desk) -> None:
    desk.joiner.advance(0, NOW + 20 * HOUR)
    desk.counts.clear()
    desk.joiner._grace_ms = TTL
    desk.feedback("ann", True, NOW + 2 * HOUR)
    desk.event("ann")
    assert desk.learned == [("ann", True, 10)]
    assert desk.counts == {"early": 1}


def test_predictions_beyond_those_in_memory_come_of_age_in_order(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given room for few, and a hundred predictions of which every third is answered or gone
    monkeypatch.setattr(ages, "NEAR", 4)
    order = np.random.default_rng(0).permutation(100).tolist()
    desk.until(NOW - HOUR)
    for i in order[:50]:
        desk.event(f"c{i:02}", NOW + i)
    desk.reopen()
    for i in order[50:]:
        desk.event(f"c{i:02}", NOW + i)
    # When all of them come of age, some between a restart and the next
    desk.until(NOW + 10 * HOUR + 31)
    desk.reopen()
    desk.until(NOW + 12 * HOUR)
    # Then each is learned, in the order of their times
    assert [client for client, _, _ in desk.learned] == [f"c{i:02}" for i in range(100)]
    assert all(len(one._near) <= 9 for one in desk.joiner.finality._ages.values())


def campaign(clients: int = 240) -> list[tuple[int, Record]]:
    """Sends over 120 days in two partitions, answered within 10 days: positives of kind x soon, of y late."""
    random = np.random.default_rng(1)
    found: list[tuple[int, int, int, str, bytes]] = []
    for c in range(clients):
        client, partition = f"client-{c}", c % 2
        at = START_MS + c * DAY_MS // 2 + int(random.integers(DAY_MS))
        kind = "x" if random.random() < 0.5 else "y"
        found.append((at - 5, EVENTS, partition, client, purchase(client, at - 5, float(random.exponential(10)))))
        found.append((at, EVENTS, partition, client, send(client, at, kind)))
        end = at + 10 * DAY_MS
        if random.random() < 0.6:
            known = at + min(int(random.exponential((1 if kind == "x" else 4) * DAY_MS)), 10 * DAY_MS)
            found.append((known, FEEDBACK, partition, client, answer(client, at, True, known, window_end_ms=end)))
        else:
            found.append((end, FEEDBACK, partition, client, answer(client, at, False, end, window_end_ms=end)))
    offsets: Counter[tuple[int, int]] = Counter()
    stream = []
    for at, kind_of, partition, client, value in sorted(found, key=lambda one: (one[0], one[1], one[3])):
        stream.append((kind_of, Record(partition, offsets[kind_of, partition], at, client.encode(), value, ())))
        offsets[kind_of, partition] += 1
    return stream


def final(**overrides: str) -> Settings:
    plain = {"TASKS__REDEEMED__FINAL_BY": "kind", "TASKS__REDEEMED__FINAL_SHARE": "0.7"}
    return shop.settings(**(plain | overrides))


def learned(trainer: OnlineTrainer) -> tuple[bytes, bytes, int, int]:
    learner = trainer.learners["redeemed"]
    head = shop.posterior(learner)
    delays = trainer.joiner.finality._delays["redeemed"]
    return (
        head.mean.tobytes() + head.covariance.tobytes(), delays.save(), learner.labels,
        trainer.joiner.finality.held,
    )  # fmt: skip


@pytest.fixture(scope="module")
def stream() -> list[tuple[int, Record]]:
    return campaign()


@pytest.fixture(scope="module")
def undisturbed(
    stream: list[tuple[int, Record]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[bytes, bytes, int, int]:
    """What is learned in one pass, one record at a time."""
    directory, metrics = tmp_path_factory.mktemp("undisturbed"), TrainerMetrics()
    trainer = open_trainer(directory / "t", final(), metrics, record=directory / "record")
    for one in stream:
        feed(trainer, [one])
    result = learned(trainer)
    trainer.close()
    # Positives of the kind that comes soon are final sooner, some labels are corrected, and most are learned early.
    delays = trainer.joiner.finality._delays["redeemed"]
    x, y = delays.age_ms(0), delays.age_ms(1)
    assert x is not None
    assert y is not None
    assert x + DAY_MS < y < 9 * DAY_MS
    assert outcome(metrics, "corrected") > 5
    found = read_record(directory / "record")["redeemed"]
    assert len(found) == result[2]
    assert np.count_nonzero(found.final_ms < found.as_of_ms + 10 * DAY_MS) > len(found) / 2
    assert np.all(found.known_ms <= found.final_ms)
    for label in ("positive", "negative"):
        labels = {"task": "redeemed", "label": label}
        assert (metrics.registry.get_sample_value("livestate_early_labels_total", labels) or 0) > 20
    return result


@budget(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    cuts=st.lists(st.integers(0, 720), max_size=8), crashes=st.sets(st.integers(0, 8)), near=st.sampled_from([2, 50])
)
def test_crashes_and_cuts_do_not_change_what_is_final_when(
    tmp_path_factory: pytest.TempPathFactory,
    stream: list[tuple[int, Record]],
    undisturbed: tuple[bytes, bytes, int, int],
    cuts: list[int],
    crashes: set[int],
    near: int,
) -> None:
    # Given a trainer that takes the stream in pieces, and loses what came after its last checkpoint at some
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ages, "NEAR", near)
        trainer = after_crashes(tmp_path_factory.mktemp("crashing"), final(), stream, cuts, crashes)
        # Then what is learned is the same, bit for bit
        assert learned(trainer) == undisturbed
        trainer.close()


def test_events_of_all_partitions_in_one_batch_are_final_as_one_by_one(
    tmp_path: Path, stream: list[tuple[int, Record]]
) -> None:
    # Given the same stream with all feedback first, so that all events are one batch
    first = [one for one in stream if one[0] == FEEDBACK] + [one for one in stream if one[0] == EVENTS]
    results = []
    for number, size in enumerate((1, 7, len(stream))):
        trainer = open_trainer(tmp_path / str(number), final())
        trainer.joiner._grace_ms = trainer.joiner._ttl_ms["redeemed"]
        for begin in range(0, len(first), size):
            feed(trainer, first[begin : begin + size])
        results.append(learned(trainer))
        trainer.close()
    # Then the sizes of batches do not matter
    assert results[0][2] > 200
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"TASKS__REDEEMED__FINAL_BY": "amount"}, "a category field of send"),
        ({"TASKS__REDEEMED__LABELS": "closed"}, "nothing with labels = 'closed'"),
        ({"TASKS__REDEEMED__FINAL_SHARE": "1.0"}, "FINAL_SHARE"),
        ({"TASKS__REDEEMED__LABELS": "soon"}, "expected one of final, closed, as_they_come"),
    ],
)
def test_settings_that_make_no_sense_are_refused(overrides: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        final(**overrides)
