"""The augmentation's kernels: launches, bytes and machine code here; what they compute in a separate process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from support import REPOSITORY
from support.machine_code import Launch, Recorder, machine_code
from torch.utils._python_dispatch import TorchDispatchMode

from ffcv_convnext.augment import Normalisation, TrainAugment, kernels
from ffcv_convnext.augment.kernels.arguments import FRACTION_BITS, fixed_positions
from ffcv_convnext.augment.pil_ops import places
from ffcv_convnext.augment.randaugment import Kind, kind_numbers
from ffcv_convnext.config import AugmentConfig, DataConfig

CPU = torch.device("cpu")
RECIPE: dict[str, Any] = {}
POLICIES: dict[str, tuple[dict[str, Any], int]] = {  # settings, launches
    "the recipe": (RECIPE, 8),
    "no policy": ({"aa": "none", "color_jitter": 0}, 2),
    "jitter alone": ({"aa": "none", "color_jitter": 0.4, "remode": "rand", "recount": 2}, 3),
    "no erasing, no mixing": ({"reprob": 0, "mixup": 0, "cutmix": 0}, 8),
    "AutoAugment": ({"aa": "v0"}, 8),
    "TrivialAugment": ({"aa": "ta_wide"}, 5),
    "three augment": ({"aa": "3a", "color_jitter": 0.3}, 5),
    "every operation": ({"aa": "rand-t3aw-n3-p0.7"}, 12),
}


def run_checks(which: str, **environment: str) -> None:
    """Run kernel_checks.py in a new process; its output is the error's text."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which]
    result = subprocess.run(
        [*command, "tests/augment/kernel_checks.py"],
        cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout)


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_kernels_agree_with_the_cpu_path_under_tritons_interpreter(which: str) -> None:
    pytest.importorskip("triton")
    run_checks(which, TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_agree_with_the_cpu_path_on_a_gpu() -> None:
    run_checks("slow or not slow")


# --- launches ----------------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Names of the operators that PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def launches(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], num: int, size: int, *, step: int = 0
) -> list[Launch]:
    """Launches of one batch, recorded instead of started; PyTorch runs nothing between them that has work to do."""
    pytest.importorskip("triton")
    from ffcv_convnext.augment.kernels import batch, finish, policy

    recorder = Recorder([])
    for module in (finish, policy):
        monkeypatch.setattr(module, "launch", recorder)
    monkeypatch.setattr(batch, "can_run_on", lambda _: True)
    augment = TrainAugment(
        AugmentConfig(**settings), num_classes=1000, seed=0, device=CPU, normalisation=Normalisation.of(DataConfig()),
        kernels=True, dtype=torch.bfloat16,
    )  # fmt: skip
    images = torch.zeros((num, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    labels = torch.zeros(num, dtype=torch.int64)
    arguments = augment.arguments(augment.draw(num, size, size, step=step, micro_batch=0), size, size)
    assert augment._kernels is not None
    with Operators() as operators:
        inputs, targets = augment._kernels(
            images, labels, arguments, kinds=augment.kinds, normalisation=augment.normalisation, num_classes=1000,
            smoothing=0.1, dtype=torch.bfloat16,
        )  # fmt: skip
    assert operators.names <= {f"aten.{name}" for name in ("permute", "new_empty", "select", "unbind", "empty")}
    assert inputs.shape == images.shape
    assert targets.shape == (num, 1000)
    return recorder.launches


@pytest.mark.parametrize("name", POLICIES)
def test_a_batch_takes_at_most_eight_launches_and_three_more_for_each_round_after_the_second(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, num = POLICIES[name]
    found = [launches(monkeypatch, settings, 8, 32, step=step) for step in range(3)]
    assert [len(each) for each in found] == [num] * 3
    for each in found[1:]:  # a CUDA graph holds them: only the values of the draws differ
        assert [(launch.kernel, launch.programs) for launch in each] == [
            (launch.kernel, launch.programs) for launch in found[0]
        ]


def test_the_recipe_moves_a_quarter_of_a_gigabyte_if_every_image_needs_statistics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Computed from the tensors, each read or written once; images that need no statistics are not read for them."""
    found = launches(monkeypatch, RECIPE, 128, 224)
    total = sum(each.num_bytes for each in found)
    assert 0.2e9 < total < 0.25e9, f"{total / 1e9:.3f} GB"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("name", POLICIES)
def test_machine_code_keeps_its_numbers_in_registers_and_computes_pixels_without_float64(
    name: str, architecture: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from ffcv_convnext.augment.kernels.launch import OPTIONS

    seen = set()
    for launch in launches(monkeypatch, POLICIES[name][0], 2, 224):
        packed = launch.arguments.get("PACKED")
        if (launch.kernel, packed) in seen:  # the second of two rounds on words
            continue
        seen.add((launch.kernel, packed))
        code = machine_code(launch, architecture, OPTIONS)
        called = launch.kernel.fn.__name__
        assert code.spilled == 0, f"{called}: {code.spilled} bytes"
        assert code.registers <= 192, f"{called}: {code.registers}"  # blur along rows, with triton 3.6 for sm_80: 168
        if called == "_apply":  # a product is rounded before it is added, as on a CPU
            assert not [each for each in code.instructions if each.startswith("FFMA")]
        if called == "_tables":  # 256 values an image and channel, not pixels
            assert code.float64, "the test finds float64 where it is used"
        else:
            assert not code.float64, f"{called}: {code.float64}"
    assert {kernel.fn.__name__ for kernel, _ in seen} >= {"_finish", "_targets"}


@pytest.mark.slow
def test_the_recipe_takes_an_h100_less_than_a_millisecond_in_its_worst_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate from the code: every image takes every branch of the kernels, one instruction a clock and scheduler.

    An H100 has 132 multiprocessors of four schedulers, 1.755 GHz, and is taken to move 2.8 TB/s.
    """
    pytest.importorskip("triton")
    from ffcv_convnext.augment.kernels.launch import OPTIONS

    clocks = 0.0
    found = launches(monkeypatch, RECIPE, 128, 224)
    for launch in found:
        code = machine_code(launch, 90, OPTIONS)
        constants = launch.arguments
        called = launch.kernel.fn.__name__
        loops = {"_statistics": constants.get("PART", 0) // constants.get("BLOCK", 1)}
        loops["_tables"] = 3 * constants.get("PARTS", 0)
        warps = launch.programs * OPTIONS["num_warps"]
        clocks += warps * len(code.instructions) * loops.get(called, 1) / (132 * 4)
    assert 0.2e-3 < clocks / 1.755e9 < 1e-3, f"{clocks / 1.755e6:.3f} ms of instructions"
    assert sum(launch.num_bytes for launch in found) / 2.8e12 < 0.1e-3


# --- positions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(32, 32), (224, 224), (61, 83), (7, 512)])
def test_fixed_positions_are_those_of_float64_and_in_the_same_pixel(height: int, width: int) -> None:
    """No position of 60 draws of each operation is off by 4e-12, and none leaves an image that it is in in float64.

    Between two pixels a weight takes over continuously, and float32 holds it.
    """
    rng = np.random.default_rng(0)
    arguments = {
        Kind.SHEAR_X: rng.uniform(-0.99, 0.99, 60), Kind.SHEAR_Y: rng.uniform(-0.99, 0.99, 60),
        Kind.TRANSLATE_X: rng.uniform(-0.45, 0.45, 60) * width,
        Kind.TRANSLATE_Y: rng.uniform(-0.45, 0.45, 60) * height, Kind.ROTATE: rng.uniform(-135, 135, 60),
    }  # fmt: skip
    xs, ys = np.arange(width), np.arange(height)[:, None]
    for kind, values in arguments.items():
        for value in values:
            matrix = kind_numbers(np.array([kind]), np.array([value]), height, width)[0, :6]
            place = places(torch.from_numpy(matrix), height, width)
            axes = (place.left, place.along_x), (place.top, place.along_y)
            for (a, b, c), numbers, (before, along) in zip(
                fixed_positions(matrix).reshape(2, 3), matrix.reshape(2, 3), axes, strict=True
            ):
                fixed = a * xs + b * ys + c
                exact = numbers[0] * (xs + 0.5) + (numbers[1] * (ys + 0.5) + numbers[2])
                assert np.abs(fixed / 2.0**FRACTION_BITS - exact).max() < 4e-12
                assert np.array_equal(fixed >> FRACTION_BITS, np.floor(exact))
                there = before.double().numpy() + along.double().numpy() + 0.5
                assert np.abs(fixed / 2.0**FRACTION_BITS - there).max() < 2.0**-24


@pytest.mark.parametrize(
    ("kind", "argument"),
    [(Kind.TRANSLATE_X, 5.0), (Kind.TRANSLATE_Y, -0.5), (Kind.TRANSLATE_X, 0.25), (Kind.SHEAR_X, 0.5)]
    + [(Kind.ROTATE, angle) for angle in (0.0, 90.0, 180.0, 270.0)],
)
def test_positions_at_a_border_are_exact(kind: Kind, argument: float) -> None:
    """Whole and half pixels and quarter turns, where positions fall on borders between pixels."""
    matrix = kind_numbers(np.array([kind]), np.array([argument]), 33, 50)[0, :6]
    fixed = [Fraction(int(each), 1 << FRACTION_BITS) for each in fixed_positions(matrix)]
    a, b, c, d, e, f = (Fraction(float(each)) for each in matrix)
    half = Fraction(1, 2)
    assert fixed == [a, b, c + (a + b) * half, d, e, f + (d + e) * half]


# --- what is refused ---------------------------------------------------------------------------------------------


def build(device: torch.device = CPU) -> TrainAugment:
    return TrainAugment(
        AugmentConfig(),
        num_classes=4,
        seed=0,
        device=device,
        normalisation=Normalisation.of(DataConfig()),
        kernels=True,
    )


def test_the_kernels_are_refused_on_a_cpu_and_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="kernels = triton needs a CUDA device; use --kernels torch on a CPU"):
        build()
    monkeypatch.setattr(kernels, "find_spec", {}.get)
    with pytest.raises(ValueError, match="the package triton is not installed; install it, or use --kernels torch"):
        build()


def test_other_numbers_of_labels_and_draws_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from ffcv_convnext.augment.kernels import batch

    monkeypatch.setattr(batch, "can_run_on", lambda _: True)
    augment = build()
    images = torch.zeros((4, 8, 8, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match=r"labels and draws of \[3, 4\] images for 4 images"):
        augment(images, torch.zeros(3, dtype=torch.int64), step=0, micro_batch=0)


def test_images_too_large_to_count_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images are 8 x 16385: the augmentation's kernels support sides up to 16384"):
        kernels.draw_arguments(None, None, None, None, height=8, width=16385, device=CPU)
