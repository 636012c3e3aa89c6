"""What `bench gpu` measured about the Triton kernels, as a row of training/kernel_choice.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ffcv_convnext.files import write_atomically
from ffcv_convnext.training.kernel_choice import PARTS, TABLE, Part, is_faster, read_table

# part -> where the times of its rounds are: stage and figure with PyTorch's operations, then with Triton kernels
ROUNDS: dict[Part, tuple[tuple[str, str], tuple[str, str]]] = {
    "augment": (("augment", "rounds_ms"), ("augment_triton", "rounds_ms")),
    "network": (("step", "rounds_ms"), ("step_triton", "rounds_ms")),
    "optimizer": (("update", "torch_rounds_ms"), ("update", "triton_rounds_ms")),
}


def choice_row(found: Mapping[str, Any], date: str) -> tuple[str, dict[str, Any]]:
    """Return a measured device's name and its row in the table of `read_table`.

    found: the content of gpu.json.   date: of the measurement, YYYY-MM-DD.
    A part is in the row if both of its stages have succeeded; its ratios are PyTorch's time divided by Triton's.
    Raises ValueError if it was not measured on a GPU, or if no part was.
    """
    facts = _figures(found, "facts")
    if found["device"] != "cuda" or "device" not in facts:
        raise ValueError("a row of the table needs a measurement on a GPU, with the stage facts")
    row: dict[str, Any] = {
        "date": date,
        "versions": {name: facts[name] for name in ("torch", "triton", "cuda", "cudnn") if name in facts},
    }
    for part, ((stage, figure), (other_stage, other_figure)) in ROUNDS.items():
        torch: Sequence[float] = _figures(found, stage).get(figure, ())
        triton: Sequence[float] = _figures(found, other_stage).get(other_figure, ())
        if torch and triton:
            row[part] = {
                "speedup": round(median(torch) / median(triton), 4),
                "min_speedup": round(min(torch) / max(triton), 4),
                "max_speedup": round(max(torch) / min(triton), 4),
            }
    if not any(part in row for part in PARTS):
        raise ValueError("no part was measured with both kernels: nothing to choose")
    return facts["device"], row


def describe_row(device: str, row: Mapping[str, Any]) -> str:
    """Return the row as a line of text with the choice that follows from it."""
    words = [
        f"{part} {'triton' if is_faster(row[part]) else 'torch'} (PyTorch's time / Triton's "
        f"{row[part]['speedup']:.3g}, {row[part]['min_speedup']:.3g} to {row[part]['max_speedup']:.3g})"
        for part in PARTS
        if part in row
    ]
    return f"--kernels auto on {device}: {', '.join(words)}"


def merge_row(device: str, row: Mapping[str, Any], path: Path = TABLE) -> None:
    """Write the row into the table, in place of the device's old one; parts that it lacks are not kept."""
    devices = {**read_table(path), device: dict(row)}
    write_atomically(path, (json.dumps({"devices": dict(sorted(devices.items()))}, indent=2) + "\n").encode())


def _figures(found: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Return a stage's figures in one dict; empty if it has not succeeded."""
    content = found["stages"].get(stage, {})
    return (
        {name: value for each in content.get("figures", []) for name, value in each.items()}
        if (content.get("status") == "ok")
        else {}
    )
