"""The trainer without Kafka: exact examples, nothing from the future, and the same end however it is cut."""

import itertools
import json
import math
from collections.abc import Container, Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as budget
from hypothesis import strategies as st

from stream.errors import ParametersError, RecordError, StoreError
from stream.metrics import TrainerMetrics
from stream.model.parameters import ParameterSet
from stream.settings import Settings, parse
from trainer.evaluation import auc
from trainer.learner import TaskLearner
from trainer.online import OnlineTrainer
from trainer.pretrain import random_trunk
from trainer.record import read_record
from trainer.report.again import Again
from trainer.timeline import EVENTS, FEEDBACK, Record

from . import shop
from .shop import DAY_MS, START_MS, answer, open_trainer, outcome, purchase, records, refuse_nothing, send


def year(clients: int, seed: int = 0) -> tuple[list[Record], list[Record]]:
    """Events and feedback of some clients in two partitions, in order of time.

    Most labels have a window that closes after they are known; the last event of each partition closes all.
    """
    random = np.random.default_rng(seed)
    events: list[tuple[int, int, str, bytes]] = []
    labels: list[tuple[int, int, str, bytes]] = []
    for c in range(clients):
        name, partition = f"client-{c}", c % 2
        at = START_MS + int(random.integers(DAY_MS))
        for _ in range(int(random.integers(1, 6))):
            at += int(random.integers(1, DAY_MS))
            department = str(random.choice(["A", "B", "C"]))
            events.append((at, partition, name, purchase(name, at, float(random.exponential(10)), department)))
        at += 1
        kind = str(random.choice(["x", "y"]))
        events.append((at, partition, name, send(name, at, kind)))
        known = at + int(random.integers(1, 3 * DAY_MS))
        label = bool(random.random() < (0.8 if kind == "x" else 0.2))
        window = None if c % 5 == 0 else known + int(random.integers(0, 2 * DAY_MS))
        labels.append((known, partition, name, answer(name, at, label, known, window_end_ms=window)))
    for partition in (0, 1):
        at = START_MS + 20 * DAY_MS
        events.append((at, partition, f"last-{partition}", purchase(f"last-{partition}", at)))
    return _log(events), _log(labels)


def _log(found: list[tuple[int, int, str, bytes]]) -> list[Record]:
    offsets = [0, 0]
    out = []
    for at, partition, name, value in sorted(found):
        out.append(Record(partition, offsets[partition], at, name.encode(), value, ()))
        offsets[partition] += 1
    return out


def merged(events: list[Record], feedback: list[Record]) -> list[tuple[int, Record]]:
    """Both inputs in the order of their records' times."""
    both = [(EVENTS, one) for one in events] + [(FEEDBACK, one) for one in feedback]
    return sorted(both, key=lambda pair: (pair[1].timestamp_ms, pair[0]))


def feed(trainer: OnlineTrainer, stream: list[tuple[int, Record]]) -> None:
    """Apply a stretch, consecutive records of one kind together; what was applied before is left out."""
    for kind, run in itertools.groupby(stream, key=lambda pair: pair[0]):
        batch = [one for _, one in run if one.offset >= trainer.positions.get((kind, one.partition), 0)]
        if batch:
            (trainer.apply_events if kind == EVENTS else trainer.apply_feedback)(batch)


def posterior(trainer: OnlineTrainer) -> bytes:
    learner = trainer.learners["redeemed"]
    head = shop.posterior(learner)
    return head.mean.tobytes() + head.covariance.tobytes()


def rows(trainer: OnlineTrainer) -> dict[bytes, bytes]:
    """Every row on disk after a checkpoint."""
    trainer.checkpoint(0)
    return dict(trainer.database.scan(b"r"))


@pytest.fixture(scope="module")
def stream() -> list[tuple[int, Record]]:
    return merged(*year(60))


#: Inputs keep their first scale, and they get others while labels come.
SCALED = {
    "once": shop.settings(),
    "again": parse(shop.TOML.replace("standardise_after = 20", "standardise_after = 20\nstandardise_again = [35, 50]")),
}
Result = tuple[bytes, dict[bytes, bytes]]


