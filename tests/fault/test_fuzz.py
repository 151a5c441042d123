"""Tens of thousands of fuzzed records among good ones; `make fuzz` sends a million."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from stream.broker import Broker
from stream.settings import Settings
from stream.wire import EventDecoder, Schema
from tests.fault.fuzz import OVERRIDES, Fuzzer, fuzz
from tests.fault.site import Site
from tests.fault.source import Publisher
from tests.support.settings import small_settings
from tests.support.truth import block_of, read_topic

RECORDS = 32_000


@pytest.mark.timeout(280)
def test_fuzzed_records_never_stop_a_worker_nor_touch_good_events(
    embedded_broker: Broker, new_site: Callable[..., Site]
) -> None:
    # Given a worker
    site = new_site(embedded_broker, **OVERRIDES)
    # When two thirds of what it reads is broken in every way there is
    outcome = fuzz(site, RECORDS, seed=13)
    print(outcome)
    # Then good events are applied exactly, bad ones are dead letters as they came, and memory stays as it was
    assert not outcome.problems
    assert outcome.report.events + outcome.report.bad_records == RECORDS
    assert outcome.report.bad_records > RECORDS / 2
    assert outcome.report.events > RECORDS / 4
    assert outcome.report.clients > 300
    assert outcome.report.dead_letters == outcome.report.bad_records
    assert outcome.report.predictions_missing == 0


def test_the_fuzzer_meets_every_reason(embedded_broker: Broker, new_site: Callable[..., Site]) -> None:
    # Given fuzzed records on a topic
    site = new_site(embedded_broker, TOPICS__PARTITIONS="1")
    Publisher(site.settings, Fuzzer(2), 0.0).publish(4000)
    settings: Settings = small_settings()
    # When they are decoded
    block = block_of(read_topic(site.settings, site.settings.topics.events, 0))
    columns = EventDecoder(Schema.compile(settings), settings.limits, "msgpack").decode(block)
    reasons = Counter(rejected.reason for rejected in columns.rejected)
    # Then they are refused for all the reasons that fuzz can hit
    expected = {
        "undecodable", "too_deep", "invalid_utf8", "not_a_map", "duplicate_field", "missing_field", "unknown_field",
        "wrong_type", "unknown_modality", "out_of_range", "future", "key_mismatch",
    }  # fmt: skip
    assert expected <= set(reasons)
