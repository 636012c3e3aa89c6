"""The products and weights of a fused block: under Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from support import REPOSITORY
from support.ptx import compile_kernel

HALF, FLOAT = "*bf16", "*fp32"
WIDTHS = (64, 84, 96, 128, 168, 192, 256, 336, 384, 512, 672, 768, 1024)  # of the ladders of ConvNeXt-T and -B


def run_checks(which: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which]
    result = subprocess.run(
        [*command, "tests/models/block_checks.py"],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout)


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_blocks_agree_with_their_twins_under_tritons_interpreter(which: str) -> None:
    run_checks(which, TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_blocks_agree_with_their_twins_on_a_gpu() -> None:
    run_checks("slow or not slow")


def kernels(c: int, stored: str, stream: str) -> dict[str, dict[str, Any]]:
    """The arguments of each kernel of a block with c channels, but the sizes of its blocks."""
    image: dict[str, Any] = {"num_rows": "i32", "IMAGE": 196}
    wide, narrow = {**image, "N": 4 * c, "K": c}, {**image, "N": c, "K": 4 * c}
    biases = {"bias": FLOAT, "keep": FLOAT}
    partial: dict[str, Any] = {"out": stored, "partial": FLOAT}
    names = ("weight1", "bias1", "gain", "offset", "weight2", "bias2", "gamma")
    weights: dict[str, Any] = {**dict.fromkeys(names, FLOAT), "H": 4 * c, "C": c}
    sums = ("biases", "bias", "weight", "bias1_out", "bias2_out", "bias_out", "weight_out")
    return {
        "_hidden": {"x": stored, "weight": stored, **biases, "linear_out": stored, "out": stored, "GELU": True, **wide},
        "_output": {"hidden": stored, "weight": stored, **biases, "shortcut": stream, "out": stream, **narrow},
        "_hidden_gradient": {"g": stream, "weight": stored, "linear": stored, "keep": FLOAT, **partial, **wide}
        | {"rounded": None if stream == stored else stored, "GELU": True},
        "_normal_gradient": {"g": stored, "weight": stored, "normal": stored, "rstd": FLOAT, **partial, **narrow},
        "_fold": {**weights, "depthwise": FLOAT, "taps_out": FLOAT, "TAPS": 49}
        | {"weight1_out": stored, "bias1_out": FLOAT, "weight2_out": stored, "bias2_out": FLOAT},
        "_add_partial": {**dict.fromkeys(sums, FLOAT), "H": 4 * c, "C": c, "VALUES": 49 * c}
        | {"rows_biases": "i32", "rows_bias": "i32", "rows_weight": "i32"},
        "_fold_gradient": {**weights, "d_weight1": stored, "d_bias1": FLOAT, "d_weight2": stored, "d_bias2": FLOAT}
        | {f"{name}_out": FLOAT for name in names if name != "bias1"},
    }


def check_resources(architecture: int, c: int, dtype: torch.dtype, *, stream: str = FLOAT) -> None:
    """Nothing is spilled; and on an H100 a quarter of the warps that a multiprocessor can hold fit on it."""
    from ffcv_convnext.models.kernels import mlp, weights

    stored = HALF if dtype == torch.bfloat16 else FLOAT
    for name, given in kernels(c, stored, stream).items():
        args = dict(given)
        if "K" in args:
            if name == "_normal_gradient" and c > mlp.MAX_NORMALISED:
                continue
            kernel = getattr(mlp, name)
            args |= mlp.blocks(name, args["N"], args["K"], dtype)
        else:
            kernel = getattr(weights, name)
            args |= weights.TILES[name]
        found = compile_kernel(kernel, architecture, **args)
        assert found.spilled == 0, f"{name} of {c} channels, {dtype}, sm_{architecture}: {found}"
        if architecture == 90 and dtype == torch.bfloat16:
            least = 16 if c % 32 == 0 else 8  # the regime of ConvNeXt-B begins at 84 channels: more masks
            assert found.warps >= least, f"{name} of {c} channels, sm_{architecture}: {found}"


@pytest.mark.parametrize("c", [96, 192, 768])
def test_a_blocks_kernels_keep_their_numbers_in_registers(c: int) -> None:
    check_resources(90, c, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("c", WIDTHS)
def test_a_blocks_kernels_keep_their_numbers_in_registers_in_every_width(c: int) -> None:
    check_resources(90, c, torch.bfloat16, stream=HALF)
    check_resources(90, c, torch.float32)
    check_resources(80, c, torch.bfloat16)
