"""Rows from a changelog, or from snapshots, into a table.

Guarantees: the result of records in order is that of the last record of each key, except that a row never gives
way to one with a smaller applied_offset; one call's records and meta reach the disk in one write. Rows go to disk,
not to memory, where there is a disk.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stream.errors import StoreError
from stream.store import layout, rows
from stream.store.core import Core
from stream.store.disk import age_key
from stream.store.keys import PackedKeys
from stream.store.sketch import page_number
from stream.store.snapshot import read_manifest, read_snapshot

__all__ = ["load_snapshot", "restore"]

_NOT_LIVE = layout.DEAD | layout.WAITING


def restore(core: Core, keys: Sequence[bytes], values: Sequence[bytes | None], meta: Mapping[str, bytes]) -> int:
    """Apply changelog records in order, straight to disk where there is one; returns how many took effect."""
    if core.sketch is not None:
        keys, values = _restore_pages(core, keys, values)
    at = _last_of_each(keys, values, core.origin)
    if len(at) != len(keys):
        keys = [keys[i] for i in at]
        values = [values[i] for i in at]
    packed = PackedKeys.from_list(keys)
    n = len(packed)
    table = core.table
    present = np.array([value is not None for value in values], np.bool_)
    headers = rows.read_headers([value for value in values if value is not None], "changelog")
    applied = np.full(n, np.iinfo(np.int64).max, np.int64)
    applied[present] = headers["applied_offset"]
    is_row = np.zeros(n, np.bool_)
    is_row[present] = headers["kind"] == rows.ROW
    times = np.zeros(n, np.int64)
    times[present] = core.aged_of(headers)
    stored = np.full(n, np.iinfo(np.int64).min, np.int64)
    row_on_disk = np.zeros(n, np.bool_)
    known = np.zeros(n, np.bool_)
    # Where disk's queue of ages has the key at most; a row deleted and made again by a late event is before that.
    queued = np.full(n, np.iinfo(np.int64).max, np.int64)
    if core.disk is not None:
        disk_at, disk_values = core.stored(packed)
        disk_headers = rows.read_headers(disk_values, core.origin)
        known[disk_at] = True
        stored[disk_at] = disk_headers["applied_offset"]
        queued[disk_at] = core.aged_of(disk_headers)
        row_on_disk[disk_at] = disk_headers["kind"] == rows.ROW
    was_live = row_on_disk.copy()
    if core.cold is not None and len(core.cold):
        core.cold.drop(packed, table.hashes(packed))
    slots, _ = table.find(packed, table.hashes(packed))
    held = np.flatnonzero(slots >= 0)
    stored[held] = table.applied_offset[slots[held]]
    was_live[held] = (table.flags[slots[held]] & _NOT_LIVE) == 0
    wins = applied >= stored
    core.rows += int((wins & is_row & ~was_live).sum()) - int((wins & ~is_row & was_live).sum())
    core.release(slots[held][wins[held]])
    metas = {"user." + name: bytes(value) for name, value in meta.items()}
    if core.disk is None:
        at_present = np.flatnonzero(wins & present)
        sub = packed.take(at_present)
        new = np.full(len(sub), -1, np.int64)
        table.insert(sub, table.hashes(sub), new, len(sub))
        core.load(new, [value for value in (values[i] for i in at_present.tolist()) if value is not None])
        table.flags[new] &= np.uint8(0xFF ^ (layout.ON_DISK | layout.AGED))
        core.floor.touched(new)
        core.metas.update(metas)
        return int(wins.sum())
    count = core.disk_rows + int((wins & is_row & ~row_on_disk).sum()) - int((wins & ~is_row & row_on_disk).sum())
    metas["store.rows"] = str(count).encode()
    batch = core.disk.batch()
    for i in np.flatnonzero(wins & (present | known)).tolist():
        value, key = values[i], keys[i]
        if value is None:
            batch.delete("rows", key)
        else:
            batch.put("rows", key, value)
        if known[i]:
            batch.delete("owed", key)
        if value is not None and core.aged and times[i] < queued[i]:
            batch.put("ages", age_key(int(times[i]), key), b"")
            core.note_age(int(times[i]))
    core.floor.stored(int(times[wins & is_row].max(initial=-(2**63))))
    core.commits += 1
    for name, value in metas.items():
        batch.put("meta", name.encode(), value)
    core.disk.write(batch)
    core.disk_rows = count
    core.metas.update(metas)
    return int(wins.sum())


def _restore_pages(
    core: Core, keys: Sequence[bytes], values: Sequence[bytes | None]
) -> tuple[list[bytes], list[bytes | None]]:
    """Take the sketch's pages out of changelog records; the others are returned."""
    assert core.sketch is not None
    pages: dict[int, bytes] = {}
    rest: list[int] = []
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        page = page_number(key)
        if page is None:
            rest.append(i)
        elif value is not None:
            pages[page] = value
    core.sketch.load(pages)
    if pages and core.disk is not None:
        batch = core.disk.batch()
        for page, data in pages.items():
            batch.put("meta", f"store.sketch{page}".encode(), data)
        core.disk.write(batch)
    return [keys[i] for i in rest], [values[i] for i in rest]


def _last_of_each(keys: Sequence[bytes], values: Sequence[bytes | None], origin: str) -> list[int]:
    """Position of the record of each key that stays: the last with the largest applied_offset since a deletion."""
    if len(keys) != len(values):
        raise StoreError(f"{origin}: restore of {len(keys)} keys with {len(values)} rows; one each is needed")
    at = {key: i for i, key in enumerate(keys)}
    if len(at) == len(keys):
        return list(range(len(keys)))
    best: dict[bytes, tuple[int, int]] = {}
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        if value is None:
            best[key] = (i, -(2**63))
            continue
        offset = int(rows.read_headers([value], "changelog")[0]["applied_offset"])
        if key not in best or offset >= best[key][1]:
            best[key] = (i, offset)
    return [i for i, _ in best.values()]


def load_snapshot(
    core: Core,
    directory: Path | str,
    keep: Callable[[PackedKeys], npt.NDArray[np.bool_]] | None,
    forget_offsets: bool,
) -> dict[str, bytes]:
    """Put the rows of a snapshot, those that `keep` wants, into an empty table; returns the snapshot's meta."""
    _, manifest, cells = read_manifest(directory)
    shape = (manifest["width"], manifest["state_width"])
    if shape != (core.options.width, core.options.state_width):
        raise StoreError(
            f"snapshot {directory}: width and state_width {shape}, the table's are "
            f"{(core.options.width, core.options.state_width)}; open the table with the snapshot's"
        )
    for keys, records in read_snapshot(directory):
        if keep is not None:
            wanted = np.flatnonzero(keep(PackedKeys.from_list(keys))).tolist()
            keys, records = [keys[i] for i in wanted], [records[i] for i in wanted]
        restore(core, keys, rows.without_offsets(records) if forget_offsets else records, {})
    if core.sketch is not None and cells:
        core.sketch.add(cells)
    written = manifest["ttl_ms"], manifest.get("event_ttls_ms", []), manifest["min_rows"]
    if written == (core.options.ttl_ms, list(core.options.event_ttls_ms), core.options.min_rows):
        core.watermark = max(core.watermark, int(str(manifest["watermark_ms"])))
        core.horizon = max(core.horizon, int(str(manifest["horizon_ms"])))
    core.advance(int(str(manifest["watermark_ms"])))
    meta = manifest["meta"]
    assert isinstance(meta, dict)
    return {name: base64.b64decode(value) for name, value in meta.items()}
