"""Vector operations on sixteen bytes for numba code, which has no vector types: vector_code.py as intrinsics."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from ffcv_convnext.data.codec import vector_code
from ffcv_convnext.data.codec.vector_code import LANES, PRECISION_BITS

__all__ = ["LANES", "PRECISION_BITS", "transpose_16x16", "weighted_sum_1", "weighted_sum_3", "weighted_sum_4"]


@intrinsic
def transpose_16x16(_context, source, source_stride, target, target_stride):  # type: ignore[no-untyped-def]  # numba's form  # noqa: ARG001
    """Transpose 16 rows of 16 bytes. All arguments are int64: addresses, and the distance between rows in bytes."""

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        vector_code.transpose_16x16(builder, *arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


def _weighted_sum(num_vectors: int) -> Any:
    """Return a function that sums `num_vectors` x 16 bytes over the taps of a filter."""

    @intrinsic
    def weighted_sum(_context, target, source, tap_stride, weights, num_taps):  # type: ignore[no-untyped-def]  # numba's form  # noqa: ARG001
        """Sum as vector_code.weighted_sum does. All arguments are int64."""

        def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            target, source, tap_stride, weights, num_taps = arguments
            vector_code.weighted_sum(builder, target, source, tap_stride, weights, num_taps, num_vectors)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return weighted_sum


weighted_sum_1 = _weighted_sum(1)
weighted_sum_3 = _weighted_sum(3)
weighted_sum_4 = _weighted_sum(4)
