"""The matrix products of a block and the block as a whole against their twins in float64; run like kernel_checks.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.kernels import CONVNEXT, DEVICE, OPS, TRITON, build_block, check_block, normal
from torch import Tensor
from torch.library import opcheck

from ffcv_convnext.config import ModelConfig
from ffcv_convnext.models.kernels import TWINS, fuse_blocks
from ffcv_convnext.models.kernels import mlp as mlp_kernels

if DEVICE == "cpu":
    from support.interpreter import mend_products

    mend_products()


def arguments(name: str, c: int, side: int, *, keep: bool, gamma: bool, bias: bool = True) -> dict[str, Any]:
    """Arguments of an operation for three images of c channels."""
    hidden, rest = 4 * c, {"keep": torch.tensor([1.25, 0.0, 1.25], device=DEVICE) if keep else None}
    weights = {
        "weight1": normal(hidden, c),
        "bias1": normal(hidden) if bias else None,
        "weight2": normal(c, hidden),
        "bias2": normal(c) if bias else None,
    }
    if name == "mlp":
        return {"x": normal(3, c, side, side), **weights, **rest, "shortcut": normal(3, c, side, side)}
    conv = {"weight": normal(c, 1, 3, 3), "bias": normal(c) if bias else None, "gain": normal(c), "offset": normal(c)}
    scale = {"gamma": normal(c) if gamma else None}
    return {"x": normal(3, c, side, side), **conv, "eps": 1e-6, **weights, **scale, **rest}


def result_and_gradients(function: Any, arguments: dict[str, Any], g: Tensor, **options: Any) -> dict[str, Tensor]:
    learned = {
        name: value.detach().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and name != "keep"
    }
    out = function(**{**arguments, **learned}, **options)
    assert out.is_contiguous(memory_format=torch.channels_last)
    out.backward(g.to(out.dtype))
    gradients = {name: value.grad for name, value in learned.items()}
    assert all(value is not None for value in gradients.values())
    return {"result": out.detach(), **gradients}  # type: ignore[dict-item]


def check(name: str, arguments: dict[str, Any], *, gelu: bool = True, tolerance: float = 2e-6) -> None:
    """The kernels and the twin agree with the twin in float64, relative to the largest number of each result."""
    double = {key: value.double() if isinstance(value, Tensor) else value for key, value in arguments.items()}
    g = normal(*arguments["x"].shape)

    def types(dtype: torch.dtype) -> dict[str, Any]:
        return {"gelu": gelu, "dtype": dtype} | ({} if name == "mlp" else {"compute": dtype})

    expected = result_and_gradients(getattr(TWINS, name), double, g, **types(torch.float64))
    for operations in (TRITON, TWINS):
        found = result_and_gradients(getattr(operations, name), arguments, g, **types(torch.float32))
        assert found.keys() == expected.keys()
        for key, exact in expected.items():
            error = ((found[key].double() - exact).abs().max() / exact.abs().max()).item()
            assert error < tolerance, f"{key} of {name}: {error:.1e} from float64"


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "all"])
@pytest.mark.parametrize("gelu", [True, False], ids=["gelu", "relu"])
def test_the_two_products(gelu: bool, keep: bool) -> None:
    check("mlp", arguments("mlp", 24, 5, keep=keep, gamma=False), gelu=gelu)


def test_the_two_products_without_biases() -> None:
    check("mlp", arguments("mlp", 8, 3, keep=True, gamma=False, bias=False))


@pytest.mark.parametrize(("c", "side"), [(16, 4), (72, 3), pytest.param(264, 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("gamma", [True, False], ids=["gamma", "plain"])
def test_a_whole_block(gamma: bool, c: int, side: int) -> None:
    """72 channels: more than a tile of the weights has; 264: too many to normalise inside a product."""
    tolerance = 5e-6 if c > 256 else 2e-6  # float32: sums of 1056 products
    check("block", arguments("block", c, side, keep=True, gamma=gamma), tolerance=tolerance)


@pytest.mark.slow
def test_more_rows_than_a_program_sums_and_no_biases() -> None:
    check("block", arguments("block", 40, 19, keep=False, gamma=True, bias=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bits_are_added_in_float32(dtype: torch.dtype) -> None:
    """The residual stream keeps its own type; what is stored between the products is rounded once."""
    given = arguments("mlp", 24, 5, keep=True, gamma=False)
    small = {key: value.to(dtype) if key in {"x", "weight1", "weight2"} else value for key, value in given.items()}
    g = normal(3, 24, 5, 5)
    found = result_and_gradients(TRITON.mlp, small, g, gelu=True, dtype=torch.float32)
    double = {key: value.double() if isinstance(value, Tensor) else value for key, value in small.items()}
    expected = result_and_gradients(TWINS.mlp, double, g, gelu=True, dtype=torch.float64)
    assert found["result"].dtype == found["shortcut"].dtype == found["bias1"].dtype == torch.float32
    assert found["x"].dtype == found["weight1"].dtype == found["weight2"].dtype == dtype
    for key, exact in expected.items():
        error = ((found[key].double() - exact).norm() / exact.norm()).item()
        assert error < 2 * torch.finfo(dtype).eps, f"{key}: {error:.1e}"


def test_a_blocks_result_has_the_type_that_pytorch_would_give_it() -> None:
    block = build_block(ModelConfig(**{**CONVNEXT, "resnet_kernel_size": 3}), 16, 16, stride=1, drop_path=0.0)
    plain = build_block(
        ModelConfig(**{**CONVNEXT, "resnet_kernel_size": 3, "resnet_ls_init_values": 0.0}), 16, 16, 1, 0.0
    )
    for each, expected in ((block, torch.float32), (plain, torch.bfloat16)):
        fused = copy.deepcopy(each)
        fuse_blocks(fused, TRITON)
        x = normal(2, 16, 5, 5, dtype=torch.bfloat16).requires_grad_()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = fused(x)
            assert each(x).dtype == y.dtype == expected
        y.float().sum().backward()
        assert x.grad is not None
        assert x.grad.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("norm_layer", ["bn", "ln"])
def test_blocks_of_the_steps_between_agree(norm_layer: Any, stride: int) -> None:
    """Convolution first, but a projected shortcut or a BatchNorm: the products are fused, the rest is not."""
    settings = {**CONVNEXT, "resnet_norm_layer": norm_layer, "resnet_kernel_size": 3, "resnet_ls_init_values": 0.0}
    block = build_block(ModelConfig(**settings), 8, 8 * stride, stride=stride, drop_path=0.3)
    side = -(-7 // stride)
    check_block(block, normal(4, 8, 7, 7), normal(4, 8 * stride, side, side))


def test_the_operators_are_registered_as_pytorch_asks() -> None:
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    half = torch.bfloat16
    for name, keys, options in (
        ("mlp", ("x", "weight1", "weight2"), (True, half)),
        ("block", (), (True, half, torch.float32)),
    ):
        given = arguments(name, 8, 3, keep=True, gamma=True)
        args = [
            (value.to(half) if key in keys else value).requires_grad_(key != "keep")
            if isinstance(value, Tensor)
            else value
            for key, value in given.items()
        ]
        opcheck(getattr(OPS, name), (*args, *options), test_utils=utilities)


def test_exact_products_follow_the_setting_for_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    for precision, exact in (("highest", True), ("high", False)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        assert mlp_kernels.blocks("_hidden", 64, 64, torch.float32)["EXACT"] is exact
