"""How fast a worker rebuilds its states under another trunk, beside how fast it serves events.

    python -m tests.bench.replay [--seconds N] [--broker apache|embedded]

A worker applies a filled topic (measured as in `tests.bench.throughput`); a second one with an empty disk applies all
of it, and then a version with another trunk is published. `events_per_s` counts the events from the version's
publication until every partition has switched; its share for each second of processor time leaves out what neighbours
take. Both workers have one core. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from typing import Any

from stream.ports import free_port
from tests.bench.support.site import cpu_seconds, machine, on_cores, open_site, scrape
from tests.bench.support.workload import Workload
from tests.bench.throughput import measure
from tests.support.processes import wait_for
from tests.support.trunk import publish_version

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the bench; prints and returns the result."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.replay")
    parser.add_argument("--seconds", type=float, default=15.0, help="shortest steady window of the serving worker")
    parser.add_argument("--broker", choices=["auto", "apache", "embedded"], default="auto")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--clients", type=int, default=100_000)
    parser.add_argument("--events", type=int, help="how many to fill in; by default 500,000 for each second needed")
    parser.add_argument("--partitions", type=int, default=4)
    options = parser.parse_args(arguments)
    interval = min(10.0, options.seconds / 3.0)
    events = options.events or math.ceil(500_000 * (options.seconds + 3.0 * interval + 2.0))
    allowed = os.sched_getaffinity(0)
    cores = None if len(allowed) < 2 else [min(allowed)]
    workload = Workload(options.clients)
    overrides = {
        "LIVESTATE_WORKER__CHECKPOINT_INTERVAL_S": str(interval),
        "LIVESTATE_TOPICS__PARTITIONS": str(options.partitions),
    }
    with open_site(options.broker, options.hidden, 0, overrides) as site:
        print(f"{events:,} events into {site.broker.name} …", file=sys.stderr, flush=True)
        workload.fill(site.settings, events)
        print("serving …", file=sys.stderr, flush=True)
        serving = measure(site, events, 1, options.seconds, cores)
        print("rebuilding …", file=sys.stderr, flush=True)
        again = site.fresh()
        again.publish_parameters()
        port = free_port()
        with again.worker("0", port) as worker:
            wait_for(lambda: scrape(port).get("livestate_partitions_assigned", 0) == options.partitions, 120, "serving")
            if cores is not None:
                on_cores(worker.process.pid, cores)
            wait_for(lambda: scrape(port).get("livestate_events_applied_total", 0) >= events, 600, "all is applied")
            other = {name: -tensor if name == "trunk/bias_hh" else tensor for name, tensor in again.parameters.items()}
            publish_version(again.settings, again.parameters.updated(other, 2), 2, 1)
            started, cpu = time.perf_counter(), cpu_seconds(worker.process.pid)
            wait_for(lambda: scrape(port).get("livestate_parameter_version", 0) == 2, 600, "every partition switched")
            seconds, used = time.perf_counter() - started, cpu_seconds(worker.process.pid) - cpu
            rebuilt = scrape(port)["livestate_rebuilt_events_total"]
            worker.stop()
        broker = site.broker.name
    if rebuilt != events:
        raise RuntimeError(f"{rebuilt:,.0f} events were rebuilt of {events:,}")
    result = {
        "events_per_s": events / seconds,
        "serving_events_per_s": serving["events_per_s"],
        "ratio_to_serving": events / seconds / serving["events_per_s"],
        "ratio_to_serving_per_cpu_s": events / used / serving["events_per_cpu_s"],
        "seconds": seconds,
        "settings": {
            "broker": broker, "hidden": options.hidden, "clients": options.clients, "events": events,
            "partitions": options.partitions, "one_core": cores is not None, "machine": machine(),
        },
    }  # fmt: skip
    print(json.dumps({n: float(f"{v:.4g}") if isinstance(v, float) else v for n, v in result.items()}), flush=True)
    return result


if __name__ == "__main__":
    main()
