"""The disk tier: one RocksDB database per table.

Column families: `rows` (key to encoded row), `owed` (keys whose state on disk the changelog has not seen),
`ages` (time and key, one entry per row at or before its real last_event_ms, or what lives puts in its place: a lazy
queue for expiry and the cap), `meta`.

Guarantees: a write is atomic; one process at a time; a directory that lost its files is refused, never taken for
a new one. After a failed write everything is refused until the store is opened anew. Does not survive power loss
beyond the last synced write unless options.sync is set, but what survives is a state that once was.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from rocksdict import (
    BlockBasedOptions,
    Cache,
    DataBlockIndexType,
    DBCompressionType,
    Env,
    Options,
    Rdict,
    RdictIter,
    ReadOptions,
    WriteBatch,
    WriteOptions,
)

from stream.errors import StoreError
from stream.store.faults import StoreLocked, corrupt, explain

__all__ = ["Batch", "Disk", "age_key", "split_age_key"]

_FAMILIES = ("rows", "owed", "ages", "meta")
_MARKER = "table.json"
_LOCK = "owner.lock"
_PROGRESS = "progress"
_FORMAT = 1
_SIGN = 1 << 63


def age_key(ms: int, key: bytes) -> bytes:
    """Key of the `ages` family, in order of time."""
    return (ms + _SIGN).to_bytes(8, "big") + key


def split_age_key(key: bytes) -> tuple[int, bytes]:
    """Inverse of age_key."""
    return int.from_bytes(key[:8], "big") - _SIGN, key[8:]


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


class Batch:
    """Writes that reach the disk together or not at all."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.raw = WriteBatch(raw_mode=True)

    def put(self, family: str, key: bytes, value: bytes) -> None:
        """Set one entry."""
        self.raw.put(key, value, self._disk.handles[family])

    def put_all(self, family: str, keys: Sequence[bytes], values: Sequence[bytes | None]) -> None:
        """Set one entry for each key, and remove those whose value is None."""
        put, handle = self.raw.put, self._disk.handles[family]
        for key, value in zip(keys, values, strict=True):
            if value is None:
                self.raw.delete(key, handle)
            else:
                put(key, value, handle)

    def delete(self, family: str, key: bytes) -> None:
        """Remove one entry."""
        self.raw.delete(key, self._disk.handles[family])

    def __len__(self) -> int:
        return int(self.raw.len())


