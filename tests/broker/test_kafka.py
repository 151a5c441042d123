"""Topics and client configurations, on real brokers."""

import logging
import threading

import msgspec
import numpy as np
import pytest
from confluent_kafka import Consumer, KafkaException, Message, Producer
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType
from hypothesis import given
from hypothesis import strategies as st

from stream.errors import BrokerError, TopicError
from stream.kafka import (
    client_config,
    ensure_topics,
    log_ends,
    log_range,
    metadata,
    murmur2,
    partition_of,
    partitions_of,
    producer_config,
    topic_plans,
    wait_until_reachable,
)
from stream.settings import Kafka, Settings, parse

pytestmark = pytest.mark.timeout(120)


def java_murmur2(data: bytes) -> int:
    """Kafka's `Utils.murmur2`, written out in plain integers."""
    m, mask = 0x5BD1E995, 0xFFFFFFFF
    h = 0x9747B28C ^ len(data)
    whole = len(data) // 4 * 4
    for at in range(0, whole, 4):
        k = int.from_bytes(data[at : at + 4], "little") * m & mask
        k = (k ^ k >> 24) * m & mask
        h = (h * m & mask) ^ k
    if whole < len(data):
        h = (h ^ int.from_bytes(data[whole:], "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    h ^= h >> 15
    return h - (1 << 32) if h >> 31 else h


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_murmur2_gives_the_values_of_kafkas_own_unit_test(key: bytes, expected: int) -> None:
    assert murmur2(key) == expected


@given(keys=st.lists(st.binary(max_size=40), max_size=20), partitions=st.integers(1, 10_000))
def test_packed_keys_go_where_single_keys_go(keys: list[bytes], partitions: int) -> None:
    buffer = np.frombuffer(b"".join(keys), np.uint8)
    offsets = np.cumsum([0, *map(len, keys)], dtype=np.int64)
    expected = [(java_murmur2(key) & 0x7FFFFFFF) % partitions for key in keys]
    assert partitions_of(buffer, offsets, partitions).tolist() == expected
    assert [partition_of(key, partitions) for key in keys] == expected


def test_the_producer_puts_keys_where_partition_of_says(settings: Settings) -> None:
    ensure_topics(settings, create=True)
    went: dict[bytes, int] = {}

    def note(error: object, message: Message) -> None:
        assert error is None
        key, partition = message.key(), message.partition()
        assert isinstance(key, bytes)
        assert partition is not None
        went[key] = partition

    producer = Producer(producer_config(settings))
    keys = [f"client-{i}".encode() for i in range(200)] + ["Zoë".encode(), b"\x00\xff"]
    for key in keys:
        producer.produce(settings.topics.events, b"value", key, on_delivery=note)
    assert producer.flush(30) == 0
    assert went == {key: partition_of(key, 4) for key in keys}
    assert len(set(went.values())) == 4


def test_missing_topics_are_created_once(settings: Settings) -> None:
    # Given a broker without our topics, when they are ensured twice
    made = ensure_topics(settings, create=True)
    again = ensure_topics(settings, create=True)
    # Then all six were made the first time and none the second
    assert sorted(made) == sorted(plan.name for plan in topic_plans(settings))
    assert again == []
    found = metadata(settings.kafka, 10).topics
    assert {plan.role: found[plan.name] for plan in topic_plans(settings)} == {
        "events": 4,
        "feedback": 4,
        "embeddings": 4,
        "changelog": 4,
        "parameters": 1,
        "dead_letters": 1,
    }


def test_missing_topics_are_named_when_they_may_not_be_created(settings: Settings) -> None:
    with pytest.raises(TopicError, match=r"topics are missing .*-events.*livestate topics --create"):
        ensure_topics(settings, create=False)


def test_a_changed_partition_count_is_refused_with_what_to_do(settings: Settings) -> None:
    ensure_topics(settings, create=True)
    other = msgspec.structs.replace(settings, topics=msgspec.structs.replace(settings.topics, partitions=5))
    for create in (True, False):
        with pytest.raises(TopicError, match=r"has 4 partitions.*Set topics.partitions = 4, or move to new"):
            ensure_topics(other, create=create)


def test_a_parameters_topic_of_several_partitions_is_refused(settings: Settings) -> None:
    admin = AdminClient(client_config(settings))
    for made in admin.create_topics([NewTopic(settings.topics.parameters, 2, replication_factor=1)]).values():
        made.result(30)
    with pytest.raises(TopicError, match=r"topics.parameters\) has 2 partitions, expected 1"):
        ensure_topics(settings, create=True)


# The embedded broker neither keeps nor needs cleanup policies: it ends with the process.
@pytest.mark.parametrize("shared_broker", ["apache"], indirect=True)
def test_policies_are_as_planned(settings: Settings) -> None:
    ensure_topics(settings, create=True)
    admin = AdminClient(client_config(settings))
    for plan in topic_plans(settings):
        answers = admin.describe_configs([ConfigResource(ResourceType.TOPIC, plan.name)])
        config = next(iter(answers.values())).result(30)
        assert {name: config[name].value for name in plan.config} == plan.config


@pytest.mark.parametrize("shared_broker", ["apache"], indirect=True)
def test_a_changelog_that_is_not_compacted_is_refused(settings: Settings) -> None:
    admin = AdminClient(client_config(settings))
    topic = NewTopic(settings.topics.changelog, 4, replication_factor=1, config={"cleanup.policy": "delete"})
    for made in admin.create_topics([topic]).values():
        made.result(30)
    with pytest.raises(TopicError, match=r"topics.changelog\) has cleanup.policy = 'delete', expected 'compact'"):
        ensure_topics(settings, create=True)


def test_two_roles_of_one_name_are_refused() -> None:
    settings = parse('[modalities.a]\n[topics]\nfeedback = "events"\n')
    with pytest.raises(TopicError, match=r"topics.feedback = 'events'.*topics.events"):
        ensure_topics(settings, create=True)


def test_a_dead_letter_of_ten_megabytes_fits(settings: Settings) -> None:
    ensure_topics(settings, create=True)
    errors: list[object] = []
    producer = Producer(producer_config(settings, compression_type="none"))
    producer.produce(
        settings.topics.dead_letters,
        b"x" * 10_000_000,
        b"k",
        on_delivery=lambda error, _: errors.append(error),
    )
    assert producer.flush(30) == 0
    assert errors == [None]


def test_an_absent_broker_is_a_clear_error(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    # Given an address where nobody listens (port 1 is reserved)
    settings = msgspec.structs.replace(parse("[modalities.a]\n"), kafka=Kafka(bootstrap_servers="127.0.0.1:1"))
    # When it is waited for, then the error says who, how long and what to check
    with pytest.raises(BrokerError, match=r"within 0.5 s; last: .*refused.*check that"):
        wait_until_reachable(settings, timeout_s=0.5)
    # And standard error stays clean
    assert capfd.readouterr().err == ""


def test_librdkafkas_messages_reach_pythons_logging(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = msgspec.structs.replace(parse("[modalities.a]\n"), kafka=Kafka(bootstrap_servers="127.0.0.1:1"))
    with caplog.at_level(logging.WARNING, logger="stream.kafka"):
        producer = Producer(producer_config(settings))
        for _ in range(200):
            producer.poll(0.05)
            if any("refused" in record.getMessage() for record in caplog.records):
                break
        with pytest.raises(KafkaException):
            producer.list_topics(timeout=0.2)
    assert any("refused" in record.getMessage() for record in caplog.records)
    assert capfd.readouterr().err == ""


def test_more_settings_reach_the_client_under_librdkafkas_names() -> None:
    settings = parse("[modalities.a]\n")
    config = client_config(settings, group_id="g", fetch_wait_max_ms=10)
    assert config["group.id"] == "g"
    assert config["fetch.wait.max.ms"] == 10
    assert producer_config(settings, compression_type="none")["compression.type"] == "none"
    assert producer_config(settings)["partitioner"] == "murmur2_random"
    assert producer_config(settings)["enable.idempotence"] is True


def test_the_end_of_a_log_is_after_its_last_record(settings: Settings) -> None:
    # Given a partition with one batch of records, and one without any
    ensure_topics(settings, create=True)
    producer = Producer(producer_config(settings, linger_ms=100))
    for i in range(40):
        producer.produce(settings.topics.events, key=b"k", value=str(i).encode(), partition=1)
    assert producer.flush(30) == 0
    # When their ends are asked for, then they are exact
    assert log_ends(settings, settings.topics.events, 1) == (0, 40)
    assert log_ends(settings, settings.topics.events, 0) == (0, 0)


def test_the_range_of_a_log_is_waited_for_while_its_partition_has_no_leader(settings: Settings) -> None:
    # Given a topic that is not there yet
    consumer = Consumer(client_config(settings, group_id="range"))
    found: list[tuple[int, int]] = []
    reader = threading.Thread(target=lambda: found.append(log_range(consumer, settings.topics.events, 1)))
    with pytest.raises(KafkaException):
        log_range(consumer, settings.topics.events, 1, timeout_s=0.5)
    # When it is made while its range is asked for, then that is found
    reader.start()
    ensure_topics(settings, create=True)
    reader.join(60)
    consumer.close()
    assert found == [(0, 0)]
