"""What a worker publishes, on real brokers: everything arrives, in order, once, or the worker is told."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from confluent_kafka import Consumer, KafkaError, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from stream import batch_producer
from stream.batch_producer import BatchProducer, ProducerLimits, asyncio_client_config
from stream.broker import ApacheBroker, Broker, EmbeddedBroker
from stream.errors import BrokerError, Fenced
from stream.kafka import client_config
from stream.outputs import Outputs
from stream.settings import Settings
from stream.store import PackedKeys
from stream.wire import EmbeddingEncoder, PackedValues, RecordBlock, Rejected, decode_embedding
from stream.wire.record_batch import Codec
from tests.broker.conftest import settings_for
from tests.support.brokers import require_apache

pytestmark = pytest.mark.timeout(180)

Read = list[tuple[bytes, bytes | None, int, int]]


def fresh_settings(broker: Broker, codec: str = "lz4", partitions: int = 3) -> Settings:
    """Settings whose topics nobody else uses."""
    settings = settings_for(broker, prefix=f"{uuid.uuid4().hex[:8]}-", partitions=partitions)
    kafka = msgspec.structs.replace(settings.kafka, compression=codec)
    worker = msgspec.structs.replace(settings.worker, stop_timeout_s=30.0)
    return msgspec.structs.replace(settings, kafka=kafka, worker=worker)


def make_topic(settings: Settings, name: str, partitions: int, **config: str) -> None:
    admin = AdminClient(client_config(settings))
    admin.create_topics([NewTopic(name, partitions, config={k.replace("_", "."): v for k, v in config.items()})])[
        name
    ].result(30)


def read(settings: Settings, topic: str, partition: int) -> Read:
    """(key, value, offset, timestamp) of every record of a partition."""
    consumer = Consumer(client_config(settings, group_id=f"read-{uuid.uuid4().hex}", enable_partition_eof=True))
    consumer.assign([TopicPartition(topic, partition, 0)])
    found: Read = []
    try:
        while True:
            for message in consumer.consume(5000, timeout=0.1):
                error = message.error()
                if error is None:
                    found.append((message.key(), message.value(), message.offset(), message.timestamp()[1]))
                elif error.code() == KafkaError._PARTITION_EOF:
                    return found
                else:
                    raise AssertionError(error.str())
    finally:
        consumer.close()


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def records(first: int, n: int, size: int = 40) -> tuple[list[bytes], list[bytes]]:
    numbers = range(first, first + n)
    return [b"c%d" % (i % 97) for i in numbers], [b"%d " % i + b"v" * size for i in numbers]


@contextmanager
def opened(settings: Settings, limits: ProducerLimits | None = None, partitions: int = 1) -> Iterator[Outputs]:
    outputs = Outputs(settings, limits)
    try:
        for partition in range(partitions):
            outputs.begin(partition)
        yield outputs
    finally:
        outputs.close()


@contextmanager
def producing(
    settings: Settings, limits: ProducerLimits | None = None, partitions: Sequence[int] = (0,)
) -> Iterator[BatchProducer]:
    producer = BatchProducer(
        asyncio_client_config(settings), settings.topics.embeddings, settings.kafka.compression, "test", limits
    )
    try:
        for partition in partitions:
            producer.begin(partition)
        yield producer
    finally:
        producer.close()


def send(producer: BatchProducer, partition: int, keys: list[bytes], values: list[bytes] | None) -> None:
    packed = None if values is None else PackedValues.from_list(values)
    producer.send(partition, PackedKeys.from_list(keys), packed)


@pytest.fixture
def own_apache(tmp_path: Path) -> Iterator[Broker]:
    """An Apache Kafka node that a test may stop and kill."""
    with ApacheBroker(require_apache(), tmp_path / "broker") as broker:
        yield broker


@pytest.mark.parametrize("codec", get_args(Codec))
def test_what_is_flushed_can_be_read_in_order(broker: Broker, codec: str) -> None:
    # Given embeddings and tombstones of several partitions, in micro-batches of very different sizes
    settings = fresh_settings(broker, codec)
    make_topic(settings, settings.topics.embeddings, 3)
    expected: dict[int, list[tuple[bytes, bytes | None]]] = {0: [], 1: [], 2: []}
    before_ms = int(time.time() * 1000)
    # When they are handed over and flushed
    with opened(settings, partitions=3) as outputs:
        at = 0
        for step, n in enumerate([1, 5000, 3, 700, 0, 40, 9000, 2]):
            keys, values = records(at, n, size=250)
            outputs.embeddings(step % 3, PackedKeys.from_list(keys), PackedValues.from_list(values))
            expected[step % 3] += zip(keys, values, strict=True)
            at += n
            gone = [b"gone-%d" % step]
            outputs.tombstones(step % 3, PackedKeys.from_list(gone))
            expected[step % 3].append((gone[0], None))
        outputs.flush()
    # Then another client reads each partition in that order, without holes, stamped with the time of the call
    after_ms = int(time.time() * 1000)
    for partition, rows in expected.items():
        found = read(settings, settings.topics.embeddings, partition)
        assert [(key, value) for key, value, _, _ in found] == rows
        assert [offset for _, _, offset, _ in found] == list(range(len(rows)))
        assert all(before_ms <= at <= after_ms for *_, at in found)


@pytest.mark.parametrize("written_as", ["msgpack", "json"])
def test_embeddings_are_read_as_they_were_encoded(broker: Broker, written_as: Any) -> None:
    settings = fresh_settings(broker)
    make_topic(settings, settings.topics.embeddings, 1)
    vectors = np.random.default_rng(1).standard_normal((500, 64), dtype=np.float32)
    keys = PackedKeys.from_list([b"client-%d" % i for i in range(500)])
    encoded = EmbeddingEncoder(64, ["churn"], written_as).encode(
        keys, np.arange(500), np.arange(500), 3, np.ones(500, np.int64), vectors, np.full((500, 1), 0.5, np.float32)
    )
    with opened(settings) as outputs:
        outputs.embeddings(0, keys, encoded)
        outputs.flush()
    found = read(settings, settings.topics.embeddings, 0)
    assert [value for _, value, *_ in found] == list(encoded)
    assert (found[0][1] or b"").startswith(b"{") == (written_as == "json")
    for row, (_, value, *_) in enumerate(found):
        assert decode_embedding(value or b"").vector.tobytes() == vectors[row].tobytes()


def test_dead_letters_carry_the_original_and_the_reason(broker: Broker) -> None:
    settings = fresh_settings(broker)
    make_topic(settings, settings.topics.dead_letters, 1)
    block = RecordBlock.from_lists([b"k"], [b"no event"], [17], [10**12])
    with opened(settings) as outputs:
        outputs.dead_letters(2, block, [Rejected(0, "not_a_map", "a map was expected")])
        outputs.flush()
    ((key, value, *_),) = read(settings, settings.topics.dead_letters, 0)
    assert (key, value) == (b"k", b"no event")


def test_flush_waits_only_for_what_came_before_it(broker: Broker) -> None:
    # Given a thread that flushes while another one goes on handing over
    settings = fresh_settings(broker)
    make_topic(settings, settings.topics.embeddings, 1)
    stop, flushed = threading.Event(), 0
    # And little room for what is not confirmed, so that the backlog stays small
    with producing(settings, ProducerLimits(unconfirmed_bytes=200_000)) as producer:

        def go_on() -> None:
            at = 0
            while not stop.is_set():
                send(producer, 0, *records(at, 50))
                at += 50

        busy = threading.Thread(target=go_on)
        busy.start()
        try:
            # When it flushes again and again, then every flush ends
            for _ in range(20):
                producer.flush(20.0)
                flushed += 1
        finally:
            stop.set()
            busy.join()
        producer.flush(60.0)
        assert producer.unconfirmed_bytes == 0
    assert flushed == 20
    found = read(settings, settings.topics.embeddings, 0)
    assert [int((value or b"").split()[0]) for _, value, *_ in found] == list(range(len(found)))


def test_what_is_hastened_does_not_wait_for_more(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a producer that would wait for an hour for more to send together
    settings = fresh_settings(broker)
    make_topic(settings, settings.topics.embeddings, 3)
    expected: list[list[bytes]] = [[], [], []]
    with producing(settings, partitions=range(3)) as producer:
        monkeypatch.setattr(batch_producer, "_LINGER_S", 3600.0)
        for first in range(0, 400, 4):
            # When records of several partitions are handed over, also while others are under way, and hastened
            for partition in range(3):
                keys, values = records(first, 4)
                send(producer, partition, keys, values)
                expected[partition] += values
            producer.hasten()
            # Then they are confirmed
            if first % 40 == 0:
                producer.flush(30.0)
        producer.flush(30.0)
    # And they are in order
    for partition in range(3):
        assert [value for _, value, _, _ in read(settings, settings.topics.embeddings, partition)] == expected[
            partition
        ]


def test_a_refused_batch_stops_everything_after_it(apache_broker: Broker) -> None:
    # Given a topic that takes small records only
    settings = fresh_settings(apache_broker, "none")
    make_topic(settings, settings.topics.embeddings, 1, max_message_bytes="2000")
    with opened(settings) as outputs:
        keys, values = records(0, 3)
        outputs.embeddings(0, PackedKeys.from_list(keys), PackedValues.from_list(values))
        outputs.flush()
        assert outputs.failure is None
        # When a larger batch is handed over
        outputs.embeddings(0, PackedKeys.from_list([b"k"]), PackedValues.from_list([b"x" * 5000]))
        # Then flush says so, and nothing can be handed over any more
        with pytest.raises(BrokerError, match="refused a batch of 1 records for partition 0: MessageSizeTooLarge"):
            outputs.flush()
        assert outputs.failure is not None
        with pytest.raises(BrokerError, match="refused"):
            outputs.embeddings(0, PackedKeys.from_list(keys), PackedValues.from_list(values))
        with pytest.raises(BrokerError, match="refused"):
            outputs.tombstones(0, PackedKeys.from_list(keys))
    # And what came before is there
    assert [value for _, value, *_ in read(settings, settings.topics.embeddings, 0)] == values


def test_a_deleted_topic_is_reported(apache_broker: Broker) -> None:
    settings = fresh_settings(apache_broker)
    make_topic(settings, settings.topics.embeddings, 1)
    with producing(settings, ProducerLimits(unknown_topic_s=0.5)) as producer:
        send(producer, 0, *records(0, 10))
        producer.flush(30.0)
        # When the topic goes away under the producer
        admin = AdminClient(client_config(settings))
        admin.delete_topics([settings.topics.embeddings])[settings.topics.embeddings].result(30)
        send(producer, 0, *records(10, 10))
        # Then that is said, and not only that it took long
        with pytest.raises(BrokerError, match=r"has had no partition 0 for 0\.5 s"):
            producer.flush(30.0)


def test_a_partition_that_the_topic_does_not_have_is_reported(broker: Broker) -> None:
    settings = fresh_settings(broker)
    make_topic(settings, settings.topics.embeddings, 1)
    with producing(settings, ProducerLimits(unknown_topic_s=0.5), [5]) as producer:
        send(producer, 5, *records(0, 1))
        with pytest.raises(BrokerError, match="has had no partition 5"):
            producer.flush(30.0)


@pytest.mark.parametrize("kind", [EmbeddedBroker, ApacheBroker])
def test_a_broker_that_is_gone_makes_calls_wait_and_flush_raise(kind: type[Broker], tmp_path: Path) -> None:
    # Given a producer that has been confirmed something
    broker = EmbeddedBroker(tmp_path) if kind is EmbeddedBroker else ApacheBroker(require_apache(), tmp_path)
    limits = ProducerLimits(batch_bytes=20_000, unconfirmed_bytes=100_000, delivery_s=6.0)
    with broker:
        settings = fresh_settings(broker, "none")
        make_topic(settings, settings.topics.embeddings, 1)
        with producing(settings, limits) as producer:
            send(producer, 0, *records(0, 10))
            producer.flush(30.0)
            # When its broker is killed
            broker.kill()
            keys, values = records(0, 500, size=100)
            refusals: list[BrokerError] = []

            def fill() -> None:
                try:
                    while True:
                        send(producer, 0, keys, values)
                except BrokerError as error:
                    refusals.append(error)

            filling = threading.Thread(target=fill)
            filling.start()
            # Then calls wait once the bound is reached, however long one goes on
            wait_until(lambda: producer.unconfirmed_bytes >= 100_000)
            with pytest.raises(BrokerError, match="were not confirmed within 1 s"):
                producer.flush(1.0)
            assert filling.is_alive()
            assert producer.unconfirmed_bytes < 100_000 + 500 * 150
            # And after the time for a delivery the waiting call is told
            filling.join(30.0)
            assert not filling.is_alive()
            assert "did not confirm a batch within 6 s" in str(refusals[0])
            assert producer.unconfirmed_bytes == 0


def test_a_broker_that_was_never_there_makes_begin_raise(free_port: int, tmp_path: Path) -> None:
    settings = fresh_settings(EmbeddedBroker(tmp_path, port=free_port))
    with producing(settings, partitions=[]) as producer:
        with pytest.raises(BrokerError, match="no producer id for partition 0 within 1 s"):
            producer.begin(0, 1.0)
        with pytest.raises(BrokerError, match="no producer id"):
            producer.begin(0, 0.1)


def test_a_restarted_broker_has_everything_once_and_in_order(own_apache: Broker) -> None:
    # Given a producer that goes on while its broker is killed and started again, twice
    settings = fresh_settings(own_apache, partitions=2)
    make_topic(settings, settings.topics.embeddings, 2)
    at = 0
    with producing(settings, ProducerLimits(batch_bytes=10_000, request_s=5.0), [0, 1]) as producer:
        for _ in range(2):
            for _ in range(40):
                for partition in (0, 1):
                    send(producer, partition, *records(at, 100))
                at += 100
            own_apache.kill()
            for partition in (0, 1):
                send(producer, partition, *records(at, 100))
            at += 100
            own_apache.start()
        # When everything is flushed
        producer.flush(120.0)
    # Then it is there, in order, nothing twice
    for partition in (0, 1):
        found = read(settings, settings.topics.embeddings, partition)
        assert [int((value or b"").split()[0]) for _, value, *_ in found] == list(range(at))


def test_a_request_whose_answer_is_late_is_repeated_without_a_duplicate(own_apache: Broker) -> None:
    # Given a broker that stands still for longer than a request may take, with a request in its socket
    settings = fresh_settings(own_apache, partitions=1)
    make_topic(settings, settings.topics.embeddings, 1)
    assert own_apache.pid is not None
    with producing(settings, ProducerLimits(request_s=1.0)) as producer:
        send(producer, 0, *records(0, 10))
        producer.flush(30.0)
        os.kill(own_apache.pid, signal.SIGSTOP)
        try:
            send(producer, 0, *records(10, 10))
            with pytest.raises(BrokerError, match=r"10 records for topic '.*' were not confirmed within 3 s"):
                producer.flush(3.0)
            send(producer, 0, *records(20, 10))
        finally:
            # When it goes on, and finds the request and its repetitions
            os.kill(own_apache.pid, signal.SIGCONT)
        producer.flush(60.0)
    # Then it has written each once
    found = read(settings, settings.topics.embeddings, 0)
    assert [int((value or b"").split()[0]) for _, value, *_ in found] == list(range(30))


def test_a_closed_producer_takes_nothing_more(broker: Broker) -> None:
    settings = fresh_settings(broker)
    make_topic(settings, settings.topics.embeddings, 1)
    with producing(settings) as producer:
        send(producer, 0, *records(0, 10))
        producer.flush(30.0)
        producer.close()
        producer.close()
        assert "batch-producer" not in {thread.name for thread in threading.enumerate()}
        with pytest.raises(BrokerError, match="is closed"):
            send(producer, 0, *records(0, 10))
    assert len(read(settings, settings.topics.embeddings, 0)) == 10


def test_json_embeddings_are_json(broker: Broker) -> None:
    settings = fresh_settings(broker)
    make_topic(settings, settings.topics.embeddings, 1)
    keys = PackedKeys.from_list([b"a"])
    encoded = EmbeddingEncoder(2, [], "json").encode(
        keys, [1], [2], 3, [4], np.array([[0.5, 1.5]], np.float32), np.empty((1, 0), np.float32)
    )
    with opened(settings) as outputs:
        outputs.embeddings(0, keys, encoded)
        outputs.flush()
    ((_, value, *_),) = read(settings, settings.topics.embeddings, 0)
    assert json.loads(value or b"")["vector"] == [0.5, 1.5]


def test_nothing_of_an_earlier_writer_comes_after_a_later_one(broker: Broker) -> None:
    # Given a writer of two partitions
    settings = fresh_settings(broker)
    make_topic(settings, settings.topics.embeddings, 2)
    with producing(settings, partitions=[0, 1]) as first, producing(settings, partitions=[]) as second:
        for partition in (0, 1):
            send(first, partition, [b"k"], [b"1"])
        first.flush(30.0)
        # When another one has begun to write one of them
        second.begin(0)
        send(second, 0, [b"k"], [b"2"])
        second.flush(30.0)
        # Then what the first still has to send there is refused, however often
        for value in (b"3", b"4"):
            send(first, 0, [b"k"], [value])
            with pytest.raises(Fenced, match="another worker writes partition 0 now"):
                first.flush(30.0, 0)
        # And the other partition is still its own
        send(first, 1, [b"k"], [b"5"])
        first.flush(30.0, 1)
        assert first.failure is None
        # And once it owns the partition again, it is the later one
        first.give_up(0)
        with pytest.raises(BrokerError, match="partition 0 is not written from here"):
            send(first, 0, [b"k"], [b"6"])
        first.begin(0)
        send(first, 0, [b"k"], [b"6"])
        first.flush(30.0)
        send(second, 0, [b"k"], [b"7"])
        with pytest.raises(Fenced):
            second.flush(30.0)
    assert [value for _, value, *_ in read(settings, settings.topics.embeddings, 0)] == [b"1", b"2", b"6"]
    assert [value for _, value, *_ in read(settings, settings.topics.embeddings, 1)] == [b"1", b"5"]
