"""Vector operations on sixteen bytes for numba code: those that the resize needs and LLVM does not vectorise itself.

numba has no vector types, so these functions are LLVM IR on addresses. LLVM translates the vectors to the instructions
of the processor (AVX-512, AVX2, SSE2, NEON), with the same results.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
PRECISION_BITS = 22  # fractional bits of a weight, as in Pillow
HALF = 1 << (PRECISION_BITS - 1)

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_BYTES, _INTS = ir.VectorType(_I8, LANES), ir.VectorType(_I32, LANES)
_LOW = [lane for i in range(8) for lane in (i, LANES + i)]
_HIGH = [lane for i in range(8, 16) for lane in (i, LANES + i)]


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [value] * LANES)


def _at(builder: Any, address: Any, offset: int) -> Any:
    return builder.add(address, ir.Constant(_I64, offset))


def _load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _broadcast(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(_INTS, ir.Undefined)
    return _shuffle(builder, builder.insert_element(undefined, value, ir.Constant(_I32, 0)), undefined, [0] * LANES)


@intrinsic
def transpose_16x16(_context, source, source_stride, target, target_stride):  # type: ignore[no-untyped-def]  # numba's form  # noqa: ARG001
    """Transpose 16 rows of 16 bytes. All arguments are int64: addresses, and the distance between rows in bytes."""

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        source, source_stride, target, target_stride = arguments
        rows = [
            _load(builder, builder.add(source, builder.mul(source_stride, ir.Constant(_I64, i))), _BYTES)
            for i in range(LANES)
        ]
        for _ in range(4):  # each round interleaves row i with row i + 8
            rows = [_shuffle(builder, rows[i], rows[i + 8], lanes) for i in range(8) for lanes in (_LOW, _HIGH)]
        for i, row in enumerate(rows):
            _store(builder, row, builder.add(target, builder.mul(target_stride, ir.Constant(_I64, i))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


def _weighted_sum(num_vectors: int) -> Any:
    """Return a function that sums `num_vectors` x 16 bytes over the taps of a filter."""

    @intrinsic
    def weighted_sum(_context, target, source, tap_stride, weights, num_taps):  # type: ignore[no-untyped-def]  # numba's form  # noqa: ARG001
        """target[i] = clip((sum over k of weights[k] * source[k * tap_stride + i] + HALF) >> PRECISION_BITS, 0, 255).

        All arguments are int64: addresses of bytes (target, source) and of int32 (weights), a distance, a count.
        """

        def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            target, source, tap_stride, weights, num_taps = arguments
            totals = [cgutils.alloca_once(builder, _INTS) for _ in range(num_vectors)]
            for total in totals:
                builder.store(_constant(HALF), total)
            with cgutils.for_range(builder, num_taps) as loop:
                at = builder.add(weights, builder.mul(loop.index, ir.Constant(_I64, 4)))
                weight = _broadcast(builder, _load(builder, at, _I32))
                start = builder.add(source, builder.mul(loop.index, tap_stride))
                for i, total in enumerate(totals):
                    pixels = builder.zext(_load(builder, _at(builder, start, LANES * i), _BYTES), _INTS)
                    builder.store(builder.add(builder.load(total), builder.mul(pixels, weight)), total)
            zero, maximum = _constant(0), _constant(255)
            for i, total in enumerate(totals):
                value = builder.ashr(builder.load(total), _constant(PRECISION_BITS))
                value = builder.select(builder.icmp_signed("<", value, zero), zero, value)
                value = builder.select(builder.icmp_signed(">", value, maximum), maximum, value)
                _store(builder, builder.trunc(value, _BYTES), _at(builder, target, LANES * i))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return weighted_sum


weighted_sum_1 = _weighted_sum(1)
weighted_sum_3 = _weighted_sum(3)
weighted_sum_4 = _weighted_sum(4)
