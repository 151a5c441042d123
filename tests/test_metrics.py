"""Metrics: their names and labels, what they read when Prometheus asks, and that no process counts for another."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from stream.metrics import LABELS, DiskCollector, ProcessMetrics, TrainerMetrics, WorkerMetrics
from stream.store import EmbeddingStore, StoreOptions
from tests.support.processes import ROOT
from tests.support.reference import label_names
from trainer.monitoring import Health, Monitoring

KINDS = (WorkerMetrics, TrainerMetrics)


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_labels_follow_the_rules(kind: type[ProcessMetrics]) -> None:
    metrics = kind()
    labels = label_names(metrics)
    assert labels
    for family in metrics.registry.collect():
        assert family.name.startswith(("livestate_", "process_"))
        assert family.documentation
        assert not family.name.endswith(("_total", "_count", "_sum", "_bucket", "_ms", "_percent"))
        if family.name.startswith("livestate_"):
            assert set(labels[family.name]) <= set(LABELS), f"{family.name}: say in LABELS where its labels come from"


def test_every_label_is_used() -> None:
    used = {label for kind in KINDS for labels in label_names(kind()).values() for label in labels}
    assert used == set(LABELS)


def _value(metrics: ProcessMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_disk_is_told_where_there_is_a_data_directory(tmp_path: Path) -> None:
    # Given metrics without a directory, then with one that is not there yet
    metrics = WorkerMetrics()
    assert _value(metrics, "livestate_disk_free_bytes") is None
    metrics.data_dir.path = tmp_path / "data"
    assert _value(metrics, "livestate_disk_used_bytes") is None
    # When it holds files
    (tmp_path / "data" / "deeper").mkdir(parents=True)
    (tmp_path / "data" / "deeper" / "file").write_bytes(os.urandom(3_000_000))
    # Then they are told, and the room around them
    used = _value(metrics, "livestate_disk_used_bytes")
    assert used is not None
    assert 3_000_000 <= used < 3_200_000
    free, size = _value(metrics, "livestate_disk_free_bytes"), _value(metrics, "livestate_disk_size_bytes")
    assert free is not None
    assert size is not None
    assert 0 < free < size


def test_a_directory_is_walked_no_more_often_than_said(tmp_path: Path) -> None:
    now = [100.0]
    disk = DiskCollector(every_s=15.0, clock=lambda: now[0])
    disk.path = tmp_path

    def used() -> float:
        (family,) = [family for family in disk.collect() if family.name == "livestate_disk_used_bytes"]
        return family.samples[0].value

    assert used() == 0
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    now[0] += 14.0
    assert used() == 0
    now[0] += 1.0
    assert used() >= 100_000


def test_micro_batches_are_counted_as_a_histogram_would() -> None:
    # Given micro-batches on, between and beyond the bounds of buckets
    metrics, wanted = WorkerMetrics(), CollectorRegistry()
    bounds = (1, 4, 16, 64, 256, 1024, 4096, 16384)
    reference = Histogram("livestate_batch_events", "Records in a micro-batch.", registry=wanted, buckets=bounds)
    for records in (1, 2, 4, 5, 100, 16384, 16385, 10**6):
        metrics.batches.count(2, records, records, 1, 1, seconds=0.01, age_s=-1.0, lag=records)
        reference.observe(records)
    # Then buckets, count and sum are those of the client library
    for sample in next(iter(wanted.collect())).samples:
        if not sample.name.endswith("_created"):
            assert _value(metrics, sample.name, **sample.labels) == sample.value
    assert _value(metrics, "livestate_events_applied_total") == 1_032_881
    assert _value(metrics, "livestate_events_replayed_total") == 8
    assert _value(metrics, "livestate_event_to_state_seconds_sum") == 0
    assert _value(metrics, "livestate_lag_events", partition="2") == 10**6


def test_stores_are_read_when_asked() -> None:
    # Given a partition whose store has two rows, one of them expired
    metrics = WorkerMetrics()
    with EmbeddingStore.open(None, StoreOptions(width=4, ttl_ms=1_000)) as store:
        store.upsert([b"a", b"b"], np.zeros((2, 4), np.float32), 1_000, 0)
        metrics.stores.read = lambda: [(3, store.stats)]
        assert _value(metrics, "livestate_rows", partition="3", tier="all") == 2
        assert _value(metrics, "livestate_rows_admitted_total", partition="3") == 2
        # When time goes by, and the rows are looked for again
        with store.update([b"c"], now_ms=6_000) as slots:
            store.last_event_ms[slots] = 6_000
        store.flush()
        found = store.lookup([b"a", b"b", b"c"]).found
        assert found.tolist() == [False, False, True]
        # Then the next question finds it
        assert _value(metrics, "livestate_rows_admitted_total", partition="3") == 3
        assert _value(metrics, "livestate_rows", partition="3", tier="all") == store.stats.rows
        assert _value(metrics, "livestate_rows_ended_total", partition="3", cause="age") == store.stats.expired
        assert _value(metrics, "livestate_rows_ended_total", partition="3", cause="cap") == 0
    # And a partition that went away is told no more
    metrics.stores.read = tuple
    assert _value(metrics, "livestate_rows", partition="3", tier="all") is None


def test_the_trainer_says_whether_it_is_ready_and_what_it_was_asked() -> None:
    metrics, health = TrainerMetrics(), Health()
    with Monitoring("127.0.0.1", 0, metrics, health) as monitoring:
        assert _value(metrics, "livestate_ready") == 0
        health.ready = True
        assert _value(metrics, "livestate_ready") == 1
        for path in ("/readyz", "/a", "/b?c"):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{monitoring.port}{path}", timeout=10).close()
            except urllib.error.HTTPError as error:
                error.close()
    # Paths from outside are no label
    assert _value(metrics, "livestate_http_requests_total", route="/readyz", status="200") == 1
    assert _value(metrics, "livestate_http_requests_total", route="other", status="404") == 2


def test_threads_count_together() -> None:
    metrics = WorkerMetrics()

    def count() -> None:
        for _ in range(2_000):
            metrics.rebalances.inc()
            metrics.http.answered("/v1/status", 200, 0.01)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _value(metrics, "livestate_rebalances_total") == 8_000
    assert _value(metrics, "livestate_http_requests_total", route="/v1/status", status="200") == 8_000


def test_processes_count_for_themselves(tmp_path: Path) -> None:
    # Given two processes at a time, in an environment for programs that share their counts
    program = (
        "import sys; from prometheus_client import generate_latest; from stream.metrics import WorkerMetrics\n"
        "metrics = WorkerMetrics(); metrics.rebalances.inc(int(sys.argv[1])); print('counted', flush=True); input()\n"
        "print(generate_latest(metrics.registry).decode())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(events)], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for events in (3, 4)
    ]  # fmt: skip
    # When both have counted
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "counted\n"
    # Then each tells its own
    for process, events in zip(processes, (3, 4), strict=True):
        text, _ = process.communicate("\n", timeout=60)
        assert f"\nlivestate_rebalances_total {events}.0\n" in text


def test_what_is_told_grows_with_partitions_only() -> None:
    # Given a worker that is asked for paths nobody knows, and has refused records
    metrics = WorkerMetrics()
    metrics.http.answered("other", 404, 0.001)
    before = len(generate_latest(metrics.registry))
    for _ in range(1_000):
        metrics.http.answered("other", 404, 0.001)
    # Then it tells no more than before, but for digits
    assert len(generate_latest(metrics.registry)) < before + 200
