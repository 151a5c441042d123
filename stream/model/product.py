"""The matrix product of the recurrent unit: rows by weights, plus a bias.

Guaranteed: an element of the result is one chain of fused multiply-adds in the order of the inner dimension, begun with
the bias. So a row's result is the same, bit for bit, whatever other rows there are, and on every processor (IEEE 754
says what a fused multiply-add gives; where a processor has none the platform's library computes the same, slowly).

Method: K. Goto and R. van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008: weights packed into panels
that a core's cache holds, and a block of the result in registers while the inner dimension goes by.
"""

# mypy: disable-error-code="import-untyped,untyped-decorator,no-untyped-call"
from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

__all__ = ["aligned_zeros", "multiply_add", "pack_weights", "padded_columns"]

#: Columns of a panel.
PANEL = 64
#: Elements that one instruction works on, where the processor has the widest; others take several.
_LANES = 16


def _has_wide_registers() -> bool:
    # Where a processor is named to numba, kernels are made for that one and not for the one they are made on.
    named = config.CPU_NAME or config.CPU_FEATURES
    return not named and bool(binding.get_host_cpu_features().get("avx512f", False))


#: Rows that are worked on together, as many as registers hold: the shape changes no bit of the result.
_ROWS = 8 if _has_wide_registers() else 4


def padded_columns(columns: int) -> int:
    """Columns of a result's array: whole panels."""
    return -(-columns // PANEL) * PANEL


def aligned_zeros(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Zeros that begin with a cache line: a load that touches two lines costs twice as much."""
    size = math.prod(shape)
    memory = np.zeros(size + _LANES, np.float32)
    start = -(memory.ctypes.data // memory.itemsize) % _LANES
    return memory[start : start + size].reshape(shape)


def pack_weights(
    weights: NDArray[np.float32], bias: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights (columns, inner) and bias (columns,) as `multiply_add` takes them.

    Panels (padded columns / 64, inner, 64) and a bias (padded columns,), zeros where there is no column.
    """
    columns, inner = weights.shape
    padded = np.zeros((padded_columns(columns), inner), np.float32)
    padded[:columns] = weights
    panels = aligned_zeros((len(padded) // PANEL, inner, PANEL))
    panels[:] = padded.reshape(-1, PANEL, inner).transpose(0, 2, 1)
    padded_bias = aligned_zeros((len(padded),))
    padded_bias[:columns] = bias
    return panels, padded_bias


def _tile(rows: int, vectors: int) -> Any:
    """A primitive for `rows` rows and `vectors` times 16 columns, with the sums in registers."""

    def typed(
        typingctx: Any, left: Any, row: Any, panels: Any, panel: Any, at: Any, bias: Any, out: Any, to: Any
    ) -> Any:
        """out[to + i, panel * 64 + at + j] of the product with left[row + i]."""
        signature = types.void(left, types.int64, panels, types.int64, types.int64, bias, out, types.int64)
        return signature, generate

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        left, panels, bias, out = (context.make_array(kinds[i])(context, builder, arguments[i]) for i in (0, 2, 5, 6))
        row, panel, at, to = arguments[1], arguments[3], arguments[4], arguments[7]
        word, single = ir.IntType(64), ir.FloatType()
        wide = ir.VectorType(single, _LANES)
        inner = cgutils.unpack_tuple(builder, panels.shape, 3)[1]
        left_width = cgutils.unpack_tuple(builder, left.shape, 2)[1]
        out_width = cgutils.unpack_tuple(builder, out.shape, 2)[1]
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(wide, [wide, wide, wide]), f"llvm.fma.v{_LANES}f32"
        )

        def load(data: Any, position: Any) -> Any:
            loaded = builder.load(builder.bitcast(builder.gep(data, [position]), wide.as_pointer()))
            loaded.align = 4
            return loaded

        column = builder.add(builder.mul(panel, word(PANEL)), at)
        sums = [load(bias.data, builder.add(column, word(i * _LANES))) for i in range(vectors)] * rows
        starts = [builder.mul(builder.add(row, word(i)), left_width) for i in range(rows)]
        weights = builder.add(builder.mul(builder.mul(panel, inner), word(PANEL)), at)
        before = builder.block
        body, after = builder.append_basic_block("inner"), builder.append_basic_block("store")
        builder.cbranch(builder.icmp_signed(">", inner, word(0)), body, after)
        builder.position_at_end(body)
        k = builder.phi(word)
        k.add_incoming(word(0), before)
        running = []
        for begun in sums:
            phi = builder.phi(wide)
            phi.add_incoming(begun, before)
            running.append(phi)
        here = builder.add(weights, builder.mul(k, word(PANEL)))
        factors = [load(panels.data, builder.add(here, word(i * _LANES))) for i in range(vectors)]
        summed = []
        for i in range(rows):
            one = builder.load(builder.gep(left.data, [builder.add(starts[i], k)]))
            many = builder.insert_element(ir.Constant(wide, ir.Undefined), one, ir.IntType(32)(0))
            mask = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
            many = builder.shuffle_vector(many, ir.Constant(wide, ir.Undefined), mask)
            summed += [builder.call(fma, [many, factors[j], running[i * vectors + j]]) for j in range(vectors)]
        following = builder.add(k, word(1))
        k.add_incoming(following, body)
        for phi, value in zip(running, summed, strict=True):
            phi.add_incoming(value, body)
        builder.cbranch(builder.icmp_signed("<", following, inner), body, after)
        builder.position_at_end(after)
        results = []
        for begun, value in zip(sums, summed, strict=True):
            phi = builder.phi(wide)
            phi.add_incoming(begun, before)
            phi.add_incoming(value, body)
            results.append(phi)
        for number, result in enumerate(results):
            i, j = divmod(number, vectors)
            start = builder.add(builder.mul(builder.add(to, word(i)), out_width), column)
            place = builder.gep(out.data, [builder.add(start, word(j * _LANES))])
            builder.store(result, builder.bitcast(place, wide.as_pointer())).align = 4
        return context.get_dummy_value()

    return intrinsic(typed)


_block: Any = _tile(_ROWS, 2)
_row: Any = _tile(1, PANEL // _LANES)


@njit(cache=True, nogil=True)
def multiply_add(left, begin, rows, panels, bias, out):  # type: ignore[no-untyped-def]
    """out[:rows] = left[begin : begin + rows] @ weights.T + bias.

    Parameters
    ----------
    left: float32 (n, inner), C order. panels, bias: of `pack_weights`.
    out: float32 (`rows` or more, padded columns), C order.
    """
    whole = rows - rows % _ROWS
    for panel in range(panels.shape[0]):
        for at in range(0, PANEL, 2 * _LANES):
            for row in range(0, whole, _ROWS):
                _block(left, begin + row, panels, panel, at, bias, out, row)
        for row in range(whole, rows):
            _row(left, begin + row, panels, panel, 0, bias, out, row)
