"""A copy of bytes between two uint8 arrays inside a kernel.

A loop over bytes is compiled with checks for overlap that cost more than most copies of a record; this is the
platform's memcpy. Nothing is checked: the caller keeps both ranges inside their arrays and apart.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call"
from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["copy_bytes"]


def _copy_bytes(typingctx: Any, source: Any, start: Any, length: Any, out: Any, position: Any) -> Any:
    """Copy `length` bytes of `source` from `start` to `out` at `position`; the position after them."""
    signature = types.int64(source, start, length, out, position)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source_type, start_type, length_type, out_type, position_type = signature.args
        from_array = context.make_array(source_type)(context, builder, arguments[0]).data
        to_array = context.make_array(out_type)(context, builder, arguments[3]).data
        first = context.cast(builder, arguments[1], start_type, types.int64)
        count = context.cast(builder, arguments[2], length_type, types.int64)
        at = context.cast(builder, arguments[4], position_type, types.int64)
        cgutils.raw_memcpy(
            builder, builder.gep(to_array, [at]), builder.gep(from_array, [first]), count, itemsize=1, align=1
        )
        return builder.add(at, count)

    return signature, generate


#: The typing context is passed by the compiler, not by the caller.
copy_bytes: Any = intrinsic(_copy_bytes)
