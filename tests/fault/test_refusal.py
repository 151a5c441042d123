"""A topic that refuses what a worker writes stops the worker, and nothing is lost once it is repaired."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from stream.broker import Broker
from stream.kafka import ensure_topics
from stream.wire import encode_event
from tests.fault.play import finish
from tests.fault.site import Site
from tests.fault.source import Publisher, Record, Source
from tests.fault.verifier import verify
from tests.support.processes import wait_for


def _limit(site: Site, topic: str, size: int) -> None:
    admin = AdminClient({"bootstrap.servers": site.settings.kafka.bootstrap_servers})
    entry = ConfigEntry("max.message.bytes", str(size), incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
    for answer in admin.incremental_alter_configs([resource]).values():
        answer.result(30)


def _delete(site: Site, topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": site.settings.kafka.bootstrap_servers})
    for answer in admin.delete_topics([topic], operation_timeout=30).values():
        answer.result(30)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("role", ["embeddings", "dead_letters"])
def test_a_topic_that_refuses_stops_the_worker_and_loses_nothing(
    apache_broker: Broker, new_site: Callable[..., Site], role: Literal["embeddings", "dead_letters"]
) -> None:
    # Given a worker that has applied events, bad ones among them
    site = new_site(apache_broker)
    topic = getattr(site.settings.topics, role)
    publisher = Publisher(site.settings, Source(3), 0.0)
    worker = site.worker("a")
    worker.start()
    publisher.publish(1000)
    site.await_ready()
    site.await_applied()
    # When a topic it writes to refuses records, and more events come
    _limit(site, topic, 100)
    publisher.publish(1000)
    publisher.send(Record(b"long", b"\xc1" * 1000))
    publisher.send(Record(b"good", encode_event("good", 1_600_000_000_000, "pay", {"amount": 1.0, "merchant": "x"})))
    publisher.flush()
    # Then it ends, not with 0, and names the topic
    assert worker.process.process.wait(60) == 3
    message = worker.process.text().splitlines()[-1]
    assert repr(topic) in message
    # And once the topic is repaired and the worker started again, nothing is missing anywhere
    _limit(site, topic, 10_000_000)
    publisher.publish(500)
    worker.start()
    finish(site)
    report = verify(site, aborted_are_hidden=True)
    assert not report.problems
    assert report.events + report.bad_records == publisher.published


@pytest.mark.timeout(240)
def test_a_deleted_dead_letters_topic_stops_the_worker_and_loses_nothing(
    apache_broker: Broker, new_site: Callable[..., Site]
) -> None:
    # Given a worker whose dead-letters topic is deleted before anything was written to it
    site = new_site(apache_broker)
    publisher = Publisher(site.settings, Source(4, bad=0.0), 0.0)
    worker = site.worker("a")
    worker.start()
    publisher.publish(500)
    site.await_ready()
    site.await_applied()
    topic = site.settings.topics.dead_letters
    _delete(site, topic)
    # When a record belongs there
    publisher.send(Record(b"a", b"\xc1"))
    publisher.publish(500)
    # Then the worker ends, not with 0, and names the topic
    assert worker.process.process.wait(120) == 3
    wait_for(lambda: repr(topic) in worker.process.text(), 5, "the topic is named")
    # And once it is there again, the record is in it and no event is missing
    ensure_topics(site.settings, create=True)
    worker.start()
    finish(site)
    report = verify(site, aborted_are_hidden=True)
    assert not report.problems
    assert report.dead_letters >= 1
