"""`bench startup`: from the start of a process to its first training batch, ours beside stock FFCV.

A first start compiles, a second one finds what the first has kept. Python's own compiled files and the disk cache are
warm in both. Contestants take turns, round after round, each round with an empty folder for numba's cache.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ffcv_convnext.bench.compare import processor, use_cores
from ffcv_convnext.bench.contestants.loaders import BATCH, SIZE
from ffcv_convnext.bench.loader import choose, convert_for_all
from ffcv_convnext.bench.synthetic_data import image_folder
from ffcv_convnext.errors import Failure

# Each prints a line of JSON. Arguments: when the process was started, our folder, stock FFCV's file.
_BEGIN = """
import json, os, sys, time
from pathlib import Path
import torch
torch_s, torch_cpu_s = time.time() - float(sys.argv[1]), time.process_time()
"""
_END = """
first_batch_s, cpu_s = time.time() - float(sys.argv[1]), time.process_time() - torch_cpu_s
print(json.dumps({"torch_s": torch_s, "first_batch_s": first_batch_s, "cpu_s": cpu_s}), flush=True)
os._exit(0)
"""
_OURS = f"""
from ffcv_convnext.config import DataConfig
from ffcv_convnext.data.load import TrainLoader
config = DataConfig(data_path=Path(sys.argv[2]), batch_size={BATCH}, input_size={SIZE})
steps = TrainLoader(config, torch.device("cpu"), seed=0).steps(0)
images, labels = next(next(steps))
"""
_STOCK = f"""
from ffcv_convnext.bench.stock_ffcv import stock_train_loader
workers = len(os.sched_getaffinity(0))
loader = stock_train_loader(Path(sys.argv[3]), size={SIZE}, batch_size={BATCH}, num_workers=workers)
images, labels = next(iter(loader))
"""
REFERENCE = "stock FFCV"
CONTESTANTS = {
    "ours": _OURS,
    "ours, as train.py imports it": "import ffcv_convnext.training" + _OURS,
    REFERENCE: _STOCK,
}
STARTS = ("first", "second")
_PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Row:
    """One contestant's first or second start: medians over the rounds, in seconds."""

    name: str
    start: str
    torch_s: float  # from the start of the process to the end of `import torch`
    first_batch_s: float  # from the start of the process to the first batch
    beyond_torch_s: float  # between the two
    least: float
    most: float
    cpu_s: float  # processor time between the two, all threads


@dataclass(frozen=True, slots=True)
class Startup:
    """A finished measurement and the machine it ran on."""

    facts: dict[str, Any]
    rows: list[Row]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def format(self) -> str:
        """A Markdown table, the facts above it."""
        lines = [
            f"startup: {', '.join(f'{key} {value}' for key, value in self.facts.items())}",
            "",
            "| loader | start | import torch s | first batch s | beyond torch s | min-max | processor s beyond torch |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {row.name} | {row.start} | {row.torch_s:.1f} | {row.first_batch_s:.1f} | {row.beyond_torch_s:.1f} "
            f"| {row.least:.1f}-{row.most:.1f} | {row.cpu_s:.1f} |"
            for row in self.rows
        ]
        return "\n".join(lines)


def bench_startup(
    *,
    data_path: Path | None,
    photographs: Path | None,
    num_images: int,
    rounds: int,
    cores: int | None,
    peers: Sequence[str] | None,
    say: Callable[[str], None],
) -> Startup:
    """Measure on an ImageFolder, or on photographs (of a folder, or those at hand) when data_path is None.

    peers: how names in CONTESTANTS begin, whose rows are wanted beside stock FFCV's; None: all.
    Raises ValueError for fewer images than a batch, Failure when a start fails or takes ten minutes.
    """
    if num_images < BATCH or rounds < 1:
        raise ValueError(f"num_images = {num_images}, rounds = {rounds}: expected at least a batch of {BATCH}, and 1")
    chosen = choose(list(CONTESTANTS), peers, REFERENCE)
    num_cores = use_cores(cores)
    found: dict[tuple[str, str], list[dict[str, float]]] = {(name, start): [] for name in chosen for start in STARTS}
    with tempfile.TemporaryDirectory(prefix="bench-startup-") as temporary:
        work = Path(temporary)
        folder = image_folder(
            work / "images", num_images, data_path=data_path, photographs=photographs, originals=False
        )
        say(f"converting {folder}")
        paths = convert_for_all(folder, work)
        for number in range(-1, rounds):  # the first round only warms up
            for name in chosen:
                with tempfile.TemporaryDirectory(dir=work) as cache:
                    for start in STARTS:
                        seconds = _start(name, work, paths["stock"], cache)
                        if number >= 0:
                            found[name, start].append(seconds)
            say(f"round {number + 1}/{rounds}" if number >= 0 else "warmed up")
    facts = {
        "cores": num_cores,
        "processor": processor(),
        "rounds": rounds,
        "images": num_images,
        "torch": torch.__version__,
    }
    return Startup(facts, [_row(name, start, seconds) for (name, start), seconds in found.items()])


def _start(name: str, ours: Path, stock: Path, cache: str) -> dict[str, float]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"{_BEGIN}{CONTESTANTS[name]}{_END}", str(time.time()), str(ours), str(stock)],
            env={**os.environ, "NUMBA_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            check=False,
            timeout=_PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"{name} did not start in {_PATIENCE_S:.0f} s") from None
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise Failure(f"{name} did not start: {reason[0]}")
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def _row(name: str, start: str, rounds: list[dict[str, float]]) -> Row:
    beyond = [each["first_batch_s"] - each["torch_s"] for each in rounds]
    torch_s, first_batch_s, cpu_s = (
        statistics.median(each[key] for each in rounds) for key in ("torch_s", "first_batch_s", "cpu_s")
    )
    return Row(name, start, torch_s, first_batch_s, statistics.median(beyond), min(beyond), max(beyond), cpu_s)
