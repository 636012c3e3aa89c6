"""The two pointwise convolutions of a block with the activation between them, and the residual sum at their end.

Each matrix product does in its epilogue what would be a pass over the pixels: bias, activation and stochastic depth;
bias and residual sum; the activation's gradient and the biases' gradients. The block sizes depend on the shape only,
and nothing is added atomically: equal inputs give equal bits on a device.

Stochastic depth multiplies the hidden values instead of the branch (and the second bias), so that the gradient of the
hidden values is one product with the incoming gradient as it is. Products are of numbers in x's type (float32,
bfloat16, float16), added in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffcv_convnext.models.kernels.launch import OPTIONS, channels_last, empty, on

MAX_NORMALISED = 256  # channels of a pixel whose normalisation a program of `_normal_gradient` can have as a whole

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def _tile(COLUMNS: tl.constexpr, N: tl.constexpr):
    """Return the program's block of rows and its block of columns; neighbouring programs share their rows."""
    columns: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    return tl.program_id(0) // columns, tl.program_id(0) % columns


@triton.jit
def _product(
    a,  # (rows, K)
    b,  # element (k, n) at k * STRIDE_K + n * STRIDE_N
    row,
    column,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Return a block of a @ b, (ROWS, COLUMNS) float32; a is rounded to b's type."""
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    start = a + row.to(tl.int64)[:, None] * K
    for first in range(0, K, DEPTH):
        k = first + tl.arange(0, DEPTH)
        left = tl.load(start + k[None, :], mask=(row < num_rows)[:, None] & (k < K)[None, :], other=0.0)
        right = tl.load(
            b + k[:, None] * STRIDE_K + column[None, :] * STRIDE_N,
            mask=(k < K)[:, None] & (column < N)[None, :],
            other=0.0,
        )
        sums = tl.dot(left.to(b.dtype.element_ty), right, sums, input_precision="ieee" if EXACT else "tf32")
    return sums


@triton.jit
def _normal_distribution(x):
    """Return the normal distribution's function at x, with an error below 1e-7, and exp(-x * x / 2).

    A polynomial instead of `erf`, whose two branches a GPU would compute both: the activation is computed for more
    values than anything else. Source: Abramowitz and Stegun 1964, 7.1.26.
    """
    e = tl.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + 0.3275911 * _SQRT_HALF * tl.abs(x))
    p = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    beyond = 0.5 * p * e  # the probability of numbers farther from 0 on x's side
    return tl.where(x > 0.0, 1.0 - beyond, beyond), e


