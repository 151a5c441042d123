"""The benches run and tell what they promise; no figure is judged here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stream.cli import EXAMPLE
from stream.model.engine import Engine
from stream.model.layout import Layout
from stream.settings import load, parse
from stream.wire import EventDecoder, RecordBlock, Schema, decode_embedding
from tests.bench import (
    freshness,
    http,
    labels,
    latency,
    memory,
    metrics,
    parameters,
    publish,
    restore,
    sizing,
    throughput,
    trainer,
)
from tests.bench.support.stock import Step
from tests.bench.support.workload import EPOCH_MS, Workload, random_parameters, settings_text
from tests.support.truth import PlainRows
from trainer.files import save_parameters
from trainer.pretrain import random_trunk


def _block(workload: Workload, events: int) -> tuple[RecordBlock, list[bytes], list[bytes]]:
    keys, values, _ = next(workload.chunks(events, 4))
    return RecordBlock.from_lists(keys, values, np.arange(events), np.full(events, EPOCH_MS + 10**6)), keys, values


@pytest.mark.parametrize("zipf", [False, True])
def test_the_workloads_records_are_105_bytes_and_accepted_by_the_decoder(zipf: bool) -> None:
    # Given records of the workload
    settings = parse(settings_text(128))
    workload = Workload(zipf=zipf)
    block, keys, values = _block(workload, 5_000)
    # When they are decoded
    columns = EventDecoder(Schema.compile(settings), settings.limits, "msgpack").decode(block)
    # Then all are events of six fields, and Zipf's law gives a fifth of them to one client
    assert columns.accepted.all()
    assert {len(value) for value in values} == {105} == {workload.record_bytes}
    assert np.isfinite(columns.numbers).all()
    assert (columns.category_length > 0).all()
    most = max(keys.count(key) for key in set(keys[:50]))
    assert most > 700 if zipf else most < 20


def test_the_stock_agent_does_the_same_work_as_the_engine() -> None:
    # Given events of few clients
    settings = parse(settings_text(), {"LIVESTATE_MODEL__HIDDEN": "16"})
    layout = Layout.compile(settings, Schema.compile(settings))
    parameters = random_parameters(layout)
    block, keys, values = _block(Workload(clients=100_000, zipf=True), 300)
    # When the engine takes them as a batch and the stock step one at a time
    columns = EventDecoder(layout.schema, settings.limits, "msgpack").decode(block)
    slot_of = {key: slot for slot, key in enumerate(dict.fromkeys(keys))}
    rows = PlainRows(len(slot_of), layout.width)
    Engine(layout, parameters).advance(columns, np.array([slot_of[key] for key in keys]), rows)
    step, states, embeddings = Step(layout, parameters), {}, {}
    for offset, (key, value) in enumerate(zip(keys, values, strict=True)):
        states[key], embeddings[key] = step(key, value, offset, states.get(key))
    # Then both have the same states, up to rounding
    for key, slot in slot_of.items():
        embedding = decode_embedding(embeddings[key])
        np.testing.assert_allclose(embedding.vector, rows.vectors[slot], atol=1e-5)
        assert embedding.events_seen == rows.events_seen[slot]
        assert embedding.offset == rows.applied_offset[slot]
        assert embedding.timestamp_ms == rows.last_event_ms[slot]


@pytest.mark.timeout(240)
def test_throughput_measures_worker_stock_agent_and_parts_in_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    # Given tiny sizes on the embedded broker
    arguments = ["--broker", "embedded", "--seconds", "1", "--checkpoint-interval", "0.5", "--events", "2000000"]
    # When the bench runs
    throughput.main([*arguments, "--clients", "2000", "--stock-seconds", "1"])
    # Then its last line is JSON with every figure it promises
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("events_per_s", "stock_events_per_s", "ratio_to_stock", "limit_events_per_s", "share_of_limit"):
        assert result[name] > 0, name
    assert set(result["parts"]) == {"consume", "decode", "gru", "embeddings", "changelog"}
    assert all(speed > 0 for speed in result["parts"].values())
    assert result["worker"]["checkpoint_rounds"] >= 1


def test_the_http_bench_tells_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    http.main(["--seconds", "0.3", "--clients", "2000", "--connections", "2"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    for kind in ("worker", "bare"):
        for name in ("one", "of_100"):
            assert figures[f"{kind}_{name}_per_s"] > 0
            assert figures[f"{kind}_{name}_p99_ms"] >= figures[f"{kind}_{name}_p50_ms"] > 0


def test_the_memory_bench_tells_what_about_200_floats_cost(capsys: pytest.CaptureFixture[str]) -> None:
    memory.main(["--seconds", "0.1", "--clients", "2000", "--batch", "200"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 180 <= figures["memory_floats"] <= 220
    assert figures["batches"] > 0
    assert figures["with_memory_us_per_event"] > figures["without_memory_us_per_event"] > 0


def test_the_restore_bench_restores_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    restore.main(["--rows", "3000", "--broker", "embedded", "--hidden", "8"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("rows_per_s", "ready_s", "ready_kept_s"):
        assert figures[name] > 0


def test_the_bench_of_parameters_ends_with_the_same_table(capsys: pytest.CaptureFixture[str]) -> None:
    parameters.main(["--rows", "500", "--touched", "50", "--versions", "3", "--broker", "embedded"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["late_start_rows_per_s"] > 0
    assert figures["served_p99_ms"] >= figures["settle_p99_ms"] > 0


def test_the_freshness_bench_finds_all_feedback_served(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--seconds", "1", "--warm-up", "2", "--rate", "400", "--feedback", "50", "--clients", "2000"]
    freshness.main([*sizes, "--delay", "0.3", "--broker", "embedded", "--hidden", "8"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["feedback_counted"] > 10
    assert figures["max_s"] >= figures["p99_s"] >= figures["p50_s"] > 0
    # And no version has feedback before it was published.
    assert figures["to_version_p50_s"] > 0


def test_the_trainer_bench_reads_and_learns_everything(capsys: pytest.CaptureFixture[str]) -> None:
    trainer.main(["--seconds", "0.2", "--broker", "embedded"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["events"] > 10_000
    for name in ("events_per_s", "events_per_cpu_s", "examples_per_s", "examples_per_cpu_s", "paced_events_per_s"):
        assert figures[name] > 0, name


def test_the_publish_bench_tells_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    publish.main(["--rows", "3000", "--broker", "embedded"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    for written_as in ("parquet", "csv", "jsonl"):
        for name in ("rows_per_s", "rows_per_cpu_s", "peak_bytes"):
            assert figures[f"{written_as}_{name}"] > 0


def test_the_bench_of_labels_compares_the_ways_on_the_same_predictions(tmp_path: Path) -> None:
    # Given the first weeks of the year, and a trunk that was not trained
    settings = load(labels.SHOP, {})
    save_parameters(tmp_path / "trunk", random_trunk(settings, []))
    # When three ways of learning labels are compared on its first campaigns
    result = labels.main(["--days", "45", "--judged-from", "0", "--trunk", str(tmp_path / "trunk")])
    # Then all of them served the same predictions, and learned more the less they waited
    assert result["predictions"] > 20
    assert result["closed"]["early"] == 0
    assert result["as_they_come"]["learned"] > result["closed"]["learned"]
    assert len(result["final"]["auc_gain"]) == 3


@pytest.mark.timeout(240)
def test_the_latency_bench_tells_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    latency.main(["--seconds", "1", "--warm-up", "1", "--rate", "2000", "--broker", "embedded", "--hidden", "8"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    for stretch in ("", "swaps_", "sweeps_", "echo_"):
        assert figures[f"{stretch}p999_ms"] >= figures[f"{stretch}p99_ms"] >= figures[f"{stretch}p50_ms"] > 0
    assert figures["ratio_p99"] > 0
    # And what it is to show happened
    assert figures["version_served"] > 1
    assert figures["rows_swept"] > 0


def test_the_metrics_bench_tells_their_share(capsys: pytest.CaptureFixture[str]) -> None:
    metrics.main(["--seconds", "0.1", "--clients", "1000"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    for size in (100, 1_000, 8_192):
        assert 0 < figures[f"share_of_{size}"] < 1
    assert figures["answer_ms"] > 0


def test_sizes_follow_from_figures() -> None:
    # Given ten million clients at a rate that one core bears six times
    given = ["--clients", "1e7", "--rate", "30000", "--events-per-s", "180000", "--overhead-bytes", "60"]
    more = ["--restore-rows-per-s", "200000", "--base-bytes", "500e6"]
    # When the sizes are computed for rows of the example
    figures = sizing.main([str(EXAMPLE), *given, *more])
    # Then they are those of the formulas
    assert figures["cores"] == figures["workers"] == 1
    assert figures["memory_gb"] == round((500e6 + 1e7 * (4 * figures["row_floats"] + 60)) / 1e9, 2)
    assert figures["restore_s"] == 50.0
    # And twice as many workers restore in half the time
    assert sizing.main([str(EXAMPLE), *given, *more, "--workers", "2"])["restore_s"] == 25.0
