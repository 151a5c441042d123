"""Time from publishing an event to its client's embedding in a consumer's hands, at a steady rate.

    python -m tests.bench.latency [--seconds N] [--rate 10000] [--partitions 4] [--broker apache|embedded]

Stretches on one broker with the same client settings: a worker between producer and consumer, the same while a version
of the parameters is published every half second, as a trainer does it (the trunk stays, a head is new), a bare echo
(events are produced and consumed, nothing between), a worker that sweeps (a fifth of the clients stays away for longer
than its rows live, and all come back), and the echo again: its delays are those of both times. A broker compiles its
code while it is new, and worker and echo are slower then; so the worker's first stretch, which does not count and has
versions as well, comes before all others. Delays while a checkpoint ran are also told apart. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np
from confluent_kafka import Message
from confluent_kafka.admin import AdminClient, NewTopic
from numpy.typing import NDArray

from stream.kafka import client_config
from stream.ports import free_port
from stream.wire import decode_embedding
from tests.bench.support.site import Site, busy_seconds, cpu_seconds, machine, open_site, parsed, scrape
from tests.bench.support.stream import Publisher, Watcher, undisturbed
from tests.bench.support.workload import Workload
from tests.support.processes import Livestate, http_get, wait_for
from trainer.publisher import Publisher as VersionPublisher

__all__ = ["main"]

#: How often the worker is asked for what it did. An answer takes it a millisecond or more, in which others wait.
_ASKED_S = 0.5
_ENDED = re.compile(r'^livestate_checkpoint_timestamp_seconds\{partition="\d+"\} (\S+)$', re.MULTILINE)
#: Of a worker that is new to a broker which is not: the worker's own first seconds.
_SETTLED_S = 10.0
#: Numbers that change with each version.
_HEAD_INPUTS = 500
#: Events of one client that come while a row lives, on average: e^-1.6, a fifth of the clients, have none.
_EVENTS_A_LIFE = 1.6


def _percentiles(delays: NDArray[np.float64], prefix: str = "") -> dict[str, float]:
    if not len(delays):
        return {}
    p50, p99, p999 = np.percentile(delays * 1000.0, [50, 99, 99.9])
    return {f"{prefix}p50_ms": float(p50), f"{prefix}p99_ms": float(p99), f"{prefix}p999_ms": float(p999)}


def _echo(site: Site, workload: Workload, rate: float, seconds: float, name: str) -> NDArray[np.float64]:
    """Seconds that the same events take that are produced to a topic and consumed from it."""
    topic = f"{site.topics['events']}-{name}"
    admin = AdminClient(client_config(site.settings))
    admin.create_topics([NewTopic(topic, site.settings.topics.partitions, 1)])[topic].result(30)
    wait_for(lambda: topic in admin.list_topics(timeout=10).topics, 30, "the echo topic")
    publisher = Publisher(site.settings, topic, workload, rate, seconds + 1.0)
    with undisturbed(), Watcher(site.settings, topic, lambda message: message.offset() or 0) as watcher:
        publisher.run(threading.Event())
        time.sleep(0.5)
    when, delays = watcher.delays(publisher.times)
    return delays[when > when[0] + 1.0]


class _Checkpoints:
    """When a checkpoint ran, as the worker's metrics tell: intervals (begin, end), until it is left."""

    def __init__(self, port: int) -> None:
        self.intervals: list[tuple[float, float]] = []
        self._port = port
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="checkpoints")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join(30)

    def _follow(self) -> None:
        count = seconds = 0.0
        ended_before: set[float] = set()
        while not self._stopping.wait(_ASKED_S):
            text = http_get(self._port, "/metrics")[1]
            # Of each partition, by the clock on the wall; before the first checkpoint, when its rows were there.
            ended = {float(found) for found in _ENDED.findall(text)}
            metrics = parsed(text)
            if not metrics:
                continue
            done, took = metrics["livestate_checkpoints_total"], metrics["livestate_checkpoint_seconds_sum"]
            for at in ended - ended_before if done > count else ():
                end = at - time.time() + time.perf_counter()
                self.intervals.append((end - (took - seconds) / (done - count), end))
            count, seconds, ended_before = done, took, ended


