"""The same work as a stock Faust agent does it: one event at a time, with Faust's own parts.

Per event: MessagePack decoded and validated, the event encoded as the trunk says, one GRU step in torch, the state
put into a Faust table (RocksDB or memory, with its changelog topic), and the embedding sent to a topic. Faust's
defaults are kept but for what helps it: no web server, no leader topic, and inputs without per-event logging.

Run as a process of its own: `python -m tests.bench.support.stock SETTINGS --seconds N`; the last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import time
import uuid
from pathlib import Path
from typing import Any

import faust
import msgpack
import numpy as np
import torch
from confluent_kafka.admin import AdminClient, NewTopic

from stream.kafka import client_config
from stream.model.layout import Layout
from stream.model.parameters import ParameterSet
from stream.settings import Settings, load
from stream.wire import Schema
from tests.bench.support.site import cpu_seconds
from tests.bench.support.workload import random_parameters

__all__ = ["Step", "main"]

_META = np.dtype([("events_seen", "<i8"), ("last_event_ms", "<i8"), ("applied_offset", "<i8")])


class Step:
    """One event at a time: the state's bytes and an event in, the state's bytes after it out."""

    def __init__(self, layout: Layout, parameters: ParameterSet) -> None:
        if layout.memory:
            raise SystemExit("the stock agent keeps no memory beside the hidden state: use --memory-floats 0")
        self._layout = layout
        self._cell = torch.nn.GRUCell(layout.inputs, layout.hidden)
        with torch.no_grad():
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(self._cell, name).copy_(torch.from_numpy(np.array(parameters[f"trunk/{name}"])))
        (modality,) = layout.schema.modalities
        self._modality = modality.name
        self._fields = layout.settings.modalities[modality.name].fields
        self._mean, self._scale = np.asarray(parameters["trunk/scale"], np.float64)
        self._tables: dict[str, torch.Tensor] = {}
        self._codes: dict[str, dict[str, int]] = {}
        for field in layout.embedded:
            name = field.name.split(".", 1)[1]
            packed = parameters[f"trunk/values/{field.name}"].tobytes()
            edges = parameters[f"trunk/value_offsets/{field.name}"].tolist()
            values = [packed[a:b].decode() for a, b in itertools.pairwise(edges)]
            self._codes[name] = {value: row + 1 for row, value in enumerate(values)}
            self._tables[name] = torch.from_numpy(np.array(parameters[f"trunk/embedding/{field.name}"]))

    def __call__(self, key: bytes, value: bytes, offset: int, state: bytes | None) -> tuple[bytes, bytes]:
        """The state after the event, and the embedding record to publish.

        Raises
        ------
        ValueError: the record is not an event.
        """
        event = msgpack.unpackb(value)
        fields, now_ms = event["fields"], event["timestamp_ms"]
        if event["client_id"].encode() != key or event["modality"] != self._modality:
            raise ValueError("key or modality")
        meta = np.zeros(1, _META)[0]
        hidden = torch.zeros((1, self._layout.hidden))
        if state is not None:
            meta = np.frombuffer(state, _META, 1)[0].copy()
            hidden = torch.frombuffer(bytearray(state[_META.itemsize :]), dtype=torch.float32).reshape(1, -1)
        seen, last_ms = int(meta["events_seen"]), int(meta["last_event_ms"])
        if seen and offset <= int(meta["applied_offset"]):
            raise ValueError("replayed")
        with torch.inference_mode():
            after = self._cell(self._inputs(fields, now_ms, seen, last_ms), hidden)
        vector = after.numpy().tobytes()
        meta["events_seen"], meta["applied_offset"] = seen + 1, offset
        meta["last_event_ms"] = max(now_ms, last_ms) if seen else now_ms
        embedding: bytes = msgpack.packb(
            {
                "client_id": event["client_id"], "timestamp_ms": int(meta["last_event_ms"]), "offset": offset,
                "parameter_version": 1, "events_seen": seen + 1, "vector": vector, "predictions": {},
            }
        )  # fmt: skip
        return meta.tobytes() + vector, embedding

    def _inputs(self, fields: dict[str, Any], now_ms: int, seen: int, last_ms: int) -> torch.Tensor:
        numbers, embedded, number = [1.0], [], 0
        for name, field in self._fields.items():
            given = fields.get(name)
            if given is None:
                raise ValueError(f"field {name} is missing")
            if field.type == "number":
                if not math.isfinite(given) or not (field.min or -math.inf) <= given <= (field.max or math.inf):
                    raise ValueError(f"field {name} is out of range")
                squashed = math.copysign(math.log1p(abs(given)), given)
                numbers.append((squashed - self._mean[number]) / self._scale[number])
                number += 1
            elif field.type == "category":
                text = given if isinstance(given, str) else str(given).lower()
                embedded.append(self._tables[name][self._codes[name].get(text, 0)])
        elapsed_s = max(0.0, (now_ms - last_ms) / 1000.0) if seen else 0.0
        hour = (now_ms % 86_400_000) / 86_400_000.0 * 2.0 * math.pi
        day = (now_ms % 604_800_000) / 604_800_000.0 * 2.0 * math.pi
        numbers += [
            math.log1p(elapsed_s) / 10.0, 0.0 if seen else 1.0,
            math.sin(hour), math.cos(hour), math.sin(day), math.cos(day),
        ]  # fmt: skip
        return torch.cat([torch.tensor(numbers, dtype=torch.float32), *embedded]).unsqueeze(0)


class _Count:
    """Events applied so far."""

    def __init__(self) -> None:
        self.events = 0


def make_app(settings: Settings, step: Step, count: _Count, store: str, directory: Path) -> faust.App:
    """The agent, its table and its topics, with names that no run had before."""
    run = uuid.uuid4().hex[:8]
    app = faust.App(
        f"stock-{run}",
        broker=f"kafka://{settings.kafka.bootstrap_servers}",
        broker_session_timeout=settings.kafka.session_timeout_s,
        broker_heartbeat_interval=settings.kafka.session_timeout_s / 5.0,
        consumer_auto_offset_reset="earliest",
        topic_partitions=settings.topics.partitions,
        topic_disable_leader=True,
        web_enabled=False,
        store=store,
        datadir=str(directory),
    )
    raw = {"key_type": bytes, "value_type": bytes, "key_serializer": "raw", "value_serializer": "raw"}
    events = app.topic(settings.topics.events, **raw)
    # Faust declares its table's changelog itself, but not a topic that an agent only sends to.
    new = NewTopic(f"stock-{run}-embeddings", settings.topics.partitions, 1)
    admin = AdminClient(client_config(settings))
    admin.create_topics([new])[new.topic].result(30)
    embeddings = app.topic(new.topic, partitions=settings.topics.partitions, **raw)
    states = app.Table("states", partitions=settings.topics.partitions, key_type=bytes, value_type=bytes)

    @app.agent(events)
    async def advance_states(stream: Any) -> None:
        async for event in stream.events():
            key = event.key
            states[key], embedding = step(key, event.value, event.message.offset, states.get(key))
            await embeddings.send(key=key, value=embedding)
            count.events += 1

    return app


async def _measure(app: faust.App, count: _Count, seconds: float, warm_up_events: int) -> dict[str, float]:
    app.finalize()
    await app.start()
    deadline = time.monotonic() + 120.0
    while count.events < warm_up_events:
        if time.monotonic() > deadline or app.crashed:
            raise SystemExit(f"the stock agent applied {count.events} events and no more: {app.crash_reason}")
        await asyncio.sleep(0.05)
    before, started, cpu = count.events, time.perf_counter(), cpu_seconds(os.getpid())
    await asyncio.sleep(seconds)
    events, wall = count.events - before, time.perf_counter() - started
    used = cpu_seconds(os.getpid()) - cpu
    return {"events_per_s": events / wall, "events_per_cpu_s": events / used, "events": events, "seconds": wall}


def main() -> None:
    """Measure, and print the result as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--warm-up-events", type=int, default=1000)
    parser.add_argument("--store", default="rocksdb://", choices=["memory://", "rocksdb://"])
    parser.add_argument("--directory", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = load(options.settings)
    layout = Layout.compile(settings, Schema.compile(settings))
    count = _Count()
    app = make_app(settings, Step(layout, random_parameters(layout)), count, options.store, options.directory)

    async def measure_and_leave() -> None:
        result = await _measure(app, count, options.seconds, options.warm_up_events)
        print(json.dumps({**result, "store": options.store}), flush=True)
        # Stopping Faust in order can take longer than the measurement, and nothing here is worth keeping.
        os._exit(0)

    asyncio.run(measure_and_leave())


if __name__ == "__main__":
    main()
