"""The ladder is a folder of configs, rn_configs/: its steps, their sizes and the paper's results.

`NN_*.yaml` are the steps in order, each with the one before as its `base:`; `convnext_*.yaml` is the network the
paper released; `paper.json` beside them maps a step's name to {"top1": percent, "std": percent or null}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ffcv_convnext.config import Config, ModelConfig, format_value, load_config

STARTING_POINT = "ResNet-50 with the modern recipe"  # the change of a step that has no base
PAPER = "paper.json"


@dataclass(frozen=True, slots=True)
class Step:
    """One config of the ladder."""

    name: str  # its file's name without .yaml
    path: Path
    change: str  # the flags that lead here from its base, e.g. "--resnet_kernel_size 7"
    config: Config


def read_step(path: Path) -> Step:
    """One config as a step. Raises what `load_config` raises."""
    return Step(name=path.stem, path=path, change=change_of(path), config=load_config(path))


def change_of(path: Path) -> str:
    """The settings that `path` states otherwise than its base does, as flags, in the file's order."""
    ours = load_config(path).flat()
    own = yaml.safe_load(path.read_text()) or {}
    if own.get("base") is None:
        return STARTING_POINT
    theirs = load_config(path.parent / str(own["base"])).flat()
    changed = [name for name in own if name != "base" and ours[name] != theirs[name]]
    return " ".join(f"--{name} {format_value(ours[name])}" for name in changed)


def read_ladder(folder: Path) -> list[Step]:
    """The ladder's main steps, the NN_*.yaml of the folder itself, in order.

    Raises FileNotFoundError when there are none.
    """
    paths = sorted(folder.glob("[0-9][0-9]_*.yaml"), key=_in_reading_order)
    if not paths:
        raise FileNotFoundError(f"{folder} holds no ladder: expected files such as {folder / '00_resnet50.yaml'}")
    return [read_step(path) for path in paths]


def _in_reading_order(path: Path) -> list[str | int]:
    """Numbers by value: kernel5 before kernel11."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def read_released(folder: Path) -> list[Step]:
    """The network the paper released at the ladder's end, convnext_*.yaml; may be empty."""
    return [read_step(path) for path in sorted(folder.glob("convnext_*.yaml"))]


def select_steps(folder: Path, only: str | None = None, *, kernel_sizes: bool = False) -> list[Step]:
    """The steps to run: the ladder's and the released network, with the other kernel sizes after them if wanted.

    only: names, numbers and ranges of numbers, e.g. '05..08,convnext_tiny'; None: all.
    Raises ValueError when a part of it fits no step.
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


def read_paper(folder: Path) -> dict[str, dict[str, float | None]]:
    """The paper's ImageNet-1k results by step name: {"top1": percent, "std": of its seeds or None}; {} without a file.

    Raises ValueError for a file of another form.
    """
    path = folder / PAPER
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_text())
        return {str(name): {"top1": float(row["top1"]), "std": row["std"]} for name, row in results.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f'{path}: expected {{"step": {{"top1": 78.82, "std": 0.07}}, ...}}: {error}') from None


@cache
def size_of(config: ModelConfig, input_size: int, num_classes: int) -> tuple[int, float]:
    """Parameters of a network and its GMACs for a square image of input_size pixels (three decimals).

    The network is built on the meta device: no memory, no computing.
    """
    import torch  # seconds, which the names and settings of the steps do not need

    from ffcv_convnext.models import build_model, count_gmacs, count_parameters

    with torch.device("meta"):
        model = build_model(config, num_classes)
    return count_parameters(model), round(count_gmacs(model, input_size), 3)


def describe(folder: Path, *, input_size: int = 224, num_classes: int = 1000) -> list[dict[str, Any]]:
    """Every step of a ladder, and the released network after them, with its size and the paper's result.

    input_size: side of the image that GMACs are counted for, pixels. Returns rows with keys `name`, `change`,
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
                "paper_top1": paper.get(step.name, {}).get("top1"),
            }
        )
    return rows


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """`describe`'s rows as a Markdown table that is aligned as plain text too."""
    header = ("name", "change", "parameters", "GMACs", "paper top-1")
    cells = [
        (
            str(row["name"]),
            str(row["change"]),
            f"{row['parameters']:,}",
            f"{row['gmacs']:.3f}",
            "" if row["paper_top1"] is None else f"{row['paper_top1']:.2f}",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (header, *cells)) for i in range(len(header))]

    def line(words: Sequence[str]) -> str:
        left = [word.ljust(width) for word, width in zip(words[:2], widths[:2], strict=True)]
        right = [word.rjust(width) for word, width in zip(words[2:], widths[2:], strict=True)]
        return f"| {' | '.join([*left, *right])} |"

    rule = ["-" * width for width in widths[:2]] + ["-" * (width - 1) + ":" for width in widths[2:]]
    return "\n".join([line(header), line(rule), *map(line, cells)])
