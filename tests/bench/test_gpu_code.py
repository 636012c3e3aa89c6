"""`bench gpu-code`: hand-worked counts on small parts, refusals, and no spill on a small network."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ffcv_convnext.bench.gpu_code import GpuCodeOptions, bench_gpu_code, ladder_steps
from ffcv_convnext.bench.gpu_code import run as run_module
from ffcv_convnext.bench.gpu_code.counting import multi_tensor_launches
from ffcv_convnext.bench.gpu_code.estimate import DEVICES, seconds, totals
from ffcv_convnext.bench.gpu_code.resources import num_float64
from ffcv_convnext.cli import main

ROOT = Path(__file__).resolve().parents[2]
needs_tools = pytest.mark.skipif(
    torch.version.cuda is None or not any(map(shutil.which, ("gcc", "clang", "cc"))),
    reason="needs torch's CUDA version and a C compiler",
)

COUNTED = """
import json, sys
from ffcv_convnext.bench.gpu_code.fake_device import pretend
pretend("sm_90")
import torch
from dataclasses import asdict
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from ffcv_convnext.bench.gpu_code.capture import Phase, recording, collecting_graphs, replay, Stop
found = {}
with FakeTensorMode(allow_non_fake_inputs=True):
    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="cuda:0")
    def record(name, function):
        phase = Phase()
        with recording(phase), torch.no_grad():
            function()
        found[name] = [asdict(launch) for launch in phase.counter.launches]
    x, w = empty(8, 16, 10, 10), empty(32, 16, 3, 3)
    record("conv", lambda: nn.functional.conv2d(x, w, padding=1))
    a, b = empty(64, 32), empty(32, 48)
    record("mm", lambda: a @ b)
    record("addmm", lambda: torch.addmm(empty(48), a, b))
    record("add_", lambda: a.add_(1))
    record("zero_", lambda: a.zero_())
    record("view", lambda: a.t().reshape(-1))
    record("broadcast", lambda: a + empty(64, 1).expand(64, 32))
    phase = Phase()
    vector = empty(96, dtype=torch.float32)
    norm = lambda x, w, b: nn.functional.layer_norm(x, (96,), w, b)
    with collecting_graphs() as graphs, torch.no_grad():
        try:
            torch.compile(norm, fullgraph=True)(empty(512, 96, dtype=torch.float32), vector, vector.clone())
        except Stop:
            pass
    replay(graphs[0], phase)
    found["layer_norm"] = [asdict(launch) for launch in phase.counter.launches]
    found["dot"] = []
    import own
    try:
        with recording(Phase()):
            own.product[(1,)](a, b)
    except NotImplementedError as error:
        found["dot"] = str(error)
    with recording(phase := Phase()):
        own.double[(1,)](a, b, num=32)
    found["own"] = [asdict(launch) for launch in phase.counter.launches]
json.dump(found, open(sys.argv[1], "w"))
"""

OWN = """
import triton
import triton.language as tl

@triton.jit
def inner(x, y):
    return tl.dot(x, y)

@triton.jit
def product(x, y):
    i = tl.arange(0, 16)
    block = i[:, None] * 16 + i[None, :]
    tl.store(x + block, inner(tl.load(x + block), tl.load(y + block)))

@triton.jit
def double(x, y, num: tl.constexpr):
    i = tl.arange(0, num)
    tl.store(y + i, 2 * tl.load(x + i))
