"""Runs the real trainer and worker once on real events, so that the image carries their compiled kernels.

Guaranteed: both programs started, applied and checkpointed, and the worker restored, or this fails. Not guaranteed:
that the kernels suit a processor other than the one they were compiled on; there numba compiles them again.

    python warm.py DIRECTORY
"""

from __future__ import annotations

import shutil
import sys
import time
import urllib.request
from itertools import pairwise
from pathlib import Path

import numpy as np
from confluent_kafka import Producer

from stream.broker import EmbeddedBroker
from stream.cli import EXAMPLE
from stream.kafka import ensure_topics, producer_config
from stream.settings import Settings, load
from stream.wire import encode_event_json
from trainer.demo import journey
from trainer.demo.processes import Exposition, Process, free_ports
from trainer.demo.replay import replay

TIMEOUT_S = 300.0
TRAINED = "livestate_trainer_events_total"
#: Each stretch has a worker with an empty disk: the second and third read rows back from the changelog, and in the
#: third rows expire, are evicted and spill to disk.
DAYS = ("2017-01-01", "2017-01-15", "2017-01-20", "2017-01-31")
LIMITS = {
    "LIVESTATE_STORE__TTL_S": "432000",
    "LIVESTATE_STORE__MAX_ROWS": "400",
    "LIVESTATE_STORE__MEMORY_ROWS": "64",
}
ODD_EVENT = {
    "product_id": "a", "store_id": "a", "quantity": 1, "sales_value": 1.5, "retail_disc": 0, "coupon_disc": 0,
    "coupon_match_disc": 0,
}  # fmt: skip


def main(directory: Path) -> None:
    """Run the trainer once, and a worker for each stretch."""
    directory.mkdir(parents=True)
    worker_port, trainer_port = free_ports([6066, 6067])
    days = [int(np.datetime64(day, "ms").astype(np.int64)) for day in DAYS]
    year = journey.load()
    with EmbeddedBroker(directory / "broker") as broker:
        environment = {
            **broker.environment,
            "LIVESTATE_WORKER__DATA_DIR": str(directory / "worker"),
            "LIVESTATE_WORKER__HTTP_PORT": str(worker_port),
            "LIVESTATE_WORKER__CHECKPOINT_INTERVAL_S": "1",
            "LIVESTATE_TRAINER__DATA_DIR": str(directory / "trainer"),
            "LIVESTATE_TRAINER__HTTP_PORT": str(trainer_port),
        }
        settings = load(EXAMPLE, environment)
        ensure_topics(settings, create=True)
        with Process("trainer", ["trainer"], environment, directory) as trainer:
            trainer.wait_until_ready(trainer_port, TIMEOUT_S)
            for number, (start_ms, end_ms) in enumerate(pairwise(days)):
                limits = LIMITS if number == len(days) - 2 else {}
                with Process("worker", ["worker"], environment | limits, directory) as worker:
                    worker.wait_until_ready(worker_port, TIMEOUT_S)
                    counts = Exposition(worker_port), Exposition(trainer_port)
                    counts[1].refresh()
                    before = counts[1].total(TRAINED)
                    _publish_odd_ones(settings, start_ms)
                    sent = replay(settings, year, start_ms=start_ms, end_ms=end_ms, rate=20_000.0)
                    _wait(counts[0], "livestate_dead_letters_total", 1, trainer, worker)
                    _wait(counts[0], "livestate_events_applied_total", sent.events + 1, trainer, worker)
                    _wait(counts[1], TRAINED, before + sent.events + 1, trainer, worker)
                    _wait(counts[0], "livestate_checkpoint_rows_total", 1, trainer, worker)
                    last = int(np.searchsorted(year.purchases.timestamp_ms, end_ms)) - 1
                    url = f"http://127.0.0.1:{worker_port}/v1/clients/{year.purchases.household[last]}"
                    urllib.request.urlopen(url, timeout=10).close()
                    print(f"{sent.events} events, {sent.feedback} labels in {sent.elapsed_s:.0f} s", flush=True)
                shutil.rmtree(directory / "worker")


def _publish_odd_ones(settings: Settings, timestamp_ms: int) -> None:
    """An event as JSON and a record that is none take other ways through the decoder."""
    producer = Producer(producer_config(settings))
    event = encode_event_json("odd", timestamp_ms, "purchase", ODD_EVENT)
    producer.produce(settings.topics.events, event, "odd", headers={"content-type": "application/json"})
    producer.produce(settings.topics.events, b"no event", "odd")
    if producer.flush(TIMEOUT_S):
        raise SystemExit("the broker confirms nothing")


def _wait(counts: Exposition, name: str, least: float, *processes: Process) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while counts.total(name) < least:
        for process in processes:
            process.check()
        if time.monotonic() > deadline:
            raise SystemExit(f"{name} is {counts.total(name):g}, not {least:g}, after {TIMEOUT_S:g} s")
        time.sleep(0.2)
        counts.refresh()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
