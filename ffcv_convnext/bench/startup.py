"""`bench startup`: from process start to the first training batch, ours beside stock FFCV; commands that must be quick.

A first start compiles, a second one uses the cache that the first one wrote. Python's own compiled files and the disk
cache are warm in both. Contestants take turns, round after round, each round with an empty folder for numba's cache.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ffcv_convnext.bench.compare import format_facts, use_cores
from ffcv_convnext.bench.contestants.loaders import BATCH, SIZE
from ffcv_convnext.bench.loader import convert_with_both
from ffcv_convnext.bench.options import FolderOptions
from ffcv_convnext.config import Config
from ffcv_convnext.errors import Failure
from ffcv_convnext.formatting import markdown_table
from ffcv_convnext.host import processor_name

# Each prints a line of JSON. Arguments: time of the process start, our folder, stock FFCV's file, number of workers.
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
loader = stock_train_loader(Path(sys.argv[3]), size={SIZE}, batch_size={BATCH}, num_workers=int(sys.argv[4]))
images, labels = next(iter(loader))
"""
REFERENCE = "stock FFCV"
CONTESTANTS = {
    "ours": _OURS,
    "ours, as train.py imports it": "import ffcv_convnext.training.run" + _OURS,
    REFERENCE: _STOCK,
}
STARTS = ("first", "second")
_TIMEOUT_S = 600.0
_LADDER = Path(__file__).resolve().parents[2] / "rn_configs"


@dataclass(frozen=True, slots=True)
class Row:
    """One contestant's first or second start: medians over the rounds, in seconds."""

    name: str
    start: str
    torch_s: float  # from process start to the end of `import torch`
    first_batch_s: float  # from process start to the first batch
    beyond_torch_s: float  # between the two
    min: float
    max: float
    cpu_s: float  # processor time between the two, all threads


@dataclass(frozen=True, slots=True)
class CommandRow:
    """One command that must be quick: medians over the rounds, in seconds."""

    name: str
    wall_s: float
    cpu_s: float  # user and system
    min: float  # of cpu_s
    max: float


@dataclass(frozen=True, slots=True)
class Startup:
    """A finished measurement and the machine it ran on."""

    facts: dict[str, Any]
    rows: list[Row]
    commands: list[CommandRow]

    def to_json(self) -> str:
        """Return all figures as JSON."""
        return json.dumps(asdict(self), indent=2)

    def format(self) -> str:
        """Return two Markdown tables with the facts above them."""
        header = ["import torch s", "first batch s", "beyond torch s", "min-max", "processor s beyond torch"]
        rows = [
            [
                *(row.name, row.start, f"{row.torch_s:.1f}", f"{row.first_batch_s:.1f}", f"{row.beyond_torch_s:.1f}"),
                *(f"{row.min:.1f}-{row.max:.1f}", f"{row.cpu_s:.1f}"),
            ]
            for row in self.rows
        ]
        parts = [format_facts("startup", self.facts), markdown_table(["loader", "start", *header], rows, "<<>>>>>")]
        if self.commands:
            cells = [
                [row.name, f"{row.wall_s:.2f}", f"{row.cpu_s:.2f}", f"{row.min:.2f}-{row.max:.2f}"]
                for row in self.commands
            ]
            parts.append(markdown_table(["command", "wall s", "processor s", "min-max"], cells, "<>>>"))
        return "\n\n".join(parts)


def bench_startup(options: FolderOptions) -> Startup:
    """Measure first and second starts of the loaders in CONTESTANTS, and the commands of quick_commands().

    Raises ValueError for fewer images than a batch, Failure if a start fails or takes more than ten minutes.
    """
    options.check_num_images(BATCH)
    with tempfile.TemporaryDirectory(prefix="bench-startup-") as temporary:
        work = Path(temporary)
        data = work / "data"  # train.beton, and the same file as val.beton
        commands = quick_commands(work, data)
        chosen = options.choose([*CONTESTANTS, *commands], REFERENCE)
        num_cores = use_cores(options.cores)
        folder = options.image_folder(work)
        options.progress(f"converting {folder}")
        paths = convert_with_both(folder, work, num_cores)
        data.mkdir()
        for split in ("train", "val"):
            for suffix in (".beton", ".json"):
                (data / split).with_suffix(suffix).symlink_to(paths["ours"].with_suffix(suffix))
        arguments = [str(work), str(paths["stock"]), str(num_cores)]
        found: dict[tuple[str, str], list[dict[str, float]]] = {}  # row's name, which start -> seconds of each round
        for number in range(options.rounds + 1):
            for name in chosen:
                if name in commands:
                    found.setdefault((name, ""), []).append(time_command(name, commands[name]))
                    continue
                with tempfile.TemporaryDirectory(dir=work) as cache:
                    for start in STARTS:
                        found.setdefault((name, start), []).append(_start(name, arguments, cache))
            options.progress(f"round {number}/{options.rounds}" if number else "warmed up")
    facts = {
        "cores": num_cores,
        "processor": processor_name(),
        "rounds": options.rounds,
        "images": options.num_images,
        "torch": version("torch"),
    }
    measured = {key: seconds[1:] for key, seconds in found.items()}  # without the round that warmed up
    return Startup(
        facts,
        [_row(name, start, rounds) for (name, start), rounds in measured.items() if start],
        [_command_row(name, rounds) for (name, start), rounds in measured.items() if not start],
    )


