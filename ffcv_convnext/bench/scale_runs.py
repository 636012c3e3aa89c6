"""`bench scale --stages runs`: `report` and `ladder status` over 45 generated runs of 300 epochs and 375,000 steps.

The run folders are made with the functions that a run writes them with. Their numbers are invented; the log points of
all runs are the same lines.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffcv_convnext.bench.memory import MemoryWatch
from ffcv_convnext.config import Config, load_config
from ffcv_convnext.errors import Failure
from ffcv_convnext.files import append_lines, write_object
from ffcv_convnext.formatting import markdown_table
from ffcv_convnext.run_folder import (
    DONE,
    EPOCHS,
    FACTS,
    STEPS,
    SUBMISSIONS,
    log_of_rank,
    write_config,
)

NUM_RUNS = (15, 45)
NUM_EPOCHS = 300
STEPS_PER_EPOCH = 1250
LOG_EVERY = 10
EVERY_NTH_STOPPED = 9  # the others are done
CONFIGS = Path("rn_configs")
TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class RunsRow:
    """A command on some runs."""

    num_runs: int
    command: str
    num_epochs: int  # lines of all log.jsonl
    seconds: float  # from the process's start to its end
    peak_mb: float  # MiB that the process had in memory at most, with libraries


def format_runs(rows: Sequence[RunsRow]) -> str:
    """Return a Markdown table."""
    header = ["command", "runs", "lines of epochs", "s", "memory at most"]
    cells = [
        [row.command, str(row.num_runs), f"{row.num_epochs:,}", f"{row.seconds:.2f}", f"{row.peak_mb:,.0f} MiB"]
        for row in sorted(rows, key=lambda row: (row.command, row.num_runs))
    ]
    return markdown_table(header, cells, "<>>>>")


def measure_runs(
    progress: Callable[[str], None], work: Path | None, *, num_runs: Sequence[int] = NUM_RUNS, epochs: int = NUM_EPOCHS
) -> Iterator[RunsRow]:
    """Yield a row for each number of runs and command. Raises FileNotFoundError without the ladder, Failure.

    work: folder for the runs; None: a temporary one.
    """
    for number in num_runs:
        with tempfile.TemporaryDirectory(prefix="bench-scale-", dir=work) as temporary:
            folder = Path(temporary)
            progress(f"{number} runs of {epochs} epochs: making the folders")
            lines = write_runs(folder, number, epochs)
            for words in (["report"], ["report", "--html"], ["ladder", "status"]):
                progress(f"{number} runs: {' '.join(words)}")
                seconds, peak = _run([*words, str(folder)])
                yield RunsRow(number, " ".join(words), lines, seconds, peak)


def write_runs(job_dir: Path, number: int, epochs: int) -> int:
    """Write runs of the steps and seeds as if they had been submitted from job_dir; return the lines of epochs."""
    files = [*sorted(CONFIGS.glob("[0-9]*.yaml")), *CONFIGS.glob("convnext_tiny.yaml")]
    if not files:
        raise FileNotFoundError(f"{CONFIGS} holds no steps of the ladder; start the command in the project's folder")
    shared = [job_dir / ".shared" / name for name in (STEPS, log_of_rank(job_dir, 0).name)]
    shared[0].parent.mkdir()
    _write_shared(shared[0], shared[1], epochs)
    submissions, lines = [], 0
    for index in range(number):
        file, seed = files[index % len(files)], index // len(files)
        folder = job_dir / file.stem / f"seed{seed}"
        folder.mkdir(parents=True)
        done = index % EVERY_NTH_STOPPED != EVERY_NTH_STOPPED - 1
        finished = epochs if done else epochs // 2
        overrides = {"seed": seed, "epochs": epochs, "warmup_epochs": epochs // 15}  # 20 of 300, as the paper
        _write_run(folder, load_config(file, overrides=overrides), finished, done=done)
        for path in shared:
            os.link(path, folder / path.name)
        lines += finished
        texts = {"time": "2026-01-01T00:00:00+0000", "job": f"local-{index}", "name": file.stem, "folder": str(folder)}
        code = {"code": str(job_dir / "code"), "commit": "0" * 40, "command": ["train.py"]}
        submissions.append({**texts, "seed": seed, "world": 8, "epochs": epochs, **code})
    append_lines(job_dir / SUBMISSIONS, submissions)
    return lines


def _write_run(folder: Path, config: Config, epochs: int, *, done: bool) -> None:
    write_config(folder, config)
    start = {"time": "2026-01-01T00:00:00+0000", "processes": 8, "device_type": "cuda", "device": "invented"}
    facts = {"run_id": "0" * 16, "n_parameters": 28_589_128, "num_classes": 1000, "global_batch": 1024}
    data = {"images": {"train": 1_281_167, "val": 50_000}, "data": {"train": "0" * 12, "val": "0" * 12}}
    starts = [{**start, "git": "0" * 40, "from_step": 0}]
    write_object(
        folder / FACTS,
        {"starts": starts, **facts, **data, "first_step": 0, "steps_per_epoch": STEPS_PER_EPOCH},
        indent=2,
    )
    append_lines(folder / EPOCHS, (_epoch(number, epochs, config.run.seed) for number in range(epochs)))
    if done:
        scores = {key: value for key, value in _epoch(epochs - 1, epochs, config.run.seed).items() if "test_" in key}
        write_object(folder / DONE, {"epochs": epochs, **scores})


def _epoch(epoch: int, epochs: int, seed: int) -> dict[str, Any]:
    rising = 1 - (1 - (epoch + 1) / epochs) ** 2
    scores: dict[str, float] = {}
    for suffix, lag in (("", 0.0), ("_ema", 0.1)):
        top1 = 78 * rising - lag * (1 - rising) + 0.1 * seed
        scores |= {f"test_acc1{suffix}": top1, f"test_acc5{suffix}": (100 + top1) / 2}
        scores[f"test_loss{suffix}"] = 7 - 6 * rising
    rates = {"images_per_s": 9000.0 + seed, "data_wait_s": 0.5, "train_s": 145.0, "epoch_s": 150.0, "bad_samples": 0}
    sizes = {"lr": 4e-3, "train_size": 224, "micro_batch": 128, "n_parameters": 28_589_128}
    step = STEPS_PER_EPOCH * (epoch + 1)
    return {"epoch": epoch, "step": step, "train_loss": 7 - 4 * rising, **scores, **rates, **sizes}


def _write_shared(steps: Path, log: Path, epochs: int) -> None:
    """Write the log points and the text log of a run."""
    numbers = range(LOG_EVERY, epochs * STEPS_PER_EPOCH + 1, LOG_EVERY)
    entries = (
        {
            **{"step": step, "epoch": (step - 1) // STEPS_PER_EPOCH, "loss": 7 - 4 * step / (epochs * STEPS_PER_EPOCH)},
            **{"lr": 4e-3, "weight_decay": 0.05, "images_per_s": 9000.0},
        }
        for step in numbers
    )
    append_lines(steps, entries)
    with open(log, "w") as file:
        for step in numbers:
            text = f"epoch {(step - 1) // STEPS_PER_EPOCH + 1}/{epochs} step {step}: loss 3.0000, lr 4.00e-03"
            file.write(f"2026-01-01 00:00:00,000 INFO ffcv_convnext.training.runlog: {text}\n")


def _run(words: Sequence[str]) -> tuple[float, float]:
    """Run a command; return its seconds and the most memory it had, MiB."""
    command = [sys.executable, "-m", "ffcv_convnext.cli", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        with MemoryWatch(process.pid) as watch:
            _, errors = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise Failure(f"{' '.join(words)} took more than {TIMEOUT_S:g} s") from None
    seconds = time.perf_counter() - started
    if process.returncode:
        raise Failure(f"{' '.join(words)} failed: {' '.join(errors.strip().splitlines()[-1:])}")
    return seconds, watch.peak.all_mb
