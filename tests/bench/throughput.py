"""Durable events a second of one worker process, beside a stock Faust agent and beside the limit of its parts.

    python -m tests.bench.throughput [--seconds N] [--broker apache|embedded] [--hidden 256] [--zipf] …

A topic is filled first; then a worker process applies it, and events are counted from the end of one round of
checkpoints to the end of a later one, so what is counted is in the changelog and in RocksDB, and its embeddings are
confirmed. The stock agent does the same work for each event, on the same broker, topic and core. The limit is
1 / Σ(1 / speed) over consuming, decoding, the GRU at batch size, and producing embeddings and changelog, each alone
in this process. A machine's speed changes within minutes, so the parts are measured in rounds between the runs of
workers and stock agent, and each counts with its median. `--workers 2` adds a run of two workers in one group and
compares events for each second of processor time. The last line is JSON; `python -m tests.bench.throughput --help`
has the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from stream.ports import free_port
from tests.bench.support import parts
from tests.bench.support.site import Site, busy_seconds, cpu_seconds, machine, on_cores, open_site, scrape
from tests.bench.support.workload import Workload
from tests.support.processes import ROOT, wait_for

__all__ = ["main", "measure"]

_EVENTS = "livestate_events_applied_total"
_CHECKPOINTS = "livestate_checkpoints_total"
#: Each look costs the worker a millisecond.
_POLL_S = 0.5
#: Of the parts; at least as many as there are runs to measure them between.
_ROUNDS = 5


@dataclass(frozen=True)
class _Sample:
    """Where the workers are at one time."""

    at: float
    cpu: float
    broker_cpu: float
    core_busy: float
    metrics: dict[str, float]


def _sample(site: Site, ports: list[int], pids: list[int], cores: list[int] | None) -> _Sample:
    total: dict[str, float] = {}
    for port in ports:
        for name, value in _scraped(port).items():
            total[name] = total.get(name, 0.0) + value
    broker = cpu_seconds(site.broker.pid) if site.broker.pid is not None else 0.0
    return _Sample(time.perf_counter(), sum(map(cpu_seconds, pids)), broker, busy_seconds(cores), total)


def _scraped(port: int) -> dict[str, float]:
    # On a busy machine a worker may take longer to answer than one scrape waits.
    for _ in range(12):
        if found := scrape(port):
            return found
    raise RuntimeError(f"the worker on port {port} does not answer")


def measure(site: Site, events: int, workers: int, seconds: float, cores: list[int] | None) -> dict[str, Any]:
    """Start workers on a filled topic, measure a steady window of at least `seconds`, and stop them."""
    site.publish_parameters()
    partitions = site.settings.topics.partitions
    with ExitStack() as stack:
        ports = [free_port() for _ in range(workers)]
        running = [stack.enter_context(site.worker(f"{i}", port)) for i, port in enumerate(ports)]
        pids = [one.process.pid for one in running]

        def serving() -> bool:
            if any(one.process.poll() is not None for one in running):
                raise RuntimeError("a worker ended: " + " | ".join(one.text()[-2000:] for one in running))
            return all(scrape(port).get("livestate_partitions_assigned", 0.0) == partitions / workers for port in ports)

        wait_for(serving, 120.0, f"{workers} workers own {partitions} partitions")
        if cores is not None:
            for pid in pids:
                on_cores(pid, cores)
        site.leave_to_workers(cores)
        first = last = None
        rounds = 0
        while last is None or (first is not None and last.at - first.at < seconds):
            time.sleep(_POLL_S)
            now = _sample(site, ports, pids, cores)
            if now.metrics[_EVENTS] >= events:
                if first is None or last is None or last is first:
                    raise RuntimeError(
                        f"all {events} events were applied before a window of two checkpoint rounds was over: "
                        f"fill in more with --events, or use a shorter --checkpoint-interval"
                    )
                break
            done = int(now.metrics[_CHECKPOINTS]) // partitions
            # The first round covers the start: compiled kernels are loaded, clients are new, caches cold.
            if done > rounds:
                rounds, last = done, now
                first = first or now
        assert first is not None
        codes = [one.stop() for one in running]
    if any(codes):
        raise RuntimeError(f"workers ended with {codes}")

    def gained(name: str) -> float:
        return last.metrics[name] - first.metrics[name]

    wall, cpu, applied = last.at - first.at, last.cpu - first.cpu, gained(_EVENTS)
    batches = gained("livestate_batch_events_count")
    return {
        "events_per_s": applied / wall,
        "events_per_cpu_s": applied / cpu,
        "events": int(applied),
        "window_s": wall,
        "cores_used": cpu / wall,
        "broker_cores_used": (last.broker_cpu - first.broker_cpu) / wall,
        # Other programs, and the broker, on the cores that the worker may use: what it could not have.
        "cores_taken_by_others": (last.core_busy - first.core_busy - cpu) / wall,
        "checkpoint_rounds": gained(_CHECKPOINTS) / partitions,
        "checkpoint_s": gained("livestate_checkpoint_seconds_sum") / max(1.0, gained(_CHECKPOINTS)),
        "changelog_rows_per_event": gained("livestate_checkpoint_rows_total") / applied,
        "embeddings_per_event": gained("livestate_embeddings_published_total") / applied,
        "batch_events": gained("livestate_batch_events_sum") / batches,
        "batch_waves": gained("livestate_batch_waves_sum") / batches,
        "apply_us_per_event": gained("livestate_batch_seconds_sum") / applied * 1e6,
    }


def _stock(site: Site, options: argparse.Namespace, cores: list[int] | None) -> dict[str, Any]:
    """The stock agent's own figures, measured in a process of its own."""
    command = [
        sys.executable, "-m", "tests.bench.support.stock", str(site.file), "--seconds", str(options.stock_seconds),
        "--store", options.stock_store, "--directory", str(site.directory / "stock"),
    ]  # fmt: skip
    environment = {**os.environ, **site.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = site.directory / "stock.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors)
        try:
            site.leave_to_workers(cores)
            if cores is not None:
                # Before it has threads: those it makes later inherit it.
                os.sched_setaffinity(process.pid, cores)
            out, _ = process.communicate(timeout=180 + options.stock_seconds)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise RuntimeError(f"the stock agent ended with {process.returncode}: {log.read_text()[-2000:]}")
    result: dict[str, Any] = json.loads(out.decode().splitlines()[-1])
    return result


class _Parts:
    """What each part costs alone, measured now and then."""

    def __init__(self, site: Site, workload: Workload, live: dict[str, Any], events: int, cores: list[int]) -> None:
        self._measured = (site, workload, live, events)
        self._cores = cores
        #: Microseconds of one core an event, by part, for each round.
        self.rounds: list[dict[str, float]] = []

    def measure(self) -> None:
        """One round, on the cores that the worker has."""
        allowed = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, self._cores)
            self.rounds.append(_limit(*self._measured))
        finally:
            os.sched_setaffinity(0, allowed)

    def medians(self) -> dict[str, float]:
        """Of all rounds, by part."""
        return {name: float(np.median([one[name] for one in self.rounds])) for name in self.rounds[0]}


