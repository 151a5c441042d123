"""Fuzzed records among good ones: `python -m tests.fault.fuzz --records 1000000`, or `make fuzz SEED=7`.

A third of the records are good events. The others are random bytes, truncated or damaged events, deep nesting,
huge integers, wrong types, invalid UTF-8, duplicate fields, times far back and far ahead, and whatever else a
publisher may get wrong. The worker must apply exactly the good ones, dead-letter exactly the others with their
bytes and a reason, and hold as much memory at the end as after the first quarter.

Prints one line of JSON; exit code 1 where something was lost, doubled, changed, or memory grew.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgpack
import numpy as np

from stream.broker import EmbeddedBroker
from tests.bench.support.site import choose_broker
from tests.fault.play import finish
from tests.fault.site import Site
from tests.fault.source import JSON, Publisher, Record, Source
from tests.fault.verifier import Report, verify
from tests.support.processes import wait_for

__all__ = ["OVERRIDES", "FuzzOutcome", "Fuzzer", "fuzz"]

#: Event times jump about by decades: with a shorter time to live nearly every row would expire at once.
OVERRIDES = {"STORE__TTL_S": "1000000000", "WORKER__BATCH_RECORDS": "4096"}

#: How much larger the worker may be at the end than after a quarter of the records: a tenth, and as much as
#: allocators keep back.
RSS_SHARE = 0.10
RSS_BYTES = 32 * 1024 * 1024
_GOOD = 1 / 3


class Fuzzer(Source):
    """A source of records of which two thirds are bad."""

    def __init__(self, seed: int, clients: int = 400) -> None:
        super().__init__(seed, clients)
        self._makers: list[Callable[[Record], Record]] = [
            self._random_bytes, self._truncated, self._extended, self._flipped, self._nested, self._huge_integer,
            self._wrong_type, self._invalid_utf8, self._duplicate_field, self._far_time, self._missing,
            self._unknown, self._other_key, self._broken_json,
        ]  # fmt: skip

    def record(self) -> Record:
        """The next one."""
        good = self.event()
        if self._rng.random() < _GOOD:
            return good
        # Damage is done to MessagePack; JSON has a maker of its own.
        while good.headers is not None:
            good = self.event()
        return self._makers[int(self._rng.integers(len(self._makers)))](good)

    def _changed(self, good: Record, **changes: object) -> Record:
        return Record(good.key, msgpack.packb({**self._event_of(good), **changes}))

    @staticmethod
    def _event_of(good: Record) -> dict[str, object]:
        event: dict[str, object] = msgpack.unpackb(good.value)
        return event

    def _random_bytes(self, good: Record) -> Record:
        size = int(self._rng.choice([0, 1, 2, 7, 80, 3000]))
        return Record(good.key, self._rng.bytes(size))

    def _truncated(self, good: Record) -> Record:
        assert good.value is not None
        return Record(good.key, good.value[: int(self._rng.integers(len(good.value)))])

    def _extended(self, good: Record) -> Record:
        assert good.value is not None
        return Record(good.key, good.value + self._rng.bytes(int(self._rng.integers(1, 9))))

    def _flipped(self, good: Record) -> Record:
        """One byte is another: often no event any more, sometimes a different one."""
        assert good.value is not None
        damaged = bytearray(good.value)
        damaged[int(self._rng.integers(len(damaged)))] ^= int(self._rng.integers(1, 256))
        return Record(good.key, bytes(damaged))

    def _nested(self, good: Record) -> Record:
        depth = int(self._rng.choice([20, 600, 5000]))
        if self._rng.random() < 0.5:
            return Record(good.key, b"\x91" * depth + b"\xc0")
        return Record(good.key, (b"\x81\xa1a" * depth) + b"\xc0")

    def _huge_integer(self, good: Record) -> Record:
        huge = int(self._rng.choice(np.array([2**53 + 1, -(2**63), 2**63 - 1], np.int64)))
        if self._rng.random() < 0.3:
            return self._changed(good, timestamp_ms=2**64 - 1)
        return self._changed(good, modality="pay", fields={"amount": huge, "merchant": "fuel"})

    def _wrong_type(self, good: Record) -> Record:
        name = str(self._rng.choice(["client_id", "timestamp_ms", "modality", "fields"]))
        values: list[object] = [None, [1], {"a": 1}, 1.5, b"\x00", True]
        return self._changed(good, **{name: values[int(self._rng.integers(len(values)))]})

    def _invalid_utf8(self, good: Record) -> Record:
        bad = bytes(self._rng.integers(128, 192, 5, dtype=np.uint8))
        if self._rng.random() < 0.5:
            return Record(
                bad, msgpack.packb({**self._event_of(good), "client_id": "x"}).replace(b"\xa1x", b"\xa5" + bad)
            )
        fields = msgpack.packb({"product": "12345"}).replace(b"12345", bad)
        head = msgpack.packb({**self._event_of(good), "modality": "offer", "fields": {}})
        return Record(good.key, head[:-1] + fields)

    def _duplicate_field(self, good: Record) -> Record:
        packed = msgpack.packb(self._event_of(good))
        return Record(good.key, bytes([packed[0] + 1]) + packed[1:] + msgpack.packb("modality") + msgpack.packb("pay"))

    def _far_time(self, good: Record) -> Record:
        """Far back is a late event like any other; far ahead, or before time, is none."""
        far = int(self._rng.choice([1, 86_400_000, 4_000_000_000_000, 253_402_300_800_000, -1, 0]))
        return self._changed(good, timestamp_ms=far)

    def _missing(self, good: Record) -> Record:
        event = self._event_of(good)
        del event[str(self._rng.choice(sorted(event)))]
        return Record(good.key, msgpack.packb(event))

    def _unknown(self, good: Record) -> Record:
        if self._rng.random() < 0.5:
            return self._changed(good, modality="visit")
        return self._changed(good, note="what is this")

    def _other_key(self, good: Record) -> Record:
        return Record(None if self._rng.random() < 0.5 else b"somebody else", good.value)

    def _broken_json(self, good: Record) -> Record:
        texts = [b"{", b"[1,2]", b'{"client_id":"a"}', b"[" * 3000, b'"\\ud800"', b"NaN", b'{"a":1e999}', b"\xff\xfe"]
        return Record(good.key, texts[int(self._rng.integers(len(texts)))], JSON)


@dataclass(frozen=True)
class FuzzOutcome:
    """`rss_quarter`, `rss_end`: the worker's memory in bytes after the first quarter of the records and at the end."""

    records: int
    rss_quarter: int
    rss_end: int
    report: Report

    @property
    def problems(self) -> list[str]:
        """What is wrong, in words."""
        allowed = self.rss_quarter * (1 + RSS_SHARE) + RSS_BYTES
        if self.rss_end <= allowed:
            return self.report.problems
        grew = f"the worker grew from {self.rss_quarter >> 20} MiB to {self.rss_end >> 20} MiB"
        return [f"{grew}; {int(allowed) >> 20} MiB are allowed", *self.report.problems]


