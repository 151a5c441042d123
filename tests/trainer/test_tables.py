"""Category tables that heads read: learned with every label, published as rows, resumed bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from stream.errors import SettingsError
from stream.model.engine import Engine
from stream.model.heads import Questions
from stream.model.parameters import ParameterSet
from stream.model.rows import RARE_KEY, RowTable, value_key
from stream.settings import Settings, Task, parse
from stream.wire import EventDecoder, encode_event
from trainer.checkpoint import Changes, Database
from trainer.learner import BayesianLinear, BayesianLogistic
from trainer.online import OnlineTrainer
from trainer.publisher import Publisher, read_latest
from trainer.replica import Replica
from trainer.tables import CategoryTable
from trainer.timeline import Record

from .conftest import NewShop
from .shop import DAY_MS, START_MS, TOML, answer, block, open_trainer, records

TABLED = TOML.replace(
    "[tasks.redeemed]", '[tasks.redeemed]\ntables = ["merchant", "city"]\ntable_admission = 3'
).replace(
    'kind = { type = "category"',
    'merchant = { type = "category" }\ncity = { type = "category", required = false }\nkind = { type = "category"',
)


def shop() -> Settings:
    return parse(TABLED)


def send(client: str, time_ms: int, merchant: str, **more: str) -> bytes:
    return encode_event(client, time_ms, "send", {"kind": "x", "merchant": merchant, **more})


def task(**more: object) -> Task:
    return Task(on="send", tables=["merchant"], **more)  # type: ignore[arg-type]


# ---------------------------------------------------------------- one table


def mean_and_variance(table: CategoryTable, key: bytes) -> list[list[float]]:
    found: list[list[float]] = table.read(key)[1].tolist()
    return found


def test_a_value_has_a_row_from_its_nth_occurrence_until_it_expires() -> None:
    # Given a table that admits values at their third occurrence, and keeps them for ten seconds
    table = CategoryTable("t.merchant", 1, task(table_admission=3, table_ttl_s=10.0, table_prior_variance=0.5))
    table.write(RARE_KEY, np.array([[2.0, 0.25]]))
    for ms in (1_000, 2_000):
        table.observe(b"=a", ms)
        # Then until then it uses the rare row
        assert mean_and_variance(table, b"=a") == mean_and_variance(table, b"=b") == [[2.0, 0.25]]
    # And from then on a row of its own, which starts as the rare one with the variance of the prior
    table.observe(b"=a", 3_000)
    assert mean_and_variance(table, b"=a") == [[2.0, 0.5]]
    table.write(b"=a", np.array([[7.0, 0.125]]))
    assert (mean_and_variance(table, b"=a"), mean_and_variance(table, b"=b")) == ([[7.0, 0.125]], [[2.0, 0.25]])
    assert table.touched()[0] == {RARE_KEY: np.float32([2]).tobytes(), b"=a": np.float32([7]).tobytes()}
    # And it is gone, and counted anew, when it has not occurred for the time to live
    table.observe(b"=b", 13_000)
    assert mean_and_variance(table, b"=a") == [[2.0, 0.25]]
    assert table.touched()[0][b"=a"] is None
    table.observe(b"=a", 13_001)
    table.observe(b"=a", 13_002)
    assert mean_and_variance(table, b"=a") == [[2.0, 0.25]]


def test_a_table_keeps_no_more_values_than_it_may() -> None:
    table = CategoryTable("t.merchant", 1, task(table_admission=1, table_max_rows=64))
    for i in range(100):
        table.observe(b"=%d" % i, i + 1)
    rows, _ = table.touched()
    assert len(table) == 64
    assert [key for key, row in rows.items() if row is None] == [b"=%d" % i for i in range(36)]


def test_a_row_that_changes_while_its_version_waits_stays_touched() -> None:
    # Given a row in a version that is not confirmed yet
    table = CategoryTable("t.merchant", 1, task(table_admission=1))
    for key in (b"=a", b"=b"):
        table.observe(key, 1)
    rows, tick = table.touched()
    assert set(rows) == {b"=a", b"=b"}
    # When it changes before the confirmation comes
    table.write(b"=a", np.array([[1.0, 0.5]]))
    # Then only the other one is done with
    table.confirm(tick)
    assert table.touched()[0] == {b"=a": np.float32([1]).tobytes()}


Step = tuple[str, int, float]
steps = st.lists(
    st.tuples(st.sampled_from(["observe", "write", "save"]), st.integers(0, 5), st.floats(-4, 4, width=32)), max_size=40
)


def _apply(table: CategoryTable, taken: Sequence[Step], first_ms: int) -> None:
    for i, (what, value, number) in enumerate(taken):
        key = b"=%d" % value
        if what == "observe":
            table.observe(key, first_ms + 1_000 * i)
        elif what == "write":
            own, effect = table.read(key)
            table.write(own, effect * 0.5 + number)


def _rows(table: CategoryTable) -> list[list[list[float]]]:
    return [mean_and_variance(table, key) for key in (RARE_KEY, *(b"=%d" % i for i in range(6)))]


@hypothesis_settings(deadline=None, max_examples=40)
@given(steps, steps, steps)
def test_a_table_goes_on_from_a_checkpoint_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, before: list[Step], lost: list[Step], after: list[Step]
) -> None:
    # Given a table with a checkpoint, and one that is never disturbed
    of = task(table_admission=2, table_ttl_s=12.0, table_prior_variance=0.5)
    calm, killed = CategoryTable("t.m", 1, of), CategoryTable("t.m", 1, of)
    database = Database(tmp_path_factory.mktemp("tables") / "db")
    for table in (calm, killed):
        _apply(table, before, 1_000)
    for _ in range(2):
        changes: Changes = {}
        killed.save(changes)
        database.write(changes)
        killed.saved()
    # When one is killed in the middle of what comes next, and does it again from the checkpoint
    _apply(killed, lost, 50_000)
    resumed = CategoryTable("t.m", 1, of)
    resumed.load(database)
    published = RowTable(1)
    published.stage({key: row for key, row in calm.touched()[0].items() if row is not None})
    resumed.compare(published)
    # Then nothing is left to publish that was published before
    assert set(resumed.touched()[0]) <= {RARE_KEY}
    for table in (calm, resumed):
        _apply(table, after, 60_000)
    # And both are the same
    assert _rows(resumed) == _rows(calm)
    database.close()


def test_a_table_goes_back_to_what_it_was() -> None:
    # Given a table at some moment
    table = CategoryTable("t.merchant", 1, task(table_admission=1, table_prior_variance=0.5))
    for key in (b"=a", b"=b"):
        table.observe(key, 1)
    table.write(b"=a", np.array([[1.0, 0.25]]))
    table.write(RARE_KEY, np.array([[3.0, 0.125]]))
    then, (_, tick) = table.state(), table.touched()
    table.confirm(tick)
    # When it goes back there after it has learned on
    table.observe(b"=c", 2)
    for key, mean in ((b"=a", 5.0), (b"=c", 6.0), (RARE_KEY, 7.0)):
        table.write(key, np.array([[mean, 0.0625]]))
    table.restore(then)
    # Then rows are as they were, one that came later as new, and all of that is to be published
    assert mean_and_variance(table, b"=a") == [[1.0, 0.25]]
    assert mean_and_variance(table, b"=b") == [[0.0, 0.5]]
    assert mean_and_variance(table, b"=c") == [[3.0, 0.5]]
    assert mean_and_variance(table, RARE_KEY) == [[3.0, 0.125]]
    rows = {key: float(np.frombuffer(row or b"", np.float32)[0]) for key, row in table.touched()[0].items()}
    assert rows == {b"=a": 1.0, b"=b": 0.0, b"=c": 3.0, RARE_KEY: 3.0}
    # And to nothing, if that is wanted
    table.restore(None)
    assert mean_and_variance(table, b"=a") == mean_and_variance(table, RARE_KEY) == [[0.0, 0.5]]


# ---------------------------------------------------------------- learning


def test_a_weight_of_a_value_is_learned_as_if_it_were_an_input() -> None:
    # Given a posterior with a column of ones for a value, and one with the value's weight in a table
    random = np.random.default_rng(0)
    x = random.normal(size=3)
    for label, weight in ((True, 1.0), (False, 2.5)):
        whole, split = (
            BayesianLogistic(4, np.array([0.1, 0.2, 0.3, 0.7])),
            BayesianLogistic(3, np.array([0.1, 0.2, 0.3])),
        )
        effects = np.array([[0.0, 0.7]])
        # When both learn a label
        assert whole.learn(np.append(x, 1.0), label, weight)
        assert split.learn(x, label, weight, 0.0, effects)
        # Then means and variances are the same: only what goes between the two parts is left out
        np.testing.assert_allclose(np.append(split.mean, effects[0, 0]), whole.mean, rtol=1e-12)
        np.testing.assert_allclose(effects[0, 1], whole.covariance[3, 3], rtol=1e-12)
        np.testing.assert_allclose(split.covariance, whole.covariance[:3, :3], rtol=1e-12)
    whole_linear, linear = (
        BayesianLinear(4, np.array([0.1, 0.2, 0.3, 0.7])),
        BayesianLinear(3, np.array([0.1, 0.2, 0.3])),
    )
    effects = np.array([[0.0, 0.7]])
    assert whole_linear.learn(np.append(x, 1.0), 3.0, 2.0)
    assert linear.learn(x, 3.0, 2.0, effects)
    np.testing.assert_allclose(np.append(linear.mean, effects[0, 0]), whole_linear.mean, rtol=1e-12)
    np.testing.assert_allclose(effects[0, 1], whole_linear.covariance[3, 3], rtol=1e-12)


def test_a_label_that_cannot_be_learned_leaves_the_row_as_it_is() -> None:
    posterior, effects = BayesianLogistic(2, 1.0), np.array([[0.5, 0.7]])
    assert not posterior.learn(np.array([np.inf, 1.0]), True, 1.0, 0.0, effects)
    assert effects.tolist() == [[0.5, 0.7]]


def story(sends: int = 600) -> tuple[list[Record], list[Record]]:
    """Sends whose redemption depends on the merchant; every seventh merchant occurs only once."""
    random = np.random.default_rng(3)
    likely = {f"m{i}": float(p) for i, p in enumerate(random.choice([0.05, 0.95], 12))}
    events, feedback = [], []
    for i in range(sends):
        at, client = START_MS + i * 60_000, f"c{i}"
        merchant = f"once-{i}" if i % 7 == 0 else f"m{random.integers(12)}"
        city = {} if i % 5 == 0 else {"city": f"city {i % 3}"}
        events.append((client, send(client, at, merchant, **city)))
        label = random.random() < likely.get(merchant, 0.5)
        feedback.append((client, answer(client, at, bool(label), at + DAY_MS)))
    return records(events), records(feedback)


def learned(directory: Path, events: list[Record], feedback: list[Record]) -> OnlineTrainer:
    trainer = open_trainer(directory, shop())
    trainer.apply_events(events)
    trainer.apply_feedback(feedback)
    return trainer


def contents(trainer: OnlineTrainer) -> dict[str, dict[bytes, bytes | None]]:
    return {name: dict(table.rows) for name, table in trainer.touched.offer().items()}


def test_weights_of_values_are_learned_and_rare_ones_share_one(tmp_path: Path) -> None:
    events, feedback = story()
    trainer = learned(tmp_path, events, feedback)
    rows = {
        key: float(np.frombuffer(row or b"", np.float32)[0])
        for key, row in contents(trainer)["redeemed.merchant"].items()
    }
    # Twelve merchants came often enough, and those that came once share a row
    assert set(rows) == {RARE_KEY, *(value_key(b"m%d" % i) for i in range(12))}
    good = [
        rows[value_key(b"m%d" % i)] for i, p in enumerate(np.random.default_rng(3).choice([0.05, 0.95], 12)) if p > 0.5
    ]
    bad = [
        rows[value_key(b"m%d" % i)] for i, p in enumerate(np.random.default_rng(3).choice([0.05, 0.95], 12)) if p < 0.5
    ]
    assert min(good) > rows[RARE_KEY] > max(bad)
    assert min(good) - max(bad) > 0.5
    trainer.close()


def test_a_trainer_that_lost_what_followed_its_checkpoint_learns_the_same_again(tmp_path: Path) -> None:
    events, feedback = story()
    calm = learned(tmp_path / "calm", events, feedback)
    # Given a trainer that is gone without a checkpoint after half of its input, part of it after a checkpoint
    gone = open_trainer(tmp_path / "gone", shop())
    gone.apply_events(events[:250])
    gone.apply_feedback(feedback[:100])
    gone.checkpoint(0)
    gone.apply_events(events[250:400])
    gone.apply_feedback(feedback[100:300])
    gone.close()
    # When another one opens its directory and reads on from there
    again = open_trainer(tmp_path / "gone", shop())
    again.apply_events(events[250:])
    again.apply_feedback(feedback[100:])
    # Then both have the same, the variances too
    for trainer in (calm, again):
        trainer.touched.compare(None)
    assert contents(again) == contents(calm)
    for trainer in (calm, again):
        trainer.checkpoint(0)
    assert dict(again.database.scan(b"c/")) == dict(calm.database.scan(b"c/"))
    assert np.array_equal(again.tensors()["head/redeemed/weight"], calm.tensors()["head/redeemed/weight"])
    calm.close()
    again.close()


def test_a_worker_predicts_with_the_rows_that_were_published(new_embedded_shop: NewShop, tmp_path: Path) -> None:
    # Given what a trainer has published: its head, and its tables
    live = new_embedded_shop()
    events, feedback = story()
    trainer = learned(tmp_path, events, feedback)
    publisher = Publisher(live.settings)
    trainer.serve(publisher.publish(trainer.tensors(), [], 0, trainer.touched.offer()))
    trainer.touched.confirm()
    assert not trainer.touched
    # When a label makes a row better, only what it touched follows
    client = "late"
    at = START_MS + 900 * 60_000
    trainer.apply_events(records([(client, send(client, at, "m3"))], first=len(events)))
    trainer.apply_feedback(records([(client, answer(client, at, True, at + DAY_MS))], first=len(feedback)))
    assert {name: len(rows) for name, rows in contents(trainer).items()} == {"redeemed.merchant": 1, "redeemed.city": 1}
    published = publisher.publish(trainer.tensors(), [], 0, trainer.touched.offer())
    publisher.close()
    latest = read_latest(live.settings)
    assert latest is not None
    # Then a worker that reads the log predicts as the trainer does, for known, rare, empty and absent values
    asked = [
        ("a", send("a", at, "m1", city="city 1")),
        ("b", send("b", at, "m2")),
        ("c", send("c", at, "never seen", city="city 2")),
        ("d", send("d", at, "", city="city 0")),
        ("e", encode_event("e", at, "purchase", {"amount": 1.0, "department": "A"})),
    ]
    said = [_predictions(trainer, parameters, asked) for parameters in (latest[0], published)]
    assert np.array_equal(said[0], said[1], equal_nan=True)
    without = _predictions(trainer, ParameterSet(dict(published)), asked)
    assert (np.abs(said[0][:4] - without[:4]) > 1e-4).all()
    trainer.close()


def _predictions(trainer: OnlineTrainer, parameters: ParameterSet, asked: list[tuple[str, bytes]]) -> np.ndarray:
    """(events, 1) what a worker with these parameters says at events of clients that it does not know."""
    settings = trainer.settings
    decoder = EventDecoder(trainer.layout.schema, settings.limits, settings.topics.format)
    columns = decoder.decode(block(asked))
    rows = Replica(Database(trainer.database.path / "beside"), trainer.layout.width, 64, None)
    slots = rows.slots([client.encode() for client, _ in asked], [0] * len(asked), {})
    advanced = Engine(trainer.layout, parameters).advance(columns, slots, rows)
    questions = Questions(trainer.layout)
    out = np.full((len(asked), 1), np.nan, np.float32)
    out[advanced.triggers.event] = questions.predict(questions.heads(parameters), columns, advanced.triggers)
    return out


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ('tables = ["amount"]', "tasks.redeemed.tables = 'amount'"),
        ('tables = ["kind", "kind"]', "every field once"),
        ('tables = ["kind"]\nhead = "mlp"', "of the heads, `logistic` and `linear` read tables"),
        ("table_admission = 0", "tasks.redeemed.table_admission = 0"),
    ],
)
def test_wrong_settings_of_tables_are_refused(wrong: str, named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        parse(TOML.replace("[tasks.redeemed]", f"[tasks.redeemed]\n{wrong}"))
