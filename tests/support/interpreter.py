"""A mend for Triton's interpreter: its `tl.dot` takes the bits of bfloat16 numbers for integers."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder


def mend_products() -> None:
    """Let `tl.dot` widen bfloat16 arguments to float32 first, which changes no product."""
    plain = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
        return plain(self, *wide, *rest)

    InterpreterBuilder.create_dot = create_dot
