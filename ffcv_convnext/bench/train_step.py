"""`bench step`: the training step beside those of timm and torchvision, or every step of the ladder in one table."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ffcv_convnext.bench.compare import Comparison, Row, compare, format_rows
from ffcv_convnext.bench.options import StepOptions
from ffcv_convnext.bench.synthetic_data import write_synthetic_folder
from ffcv_convnext.config import Config, load_config
from ffcv_convnext.formatting import markdown_table
from ffcv_convnext.host import available_cores
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.kernel_choice import choose_kernels
from ffcv_convnext.training.run import compiles

REFERENCE = "timm convnext_tiny"
NUM_IMAGES = 512  # synthetic ones, for the row that decodes
TIMEOUT_S = 900.0  # torch.compile searches for minutes

Contestants = dict[str, tuple[str, dict[str, Any]]]  # row -> function in contestants/steps.py, its arguments


@dataclass(frozen=True, slots=True)
class StepComparison:
    """A finished comparison of steps, and the profile of one of them."""

    comparison: Comparison
    batch_size: int

    def to_json(self) -> str:
        """Return all figures as JSON."""
        return json.dumps({**asdict(self.comparison), "batch_size": self.batch_size}, indent=2)

    def format(self) -> str:
        """Return Markdown: the rows, then the profiled step's parts and the device's limits."""
        compared = self.comparison
        header = ["GMACs", "images/s", "min-max", "ms", f"ratio to {compared.reference}", "min-max", "peak GB"]
        lines = [format_rows(compared, "step", [*header, "TFLOP/s", "first step s"], self._cells)]
        for name, notes in compared.notes.items():
            if "shares" in notes:
                shares = [(part, f"{share:.1f}") for part, share in notes["shares"].items()]
                lines += ["", markdown_table((f"part of: {name}", "%"), shares, "<>")]
                lines += ["", *self._relative_to_limits(notes["ceilings"])]
        return "\n".join(lines)

    def _cells(self, row: Row) -> Sequence[str]:
        notes = self.comparison.notes[row.name]
        return [
            f"{notes['gmacs']:.3f}",
            f"{row.median:.4g}",
            f"{row.min:.4g}-{row.max:.4g}",
            f"{1000 * self.batch_size / row.median:.4g}",
            *row.format_ratio(),
            f"{notes.get('peak_gb', row.peak_mb / 1e3):.2f}",
            f"{flops_per_s(row, notes) / 1e12:.3g}",
            f"{row.first_s:.1f}",
        ]

    def _relative_to_limits(self, limits: Mapping[str, float]) -> list[str]:
        flops, traffic = limits["flops_per_s"], limits["bytes_per_s"]
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
    """Return the rate of forward and backward: three times the forward's multiplications and additions."""
    return float(3 * 2 * notes["gmacs"] * 1e9 * row.median)


def bench_step(options: StepOptions) -> StepComparison:
    """Measure steps of one micro-batch of batch_size.

    options.ladder: measure each step's YAML file in that folder, with options.flags on top, instead of the peers.
    The row that decodes reads the config's data_path, or synthetic images.   Raises ValueError for unknown peers, or
    if the folder has no steps.
    """
    config = options.config
    device = Processes.from_environment(config.run.device).device
    with tempfile.TemporaryDirectory(prefix="bench-step-") as temporary:
        if options.ladder is not None:
            contestants = ladder_contestants(options.ladder, options.flags, device)
            reference = next(iter(contestants))
        else:
            contestants, reference = peer_contestants(config, device), REFERENCE
        chosen = options.choose(list(contestants), reference)
        if any(contestants[name][1].get("images") == "loaded" for name in chosen):
            beton = training_beton(options, Path(temporary))
        for _, arguments in contestants.values():
            arguments["seconds"] = options.seconds
            if arguments.get("images") == "loaded":
                num_workers = min(config.data.num_workers, available_cores())
                arguments |= {"beton": str(beton), "num_workers": num_workers}
        facts = {
            "batch": config.data.batch_size,
            "pixels": config.data.input_size,
            "amp": config.run.amp,
            "optimiser": config.optim.opt,
            "averaged weights": str(config.run.model_ema).lower(),
            **device_facts(device),
        }
        comparison = compare(
            "training step",
            [
                (name, f"{__package__}.contestants.steps:{contestants[name][0]}", contestants[name][1])
                for name in chosen
            ],
            options,
            reference=reference,
            facts=facts,
            result="step",
            timeout_s=TIMEOUT_S,
        )
    return StepComparison(comparison, config.data.batch_size)


def peer_contestants(config: Config, device: torch.device) -> Contestants:
    """Return timm's and torchvision's networks, and ours: eager, compiled if the config compiles, augmented, loaded.

    On a GPU also with Triton kernels; the last two rows have the config's kernels, and one of them is profiled.
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
        if device.type == "cuda" and not (config.network_without_triton() or config.optimizer_without_triton()):
            add(f"ours{ending}, triton", "ours", compile, "triton", images="ready")
    best, kernels = f"ours{', compiled' if compiled else ''}", config.run.kernels
    if choose_kernels(config, device).network:
        best += ", triton"
    add(f"{best}, augmented", "ours", compiled, kernels, images="augmented", profile=True)
    add(f"{best}, augmented, from a .beton", "ours", compiled, kernels, images="loaded")
    return contestants


def ladder_contestants(folder: Path, flags: Mapping[str, Any], device: torch.device) -> Contestants:
    """Return every numbered step in the folder, then convnext_tiny."""
    files = [*sorted(folder.glob("[0-9]*.yaml")), *folder.glob("convnext_tiny.yaml")]
    if not files:
        raise ValueError(f"--ladder {folder}: no step found (00_NAME.yaml); give the folder rn_configs")
    contestants: Contestants = {}
    for file in files:
        config = load_config(file, overrides={**flags, "update_freq": 1})
        choice = str(compiles(config, device)).lower()
        contestants[file.stem] = "ours", {"config": config.replace(compile=choice).flat(), "images": "ready"}
    return contestants


def training_beton(options: StepOptions, work: Path) -> Path:
    """Return the config's training file, or one of synthetic images, written to `work`."""
    data_path = options.config.data.data_path
    if data_path is not None:
        beton = data_path / "train.beton"
        if not beton.exists():
            raise FileNotFoundError(f"data_path = {data_path}: {beton} not found")
        return beton
    from ffcv_convnext.data.convert import ConversionOptions, convert

    options.progress(f"converting {NUM_IMAGES} synthetic images")
    folder = write_synthetic_folder(work / "images", NUM_IMAGES, photographs=options.photographs)
    convert(ConversionOptions(data_path=folder, out_dir=work, split="train"))
    return work / "train.beton"


def device_facts(device: torch.device) -> dict[str, Any]:
    """Return package versions, and a GPU's name, driver, clocks and power limit."""
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