def fuzz(site: Site, records: int, seed: int) -> FuzzOutcome:
    """Send `records` fuzzed records through one worker, in quarters, and verify."""
    publisher = Publisher(site.settings, Fuzzer(seed), 0.0)
    worker = site.worker("a")
    worker.start()
    site.await_ready()
    sizes: list[int] = []
    for _ in range(4):
        publisher.publish(records // 4)
        site.await_applied(timeout_s=30 + records / 2000)
        # Under its own hand: after a checkpoint nothing is on its way.
        done = worker.metric("livestate_checkpoints_total")
        wait_for(lambda done=done: worker.metric("livestate_checkpoints_total") >= done + 4, 30, "checkpoints")
        sizes.append(worker.process.rss_bytes())
    assert not site.exits, f"the worker ended by itself: {site.exits}"
    finish(site)
    report = verify(site, aborted_are_hidden=not isinstance(site.broker, EmbeddedBroker))
    return FuzzOutcome(publisher.published, sizes[0], sizes[-1], report)


def main(arguments: list[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=1, help="draws the records (%(default)s)")
    parser.add_argument("--records", type=int, default=1_000_000, metavar="N", help="how many (%(default)s)")
    parser.add_argument("--broker", choices=("auto", "apache", "embedded"), default="auto")
    options = parser.parse_args(arguments)
    logging.getLogger("stream").setLevel(logging.CRITICAL + 1)
    with tempfile.TemporaryDirectory(prefix="livestate-fuzz-") as temporary:
        broker = choose_broker(options.broker, Path(temporary) / "broker")
        with broker, Site(broker, Path(temporary) / "site", **OVERRIDES) as site:
            outcome = fuzz(site, options.records, options.seed)
    for problem in outcome.problems:
        print(problem)
    figures = {"records": outcome.records, "rss_quarter": outcome.rss_quarter, "rss_end": outcome.rss_end}
    print(json.dumps({"seed": options.seed, "ok": not outcome.problems, **figures, **outcome.report.figures()}))
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
