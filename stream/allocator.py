"""How the C library's allocator treats memory that arrays leave.

By default glibc gives large blocks back to the kernel as soon as they are free. A worker takes the same few megabytes
for each micro-batch, so it would have the kernel clear and map a thousand pages each time, which costs more than the
work done in them.

Guaranteed: memory kept back is bounded by the figures below for each of glibc's arenas (at most eight a core).
Where the C library is another one, nothing changes.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["keep_freed_memory"]

#: Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
#: Free memory at the end of an arena from which on it is given back.
_TRIM_BYTES = 64 * 1024 * 1024
#: Blocks from this size on are mapped one by one, and given back when freed.
_MAP_BYTES = 16 * 1024 * 1024
_USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Keep freed blocks for the next array; False where the environment or the C library decides otherwise."""
    if any(name in os.environ for name in _USERS_OWN):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MAP_BYTES) and mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES))
