"""LLVM code for vectors of sixteen bytes: what resizing needs and no compiler vectorises by itself.

The functions here append instructions at a builder's position; simd.py makes numba intrinsics of them, for the loader,
and resample.py functions that need no numba, for the conversion's workers. LLVM translates the vectors to the
instructions of the processor (AVX-512, AVX2, SSE2, NEON). All arithmetic is on integers, so the results are the same
everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

LANES = 16
PRECISION_BITS = 22  # fractional bits of a weight, as in Pillow
HALF = 1 << (PRECISION_BITS - 1)

I32, I64 = ir.IntType(32), ir.IntType(64)
_BYTES, _INTS = ir.VectorType(ir.IntType(8), LANES), ir.VectorType(I32, LANES)
_LOW = [lane for i in range(8) for lane in (i, LANES + i)]
_HIGH = [lane for i in range(8, 16) for lane in (i, LANES + i)]


def word(value: int) -> ir.Constant:
    """Return an int64 constant."""
    return ir.Constant(I64, value)


def offset(builder: Any, address: Any, index: Any, step: Any) -> Any:
    """Return address + index * step, all int64."""
    return builder.add(address, builder.mul(index, step))


def load(builder: Any, address: Any, kind: ir.Type) -> Any:
    """Load a value of any alignment from an int64 address."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def loop(builder: Any, count: Any, body: Callable[[Any, list[Any]], Sequence[Any]], carried: Sequence[Any] = ()) -> Any:
    """Run `body` for index 0 .. count - 1 and return the carried values after it, as a list.

    body: gets the index (int64) and the carried values, returns their next values.   count: int64; may be zero.
    """
    before = builder.block
    head, inside, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(I64)
    index.add_incoming(word(0), before)
    values = []
    for start in carried:
        value = builder.phi(start.type)
        value.add_incoming(start, before)
        values.append(value)
    builder.cbranch(builder.icmp_signed("<", index, count), inside, after)
    builder.position_at_end(inside)
    following = body(index, values)
    index.add_incoming(builder.add(index, word(1)), builder.block)
    for value, next_value in zip(values, following, strict=True):
        value.add_incoming(next_value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return values


def transpose_16x16(builder: Any, source: Any, source_step: Any, target: Any, target_step: Any) -> None:
    """Transpose 16 rows of 16 bytes. All values are int64: addresses, and the distance between rows in bytes."""
    rows = [load(builder, offset(builder, source, word(i), source_step), _BYTES) for i in range(LANES)]
    for _ in range(4):  # each round interleaves row i with row i + 8
        rows = [_shuffle(builder, rows[i], rows[i + 8], lanes) for i in range(8) for lanes in (_LOW, _HIGH)]
    for i, row in enumerate(rows):
        _store(builder, row, offset(builder, target, word(i), target_step))


def weighted_sum(
    builder: Any, target: Any, source: Any, tap_step: Any, weights: Any, num_taps: Any, num_vectors: int
) -> None:
    """target[i] = clip((sum over k of weights[k] * source[k * tap_step + i] + HALF) >> PRECISION_BITS, 0, 255).

    For i in 0 .. 16 num_vectors - 1. All values are int64: addresses of bytes (target, source) and of int32 (weights),
    a distance, a count.
    """

    def add_tap(index: Any, totals: list[Any]) -> list[Any]:
        weight = _broadcast(builder, load(builder, offset(builder, weights, index, word(4)), I32))
        start = offset(builder, source, index, tap_step)
        pixels = [load(builder, builder.add(start, word(LANES * i)), _BYTES) for i in range(num_vectors)]
        return [
            builder.add(total, builder.mul(builder.zext(each, _INTS), weight))
            for total, each in zip(totals, pixels, strict=True)
        ]

    zero, maximum = _constant(0), _constant(255)
    for i, total in enumerate(loop(builder, num_taps, add_tap, [_constant(HALF)] * num_vectors)):
        value = builder.ashr(total, _constant(PRECISION_BITS))
        value = builder.select(builder.icmp_signed("<", value, zero), zero, value)
        value = builder.select(builder.icmp_signed(">", value, maximum), maximum, value)
        _store(builder, builder.trunc(value, _BYTES), builder.add(target, word(LANES * i)))


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [value] * LANES)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def _broadcast(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(_INTS, ir.Undefined)
    return _shuffle(builder, builder.insert_element(undefined, value, ir.Constant(I32, 0)), undefined, [0] * LANES)
