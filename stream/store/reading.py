"""The part of a lookup that memory cannot answer: cold copies, then RocksDB.

Guarantees: what is found is live and whole. Rows read from disk are kept closer, in the scratch file where there is
one and otherwise in memory; a copy that is read often moves into memory. Nothing moves inside update().
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stream.store.core import Core
from stream.store.keys import PackedKeys

__all__ = ["read_tiers"]

Int64 = npt.NDArray[np.int64]
Uint64 = npt.NDArray[np.uint64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

_NO_ACCOUNT = np.empty((0, 4), np.int64)


def read_tiers(
    core: Core,
    keys: PackedKeys,
    hashes: Uint64,
    absent: Int64,
    vectors: Float32,
    found: Bool,
    meta: Int64,
) -> None:
    """Complete a lookup with rows that are not in memory, and bring in those that should be."""
    width = vectors.shape[1]
    hot = np.empty(0, np.int64)
    if core.cold is not None and len(core.cold):
        sub = keys.take(absent)
        copies = np.empty((absent.shape[0], width), np.float32)
        copies_meta = np.empty((absent.shape[0], 3), np.int64)
        known, live, often = core.cold.read(sub, hashes[absent], core.horizon, copies, copies_meta)
        vectors[absent[live]] = copies[live]
        meta[absent[live]] = copies_meta[live]
        found[absent[live]] = True
        hot, absent = absent[often], absent[~known]
    at, account, floats = absent, _NO_ACCOUNT, core.table.rows[:0]
    if absent.shape[0]:
        at, account, floats = core.read_rows(keys.take(absent))
        fresh = core.lives.aged(account[:, 1], account[:, 3]) > core.horizon
        at, account, floats = absent[at[fresh]], account[fresh], floats[fresh]
        vectors[at] = floats[:, :width]
        meta[at] = account[:, :3]
        found[at] = True
    # Inside update() nothing may move, and nobody could use the promoted row sooner anyway.
    if core.updating:
        return
    if hot.shape[0]:
        core.bring_in(keys.take(hot))
    if at.shape[0] and core.cold is not None:
        core.cold.put(keys.take(at), hashes[at], account, floats)
    elif at.shape[0]:
        core.promote(keys.take(at), hashes[at], account, floats)
    core.make_room()
