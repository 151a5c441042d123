"""A trainer that is killed again and again ends as one that is left alone."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess

import msgpack
import numpy as np
import pytest

from stream.metrics import TrainerMetrics
from tests.bench.support.site import scrape
from tests.support.processes import metric, wait_for
from trainer.online import OnlineTrainer
from trainer.pretrain import random_trunk, save_parameters
from trainer.record import AnsweredExamples, read_record
from trainer.tables import rows_in

from .conftest import LiveShop, NewShop
from .shop import TABLED, TOML, posterior, refuse_nothing
from .test_online import year
from .test_windows import ONLINE, where_they_belong

CLIENTS = 6_000
KILLS = 20
#: A network, and trees that are fitted again every day of the twenty.
ENSEMBLE = (
    TOML.replace("prior_variance = 0.1", 'head = ["mlp", "gbdt"]\nkeep_examples = 1024')
    + """
[tasks.redeemed.mlp]
hidden = 8
members = 2
[tasks.redeemed.gbdt]
least_examples = 100
leaf_examples = 5
trees = 10
refit_interval_s = 43_200
delay_s = 7_200
"""
)


def finish(live: LiveShop, port: int, trunk: str) -> float:
    """Run the trainer until it has read everything, and end it in order; returns how many events it applied."""
    process = live.forked("--trunk", trunk, "--record", str(live.directory / "record"))
    events = live.settings.topics.events

    def done() -> bool:
        assert process.is_alive(), live.log()
        # Of one answer: one that does not come in time says nothing.
        found = scrape(port)
        return found.get("livestate_trainer_lag_events") == 0 and found.get("livestate_parameter_version", 0) > 0

    wait_for(done, 240, f"everything of {events} read")
    applied = metric(port, "livestate_trainer_events_total")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0, live.log()
    return applied


@contextmanager
def opened(live: LiveShop) -> Iterator[OnlineTrainer]:
    """What a trainer left on disk."""
    parameters = random_trunk(live.settings, [])
    directory = live.directory / "trainer"
    trainer = OnlineTrainer(live.settings, directory, parameters, TrainerMetrics(), refuse_nothing)
    yield trainer
    trainer.close()


def good_state(trainer: OnlineTrainer, which: bytes) -> tuple[object, ...]:
    """What the guard would go back to: labels, tensors, posterior, scale, and rows by key, as rows have no order."""
    labels, state, tensors = msgpack.unpackb(trainer.database.get(b"g/redeemed/" + which))
    _, _, _, parts, tables, *about = msgpack.unpackb(state)
    return labels, tensors, parts, about, [rows_in(table) for table in tables]


def order(found: AnsweredExamples) -> list[tuple[bytes, int, bool]]:
    return list(zip(found.client_id, found.as_of_ms.tolist(), found.label.tolist(), strict=True))


def strike(process: ForkServerProcess, port: int, random: np.random.Generator, most: float) -> bool:
    """Kill a trainer at a random moment, when it has applied `most` events or fewer; True where it had applied some."""
    if random.random() < 0.2:
        # While it starts, most likely.
        process.join(float(random.uniform(0.0, 0.6)))
    else:
        # So few events each time that the last kill meets it at work, too.
        enough = random.uniform(1, most)
        wait_for(lambda: metric(port, "livestate_trainer_events_total") >= enough, 60, f"{enough:.0f} events applied")
        # Of any length, so that the kill may meet a batch, a version or a checkpoint.
        process.join(float(random.uniform(0.0, 0.02)))
    at_work = metric(port, "livestate_trainer_events_total") > 0
    assert process.is_alive(), "it has ended by itself"
    process.kill()
    process.join()
    return at_work


def disturb(new_shop: NewShop, port: int, seed: int, toml: str, clients: int, kills: int) -> tuple[LiveShop, LiveShop]:
    """Two shops with the same input, read to the end: by a trainer that is left alone, and by one that is killed."""
    options = {"TRAINER__HTTP_PORT": str(port), "TRAINER__CHECKPOINT_INTERVAL_S": "0.05"}
    calm = new_shop(toml=toml, **options)
    events, feedback = year(clients)
    calm.publish(calm.settings.topics.events, events)
    calm.publish(calm.settings.topics.feedback, feedback)
    trunk = calm.directory / "trunk.msgpack"
    save_parameters(trunk, random_trunk(calm.settings, []))
    finish(calm, port, str(trunk))
    killed = new_shop(
        TOPICS__EVENTS=calm.settings.topics.events,
        TOPICS__FEEDBACK=calm.settings.topics.feedback,
        toml=toml,
        **options,
    )
    print(f"the moments are those of --seed {seed}")
    random = np.random.default_rng(seed)
    arguments = ("--trunk", str(trunk), "--record", str(killed.directory / "record"))
    # All the kills together let it apply about a quarter of the events.
    at_work = sum(strike(killed.forked(*arguments), port, random, clients / kills) for _ in range(kills))
    left = finish(killed, port, str(trunk))
    assert at_work > kills / 2, "too few kills met a trainer at work"
    assert left > 0, "it had read everything before the last kill"
    return calm, killed


@pytest.mark.timeout(600)
def test_a_killed_trainer_ends_bit_for_bit_as_an_undisturbed_one(
    new_embedded_shop: NewShop, free_port: int, request: pytest.FixtureRequest
) -> None:
    # Given events and feedback, a trainer that reads them undisturbed, and one that is killed at random moments
    seed = request.config.getoption("--seed")
    calm, killed = disturb(new_embedded_shop, free_port, seed, TABLED, CLIENTS, KILLS)
    # Then both know the same: nothing was lost, and nothing learned twice
    with opened(calm) as one, opened(killed) as other:
        learned, relearned = one.learners["redeemed"], other.learners["redeemed"]
        assert learned.labels == relearned.labels >= CLIENTS
        assert one.positions == other.positions
        assert np.array_equal(posterior(learned).mean, posterior(relearned).mean)
        assert np.array_equal(posterior(learned).covariance, posterior(relearned).covariance)
        for rows in (b"r", b"c/", b"a/"):
            assert dict(one.database.scan(rows)) == dict(other.database.scan(rows)) != {}
        for part in (b"about", b"chunk"):
            assert one.database.get(b"g/redeemed/" + part) == other.database.get(b"g/redeemed/" + part) is not None
        for part in (b"good", b"next"):
            assert good_state(one, part) == good_state(other, part)
        assert one.joiner.waiting == other.joiner.waiting == 0
        # And workers have the same head
        ours, theirs = calm.versions()[0].current, killed.versions()[0].current
        assert ours is not None
        assert theirs is not None
        assert np.array_equal(ours["head/redeemed/weight"], theirs["head/redeemed/weight"])
        assert np.array_equal(theirs["head/redeemed/weight"], posterior(relearned).mean)
        other.touched.compare(theirs)
        assert not other.touched
        assert dict(ours.tables["redeemed.kind"].items()) == dict(theirs.tables["redeemed.kind"].items())
        assert ours.tables["redeemed.kind"].rows == 3
    records = [read_record(live.directory / "record")["redeemed"] for live in (calm, killed)]
    assert order(records[0]) == order(records[1])
    assert len(records[0]) >= CLIENTS


@pytest.mark.timeout(600)
def test_a_killed_network_and_killed_trees_end_as_undisturbed_ones(
    new_embedded_shop: NewShop, free_port: int, request: pytest.FixtureRequest
) -> None:
    # Given a head of a network and trees, and a trainer that is killed at random moments, also while trees are fitted
    seed = request.config.getoption("--seed")
    calm, killed = disturb(new_embedded_shop, free_port, seed, ENSEMBLE, clients=1_500, kills=6)
    # Then what is published is that of an undisturbed one, bit for bit
    ours, theirs = calm.versions()[0].current, killed.versions()[0].current
    assert ours is not None
    assert theirs is not None
    parts = {"head/redeemed/mlp/input", "head/redeemed/mlp/output", "head/redeemed/gbdt/text"}
    assert parts < set(ours)
    assert {name: one.tobytes() for name, one in ours.items()} == {name: one.tobytes() for name, one in theirs.items()}
    with opened(calm) as one, opened(killed) as other:
        # And so are the states that they learn on from, and the examples that they keep for that
        assert one.learners["redeemed"].labels >= 1_500
        assert one.learners["redeemed"].state() == other.learners["redeemed"].state()
        kept = dict(one.database.scan(b"t/redeemed/x/"))
        assert kept == dict(other.database.scan(b"t/redeemed/x/"))
        assert len(kept) > 4


@pytest.mark.timeout(300)
def test_a_killed_trainer_of_an_online_trunk_ends_with_the_same_trunk(
    new_embedded_shop: NewShop, free_port: int, request: pytest.FixtureRequest
) -> None:
    # Given a trainer that learns the trunk, too, and reads everything undisturbed
    options = {**ONLINE, "TRAINER__HTTP_PORT": str(free_port), "TRAINER__CHECKPOINT_INTERVAL_S": "0.05"}
    options["STORE__MEMORY_ROWS"] = "200"
    calm = new_embedded_shop(**options)
    events, feedback = (where_they_belong(found) for found in year(400))
    calm.publish(calm.settings.topics.events, events)
    calm.publish(calm.settings.topics.feedback, feedback)
    trunk = calm.directory / "trunk.msgpack"
    start = random_trunk(calm.settings, [])
    save_parameters(trunk, start)
    finish(calm, free_port, str(trunk))
    # When another one reads the same and is killed at random moments
    inputs = {"TOPICS__EVENTS": calm.settings.topics.events, "TOPICS__FEEDBACK": calm.settings.topics.feedback}
    killed = new_embedded_shop(**inputs, **options)
    random = np.random.default_rng(request.config.getoption("--seed"))
    arguments = ("--trunk", str(trunk), "--record", str(killed.directory / "record"))
    assert sum(strike(killed.forked(*arguments), free_port, random, 300) for _ in range(3)) > 0
    finish(killed, free_port, str(trunk))
    # Then rows, windows, trunk and optimiser are the same, bit for bit
    with opened(calm) as one, opened(killed) as other:
        for kind in (b"r", b"w", b"k/weights", b"p/"):
            assert dict(one.database.scan(kind)) == dict(other.database.scan(kind)) != {}
        assert one.trunk is not None
        assert one.trunk.steps > 50
    # And so is what workers have, which is not the trunk of the beginning
    ours, theirs = calm.versions()[0].current, killed.versions()[0].current
    assert ours is not None
    assert theirs is not None
    assert {name: one.tobytes() for name, one in ours.items()} == {name: one.tobytes() for name, one in theirs.items()}
    assert ours.trunk_id == f"online-{start.trunk_id}"
    assert not np.array_equal(ours["trunk/weight_hh"], start["trunk/weight_hh"])
