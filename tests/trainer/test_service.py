"""The trainer on a real broker: events and feedback in, versions and dead letters out."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from stream.errors import BrokerError, Fenced, LivestateError, ParametersError, TopicError
from stream.settings import Kafka, parse
from tests.support.processes import http_get, metric, wait_for
from trainer.pretrain import random_trunk, save_parameters
from trainer.publisher import Publisher, read_latest
from trainer.record import read_record
from trainer.service import TrainerService
from trainer.timeline import Record

from . import shop
from .conftest import LiveShop, NewShop
from .shop import START_MS, answer, posterior, purchase, send

CLIENTS = 40


def stream(first: int = 0, clients: int = CLIENTS) -> tuple[list[Record], list[Record]]:
    """Events and feedback of some clients, in two partitions; odd ones redeem."""
    events: list[Record] = []
    feedback: list[Record] = []
    for c in range(first, first + clients):
        name, partition, at = f"c{c}", c % 2, START_MS + 1000 * c
        for value in (purchase(name, at, float(c % 7)), send(name, at + 1, "xy"[c % 2])):
            events.append(Record(partition, 0, at, name.encode(), value, ()))
        feedback.append(Record(partition, 0, at + 500, name.encode(), answer(name, at + 1, c % 2 == 1), ()))
    return events, feedback


class Running:
    """A service in a thread, and what it raised."""

    def __init__(self, service: TrainerService) -> None:
        self.service = service
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.service.run(broker_timeout_s=10)
        except BaseException as error:
            self.error = error

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def sample(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(name, labels) or 0.0

    def wait(self, name: str, value: float, **labels: str) -> None:
        wait_for(lambda: self.ended or self.sample(name, **labels) >= value, 60, f"{name} {labels} at {value}")
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        self.service.stop()
        self._thread.join(60)
        assert self.ended


@contextmanager
def running(live: LiveShop, record: Path | None = None, trunk: bool = True) -> Iterator[Running]:
    parameters = random_trunk(live.settings, []) if trunk else None
    one = Running(TrainerService(live.settings, parameters, record))
    try:
        yield one
    finally:
        one.stop()
    if one.error is not None:
        raise one.error


LEARNED = "livestate_examples_learned_total"


def test_rows_go_out_between_versions_with_tensors(new_embedded_shop: NewShop) -> None:
    # Given a trainer that seldom publishes tensors
    live = new_embedded_shop(toml=shop.TABLED, TRAINER__DENSE_INTERVAL_S="1000")
    events, feedback = stream()
    live.publish(live.settings.topics.events, events)
    with running(live) as trainer:
        trainer.wait("livestate_parameter_version", 1)
        # When labels come
        live.publish(live.settings.topics.feedback, feedback)
        trainer.wait(LEARNED, CLIENTS, task="redeemed")
        wait_for(lambda: not trainer.service.trainer.touched, 30, "every row is published")
        # Then what they taught the tables is out, and the head waits
        early = read_latest(live.settings)
    late = read_latest(live.settings)
    assert early is not None
    assert late is not None
    assert "head/redeemed/weight" not in early[0]
    assert early[1].feedback_ms == ()
    assert dict(early[0].tables["redeemed.kind"].items()).keys() == {b"*", b"=x", b"=y"}
    # And the last version has both
    assert "head/redeemed/weight" in late[0]
    assert sum(late[1].feedback_ms) > 0


def test_feedback_becomes_a_version_that_holds_the_posterior(new_shop: NewShop) -> None:
    # Given events and feedback on the broker
    live = new_shop()
    events, feedback = stream()
    live.publish(live.settings.topics.events, events)
    with running(live, live.directory / "record") as trainer:
        # When the trainer runs, and feedback comes while it does
        live.publish(live.settings.topics.feedback, feedback)
        trainer.wait(LEARNED, CLIENTS, task="redeemed")
        assert http_get(trainer.service.http_port, "/readyz") == (200, "ready\n")
        assert http_get(trainer.service.http_port, "/livez") == (200, "alive\n")
        assert http_get(trainer.service.http_port, "/nothing")[0] == 404
        assert metric(trainer.service.http_port, "livestate_feedback_total") == CLIENTS
    # Then the last version is what the trainer knows, and names the feedback that is in it
    assembler, markers = live.versions()
    assert assembler.current is not None
    learner = trainer.service.trainer.learners["redeemed"]
    assert np.array_equal(assembler.current["head/redeemed/weight"], posterior(learner).mean)
    assert assembler.current.trunk_id == random_trunk(live.settings, []).trunk_id
    times = sorted(at for marker in markers for at in marker.feedback_ms)
    assert times == sorted(one.timestamp_ms for one in feedback)
    # And the first version was there before anything was learned
    assert markers[0].feedback_ms == ()
    assert not any(name.startswith("head/") for name in markers[0].tensors)
    assert len(read_record(live.directory / "record")["redeemed"]) == CLIENTS


def test_feedback_that_comes_before_its_event_is_learned_when_that_comes(new_embedded_shop: NewShop) -> None:
    live = new_embedded_shop()
    events, feedback = stream()
    with running(live) as trainer:
        live.publish(live.settings.topics.feedback, feedback)
        wait_for(lambda: trainer.sample("livestate_pending_feedback") == CLIENTS, 30, "feedback waits")
        live.publish(live.settings.topics.events, events)
        trainer.wait(LEARNED, CLIENTS, task="redeemed")
        assert trainer.sample("livestate_feedback_total", task="redeemed", outcome="early") == CLIENTS


def test_unusable_feedback_goes_to_dead_letters_as_received(new_shop: NewShop) -> None:
    # Given two bad records before a good one
    live = new_shop()
    name, at = "ann", START_MS
    live.publish(live.settings.topics.events, [Record(1, 0, at, b"ann", send(name, at), ())])
    bad = [
        Record(1, 0, at + 1, b"ann", b"\xc1junk", (("trace", b"7"),)),
        Record(1, 1, at + 2, b"bob", answer(name, at, True), ()),
    ]
    good = Record(1, 2, at + 3, b"ann", answer(name, at, True), ())
    with running(live) as trainer:
        live.publish(live.settings.topics.feedback, [*bad, good])
        trainer.wait("livestate_feedback_total", 1, task="redeemed", outcome="joined")
    # Then they are in dead-letters with bytes, headers and reason
    found = live.read(live.settings.topics.dead_letters)
    assert [(letter.key(), letter.value()) for letter in found] == [(one.key, one.value) for one in bad]
    headers = [dict(letter.headers() or []) for letter in found]
    assert [one["livestate-reason"] for one in headers] == [b"undecodable", b"key_mismatch"]
    assert headers[0]["trace"] == b"7"
    assert headers[1]["livestate-topic"].decode() == live.settings.topics.feedback
    assert (headers[1]["livestate-partition"], headers[1]["livestate-offset"]) == (b"1", b"1")
    assert trainer.sample("livestate_dead_letters_total", reason="undecodable") == 1


def test_a_trainer_goes_on_where_it_stopped(new_embedded_shop: NewShop) -> None:
    # Given a trainer that learned half and stopped
    live = new_embedded_shop()
    for part in range(2):
        events, feedback = stream(part * CLIENTS)
        live.publish(live.settings.topics.events, events)
        live.publish(live.settings.topics.feedback, feedback)
        with running(live, trunk=part == 0) as trainer:
            trainer.wait(LEARNED, CLIENTS, task="redeemed")
        assert trainer.sample("livestate_trainer_events_total") == 2 * CLIENTS
        # Then the next learns the other half alone, and has both
        assert trainer.sample(LEARNED, task="redeemed") == CLIENTS
        assert trainer.service.trainer.learners["redeemed"].labels == (part + 1) * CLIENTS
    _, markers = live.versions()
    versions = [marker.version for marker in markers]
    assert versions == sorted(set(versions))
    assert {marker.epoch for marker in markers} == {1, 2}


def test_a_trainer_that_crashed_before_its_checkpoint_does_not_take_workers_back(
    new_embedded_shop: NewShop, free_port: int
) -> None:
    # Given a trainer that published what it learned, and is killed before any checkpoint of it
    live = new_embedded_shop(TRAINER__HTTP_PORT=str(free_port), TRAINER__CHECKPOINT_INTERVAL_S="600")
    trunk = live.directory / "trunk.msgpack"
    save_parameters(trunk, random_trunk(live.settings, []))
    events, feedback = stream()
    live.publish(live.settings.topics.events, events)
    live.publish(live.settings.topics.feedback, feedback)

    def learned_version() -> bool:
        return sum(len(marker.feedback_ms) for marker in live.versions()[1]) == CLIENTS

    process = live.process("--trunk", str(trunk))
    wait_for(learned_version, 60, "everything learned and published")
    process.kill()
    process.wait()
    before = read_latest(live.settings)
    # When it starts again, from nothing
    process = live.process("--trunk", str(trunk))

    def published_again() -> bool:
        latest = read_latest(live.settings)
        return latest is not None and latest[1].epoch == 2

    wait_for(published_again, 60, "a version of the new epoch")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, live.log()
    # Then its first version already has everything that was learned
    _, markers = live.versions()
    assert before is not None
    assembler, _ = live.versions()
    assert assembler.current is not None
    assert np.array_equal(assembler.current["head/redeemed/weight"], before[0]["head/redeemed/weight"])
    first = next(marker for marker in markers if marker.epoch == 2)
    assert first.tensors == markers[-1].tensors


def test_the_trunk_of_the_log_is_taken_where_nothing_else_is_given(new_embedded_shop: NewShop) -> None:
    live = new_embedded_shop()
    trunk = random_trunk(msgspec.structs.replace(live.settings, model=shop.settings(MODEL__SEED="4").model), [])
    publisher = Publisher(live.settings)
    publisher.publish(dict(trunk), [], 0)
    publisher.close()
    with running(live, trunk=False) as trainer:
        trainer.wait("livestate_parameter_versions_published_total", 1)
    assert trainer.service.trainer.parameters.trunk_id == trunk.trunk_id


def test_a_fenced_trainer_stops_and_says_why(new_embedded_shop: NewShop) -> None:
    # Given a trainer, and a second one that takes over
    live = new_embedded_shop()
    first = Running(TrainerService(live.settings, random_trunk(live.settings, [])))
    first.wait("livestate_parameter_versions_published_total", 1)
    second = Publisher(live.settings)
    # When the first wants to publish
    events, feedback = stream()
    live.publish(live.settings.topics.events, events)
    live.publish(live.settings.topics.feedback, feedback)
    wait_for(lambda: first.ended, 30, "the first trainer ends")
    # Then it has stopped with the reason
    second.close()
    assert isinstance(first.error, Fenced)
    assert "another trainer" in str(first.error)


Started = Callable[[TrainerService], Running]


@pytest.fixture
def started() -> Iterator[Started]:
    """Runs services, and stops at the end of the test those that still run."""
    running: list[Running] = []

    def start(service: TrainerService) -> Running:
        running.append(Running(service))
        return running[-1]

    yield start
    for one in running:
        one.stop()


def test_a_rebuild_learns_beside_the_running_trainer_and_takes_over(new_shop: NewShop, started: Started) -> None:
    # Given a trainer that has learned what there is
    live = new_shop()
    events, feedback = stream()
    live.publish(live.settings.topics.events, events)
    first = started(TrainerService(live.settings, random_trunk(live.settings, [])))
    live.publish(live.settings.topics.feedback, feedback)
    first.wait(LEARNED, CLIENTS, task="redeemed")
    first.wait("livestate_parameter_versions_published_total", 2)
    before = read_latest(live.settings)
    assert before is not None
    # When another trunk is learned beside it
    trunk = random_trunk(msgspec.structs.replace(live.settings, model=shop.settings(MODEL__SEED="4").model), [])
    assert trunk.trunk_id != before[0].trunk_id
    beside = msgspec.structs.replace(
        live.settings, trainer=msgspec.structs.replace(live.settings.trainer, data_dir=str(live.directory / "next"))
    )
    second = started(TrainerService(beside, trunk, takes_over=True))
    second.wait("livestate_parameter_versions_published_total", 1)
    after = read_latest(live.settings)
    # Then its first version already has everything there was, under a later number
    assert after is not None
    assert after[0].trunk_id == trunk.trunk_id
    assert after[0].version > before[0].version
    learner = second.service.trainer.learners["redeemed"]
    assert np.array_equal(after[0]["head/redeemed/weight"], posterior(learner).mean)
    assert second.sample(LEARNED, task="redeemed") == CLIENTS
    assert second.sample("livestate_trainer_taking_over") == 0
    # And the first trainer ends as soon as it wants to publish
    more, answers = stream(CLIENTS)
    live.publish(live.settings.topics.events, more)
    live.publish(live.settings.topics.feedback, answers)
    wait_for(lambda: first.ended, 60, "the first trainer ends")
    assert isinstance(first.error, Fenced)
    # And does not bring its trunk back when it is started again
    error = refused(TrainerService(live.settings), 10.0)
    assert isinstance(error, ParametersError)
    assert "a rebuild has taken over" in str(error)
    # While the second goes on
    second.wait(LEARNED, 2 * CLIENTS, task="redeemed")
    second.stop()
    assert second.error is None
    assert read_latest(live.settings)[0].trunk_id == trunk.trunk_id


def refused(service: TrainerService, timeout_s: float = 1.0) -> LivestateError:
    with pytest.raises(LivestateError) as caught:
        service.run(broker_timeout_s=timeout_s)
    return caught.value


def test_a_broker_that_is_not_there_is_named(tmp_path: Path, free_port: int) -> None:
    settings = msgspec.structs.replace(
        shop.settings(TRAINER__HTTP_PORT="0", TRAINER__DATA_DIR=str(tmp_path / "trainer")),
        kafka=Kafka(bootstrap_servers=f"127.0.0.1:{free_port}"),
    )
    error = refused(TrainerService(settings))
    assert isinstance(error, BrokerError)
    assert str(free_port) in str(error)


def test_missing_topics_are_named(new_embedded_shop: NewShop) -> None:
    live = new_embedded_shop()
    other = parse(shop.TOML, {**live.environment, "LIVESTATE_TOPICS__FEEDBACK": "nobody-made-this"})
    error = refused(TrainerService(other), 10)
    assert isinstance(error, TopicError)
    assert "nobody-made-this" in str(error)


def test_topics_that_were_made_anew_are_noticed(new_embedded_shop: NewShop) -> None:
    # Given a checkpoint that has read further than the topics go
    live = new_embedded_shop()
    live.publish(live.settings.topics.events, stream()[0])
    with running(live) as trainer:
        trainer.wait("livestate_trainer_events_total", 2 * CLIENTS)
    other = new_embedded_shop(TRAINER__DATA_DIR=live.settings.trainer.data_dir)
    error = refused(TrainerService(other.settings), 10)
    assert isinstance(error, BrokerError)
    assert "made anew" in str(error)


def test_a_taken_port_is_named(new_embedded_shop: NewShop) -> None:
    live = new_embedded_shop()
    with running(live) as trainer:
        trainer.wait("livestate_parameter_versions_published_total", 1)
        port = str(trainer.service.http_port)
        other = parse(shop.TOML, {**live.environment, "LIVESTATE_TRAINER__HTTP_PORT": port})
        error = refused(TrainerService(other))
    assert error.exit_code == 2
    assert f"trainer.http_port = {port}" in str(error)


def test_a_flood_of_feedback_without_events_is_not_read_further_than_its_bound(
    new_embedded_shop: NewShop,
) -> None:
    # Given a trainer with room for little waiting feedback
    live = new_embedded_shop()
    events, feedback = stream(clients=200)
    with running(live) as trainer:
        trainer.wait("livestate_parameter_versions_published_total", 1)
        trainer.service.trainer.joiner._pending_limit = 10
        # When far more comes than that, in small fetches
        for start in range(0, len(feedback), 10):
            live.publish(live.settings.topics.feedback, feedback[start : start + 10])
        lag = {"topic": live.settings.topics.feedback}
        wait_for(lambda: trainer.sample("livestate_trainer_lag_events", **lag) > 0, 30, "feedback waits in its topic")
        # Then it has taken little more than there is room for
        assert 20 <= trainer.sample("livestate_pending_feedback") < 100
        # Then the rest is read when the events are there, and nothing is lost
        live.publish(live.settings.topics.events, events)
        trainer.wait(LEARNED, 200, task="redeemed")