@pytest.fixture(scope="module")
def undisturbed(stream: list[tuple[int, Record]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Posterior and rows of one pass, one record at a time."""
    results = {}
    for name, settings in SCALED.items():
        trainer = open_trainer(tmp_path_factory.mktemp("undisturbed"), settings)
        for one in stream:
            feed(trainer, [one])
        results[name] = posterior(trainer), rows(trainer)
        trainer.close()
    assert results["once"][0] != results["again"][0]
    return results


def after_crashes(
    directory: Path, settings: Settings, stream: list[tuple[int, Record]], cuts: Iterable[int], crashes: Container[int]
) -> OnlineTrainer:
    """A trainer that took the stream in pieces with a checkpoint after each, but after those with these numbers lost
    all since the last one, and began again from the start of the stream."""
    trainer = open_trainer(directory, settings)
    edges = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    for number, (begin, end) in enumerate(itertools.pairwise(edges)):
        feed(trainer, stream[begin:end])
        if number in crashes:
            trainer.close()
            trainer = open_trainer(directory, settings)
            feed(trainer, stream[:end])
        else:
            trainer.checkpoint(0)
    return trainer


@pytest.mark.parametrize("scaled", SCALED)
@budget(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(cuts=st.lists(st.integers(0, 10_000), max_size=8), crashes=st.sets(st.integers(0, 8)))
def test_crashes_and_cuts_do_not_change_what_is_learned(
    tmp_path_factory: pytest.TempPathFactory,
    stream: list[tuple[int, Record]],
    undisturbed: dict[str, Result],
    scaled: str,
    cuts: list[int],
    crashes: set[int],
) -> None:
    # Given a trainer that takes the stream in pieces, and loses what came after its last checkpoint at some
    trainer = after_crashes(tmp_path_factory.mktemp("crashing"), SCALED[scaled], stream, cuts, crashes)
    # Then posterior and rows are those of one pass, bit for bit, and each label was learned once
    assert posterior(trainer) == undisturbed[scaled][0]
    assert rows(trainer) == undisturbed[scaled][1]
    assert trainer.learners["redeemed"].labels == 60
    trainer.close()


def leaky_inputs(trainer: OnlineTrainer, client: str, sent_ms: int) -> np.ndarray:
    """What a join at the time of the feedback would have as inputs: the client's row as it is now."""
    replica, layout = trainer.replica, trainer.layout
    slot = replica.slots([client.encode()], [0], {})[0]
    row = replica.vectors[slot : slot + 1]
    now = replica.last_event_ms[slot : slot + 1]
    readout = trainer.questions.readout.features(row[:, : layout.hidden], row[:, layout.hidden :], now)
    return np.concatenate([readout[0], np.zeros(2, np.float32)])


def test_nothing_after_the_prediction_reaches_the_learner(tmp_path: Path) -> None:
    # Given clients whose purchase right after the prediction gives the answer away: its amount is the label
    random = np.random.default_rng(3)
    shop_settings = shop.settings()
    trainer = open_trainer(tmp_path / "db", shop_settings, record=tmp_path / "record")
    leaky = TaskLearner("redeemed", trainer.questions.tasks[0].is_state, shop_settings.tasks["redeemed"])
    leaky_predictions: list[tuple[float, bool]] = []
    offset = asked = 0
    for c in range(1200):
        client, at = f"c{c}", START_MS + c * 60_000
        label = bool(random.random() < 0.5)
        before = purchase(client, at, float(random.exponential(5)), str(random.choice(["A", "B"])))
        sent = send(client, at + 1)
        telling = purchase(client, at + 2, 1000.0 if label else 0.0, "A" if label else "B")
        feedback = records([(client, answer(client, at + 1, label, at + 3))], c)
        # Most events come in order; some predictions are asked for late, when the answer is in the row
        # already; and of these some after their feedback.
        way = c % 4
        ordered = [before, sent, telling] if way < 2 else [before, telling, sent]
        if way == 3:
            trainer.apply_events(records([(client, one) for one in ordered[:2]], offset))
            trainer.apply_feedback(feedback)
            trainer.apply_events(records([(client, ordered[2])], offset + 2))
        else:
            trainer.apply_events(records([(client, one) for one in ordered], offset))
            trainer.apply_feedback(feedback)
        offset += 3
        asked += way < 2
        trainer.serve(ParameterSet(trainer.tensors(), c))
        # When a join reads the row at the time of the feedback instead
        inputs = leaky_inputs(trainer, client, at + 1)
        leaky.observe(inputs)
        head = leaky.head()
        if head and c >= 600:
            scaled = (inputs - head["head/redeemed/center"]) / head["head/redeemed/scale"]
            logit = float(np.append(np.clip(scaled, -6, 6), 1.0) @ head["head/redeemed/weight"])
            leaky_predictions.append((logit, label))
        leaky.learn(inputs, label, 1.0, math.nan, 0)
    trainer.checkpoint(0)
    trainer.close()
    found = read_record(tmp_path / "record")["redeemed"]
    # Then the real join learned from every prediction that was made in time, and from no other
    assert len(found) == asked == 600
    assert trainer.metrics.registry.get_sample_value("livestate_late_predictions_total", {"task": "redeemed"}) == 600
    # And knows nothing, where the leaky one knows everything
    half = len(found) // 2
    assert 0.4 < auc(found.label[half:], found.prediction[half:]) < 0.6
    logits, labels = zip(*leaky_predictions, strict=True)
    assert auc(labels, logits) > 0.99


def test_examples_are_the_rows_right_after_their_event(tmp_path: Path) -> None:
    # Given one client's purchases, a send, and more purchases in the same batch
    metrics = TrainerMetrics()
    trainer = open_trainer(tmp_path / "db", shop.settings(), metrics, record=tmp_path / "record")
    values = [purchase("ann", START_MS, 10.0), send("ann", START_MS + 1), purchase("ann", START_MS + 2, 90.0)]
    trainer.apply_events(records([("ann", value) for value in values]))
    # When the answer comes
    trainer.apply_feedback(records([("ann", answer("ann", START_MS + 1, True))]))
    trainer.checkpoint(0)
    # Then its inputs are those of the moment
    names = trainer.questions.tasks[0].names
    inputs = dict(zip(names, read_record(tmp_path / "record")["redeemed"].inputs[0].tolist(), strict=True))
    assert inputs["spent"] == pytest.approx(math.log1p(10.0))
    assert inputs["kind=x"] == 1.0
    assert outcome(metrics, "joined") == 1
    trainer.close()


def test_learned_heads_predict_and_are_served_as_published(tmp_path: Path) -> None:
    # Given a stream in which one kind of send is redeemed far more often
    closed = shop.settings(TASKS__REDEEMED__LABELS="closed")
    trainer = open_trainer(tmp_path / "db", closed, record=tmp_path / "record")
    for number, part in enumerate(np.array_split(np.arange(600), 10)):
        events, feedback = year(len(part), seed=number)
        base = {key: trainer.positions.get(key, 0) for key in [(k, p) for k in (0, 1) for p in (0, 1)]}
        for kind, found in ((EVENTS, events), (FEEDBACK, feedback)):
            moved = [
                Record(
                    one.partition, one.offset + base[kind, one.partition], one.timestamp_ms,
                    f"{number}".encode() + (one.key or b""),
                    (one.value or b"").replace(
                        bytes([0xA0 + len(one.key or b"")]) + (one.key or b""),
                        bytes([0xA1 + len(one.key or b"")]) + f"{number}".encode() + (one.key or b""),
                    ),
                    (),
                )
                for one in found
            ]  # fmt: skip
            (trainer.apply_events if kind == EVENTS else trainer.apply_feedback)(moved)
        included = trainer.unpublished()
        assert len(trainer.feedback_ms()) == sum(included.values()) == len(part)
        trainer.confirm(included)
        assert trainer.unpublished() == {}
        trainer.serve(ParameterSet(trainer.tensors(), number + 1))
    trainer.observe_metrics()
    trainer.checkpoint(0)
    quality = trainer.metrics.registry.get_sample_value(
        "livestate_prequential_auc", {"task": "redeemed", "head": "logistic"}
    )
    assert quality is not None
    assert quality > 0.7
    # And the record allows to say what the model of any moment would have said
    found = read_record(tmp_path / "record")["redeemed"]
    again = Again.of(trainer.settings, trainer.questions.by_task["redeemed"], found)
    everything = again.frozen_at(int(found.final_ms.max()) + 1)
    assert np.isnan(again.frozen_at(0)).all()
    head = trainer.questions.heads(ParameterSet(trainer.tensors()))["redeemed"]
    np.testing.assert_array_equal(everything, head.predict(found.inputs))
    trainer.close()


def test_unusable_feedback_is_refused_and_counted_and_the_rest_goes_on(tmp_path: Path) -> None:
    refused: list[tuple[Record, RecordError]] = []
    metrics = TrainerMetrics()
    trainer = open_trainer(
        tmp_path / "db", shop.settings(), metrics, lambda record, error: refused.append((record, error))
    )
    trainer.apply_events(records([("ann", send("ann", START_MS))]))
    good = answer("ann", START_MS, True)
    unknown = answer("ann", START_MS, True, task="nothing")
    trainer.apply_feedback(records([("ann", b"\xc1"), ("ann", unknown), ("bob", good), ("ann", good)]))
    assert [error.reason for _, error in refused] == ["undecodable", "unknown_task", "key_mismatch"]
    for reason in ("undecodable", "unknown_task", "key_mismatch"):
        assert metrics.registry.get_sample_value("livestate_dead_letters_total", {"reason": reason}) == 1
    assert outcome(metrics, "joined") == 1
    assert trainer.positions[FEEDBACK, 0] == 4
    trainer.close()


def test_feedback_after_a_fortnight_is_joined_though_its_client_has_expired(tmp_path: Path) -> None:
    # Given a prediction for a client who is forgotten a day later, and another one who goes on
    metrics = TrainerMetrics()
    trainer = open_trainer(tmp_path / "db", shop.settings(STORE__TTL_S="86400"), metrics, record=tmp_path / "record")
    trainer.apply_events(records([("ann", purchase("ann", START_MS - 1, 7.0)), ("ann", send("ann", START_MS))]))
    (slot,) = trainer.replica.slots([b"ann"], [0], trainer.joiner.watermarks)
    hidden = trainer.replica.vectors[slot, : trainer.layout.hidden].copy()
    later = [("bob", purchase("bob", START_MS + day * DAY_MS)) for day in range(1, 15)]
    trainer.apply_events(records(later, 2))
    (slot,) = trainer.replica.slots([b"ann"], [0], trainer.joiner.watermarks)
    assert trainer.replica.events_seen[slot] == 0
    # When the answer comes after fourteen days
    trainer.apply_feedback(records([("ann", answer("ann", START_MS, True, START_MS + 14 * DAY_MS))]))
    # Then it is joined with the row as it was
    assert outcome(metrics, "joined") == 1
    trainer.close()
    inputs = read_record(tmp_path / "record")["redeemed"].inputs
    assert np.array_equal(inputs[0, : len(hidden)], hidden)


def test_feedback_for_a_client_that_nobody_knows_is_unmatched_in_time(tmp_path: Path) -> None:
    # Given feedback for a client without any event
    metrics = TrainerMetrics()
    trainer = open_trainer(tmp_path / "db", shop.settings(), metrics)
    trainer.apply_feedback(records([("nobody", answer("nobody", START_MS, True))]))
    trainer.observe_metrics()
    assert metrics.registry.get_sample_value("livestate_pending_feedback") == 1
    # When events have come that are later than its own could be
    trainer.apply_events(records([("ann", purchase("ann", START_MS + DAY_MS))]))
    # Then it waits no longer
    trainer.observe_metrics()
    assert metrics.registry.get_sample_value("livestate_pending_feedback") == 0
    assert outcome(metrics, "unmatched") == 1
    trainer.close()


def test_bad_events_are_passed_over(tmp_path: Path) -> None:
    trainer = open_trainer(tmp_path / "db", shop.settings())
    assert trainer.apply_events(records([("ann", b"junk"), ("ann", purchase("ann", START_MS))])) == 1
    assert trainer.apply_events(records([("ann", b"junk")], 2)) == 0
    assert trainer.positions[EVENTS, 0] == 3
    trainer.close()


def test_an_event_that_is_applied_twice_changes_nothing(tmp_path: Path) -> None:
    trainer = open_trainer(tmp_path / "db", shop.settings())
    events = records([("ann", purchase("ann", START_MS)), ("ann", purchase("ann", START_MS + 1))])
    trainer.apply_events(events)
    once = rows(trainer)
    assert trainer.apply_events(events) == 0
    assert rows(trainer) == once
    trainer.close()


def test_rows_beyond_the_limit_leave_memory_and_come_back(
    tmp_path: Path, stream: list[tuple[int, Record]], undisturbed: dict[str, Result]
) -> None:
    # Given room for 64 rows, and 300 other clients between the stream's
    small = shop.settings(STORE__MEMORY_ROWS="64")
    trainer = open_trainer(tmp_path / "db", small)
    others = records([(f"o{i}", purchase(f"o{i}", START_MS)) for i in range(300)], partition=7)
    for number, one in enumerate(stream):
        feed(trainer, [one])
        if number < 300:
            trainer.apply_events([others[number]])
        if trainer.needs_checkpoint:
            trainer.checkpoint(0)
        assert len(trainer.replica) <= 64 + 1
    # Then the states are the same
    assert {key: row for key, row in rows(trainer).items() if key[4] != 7} == undisturbed["once"][1]
    assert posterior(trainer) == undisturbed["once"][0]
    trainer.close()


def test_a_row_past_its_time_to_live_starts_from_nothing_and_leaves_the_disk(tmp_path: Path) -> None:
    # Given a time to live of a day
    short = shop.settings(STORE__TTL_S="86400")
    trainer = open_trainer(tmp_path / "db", short)

    def seen(client: str) -> int:
        slot = trainer.replica.slots([client.encode()], [0], trainer.joiner.watermarks)[0]
        return int(trainer.replica.events_seen[slot])

    trainer.apply_events(records([(c, purchase(c, START_MS)) for c in ("ann", "bob", "eve")]))
    trainer.apply_events(records([("bob", purchase("bob", START_MS + 1))], 3))
    # When the watermark is a day past ann's and eve's last event, and not past bob's
    trainer.apply_events(records([("dan", purchase("dan", START_MS + DAY_MS))], 4))
    # Then ann's next event is her first
    trainer.apply_events(records([("ann", purchase("ann", START_MS + DAY_MS))], 5))
    assert (seen("ann"), seen("bob")) == (1, 2)
    # And eve's row leaves the disk after a restart
    trainer.checkpoint(0)
    trainer.close()
    trainer = open_trainer(tmp_path / "db", short)
    assert sorted(key[5:] for key in rows(trainer)) == [b"ann", b"bob", b"dan"]
    trainer.close()


def test_a_row_lives_as_long_as_the_modality_of_each_event_says(tmp_path: Path) -> None:
    # Given sends that keep a client for ten days, and purchases that do for one
    ttls = shop.settings(STORE__TTL_S="86400", MODALITIES__SEND__TTL_S="864000")
    trainer = open_trainer(tmp_path / "db", ttls)
    trainer.apply_events(records([("ann", send("ann", START_MS)), ("bob", purchase("bob", START_MS))]))
    trainer.apply_events(records([("ann", purchase("ann", START_MS + 1))], 2))
    # When there was a restart, and the watermark comes to the millisecond before ann's end
    trainer.checkpoint(0)
    trainer.close()
    trainer = open_trainer(tmp_path / "db", ttls)
    trainer.apply_events(records([("dan", purchase("dan", START_MS + 10 * DAY_MS - 1))], 3))

    def seen(client: str) -> int:
        slot = trainer.replica.slots([client.encode()], [0], trainer.joiner.watermarks)[0]
        return int(trainer.replica.events_seen[slot])

    # Then she is as she was, and bob is forgotten
    assert (seen("ann"), seen("bob")) == (2, 0)
    # And at her end she is too
    trainer.apply_events(records([("dan", purchase("dan", START_MS + 10 * DAY_MS))], 4))
    assert seen("ann") == 0
    trainer.close()


def test_a_checkpoint_of_other_settings_is_refused_with_what_to_do(tmp_path: Path) -> None:
    trainer = open_trainer(tmp_path / "db", shop.settings())
    trainer.checkpoint(3)
    trainer.close()
    with pytest.raises(StoreError, match=r"trainer\.data_dir"):
        open_trainer(tmp_path / "db", shop.settings(MODEL__HIDDEN="16"))


def test_a_checkpoint_goes_before_the_parameters_given(tmp_path: Path) -> None:
    first = open_trainer(tmp_path / "db", shop.settings())
    trunk = first.parameters.trunk_id
    first.checkpoint(3)
    first.close()
    other = random_trunk(shop.settings(MODEL__SEED="5"), [])
    assert other.trunk_id != trunk
    again = OnlineTrainer(shop.settings(), tmp_path / "db", other, TrainerMetrics(), refuse_nothing)
    assert (again.parameters.trunk_id, again.version_floor, again.resumed) == (trunk, 3, True)
    again.close()


def test_a_trunk_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    other = random_trunk(shop.settings(MODEL__HIDDEN="16"), [])
    with pytest.raises(ParametersError, match="the settings describe"):
        OnlineTrainer(shop.settings(), tmp_path / "db", other, TrainerMetrics(), refuse_nothing)
    # And the directory is free again.
    open_trainer(tmp_path / "db", shop.settings()).close()


def test_one_directory_is_one_trainers(tmp_path: Path) -> None:
    trainer = open_trainer(tmp_path / "db", shop.settings())
    with pytest.raises(StoreError, match="only one trainer"):
        open_trainer(tmp_path / "db", shop.settings())
    trainer.close()


def test_json_feedback_and_events_are_taken_where_the_header_says_so(tmp_path: Path) -> None:
    metrics = TrainerMetrics()
    trainer = open_trainer(tmp_path / "db", shop.settings(), metrics)
    headers = (("content-type", b"application/json"),)
    event = {"client_id": "ann", "timestamp_ms": START_MS, "modality": "send", "fields": {"kind": "y"}}
    label = {
        "client_id": "ann", "timestamp_ms": START_MS + 1, "as_of_ms": START_MS, "task": "redeemed", "label": 1,
    }  # fmt: skip
    trainer.apply_events([Record(0, 0, 2 * START_MS, b"ann", json.dumps(event).encode(), headers)])
    trainer.apply_feedback([Record(0, 0, 2 * START_MS, b"ann", json.dumps(label).encode(), headers)])
    assert outcome(metrics, "joined") == 1
    trainer.close()


def test_the_record_file_is_cut_back_to_the_checkpoint(tmp_path: Path, stream: list[tuple[int, Record]]) -> None:
    # Given a trainer that dies after more was recorded than its checkpoint knows
    record, middle = tmp_path / "record", len(stream) // 2

    def start(shop_settings: Settings) -> OnlineTrainer:
        return open_trainer(tmp_path / "db", shop_settings, record=record)

    trainer = start(shop.settings())
    feed(trainer, stream[:middle])
    trainer.checkpoint(0)
    feed(trainer, stream[middle : middle + 60])
    trainer.close()
    # When it goes on
    trainer = start(shop.settings())
    feed(trainer, stream)
    trainer.checkpoint(0)
    trainer.close()
    # Then each answered example is there once
    found = read_record(record)["redeemed"]
    assert len(found) == len(set(found.client_id)) == 60


def test_a_published_head_that_does_not_fit_the_task_is_left_out(tmp_path: Path) -> None:
    # Given parameters with a head of another width, and one of a task that is gone
    trunk = random_trunk(shop.settings(), [])
    heads = {
        f"head/{task}/{part}": np.zeros(width + (part == "weight"))
        for task, width in (("redeemed", 3), ("gone", 7))
        for part in ("center", "scale", "weight")
    }
    parameters = trunk.updated(heads, 5)
    trainer = OnlineTrainer(shop.settings(), tmp_path / "db", parameters, TrainerMetrics(), refuse_nothing)
    # Then only the trunk is kept, and would be published
    assert set(trainer.tensors()) == set(trunk)
    trainer.serve(parameters)
    trainer.apply_events(records([("ann", send("ann", START_MS))]))
    trainer.close()


def test_a_held_label_is_learned_when_an_event_brings_the_watermark_past_its_window(tmp_path: Path) -> None:
    # Given a fixed standardiser, and an answered prediction whose window closes in ten days
    metrics = TrainerMetrics()
    trainer = open_trainer(tmp_path / "t", shop.settings(TASKS__REDEEMED__STANDARDISE_AFTER="2"), metrics)
    end = START_MS + 10 * DAY_MS
    trainer.apply_events(records([("ann", send("ann", START_MS)), ("bob", send("bob", START_MS + 5))]))
    trainer.apply_feedback(records([("ann", answer("ann", START_MS, True, window_end_ms=end))]))
    trainer.observe_metrics()
    learner = trainer.learners["redeemed"]
    assert (outcome(metrics, "joined"), learner.labels) == (1, 0)
    assert metrics.registry.get_sample_value("livestate_held_labels") == 1
    # When events come up to that moment, then it is held, also through a restart
    trainer.apply_events(records([("bob", purchase("bob", end))], first=2))
    trainer.checkpoint(0)
    trainer.close()
    trainer = open_trainer(tmp_path / "t", shop.settings(TASKS__REDEEMED__STANDARDISE_AFTER="2"), metrics)
    learner = trainer.learners["redeemed"]
    assert (learner.labels, trainer.feedback_ms()) == (0, [])
    # When one comes after it, then it is learned, once, as of that event's time in Kafka
    trainer.apply_events(records([("bob", purchase("bob", end + 1))], first=3, published_ms=2_000_000_009_000))
    trainer.apply_events(records([("bob", purchase("bob", end + 2))], first=4))
    assert (learner.labels, trainer.feedback_ms()) == (1, [2_000_000_009_000])
    trainer.observe_metrics()
    assert metrics.registry.get_sample_value("livestate_held_labels") == 0
    trainer.close()


def test_labels_are_learned_as_they_come_where_the_task_says_so(tmp_path: Path) -> None:
    overrides = {"TASKS__REDEEMED__STANDARDISE_AFTER": "2", "TASKS__REDEEMED__LABELS": "as_they_come"}
    trainer = open_trainer(tmp_path / "t", shop.settings(**overrides))
    trainer.apply_events(records([("ann", send("ann", START_MS)), ("bob", send("bob", START_MS + 5))]))
    label = answer("ann", START_MS, True, window_end_ms=START_MS + 10 * DAY_MS)
    trainer.apply_feedback(records([("ann", label)]))
    assert (trainer.learners["redeemed"].labels, trainer.joiner.finality.held) == (1, 0)
    trainer.close()


def test_the_record_can_be_read_beside_a_running_trainer(tmp_path: Path) -> None:
    # Given a trainer with a few learned labels, and no checkpoint yet
    trainer = open_trainer(
        tmp_path / "t", shop.settings(TASKS__REDEEMED__STANDARDISE_AFTER="2"), record=tmp_path / "record"
    )
    trainer.apply_events(records([(name, send(name, START_MS + i)) for i, name in enumerate("abc")]))
    trainer.apply_feedback(records([(name, answer(name, START_MS + i, True)) for i, name in enumerate("abc")]))
    # Then all of them are in the record
    assert read_record(tmp_path / "record")["redeemed"].client_id == [b"a", b"b", b"c"]
    trainer.close()
