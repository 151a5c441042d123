"""Java's default partitioner: murmur2 of the key, so that clients in any language agree on a client's
partition.

Guarantees: `partition_of(key, n)` equals what a Java producer, or librdkafka's `murmur2` and
`murmur2_random`, choose for a key that is there. Not for records without a key: those go anywhere.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["murmur2", "partition_of", "partitions_of"]


@njit(cache=True, nogil=True)
def _hash(buffer, start, stop):  # type: ignore[no-untyped-def]
    # 64-bit arithmetic cut to 32 bits: numba widens products of 32-bit integers.
    low = np.uint64(0xFFFFFFFF)
    m = np.uint64(0x5BD1E995)
    length = stop - start
    h = np.uint64(0x9747B28C) ^ np.uint64(length)
    at = start
    while stop - at >= 4:
        k = (
            np.uint64(buffer[at])
            | (np.uint64(buffer[at + 1]) << np.uint64(8))
            | (np.uint64(buffer[at + 2]) << np.uint64(16))
            | (np.uint64(buffer[at + 3]) << np.uint64(24))
        )
        k = (k * m) & low
        k ^= k >> np.uint64(24)
        k = (k * m) & low
        h = ((h * m) & low) ^ k
        at += 4
    rest = stop - at
    if rest == 3:
        h ^= np.uint64(buffer[at + 2]) << np.uint64(16)
    if rest >= 2:
        h ^= np.uint64(buffer[at + 1]) << np.uint64(8)
    if rest >= 1:
        h ^= np.uint64(buffer[at])
        h = (h * m) & low
    h ^= h >> np.uint64(13)
    h = (h * m) & low
    h ^= h >> np.uint64(15)
    return h


@njit(cache=True, nogil=True)
def _partitions(buffer, offsets, partitions, out):  # type: ignore[no-untyped-def]
    for i in range(out.shape[0]):
        positive = _hash(buffer, offsets[i], offsets[i + 1]) & np.uint64(0x7FFFFFFF)
        out[i] = np.int32(positive % np.uint64(partitions))


def murmur2(key: bytes) -> int:
    """The signed 32-bit hash that `org.apache.kafka.common.utils.Utils.murmur2` gives for `key`."""
    unsigned = int(_hash(np.frombuffer(key, np.uint8), 0, len(key)))
    return unsigned - (1 << 32) if unsigned >> 31 else unsigned


def partition_of(key: bytes, partitions: int) -> int:
    """The partition of `key` in a topic of `partitions` partitions."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions


def partitions_of(buffer: NDArray[np.uint8], offsets: NDArray[np.int64], partitions: int) -> NDArray[np.int32]:
    """`partition_of` for packed keys: key i is `buffer[offsets[i]:offsets[i + 1]]`; returns int32[n]."""
    out = np.empty(len(offsets) - 1, np.int32)
    _partitions(buffer, offsets, partitions, out)
    return out
