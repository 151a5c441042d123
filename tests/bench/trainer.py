"""What a trainer process keeps up with on one core.

    python -m tests.bench.trainer [--seconds N] [--rate 20000] [--broker apache|embedded]

Three stretches on one broker:

- the demo's year (1.47 million purchases, sends and redemptions, and their feedback) is there when the trainer starts:
  events a second until all of it is read;
- the same year comes at a steady rate: how far behind the trainer falls, in records and in seconds of publishing;
- another stream, of which every event asks for a prediction and is answered, is there when the trainer starts: labels
  learned a second.

Each is told by the clock and, as other programs take the clock's time too, by processor time; both include the start
of the stream, but not the program's. `--seconds` shortens all three. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from confluent_kafka import Producer

from stream.kafka import producer_config
from stream.ports import free_port
from stream.wire import FeedbackRecord, encode_feedback
from tests.bench.support.site import ROOT, Site, cpu_seconds, machine, on_cores, open_site, scrape
from tests.bench.support.workload import EPOCH_MS, Workload, settings_text
from tests.support.processes import Livestate, wait_for
from trainer.demo import journey as demo
from trainer.demo.journey import Journey
from trainer.demo.replay import replay

__all__ = ["main"]

_SHOP = (ROOT / "stream" / "examples" / "shop.toml").read_text()
_ASKING = settings_text() + '\n[tasks.accepted]\non = "buy"\nstandardise_after = 100\n'
_EVENTS, _LAG = "livestate_trainer_events_total", "livestate_trainer_lag_events"
_LEARNED = "livestate_examples_learned_total"
#: Events a second that a short run is made for: more than a trainer reads.
_MOST = 60_000
_MOST_LABELS = 10_000


@contextmanager
def _trainer(site: Site, cores: list[int] | None) -> Iterator[tuple[Livestate, int]]:
    """A trainer on one core, and its port, as soon as it has read something."""
    site.publish_parameters()
    port = free_port()
    with site.trainer(port) as trainer:
        wait_for(lambda: _LAG in _scraped(trainer, port), 120, "the trainer answers")
        if cores is not None:
            on_cores(trainer.process.pid, cores)
        yield trainer, port


def _scraped(trainer: Livestate, port: int) -> dict[str, float]:
    if trainer.process.poll() is not None:
        raise RuntimeError("the trainer ended: " + trainer.text()[-2000:])
    return scrape(port)


def _drain(site: Site, events: int, labels: int, cores: list[int] | None) -> dict[str, float]:
    """A second, by the clock and by processor time, until everything that is on the broker is read."""
    with _trainer(site, cores) as (trainer, port):
        first, began, used = _scraped(trainer, port), time.perf_counter(), cpu_seconds(trainer.process.pid)
        last: dict[str, float] = {}

        def done() -> bool:
            nonlocal last
            last = _scraped(trainer, port) or last
            return last.get(_EVENTS, 0.0) >= events and last.get(_LEARNED, 0.0) >= labels and not last[_LAG]

        wait_for(done, 600, f"{events} events and {labels} labels are read")
        wall, cpu = time.perf_counter() - began, cpu_seconds(trainer.process.pid) - used
        trainer.stop()
    read, learned = (last.get(name, 0.0) - first.get(name, 0.0) for name in (_EVENTS, _LEARNED))
    return {
        "events_per_s": read / wall, "events_per_cpu_s": read / cpu,
        "examples_per_s": learned / wall, "examples_per_cpu_s": learned / cpu,
        "cores_used": cpu / wall,
    }  # fmt: skip


class _Lag:
    """How far the trainer was behind, looked at ten times a second until it is left."""

    def __init__(self, trainer: Livestate, port: int) -> None:
        self.most = 0.0
        self.sum, self.looks = 0.0, 0
        self._trainer, self._port = trainer, port
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="lag")

    def _follow(self) -> None:
        while not self._stopping.wait(0.1):
            lag = _scraped(self._trainer, self._port).get(_LAG)
            if lag is not None:
                self.most = max(self.most, lag)
                self.sum, self.looks = self.sum + lag, self.looks + 1

    def __enter__(self) -> _Lag:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(30)


def _paced(site: Site, journey: Journey, rate: float, cores: list[int] | None) -> dict[str, float]:
    with _trainer(site, cores) as (trainer, port):
        # Nobody looks at a trainer that is being stopped.
        with _Lag(trainer, port) as lag:
            used = cpu_seconds(trainer.process.pid)
            done = replay(site.settings, journey, rate=rate)
            published = time.perf_counter()
            wait_for(
                lambda: not (now := _scraped(trainer, port)).get(_LAG, 1.0) and now.get(_EVENTS, 0.0) >= done.events,
                600, "everything is read",
            )  # fmt: skip
            behind, cpu = time.perf_counter() - published, cpu_seconds(trainer.process.pid) - used
        trainer.stop()
    return {
        "paced_events_per_s": done.events / done.elapsed_s,
        "paced_lag_most_events": lag.most,
        "paced_lag_mean_events": lag.sum / max(1, lag.looks),
        # Both topics' records.
        "paced_lag_most_s": lag.most / (done.events / done.elapsed_s),
        "paced_read_after_s": behind,
        "paced_cores_used": cpu / (done.elapsed_s + behind),
    }


def _answered(site: Site, events: int) -> None:
    """So many events, each of which asks, and an answer to each."""
    workload = Workload(clients=10_000)
    workload.fill(site.settings, events)
    producer = Producer(producer_config(site.settings, linger_ms=20, queue_buffering_max_messages=500_000))
    number = 0
    for keys, _, partitions in workload.chunks(events, site.settings.topics.partitions):
        for key, partition in zip(keys, partitions, strict=True):
            as_of_ms = EPOCH_MS + number
            answer = FeedbackRecord(key.decode(), as_of_ms, as_of_ms, "accepted", number % 3 == 0)
            producer.produce(site.settings.topics.feedback, encode_feedback(answer), key, partition)
            number += 1
        producer.poll(0)
    if producer.flush(300):
        raise RuntimeError("the feedback was not confirmed")


def _first(journey: Journey, events: int) -> Journey:
    """About so many events of the year, from its beginning; all of it where it has no more."""
    if events >= len(journey):
        return journey
    return journey.until(int(journey.timestamp_ms[events]))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the bench; prints and returns the result."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.trainer")
    parser.add_argument("--seconds", type=float, help="of each stretch, at most and about; by default the whole year")
    parser.add_argument("--rate", type=float, default=20_000.0, help="events a second where they come steadily")
    parser.add_argument("--broker", choices=["auto", "apache", "embedded"], default="auto")
    options = parser.parse_args(arguments)
    allowed = os.sched_getaffinity(0)
    cores = None if len(allowed) < 2 else [min(allowed)]
    journey = demo.load()
    seconds = options.seconds or 1e9
    with open_site(options.broker, text=_SHOP) as site:
        year = _first(journey, int(min(seconds * _MOST, 1e9)))
        print(f"{len(year):,} events of the year on {site.broker.name} …", file=sys.stderr, flush=True)
        labels = replay(site.settings, year).feedback
        backlog = _drain(site, len(year), 0, cores)
        print(f"the year at {options.rate:,.0f} events a second …", file=sys.stderr, flush=True)
        again = Site(site.broker, site.directory / "paced", site.text, site.hidden, {}, _renamed(site.topics, "paced"))
        paced = _paced(again, _first(journey, int(min(seconds * options.rate, 1e9))), options.rate, cores)
        answered = int(_MOST_LABELS * min(10.0, seconds))
        print(f"{answered:,} labels …", file=sys.stderr, flush=True)
        asking = Site(site.broker, site.directory / "asking", _ASKING, 64, {}, _renamed(site.topics, "asking"))
        _answered(asking, answered)
        learned = _drain(asking, answered, answered, cores)
        broker = site.broker.name
    result = {
        "events_per_s": backlog["events_per_s"],
        "events_per_cpu_s": backlog["events_per_cpu_s"],
        "examples_per_s": learned["examples_per_s"],
        "examples_per_cpu_s": learned["examples_per_cpu_s"],
        **paced,
        "events": len(year),
        "year_labels": labels,
        "labels": answered,
        "settings": {
            "broker": broker, "rate": options.rate, "one_core": cores is not None, "machine": machine(),
        },
    }  # fmt: skip
    print(json.dumps({n: float(f"{v:.4g}") if isinstance(v, float) else v for n, v in result.items()}), flush=True)
    return result


def _renamed(topics: dict[str, str], name: str) -> dict[str, str]:
    return {role: f"{topic}-{name}" for role, topic in topics.items()}


if __name__ == "__main__":
    main()
