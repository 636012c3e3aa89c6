"""Whole paths on a GPU, and the list in docs/performance.md of what has run on which GPU.

`pytest -m gpu` runs the paths; they are skipped without a GPU. The checks of the list run everywhere.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import train_here

from ffcv_convnext.bench.gpu import STAGES, GpuOptions, bench_gpu
from ffcv_convnext.cli import main
from ffcv_convnext.cluster.local_executor import choose_devices
from ffcv_convnext.config import Config
from ffcv_convnext.training.evaluation import evaluate_only

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ffcv_convnext"
PAGE = ROOT / "docs" / "performance.md"
HEADING = "### What has run on which GPU"


def on_gpu(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**settings, "device": "cuda", "amp": "bf16", "aa": "rand-m9-mstd0.5-inc1", **changes}


def words(settings: dict[str, Any]) -> list[str]:
    """Settings as flags."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["auto", "torch", "triton"])
@pytest.mark.parametrize("compile", ["true", "false"])
def test_a_run_on_a_gpu_trains_and_evaluates(
    small_settings: dict[str, Any], tmp_path: Path, kernels: str, compile: str
) -> None:
    settings = on_gpu(small_settings, output_dir=str(tmp_path), kernels=kernels, compile=compile)
    scores = train_here(settings)
    (start,) = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert (start["device_type"], start["device"]) == ("cuda", torch.cuda.get_device_name(0))
    if kernels != "auto":
        assert {start["kernels"][part] for part in ("augment", "network", "optimizer")} == {kernels}
    found = evaluate_only(Config.from_flat({**settings, "eval": True}))[32]
    assert found["test_acc1"] == pytest.approx(scores["test_acc1"])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_train_one_network(small_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = on_gpu(small_settings, output_dir=str(tmp_path), epochs=1, warmup_epochs=0)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    subprocess.run([*command, *words(settings)], cwd=ROOT, check=True)
    assert json.loads((tmp_path / "run.json").read_text())["starts"][0]["processes"] == 2
    assert (tmp_path / "done").is_file()


@pytest.mark.gpu
@pytest.mark.slow
def test_every_stage_of_bench_gpu_succeeds(tmp_path: Path) -> None:
    stages = bench_gpu(GpuOptions(out=tmp_path))["stages"]
    assert list(stages) == list(STAGES)
    assert {name: stage for name, stage in stages.items() if stage["status"] not in ("ok", "skipped")} == {}


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("what", ["step", "augment"])
def test_the_benchmarks_of_a_step_measure_every_row(tmp_path: Path, what: str) -> None:
    out = tmp_path / "figures.json"
    flags = {"device": "cuda", "batch_size": 8, "input_size": 64, "model_ema": True, "seconds": 0.5, "rounds": 1}
    assert main(["bench", what, *words(flags), "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [row["error"] for row in found["rows"]] == [None] * len(found["rows"])
    assert found["facts"]["device"] == torch.cuda.get_device_name(0)


@pytest.mark.gpu
@pytest.mark.slow
def test_the_doctor_measures_the_step_of_a_gpu(small_settings: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "doctor.json"
    assert main(["doctor", *words(on_gpu(small_settings)), "--seconds", "0.5", "--json", str(out)]) == 0
    assert torch.cuda.get_device_name(0) in out.read_text()


@pytest.mark.gpu
def test_the_gpus_of_this_machine_are_found() -> None:
    assert choose_devices(1, "cuda") == choose_devices(None, "auto")[:1]


# --- the list ------------------------------------------------------------------------------------------------------


def gpu_branches() -> set[str]:
    """Return the functions that ask for a GPU or use one, as `folder/file.py: function`."""

    def walk(node: ast.AST, names: tuple[str, ...]) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = (*names, node.name)
        asks = isinstance(node, ast.Attribute) and (
            node.attr in ("is_cuda", "on_gpu") or ast.unparse(node) == "torch.cuda"
        )
        if isinstance(node, ast.Compare) and ast.unparse(node.left).split(".")[-1] in ("type", "device"):
            asks = ast.unparse(node.comparators[0]) == "'cuda'"
        if asks:
            yield ".".join(names)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, names)

    return {
        f"{path.relative_to(PACKAGE)}: {function}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent.name != "gpu_code"  # pretends to have a GPU
        for function in walk(ast.parse(path.read_text()), ())
    }


def gpu_tests() -> set[str]:
    """Return the tests with the mark `gpu`, as `folder/file.py::test`."""
    return {
        f"{path.relative_to(ROOT / 'tests')}::{node.name}"
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(each) == "pytest.mark.gpu" for each in node.decorator_list)
    }


def listed() -> list[tuple[set[str], str, str]]:
    """Return the rows of the list: functions, their test, and where it has passed."""
    section = PAGE.read_text().split(HEADING, 1)[1].split("\n#", 1)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    found = []
    for functions, test, last_run in rows:
        file, _, names = functions.strip().strip("`").partition(": ")
        found.append(({f"{file}: {name}" for name in names.split(", ")}, test.strip().strip("`"), last_run.strip()))
    return found


def test_every_branch_for_a_gpu_is_in_the_list() -> None:
    everything = set().union(*(functions for functions, _, _ in listed()))
    branches = gpu_branches()
    assert branches - everything == set(), f"add to the table in {PAGE.name}, with a gpu test"
    kernels = {each for each in everything if re.match(r"\w+/kernels/", each)}
    assert everything - branches - kernels == set(), f"not in the code any more; remove from the table in {PAGE.name}"


def test_the_list_names_each_gpu_test_and_no_other() -> None:
    assert {test for _, test, _ in listed()} == gpu_tests()


def test_the_list_claims_a_run_only_on_a_device_with_tables() -> None:
    """Where a test has passed is `never`, or devices whose tables of `bench gpu` are on the same page."""
    page = PAGE.read_text()
    for functions, _, last_run in listed():
        for device in re.sub(r" \(.*?\)", "", last_run).split(", "):
            assert device == "never" or f"<!-- device: {device} -->" in page, functions
