"""A deterministic 64-bit hash of a category's bytes.

FNV-1a (Fowler, Noll, Vo; offset basis 0xcbf29ce484222325, prime 0x100000001b3), whose weak high bits are then
mixed by the finaliser of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
2014).

Guarantees: the same bytes give the same hash in every process, on every platform and in every release, so
hashes may be kept on disk. Not guaranteed: freedom from collisions, above all ones made on purpose; where
two values must never be confused, compare their bytes.
"""

from __future__ import annotations

from typing import Final

__all__ = ["hash_bytes"]

_ALL: Final = 0xFFFFFFFFFFFFFFFF


def hash_bytes(data: bytes) -> int:
    """The hash of one value, 0 to 2**64 - 1; equals what the event decoder puts in `category_hash`."""
    h = 0xCBF29CE484222325
    for byte in data:
        h = ((h ^ byte) * 0x100000001B3) & _ALL
    h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & _ALL
    h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & _ALL
    return h ^ (h >> 31)