@contextmanager
def _swapping(
    site: Site, stopping: threading.Event, warm_up_s: float, pause_s: float, versions: list[int]
) -> Iterator[None]:
    """Publish a version each half second, in `warm_up_s` and, after `pause_s`, until the end; those of the end are in
    `versions`."""
    publisher = VersionPublisher(site.settings)
    tensors = dict(site.parameters)
    rng = np.random.default_rng(0)

    def publish(into: list[int], until: float) -> None:
        while not stopping.wait(0.5) and time.perf_counter() < until:
            tensors["head/new/weight"] = rng.normal(0.0, 0.1, _HEAD_INPUTS)
            into.append(publisher.publish(tensors, (), int(time.time() * 1000)).version)

    def follow() -> None:
        publish([], time.perf_counter() + warm_up_s)
        stopping.wait(pause_s)
        publish(versions, math.inf)

    thread = threading.Thread(target=follow, name="swaps")
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(60)
        publisher.close()


def _offset(message: Message) -> int:
    return decode_embedding(message.value()).offset


def _used(site: Site, worker: Livestate) -> dict[str, float]:
    """Processor time used so far, by whom."""
    broker = cpu_seconds(site.broker.pid) if site.broker.pid is not None else 0.0
    return {
        "all": busy_seconds(), "worker": cpu_seconds(worker.process.pid), "broker": broker,
        "bench": time.process_time(),
    }  # fmt: skip


def _live(site: Site, workload: Workload, options: argparse.Namespace) -> dict[str, Any]:
    site.publish_parameters()
    port = free_port()
    swaps_s = max(2.0, options.seconds / 3.0)
    with site.worker("0", port) as worker:
        wait_for(lambda: http_get(port, "/readyz")[0] == 200, 120, "the worker is ready")
        quiet_s = options.warm_up + options.seconds
        publisher = Publisher(site.settings, site.settings.topics.events, workload, options.rate, quiet_s + swaps_s)
        stopping = threading.Event()
        versions: list[int] = []
        with (
            undisturbed(),
            Watcher(site.settings, site.settings.topics.embeddings, _offset) as watcher,
            _Checkpoints(port) as checkpoints,
            _swapping(site, stopping, options.warm_up, options.seconds, versions),
        ):
            began, used = time.perf_counter(), _used(site, worker)
            publisher.run(stopping)
            wall = time.perf_counter() - began
            cores = {name: (now - used[name]) / wall for name, now in _used(site, worker).items()}
            time.sleep(1.0)
        metrics = _metrics(worker, port)
    when, delays = watcher.delays(publisher.times)
    started = when[0]
    swapping = when > started + quiet_s
    steady = (when > started + options.warm_up) & ~swapping
    during = np.zeros(len(when), np.bool_)
    for begin, end in checkpoints.intervals:
        during |= (when + delays >= begin) & (when <= end)
    return {
        **_percentiles(delays[steady]),
        **_percentiles(delays[steady & during], "checkpoint_"),
        **_percentiles(delays[steady & ~during], "between_checkpoints_"),
        **_percentiles(delays[swapping], "swaps_"),
        "embeddings_seen": int(steady.sum()),
        "checkpoints": len(checkpoints.intervals),
        "versions_published": len(versions),
        "version_served": int(metrics["livestate_parameter_version"]),
        "batch_events": metrics["livestate_batch_events_sum"] / metrics["livestate_batch_events_count"],
        # All programs on the machine together: near the number of cores, delays are those of waiting for one.
        "cores_used": {name: round(used, 3) for name, used in cores.items()},
        "publisher_late_ms": publisher.late_s * 1000.0,
    }


