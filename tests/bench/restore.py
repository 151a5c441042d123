"""How fast a worker is back: from the changelog onto an empty disk, and after SIGKILL with its disk kept.

    python -m tests.bench.restore [--rows N] [--broker apache|embedded]

The changelog is filled by the worker's own writer with rows of distinct clients. `rows_per_s` is over the time from
the first partition's restore beginning to the last one's end; `ready_s` and `ready_kept_s` are from the process's
start to /readyz, and so hold what Python, the consumer group and, after SIGKILL, the dead member's session cost.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from datetime import datetime
from typing import Any

import numpy as np

from stream.changelog import ChangelogWriter, PartitionMeta
from stream.partitioner import partitions_of
from stream.ports import free_port
from stream.store.rows import encode_rows
from tests.bench.support.site import Site, machine, open_site, scrape
from tests.bench.support.workload import EPOCH_MS
from tests.support.processes import Livestate, http_get, wait_for

__all__ = ["main"]

_CHUNK = 20_000
_RESTORED = re.compile(r"^(\S+ \S+) .*partition \d+ restored: (\d+) rows from the changelog in ([\d.]+) s", re.M)


def _fill(site: Site, rows: int) -> None:
    """One checkpoint a partition, of rows such as a worker would have written at the start of the events topic."""
    rng = np.random.default_rng(11)
    topics, width = site.settings.topics, site.layout.width
    digits = max(6, len(str(rows - 1)))
    writers = [ChangelogWriter(site.settings, number) for number in range(topics.partitions)]
    for writer in writers:
        writer.begin()
    for begin in range(0, rows, _CHUNK):
        n = min(_CHUNK, rows - begin)
        account = np.empty((n, 4), np.int64)
        account[:] = (7, EPOCH_MS, 0, 0)
        encoded = encode_rows(account, rng.uniform(-1, 1, (n, width)).astype(np.float32), width)
        keys = [f"c{i:0{digits}d}".encode() for i in range(begin, begin + n)]
        edges = np.arange(n + 1, dtype=np.int64) * (1 + digits)
        where = partitions_of(np.frombuffer(b"".join(keys), np.uint8), edges, topics.partitions)
        for number, writer in enumerate(writers):
            mine = np.flatnonzero(where == number).tolist()
            writer.write([keys[i] for i in mine], [encoded[i] for i in mine])
    for writer in writers:
        writer.commit(PartitionMeta(0, EPOCH_MS, site.parameters.trunk_id, site.layout.fingerprint), 60.0)


def _start(worker: Livestate, port: int) -> float:
    """Seconds from starting the process until it is ready."""
    started = time.perf_counter()
    worker.start()

    def ready() -> bool:
        if worker.process.poll() is not None:
            raise RuntimeError(f"the worker ended: {worker.text()[-2000:]}")
        return http_get(port, "/readyz")[0] == 200

    wait_for(ready, 600, "the worker is ready")
    return time.perf_counter() - started


def _restores(text: str) -> tuple[int, float]:
    """(rows, seconds from the first beginning to the last end) of the restores in a log."""
    rows, begins, ends = 0, [], []
    for stamp, count, seconds in _RESTORED.findall(text):
        end = datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S,%f").timestamp()
        rows += int(count)
        ends.append(end)
        begins.append(end - float(seconds))
    return rows, max(ends) - min(begins)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the bench; prints and returns the result."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.restore")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--broker", choices=["auto", "apache", "embedded"], default="auto")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--partitions", type=int, default=4)
    options = parser.parse_args(arguments)
    overrides = {"LIVESTATE_TOPICS__PARTITIONS": str(options.partitions)}
    with open_site(options.broker, options.hidden, 0, overrides) as site:
        print(f"{options.rows:,} rows into the changelog on {site.broker.name} …", file=sys.stderr, flush=True)
        _fill(site, options.rows)
        site.publish_parameters()
        port = free_port()
        worker = site.worker("0", port)
        try:
            print("onto an empty disk …", file=sys.stderr, flush=True)
            ready_s = _start(worker, port)
            restored = scrape(port)["livestate_restored_rows_total"]
            text = worker.text()
            rows, seconds = _restores(text)
            worker.kill()
            print("after SIGKILL, with the disk kept …", file=sys.stderr, flush=True)
            ready_kept_s = _start(worker, port)
            _, kept_seconds = _restores(worker.text()[len(text) :])
            worker.stop()
        finally:
            worker.kill()
        broker = site.broker.name
    if rows != options.rows or restored != options.rows:
        raise RuntimeError(f"{rows} rows were restored of {options.rows}")
    result = {
        "rows_per_s": rows / seconds,
        "ready_s": ready_s,
        "restore_s": seconds,
        "ready_kept_s": ready_kept_s,
        "restore_kept_s": kept_seconds,
        "settings": {
            "rows": options.rows, "broker": broker, "hidden": options.hidden, "partitions": options.partitions,
            "session_timeout_s": site.settings.kafka.session_timeout_s, "machine": machine(),
        },
    }  # fmt: skip
    print(json.dumps({n: float(f"{v:.4g}") if isinstance(v, float) else v for n, v in result.items()}), flush=True)
    return result


if __name__ == "__main__":
    main()