"""


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Launches of small operations, recorded in a process of their own."""
    folder = tmp_path_factory.mktemp("counted")
    (folder / "own.py").write_text(OWN)
    (folder / "count.py").write_text(COUNTED)
    environment = run_module.environment_of(folder, run_module.build_runtime(folder, "sm_90"))
    result = subprocess.run(
        [sys.executable, str(folder / "count.py"), str(folder / "found.json")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


@needs_tools
def test_bytes_and_operations_are_those_worked_out_by_hand(counted: dict[str, Any]) -> None:
    def only(name: str) -> tuple[Any, ...]:
        (launch,) = counted[name]
        return tuple(launch[each] for each in ("kind", "bytes", "product_bytes", "flops", "num"))

    assert only("conv") == ("convolution", 2 * (8 * 16 * 100 + 32 * 16 * 9 + 8 * 32 * 100), 0, 2 * 25600 * 144, 1)
    assert only("mm") == ("product", 0, 2 * (64 * 32 + 32 * 48 + 64 * 48), 2 * 64 * 32 * 48, 1)
    assert only("addmm") == ("product", 0, 2 * (48 + 64 * 32 + 32 * 48 + 64 * 48), 2 * 64 * 32 * 48, 1)
    assert only("add_") == ("aten", 2 * (2 * 64 * 32), 0, 0, 1)  # read and written
    assert only("zero_") == ("aten", 2 * 64 * 32, 0, 0, 1)  # written only
    assert only("broadcast") == ("aten", 2 * (2 * 64 * 32 + 64), 0, 0, 1)  # stride 0: 64 values
    assert only("layer_norm") == ("inductor", 4 * (2 * 512 * 96 + 2 * 96), 0, 0, 1)
    assert [launch["name"] for launch in counted["view"]] == ["clone"]  # the transpose is a view, the reshape copies
    assert only("own") == ("own", 2 * (64 * 32 + 32 * 48), 0, 0, 1)


@needs_tools
def test_an_unknown_kernel_with_a_product_is_an_error(counted: dict[str, Any]) -> None:
    assert "the Triton kernel product contains a matrix product (tl.dot); add its tensors to PRODUCTS" in counted["dot"]


def test_lists_of_tensors_are_launched_in_pieces() -> None:
    small = [torch.empty(10) for _ in range(65)]
    assert multi_tensor_launches(small[:64], 2) == 1
    assert multi_tensor_launches(small, 2) == 2
    assert multi_tensor_launches([torch.empty(320 * 65536)], 4) == 1
    assert multi_tensor_launches([torch.empty(320 * 65536 + 1)], 4) == 2


def test_an_estimate_is_the_longer_of_bytes_and_operations() -> None:
    device = DEVICES[1]
    moved = {"kind": "aten", "bytes": 2_780_500_000, "product_bytes": 0, "flops": 0, "num": 1}
    product = {"kind": "product", "bytes": 0, "product_bytes": 1000, "flops": 593_640_000_000, "num": 1}
    assert device.name == "H100"
    assert seconds(moved, device) == pytest.approx(1e-3, rel=1e-6)
    assert seconds(product, device) == pytest.approx(1e-3, rel=1e-6)
    both = totals([moved, product])
    assert (both.launches, both.bytes, both.product_launches, both.product_bytes) == (2, 2_780_500_000, 1, 1000)
    assert both.ms["H100"] == pytest.approx(2.0)
    assert both.product_ms["H100"] == pytest.approx(1.0)


def test_float64_instructions_are_counted() -> None:
    listing = "\n".join(
        f"        /*{i:04x}*/                   {line} ;"
        for i, line in enumerate(
            ["DADD R2, R4, R6", "@P0 DFMA R2, R4, R6, R8", "F2F.F64.F32 R2, R4", "FFMA R1, R2, R3, R4", "DEPBAR.LE SB0"]
        )
    )
    assert num_float64(listing) == 3


def small_network(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    base = ROOT / "rn_configs" / "convnext_tiny.yaml"
    file.write_text(f"base: {base}\nresnet_layers: [1, 1, 1, 1]\nresnet_embed_dim: 16\n")
    return file


SMALL = {"batch_size": 8, "input_size": 64}
STEP = ("forward", "backward", "optimiser + EMA")


@needs_tools
@pytest.mark.slow
def test_a_small_networks_step_is_counted_and_does_not_spill(tmp_path: Path) -> None:
    """Forward, backward and optimiser with the Triton kernels, for sm_90; not the augmentation."""
    file = small_network(tmp_path)
    found = bench_gpu_code(file, GpuCodeOptions(phases=STEP, debug=True), kernels=["triton"], overrides=SMALL)
    phases = found.paths["triton"]
    assert {name: phase["error"] for name, phase in phases.items()} == dict.fromkeys(STEP, "")
    kernels = [kernel for phase in phases.values() for kernel in phase["kernels"]]
    assert any(kernel["kind"] == "own" for kernel in kernels)
    assert {k["name"]: k["spilled_bytes"] for k in kernels if k["spilled_bytes"]} == {}
    launched = {each["name"] for phase in phases.values() for each in phase["launches"]}
    assert {kernel["name"] for kernel in kernels} <= launched


@needs_tools
def test_the_optimiser_reads_four_tensors_of_a_parameter_and_writes_three(tmp_path: Path) -> None:
    file = small_network(tmp_path)
    options = GpuCodeOptions(phases=("optimiser + EMA",), compile=False, debug=True)
    found = bench_gpu_code(file, options, kernels=["torch"], overrides=SMALL)
    launches = found.paths["torch"]["optimiser + EMA"]["launches"]
    moved = {
        name: sum(each["bytes"] for each in launches if each["name"] == name)
        for name in ("_fused_adamw_", "_foreach_lerp_")
    }
    parameters = num_parameters(file)
    assert moved["_fused_adamw_"] == pytest.approx(7 * 4 * parameters, rel=0.01)  # and its step numbers
    assert moved["_foreach_lerp_"] == 3 * 4 * parameters  # reads both, writes the average
    assert "ESTIMATE" in found.format()
    assert json.loads(found.to_json())["totals"]["torch"]["sum"]["bytes"] >= sum(moved.values())


def num_parameters(file: Path) -> int:
    from ffcv_convnext.config import load_config
    from ffcv_convnext.models import build_model

    with torch.device("meta"):
        network: nn.Module = build_model(load_config(file).model, 1000)
    return sum(p.numel() for p in network.parameters())


@needs_tools
@pytest.mark.slow
def test_no_kernel_of_convnext_tiny_spills() -> None:
    """Forward, backward, optimiser of the whole recipe for sm_90."""
    options = GpuCodeOptions(phases=("forward", "backward", "optimiser + EMA"))
    found = bench_gpu_code(ROOT / "rn_configs" / "convnext_tiny.yaml", options, kernels=["triton"])
    for name, phase in found.paths["triton"].items():
        assert phase["error"] == "", name
        assert {k["name"]: k["spilled_bytes"] for k in phase["kernels"] if k["spilled_bytes"]} == {}


# --- The command line ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either --config or --ladder"),
        (["--config", "no.yaml"], "no.yaml"),
        (["--config", str(ROOT / "rn_configs/convnext_tiny.yaml"), "--arch", "sm_12"], "invalid choice: 'sm_12'"),
        (["--config", str(ROOT / "rn_configs/convnext_tiny.yaml"), "--phases", "warp"], "phases = warp: expected some"),
        (["--ladder", str(ROOT / "tests")], "no step found"),
    ],
)
def test_wrong_options_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gpu-code", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_a_machine_without_the_tools_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module.torch.version, "cuda", None)
    with pytest.raises(ValueError, match="was built without CUDA; install torch's CUDA version"):
        GpuCodeOptions()
    monkeypatch.setattr(run_module.torch.version, "cuda", "13.2")
    monkeypatch.setattr(run_module, "find_spec", {}.get)
    with pytest.raises(ValueError, match="the package triton is not installed"):
        GpuCodeOptions()
    monkeypatch.setattr(run_module, "find_spec", lambda _: True)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ValueError, match="needs a C compiler: install gcc or clang, or name another one in CC"):
        GpuCodeOptions()


def test_the_ladder_has_fifteen_steps() -> None:
    assert len(ladder_steps(ROOT / "rn_configs")) == 15