def _sweeping(site: Site, options: argparse.Namespace, life_s: float) -> dict[str, Any]:
    """A worker whose rows live for `life_s` of the publisher's time."""
    site.publish_parameters()
    workload = Workload(max(100, int(options.rate * life_s / _EVENTS_A_LIFE)))
    port = free_port()
    with site.worker("0", port) as worker:
        wait_for(lambda: http_get(port, "/readyz")[0] == 200, 120, "the worker is ready")
        settled_s = min(options.warm_up, _SETTLED_S)
        seconds = settled_s + life_s + max(2.0, options.seconds / 3.0)
        topics = site.settings.topics
        publisher = Publisher(site.settings, topics.events, workload, options.rate, seconds)
        with undisturbed(), Watcher(site.settings, topics.embeddings, _offset, deletions=False) as watcher:
            publisher.run(threading.Event())
            time.sleep(1.0)
        metrics = _metrics(worker, port)
    when, delays = watcher.delays(publisher.times)
    return {
        **_percentiles(delays[when > when[0] + settled_s + life_s], "sweeps_"),
        "rows_swept": int(metrics["livestate_rows_ended_total"]),
    }


def _metrics(worker: Livestate, port: int) -> dict[str, float]:
    if worker.process.poll() is not None:
        raise RuntimeError("the worker ended")
    wait_for(lambda: "livestate_parameter_version" in scrape(port), 60, "the worker answers")
    return scrape(port)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the bench; prints and returns the result."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.latency")
    parser.add_argument(
        "--seconds", type=float, default=25.0, help="of the stretch with a worker; the others take a third"
    )
    parser.add_argument(
        "--warm-up",
        type=float,
        default=40.0,
        help="seconds before those, in which a new broker compiles, on the worker's cores",
    )
    parser.add_argument("--rate", type=float, default=10_000.0, help="events a second")
    parser.add_argument("--partitions", type=int, default=4, help="of each topic; all are the worker's")
    parser.add_argument("--broker", choices=["auto", "apache", "embedded"], default="auto")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--clients", type=int, default=100_000)
    parser.add_argument("--checkpoint-interval", type=float, help="default 10 s; in short runs a third of --seconds")
    options = parser.parse_args(arguments)
    interval = options.checkpoint_interval or min(10.0, options.seconds / 3.0)
    workload = Workload(options.clients)
    overrides = {
        "LIVESTATE_WORKER__CHECKPOINT_INTERVAL_S": str(interval),
        "LIVESTATE_TOPICS__PARTITIONS": str(options.partitions),
    }
    third_s = max(1.0, options.seconds / 3.0)
    life_s = max(1.0, min(8.0, third_s))
    with open_site(options.broker, options.hidden, 0, overrides) as site:
        print(f"a worker on {site.broker.name} …", file=sys.stderr, flush=True)
        live = _live(site, workload, options)
        print("a bare echo …", file=sys.stderr, flush=True)
        echoes = [_echo(site, workload, options.rate, third_s, "echo-1")]
        print("a worker that sweeps …", file=sys.stderr, flush=True)
        # The workload's events are a millisecond of event time apart, whatever the rate.
        swept = _sweeping(site.apart({"LIVESTATE_STORE__TTL_S": str(life_s * options.rate / 1000.0)}), options, life_s)
        print("the echo again …", file=sys.stderr, flush=True)
        echoes.append(_echo(site, workload, options.rate, third_s, "echo-2"))
        broker = site.broker.name
    echo = _percentiles(np.concatenate(echoes), "echo_")
    result = {
        **live,
        **swept,
        **echo,
        "ratio_p99": live["p99_ms"] / echo["echo_p99_ms"],
        "settings": {
            "broker": broker, "rate": options.rate, "partitions": options.partitions, "seconds": options.seconds,
            "hidden": options.hidden, "clients": options.clients, "warm_up_s": options.warm_up,
            "checkpoint_interval_s": interval, "life_s": life_s, "machine": machine(),
        },
    }  # fmt: skip
    print(json.dumps({n: float(f"{v:.4g}") if isinstance(v, float) else v for n, v in result.items()}), flush=True)
    return result


if __name__ == "__main__":
    main()