def _limit(site: Site, workload: Workload, live: dict[str, Any], events: int) -> dict[str, float]:
    """Microseconds of one core an event, by part."""
    batch = max(16, round(live["batch_events"]))
    waves = max(1, round(live["batch_waves"]))
    records = max(2_000, min(60_000, events // 8))
    vector = 4 * site.layout.hidden
    row = parts.produce(site, vector + 4 * site.layout.memory + 32, records)
    embedding = parts.publish(site, vector + 105, records, batch)
    return {
        "consume": parts.consume(site, min(events, 200_000)),
        "decode": parts.decode(site, workload, batch),
        "gru": parts.recurrent(site, batch, waves),
        "embeddings": embedding * live["embeddings_per_event"],
        "changelog": row * live["changelog_rows_per_event"],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.throughput")
    parser.add_argument("--seconds", type=float, default=25.0, help="shortest steady window of the worker")
    parser.add_argument("--broker", choices=["auto", "apache", "embedded"], default="auto")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--memory-floats", type=int, default=0, help="decayed sums beside the hidden state")
    parser.add_argument("--clients", type=int, default=100_000)
    parser.add_argument("--zipf", action="store_true", help="clients by Zipf(1.2): a fifth of events from one")
    parser.add_argument("--workers", type=int, default=1, help="also run this many in one group: scaling_N")
    parser.add_argument("--events", type=int, help="how many to fill in; by default 500,000 for each second needed")
    parser.add_argument("--checkpoint-interval", type=float, help="default 10 s; in short runs a third of --seconds")
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--stock-seconds", type=float, help="default: 10, at most --seconds; 0 leaves it out")
    parser.add_argument("--stock-store", choices=["memory://", "rocksdb://"], default="memory://")
    parser.add_argument(
        "--all-cores", action="store_true", help="do not keep worker, stock agent and parts on one core"
    )
    return parser


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the bench; prints and returns the result."""
    options = _parser().parse_args(arguments)
    interval = options.checkpoint_interval or min(10.0, options.seconds / 3.0)
    if options.stock_seconds is None:
        options.stock_seconds = min(10.0, options.seconds)
    # The window begins with the end of the first round and lasts until the round that ends after --seconds.
    longest = options.seconds + 3.0 * interval + 2.0
    events = options.events or math.ceil(500_000 * longest)
    # The worker has a core of its own; the broker and whatever else runs here share the others.
    allowed = os.sched_getaffinity(0)
    cores = None if options.all_cores or len(allowed) < 2 else [min(allowed)]
    workload = Workload(options.clients, options.zipf)
    overrides = {
        "LIVESTATE_WORKER__CHECKPOINT_INTERVAL_S": str(interval),
        "LIVESTATE_TOPICS__PARTITIONS": str(options.partitions),
    }
    with open_site(options.broker, options.hidden, options.memory_floats, overrides) as site:
        _say(f"{events:,} events of {workload.record_bytes} bytes into {site.broker.name} …")
        workload.fill(site.settings, events)
        _say("one worker …")
        live = measure(site, events, 1, options.seconds, cores)
        shared = _Parts(site, workload, live, events, cores or [*allowed])
        _say("each part alone …")
        shared.measure()
        scaling: dict[str, Any] = {}
        if options.workers > 1:
            _say(f"{options.workers} workers …")
            many = measure(site.fresh(), events, options.workers, options.seconds, None)
            share = many["events_per_cpu_s"] / live["events_per_cpu_s"]
            scaling = {f"scaling_{options.workers}": share, f"workers_{options.workers}": many}
            shared.measure()
        stock: dict[str, Any] = {}
        if options.stock_seconds > 0 and not options.memory_floats:
            _say("a stock Faust agent …")
            stock = _stock(site, options, cores)
        _say("each part alone, again …")
        while len(shared.rounds) < _ROUNDS:
            shared.measure()
        cost = shared.medians()
        limit = 1e6 / sum(cost.values())
        broker = site.broker.name
    result = {
        "events_per_s": live["events_per_s"],
        "stock_events_per_s": stock.get("events_per_s"),
        "ratio_to_stock": live["events_per_s"] / stock["events_per_s"] if stock else None,
        # What neighbours on the machine take from either does not count here.
        "ratio_to_stock_per_cpu_s": live["events_per_cpu_s"] / stock["events_per_cpu_s"] if stock else None,
        "limit_events_per_s": limit,
        "limit_by_round": [1e6 / sum(one.values()) for one in shared.rounds],
        "share_of_limit": live["events_per_s"] / limit,
        "share_of_limit_per_cpu_s": live["events_per_cpu_s"] / limit,
        "parts": {name: 1e6 / us if us else None for name, us in cost.items()},
        "parts_us_per_event": cost,
        "worker": live,
        "stock": stock,
        **scaling,
        "settings": {
            "broker": broker, "hidden": options.hidden, "memory_floats": options.memory_floats,
            "clients": options.clients, "zipf": options.zipf, "record_bytes": workload.record_bytes,
            "partitions": options.partitions, "checkpoint_interval_s": interval, "events": events,
            "one_core": cores is not None, "machine": machine(),
        },
    }  # fmt: skip
    print(json.dumps(_rounded(result)), flush=True)
    return result


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
