"""A worker compiles its kernels before it takes events, not while it holds them up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.processes import ROOT

_PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
from numba.core.registry import CPUDispatcher
from stream.model.engine import Engine
from stream.model.heads import Questions
from stream.model.layout import Layout
from stream.cli import EXAMPLE
from stream.partition import Partition, Served
from stream.store import EmbeddingStore, StoreOptions
from stream.transport import FetchedBlock
from stream.warmup import warm_up
from stream.wire import EmbeddingEncoder, EventDecoder, RecordBlock, Schema, encode_event
from stream.settings import load
from tests.support.trunk import random_head, random_trunk

def compiled():
    found = {}
    for module in [m for name, m in sys.modules.items() if name.startswith("stream.")]:
        for value in vars(module).values():
            if isinstance(value, CPUDispatcher):
                found[f"{value.py_func.__module__}.{value.py_func.__name__}"] = len(value.signatures)
    return found

settings = load(EXAMPLE, {})
schema = Schema.compile(settings)
layout = Layout.compile(settings, schema)
questions = Questions(layout)
parameters = random_trunk(layout).updated(random_head("redeemed", questions.tasks[0].width), 7)
without_heads = Served(Engine(layout, parameters), questions, {}, 7)
served = Served(Engine(layout, parameters), questions, questions.heads(parameters), 7)
decoder = EventDecoder(schema, settings.limits, "msgpack")
encoder = EmbeddingEncoder(layout.hidden, ["redeemed"])
options = StoreOptions(width=layout.width, memory_rows=1000)
directory = Path(sys.argv[1])
warm_up(schema, decoder, encoder, without_heads, options, directory)
left = [str(path) for path in directory.iterdir()]
before = compiled()
with EmbeddingStore.open(directory / "store", options) as store:
    partition = Partition(0, store, 0, decoder, encoder)
    keys = [str(i % 20).encode() for i in range(100)]
    numbers = ("quantity", "sales_value", "retail_disc", "coupon_disc", "coupon_match_disc")
    bought = {"product_id": "a", "store_id": "b", "product_category": "c", "department": "DELI"}
    sent = {"campaign_id": "a", "campaign_type": "Type A", "duration_days": 30, "coupons": 2}
    sent["products"] = [["a"], ["d"]]
    kinds = (("purchase", bought | dict.fromkeys(numbers, 1.0)), ("campaign_send", sent))
    values = [encode_event(key.decode(), 10**12 + i, *kinds[i % 2]) for i, key in enumerate(keys)]
    block = RecordBlock.from_lists(keys, values, np.arange(100), np.full(100, 10**13))
    applied = partition.apply(FetchedBlock(0, 0, block), served)
    # A single one, as where events come slowly
    last = RecordBlock.from_lists(keys[1:2], values[1:2], np.array([100]), np.full(1, 10**13))
    partition.apply(FetchedBlock(0, 100, last), served)
    store.flush()
print(json.dumps({"left": left, "before": before, "after": compiled(), "events": applied.events}))
"""


def test_what_a_block_needs_is_compiled_beforehand(tmp_path: Path) -> None:
    # Given a fresh process, whose kernels are not loaded, and a task whose head nobody has learned yet
    program = [sys.executable, "-c", _PROGRAM, str(tmp_path)]
    # When it warms up, and then applies a block with a head and writes a checkpoint
    run = subprocess.run(
        program, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    # Then warming up left nothing behind, and the block compiled and loaded nothing more
    assert seen["left"] == []
    assert seen["events"] == 100
    assert sum(seen["before"].values()) > 10
    assert {name: n for name, n in seen["after"].items() if n != seen["before"][name]} == {}


def test_a_worker_starts_without_torch() -> None:
    # It takes longer to load than a million rows to be read back from disk, and only training needs it
    program = "import sys, stream.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120).returncode == 0
