"""Publishing the year: complete, in stream order, labels after their events, within the lag allowed."""

from collections.abc import Iterator
from pathlib import Path

import msgpack
import msgspec
import numpy as np
import pytest
from confluent_kafka import Consumer, Message, TopicPartition

from stream.broker import Broker, EmbeddedBroker
from stream.errors import BrokerError
from stream.kafka import client_config, ensure_topics, partition_of
from stream.settings import Kafka, Settings, Topics, parse
from stream.settings import load as load_settings
from stream.wire import EventDecoder, RecordBlock, Schema, decode_feedback, encode_event, encode_feedback
from trainer.demo.encoding import EventPacker
from trainer.demo.journey import Journey
from trainer.demo.replay import Progress, main, replay

SHOP = Path(__file__).resolve().parents[2] / "stream" / "examples" / "shop.toml"

pytestmark = pytest.mark.timeout(120)


def ms(day: str) -> int:
    return int(np.datetime64(day, "ms").astype(np.int64))


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with EmbeddedBroker(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture
def settings(broker: Broker, request: pytest.FixtureRequest) -> Settings:
    name = request.node.name.replace("_", "-")
    topics = Topics(
        **{
            role: f"{name}-{role}"
            for role in ("events", "feedback", "embeddings", "changelog", "parameters", "dead_letters")
        }
    )
    plain = parse("[modalities.purchase]\n")
    made = msgspec.structs.replace(plain, kafka=Kafka(bootstrap_servers=broker.bootstrap_servers), topics=topics)
    ensure_topics(made, create=True)
    return made


def read_all(settings: Settings, topic: str, partitions: int = 4) -> list[list[Message]]:
    """Every record of the topic, by partition."""
    consumer = Consumer(client_config(settings, group_id="reader", enable_auto_commit=False))
    ends = [consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=10)[1] for p in range(partitions)]
    consumer.assign([TopicPartition(topic, p, 0) for p in range(partitions)])
    read: list[list[Message]] = [[] for _ in range(partitions)]
    while sum(map(len, read)) < sum(ends):
        for message in consumer.consume(5000, 0.2):
            assert message.error() is None
            read[message.partition()].append(message)
    consumer.close()
    return read