class Disk:
    """An open database directory.

    Raises StoreLocked, StoreCorrupt, StoreFull, StoreReadOnly or StoreError, each naming the path.
    """

    def __init__(self, path: Path, width: int, state_width: int, *, sync: bool, block_cache_bytes: int) -> None:
        self.path = path
        self._broken: StoreError | None = None
        self._shape = {"format": _FORMAT, "width": width, "state_width": state_width}
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock_file = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise explain(path, "opening the directory", error) from error
        try:
            self._lock()
            fresh = self._check_marker()
            self._open(fresh, block_cache_bytes)
        except BaseException:
            os.close(self._lock_file)
            raise
        self._write_options = WriteOptions()
        self._write_options.sync = sync

    def _lock(self) -> None:
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(self._lock_file, 64, 0).decode(errors="replace").strip() or "another process"
            raise StoreLocked(
                f"store {self.path}: already open in {owner}; stop it, or give each table a directory of its own"
            ) from error
        os.ftruncate(self._lock_file, 0)
        os.pwrite(self._lock_file, f"process {os.getpid()}".encode(), 0)

    def _check_marker(self) -> bool:
        """Whether the directory is to be made anew. Refuses one that lost its files or is of another table."""
        marker = self.path / _MARKER
        names = {entry.name for entry in self.path.iterdir()} - {_LOCK}
        if not marker.exists():
            if names - {_MARKER + ".new"}:
                raise corrupt(self.path, f"holds {sorted(names)[0]!r} but no {_MARKER}, so it is not a whole table")
            self._write_marker("new")
            return True
        try:
            text = json.loads(marker.read_text())
            state = text.pop("state")
        except (ValueError, KeyError, AttributeError) as error:
            raise corrupt(self.path, f"{_MARKER} is not readable") from error
        if text != self._shape:
            raise StoreError(
                f"store {self.path}: written as {text}, opened as {self._shape}; use the widths it was written "
                "with, or another path"
            )
        if state == "new":
            # Nothing was ever committed: the last start was cut off while making the database.
            for name in names - {_MARKER}:
                entry = self.path / name
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            return True
        if "CURRENT" not in names:
            raise corrupt(self.path, "the database's CURRENT file is missing")
        return False

    def _write_marker(self, state: str) -> None:
        new = self.path / (_MARKER + ".new")
        try:
            with open(new, "w") as file:
                json.dump({**self._shape, "state": state}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self.path / _MARKER)
        except OSError as error:
            raise explain(self.path, "writing its marker", error) from error

    def _open(self, fresh: bool, block_cache_bytes: int) -> None:
        cache = Cache(max(block_cache_bytes, 1 << 20))
        families = {name: _options(fresh, cache, point=name == "rows") for name in _FAMILIES}
        try:
            self._db = Rdict(str(self.path), _options(fresh, cache, point=False), column_families=families)
            self._families = {name: self._db.get_column_family(name) for name in _FAMILIES}
            self.handles = {name: self._db.get_column_family_handle(name) for name in _FAMILIES}
        except Exception as error:
            raise explain(self.path, "opening the database", error) from error
        progress = self.path / _PROGRESS
        if fresh:
            self._write_marker("ready")
        elif progress.exists():
            words = progress.read_text().split()
            # After a reboot an unsynced tail may be gone, which is no damage; otherwise it is.
            if len(words) == 2 and words[1] == _boot_id() and self._db.latest_sequence_number() < int(words[0]):
                self._db.close()
                raise corrupt(self.path, "a write-ahead log file is missing or cut short, so committed rows are lost")
        self._progress = os.open(progress, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._boot = _boot_id()

    def _check(self) -> None:
        if self._broken is not None:
            raise self._broken

    def get(self, keys: Sequence[bytes], family: str = "rows") -> list[bytes | None]:
        """Values of keys, None where there is none."""
        self._check()
        if not keys:
            return []
        try:
            values: list[bytes | None] = self._families[family][list(keys)]
        except Exception as error:
            self._broken = explain(self.path, "reading", error)
            raise self._broken from error
        return values

    def batch(self) -> Batch:
        """A new, empty batch."""
        return Batch(self)

    def write(self, batch: Batch) -> None:
        """Apply a batch. After a failure the disk tier refuses everything."""
        self._check()
        try:
            self._db.write(batch.raw, self._write_options)
            text = f"{self._db.latest_sequence_number():020d} {self._boot}"
            os.pwrite(self._progress, text.encode(), 0)
        except Exception as error:
            self._broken = explain(self.path, "writing", error)
            raise self._broken from error

    def iterate(self, family: str) -> RdictIter:
        """An iterator over the family as it is now; it does not see later writes."""
        self._check()
        options = ReadOptions()
        options.set_verify_checksums(True)
        return self._families[family].iter(options)

    def walk(self, iterator: RdictIter, limit: int) -> list[tuple[bytes, bytes]]:
        """Up to `limit` entries from a positioned iterator, which moves on."""
        found: list[tuple[bytes, bytes]] = []
        try:
            while len(found) < limit and iterator.valid():
                found.append((iterator.key(), iterator.value()))
                iterator.next()
            iterator.status()
        except Exception as error:
            self._broken = explain(self.path, "reading", error)
            raise self._broken from error
        return found

    def items(self, family: str, chunk: int = 1024) -> Iterator[list[tuple[bytes, bytes]]]:
        """All entries of a family as it is now, in chunks."""
        iterator = self.iterate(family)
        iterator.seek_to_first()
        while found := self.walk(iterator, chunk):
            yield found

    def close(self) -> None:
        """Close the database and let go of the directory."""
        self.handles = {}
        for family in self._families.values():
            family.close()
        self._families = {}
        try:
            self._db.close()
        except Exception as error:
            raise explain(self.path, "closing", error) from error
        finally:
            os.close(self._progress)
            os.close(self._lock_file)


def _options(fresh: bool, cache: Cache, *, point: bool) -> Options:
    options = Options(raw_mode=True)
    options.create_if_missing(fresh)
    options.create_missing_column_families(fresh)
    options.set_paranoid_checks(True)
    # All families flush together, so one log is all there is to lose, and a lost one shows in the sequence number.
    options.set_atomic_flush(True)
    options.set_write_buffer_size(32 << 20)
    options.set_max_open_files(-1)
    options.set_keep_log_file_num(2)
    # Flushes and compactions yield to the thread that serves; a second memtable fills while one is written out.
    background = Env()
    background.lower_thread_pool_cpu_priority()
    background.lower_high_priority_thread_pool_cpu_priority()
    options.set_env(background)
    options.set_max_write_buffer_number(4)
    options.set_compression_type(DBCompressionType.none())
    table = BlockBasedOptions()
    table.set_block_cache(cache)
    table.set_format_version(5)
    if point:
        # New keys are the common case: a filter over the memtable saves the walk through it.
        options.set_memtable_whole_key_filtering(True)
        options.set_memtable_prefix_bloom_ratio(0.1)
        table.set_bloom_filter(10, False)
        table.set_block_size(4096)
        table.set_data_block_index_type(DataBlockIndexType.binary_and_hash())
    options.set_block_based_table_factory(table)
    return options
