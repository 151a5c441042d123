"""A live worker and trainer under a real Prometheus: what they tell is sound, and every query of deploy/ finds data."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from typing import get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stream.broker import EmbeddedBroker
from stream.metrics import LABELS, OTHER_ROUTE
from stream.openapi import openapi_document
from stream.settings import Settings
from stream.settings.sections import HeadName
from stream.wire import REASONS
from tests.deploy.publisher import Publisher
from tests.deploy.queries import alert_queries, selectors, shown_queries
from tests.deploy.test_monitoring import promtool
from tests.deploy.watched import Watched, run_watched, usable_prometheus
from tests.support.meanwhile import meanwhile
from tests.support.processes import http_get, wait_for
from trainer.joiner import OUTCOMES
from trainer.learner.task import AVERAGE


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """With events, feedback, refused records and questions all the while."""
    if not usable_prometheus():
        pytest.skip("prometheus is not installed (Debian package prometheus)")
    directory = tmp_path_factory.mktemp("watched")
    with EmbeddedBroker(directory / "broker") as broker, run_watched(broker, directory) as running:
        publisher = Publisher(running.settings)

        def use() -> None:
            publisher.publish(300)
            _ask(running.worker_port)

        with meanwhile(use, 0.2):
            yield running


def _ask(port: int) -> None:
    for path in ("/v1/clients/household-1", "/v1/clients/nobody", "/v1/status", "/no/such/path", "/readyz", "/livez"):
        http_get(port, path)
    body = b'{"client_ids": ["household-1", "household-2"]}'
    urllib.request.urlopen(
        urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/clients:batchGet", body, {"Content-Type": "application/json"}
        ),
        timeout=10,
    ).close()


def _expositions(watched: Watched) -> dict[str, str]:
    """What worker and trainer tell, once there were refused records and labels were learned."""
    found: dict[str, str] = {}

    def is_all_there() -> bool:
        found["worker"] = http_get(watched.worker_port, "/metrics")[1]
        found["trainer"] = http_get(watched.trainer_port, "/metrics")[1]
        return "livestate_dead_letters_total{" in found["worker"] and "livestate_prequential_auc{" in found["trainer"]

    wait_for(is_all_there, 120, "worker and trainer have counted everything")
    return found


def test_promtool_finds_no_fault_in_what_they_tell(watched: Watched) -> None:
    for text in _expositions(watched).values():
        done = promtool("check", "metrics", given=text)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_labels_have_values_of_closed_sets_only(watched: Watched) -> None:
    allowed = _allowed(watched.settings)
    for of, text in _expositions(watched).items():
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                for label, value in sample.labels.items():
                    if family.name.startswith("livestate_") and (label, family.type) != ("le", "histogram"):
                        assert value in allowed[label], f"{of}: {sample.name} {label}={value!r}"


def _allowed(settings: Settings) -> dict[str, set[str]]:
    paths = set(openapi_document(settings)["paths"])
    allowed = {
        "cause": {"age", "cap"},
        "head": {AVERAGE, *get_args(HeadName)},
        "label": {"positive", "negative"},
        "outcome": set(OUTCOMES),
        "partition": {str(number) for number in range(settings.topics.partitions)},
        "reason": set(REASONS),
        "route": paths | {"/metrics", "/livez", "/readyz", "/v1/openapi.json", OTHER_ROUTE},
        "status": {str(status.value) for status in HTTPStatus},
        "task": set(settings.tasks),
        "tier": {"memory", "all"},
        "topic": {settings.topics.events, settings.topics.feedback},
    }
    assert set(allowed) == set(LABELS)
    return allowed


def test_every_query_of_boards_and_rules_finds_data(watched: Watched) -> None:
    # Given the queries of all panels and recording rules, and what alerts compare
    wanted = [*shown_queries(), *(one for query in alert_queries() for one in selectors(query))]
    empty = dict.fromkeys(wanted)

    # When Prometheus is asked
    def all_find_data() -> bool:
        for query in list(empty):
            if watched.prometheus.query(query):
                del empty[query]
        return not empty

    # Then each has numbers
    try:
        wait_for(all_find_data, 120, "every query finds data")
    except AssertionError as error:
        raise AssertionError("no data for:\n" + "\n".join(empty)) from error


def test_nothing_alarms_where_all_is_well(watched: Watched) -> None:
    for query in alert_queries():
        watched.prometheus.query(query)
    (group,) = watched.prometheus.get("rules")["groups"]
    assert not [rule["name"] for rule in group["rules"] if rule["health"] == "err"]
    firing = {one["metric"]["alertname"] for one in watched.prometheus.query('ALERTS{alertstate="firing"}')}
    assert firing <= {"LivestateDeadLetters"}


def test_http_is_counted_by_route_and_status(watched: Watched) -> None:
    wait_for(lambda: "/v1/clients:batchGet" in http_get(watched.worker_port, "/metrics")[1], 30, "it was asked")
    text = http_get(watched.worker_port, "/metrics")[1]
    found = set(re.findall(r'http_requests_total\{route="([^"]+)",status="(\d+)"\}', text))
    assert {
        ("/v1/clients/{client_id}", "200"), ("/v1/clients/{client_id}", "404"), ("/v1/clients:batchGet", "200"),
        ("/v1/status", "200"), ("/metrics", "200"), (OTHER_ROUTE, "404"), ("/readyz", "200"),
    } <= found  # fmt: skip
    # And the trainer
    assert http_get(watched.trainer_port, "/nothing")[0] == 404
    text = http_get(watched.trainer_port, "/metrics")[1]
    found = set(re.findall(r'http_requests_total\{route="([^"]+)",status="(\d+)"\}', text))
    assert {("/metrics", "200"), ("/readyz", "200"), (OTHER_ROUTE, "404")} <= found
