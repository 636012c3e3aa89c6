"""The Triton kernels against their twins in float64: natively on a GPU, else under Triton's interpreter.

test_kernels.py runs this file in a separate process, because TRITON_INTERPRET must be set before Triton is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.kernels import CONFIGS, CONVNEXT, DEVICE, OPS, TRITON, build_block, check_block, gradients, normal
from torch import Tensor
from torch.library import opcheck

from ffcv_convnext.config import ModelConfig
from ffcv_convnext.models import ResNet, count_gmacs, use_triton
from ffcv_convnext.models.kernels import TWINS, depthwise, fuse_blocks, launch, norm, twins
from ffcv_convnext.models.kernels.fused_branch import FusedBranch

PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {  # a kernel and its twin
    "depthwise_conv2d": (depthwise.depthwise_conv2d, twins.depthwise_conv2d),
    "depthwise_normalise": (norm.depthwise_normalise, twins.depthwise_normalise),
    "depthwise_layer_norm": (norm.depthwise_layer_norm, twins.depthwise_layer_norm),
}


@pytest.fixture(autouse=True)
def _exactly() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def run(function: Callable[..., Tensor], args: list[Any], gradient: Tensor) -> list[Tensor]:
    """The result and the gradient of every tensor among the arguments that can have one."""
    args = [x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in args]
    result = function(*args)
    assert result.is_contiguous(memory_format=torch.channels_last)
    result.backward(gradient.to(result.dtype))
    return [result.detach(), *(x.grad for x in args if isinstance(x, Tensor) and x.grad is not None)]


def check(name: str, args: list[Any], *, tolerance: float = 2e-6, fixed: int | None = None) -> None:
    """A kernel and its twin agree with the twin in float64, relative to the largest number of each result.

    fixed: the number of an argument that has no gradient.
    """

    def of(function: Callable[..., Tensor], args: list[Any]) -> list[Tensor]:
        held = None if fixed is None else args[fixed]
        free = [x for i, x in enumerate(args) if i != fixed]
        return run(lambda *free: function(*(free if fixed is None else [*free, held])), free, gradient)

    assert fixed in (None, len(args) - 1)
    double = [x.double() if isinstance(x, Tensor) else x for x in args]
    kernel, twin = PAIRS[name]
    gradient = normal(*twin(*double).shape)
    expected = of(twin, double)
    for function in (kernel, twin):
        found = of(function, args)
        assert len(found) == len(expected)
        for i, (ours, exact) in enumerate(zip(found, expected, strict=True)):
            error = ((ours.double() - exact).abs().max() / exact.abs().max()).item()
            assert error < tolerance, f"result {i} of {name}: {error:.1e} from float64"


def check_convolutions(kernel: int, stride: int, *, bias: bool, shape: tuple[int, ...] = (2, 24, 8, 5)) -> None:
    c = shape[1]
    x, weight = normal(*shape), normal(c, 1, kernel, kernel)
    args = [x, weight, normal(c) if bias else None, stride]
    check("depthwise_conv2d", args)
    check("depthwise_normalise", [*args, 1e-6])
    check("depthwise_layer_norm", [*args, normal(c), normal(c), 1e-6])


def test_stride_two_without_bias() -> None:
    check_convolutions(3, 2, bias=False, shape=(3, 8, 7, 10))


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7, 9, 11])
def test_every_kernel_size(kernel: int, stride: int) -> None:
    check_convolutions(kernel, stride, bias=kernel != 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [(1, 3, 3, 3), (2, 40, 9, 5), (2, 300, 2, 5), (1, 64, 15, 1), (1, 96, 14, 3), (1, 80, 9, 4), (2, 1024, 2, 1)],
)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    """Few channels, more channels than a block of them, images smaller than the kernel."""
    check_convolutions(5, 1, bias=True, shape=shape)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_16_bits_are_added_in_float32(dtype: torch.dtype) -> None:
    x, weight, g = normal(2, 24, 9, 8, dtype=dtype), normal(24, 1, 7, 7), normal(2, 24, 9, 8, dtype=dtype)
    found = run(TRITON.depthwise_conv2d, [x, weight, None, 1], g)
    exact = run(TWINS.depthwise_conv2d, [x.double(), weight.double(), None, 1], g.double())
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32]
    for ours, theirs in zip(found[:2], exact[:2], strict=True):
        assert within_a_step(ours, theirs)
    torch.testing.assert_close(found[2].double(), exact[2], rtol=1e-5, atol=1e-5)


def within_a_step(found: Tensor, exact: Tensor) -> bool:
    """`found` is `exact` rounded once: half a step of its type off, and a little for sums in float32."""
    steps = 1 if found.dtype == torch.bfloat16 and DEVICE == "cpu" else 0.5  # the interpreter cuts bfloat16 off
    error = (found.double() - exact).abs()
    return bool((error <= exact.abs() * torch.finfo(found.dtype).eps * steps + 1e-5).all())


@pytest.mark.parametrize(("kernel", "stride", "shape"), [(7, 1, (2, 48, 8, 5)), (3, 2, (3, 20, 7, 6))])
def test_normalised_values_are_rounded_once_and_come_with_their_scale(
    kernel: int, stride: int, shape: tuple[int, ...]
) -> None:
    x, weight, bias = normal(*shape, dtype=torch.bfloat16), normal(shape[1], 1, kernel, kernel), normal(shape[1])
    found, rstd = norm.normalised(x, weight, bias, stride, 0.01, torch.bfloat16)
    sums = twins.depthwise_conv2d(x.double(), weight.double(), bias.double(), stride)
    variance = sums.var(1, unbiased=False)
    assert (found.dtype, rstd.dtype, rstd.shape) == (torch.bfloat16, torch.float32, variance.shape)
    torch.testing.assert_close(rstd.double(), (variance + 0.01).rsqrt(), rtol=1e-5, atol=0)
    assert within_a_step(found, (sums - sums.mean(1, keepdim=True)) * (variance + 0.01).rsqrt().unsqueeze(1))


def check_normalised_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n, c, h, w = shape
    g, values = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)
    rstd = torch.rand(n, h, w, device=DEVICE) + 0.5
    d_sums, d_bias = norm.normalised_gradient(g, values, rstd)
    g, values = g.double(), values.double()
    slope = (g * values).mean(1, keepdim=True)
    exact = rstd.double().unsqueeze(1) * (g - g.mean(1, keepdim=True) - values * slope)
    assert (d_sums.dtype, d_bias.dtype, d_bias.shape) == (dtype, torch.float32, (c,))
    assert d_sums.is_contiguous(memory_format=torch.channels_last)
    assert within_a_step(d_sums, exact)
    torch.testing.assert_close(d_bias.double(), exact.sum((0, 2, 3)), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 96, 5, 7), torch.bfloat16), ((1, 80, 3, 3), torch.float16), ((3, 3, 9, 1), torch.float32)],
)
def test_the_gradient_through_the_normalisation(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_normalised_gradient(shape, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("c", [17, 48, 320, 768, 1024, 3072])
def test_the_gradient_through_the_normalisation_of_any_width(c: int) -> None:
    check_normalised_gradient((1, c, 3, 2), torch.bfloat16)


@pytest.mark.parametrize(
    ("kernel", "stride", "dtype", "added"),
    [
        (3, 1, torch.bfloat16, torch.float32),
        (3, 2, torch.float32, torch.bfloat16),
        (7, 2, torch.bfloat16, torch.bfloat16),
        (5, 3, torch.float32, torch.float32),
    ],
)
def test_the_input_gradient_adds_the_shortcuts(
    kernel: int, stride: int, dtype: torch.dtype, added: torch.dtype
) -> None:
    n, c, h, w = shape = (2, 24, 9, 8)
    weight, addend = normal(c, 1, kernel, kernel), normal(*shape, dtype=added)
    g = normal(n, c, -(-h // stride), -(-w // stride), dtype=torch.bfloat16)
    x = torch.zeros(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
    twins.depthwise_conv2d(x, weight.double(), None, stride).backward(g.double())
    assert x.grad is not None
    alone = depthwise.input_gradient(g, weight, stride, h, w, dtype)
    both = depthwise.input_gradient(g, weight, stride, h, w, dtype, addend)
    assert (alone.dtype, both.dtype) == (dtype, dtype)
    assert within_a_step(alone, x.grad)
    assert within_a_step(both, x.grad + addend.double())
    # Another memory format is copied.
    contiguous = addend.contiguous()
    assert torch.equal(depthwise.input_gradient(g, weight, stride, h, w, dtype, contiguous), both)


def test_an_input_gradient_of_other_shapes_is_refused() -> None:
    g, weight = normal(2, 8, 4, 3), normal(8, 1, 3, 3)
    with pytest.raises(ValueError, match=r"g has shape \(2, 8, 4, 3\): expected \(2, 8, 4, 4\) at stride 2"):
        depthwise.input_gradient(g, weight, 2, 7, 7, torch.float32)
    with pytest.raises(ValueError, match=r"addend has shape \(2, 8, 7, 6\): expected \(2, 8, 7, 5\)"):
        depthwise.input_gradient(g, weight, 2, 7, 5, torch.float32, normal(2, 8, 7, 6))


def test_more_channels_than_registers_hold_are_refused() -> None:
    x = torch.empty((1, 3073, 2, 2), device=DEVICE)
    with pytest.raises(ValueError, match="3073 channels: the kernels normalise depthwise convolutions of at most 3072"):
        norm.depthwise_normalise(x, torch.empty((3073, 1, 3, 3), device=DEVICE), None, 1, 1e-6)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), pytest.param(7, 1, marks=pytest.mark.slow)])
def test_programs_that_take_several_tiles_add_them(kernel: int, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on large images, where every program goes through its loop many times."""
    args = [normal(2, 8, 15, 20), normal(8, 1, kernel, kernel), normal(8), stride, 1e-6]
    alone = run(norm.depthwise_normalise, args, normal(2, 8, -(-15 // stride), -(-20 // stride)))
    monkeypatch.setattr(depthwise, "PROGRAMS", 1)
    monkeypatch.setattr(norm, "PROGRAMS", 2)
    check("depthwise_normalise", args)
    assert torch.equal(alone[0], norm.depthwise_normalise(*args))


def test_autocast_and_promotion_give_the_twins_types() -> None:
    x, weight, bias, gain, offset = normal(2, 8, 7, 7), normal(8, 1, 3, 3), normal(8), normal(8), normal(8)
    for operations in (TRITON, TWINS):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = operations.depthwise_layer_norm(x, weight, bias, 1, gain, offset, 1e-6)
            assert operations.depthwise_conv2d(x, weight, bias, 1).dtype == torch.bfloat16
        assert y.dtype == torch.bfloat16


@pytest.mark.slow
def test_the_fastest_configuration_does_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, g = normal(2, 72, 9, 8), normal(72, 1, 5, 5), normal(72), normal(2, 72, 5, 4)
    results = []
    for config in CONFIGS:
        monkeypatch.setattr(depthwise._convolve, "configs", [config])
        forward = depthwise.depthwise_conv2d(x, weight, bias, 1)
        results.append((forward, depthwise.input_gradient(g, weight, 2, 9, 8, torch.float32, x)))
    assert len(results) == 5
    for forward, gradient in results:
        assert torch.equal(forward, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_equal_inputs_give_equal_bits_in_any_batch() -> None:
    x, weight, bias, g = normal(3, 40, 9, 4), normal(40, 1, 5, 5), normal(40), normal(3, 40, 9, 4)
    values, rstd = norm.normalised(x, weight, bias, 1, 1e-6, torch.float32)
    gradient, _ = norm.normalised_gradient(g, values, rstd)
    alone, rstd_alone = norm.normalised(x[2:], weight, bias, 1, 1e-6, torch.float32)
    assert torch.equal(alone, values[2:])
    assert torch.equal(rstd_alone, rstd[2:])
    assert torch.equal(norm.normalised_gradient(g[2:], alone, rstd_alone)[0], gradient[2:])
    again = [depthwise.weight_gradient(x, g, 1, 5, torch.float32) for _ in range(2)]
    assert torch.equal(*again)


def test_other_memory_formats_are_copied_and_other_types_refused() -> None:
    x, weight = normal(2, 8, 7, 7), normal(8, 1, 3, 3)
    g = torch.randn(2, 8, 1, 1, device=DEVICE).expand(2, 8, 7, 7)
    expected = run(TRITON.depthwise_conv2d, [x, weight, None, 1], g.contiguous(memory_format=torch.channels_last))
    for ours, same in zip(run(TRITON.depthwise_conv2d, [x.contiguous(), weight, None, 1], g), expected, strict=True):
        assert torch.equal(ours, same)
    with pytest.raises(ValueError, match=r"compute on float32, bfloat16 and float16, not on torch\.float64"):
        TRITON.depthwise_conv2d(x.double(), weight, None, 1)
    for shape in [(2**20, 1, 64, 32), (1, 2**20, 64, 32)]:
        with pytest.raises(ValueError, match=r"count pixels, and the values of an image, to 2\^31 - 1"):
            launch.channels_last(torch.empty(shape, device="meta"))


def test_the_operators_are_registered_as_pytorch_asks() -> None:
    x, weight, vector = normal(1, 8, 4, 4), normal(8, 1, 3, 3), normal(8)
    g, rstd = normal(1, 8, 2, 2), torch.rand(1, 2, 2, device=DEVICE)
    half = torch.bfloat16
    learned = [t.clone().requires_grad_() for t in (x, weight, vector)]
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    for operator, args in [
        (OPS.depthwise, (*learned[:3], 2, half)),
        (OPS.depthwise_input_gradient, (g, weight, 2, 4, 4, half)),
        (OPS.depthwise_input_gradient, (g, weight, 2, 4, 4, half, x)),
        (OPS.depthwise_weight_gradient, (x, g, 2, 3, torch.float32)),
        (OPS.depthwise_normalised, (*learned[:3], 2, 1e-6, half)),
        (OPS.normalised_gradient, (g, g.to(half), rstd)),
    ]:
        opcheck(operator, args, test_utils=utilities)


def test_a_fused_networks_products_are_counted_without_computing() -> None:
    config = ModelConfig(**CONVNEXT, resnet_layers=(1, 1, 1, 1), resnet_embed_dim=8)
    network = ResNet(config, 5)
    expected = count_gmacs(network)
    use_triton(network)
    assert any(module.operations == TRITON for module in network.modules() if isinstance(module, FusedBranch))
    assert count_gmacs(network) == expected


def test_a_convnext_block_agrees_in_its_result_and_all_gradients() -> None:
    x, g = normal(8, 16, 7, 3), normal(8, 16, 7, 3)
    result = check_block(build_block(ModelConfig(**CONVNEXT), 16, 16, stride=1, drop_path=0.5), x, g)
    assert 0 < (result == x).flatten(1).all(1).sum() < 8  # some samples kept their branch, some lost it


@pytest.mark.slow
@pytest.mark.parametrize("norm_layer", ["bn", "ln"])
def test_a_strided_block_of_the_earlier_steps_agrees(norm_layer: Any) -> None:
    config = ModelConfig(resnet_depthwise=True, resnet_block="inverted", resnet_norm_layer=norm_layer)
    block = build_block(config, 8, 4, stride=2, drop_path=0.0)
    check_block(block, normal(4, 8, 9, 8), normal(4, 4, 5, 4))


def test_a_compiled_block_is_one_graph() -> None:
    config = ModelConfig(**{**CONVNEXT, "resnet_kernel_size": 3})
    fused = build_block(config, 16, 16, stride=1, drop_path=0.4)
    fuse_blocks(fused, TRITON)
    x, g = normal(2, 16, 7, 7), normal(2, 16, 7, 7)
    compiled: Any = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        expected = gradients(fused, x, g)
        fused.zero_grad()
        found = gradients(compiled, x, g)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
