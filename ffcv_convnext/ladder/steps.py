"""The ladder is a folder of configs, rn_configs/: its steps, their sizes and the paper's results.

`NN_*.yaml` are the steps in order, each with the previous one as its `base:`; `convnext_*.yaml` is the network that
the paper released; `paper.json` maps a step's name to {"label": words for a figure, "top1": percent, "std": percent}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ffcv_convnext.config import Config, ModelConfig, format_value, load_config, read_mapping
from ffcv_convnext.formatting import format_number, markdown_table
from ffcv_convnext.ladder.size import count_resnet

STARTING_POINT = "ResNet-50 with the modern recipe"  # the change of a step without a base
PAPER = "paper.json"


@dataclass(frozen=True, slots=True)
class Step:
    """One config of the ladder."""

    name: str  # file name without .yaml
    path: Path
    base: str | None  # name of the step it builds on
    change: str  # flags that differ from its base, e.g. "--resnet_kernel_size 7"
    config: Config


@dataclass(frozen=True, slots=True)
class PaperResult:
    """ImageNet-1k top-1 of a step in the paper, percent; None where the paper has no value."""

    label: str  # short name for a figure, e.g. "patchify stem"
    top1: float | None = None
    std: float | None = None  # over its three seeds


def read_step(path: Path, known: Sequence[Step] = ()) -> Step:
    """Return a config as a step. known: steps that have been read already. Raises what `load_config` raises."""
    config = load_config(path)
    own = read_mapping(path)
    if own.get("base") is None:
        return Step(path.stem, path, None, STARTING_POINT, config)
    base = path.parent / str(own["base"])
    ours = config.flat()
    theirs = (next((step.config for step in known if step.path == base), None) or load_config(base)).flat()
    changed = [f"--{name} {format_value(ours[name])}" for name in own if name != "base" and ours[name] != theirs[name]]
    return Step(path.stem, path, base.stem, " ".join(changed), config)


def read_ladder(folder: Path) -> list[Step]:
    """Return the main steps of a ladder: the NN_*.yaml files of the folder itself, in order.

    Raises FileNotFoundError if there are none.
    """
    paths = sorted(folder.glob("[0-9][0-9]_*.yaml"), key=lambda path: natural_order(path.name))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no ladder: expected files such as {folder / '00_resnet50.yaml'}")
    steps: list[Step] = []
    for path in paths:
        steps.append(read_step(path, steps))
    return steps


def natural_order(text: str) -> list[tuple[bool, int, str]]:
    """Return a sort key that orders numbers by value: seed2 before seed10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"([0-9]+)", text)]


def read_released(folder: Path) -> list[Step]:
    """Return the network at the ladder's end as the paper released it, convnext_*.yaml; [] if there is none."""
    return [read_step(path) for path in sorted(folder.glob("convnext_*.yaml"))]


def select_steps(folder: Path, only: str | None = None, *, kernel_sizes: bool = False) -> list[Step]:
    """Return the steps to run: the ladder, the released network and, with `kernel_sizes`, the other kernel sizes.

    only: names, numbers and ranges of numbers, e.g. '05..08,convnext_tiny'; None: all.
    Raises ValueError if a part of it matches no step.
    """
    steps = [*read_ladder(folder), *read_released(folder)]
    if kernel_sizes:
        steps += read_ladder(folder / "kernel_sizes")
    if only is None:
        return steps
    chosen: set[str] = set()
    for part in only.split(","):
        first, dots, last = part.strip().partition("..")
        last = last if dots else first
        found = {step.name for step in steps if step.name == part.strip()}
        if first.isdigit() and last.isdigit():
            numbered = [step.name for step in steps if step.name[:2].isdigit()]
            found |= {name for name in numbered if int(first) <= int(name[:2]) <= int(last)}
        if not found:
            raise ValueError(
                f"only = {part}: {folder} has {', '.join(step.name for step in steps)}; e.g. --only 05..08"
            )
        chosen |= found
    return [step for step in steps if step.name in chosen]


def read_paper(folder: Path) -> dict[str, PaperResult]:
    """Return the paper's results by step name; {} if the folder has no paper.json.

    Raises ValueError if the file has another form.
    """
    path = folder / PAPER
    if not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_text())
        return {
            name: PaperResult(row.get("label", name), None if row["top1"] is None else float(row["top1"]), row["std"])
            for name, row in rows.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        form = '{"step": {"label": "kernel size 7", "top1": 80.57, "std": 0.14}, ...}'
        raise ValueError(f"{path}: expected {form}: {error}") from None


@cache
def size_of(config: ModelConfig, input_size: int, num_classes: int) -> tuple[int, float]:
    """Return a network's parameters and its GMACs for a square image of input_size pixels (three decimals)."""
    if config.model == "resnet":
        parameters, macs = count_resnet(config, input_size, num_classes)
        return parameters, round(macs / 1e9, 3)
    import torch  # takes seconds

    from ffcv_convnext.models import build_model, count_gmacs, count_parameters

    with torch.device("meta"):
        model = build_model(config, num_classes)
    return count_parameters(model), round(count_gmacs(model, input_size), 3)


def describe(folder: Path, *, input_size: int = 224, num_classes: int = 1000) -> list[dict[str, Any]]:
    """Return every step of a ladder, and the released network after them, with its size and the paper's result.

    input_size: side of the image for the GMACs, pixels. Returns rows with keys `name`, `change`,
    `parameters`, `gmacs` (three decimals) and `paper_top1` (percent, or None).
    """
    paper = read_paper(folder)
    rows = []
    for step in [*read_ladder(folder), *read_released(folder)]:
        parameters, gmacs = size_of(step.config.model, input_size, num_classes)
        rows.append(
            {
                "name": step.name,
                "change": step.change,
                "parameters": parameters,
                "gmacs": gmacs,
                "paper_top1": paper[step.name].top1 if step.name in paper else None,
            }
        )
    return rows


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of `describe` as a Markdown table."""
    header = ("name", "change", "parameters", "GMACs", "paper top-1")
    cells = [
        (
            str(row["name"]),
            str(row["change"]),
            f"{row['parameters']:,}",
            f"{row['gmacs']:.3f}",
            format_number(row["paper_top1"], ".2f"),
        )
        for row in rows
    ]
    return markdown_table(header, cells, "<<>>>")
