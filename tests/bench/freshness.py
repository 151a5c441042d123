"""Time from publishing feedback to a prediction, in a consumer's hands, by parameters that have learned it.

    python -m tests.bench.freshness [--seconds N] [--rate 5000] [--feedback 200] [--broker apache|embedded]

A worker and a trainer, each a process, on one broker. Every event asks for a prediction; feedback answers events that
are `--delay` seconds old. Measured from outside, as a user would: a feedback record is served when the first embedding
of its own partition comes whose `parameter_version` is one that has it, as that version's marker in the parameters
topic says, and that carries the task's prediction. Feedback of the first seconds, while programs are new, does not
count. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from bisect import bisect_left
from collections import deque
from typing import Any

import numpy as np
from confluent_kafka import Producer
from numpy.typing import NDArray

from stream.model.parameters import ParameterSet
from stream.parameter_log import Marker, ParameterReader
from stream.ports import free_port
from stream.wire import FeedbackRecord, decode_embedding, encode_feedback
from tests.bench.support.site import Site, busy_seconds, cpu_seconds, machine, open_site, scrape
from tests.bench.support.stream import Publisher, Watcher
from tests.bench.support.workload import EPOCH_MS, Workload, settings_text
from tests.support.processes import http_get, wait_for

__all__ = ["main"]

_TASK = "accepted"
_SETTINGS = f'\n[tasks.{_TASK}]\non = "buy"\nstandardise_after = 100\n'
#: Events, in which served feedback shows, go on until all that counts is served, at most for so long.
_PATIENCE_S = 120.0


class _Answers:
    """Publishes feedback between the events: `after` is called with each of them."""

    def __init__(self, site: Site, every: int, delay: int) -> None:
        self._topic = site.settings.topics.feedback
        self._every = every
        self._delay = delay
        self._asked: deque[tuple[int, bytes, int]] = deque()
        self._labels = np.random.default_rng(5)
        #: Of each record, by Kafka's time, which no two share: when it was published, and its partition.
        self.published: dict[int, tuple[float, int]] = {}
        self._last_ms = 0

    def after(self, number: int, key: bytes, partition: int, producer: Producer) -> None:
        """Answer the event that came `delay` before every `every`-th one."""
        if number % self._every:
            return
        self._asked.append((number, key, partition))
        if number - self._asked[0][0] < self._delay:
            return
        asked, client, partition = self._asked.popleft()
        as_of_ms = EPOCH_MS + asked
        label = bool(self._labels.random() < 0.3)
        value = encode_feedback(FeedbackRecord(client.decode(), as_of_ms + self._delay, as_of_ms, _TASK, label))
        self._last_ms = max(self._last_ms + 1, int(time.time() * 1000))
        self.published[self._last_ms] = (time.perf_counter(), partition)
        producer.produce(self._topic, value, client, partition, timestamp=self._last_ms)


class _Versions:
    """Which version was the first to have each feedback record, as the markers tell."""

    def __init__(self, site: Site) -> None:
        #: By Kafka's time of the record: the version, and when it was made, UTC milliseconds.
        self.of: dict[int, tuple[int, int]] = {}
        self.count = 0
        self.reader = ParameterReader(site.settings, self._on_version)

    def _on_version(self, parameters: ParameterSet, marker: Marker) -> None:
        self.count += 1
        for at in marker.feedback_ms:
            self.of.setdefault(at, (parameters.version, marker.created_ms))


def _served(watcher: Watcher, partitions: int) -> tuple[list[list[int]], list[list[float]]]:
    """Of each partition: versions in the order in which they were first seen, and when."""
    versions: list[list[int]] = [[] for _ in range(partitions)]
    times: list[list[float]] = [[] for _ in range(partitions)]
    for at, message in watcher.sightings():
        embedding, own = decode_embedding(message.value()), message.partition() or 0
        if _TASK in embedding.predictions and (not versions[own] or embedding.parameter_version > versions[own][-1]):
            versions[own].append(embedding.parameter_version)
            times[own].append(at)
    return versions, times


def _percentiles(name: str, seconds: NDArray[np.float64]) -> dict[str, float]:
    p50, p99 = np.percentile(seconds, [50, 99])
    return {f"{name}p50_s": float(p50), f"{name}p99_s": float(p99), f"{name}max_s": float(seconds.max())}


def _measure(site: Site, options: argparse.Namespace) -> dict[str, Any]:
    site.publish_parameters()
    workload, worker_port, trainer_port = Workload(options.clients), free_port(), free_port()
    every = max(1, round(options.rate / options.feedback))
    answers = _Answers(site, every, round(options.delay * options.rate))
    with site.worker("0", worker_port) as worker, site.trainer(trainer_port) as trainer:
        for port in (worker_port, trainer_port):
            wait_for(lambda port=port: http_get(port, "/readyz")[0] == 200, 120, "worker and trainer are ready")
        longest_s = options.warm_up + options.seconds + _PATIENCE_S
        topic = site.settings.topics.events
        publisher = Publisher(site.settings, topic, workload, options.rate, longest_s, answers.after)
        versions = _Versions(site)
        versions.reader.start()
        pids = {"worker": worker.process.pid, "trainer": trainer.process.pid}
        if site.broker.pid is not None:
            pids["broker"] = site.broker.pid
        with Watcher(site.settings, site.settings.topics.embeddings, lambda message: message.offset() or 0) as watcher:
            stopping = threading.Event()
            publishing = threading.Thread(target=publisher.run, args=(stopping,), name="publisher")
            publishing.start()
            try:
                wait_for(lambda: any(publisher.times), 60, "the first event is published")
                began, used = time.perf_counter(), {name: cpu_seconds(pid) for name, pid in pids.items()}
                busy, own = busy_seconds(), time.process_time()
                time.sleep(options.warm_up + options.seconds)
                wall = time.perf_counter() - began
                cores = {name: (cpu_seconds(pid) - used[name]) / wall for name, pid in pids.items()}
                cores |= {"all": (busy_seconds() - busy) / wall, "bench": (time.process_time() - own) / wall}
                lag = scrape(trainer_port).get("livestate_trainer_lag_events", -1.0)
                last_ms = max(answers.published)
                wait_for(lambda: last_ms in versions.of, _PATIENCE_S, "all feedback is in a version")
                last, _ = versions.of[last_ms]
                wait_for(
                    lambda: scrape(worker_port).get("livestate_parameter_version", 0.0) >= last, _PATIENCE_S,
                    f"version {last} is served",
                )  # fmt: skip
                # Every partition's next embedding shows it.
                time.sleep(1.0)
            finally:
                stopping.set()
                publishing.join(60)
        versions.reader.stop()
        if worker.process.poll() is not None or trainer.process.poll() is not None:
            raise RuntimeError("the worker or the trainer ended: " + worker.text()[-2000:] + trainer.text()[-2000:])
    counted = {
        at_ms: (at, partition)
        for at_ms, (at, partition) in answers.published.items()
        if began + options.warm_up <= at < began + options.warm_up + options.seconds
    }
    if not counted:
        raise RuntimeError(f"no feedback was published in {options.seconds:g} s: this machine is too slow for the rate")
    seen, when = _served(watcher, site.settings.topics.partitions)
    fresh, made = [], []
    for at_ms, (at, partition) in counted.items():
        version, created_ms = versions.of.get(at_ms, (0, 0))
        index = bisect_left(seen[partition], version) if version else len(seen[partition])
        if index == len(seen[partition]):
            raise RuntimeError(f"feedback published {at - began:.1f} s after the start was not served by the end")
        fresh.append(when[partition][index] - at)
        made.append((created_ms - at_ms) / 1000.0)
    return {
        **_percentiles("", np.array(fresh)),
        **_percentiles("to_version_", np.array(made)),
        **_percentiles("version_to_served_", np.array(fresh) - np.array(made)),
        "feedback_counted": len(fresh),
        "versions": versions.count,
        "trainer_lag_events": lag,
        # All programs on the machine together: near the number of cores, delays are those of waiting for one.
        "cores_used": {name: round(share, 3) for name, share in cores.items()},
        "publisher_late_s": publisher.late_s,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the bench; prints and returns the result."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.freshness")
    parser.add_argument("--seconds", type=float, default=30.0, help="in which published feedback counts")
    parser.add_argument("--warm-up", type=float, default=5.0, help="seconds before it counts")
    parser.add_argument("--rate", type=float, default=5_000.0, help="events a second")
    parser.add_argument("--feedback", type=float, default=200.0, help="feedback records a second")
    parser.add_argument("--delay", type=float, default=1.0, help="age of the event that feedback answers, in seconds")
    parser.add_argument("--broker", choices=["auto", "apache", "embedded"], default="auto")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--clients", type=int, default=100_000)
    options = parser.parse_args(arguments)
    with open_site(options.broker, options.hidden, text=settings_text() + _SETTINGS) as site:
        print(f"feedback on {site.broker.name} …", file=sys.stderr, flush=True)
        measured = _measure(site, options)
        broker = site.broker.name
    result = {
        **measured,
        "settings": {
            "broker": broker, "rate": options.rate, "feedback": options.feedback, "seconds": options.seconds,
            "hidden": options.hidden, "clients": options.clients, "machine": machine(),
        },
    }  # fmt: skip
    print(json.dumps({n: float(f"{v:.4g}") if isinstance(v, float) else v for n, v in result.items()}), flush=True)
    return result


if __name__ == "__main__":
    main()
