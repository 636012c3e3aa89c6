"""Which parts of a step use Triton kernels, by setting, device and table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import config_from, train_here

from ffcv_convnext.config import Config
from ffcv_convnext.training import kernel_choice
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.fused_adamw import FusedAdamW
from ffcv_convnext.training.kernel_choice import KernelChoice, choose_kernels, read_table
from ffcv_convnext.training.run import build_learner

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that has a name, on a machine with the package triton."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(kernel_choice, "find_spec", lambda name: name)


def parts(choice: KernelChoice) -> tuple[bool, bool, bool]:
    return choice.augment, choice.network, choice.optimizer


def table(folder: Path, **speedups: float) -> Path:
    """A table with one measured device. speedups: the smallest of each part."""
    path = folder / "table.json"
    rows = {part: {"speedup": 1.1, "min_speedup": low, "max_speedup": 1.2} for part, low in speedups.items()}
    path.write_text(json.dumps({"devices": {"Some GPU": {"date": "2026-12-01", "versions": {}, **rows}}}))
    return path


def choose(path: Path | None = None, device: torch.device = CUDA, **settings: Any) -> KernelChoice:
    return choose_kernels(Config.from_flat(settings), device, **({} if path is None else {"table": path}))


def test_a_word_decides_for_all_parts() -> None:
    assert parts(choose(kernels="torch")) == (False, False, False)
    assert parts(choose(kernels="triton")) == (True, True, True)


def test_auto_is_pytorch_on_a_cpu_and_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Config().run.kernels == "auto"
    assert parts(choose(device=CPU)) == (False, False, False)
    monkeypatch.setattr(kernel_choice, "find_spec", {}.get)
    assert choose() == KernelChoice(False, False, False, "the package triton is not installed")


@pytest.mark.usefixtures("gpu")
def test_a_device_that_was_not_measured_has_the_kernels_of_the_augmentation_alone() -> None:
    choice = choose()
    assert parts(choice) == (True, False, False)
    assert choice.words == "augment triton, network torch, optimizer torch"
    assert choice.reason == "no measurement of Some GPU; make one: ffcv-convnext bench gpu --write_choice"


@pytest.mark.usefixtures("gpu")
def test_auto_takes_what_was_faster_in_every_round(tmp_path: Path) -> None:
    path = table(tmp_path, augment=0.99, network=1.01, optimizer=1.0)
    choice = choose(path)
    assert parts(choice) == (False, True, False)
    assert choice.reason == "measured on Some GPU on 2026-12-01"
    assert parts(choose(table(tmp_path, network=1.2))) == (True, True, False), "not measured: as on another device"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model": "convnext_tiny"}, (True, False, True)),
        ({"channels_last": False}, (True, False, True)),
        ({"opt": "lamb"}, (True, True, False)),
    ],
)
def test_auto_leaves_out_what_the_settings_exclude(
    tmp_path: Path, settings: dict[str, Any], expected: tuple[bool, bool, bool]
) -> None:
    assert parts(choose(table(tmp_path, augment=2, network=2, optimizer=2), **settings)) == expected


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "text", ["{", "[]", '{"devices": {"a": {}}}', '{"devices": {"a": {"date": "x", "network": {"min_speedup": "1"}}}}']
)
def test_a_damaged_table_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"table\.json is not a table of measured devices"):
        choose(path)


def test_the_table_of_the_repository_can_be_read() -> None:
    for name, row in read_table().items():
        assert name
        assert set(row) == {"date", "versions", *(part for part in kernel_choice.PARTS if part in row)}


@pytest.mark.parametrize("optimizer", [False, True])
def test_the_learner_has_the_optimiser_that_was_chosen(small_settings: dict[str, Any], optimizer: bool) -> None:
    choice, alone = KernelChoice(False, False, optimizer), Processes(0, 1, 0, CPU)
    learner = build_learner(config_from(small_settings), alone, num_classes=4, steps_per_epoch=10, kernels=choice)
    assert isinstance(learner.optimizer, FusedAdamW) is optimizer


def test_a_run_records_its_kernels(small_settings: dict[str, Any], tmp_path: Path) -> None:
    train_here(small_settings, output_dir=tmp_path, epochs=1, warmup_epochs=0)
    start = json.loads((tmp_path / "run.json").read_text())["starts"][0]
    reason = "the Triton kernels need a CUDA device"
    assert start["kernels"] == {"augment": "torch", "network": "torch", "optimizer": "torch", "reason": reason}
    line = f"kernels: augment torch, network torch, optimizer torch: {reason}"
    assert line in (tmp_path / "rank0.log").read_text()
