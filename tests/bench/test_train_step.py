"""`bench step` and `bench augment`: their counts are right, and their tables have them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._C._autograd import DeviceType

from ffcv_convnext.bench import profile
from ffcv_convnext.cli import run_command

CPU = torch.device("cpu")


def test_the_shares_of_a_step_sum_to_100_percent() -> None:
    depthwise, pointwise = nn.Conv2d(8, 8, 7, groups=8, padding=3), nn.Conv2d(8, 32, 1)
    norm, optimizer = nn.LayerNorm(16), torch.optim.SGD(depthwise.parameters(), 0.1)
    optimizer.step = profile.marked(profile.UPDATE, optimizer.step)  # type: ignore[method-assign]
    augment = profile.marked(profile.AUGMENTATION, lambda x: x.sin().relu())

    def step() -> None:
        images = augment(torch.randn(8, 8, 16, 16))
        F.gelu(norm(pointwise(depthwise(images))) @ torch.randn(16, 16)).sum().backward()
        optimizer.step()

    step()
    shares = profile.profile_step(step, CPU)
    assert sum(shares.values()) == pytest.approx(100)
    assert shares.keys() == {
        "convolution", "depthwise convolution", "matrix products", "norm", "activation",
        profile.AUGMENTATION, profile.UPDATE, profile.REST,
    }  # fmt: skip
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


def event(name: str, kernels: dict[str, float], shapes: Any = (), parent: Any = None) -> SimpleNamespace:
    launched = [SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels.items()]
    return SimpleNamespace(
        name=name, device_type=DeviceType.CPU, is_user_annotation=name == profile.STEP, cpu_parent=parent,
        kernels=launched, input_shapes=shapes,
    )  # fmt: skip


def kernel(name: str, duration: float) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, device_type=DeviceType.CUDA, time_range=SimpleNamespace(elapsed_us=lambda: duration)
    )


def test_kernels_count_once_by_the_operation_that_launched_them() -> None:
    """The profiler lists every kernel by itself, and at its operation if that is known."""
    update = event(profile.UPDATE, {})
    depthwise_shapes = [[2, 8, 4, 4], [2, 8, 4, 4], [8, 1, 7, 7]]  # of a gradient, the images, the weights
    times = profile._kernel_times(
        [
            event(profile.STEP, {profile.STEP: 100.0}),
            kernel(profile.STEP, 100.0),  # the range's copy on the device is not a kernel
            event("aten::convolution_backward", {"cutlass_a": 8.0, "cutlass_b": 4.0}, depthwise_shapes),
            kernel("cutlass_a", 8.0),
            kernel("cutlass_b", 4.0),
            event("aten::addmm", {"cutlass_a": 16.0}),
            kernel("cutlass_a", 16.0),
            event("aten::mul_", {"foreach": 32.0}, parent=update),
            kernel("foreach", 32.0),
            kernel("triton_red_fused_gelu_native_layer_norm_3", 64.0),
            kernel("ncclDevKernel_AllReduce", 128.0),
            kernel("Memcpy HtoD", 256.0),
        ]
    )
    assert {part: time for part, time in times.items() if time} == {
        "depthwise convolution": 12, "matrix products": 16, profile.UPDATE: 32, "norm": 64, "communication": 128,
        profile.REST: 256,
    }  # fmt: skip


def test_traffic_counts_what_operations_read_and_write() -> None:
    a, b = torch.ones(10), torch.ones(10)
    size = 40
    assert profile.step_bytes(lambda: a + b) == 3 * size
    assert profile.step_bytes(lambda: a.view(2, 5).t()) == 0
    assert profile.step_bytes(lambda: a.add_(b)) == 3 * size
    assert profile.step_bytes(lambda: torch._foreach_lerp_([a, b], [b, a], 0.5)) == 6 * size
    assert profile.step_bytes(lambda: torch.empty(10)) == 0


def table(
    capsys: pytest.CaptureFixture[str], arguments: list[str], out: Path
) -> tuple[list[list[str]], dict[str, Any]]:
    """Run a benchmark and return the cells of its first table, and the JSON."""
    assert run_command("bench", [*arguments, "--rounds", "1", "--json", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    lines = lines[2 : lines.index("", 2) if "" in lines[2:] else None]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [header, *rows], json.loads(out.read_text())


SMALL = ["--device", "cpu", "--amp", "off", "--batch_size", "4", "--input_size", "32", "--seconds", "0.1"]


@pytest.mark.slow
def test_bench_step_measures_ours_beside_a_peer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows, found = table(capsys, ["step", *SMALL, "--model_ema", "true", "--peers", "ours"], tmp_path / "figures.json")
    assert [row[0] for row in rows] == [
        "step", "timm convnext_tiny", "ours", "ours, augmented", "ours, augmented, from a .beton",
    ]  # fmt: skip
    assert all(row["error"] is None and row["median"] > 0 for row in found["rows"])
    notes = found["notes"]
    assert notes["timm convnext_tiny"]["gmacs"] == pytest.approx(4.456 / 49, rel=0.02)
    assert notes["ours"]["step_bytes"] > 4 * 25e6 * 10, "the optimiser alone reads and writes each number many times"
    assert sum(notes["ours, augmented"]["shares"].values()) == pytest.approx(100)
    assert notes["ours, augmented"]["ceilings"]["flops_per_s"] > 1e9
    assert found["facts"]["device"] == "cpu"


@pytest.mark.slow
def test_bench_step_shows_a_ladder_in_one_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name, layers in (("00_first", "1-1-1-1"), ("01_second", "1-1-2-1")):
        (tmp_path / f"{name}.yaml").write_text(f"resnet_layers: {layers}\nresnet_embed_dim: 8\n")
    rows, found = table(capsys, ["step", *SMALL, "--ladder", str(tmp_path)], tmp_path / "figures.json")
    assert [row[0] for row in rows] == ["step", "00_first", "01_second"]
    assert found["notes"]["01_second"]["gmacs"] > found["notes"]["00_first"]["gmacs"]
    assert found["rows"][0]["ratio"] == 1


@pytest.mark.slow
def test_bench_augment_measures_every_peer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows, found = table(capsys, ["augment", *SMALL], tmp_path / "figures.json")
    assert [row[0] for row in rows[1:]] == ["timm (PIL)", "torchvision v2 (tensors, bilinear)", "ours"]
    assert [row["error"] for row in found["rows"]] == [None] * 3
    assert found["columns"]["ms per batch"]["ours"] == pytest.approx(4000 / found["rows"][2]["median"])


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["step", "--ladder", "nowhere"], "no step found"),
        (["step", "--peers", "keras"], "timm convnext_tiny"),
        (["step", "--batch_sise", "4"], "did you mean --batch_size"),
        (["augment", "--aa", "augmix-m3"], "augmix"),
        (["augment", "--photographs", str(Path(__file__).parent / "nowhere")], "no photographs found"),
        (["augment", "--num_images", "4"], "unknown option '--num_images'"),
        (["stride"], "invalid choice"),
        ([], "required"),
    ],
)
def test_wrong_arguments_are_usage_errors(
    arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("bench", [*arguments, *(["--device", "cpu"] if arguments else [])]) == 2
    assert answer in capsys.readouterr().err