@triton.jit(do_not_specialize=["num_rows"])
def _hidden(
    x,  # (rows, K)
    weight,  # (N, K)
    bias,
    keep,  # of each image; None: 1
    linear_out,  # (rows, N), before the activation
    out,
    num_rows,
    IMAGE: tl.constexpr,  # pixels of an image
    N: tl.constexpr,
    K: tl.constexpr,
    GELU: tl.constexpr,  # else ReLU
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EXACT: tl.constexpr,
):
    i, j = _tile(COLUMNS, N)
    row, column = i * ROWS + tl.arange(0, ROWS), j * COLUMNS + tl.arange(0, COLUMNS)
    sums = _product(x, weight, row, column, num_rows, N, K, 1, K, ROWS, COLUMNS, DEPTH, EXACT)
    if bias is not None:
        sums += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    known = (row < num_rows)[:, None] & (column < N)[None, :]
    position = row.to(tl.int64)[:, None] * N + column[None, :]
    linear = sums.to(linear_out.dtype.element_ty)
    tl.store(linear_out + position, linear, mask=known)
    value = linear.to(tl.float32)
    if GELU:
        share, _ = _normal_distribution(value)
        value *= share
    else:
        value = tl.maximum(value, 0.0)
    if keep is not None:
        value *= tl.load(keep + row // IMAGE, mask=row < num_rows, other=0.0)[:, None]
    tl.store(out + position, value.to(out.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["num_rows"])
def _output(
    hidden,  # (rows, K)
    weight,  # (N, K)
    bias,
    keep,
    shortcut,  # (rows, N)
    out,
    num_rows,
    IMAGE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EXACT: tl.constexpr,
):
    i, j = _tile(COLUMNS, N)
    row, column = i * ROWS + tl.arange(0, ROWS), j * COLUMNS + tl.arange(0, COLUMNS)
    sums = _product(hidden, weight, row, column, num_rows, N, K, 1, K, ROWS, COLUMNS, DEPTH, EXACT)
    if bias is not None:
        offset = tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        if keep is not None:
            offset = offset * tl.load(keep + row // IMAGE, mask=row < num_rows, other=0.0)[:, None]
        sums += offset
    known = (row < num_rows)[:, None] & (column < N)[None, :]
    position = row.to(tl.int64)[:, None] * N + column[None, :]
    sums += tl.load(shortcut + position, mask=known, other=0.0).to(tl.float32)
    tl.store(out + position, sums.to(out.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["num_rows"])
def _hidden_gradient(
    g,  # (rows, K), d/dout
    weight,  # (K, N), of the second convolution
    linear,  # (rows, N), of the forward pass
    keep,
    out,  # (rows, N), d/dlinear
    rounded,  # (rows, K), g in the weight's type; None: not wanted
    partial,  # (blocks of rows, N + K) float32, of the first and the second bias
    num_rows,
    IMAGE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EXACT: tl.constexpr,
):
    i, j = _tile(COLUMNS, N)
    row, column = i * ROWS + tl.arange(0, ROWS), j * COLUMNS + tl.arange(0, COLUMNS)
    sums = _product(g, weight, row, column, num_rows, N, K, N, 1, ROWS, COLUMNS, DEPTH, EXACT)
    known = (row < num_rows)[:, None] & (column < N)[None, :]
    position = row.to(tl.int64)[:, None] * N + column[None, :]
    value = tl.load(linear + position, mask=known, other=0.0).to(tl.float32)
    if GELU:
        share, e = _normal_distribution(value)
        slope = share + value * (e * _DENSITY)
    else:
        slope = tl.where(value > 0.0, 1.0, 0.0)
    factor = tl.full([ROWS], 1.0, tl.float32)
    if keep is not None:
        factor = tl.load(keep + row // IMAGE, mask=row < num_rows, other=0.0)
    gradient = tl.where(known, sums * slope * factor[:, None], 0.0)
    tl.store(out + position, gradient.to(out.dtype.element_ty), mask=known)
    of_biases = partial + i.to(tl.int64) * (N + K)
    tl.store(of_biases + column, tl.sum(gradient, 0), mask=column < N)
    if j == 0:  # these programs alone read g once more, from the cache
        start = row.to(tl.int64)[:, None] * K
        for first in range(0, K, DEPTH):
            k = first + tl.arange(0, DEPTH)
            seen = (row < num_rows)[:, None] & (k < K)[None, :]
            incoming = tl.load(g + start + k[None, :], mask=seen, other=0.0).to(tl.float32)
            if rounded is not None:
                tl.store(rounded + start + k[None, :], incoming.to(rounded.dtype.element_ty), mask=seen)
            tl.store(of_biases + N + k, tl.sum(incoming * factor[:, None], 0), mask=k < K)


@triton.jit(do_not_specialize=["num_rows"])
def _normal_gradient(
    g,  # (rows, K), d/dlinear of `_hidden`
    weight,  # (K, N), of the first convolution
    normal,  # (rows, N), x of `_hidden`: normalised pixels
    rstd,  # of each row
    out,  # (rows, N), the gradient of what was normalised
    partial,  # (blocks of rows, N) float32, sums of out
    num_rows,
    IMAGE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # at least N
    DEPTH: tl.constexpr,
    EXACT: tl.constexpr,
):
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    sums = _product(g, weight, row, column, num_rows, N, K, N, 1, ROWS, COLUMNS, DEPTH, EXACT)
    known = (row < num_rows)[:, None] & (column < N)[None, :]
    position = row.to(tl.int64)[:, None] * N + column[None, :]
    value = tl.load(normal + position, mask=known, other=0.0).to(tl.float32)
    along_mean = tl.sum(sums, 1)[:, None] / N
    along_rstd = tl.sum(sums * value, 1)[:, None] / N
    scale = tl.load(rstd + row, mask=row < num_rows, other=0.0)[:, None]
    gradient = tl.where(known, scale * (sums - along_mean - value * along_rstd), 0.0)
    tl.store(out + position, gradient.to(out.dtype.element_ty), mask=known)
    tl.store(partial + tl.program_id(0).to(tl.int64) * N + column, tl.sum(gradient, 0), mask=column < N)


def blocks(kernel: str, n: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the sizes of a program's blocks for n columns and sums of k products, and how it is compiled.

    kernel: the name of one of the kernels above.   Fixed, not tried out: so a run that is continued computes the same
    bits. On an H100 two programs of 8 warps, or one of 16, fit on a multiprocessor: 128 registers a thread fill it.
    """
    small = dtype.itemsize == 2
    sizes: dict[str, Any] = {"ROWS": 128 if small else 64, "COLUMNS": 64, "num_warps": 8 if small else 4}
    if kernel == "_normal_gradient":
        columns = max(16, triton.next_power_of_2(n))
        sizes = {"ROWS": 64 if small else 32, "COLUMNS": columns, "num_warps": 8 if columns <= 128 else 16}
    deep = small and k % 64 == 0 and sizes["COLUMNS"] <= 128 and kernel != "_hidden_gradient"
    exact = torch.get_float32_matmul_precision() == "highest"
    stages = 2 if kernel == "_hidden_gradient" else 3
    return {**sizes, "DEPTH": 64 if deep else 32, "EXACT": exact, "num_stages": stages, **OPTIONS}


def _launch(
    kernel: Any, args: list[Any], rows: int, image: int, n: int, k: int, dtype: torch.dtype, **more: Any
) -> None:
    sizes = blocks(kernel.__name__, n, k, dtype)
    grid = (triton.cdiv(rows, sizes["ROWS"]) * triton.cdiv(n, sizes["COLUMNS"]),)
    with on(args[0]):
        kernel[grid](*args, rows, image, n, k, **more, **sizes)


def hidden(x: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor | None, *, gelu: bool) -> tuple[Tensor, Tensor]:
    """Return the first convolution's result, and that after the activation and times keep: (N, hidden, H, W) each.

    x: (N, C, H, W) in channels_last memory.   weight: (hidden, C), contiguous; its type is that of the results.
    """
    (n, c, h, w), width = x.shape, len(weight)
    linear, out = (empty((n, width, h, w), x, weight.dtype) for _ in range(2))
    _launch(_hidden, [x, weight, bias, keep, linear, out], n * h * w, h * w, width, c, weight.dtype, GELU=gelu)
    return linear, out


def output(
    activated: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor | None, shortcut: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return shortcut + second convolution of activated + bias x keep, like shortcut but of data type dtype.

    activated: (N, hidden, H, W), shortcut: (N, C, H, W), in channels_last memory.   weight: (C, hidden), contiguous.
    """
    (n, c, h, w), width = shortcut.shape, activated.shape[1]
    out = empty(shortcut.shape, shortcut, dtype)
    args = [activated, weight, bias, keep, shortcut, out]
    _launch(_output, args, n * h * w, h * w, c, width, weight.dtype)
    return out


class HiddenGradient(NamedTuple):
    """What `hidden_gradient` returns.

    linear: (N, hidden, H, W).   g: (N, C, H, W), the incoming gradient in the weight's type.
    partial: (n, hidden + C) float32, whose sum over n is the gradient of both biases.
    """

    linear: Tensor
    g: Tensor
    partial: Tensor


def hidden_gradient(g: Tensor, weight: Tensor, linear: Tensor, keep: Tensor | None, *, gelu: bool) -> HiddenGradient:
    """Return the gradients of the first convolution's result and of both biases for g = d/dout.

    weight: (C, hidden), of the second convolution, contiguous.   linear: the first result of `hidden`.
    """
    (n, c, h, w), width = g.shape, linear.shape[1]
    programs = triton.cdiv(n * h * w, blocks("_hidden_gradient", width, c, weight.dtype)["ROWS"])
    out = torch.empty_like(linear)
    rounded = None if g.dtype == weight.dtype else empty(g.shape, g, weight.dtype)
    partial = g.new_empty((programs, width + c), dtype=torch.float32)
    args = [g, weight, linear, keep, out, rounded, partial]
    _launch(_hidden_gradient, args, n * h * w, h * w, width, c, weight.dtype, GELU=gelu)
    return HiddenGradient(out, g if rounded is None else rounded, partial)


def normal_gradient(d_linear: Tensor, weight: Tensor, normal: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of what was normalised to get x of `hidden`, for at most MAX_NORMALISED channels.

    weight: (hidden, C), of the first convolution, contiguous.   normal: x of `hidden`.   rstd: (N, H, W).
    Returns a tensor like normal, and partial sums over its pixels, (n, C) float32.
    """
    (n, c, h, w), width = normal.shape, d_linear.shape[1]
    programs = triton.cdiv(n * h * w, blocks("_normal_gradient", c, width, weight.dtype)["ROWS"])
    out, partial = torch.empty_like(normal), normal.new_empty((programs, c), dtype=torch.float32)
    args = [d_linear, weight, normal, rstd, out, partial]
    _launch(_normal_gradient, args, n * h * w, h * w, c, width, weight.dtype)
    return out, partial


def weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """Return the gradient (C', C) of a 1x1 convolution's weight, for its input x and g, its result's gradient."""
    return by_pixel(g).t() @ by_pixel(x)


def input_gradient(g: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient (N, C, H, W) of a 1x1 convolution's input, for its weight (C', C)."""
    n, _, h, w = g.shape
    return (by_pixel(g) @ weight).view(n, h, w, weight.shape[1]).permute(0, 3, 1, 2)


def by_pixel(x: Tensor) -> Tensor:
    """View (N, C, H, W) in channels_last memory as (N x H x W, C)."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


@torch.library.custom_op("ffcv_convnext::mlp", mutates_args=())
def _forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    keep: Tensor | None,
    shortcut: Tensor,
    gelu: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result, and what the backward pass needs: the results of `hidden`."""
    linear, activated = hidden(channels_last(x), weight1.contiguous(), bias1, keep, gelu=gelu)
    out = output(activated, weight2.contiguous(), bias2, keep, channels_last(shortcut), dtype)
    return out, linear, activated


@_forward.register_fake
def _(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    keep: Tensor | None,
    shortcut: Tensor,
    gelu: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    linear = empty((len(x), len(weight1), *x.shape[2:]), x, weight1.dtype)
    return empty(shortcut.shape, shortcut, dtype), linear, torch.empty_like(linear)


@torch.library.custom_op("ffcv_convnext::mlp_gradient", mutates_args=())
def _gradient(
    g: Tensor,
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    linear: Tensor,
    activated: Tensor,
    keep: Tensor | None,
    gelu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, the first and the second weight, and of both biases: (hidden + C,) float32."""
    x = channels_last(x)
    d = hidden_gradient(channels_last(g), weight2.contiguous(), linear, keep, gelu=gelu)
    weights = weight_gradient(d.linear, x), weight_gradient(d.g, activated)
    return input_gradient(d.linear, weight1.contiguous()), *weights, d.partial.sum(0)


@_gradient.register_fake
def _(
    g: Tensor,
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    linear: Tensor,
    activated: Tensor,
    keep: Tensor | None,
    gelu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    biases = g.new_empty(len(weight1) + len(weight2), dtype=torch.float32)
    d_weight1, d_weight2 = (
        torch.empty_like(each, memory_format=torch.contiguous_format) for each in (weight1, weight2)
    )
    return empty(x.shape, x, weight1.dtype), d_weight1, d_weight2, biases


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight1, bias1, weight2, bias2, keep, shortcut, ctx.gelu, _ = inputs
    _, linear, activated = output
    ctx.shortcut_type = shortcut.dtype
    ctx.bias_types = [None if bias is None else bias.dtype for bias in (bias1, bias2)]
    ctx.mark_non_differentiable(linear, activated)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight1, weight2, linear, activated, keep)


def _backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 9
    _, weight1, weight2, *_ = ctx.saved_tensors
    d_x, d_weight1, d_weight2, d_biases = _gradient(g, *ctx.saved_tensors, ctx.gelu)
    d_bias1, d_bias2 = (
        None if dtype is None else each.to(dtype)
        for each, dtype in zip(d_biases.split([len(weight1), len(weight2)]), ctx.bias_types, strict=True)
    )
    return d_x, d_weight1, d_bias1, d_weight2, d_bias2, None, g.to(ctx.shortcut_type), None, None


_forward.register_autograd(_backward, setup_context=_save)


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    keep: Tensor | None,
    shortcut: Tensor,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Compute `twins.mlp` with the kernels; the result is in channels_last memory.

    x, weight1 and weight2 have one data type. Raises ValueError for another than float32, bfloat16 or float16.
    """
    result: Tensor = _forward(x, weight1, bias1, weight2, bias2, keep, shortcut, gelu, dtype)[0]
    return result
