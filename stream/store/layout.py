"""How a table's records and index entries are laid out, for the compiled code and for those who read flags.

A record is six 64-bit words, so that one cache line answers a find:
  0, 1  the key's first 16 bytes, zero-padded; for a longer key word 1 is its place in `overflow`, in words
  2, 3, 4  events_seen, last_event_ms, applied_offset (int64); a free record's word 4 is the next free slot
  5  key length (11 bits; 0 is free), unused (5), flags (8), recency (8), tag (32)
Where rows live differently long, a lag takes the place of the tag, and its upper bits those of the unused five; see
`lives`. A removal then hashes the key again.
An index entry is (slot + 1) << 32 | tag, 0 where empty; the tag is the hash's upper half, and an entry's home
is tag * entries >> 32. Linear probing, and deletion by shifting back, so there are no tombstones to degrade it.
"""

from __future__ import annotations

RECORD_WORDS = 6
INLINE_BYTES = 16
LENGTH_BITS = 0x7FF

# Flags of a row in memory.
UNSAVED = 1  # RocksDB does not hold the row as it is now
ON_DISK = 2  # RocksDB holds a (maybe older) live row of this key
DEAD = 4  # deleted; the slot waits to become a tombstone
TOMB = 8  # the checkpoint being taken leaves no live row of this key on disk
WAITING = 16  # not admitted yet: events_seen counts occurrences, the floats mean nothing
AGED = 32  # disk has an entry for this key in its queue of ages
MET = 64  # an occurrence in the batch being counted was admitted; never set outside that
PINNED = 128  # one of the newest rows, which min_rows keeps in memory

# Slots of the counters array.
ALLOCATED = 0  # records ever handed out
FREE_HEAD = 1  # first free slot below that, -1 for none
LIVE = 2  # slots in use
OVERFLOW_TOP = 3  # words handed out in the overflow arena
OVERFLOW_FREE = 4  # of those, words in free lists
UNSAVED_ROWS = 5  # slots with UNSAVED set
COUNTERS = 8

# Recency is a small counter, not a bit: a row read once is evicted before one that is read often (GCLOCK).
RECENT = 3
