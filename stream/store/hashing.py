"""Unaligned 64-bit loads, prefetch and the key hash, as compiled primitives.

Guarantees: the hash depends on every byte of the key, on its length and on the seed; equal keys hash equally
on every machine. Does not guarantee: freedom from collisions. Nothing in the store relies on that; the index
compares whole keys.
"""

# mypy: disable-error-code="import-untyped,import-not-found,untyped-decorator,no-untyped-call"
from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from stream.borrowing import borrowing

__all__ = ["LINE", "hash_keys", "hash_one", "load_tail", "load_word", "prefetch"]

#: float32 in a cache line.
LINE = 16
_K1 = np.uint64(0x9E3779B97F4A7C15)
_K2 = np.uint64(0xD6E8FEB86659FD93)
_K3 = np.uint64(0xFF51AFD7ED558CCD)


@intrinsic
def load_word(typingctx: Any, array: Any, index: Any) -> Any:
    """Eight bytes of a uint8 array from byte `index` on, as one little-endian uint64, at any alignment."""
    signature = types.uint64(array, index)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_type, index_type = signature.args
        position = context.cast(builder, arguments[1], index_type, types.intp)
        data = context.make_array(array_type)(context, builder, arguments[0]).data
        pointer = builder.gep(data, [position])
        word = builder.load(builder.bitcast(pointer, ir.IntType(64).as_pointer()))
        word.align = 1
        return word

    return signature, generate


@intrinsic
def prefetch(typingctx: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of item `index` of a C-ordered array, counted in items over all dimensions."""
    signature = types.void(array, index)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_type, index_type = signature.args
        position = context.cast(builder, arguments[1], index_type, types.intp)
        data = context.make_array(array_type)(context, builder, arguments[0]).data
        pointer = builder.bitcast(builder.gep(data, [position]), cgutils.voidptr_t)
        i32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [pointer, i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return signature, generate


@njit(cache=True, nogil=True, inline="always")
def load_tail(buffer: Any, start: Any, count: Any) -> Any:
    """`count` (1 to 7) bytes from `start`, zero-padded; reads nothing beyond the buffer."""
    if start + 8 <= buffer.shape[0]:
        return load_word(buffer, start) & (~np.uint64(0) >> np.uint64(64 - 8 * count))
    word = np.uint64(0)
    for i in range(count):
        word |= np.uint64(buffer[start + i]) << np.uint64(8 * i)
    return word


@njit(cache=True, nogil=True, inline="always")
def _mix(h: Any, word: Any) -> Any:
    h = (h ^ word) * _K2
    return h ^ (h >> np.uint64(32))


@borrowing(forceinline=True)
def hash_one(buffer: Any, start: Any, stop: Any, seed: Any) -> Any:
    """64-bit hash of the bytes [start, stop): multiply-xorshift over words, murmur3's finaliser."""
    length = stop - start
    h = seed ^ (np.uint64(length) * _K1)
    position = start
    while position + 8 <= stop:
        h = _mix(h, load_word(buffer, position))
        position += 8
    if position < stop:
        h = _mix(h, load_tail(buffer, position, stop - position))
    h *= _K3
    h ^= h >> np.uint64(29)
    h *= _K1
    return h ^ (h >> np.uint64(32))


@borrowing()
def _hash_keys(buffer: Any, offsets: Any, seed: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        out[i] = hash_one(buffer, offsets[i], offsets[i + 1], seed)


def hash_keys(buffer: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], seed: np.uint64) -> npt.NDArray[np.uint64]:
    """Hashes, uint64[n], of the n keys buffer[offsets[i]:offsets[i + 1]]."""
    out = np.empty(offsets.shape[0] - 1, np.uint64)
    _hash_keys(buffer, offsets, seed, out)
    return out
