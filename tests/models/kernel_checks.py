"""The Triton kernels against their twins in float64: natively on a GPU, else under Triton's interpreter.

test_kernels.py runs this file in a separate process, because TRITON_INTERPRET must be set before Triton is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.kernels import CONVNEXT, DEVICE, OPS, TRITON, build_block, check_block, gradients, normal
from torch import Tensor
from torch.library import opcheck

from ffcv_convnext.config import ModelConfig
from ffcv_convnext.models import ResNet, count_gmacs, use_triton
from ffcv_convnext.models.kernels import TWINS, Operations, depthwise, fuse_blocks, launch
from ffcv_convnext.models.kernels.fused_branch import FusedBranch


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

    def of(operations: Operations, args: list[Any]) -> list[Tensor]:
        held = None if fixed is None else args[fixed]
        free = [x for i, x in enumerate(args) if i != fixed]
        return run(lambda *free: getattr(operations, name)(*(free if fixed is None else [*free, held])), free, gradient)

    assert fixed in (None, len(args) - 1)
    double = [x.double() if isinstance(x, Tensor) else x for x in args]
    gradient = normal(*getattr(TWINS, name)(*double).shape)
    expected = of(TWINS, double)
    for operations in (TRITON, TWINS):
        found = of(operations, args)
        assert len(found) == len(expected)
        for i, (ours, exact) in enumerate(zip(found, expected, strict=True)):
            error = ((ours.double() - exact).abs().max() / exact.abs().max()).item()
            assert error < tolerance, f"result {i} of {name}: {error:.1e} from float64"


def check_convolutions(kernel: int, stride: int, *, bias: bool, shape: tuple[int, ...] = (2, 24, 8, 5)) -> None:
    c = shape[1]
    x, weight = normal(*shape), normal(c, 1, kernel, kernel)
    args = [x, weight, normal(c) if bias else None, stride]
    check("depthwise_conv2d", args)
    check("depthwise_layer_norm", [*args, normal(c), normal(c), 1e-6])


def test_stride_two_without_bias() -> None:
    check_convolutions(3, 2, bias=False, shape=(3, 8, 7, 10))


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7, 9, 11])
def test_every_kernel_size(kernel: int, stride: int) -> None:
    check_convolutions(kernel, stride, bias=kernel != 5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 3, 3, 3), (2, 40, 9, 5), (2, 300, 2, 5), (1, 64, 15, 1)])
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
    units = 1 if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.5  # the interpreter cuts bfloat16 off
    for ours, theirs in zip(found[:2], exact[:2], strict=True):
        assert ((ours.double() - theirs).abs() <= theirs.abs() * torch.finfo(dtype).eps * units + 1e-5).all()
    torch.testing.assert_close(found[2].double(), exact[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma", [True, False], ids=["gamma", "plain"])
@pytest.mark.parametrize("keep", [True, False], ids=["keep", "all"])
def test_the_residual_sum(gamma: bool, keep: bool) -> None:
    factors = torch.tensor([1.25, 0.0, 1.25], device=DEVICE) if keep else None
    check("add_branch", [normal(3, 40, 5, 6), normal(3, 40, 5, 6), normal(40) if gamma else None, factors], fixed=3)


def test_autocast_and_promotion_give_the_twins_types() -> None:
    x, weight, bias, gain, offset = normal(2, 8, 7, 7), normal(8, 1, 3, 3), normal(8), normal(8), normal(8)
    for operations in (TRITON, TWINS):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = operations.depthwise_layer_norm(x, weight, bias, 1, gain, offset, 1e-6)
            assert operations.depthwise_conv2d(x, weight, bias, 1).dtype == torch.bfloat16
            assert operations.add_branch(y, y, None, None).dtype == torch.bfloat16
        assert y.dtype == torch.bfloat16
        assert operations.add_branch(x, y, gain, None).dtype == torch.float32
        assert operations.add_branch(y, y, gain, None).dtype == torch.float32


@pytest.mark.slow
def test_the_fastest_configuration_does_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = normal(2, 72, 9, 8), normal(72, 1, 5, 5), normal(72)
    results = []
    for config in depthwise.CONFIGS:
        monkeypatch.setattr(depthwise._convolve, "configs", [config])
        results.append(depthwise.depthwise_conv2d(x, weight, bias, 1))
    assert all(torch.equal(result, results[0]) for result in results)


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
    half, keep = torch.bfloat16, torch.ones(1, device=DEVICE)
    learned = [t.clone().requires_grad_() for t in (x, weight, vector)]
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    for operator, args in [
        (OPS.depthwise, (*learned[:3], 2, half)),
        (OPS.depthwise_input_gradient, (g, weight, 2, 4, 4, half)),
        (OPS.depthwise_input_gradient, (g, weight, 2, 4, 4, half, x)),
        (OPS.depthwise_weight_gradient, (x, g, 2, 3, torch.float32)),
        (OPS.depthwise_normalised, (*learned[:3], 2, 1e-6, half)),
        (OPS.normalised_gradient, (g, g.to(half), rstd)),
        (OPS.add_branch, (learned[0], x.to(half).requires_grad_(), learned[2], keep)),
        (OPS.branch_gradient, (x, x.to(half), vector, keep)),
        (OPS.branch_gradient, (x, x.to(half), None, None)),
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