def quick_commands(work: Path, data_path: Path) -> dict[str, list[str]]:
    """Return the commands that must be quick, name -> arguments of `ffcv-convnext`.

    work: a folder, to which a made-up run and its submission are written.   data_path: the folder of train.beton and
    val.beton, which may be written later.   `ladder describe` is there in a source tree only.
    """
    job_dir, run = work / "job", work / "job" / "seed0" / "run"
    run.mkdir(parents=True)
    config = Config.from_flat({"output_dir": str(run)})
    (run / "config.yaml").write_text(config.to_yaml())
    (run / "run.json").write_text(json.dumps({"starts": []}))
    submission = {"time": "", "job": "local-1", "name": "run", "seed": 0, "folder": str(run), "world": 1}
    submission |= {"epochs": config.schedule.epochs, "code": "", "commit": "", "command": []}
    (job_dir / "submissions.jsonl").write_text(json.dumps(submission) + "\n")
    dry_run = ["train", "--dry_run", "--job_dir", str(work / "dry_run"), "--data_path", str(data_path)]
    dry_run += ["--device", "cpu", "--amp", "off", "--batch_size", "8", "--recipe_batch", "8"]
    commands = {
        "ffcv-convnext --help": ["--help"],
        "ffcv-convnext ladder describe": ["ladder", "describe", "--configs", str(_LADDER)],
        "ffcv-convnext ladder status": ["ladder", "status", str(job_dir)],
        "ffcv-convnext report": ["report", str(run)],
        "ffcv-convnext data info": ["data", "info", str(data_path / "train.beton")],
        "train.py --dry_run": dry_run,
        "write_ffcv_dataset.py --help": ["write", "--help"],
    }
    if not _LADDER.is_dir():
        del commands["ffcv-convnext ladder describe"]
    return commands


def time_command(name: str, arguments: list[str]) -> dict[str, float]:
    """Run one of quick_commands() and return its wall_s and cpu_s. Raises Failure if it fails."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    _run(name, ["-m", "ffcv_convnext.cli", *arguments], dict(os.environ))
    wall_s, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall_s": wall_s, "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def _start(name: str, arguments: list[str], cache: str) -> dict[str, float]:
    program = ["-c", f"{_BEGIN}{CONTESTANTS[name]}{_END}", str(time.time()), *arguments]
    output = _run(name, program, {**os.environ, "NUMBA_CACHE_DIR": cache})
    seconds: dict[str, float] = json.loads(output.splitlines()[-1])
    return seconds


def _run(name: str, arguments: list[str], environment: dict[str, str]) -> str:
    """Run Python and return its output."""
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"{name}: timeout, did not start in {_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise Failure(f"{name} did not start: {reason[0]}")
    return done.stdout


def _row(name: str, start: str, rounds: list[dict[str, float]]) -> Row:
    beyond = [each["first_batch_s"] - each["torch_s"] for each in rounds]
    torch_s, first_batch_s, cpu_s = (
        statistics.median(each[key] for each in rounds) for key in ("torch_s", "first_batch_s", "cpu_s")
    )
    return Row(name, start, torch_s, first_batch_s, statistics.median(beyond), min(beyond), max(beyond), cpu_s)


def _command_row(name: str, rounds: list[dict[str, float]]) -> CommandRow:
    wall_s, cpu_s = ([each[key] for each in rounds] for key in ("wall_s", "cpu_s"))
    return CommandRow(name, statistics.median(wall_s), statistics.median(cpu_s), min(cpu_s), max(cpu_s))
