"""The insides of a table: rows between memory and disk, and the accounts kept of them.

Everything here runs under the store's lock. Guarantees: `rows` counts live keys wherever they are; a row leaves
memory only when disk holds it as it is, and if the changelog has not seen that state, disk remembers the key as
owed, in the same write. Does not decide when: the public class calls in.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stream.errors import StoreError
from stream.store import kernels, layout, rows
from stream.store.cold import Cold
from stream.store.disk import Batch, Disk, age_key
from stream.store.floor import Floor
from stream.store.hashing import hash_keys
from stream.store.keys import PackedKeys
from stream.store.lives import Lives
from stream.store.options import StoreOptions
from stream.store.sketch import Sketch
from stream.store.table import Hasher, Table

if TYPE_CHECKING:
    from stream.store.checkpoint import Checkpoint, Piece
    from stream.store.snapshot import Snapshot

__all__ = ["NEVER_MS", "NO_HORIZON", "Core"]

Int64 = npt.NDArray[np.int64]
Uint64 = npt.NDArray[np.uint64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]
Headers = npt.NDArray[np.void]

NEVER_MS = -(2**62)
NO_HORIZON = -(2**63)
_SPILL_ROWS = 512  # at least so many at once: about 2 ms of disk writes
_COPIES = 10  # for each row in memory, at most so many copies of rows that left it
_NOT_LIVE = layout.DEAD | layout.WAITING


class Core:
    """State and inner operations of EmbeddingStore."""

    def __init__(self, disk: Disk | None, options: StoreOptions, hasher: Hasher | None) -> None:
        self.options = options
        self.lock = threading.RLock()
        self.disk = disk
        # Untouched memory costs nothing, so a table reserves what it may need and hardly ever moves.
        reserve = options.reserve_rows
        if options.memory_rows is not None:
            reserve = options.memory_rows + min(options.memory_rows // 8, 1 << 16) + 1024
        self.lives = Lives(options.ttl_ms, options.event_ttls_ms)
        self.table = Table(options.width + options.state_width, reserve, options.hash_seed, hasher, lives=self.lives)
        self.floor = Floor(self)
        self.is_open = True
        self.updating = False
        self.open_checkpoint: Checkpoint | None = None
        self.snapshot: Snapshot | None = None
        self.watermark = NEVER_MS
        self.horizon = NO_HORIZON
        self.rows = 0
        self.disk_rows = 0
        self.admitted = self.expired = self.capped = 0
        self.evicted = self.spilled = self.disk_reads = 0
        self.held_dropped = 0
        self.sketch: Sketch | None = None
        if options.admission_mode == "sketch" and options.admission_threshold > 1:
            self.sketch = Sketch(options.sketch_keys, options.admission_threshold, options.init_seed)
        self.commits = 0
        # Of the entries put into disk's queue of ages: the cap and the sweep each reset theirs.
        self.lowest_age_ms = self.lowest_unswept_ms = 2**62
        # Keys of rows that ended outside the sweep and the cap, for the sweep to hand out.
        self.unreported: list[bytes] = []
        self.undo_waiting: dict[int, tuple[Int64, list[bytes]]] = {}
        # Slots of the last begin() whose rows started anew, in a table whose rows live differently long.
        self.restarted: Int64 = np.empty(0, np.int64)
        self.metas: dict[str, bytes] = {}
        self.cold: Cold | None = None
        copies = options.cold_rows if options.cold_rows is not None else _COPIES * (options.memory_rows or 0)
        if disk is not None and copies:
            floats = options.width + options.state_width
            self.cold = Cold(
                disk.path, floats, copies, options.hash_seed, hasher, self.lives, growing=options.cold_rows is None
            )
        # Only a table whose rows end by age or number needs the queue of ages.
        self.aged = disk is not None and (self.lives.longest_ms is not None or options.max_rows is not None)
        if disk is not None:
            for chunk in disk.items("meta"):
                self.metas.update({name.decode(): value for name, value in chunk})
            pages = {int(name[12:]): self.metas.pop(name) for name in list(self.metas) if _is_page(name)}
            if self.sketch is not None:
                self.sketch.load(pages)
            self.disk_rows = self.rows = int(self.metas.get("store.rows", b"0"))
            self.watermark = int(self.metas.get("store.watermark_ms", str(NEVER_MS).encode()))
            self.horizon = self._stored_horizon()
            if self.rows:
                self.floor.unknown()
            self.hold_horizon()
        if disk is not None and (
            self.aged != (self.metas.get("store.aged") == b"1") or self.lives.name != self._stored_lives()
        ):
            self._make_ages(disk)

    def _stored_lives(self) -> str:
        return self.metas.get("store.lives", b"").decode()

    def _stored_horizon(self) -> int:
        """The horizon of the last commit, as it is under the times to live of today."""
        horizon = int(self.metas.get("store.horizon_ms", str(NO_HORIZON).encode()))
        longest, stored = self.lives.longest_ms, self._stored_lives()
        if longest is None or horizon == NO_HORIZON:
            return NO_HORIZON
        if stored == self.lives.name:
            return horizon
        before = int(stored.split()[0]) if stored else self.options.ttl_ms
        return NO_HORIZON if before is None else horizon + before - longest

    def _make_ages(self, disk: Disk) -> None:
        """Make the queue of ages for rows that were written without one, or note that there is none from here on.

        Entries of before that are in another order are put right when they are met.
        """
        for chunk in disk.items("rows") if self.aged else ():
            batch = disk.batch()
            headers = rows.read_headers([value for _, value in chunk], self.origin)
            for (key, _), ms in zip(chunk, self.aged_of(headers).tolist(), strict=True):
                batch.put("ages", age_key(ms, key), b"")
            disk.write(batch)
        batch = disk.batch()
        self.metas["store.aged"] = b"1" if self.aged else b"0"
        batch.put("meta", b"store.aged", self.metas["store.aged"])
        if self.lives.name != self._stored_lives():
            self.metas["store.lives"] = self.lives.name.encode()
            self.metas["store.horizon_ms"] = str(self.horizon).encode()
            for name in ("store.lives", "store.horizon_ms"):
                batch.put("meta", name.encode(), self.metas[name])
        disk.write(batch)

    def aged_of(self, headers: Headers) -> Int64:
        """What Table.aged() is of rows in memory, of encoded ones by their headers."""
        last: Int64 = headers["last_event_ms"]
        return self.lives.aged(last, rows.lives_of(headers)) if self.lives.several else last

    @property
    def origin(self) -> str:
        """What errors call this table."""
        return f"store {self.disk.path}" if self.disk is not None else "store in memory"

    def check(self) -> None:
        """Raise StoreError unless open."""
        if not self.is_open:
            raise StoreError(f"{self.origin}: closed; open it again")

    def check_idle(self) -> None:
        """Raise StoreError unless open and outside update()."""
        self.check()
        if self.updating:
            raise StoreError(f"{self.origin}: inside update(); leave it first")

    # -- time ----------------------------------------------------------------------------------------------

    def advance(self, ms: int) -> None:
        """Move the watermark, and with it the horizon, forward."""
        if ms > self.watermark:
            self.watermark = ms
            self.hold_horizon()

    def hold_horizon(self) -> None:
        """Move the horizon to where watermark, time to live and floor have it."""
        if self.lives.longest_ms is not None:
            self.horizon = max(self.horizon, self.floor.limit(self.watermark - self.lives.longest_ms))

    def live_slots(self) -> Int64:
        """Slots of rows in memory, expired ones included, ascending."""
        used = self.table.used_slots()
        live: Int64 = used[(self.table.flags[used] & _NOT_LIVE) == 0]
        return live

    # -- making and ending rows ----------------------------------------------------------------------------

    def begin(self, keys: PackedKeys) -> tuple[Int64, Int64]:
        """Slots of keys, each with a row that is live or new, -1 where not admitted; and the slots made just now."""
        table = self.table
        hashes = table.hashes(keys)
        slots, missing = table.find(keys, hashes)
        made = np.empty(0, np.int64)
        threshold = self.options.admission_threshold
        if missing and threshold > 1:
            slots = self.bring_in(keys)
        elif missing:
            made = self._create(keys, hashes, slots, missing)
        self.touch(slots)
        if threshold > 1:
            self._note_waiting(slots)
        renewed = np.zeros(len(keys), np.bool_)
        revived, admitted, expired = kernels.renew(
            table.records,
            table.rows,
            slots,
            self.horizon,
            threshold,
            self.lives.mask,
            self.lives.default_lag,
            renewed,
        )
        self.rows += revived
        self.admitted += admitted
        self.expired += expired
        self.restarted = self.restarted[:0]
        if revived or expired:
            at = np.flatnonzero(renewed)
            if self.lives.several:
                self.restarted = slots[at]
            for slot in slots[at].tolist() if table.held else ():
                table.held.pop(slot, None)
            self.initialise(keys, at, slots[at])
        return slots, made

    def _note_waiting(self, slots: Int64) -> None:
        """Keep what a failed update must give back to the waiting keys that it admits."""
        table = self.table
        known = np.unique(slots[slots >= 0])
        waiting = known[(table.flags[known] & layout.WAITING) != 0].tolist()
        self.undo_waiting = {slot: (table.account(np.array([slot])), table.held.get(slot, [])) for slot in waiting}

    def _create(self, keys: PackedKeys, hashes: Uint64, slots: Int64, missing: int) -> Int64:
        """Make slots for missing keys, from disk where it has them; returns those that are new rows."""
        created = self.table.insert(keys, hashes, slots, missing)
        new = slots[created]
        if self.disk is not None:
            warm = self._thaw(keys.take(created), hashes[created], new)
            created, new = created[~warm], new[~warm]
            at, values = self.stored(keys.take(created))
            if values:
                self.load(new[at], values)
                known = np.zeros(new.shape[0], np.bool_)
                known[at] = True
                created, new = created[~known], new[~known]
        self.rows += int(new.shape[0])
        self.admitted += int(new.shape[0])
        self.initialise(keys, created, new)
        return new

    def end_untouched(self) -> None:
        """Let rows that begin() started anew, and that nothing was then applied to, be as old as a row can be.

        A replay begins the row of a client that had ended, and passes over the events from before its end. Nothing
        else would end the row again where a new one lives for ever.
        """
        slots, table = self.restarted, self.table
        if slots.shape[0]:
            # Without an offset nothing can have been passed over.
            empty = (table.events_seen[slots] == 0) & (table.last_event_ms[slots] == 0)
            slots = slots[empty & (table.applied_offset[slots] >= 0)]
            self.lives.write(table.records, slots, np.full(slots.shape[0], self.lives.shortest_lag))

    def initialise(self, keys: PackedKeys, at: Int64, slots: Int64) -> None:
        """Draw the vectors of new rows, at slots, from their keys, at `at` of keys, where the table asks for that."""
        if self.options.init_scale and slots.shape[0]:
            keys = keys.take(at)
            hashes = hash_keys(keys.buffer, keys.offsets, np.uint64(self.options.init_seed))
            kernels.initialise(self.table.rows, self.options.width, slots, hashes, self.options.init_scale)

    def touch(self, slots: Int64) -> None:
        """To be told before rows at slots change or leave."""
        if self.snapshot is not None:
            self.snapshot.save(slots)

    def release(self, slots: Int64) -> None:
        """Free slots."""
        self.touch(slots)
        self.floor.leaving(slots)
        self.table.remove(slots)

    def kill(self, slots: Int64) -> None:
        """Turn rows and waiting keys at distinct slots, none dead yet, into tombstones for the next checkpoint."""
        if not slots.shape[0]:
            return
        table = self.table
        self.touch(slots)
        self.rows -= int(((table.flags[slots] & layout.WAITING) == 0).sum())
        self.floor.ending(slots)
        if self.disk is None and not self.options.changelog:
            self.floor.leaving(slots)
            table.remove(slots)
            return
        table.flags[slots] = (table.flags[slots] & np.uint8(0xFF ^ layout.WAITING)) | layout.DEAD
        for slot in slots.tolist() if table.held else ():
            table.held.pop(slot, None)
        table.mark(slots)

    def end_on_disk(self, batch: Batch, keys: list[bytes], accounts: Int64, admitted: int) -> None:
        """Turn records that are on disk alone into tombstones owed to the changelog, and write the batch.

        keys are distinct, accounts int64[n, 4] theirs; `admitted` of them are rows.
        """
        assert self.disk is not None
        for key, value in zip(keys, rows.encode_headers(accounts, rows.TOMBSTONE), strict=True):
            batch.put("rows", key, value)
            batch.put("owed", key, b"")
        count = self.disk_rows - admitted
        batch.put("meta", b"store.rows", str(count).encode())
        self.disk.write(batch)
        self.disk_rows = count
        self.rows -= admitted
        self.expired += admitted
        if self.cold is not None and len(self.cold):
            packed = PackedKeys.from_list(keys)
            self.cold.drop(packed, self.table.hashes(packed))

    def note_age(self, ms: int) -> None:
        """To be told of entries put into disk's queue of ages."""
        self.lowest_age_ms = min(self.lowest_age_ms, ms)
        self.lowest_unswept_ms = min(self.lowest_unswept_ms, ms)

    # -- from disk -----------------------------------------------------------------------------------------

    def stored(self, keys: PackedKeys) -> tuple[Int64, list[bytes]]:
        """Positions of keys that disk has something for, and what it has."""
        assert self.disk is not None
        values = self.disk.get(keys.to_list())
        self.disk_reads += len(values)
        at = [i for i, value in enumerate(values) if value is not None]
        return np.array(at, np.int64), [value for value in values if value is not None]

    def _thaw(self, keys: PackedKeys, hashes: Uint64, slots: Int64) -> Bool:
        """Fill new slots of distinct keys from their cold copies, which end; bool[n], true where there was one."""
        filled = np.zeros(len(keys), np.bool_)
        if self.cold is not None and len(self.cold):
            at, account, floats = self.cold.take(keys, hashes)
            self.table.set_account(slots[at], account)
            self.table.rows[slots[at]] = floats
            self.table.flags[slots[at]] |= layout.ON_DISK | layout.AGED
            filled[at] = True
        return filled

    def load(self, slots: Int64, values: list[bytes]) -> None:
        """Fill new slots from records on disk, of whatever kind."""
        table = self.table
        headers = rows.read_headers(values, self.origin)
        kinds = headers["kind"]
        # A tombstone's applied_offset stays with the key: a replay must not build the deleted row again.
        table.set_account(slots, rows.accounts(headers))
        table.flags[slots] |= layout.AGED
        is_row = kinds == rows.ROW
        if is_row.any():
            chosen = [value for value, row in zip(values, is_row.tolist(), strict=True) if row]
            _, floats = rows.decode_rows(chosen, self.options.width, self.options.state_width, self.origin)
            table.rows[slots[is_row]] = floats
            table.flags[slots[is_row]] |= layout.ON_DISK
        table.flags[slots[kinds == rows.TOMBSTONE]] |= layout.DEAD
        for i in np.flatnonzero(kinds == rows.WAITING).tolist():
            table.flags[slots[i]] |= layout.WAITING
            table.held[int(slots[i])] = rows.unpack_held(values[i][rows.HEADER_BYTES :])

    def read_rows(self, keys: PackedKeys) -> tuple[Int64, Int64, Float32]:
        """Rows on disk, expired ones too: positions int64[m], account int64[m, 4], floats float32[m, ...]."""
        at, values = self.stored(keys)
        if values:
            is_row = rows.read_headers(values, self.origin)["kind"] == rows.ROW
            if not is_row.all():
                values = [value for value, row in zip(values, is_row.tolist(), strict=True) if row]
                at = at[is_row]
        account, floats = rows.decode_rows(values, self.options.width, self.options.state_width, self.origin)
        return at, account, floats

    def promote(self, keys: PackedKeys, hashes: Uint64, account: Int64, floats: Float32) -> None:
        """Give rows that were read from disk, whose keys are not in memory, slots."""
        slots = np.full(len(keys), -1, np.int64)
        created = self.table.insert(keys, hashes, slots, len(keys))
        target = slots[created]
        self.table.set_account(target, account[created])
        self.table.rows[target] = floats[created]
        self.table.flags[target] |= layout.ON_DISK | layout.AGED

    def bring_in(self, keys: PackedKeys) -> Int64:
        """Slots, int64[n], of keys in memory or, as they are, on disk; -1 where there is neither."""
        hashes = self.table.hashes(keys)
        slots, missing = self.table.find(keys, hashes)
        if missing and self.disk is not None:
            absent = np.flatnonzero(slots < 0)
            if self.cold is not None and len(self.cold):
                at, account, floats = self.cold.take(keys.take(absent), hashes[absent])
                at = absent[at]
                self.promote(keys.take(at), hashes[at], account, floats)
                slots, _ = self.table.find(keys, hashes)
                absent = np.flatnonzero(slots < 0)
            at, values = self.stored(keys.take(absent))
            if values:
                at = absent[at]
                new = np.full(at.shape[0], -1, np.int64)
                created = self.table.insert(keys.take(at), hashes[at], new, at.shape[0])
                self.load(new[created], [values[i] for i in created.tolist()])
                slots[at] = new
        return slots

    # -- to disk -------------------------------------------------------------------------------------------

    def encode(self, slots: Int64) -> list[bytes | None]:
        """Records at slots: rows, waiting keys with their held events, None for the dead."""
        flags = self.table.flags[slots]
        if not (flags & _NOT_LIVE).any():
            floats = self.table.rows.take(slots, axis=0)
            return list(rows.encode_rows(self.table.account(slots), floats, self.options.width))
        out: list[bytes | None] = [None] * slots.shape[0]
        live = np.flatnonzero((flags & _NOT_LIVE) == 0)
        floats = self.table.rows[slots[live]]
        for i, row in zip(
            live.tolist(), rows.encode_rows(self.table.account(slots[live]), floats, self.options.width), strict=True
        ):
            out[i] = row
        waiting = np.flatnonzero(flags & layout.WAITING)
        headers = rows.encode_headers(self.table.account(slots[waiting]), rows.WAITING)
        for i, header in zip(waiting.tolist(), headers, strict=True):
            out[i] = header + rows.pack_held(self.table.held.get(int(slots[i]), ()))
        return out

    def make_room(self) -> None:
        """Bring memory down to memory_rows: clean rows leave; dirty ones are spilled where those are too few."""
        limit = self.options.memory_rows
        table = self.table
        if limit is None or len(table) <= limit:
            return
        excess = len(table) - limit
        pinned, pinned_unsaved = self.floor.pinned()
        unsaved = table.unsaved - pinned_unsaved
        clean = len(table) - table.unsaved - (pinned - pinned_unsaved)
        if clean < excess + limit // 16:
            # With few clean rows a search for them walks the whole table, so some more are spilled than must go.
            victims = self._spill(min(unsaved, max(excess, _SPILL_ROWS)))
            excess = max(len(table) - limit, 0)
            victims = victims[:excess]
            if victims.shape[0] < excess:
                victims = table.choose_victims(excess, spill=False)
        else:
            victims = table.choose_victims(excess, spill=False)
        if self.cold is not None:
            self._freeze(victims)
        self.release(victims)
        self.evicted += int(victims.shape[0])

    def _freeze(self, slots: Int64) -> None:
        """Keep copies of clean rows that leave memory."""
        assert self.cold is not None
        live = slots[(self.table.flags[slots] & _NOT_LIVE) == 0]
        keys = self.table.keys(live)
        self.cold.put(keys, self.table.hashes(keys), self.table.account(live), self.table.rows[live])

    def _spill(self, wanted: int) -> Int64:
        """Write unsaved rows to disk as owed to the changelog; returns those still in memory, now clean."""
        assert self.disk is not None
        table = self.table
        slots = table.choose_victims(wanted, spill=True)
        keys = table.keys(slots).to_list()
        flags = table.flags[slots]
        dead = (flags & layout.DEAD) != 0
        live = (flags & _NOT_LIVE) == 0
        on_disk = (flags & layout.ON_DISK) != 0
        encoded = self.encode(slots)
        tombstones = iter(rows.encode_headers(table.account(slots[dead]), rows.TOMBSTONE))
        batch = self.disk.batch()
        times = table.aged(slots).tolist()
        aged = ((flags & layout.AGED) != 0).tolist()
        for key, value, known, ms in zip(keys, encoded, aged, times, strict=True):
            batch.put("rows", key, next(tombstones) if value is None else value)
            batch.put("owed", key, b"")
            if not known and self.aged:
                batch.put("ages", age_key(ms, key), b"")
                self.note_age(ms)
        count = self.disk_rows + int((live & ~on_disk).sum()) - int((~live & on_disk).sum())
        batch.put("meta", b"store.rows", str(count).encode())
        self.disk.write(batch)
        self.disk_rows = count
        self.spilled += len(keys)
        if self.open_checkpoint is not None:
            self.open_checkpoint.leaving(slots)
            self.open_checkpoint.spilled.update(keys)
        table.flags[slots] = (table.flags[slots] & np.uint8(0xFF ^ layout.ON_DISK)) | layout.AGED
        table.flags[slots[live]] |= layout.ON_DISK
        table.clean(slots)
        table.clear_bits(table.dirty, slots)
        self.release(slots[dead])
        kept: Int64 = slots[~dead]
        return kept

    def settle(self, checkpoint: Checkpoint, piece: Piece, slots: Int64, meta: Mapping[str, bytes] | None) -> None:
        """Write one piece of a checkpoint, the last one with meta, and settle the accounts of its slots."""
        table = self.table
        flags = table.flags[slots]
        tomb = (flags & layout.TOMB) != 0
        on_disk = (flags & layout.ON_DISK) != 0
        metas: dict[str, bytes] = {}
        if meta is not None:
            metas = {"user." + name: bytes(value) for name, value in meta.items()}
            metas["store.watermark_ms"] = str(checkpoint.watermark_ms).encode()
            metas["store.horizon_ms"] = str(checkpoint.horizon_ms).encode()
        if self.disk is not None:
            batch = piece.batch
            assert batch is not None
            count = self.disk_rows + int((~tomb & ~on_disk).sum()) - int((tomb & on_disk).sum())
            metas["store.rows"] = str(count).encode()
            # What was spilled after it was given out is newer than what the batch holds.
            again = sorted(checkpoint.spilled.intersection(piece.keys)) if checkpoint.spilled else []
            for key, value in zip(again, self.disk.get(again), strict=True):
                assert value is not None
                batch.put("rows", key, value)
                batch.put("owed", key, b"")
            for name, value in metas.items():
                batch.put("meta", name.encode(), value)
            for page, data in checkpoint.pages.items() if meta is not None else ():
                batch.put("meta", f"store.sketch{page}".encode(), data)
            self.disk.write(batch)
            self.disk_rows = count
            table.flags[slots[~tomb]] |= layout.ON_DISK
            table.flags[slots[tomb]] &= np.uint8(0xFF ^ layout.ON_DISK)
            table.flags[slots] |= layout.AGED
            if slots.shape[0]:
                self.note_age(int(table.aged(slots).min()))
        self.metas.update(metas)
        table.flags[slots] &= np.uint8(0xFF ^ layout.TOMB)
        table.clear_bits(table.pending, slots)
        settled = ~table.test_bits(table.dirty, slots)
        table.clean(slots[settled])
        self.release(slots[settled & ((flags & layout.DEAD) != 0)])
        self.commits += 1


def _is_page(name: str) -> bool:
    return name.startswith("store.sketch")
