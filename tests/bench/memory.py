"""What a row's memory costs: `python -m tests.bench.memory [--seconds N] [--clients N] [--batch N]`.

The same batches of decoded events, uniformly from all clients, are applied to rows with a memory of about 200 floats
of every kind and to rows with none, in turn, in one thread; the recurrent cell is left out. The cost of the memory is
the difference of the medians. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time

import numpy as np

from stream.model.engine import EventEncoder
from stream.model.layout import Layout
from stream.settings import parse
from stream.wire import EventColumns, EventDecoder, RecordBlock, Schema
from tests.bench.support.workload import EPOCH_MS, Workload, settings_text
from tests.support.truth import PlainRows

__all__ = ["main"]

_BATCHES = 64

_MEMORY = """
[[memory]]
name = "counts_30d"
kind = "tally"
field = "mcc"
dimensions = 8
half_life_s = 2_592_000
[[memory]]
name = "spend_by_code_365d"
kind = "sum"
field = "amt"
by = "mcc"
half_life_s = 31_536_000
[[memory]]
name = "visits"
kind = "visits"
half_life_s = 2_592_000
gap_s = 1800
[[memory]]
name = "large"
kind = "count"
half_life_s = 86_400
where = { field = "amt", above = 100 }
[[memory]]
name = "first_by_code"
kind = "first_time"
by = "mcc"
[[memory]]
name = "last_large"
kind = "last_time"
where = { field = "amt", above = 100 }
[[memory]]
name = "last_amounts"
kind = "last"
field = "amt"
size = 5
[[memory]]
name = "last_codes"
kind = "last"
field = "mcc"
size = 3
[[memory]]
name = "codes"
kind = "sketch"
field = "mcc"
half_life_s = 2_592_000
[[memory]]
name = "ways"
kind = "sketch"
field = "way"
half_life_s = 31_536_000
[[memory]]
name = "recent"
kind = "ring"
field = "mcc"
size = 13
[[memory]]
name = "most"
kind = "top"
field = "mcc"
size = 10
half_life_s = 2_592_000
"""


class _Site:
    """Rows of one layout and the encoder that advances them."""

    def __init__(self, text: str, clients: int) -> None:
        settings = parse(text)
        self.layout = Layout.compile(settings, Schema.compile(settings))
        values = [[b"pos"] for _ in self.layout.embedded]
        scale = np.stack([np.zeros(self.layout.numbers), np.ones(self.layout.numbers)])
        self.encoder = EventEncoder(self.layout, values, scale)
        self.rows = PlainRows(clients, self.layout.width)

    def apply(self, columns: EventColumns, slots: np.ndarray, first_offset: int) -> float:
        """Seconds to advance the rows."""
        columns = dataclasses.replace(columns, offsets=np.arange(first_offset, first_offset + columns.n))
        began = time.perf_counter()
        self.encoder.encode(columns, slots, self.rows)
        return time.perf_counter() - began


def main(arguments: list[str] | None = None) -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(description="What a row's memory costs.")
    parser.add_argument("--seconds", type=float, default=6.0, help="how long to measure (%(default)g)")
    parser.add_argument("--clients", type=int, default=100_000, help="rows (%(default)s)")
    parser.add_argument("--batch", type=int, default=1000, help="events of a batch (%(default)s)")
    options = parser.parse_args(arguments)
    plain = _Site(settings_text(), options.clients)
    text = settings_text() + _MEMORY.replace("[[memory]]", '[[memory]]\nmodality = "buy"')
    full = _Site(text, options.clients)
    decoder = EventDecoder(full.layout.schema, parse(text).limits, "msgpack")
    batches = []
    workload = Workload(clients=options.clients)
    for keys, values, _ in workload.chunks(_BATCHES * options.batch, 1):
        for at in range(0, len(keys) - options.batch + 1, options.batch):
            part = slice(at, at + options.batch)
            count = np.arange(options.batch)
            block = RecordBlock.from_lists(keys[part], values[part], count, np.full(options.batch, 2 * EPOCH_MS))
            batches.append((decoder.decode(block), np.array([int(key[1:]) for key in keys[part]], np.int64)))
    spent: dict[str, list[float]] = {"plain": [], "full": []}
    offset, began = 0, time.perf_counter()
    while len(spent["full"]) <= len(batches) or time.perf_counter() - began < options.seconds:
        for columns, slots in batches:
            for name, site in (("plain", plain), ("full", full)):
                spent[name].append(site.apply(columns, slots, offset))
            offset += options.batch
    # The first pass touches every row's memory for the first time.
    without, with_it = (float(np.median(spent[name][len(batches) :])) / options.batch * 1e6 for name in spent)
    print(
        json.dumps(
            {
                "memory_floats": full.layout.memory,
                "batch": options.batch,
                "clients": options.clients,
                "batches": len(spent["full"]) - len(batches),
                "memory_us_per_event": round(with_it - without, 3),
                "with_memory_us_per_event": round(with_it, 3),
                "without_memory_us_per_event": round(without, 3),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
