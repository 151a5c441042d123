"""The store's benches run and tell what they promise; no figure is judged here."""

from __future__ import annotations

import json

import pytest

from tests.bench import growth, store


def test_the_store_bench_tells_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    store.main(["--rows", "20000"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("finds", "upserts", "inserts", "finds_from_bytes", "observes", "dict_finds", "rocksdb_finds"):
        assert figures[f"{name}_per_s"] > 0, name
    assert figures["overhead_bytes_per_row"] > 0
    assert figures["reuse_ratio"] > 0
    assert 0 <= figures["sketch_early_share"] <= figures["sketch_early_share_at_twice_the_load"] < 1


def test_the_growth_bench_tells_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rows", "20000", "--memory-rows", "2000", "--sweep-rows", "4000", "--batches", "6", "--warm-up", "6"]
    growth.main(sizes)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("in_memory_per_s", "tiered_per_s", "ratio", "database_bytes", "copies_bytes"):
        assert figures[name] > 0, name
    for tier in ("memory", "tiered"):
        assert figures[f"sweep_{tier}_slices"] > 0
        assert figures[f"sweep_{tier}_slice_ms_max"] >= figures[f"sweep_{tier}_slice_ms_median"] > 0
