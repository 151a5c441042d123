"""Models side by side: the served predictions as they were read back, a frozen head, and boosted trees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgpack
import msgspec
import numpy as np
import pytest
from confluent_kafka import Producer
from matplotlib.image import imread

from stream.broker import Broker, EmbeddedBroker
from stream.kafka import ensure_topics, producer_config
from stream.model.heads import Questions
from stream.model.layout import Layout
from stream.settings import Kafka, Settings, load
from stream.wire import Schema
from trainer.demo.comparison import MIDYEAR_MS, compare
from trainer.demo.journey import TASK, Journey
from trainer.evaluation import auc
from trainer.joiner import Example, Joined
from trainer.learner import Standardiser
from trainer.record import Recorder

SHOP = Path(__file__).resolve().parents[2] / "stream" / "examples" / "shop.toml"

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with EmbeddedBroker(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture
def settings(broker: Broker, request: pytest.FixtureRequest) -> Settings:
    plain = load(SHOP, {})
    name = request.node.name.replace("_", "-")
    topics = msgspec.structs.replace(plain.topics, embeddings=f"{name}-embeddings")
    made = msgspec.structs.replace(plain, kafka=Kafka(bootstrap_servers=broker.bootstrap_servers), topics=topics)
    ensure_topics(made, create=True)
    return made


def serve(settings: Settings, journey: Journey, said: np.ndarray) -> int:
    """Publish embeddings as workers do: one at each send, some again, and some of purchases in between."""
    producer = Producer(producer_config(settings, compression_type="none"))
    sends = journey.sends
    published = 0
    for i, (household, at) in enumerate(zip(sends.household.tolist(), sends.timestamp_ms.tolist(), strict=True)):
        record = {"client_id": str(household), "timestamp_ms": at, "offset": i, "parameter_version": 1}
        record |= {"events_seen": 1, "vector": b"", "predictions": {TASK: float(said[i])}}
        # A crash repeats a record under newer parameters, and what was served first is what counts.
        again = [record | {"predictions": {TASK: 0.5}}] if i % 7 == 0 else []
        for one in [record, *again, record | {"timestamp_ms": at + 1, "predictions": {}}]:
            producer.produce(settings.topics.embeddings, msgpack.packb(one), str(household).encode(), i % 4)
            published += 1
        producer.poll(0)
    assert producer.flush(30) == 0
    return published


def answered(settings: Settings, journey: Journey, path: Path) -> None:
    """A record of all labels known within the year, whose first input that is no state gives the label away."""
    question = Questions(Layout.compile(settings, Schema.compile(settings))).by_task[TASK]
    names, is_state = question.names, question.is_state
    width, telling = len(is_state), int(np.flatnonzero(~is_state)[0])
    recorder = Recorder(path)
    standardiser = Standardiser(width, 2)
    for value in (-1.0, 1.0):
        standardiser.observe(np.full(width, value, np.float32))
    recorder.standardiser(TASK, standardiser, names, 0)
    for record in journey.feedback():
        inputs = np.zeros(width, np.float32)
        inputs[telling] = 1.0 if record.label else -1.0
        assert record.window_end_ms is not None
        example = Example(TASK, record.client_id.encode(), record.as_of_ms, inputs, 0.5, 1)
        final_ms = max(record.timestamp_ms, record.window_end_ms)
        recorder.example(Joined(example, record.label, 1.0, record.timestamp_ms, 0, final_ms))
    recorder.close()


def test_models_are_measured_on_the_same_closed_campaigns(settings: Settings, journey: Journey, tmp_path: Path) -> None:
    # Given what was served, and what was answered
    sends = journey.sends
    redeemed = sends.redeemed_ms >= 0
    said = (0.3 * redeemed + np.random.default_rng(0).random(len(sends))).astype(np.float32)
    published = serve(settings, journey, said)
    answered(settings, journey, tmp_path / "answered.bin")
    # When they are compared
    found = compare(settings, journey, tmp_path / "answered.bin", tmp_path / "auc.png")
    # Then live is what was served first, on the campaigns from July on that ended within the year
    judged = (sends.timestamp_ms >= MIDYEAR_MS) & (journey.campaigns.end_ms[sends.campaign] <= journey.end_ms)
    assert found.auc["live"] == auc(redeemed[judged], said[judged])
    assert found.evaluated.startswith(f"{int(judged.sum()):,} campaign sends from July on")
    assert int(judged.sum()) == 3_338
    # And the frozen head has learned the input that tells
    assert found.auc["frozen at mid-year"] == 1.0
    assert 0.79 < found.auc["LightGBM on aggregates, retrained"] < 0.87
    assert 0.79 < found.auc["logistic regression on aggregates, refitted"] < 0.87
    # And how far live is ahead has an interval, against each of them
    assert list(found.ahead) == [name for name in found.auc if name != "live"]
    for name, ahead in found.ahead.items():
        assert ahead.value == pytest.approx(found.auc["live"] - found.auc[name])
        assert ahead.low < ahead.value < ahead.high
    assert found.embeddings == published
    assert found.picture == tmp_path / "auc.png"
    assert imread(found.picture).shape[1] > 900


def test_a_stream_that_ends_before_july_has_no_figures(settings: Settings, journey: Journey, tmp_path: Path) -> None:
    # Given a stream until May, and nothing served or answered in it
    part = journey.until(MIDYEAR_MS - 40 * 86_400_000)
    # When models are compared, then nothing is measured, drawn, or asked of a record that is not there
    found = compare(settings, part, tmp_path / "none.bin", tmp_path / "auc.png")
    assert all(np.isnan(value) for value in found.auc.values())
    assert len(found.auc) == 4
    assert (found.picture, found.embeddings) == (None, 0)
