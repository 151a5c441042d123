"""What rows of category tables cost in the parameter log.

    python -m tests.bench.parameters [--rows 1000000] [--touched 1000] [--versions 40] [--broker apache|embedded]

A publisher writes a table of `--rows` rows in one version, and then versions that touch `--touched` of them at random,
each one as soon as the one before is served, while a reader follows as a worker does. Then another reader starts from
nothing. The last line is JSON: `first_version_s`, the whole table in one transaction; `version_p50_ms`, `_p99_ms`,
until the broker has confirmed; `served_p50_ms`, `_p99_ms`, from the beginning of a publication until the reader has
settled it; `settle_p99_ms` of that in which nothing can be predicted; `late_start_s` and `late_start_rows_per_s`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.model.rows import value_key
from stream.parameter_log import ParameterReader
from tests.bench.support.site import Site, machine, open_site
from tests.support.processes import wait_for
from trainer.publisher import Publisher, TableRows

__all__ = ["main"]

_TABLE = "task.merchant"
_TIMEOUT_S = 600.0


def _rows(numbers: NDArray[np.int64], random: np.random.Generator) -> TableRows:
    values = random.normal(size=len(numbers)).astype(np.float32)
    return TableRows(1, {value_key(b"merchant-%09d" % n): v.tobytes() for n, v in zip(numbers, values, strict=True)})


def _measure(site: Site, options: argparse.Namespace) -> dict[str, float]:
    random = np.random.default_rng(1)
    publisher = Publisher(site.settings, timeout_s=_TIMEOUT_S)
    tensors = {f"head/task/{part}": random.normal(size=200) for part in ("center", "scale", "weight")}
    started = time.perf_counter()
    publisher.publish(tensors, [], 0, {_TABLE: _rows(np.arange(options.rows), random)})
    first_s = time.perf_counter() - started
    reader = ParameterReader(site.settings)
    confirmed_s, served_s, settled_s = [], [], []
    reader.start()
    try:
        wait_for(lambda: reader.staged is not None, _TIMEOUT_S, "the table is read")
        reader.settle()
        for _ in range(options.versions):
            rows = _rows(random.choice(options.rows, options.touched, replace=False), random)
            tensors = {name: tensor + 0.01 for name, tensor in tensors.items()}
            started = time.perf_counter()
            version = publisher.publish(tensors, [], 0, {_TABLE: rows}).version
            confirmed_s.append(time.perf_counter() - started)
            while reader.staged is None or reader.staged[0].version < version:
                time.sleep(0.0005)
            before = time.perf_counter()
            reader.settle()
            settled_s.append(time.perf_counter() - before)
            served_s.append(time.perf_counter() - started)
    finally:
        reader.stop()
        publisher.close()
    assert reader.torn == 0, "a version was not whole"
    late = ParameterReader(site.settings)
    started = time.perf_counter()
    late.start()
    try:
        wait_for(lambda: late.has_caught_up, _TIMEOUT_S, "a late starter has read the log")
        late_s = time.perf_counter() - started
    finally:
        late.stop()
    assert late.staged is not None
    assert late.staged[0].tables[_TABLE].checksum == publisher.current.tables[_TABLE].checksum  # type: ignore[union-attr]
    return {
        "rows": options.rows,
        "touched": options.touched,
        "first_version_s": first_s,
        "version_p50_ms": 1e3 * float(np.median(confirmed_s)),
        "version_p99_ms": 1e3 * float(np.quantile(confirmed_s, 0.99)),
        "served_p50_ms": 1e3 * float(np.median(served_s)),
        "served_p99_ms": 1e3 * float(np.quantile(served_s, 0.99)),
        "settle_p99_ms": 1e3 * float(np.quantile(settled_s, 0.99)),
        "late_start_s": late_s,
        "late_start_rows_per_s": options.rows / late_s,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the bench and return what it prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--touched", type=int, default=1_000, help="rows that change in a version")
    parser.add_argument("--versions", type=int, default=40)
    parser.add_argument("--broker", choices=["auto", "apache", "embedded"], default="auto")
    options = parser.parse_args(arguments)
    with open_site(options.broker) as site:
        print(f"{options.rows:,} rows on {site.broker.name} …", file=sys.stderr, flush=True)
        figures = _measure(site, options)
        broker = site.broker.name
    result = {**figures, "settings": {"broker": broker, "versions": options.versions, "machine": machine()}}
    print(json.dumps({n: float(f"{v:.4g}") if isinstance(v, float) else v for n, v in result.items()}), flush=True)
    return result


if __name__ == "__main__":
    main()
