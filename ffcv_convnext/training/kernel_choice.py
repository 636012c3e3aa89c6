"""Which parts of a training step use this package's Triton kernels: the setting, or the measurements of `bench gpu`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from ffcv_convnext.config import Config

TABLE = Path(__file__).with_suffix(".json")  # the measured devices; `bench gpu --write_choice` adds one
Part = Literal["augment", "network", "optimizer"]
PARTS: tuple[Part, ...] = ("augment", "network", "optimizer")

# On a device without measurements. The generated code of the augmentation, seen without a GPU, spills registers to
# memory and computes in float64; for the other two nothing but a measurement can decide.
UNMEASURED: Mapping[Part, bool] = {"augment": True, "network": False, "optimizer": False}


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """The parts of a step that use Triton kernels (True) or PyTorch's operations (False), and why."""

    augment: bool
    network: bool  # the blocks of `resnet`
    optimizer: bool  # AdamW with the averaged weights
    reason: str = ""  # a sentence for the log

    @property
    def words(self) -> str:
        """Return the choice as text, e.g. `augment triton, network torch, optimizer torch`."""
        return ", ".join(f"{part} {'triton' if getattr(self, part) else 'torch'}" for part in PARTS)

    def facts(self) -> dict[str, str]:
        """Return the choice for run.json: `triton` or `torch` for each part, and the reason."""
        return {**{part: "triton" if getattr(self, part) else "torch" for part in PARTS}, "reason": self.reason}


def choose_kernels(config: Config, device: torch.device, *, table: Path = TABLE) -> KernelChoice:
    """Return which parts of a step on this device use Triton kernels.

    `--kernels torch`: none; `triton`: all. `auto`: none on a CPU or without the package triton; else those that the
    row of the device in `table` shows to be faster, and UNMEASURED for what it does not list. A part whose kernels do
    not support the settings is not chosen by `auto`; `Config` refuses these settings with `triton`.
    Raises ValueError for `triton` on a CPU, and for a table that cannot be read.
    """
    setting = config.run.kernels
    if setting == "torch":
        return KernelChoice(False, False, False, "kernels = torch")
    if setting == "triton":
        check_device(config, device)
        return KernelChoice(True, True, True, "kernels = triton")
    if device.type != "cuda":
        return KernelChoice(False, False, False, "the Triton kernels need a CUDA device")
    if find_spec("triton") is None:
        return KernelChoice(False, False, False, "the package triton is not installed")
    name = torch.cuda.get_device_name(device)
    row = read_table(table).get(name)
    if row is None:
        reason = f"no measurement of {name}; make one: ffcv-convnext bench gpu --write_choice"
    else:
        reason = f"measured on {name} on {row['date']}"
    wanted = {part: UNMEASURED[part] if row is None or part not in row else is_faster(row[part]) for part in PARTS}
    return KernelChoice(
        wanted["augment"],
        wanted["network"] and config.network_without_triton() is None,
        wanted["optimizer"] and config.optimizer_without_triton() is None,
        reason,
    )


def check_device(config: Config, device: torch.device) -> None:
    """Raise ValueError for `--kernels triton` on a CPU."""
    if config.run.kernels == "triton" and device.type == "cpu":
        raise ValueError("kernels = triton needs a CUDA device; use --kernels torch on a CPU")


def is_faster(measured: Mapping[str, float]) -> bool:
    """Return whether Triton's slowest round was faster than PyTorch's fastest.

    measured: `min_speedup`, PyTorch's shortest time divided by Triton's longest.
    """
    return measured["min_speedup"] > 1


def read_table(path: Path = TABLE) -> dict[str, dict[str, Any]]:
    """Return the rows of the measured devices by torch's name of the device.

    A row has `date`, `versions`, and for each measured part `speedup` (the ratio of the median times, PyTorch's to
    Triton's), `min_speedup` and `max_speedup`.   Raises ValueError if the file is not such a table.
    """
    try:
        devices = json.loads(path.read_text())["devices"]
        for row in devices.values():
            row["date"].strip()
            for part in PARTS:
                is_faster(row.get(part, {"min_speedup": 0.0}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a table of measured devices ({type(error).__name__}: {error}); restore it from git, or "
            "choose --kernels torch or triton"
        ) from None
    found: dict[str, dict[str, Any]] = devices
    return found
