"""AdamW in one launch: its refusals, its machine code, and, in a separate process, its numbers."""

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
from timm.utils import ModelEmaV3
from torch import nn

from ffcv_convnext.training.fused_adamw import FusedAdamW, fuse_adamw

pytest.importorskip("triton")


def run_checks(**environment: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/training/fused_adamw_checks.py"],
        cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout)


def test_the_kernel_takes_the_same_steps_as_torch_under_tritons_interpreter() -> None:
    run_checks(TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_the_kernel_takes_the_same_steps_as_torch_on_a_gpu() -> None:
    run_checks(TRITON_INTERPRET="0")


def test_what_the_kernel_does_not_compute_is_refused() -> None:
    network = nn.Linear(3, 2)
    for option in ("amsgrad", "maximize"):
        with pytest.raises(ValueError, match=f"does not support {option}; use torch.optim.AdamW"):
            FusedAdamW(network.parameters(), **{option: True})
    with pytest.raises(ValueError, match="lr as a number"):
        FusedAdamW(network.parameters(), lr=torch.tensor(1e-3))
    with pytest.raises(ValueError, match=r"found torch.float64, \(2, 3\) with strides \(3, 1\)"):
        FusedAdamW(nn.Linear(3, 2).double().parameters())
    with pytest.raises(ValueError, match="ema and network belong together"):
        FusedAdamW(network.parameters(), ema=ModelEmaV3(network))
    with pytest.raises(ValueError, match=r"replace torch.optim.AdamW, not SGD; use --kernels torch"):
        fuse_adamw(torch.optim.SGD(network.parameters()))


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("amp", [True, False], ids=["fp16", "plain"])
def test_the_kernel_compiles_for_gpus_without_spills_and_float64(architecture: int, amp: bool) -> None:
    pytest.importorskip("triton")
    from ffcv_convnext.training.kernels import adamw

    args: dict[str, Any] = {
        "chunks": "*i32", "tensors": "*i64", "groups": "*fp32", "scale": "*fp32" if amp else None,
        "found_inf": "*fp32" if amp else None, "average_weight": "fp32",
        "AVERAGES": True, "ALIGNED": True, "CHUNK": adamw.CHUNK, "BLOCK": adamw.BLOCK,
    }  # fmt: skip
    built = compile_kernel(adamw._adamw, architecture, aligned=False, **args, **adamw.OPTIONS)
    assert built.spilled == 0
    assert ".f64" not in built.ptx
    wide = re.findall(r"(ld|st)\.global\.v4\.b32", built.ptx)
    assert (wide.count("ld"), wide.count("st")) >= (10, 8), "16 bytes a thread: five tensors read, four written"
