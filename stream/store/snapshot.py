"""A table as it was at one instant, written out while the table goes on changing.

Guarantees: every row and waiting key of the instant, bit for bit, and nothing later: a row that is about to change
is copied first. A snapshot directory always holds a whole snapshot: a new one is written beside it and takes its
place in one step. Loading verifies every byte. Does not lock the table beyond one chunk of rows at a time.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt

from stream.errors import StoreError
from stream.store import kernels, rows
from stream.store.faults import StoreCorrupt, explain
from stream.store.keys import PackedKeys
from stream.store.table import Table

if TYPE_CHECKING:
    from stream.store.core import Core

__all__ = ["Manifest", "Snapshot", "read_manifest", "read_snapshot"]

Int64 = npt.NDArray[np.int64]
Records = tuple[list[bytes], list[bytes]]
Manifest = dict[str, object]

_FORMAT = 1
_MAGIC = b"LSSN"
_CURRENT = "CURRENT"
_CHUNK_HEADER = 20


class Snapshot:
    """Made by EmbeddingStore.snapshot() between updates; use write() or export_parquet() from any thread, once."""

    def __init__(self, core: Core, meta: Mapping[str, bytes]) -> None:
        self._core = core
        self._table = core.table
        self._horizon = core.horizon
        if core.disk is None:
            used = core.table.used_slots()
            self._bits = np.zeros_like(core.table.dirty)
            core.table.set_bits(self._bits, used)
            self._iterator = None
        else:
            self._bits = core.table.dirty | core.table.pending
            self._iterator = core.disk.iterate("rows")
            self._iterator.seek_to_first()
        # Keys whose record on disk is older than the instant.
        self._overridden = Table(0, 1 << 16, core.options.hash_seed)
        self._saved: Records = ([], [])
        self._used = False
        self.manifest: Manifest = {
            "format": _FORMAT,
            "width": core.options.width,
            "state_width": core.options.state_width,
            "ttl_ms": core.options.ttl_ms,
            "event_ttls_ms": list(core.options.event_ttls_ms),
            "min_rows": core.options.min_rows,
            "watermark_ms": core.watermark,
            "horizon_ms": core.horizon,
            "meta": {name: base64.b64encode(value).decode() for name, value in meta.items()},
        }
        self._sketch = core.sketch.cells.tobytes() if core.sketch is not None else b""

    def close(self) -> None:
        """Let go of it, used or not."""
        with self._core.lock:
            if self._core.snapshot is self:
                self._core.snapshot = None
            self._iterator = None
            self._saved = ([], [])

    def save(self, slots: Int64) -> None:
        """Told by the store, under its lock, of slots that are about to change or to leave."""
        slots = slots[(slots >= 0) & (slots < self._bits.shape[0] * 64)]
        slots = np.unique(slots[self._table.test_bits(self._bits, slots)])
        if slots.shape[0]:
            keys, records = self._take(slots)
            self._saved[0].extend(keys)
            self._saved[1].extend(records)

    def _take(self, slots: Int64) -> Records:
        table = self._table
        table.clear_bits(self._bits, slots)
        packed = table.keys(slots)
        hashes = self._overridden.hashes(packed)
        found, missing = self._overridden.find(packed, hashes)
        self._overridden.insert(packed, hashes, found, missing)
        fresh = table.aged(slots) > self._horizon
        keys: list[bytes] = []
        records: list[bytes] = []
        for key, record, keep in zip(packed.to_list(), self._core.encode(slots), fresh.tolist(), strict=True):
            if record is not None and keep:
                keys.append(key)
                records.append(record)
        return keys, records

    def records(self, chunk_rows: int = 4096) -> Iterator[Records]:
        """(keys, encoded rows) of the instant, in chunks, each key once."""
        if self._used:
            raise StoreError("snapshot: used already; take another one")
        self._used = True
        out = np.empty(chunk_rows, np.int64)
        cursor = 0
        while True:
            with self._core.lock:
                self._core.check()
                cursor, count = kernels.next_set(self._bits, cursor, out)
                chunk = self._take(out[:count]) if count else self._saved
                if not count:
                    self._saved = ([], [])
            if chunk[0]:
                yield chunk
            if not count:
                break
        disk = self._core.disk
        while disk is not None and self._iterator is not None:
            with self._core.lock:
                self._core.check()
                entries = disk.walk(self._iterator, chunk_rows)
            if not entries:
                return
            chunk = self._current(entries)
            if chunk[0]:
                yield chunk

    def _current(self, entries: list[tuple[bytes, bytes]]) -> Records:
        """Those of entries from disk that are of the instant."""
        packed = PackedKeys.from_list([key for key, _ in entries])
        found, _ = self._overridden.find(packed, self._overridden.hashes(packed))
        headers = rows.read_headers([record for _, record in entries], self._core.origin)
        keep = (found < 0) & (headers["kind"] != rows.TOMBSTONE) & (self._core.aged_of(headers) > self._horizon)
        at = np.flatnonzero(keep).tolist()
        return [entries[i][0] for i in at], [entries[i][1] for i in at]

    def write(self, directory: Path | str) -> int:
        """Write to a snapshot directory, in the place of what it holds; returns the number of records.

        Raises StoreError naming the directory where that fails; what it held before then still loads.
        """
        root = Path(directory)
        try:
            root.mkdir(parents=True, exist_ok=True)
            previous = _current_name(root)
            name = f"{int(previous or '0') + 1:08d}"
            part = root / name
            if part.exists():
                shutil.rmtree(part)
            part.mkdir()
            with open(part / "rows", "wb") as file:
                count = sum(_write_chunk(file, keys, records) for keys, records in self.records())
                self.manifest |= {"records": count, "bytes": file.tell()}
                _sync(file)
            with open(part / "sketch", "wb") as file:
                file.write(self._sketch)
                self.manifest["sketch_crc"] = zlib.crc32(self._sketch)
                _sync(file)
            with open(part / "manifest.json", "wb") as file:
                file.write(json.dumps(self.manifest).encode())
                _sync(file)
            _sync_directory(part)
            with open(root / (_CURRENT + ".new"), "wb") as file:
                file.write(name.encode())
                _sync(file)
            os.replace(root / (_CURRENT + ".new"), root / _CURRENT)
            _sync_directory(root)
            for old in root.iterdir():
                if old.is_dir() and old.name != name:
                    shutil.rmtree(old)
        except OSError as error:
            raise explain(root, "writing a snapshot", error) from error
        finally:
            self.close()
        return count

    def export_parquet(self, path: Path | str) -> int:
        """Write the rows (without waiting keys) as a Parquet file, in the place of what is there.

        Columns: key (binary), events_seen, last_event_ms, applied_offset (int64), vector and, where the table has
        one, state (fixed-size lists of float32). Returns the number of rows. Needs pyarrow.
        """
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise StoreError("export: pyarrow is not installed; install livestate with its export extra") from error
        width, state_width = self._core.options.width, self._core.options.state_width
        fields = [pa.field("key", pa.binary(), nullable=False)]
        fields += [pa.field(name, pa.int64()) for name in ("events_seen", "last_event_ms", "applied_offset")]
        fields.append(pa.field("vector", pa.list_(pa.float32(), width)))
        if state_width:
            fields.append(pa.field("state", pa.list_(pa.float32(), state_width)))
        schema = pa.schema(fields, metadata={"watermark_ms": str(self.manifest["watermark_ms"])})
        target = Path(path)
        new = target.with_name(target.name + ".new")
        count = 0
        try:
            with pq.ParquetWriter(new, schema) as writer:
                for keys, records in self.records():
                    at = [i for i, record in enumerate(records) if record[1] == rows.ROW]
                    if not at:
                        continue
                    meta, floats = rows.decode_rows([records[i] for i in at], width, state_width, self._core.origin)
                    columns = [pa.array([keys[i] for i in at], pa.binary())]
                    columns += [pa.array(np.ascontiguousarray(meta[:, i])) for i in range(3)]
                    for first, size in ((0, width), (width, state_width)):
                        if size or not first:
                            cells = np.ascontiguousarray(floats[:, first : first + size]).reshape(-1)
                            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(cells), size))
                    writer.write_table(pa.Table.from_arrays(columns[: len(fields)], schema=schema))
                    count += len(at)
            with open(new, "rb+") as file:
                _sync(file)
            os.replace(new, target)
        except OSError as error:
            raise explain(target, "exporting", error) from error
        finally:
            self.close()
        return count


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_chunk(file: BinaryIO, keys: Sequence[bytes], records: Sequence[bytes]) -> int:
    lengths = np.fromiter(map(len, keys), "<u2", len(keys)).tobytes()
    sizes = np.fromiter(map(len, records), "<u4", len(records)).tobytes()
    body = b"".join([lengths, sizes, *keys, *records])
    header = _MAGIC + len(keys).to_bytes(4, "little") + len(body).to_bytes(8, "little")
    file.write(header + zlib.crc32(body, zlib.crc32(header)).to_bytes(4, "little"))
    file.write(body)
    return len(keys)


def _current_name(root: Path) -> str | None:
    current = root / _CURRENT
    return current.read_text().strip() if current.exists() else None


def _damaged(root: Path, what: str) -> StoreCorrupt:
    return StoreCorrupt(f"snapshot {root}: {what}; load another snapshot, or restore from the changelog")


def read_manifest(directory: Path | str) -> tuple[Path, Manifest, bytes]:
    """The directory of the current snapshot's files, its manifest, and the sketch's cells.

    Raises StoreCorrupt where there is no whole snapshot.
    """
    root = Path(directory)
    name = _current_name(root)
    if name is None:
        raise _damaged(root, f"there is no {_CURRENT} file, so no snapshot was ever finished here")
    part = root / name
    try:
        manifest: Manifest = json.loads((part / "manifest.json").read_text())
        sketch = (part / "sketch").read_bytes()
    except (OSError, ValueError) as error:
        raise _damaged(root, f"{name} is not readable ({error})") from error
    if manifest.get("format") != _FORMAT:
        raise _damaged(root, f"format {manifest.get('format')}; this version reads format {_FORMAT}")
    if zlib.crc32(sketch) != manifest["sketch_crc"]:
        raise _damaged(root, "the sketch fails its checksum")
    return part, manifest, sketch


def read_snapshot(directory: Path | str) -> Iterator[Records]:
    """(keys, encoded rows) of a snapshot, verified, in chunks. Raises StoreCorrupt where it is damaged."""
    part, manifest, _ = read_manifest(directory)
    root = Path(directory)
    count = 0
    try:
        file = open(part / "rows", "rb")  # noqa: SIM115
    except OSError as error:
        raise _damaged(root, f"rows are missing ({error})") from error
    with file:
        while header := file.read(_CHUNK_HEADER):
            if len(header) < _CHUNK_HEADER or header[:4] != _MAGIC:
                raise _damaged(root, f"no chunk of rows at byte {file.tell() - len(header)}")
            n = int.from_bytes(header[4:8], "little")
            body = file.read(int.from_bytes(header[8:16], "little"))
            if zlib.crc32(body, zlib.crc32(header[:16])) != int.from_bytes(header[16:20], "little"):
                raise _damaged(root, f"the rows before byte {file.tell()} fail their checksum")
            lengths = np.frombuffer(body, "<u2", n).astype(np.int64)
            sizes = np.frombuffer(body, "<u4", n, 2 * n).astype(np.int64)
            edges = np.concatenate([[6 * n], 6 * n + np.cumsum(np.concatenate([lengths, sizes]))]).tolist()
            parts = [body[a:b] for a, b in pairwise(edges)]
            yield parts[:n], parts[n:]
            count += n
    if count != manifest["records"]:
        raise _damaged(root, f"{count} rows where the manifest says {manifest['records']}")