def test_packed_events_are_those_that_the_wire_describes(journey: Journey) -> None:
    # Given parts of the year with purchases alone, sends or redemptions among them, unlisted products
    first_send = int(np.flatnonzero(journey.order[200:] >= len(journey.purchases))[0]) + 200
    redemptions = np.flatnonzero(journey.order >= len(journey.purchases) + len(journey.sends))
    redemption = int(redemptions[len(redemptions) // 2])
    unlisted = np.flatnonzero(np.equal(journey.products.department[journey.purchases.product], None))[0]
    lacking = int(np.flatnonzero(journey.order == unlisted)[0])
    parts = [
        slice(0, 300),
        slice(first_send - 50, first_send + 250),
        slice(redemption - 5, redemption + 5),
        slice(lacking - 5, lacking + 5),
        slice(len(journey) - 100, len(journey)),
    ]
    packer = EventPacker(journey)
    for part in [*parts, slice(5, 5)]:
        # When they are packed together, then each has the content of the same event encoded alone
        keys, values = packer.pack(part)
        events = list(journey.events(part))
        assert keys == [event.client_id.encode() for event in events]
        assert [msgpack.unpackb(value) for value in values] == [
            msgpack.unpackb(encode_event(*event)) for event in events
        ]


def test_a_week_arrives_complete_and_in_order_with_its_labels(settings: Settings, journey: Journey) -> None:
    # Given a week in which a campaign ends and coupons are redeemed
    start, end = ms("2017-04-08"), ms("2017-04-15")
    seen: list[Progress] = []
    # When it is published
    final = replay(settings, journey, start_ms=start, end_ms=end, progress=seen.append)
    # Then every event is there once, on its client's partition, in stream order
    part = journey.between(start, end)
    expected = {p: [] for p in range(4)}
    for event in journey.events(part):
        expected[partition_of(event.client_id.encode(), 4)].append(event)
    for p, messages in enumerate(read_all(settings, settings.topics.events)):
        records = [msgpack.unpackb(message.value()) for message in messages]
        assert [
            (record["client_id"], record["timestamp_ms"], record["modality"], record["fields"]) for record in records
        ] == expected[p]
        assert all(message.key() == r["client_id"].encode() for message, r in zip(messages, records, strict=True))
    # And every label of the week
    labels = [record._asdict() for record in journey.feedback() if start <= record.timestamp_ms < end]
    published = [
        msgpack.unpackb(message.value())
        for messages in read_all(settings, settings.topics.feedback)
        for message in messages
    ]
    assert len(labels) > 50
    assert sorted(published, key=str) == sorted(labels, key=str)
    # And progress ends with the whole
    assert seen[-1] == final
    assert final.done
    assert (final.events, final.feedback) == (final.events_total, final.feedback_total)
    assert (final.events, final.feedback) == (part.stop - part.start, len(labels))


def test_a_label_is_published_after_the_events_before_it(settings: Settings, journey: Journey) -> None:
    # When days with labels are published
    replay(settings, journey, start_ms=ms("2017-04-08"), end_ms=ms("2017-04-12"))
    # Then no label was sent before the last event that precedes it
    sent: list[tuple[int, int]] = []
    for messages in read_all(settings, settings.topics.events):
        sent += [(msgpack.unpackb(m.value())["timestamp_ms"], m.timestamp()[1]) for m in messages]
    labels = [
        (msgpack.unpackb(message.value())["timestamp_ms"], message.timestamp()[1])
        for messages in read_all(settings, settings.topics.feedback)
        for message in messages
    ]
    assert labels
    for stream_ms, published_ms in labels:
        assert published_ms >= max(at for event_ms, at in sent if event_ms < stream_ms)


def test_nothing_is_published_while_the_workers_are_too_far_behind(settings: Settings, journey: Journey) -> None:
    # Given workers that apply a thousand events each time they are asked
    most, applied, published = 0, 0, 0

    def lag() -> int:
        nonlocal applied, most
        most = max(most, published - applied)
        applied = min(published, applied + 1000)
        return published - applied

    def note(progress: Progress) -> None:
        nonlocal published
        published = progress.events

    # When two days are published with a bound, and a clock on which every look takes the interval of asking
    moment = 0.0

    def clock() -> float:
        nonlocal moment
        moment += 0.1
        return moment

    final = replay(
        settings,
        journey,
        start_ms=ms("2017-05-01"),
        end_ms=ms("2017-05-03"),
        lag=lag,
        max_lag=3000,
        progress=note,
        clock=clock,
    )
    # Then they were never further behind than the bound and one chunk
    assert final.events == final.events_total > 6000
    assert 2000 < most <= 3000 + 2000


def test_a_rate_is_kept(settings: Settings, journey: Journey) -> None:
    # Given a clock that moves a hundredth of a second with every look, when a rate of 50,000/s is asked for
    moment = 0.0
    seen: list[Progress] = []

    def clock() -> float:
        nonlocal moment
        moment += 0.01
        return moment

    final = replay(
        settings,
        journey,
        start_ms=ms("2017-05-01"),
        end_ms=ms("2017-05-03"),
        rate=50_000,
        progress=seen.append,
        clock=clock,
    )
    # Then at no look had more gone out than the rate allows
    assert final.events == final.events_total
    assert all(one.events <= one.elapsed_s * 50_000 + 1 for one in seen)


def test_a_stopped_replay_says_that_it_is_not_done(settings: Settings, journey: Journey) -> None:
    looks = iter([False] * 3)
    final = replay(settings, journey, stopping=lambda: next(looks, True))
    assert not final.done
    assert 0 < final.events < final.events_total
    assert sum(map(len, read_all(settings, settings.topics.events))) == final.events


def test_a_refused_record_is_an_error(settings: Settings, journey: Journey) -> None:
    # Given a topic name that no broker accepts, when an event is sent there
    absent = msgspec.structs.replace(settings.topics, events="no/such topic")
    # Then the replay ends with the reason
    with pytest.raises(BrokerError, match="not delivered"):
        replay(
            msgspec.structs.replace(settings, topics=absent),
            journey,
            start_ms=ms("2017-05-01"),
            end_ms=ms("2017-05-02"),
        )


def test_the_command_publishes_what_it_is_told(
    tmp_path: Path, broker: Broker, capsys: pytest.CaptureFixture[str], journey: Journey
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(
        f'[modalities.purchase]\n[kafka]\nbootstrap_servers = "{broker.bootstrap_servers}"\n',
        encoding="utf-8",
    )
    assert main([str(path), "--start", "2017-03-01", "--end", "2017-03-02"]) == 0
    part = journey.between(ms("2017-03-01"), ms("2017-03-02"))
    assert capsys.readouterr().out.startswith(f"{part.stop - part.start} events, ")
    with pytest.raises(SystemExit):
        main([str(path), "--start", "yesterday"])
    assert "expected a day such as" in capsys.readouterr().err
    path.write_text("[modalities.purchase]\nwrong = 1\n", encoding="utf-8")
    assert main([str(path)]) == 2
    assert "wrong" in capsys.readouterr().err


def test_the_shipped_settings_accept_every_kind_of_event(journey: Journey) -> None:
    # Given the shop's settings and events from all over the year
    settings = load_settings(SHOP)
    decoder = EventDecoder(Schema.compile(settings), settings.limits, settings.topics.format)
    packer = EventPacker(journey)
    for start in range(0, len(journey), 100_000):
        part = slice(start, min(start + 2000, len(journey)))
        keys, values = packer.pack(part)
        block = RecordBlock.from_lists(keys, values, np.arange(len(keys)), np.full(len(keys), 1_800_000_000_000), None)
        # When they are decoded as a worker does, then none is refused and times are kept
        columns = decoder.decode(block)
        assert columns.rejected == []
        assert columns.accepted.all()
        assert np.array_equal(columns.timestamp_ms, journey.timestamp_ms[part])
    # And feedback is of its task
    for record in journey.feedback()[:200]:
        assert decode_feedback(record.client_id.encode(), encode_feedback(record), None, settings) == record
