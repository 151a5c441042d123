"""How much memory, disk and processor a number of clients and a rate of events take, from figures of the other benches.

    python -m tests.bench.sizing SETTINGS --clients N --rate EVENTS --events-per-s F --overhead-bytes F \\
        --restore-rows-per-s F --base-bytes F [--headroom 2] [--workers N]

The width of a row is that of the settings. `events-per-s` is what one core of a worker takes (tests.bench.throughput),
`overhead-bytes` a row's memory beyond its vector (tests.bench.store), `restore-rows-per-s` what a worker restores
(tests.bench.restore), `base-bytes` the memory of a worker without clients. The last line is JSON.

Formulas. cores = headroom x rate / events-per-s. memory = workers x base + clients x (4 x width + overhead).
disk = 2 x clients x (4 x width + 32 + key): the row with its three counters and its head, twice, as a compaction writes
the new file beside the old one; the changelog topic takes as much in Kafka, for each of its copies. restore = clients
of a worker / rows a second. A worker with less memory than that keeps the rows used last (`store.memory_rows`).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from stream.model.layout import Layout
from stream.settings import load
from stream.wire import Schema

__all__ = ["main"]

_ROW_HEAD_BYTES = 32


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Compute, print, and return the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--clients", type=float, required=True)
    parser.add_argument("--rate", type=float, required=True, help="events a second")
    parser.add_argument("--events-per-s", type=float, required=True)
    parser.add_argument("--overhead-bytes", type=float, required=True)
    parser.add_argument("--restore-rows-per-s", type=float, required=True)
    parser.add_argument("--base-bytes", type=float, required=True)
    parser.add_argument("--key-bytes", type=float, default=16)
    parser.add_argument("--headroom", type=float, default=2.0, help="times the mean rate that has to be borne")
    parser.add_argument("--workers", type=int, help="default: a core each")
    options = parser.parse_args(arguments)
    settings = load(options.settings, {})
    width = Layout.compile(settings, Schema.compile(settings)).width
    cores = max(1, math.ceil(options.headroom * options.rate / options.events_per_s))
    workers = options.workers or cores
    row = 4 * width + options.overhead_bytes
    stored = 4 * width + _ROW_HEAD_BYTES + options.key_bytes
    figures = {
        "row_floats": width,
        "cores": cores,
        "workers": workers,
        "memory_gb": round((workers * options.base_bytes + options.clients * row) / 1e9, 2),
        "disk_gb": round(2 * options.clients * stored / 1e9, 2),
        "changelog_gb_a_copy": round(2 * options.clients * stored / 1e9, 2),
        "restore_s": round(options.clients / workers / options.restore_rows_per_s, 1),
    }
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()
