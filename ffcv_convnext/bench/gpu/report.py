"""The report of `bench gpu` as Markdown, from its JSON: a section for docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ffcv_convnext.formatting import markdown_table

TITLES = {
    "eager": "Step without a compiler",
    "augment": "Augmentation, compiled, beside a CPU's result",
    "augment_triton": "Augmentation by Triton kernels, beside a CPU's result",
    "step": "Step, compiled",
    "step_triton": "Step, compiled, with the Triton kernels",
    "update": "AdamW, averaged weights and cleared gradients",
    "kernels": "Depthwise 7x7 convolution and LayerNorm, forward and backward",
    "nccl": "Process group of one, through DDP",
    "peers": "timm in the same loop",
    "resume": "Kill and resume",
    "loader": "From a .beton",
    "ladder": "Every step of the ladder, without a compiler",
}


def to_markdown(found: Mapping[str, Any], title: str = "First contact", level: int = 2) -> str:
    """Return one line about the device, the outcome of every stage, ratios, and a table for each stage with figures.

    title, level: of the heading over all.
    """
    stages: Mapping[str, Mapping[str, Any]] = found["stages"]
    facts = _merged(stages.get("facts", {}).get("figures", []))
    lines = [f"{'#' * level} {title}", ""]
    if facts:
        lines += [", ".join(f"{name} {_cell(value)}" for name, value in facts.items()), ""]
    rows = [
        (name, stage["status"], _cell(stage.get("seconds")), stage.get("reason", "")) for name, stage in stages.items()
    ]
    lines += [markdown_table(("stage", "outcome", "s", "reason"), rows, "<<><")]
    if found["device"] == "cuda" and (ratios := _ratios(stages)):
        lines += ["", markdown_table(("ratio", "measured"), ratios, "<>")]
    for name, heading in TITLES.items():
        figures = stages.get(name, {}).get("figures", [])
        if figures:
            lines += ["", f"{'#' * (level + 1)} {heading}", "", _table(figures)]
    return "\n".join(lines)


def _ratios(stages: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the claims that a GPU has to confirm, as far as their stages have run."""
    merged = {name: _merged(stage.get("figures", [])) for name, stage in stages.items()}
    timm = {each.get("compiled"): each.get("images_per_s") for each in stages.get("peers", {}).get("figures", [])}
    pairs = [
        ("eager step, images/s, ours / timm's", merged.get("eager", {}).get("images_per_s"), timm.get("false")),
        ("compiled step, images/s, ours / timm's", merged.get("step", {}).get("images_per_s"), timm.get("true")),
        (
            "compiled step, images/s, Triton kernels / PyTorch's",
            merged.get("step_triton", {}).get("images_per_s"),
            merged.get("step", {}).get("images_per_s"),
        ),
        *(
            (f"compiled step{ending}, time / time as a CUDA graph", each.get("ms"), each.get("graphs_ms"))
            for ending, each in (("", merged.get("step", {})), (", Triton kernels", merged.get("step_triton", {})))
        ),
        (
            "augmentation, PyTorch's time / Triton's",
            merged.get("augment", {}).get("ms"),
            merged.get("augment_triton", {}).get("ms"),
        ),
        (
            "AdamW and averaged weights, PyTorch's time / Triton's",
            merged.get("update", {}).get("torch_ms"),
            merged.get("update", {}).get("triton_ms"),
        ),
        *(
            (f"first step{ending}, time / goal of 90 s", each.get("first_s"), each.get("first_goal_s"))
            for ending, each in (("", merged.get("step", {})), (", Triton kernels", merged.get("step_triton", {})))
        ),
        ("augmentation / compiled step, time", merged.get("augment", {}).get("ms"), merged.get("step", {}).get("ms")),
    ]
    found = [(name, f"{a / b:.3f}") for name, a, b in pairs if a and b]
    if share := merged.get("loader", {}).get("share_of_synthetic"):
        found.append(("step from a .beton / from crops in memory, images/s", f"{share:.3f}"))
    return found


def _merged(figures: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for each in figures:
        merged |= each
    return merged


def _table(figures: list[dict[str, Any]]) -> str:
    """Return one row for figures that come once each, or one row an entry if all entries have the same keys."""
    entries = figures if len({tuple(each) for each in figures}) == 1 else [_merged(figures)]
    if len(entries) == 1:
        return markdown_table(("figure", "value"), [(name, _cell(value)) for name, value in entries[0].items()], "<>")
    header = list(entries[0])
    return markdown_table(
        header, [[_cell(each[name]) for name in header] for each in entries], "<" + ">" * (len(header) - 1)
    )


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return "-" if value is None else str(value)
