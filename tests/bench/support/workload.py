"""The events every bench runs on: records of six fields, 105 bytes each, of many clients.

Records are made in arrays from one encoded template, so filling a topic costs little more than producing. They are
ordinary records: any MessagePack library reads them and the worker's decoder validates them like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgpack
import numpy as np
from confluent_kafka import Producer
from numpy.typing import NDArray

from stream.kafka import producer_config
from stream.model.layout import Layout
from stream.model.parameters import ParameterSet
from stream.partitioner import partitions_of
from stream.settings import Settings
from tests.support.trunk import random_trunk

__all__ = ["EPOCH_MS", "Workload", "random_parameters", "settings_text"]

#: Event times begin here and rise by one millisecond an event.
EPOCH_MS = 1_700_000_000_000
_CODES = 256
_FIRST_CODE = 4000
_CHUNK = 50_000
_WAYS = (b"pos", b"net", b"atm", b"p2p")
_CURRENCIES = (b"EUR", b"USD", b"GBP", b"SEK")
_SLOTS = 16


def settings_text(memory_floats: int = 0) -> str:
    """The settings file: one modality of six fields, and as many decayed floats beside the hidden state.

    memory_floats: a multiple of 16: sums of the amount by 16 groups of categories at one half-life each.
    """
    if memory_floats % _SLOTS:
        raise ValueError(f"memory_floats = {memory_floats}: expected a multiple of {_SLOTS}")
    declared = ", ".join(f'"{_FIRST_CODE + i}"' for i in range(_SLOTS - 1))
    memories = [
        f'[[memory]]\nname = "spend_{i}"\nmodality = "buy"\nkind = "sum"\nfield = "amt"\nby = "mcc"\n'
        f"half_life_s = {3600 * (i + 1)}\n"
        for i in range(memory_floats // _SLOTS)
    ]
    return (
        "[modalities.buy.fields]\n"
        'amt = { type = "number", min = 0, max = 1_000_000 }\n'
        'n = { type = "number" }\n'
        f'mcc = {{ type = "category", embedding = 8, values = [{declared}] }}\n'
        'way = { type = "category", embedding = 4 }\n'
        'web = { type = "category", embedding = 2 }\n'
        'cur = { type = "category", embedding = 4 }\n\n' + "\n".join(memories)
    )


def random_parameters(layout: Layout) -> ParameterSet:
    """A trunk that knows every category value of the workload; the same whenever it is made."""
    values = {
        "buy.mcc": [str(_FIRST_CODE + i).encode() for i in range(_CODES)],
        "buy.way": list(_WAYS),
        "buy.web": [b"false", b"true"],
        "buy.cur": list(_CURRENCIES),
    }
    return random_trunk(layout, seed=0, values=values)


@dataclass(frozen=True)
class Workload:
    """Which clients send events: uniformly, or by Zipf's law with exponent 1.2 (a fifth from one client)."""

    clients: int = 100_000
    zipf: bool = False
    seed: int = 7

    @property
    def record_bytes(self) -> int:
        """Size of one record's value."""
        return len(self._template()[0])

    def fill(self, settings: Settings, events: int) -> None:
        """Write events to the events topic and wait until all of them are confirmed."""
        producer = Producer(producer_config(settings, linger_ms=20, queue_buffering_max_messages=500_000))
        topic = settings.topics.events
        for keys, values, partitions in self.chunks(events, settings.topics.partitions):
            for key, value, partition in zip(keys, values, partitions, strict=True):
                while True:
                    try:
                        producer.produce(topic, value=value, key=key, partition=partition)
                        break
                    except BufferError:
                        producer.poll(0.1)
            producer.poll(0)
        if producer.flush(300):
            raise RuntimeError("the events were not confirmed")

    def chunks(self, events: int, partitions: int) -> Iterator[tuple[list[bytes], list[bytes], list[int]]]:
        """(keys, values, partitions) of the same events in the same order at every call."""
        rng = np.random.default_rng(self.seed)
        template, at = self._template()
        digits = len(str(self.clients - 1))
        weights = np.cumsum(1.0 / np.arange(1, self.clients + 1) ** 1.2) if self.zipf else None
        names = rng.permutation(self.clients)
        for begin in range(0, events, _CHUNK):
            n = min(_CHUNK, events - begin)
            if weights is None:
                client = rng.integers(0, self.clients, n)
            else:
                client = names[np.searchsorted(weights, rng.random(n) * weights[-1])]
            records = np.tile(np.frombuffer(template, np.uint8), (n, 1))
            for digit in range(digits):
                shown = (client // 10 ** (digits - 1 - digit)) % 10 + ord("0")
                records[:, at["client"] + 1 + digit] = shown
            _big_endian(records, at["timestamp"], (EPOCH_MS + begin + np.arange(n)).astype(">u8"))
            _big_endian(records, at["amount"], np.round(rng.exponential(40.0, n), 2).astype(">f8"))
            records[:, at["count"]] = rng.integers(1, 10, n)
            _big_endian(records, at["code"], (_FIRST_CODE + rng.integers(0, _CODES, n)).astype(">u2"))
            records[:, at["web"]] = 0xC2 + rng.integers(0, 2, n)
            for name, words in (("way", _WAYS), ("currency", _CURRENCIES)):
                chosen = np.frombuffer(b"".join(words), np.uint8).reshape(-1, 3)[rng.integers(0, len(words), n)]
                records[:, at[name] : at[name] + 3] = chosen
            ids = np.ascontiguousarray(records[:, at["client"] : at["client"] + 1 + digits])
            where = partitions_of(ids.reshape(-1), np.arange(n + 1, dtype=np.int64) * (1 + digits), partitions)
            yield _rows(ids), _rows(records), where.tolist()

    def _template(self) -> tuple[bytes, dict[str, int]]:
        client = "c" + "7" * len(str(self.clients - 1))
        fields = {"amt": 1.5, "n": 3, "mcc": 0x7A7A, "way": "WAY", "web": True, "cur": "CUR"}
        event = {"client_id": client, "timestamp_ms": 2**63, "modality": "buy", "fields": fields}
        record: bytes = msgpack.packb(event)
        after = {"timestamp": b"timestamp_ms\xcf", "amount": b"amt\xcb", "count": b"\xa1n", "code": b"mcc\xcd"}
        at = {name: record.index(text) + len(text) for name, text in after.items()}
        at |= {
            "client": record.index(client.encode()),
            "web": record.index(b"web") + 3,
            "way": record.index(b"WAY"),
            "currency": record.index(b"CUR"),
        }
        return record, at


def _big_endian(records: NDArray[np.uint8], at: int, values: NDArray[np.generic]) -> None:
    width = values.dtype.itemsize
    records[:, at : at + width] = np.ascontiguousarray(values).view(np.uint8).reshape(-1, width)


def _rows(array: NDArray[np.uint8]) -> list[bytes]:
    width, data = array.shape[1], array.tobytes()
    return [data[i : i + width] for i in range(0, len(data), width)]
