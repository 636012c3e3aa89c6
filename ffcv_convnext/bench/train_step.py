"""`bench step`: the training step beside those of timm and torchvision, or every step of the ladder in one table."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ffcv_convnext.bench.compare import Comparison, Row, compare
from ffcv_convnext.bench.loader import choose
from ffcv_convnext.bench.synthetic_data import write_photo_folder
from ffcv_convnext.config import Config, load_config
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.run import compiles

REFERENCE = "timm convnext_tiny"
NUM_PHOTOGRAPHS = 512
PATIENCE_SECONDS = 900.0  # torch.compile searches for minutes

Contestants = dict[str, tuple[str, dict[str, Any]]]  # name of the row -> function of steppers.py, its arguments


@dataclass(frozen=True, slots=True)
class StepReport:
    """A finished comparison of steps, and what one of them was made of."""

    comparison: Comparison
    batch_size: int

    def to_json(self) -> str:
        return json.dumps({**asdict(self.comparison), "batch_size": self.batch_size}, indent=2)

    def format(self) -> str:
        """Markdown: the rows, then the parts of the step that was profiled, beside the device's ceilings."""
        compared = self.comparison
        lines = [
            f"{compared.title}: {', '.join(f'{key} {value}' for key, value in compared.facts.items())}",
            "",
            f"| step | GMACs | images/s | min-max | ms | times {compared.reference} | min-max | peak GB | TFLOP/s "
            "| first step s |",
            "|---|" + "---:|" * 9,
            *map(self._line, compared.rows),
        ]
        for name, notes in compared.notes.items():
            if "shares" in notes:
                lines += ["", f"| part of: {name} | % |", "|---|---:|"]
                lines += [f"| {part} | {share:.1f} |" for part, share in notes["shares"].items()]
                lines += ["", *self._beside_ceilings(notes["ceilings"])]
        return "\n".join(lines)

    def _line(self, row: Row) -> str:
        if row.error:
            return f"| {row.name} | failed: {row.error} |" + " |" * 8
        notes = self.comparison.notes[row.name]
        memory = notes.get("peak_gb", row.peak_mb / 1e3)
        cells = [
            row.name,
            f"{notes['gmacs']:.3f}",
            f"{row.median:.4g}",
            f"{row.least:.4g}-{row.most:.4g}",
            f"{1000 * self.batch_size / row.median:.4g}",
            *(("-", "-") if row.ratio is None else (f"{row.ratio:.2f}", f"{row.ratio_least:.2f}-{row.ratio_most:.2f}")),
            f"{memory:.2f}",
            f"{flops_per_s(row, notes) / 1e12:.3g}",
            f"{row.first_s:.1f}",
        ]
        return f"| {' | '.join(cells)} |"

    def _beside_ceilings(self, ceilings: Mapping[str, float]) -> list[str]:
        flops, traffic = ceilings["flops_per_s"], ceilings["bytes_per_s"]
        lines = [f"Ceilings: {flops / 1e12:.3g} TFLOP/s (a matrix product), {traffic / 1e9:.4g} GB/s (a copy).", ""]
        for row in self.comparison.rows:
            if row.error:
                continue
            notes = self.comparison.notes[row.name]
            line = f"- {row.name}: {100 * flops_per_s(row, notes) / flops:.1f} % of the matrix product's rate"
            if "step_bytes" in notes:
                moved = notes["step_bytes"] * row.median / self.batch_size
                line += f"; its operations move {moved / 1e9:.4g} GB/s, {100 * moved / traffic:.0f} % of the copy's"
            lines.append(line)
        return lines


def flops_per_s(row: Row, notes: Mapping[str, Any]) -> float:
    """Of forward and backward: three times the forward's multiplications and additions."""
    return float(3 * 2 * notes["gmacs"] * 1e9 * row.median)


