"""What a table of the embedding store is asked to be, validated once.

Guarantees: every accepted combination can be kept; a wrong one is refused with the field, its value and what
would be accepted. Does not read files or the environment: the settings module fills it in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from stream.errors import StoreError
from stream.store.lives import FOR_EVER, MAX_SPREAD_MS

__all__ = ["StoreOptions"]


@dataclass(frozen=True)
class StoreOptions:
    """Options of one table.

    width: floats in a row's vector. state_width: floats of optimizer state beside it.

    memory_rows: rows kept in memory when there is a disk; more than that only for the length of one batch.
    cold_rows: copies of rows that left memory, in a scratch file beside the database (each about 60 bytes, the
    floats, and a key's bytes where it has more than 16) that the system pages in and out; reading one costs a tenth
    of a read from RocksDB. None: as many as leave memory, up to ten for each of memory_rows, while a tenth of the
    file system stays free; none without memory_rows. A number takes the room for so many at once; 0 takes none.
    block_cache_bytes: RocksDB's read cache. sync: fsync each commit, to survive power loss and not only a killed
    process. reserve_rows: address space to take at first where there is no memory_rows; a table that outgrows it
    is copied once into twice as much. changelog: keep deletions for checkpoint() in a table without a disk, too.

    ttl_ms: event time after which a row that was not updated is expired (age >= ttl); None keeps rows for ever.
    event_ttls_ms: other times that events may keep a row alive for, None for ever; a row then lives until the latest
    of its events' times with its own ttl after it. They and ttl_ms differ by four years (2^37 - 2 ms) at most.
    max_rows: hard cap on live rows, memory and disk together; those that would expire first go first, which with one
    ttl are those with the smallest last_event_ms.
    min_rows: expiry leaves at least this many of the rows that would expire last (with one ttl, of the most recently
    updated), which stay in memory; at most memory_rows. Exact as the floor module says.

    admission_threshold: a key gets its row on this occurrence. admission_mode: "exact" counts per key, "sketch"
    counts in fixed memory, 20 bytes for each of sketch_keys waiting keys (40 for thresholds above 255).
    max_held_bytes: bound on the events held for one waiting key; the oldest are dropped, and counted, beyond it.

    init_scale: a new row's vector is uniform in [-init_scale, init_scale), a function of key and init_seed alone.
    hash_seed: seed of the index's hash; never stored.
    """

    width: int
    state_width: int = 0
    memory_rows: int | None = None
    ttl_ms: int | None = None
    event_ttls_ms: tuple[int | None, ...] = ()
    max_rows: int | None = None
    min_rows: int = 0
    admission_threshold: int = 1
    admission_mode: Literal["exact", "sketch"] = "exact"
    sketch_keys: int = 1_000_000
    max_held_bytes: int = 1 << 20
    init_scale: float = 0.0
    init_seed: int = 0
    hash_seed: int = 0x5DEECE66D
    sync: bool = False
    block_cache_bytes: int = 64 << 20
    reserve_rows: int = 1 << 22
    changelog: bool = False
    cold_rows: int | None = None

    def __post_init__(self) -> None:
        self._at_least("width", self.width, 0)
        self._at_least("state_width", self.state_width, 0)
        self._at_least("min_rows", self.min_rows, 0)
        self._at_least("admission_threshold", self.admission_threshold, 1)
        self._at_least("sketch_keys", self.sketch_keys, 1)
        self._at_least("max_held_bytes", self.max_held_bytes, 1)
        self._at_least("block_cache_bytes", self.block_cache_bytes, 0)
        if self.cold_rows is not None:
            self._at_least("cold_rows", self.cold_rows, 0)
        self._at_least("reserve_rows", self.reserve_rows, 1)
        for name, value in (("memory_rows", self.memory_rows), ("ttl_ms", self.ttl_ms), ("max_rows", self.max_rows)):
            if value is not None:
                self._at_least(name, value, 1)
        ttls = [ttl for ttl in (self.ttl_ms, *self.event_ttls_ms) if ttl is not None]
        for ttl in self.event_ttls_ms:
            if ttl is not None:
                self._at_least("event_ttls_ms", ttl, 1)
                if ttl >= FOR_EVER:
                    raise self._refused("event_ttls_ms", ttl, f"less than {FOR_EVER}, or None for ever")
                if ttl > min(ttls) + MAX_SPREAD_MS:
                    raise self._refused(
                        "event_ttls_ms", ttl, f"at most {MAX_SPREAD_MS} above the shortest, {min(ttls)}"
                    )
        if self.event_ttls_ms and self.ttl_ms is not None and self.ttl_ms > min(ttls) + MAX_SPREAD_MS:
            raise self._refused("ttl_ms", self.ttl_ms, f"at most {MAX_SPREAD_MS} above the shortest, {min(ttls)}")
        if self.memory_rows is not None and self.memory_rows > 2**32 - 2**20:
            raise self._refused("memory_rows", self.memory_rows, f"at most {2**32 - 2**20}")
        if self.max_rows is not None and self.min_rows > self.max_rows:
            raise self._refused("min_rows", self.min_rows, f"at most max_rows ({self.max_rows})")
        if self.memory_rows is not None and self.min_rows > self.memory_rows:
            raise self._refused("min_rows", self.min_rows, f"at most memory_rows ({self.memory_rows})")
        if self.admission_mode not in ("exact", "sketch"):
            raise self._refused("admission_mode", self.admission_mode, '"exact" or "sketch"')
        if not 0.0 <= self.init_scale < float("inf"):
            raise self._refused("init_scale", self.init_scale, "a finite number of at least 0")
        for name, seed in (("init_seed", self.init_seed), ("hash_seed", self.hash_seed)):
            if not 0 <= seed < 2**63:
                raise self._refused(name, seed, "0 to 2^63 - 1")

    def _at_least(self, name: str, value: Any, least: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._refused(name, value, f"a whole number of at least {least}")

    @staticmethod
    def _refused(name: str, value: object, accepted: str) -> StoreError:
        return StoreError(f"store.{name}: {value!r} is not possible; accepted: {accepted}")