def bench_step(
    config: Config,
    *,
    ladder: Path | None,
    flags: Mapping[str, Any],
    photographs: Path | None,
    rounds: int,
    seconds: float,
    peers: Sequence[str] | None,
    say: Callable[[str], None],
) -> StepReport:
    """Measure steps of one micro-batch of batch_size.

    ladder: a folder of steps' YAML files; each of them with `flags` (settings) on top, instead of the peers.
    photographs: a folder of them, else those at hand, for the row that decodes, unless the config has a data_path.
    seconds: of a round, each contestant.   peers: how names of rows begin that are wanted beside timm's (None: all).
    Raises ValueError when nothing is called so, or there is no ladder in the folder.
    """
    device = Processes.from_environment(config.run.device).device
    with tempfile.TemporaryDirectory(prefix="bench-step-") as temporary:
        if ladder is not None:
            contestants = ladder_contestants(ladder, flags, device)
            reference = next(iter(contestants))
        else:
            contestants, reference = peer_contestants(config, device), REFERENCE
        chosen = choose(list(contestants), peers, reference)
        if any(contestants[name][1].get("images") == "loaded" for name in chosen):
            beton = _beton(config, photographs, Path(temporary), say)
        for _, arguments in contestants.values():
            arguments["seconds"] = seconds
            if arguments.get("images") == "loaded":
                arguments |= {"beton": str(beton), "num_workers": _num_workers(config)}
        facts = {
            "batch": config.data.batch_size,
            "pixels": config.data.input_size,
            "amp": config.run.amp,
            "optimiser": config.optim.opt,
            "averaged weights": str(config.run.model_ema).lower(),
            **machine_facts(device),
        }
        comparison = compare(
            "training step",
            [(name, f"{__package__}.steppers:{contestants[name][0]}", contestants[name][1]) for name in chosen],
            reference=reference,
            rounds=rounds,
            facts=facts,
            say=say,
            result="step",
            patience_s=PATIENCE_SECONDS,
        )
    return StepReport(comparison, config.data.batch_size)


def peer_contestants(config: Config, device: torch.device) -> Contestants:
    """timm's and torchvision's networks, and ours: eager, compiled where the config compiles, augmented, loaded.

    On a GPU with either kernels; the last two rows, one of which is profiled, with the config's.
    """
    compiled = compiles(config, device)
    endings = {"": False, ", compiled": True} if compiled else {"": False}
    contestants: Contestants = {}

    def add(row: str, function: str, compile: bool, kernels: str = "torch", **arguments: Any) -> None:
        flat = config.replace(update_freq=1, compile=str(compile).lower(), kernels=kernels).flat()
        contestants[row] = function, {"config": flat, **arguments}

    for network in ("convnext_tiny", "resnet50"):
        for ending, compile in endings.items():
            add(f"timm {network}{ending}", "peer", compile, library="timm", name=network)
    add("torchvision convnext_tiny", "peer", False, library="torchvision", name="convnext_tiny")
    for ending, compile in endings.items():
        add(f"ours{ending}", "ours", compile, images="ready")
        if device.type == "cuda" and config.model.model == "resnet" and config.run.channels_last:
            add(f"ours{ending}, triton", "ours", compile, "triton", images="ready")
    best, kernels = f"ours{', compiled' if compiled else ''}", config.run.kernels
    if kernels == "triton":
        best += ", triton"
    add(f"{best}, augmented", "ours", compiled, kernels, images="augmented", profile=True)
    add(f"{best}, augmented, from a .beton", "ours", compiled, kernels, images="loaded")
    return contestants


def ladder_contestants(folder: Path, flags: Mapping[str, Any], device: torch.device) -> Contestants:
    """Every numbered step in the folder, then convnext_tiny."""
    files = [*sorted(folder.glob("[0-9]*.yaml")), *folder.glob("convnext_tiny.yaml")]
    if not files:
        raise ValueError(f"--ladder {folder}: there is no step in it (00_NAME.yaml); give the folder rn_configs")
    contestants: Contestants = {}
    for file in files:
        config = load_config(file, overrides={**flags, "update_freq": 1})
        choice = str(compiles(config, device)).lower()
        contestants[file.stem] = "ours", {"config": config.replace(compile=choice).flat(), "images": "ready"}
    return contestants


def _num_workers(config: Config) -> int:
    return min(config.data.num_workers, len(os.sched_getaffinity(0)))


def _beton(config: Config, photographs: Path | None, work: Path, say: Callable[[str], None]) -> Path:
    """The config's training file, or one of photographs."""
    if config.data.data_path is not None:
        beton = config.data.data_path / "train.beton"
        if not beton.exists():
            raise FileNotFoundError(f"data_path = {config.data.data_path}: {beton} does not exist")
        return beton
    from ffcv_convnext.data.convert import ConversionOptions, convert

    say(f"converting {NUM_PHOTOGRAPHS} photographs")
    folder = write_photo_folder(work / "images", NUM_PHOTOGRAPHS, photographs=photographs)
    convert(ConversionOptions(data_path=folder, out_dir=work, split="train"))
    return work / "train.beton"


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Versions, and for a GPU what it is and may do: name, driver, clocks, power limit."""
    facts: dict[str, Any] = {}
    for name in ("torch", "torchvision", "timm", "triton"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "none"
    if device.type != "cuda":
        return {**facts, "device": "cpu", "threads": torch.get_num_threads()}
    facts |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    facts["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    if shutil.which("nvidia-smi"):
        names = ["driver_version", "clocks.sm", "clocks.max.sm", "clocks.max.mem", "power.limit"]
        command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            facts |= dict(zip(names, (value.strip() for value in answer.stdout.split(",")), strict=True))
    return facts
