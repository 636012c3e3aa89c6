"""`bench scale --stages ranks`: a run by several processes of this machine, stopped, then continued by half of them.

The network is tiny and runs on the CPU, so the rows show what each process takes beside the network: the start up to
the first optimiser step, and the memory. Tables of the data file are mapped once for all of them, so the proportional
memory (Pss) grows less with the number of images than it would if each read them.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffcv_convnext.bench.memory import family
from ffcv_convnext.bench.scale_steps import anonymous_bytes, proportional_bytes
from ffcv_convnext.errors import Failure
from ffcv_convnext.files import read_lines
from ffcv_convnext.formatting import format_bytes, markdown_table
from ffcv_convnext.run_folder import STEP, STEPS

GLOBAL_BATCH = 64
NUM_STEPS = 3  # that are taken before the memory is read
TIMEOUT_S = 400.0  # until these steps are done
_POLL_S = 0.05
_SETTINGS = {
    **{"device": "cpu", "amp": "off", "input_size": 32, "recipe_batch": GLOBAL_BATCH, "num_workers": 1, "epochs": 2},
    **{"resnet_layers": "1-1-1-1", "resnet_embed_dim": 8, "resnet_stem": "patch_embed", "log_every": 1},
    **{"resnet_norm_layer": "ln", "resnet_act_layer": "gelu", "aa": "none", "reprob": 0.0, "warmup_epochs": 0},
}


@dataclass(frozen=True, slots=True)
class RanksRow:
    """A start of the run."""

    num_images: int
    processes: int
    start: str  # new, or continued
    first_step_s: float  # from the launcher's start to the end of the first optimiser step
    own: int  # bytes that a process has for itself, median
    most: int  # the same, maximum
    share: int  # own, and its share of what it maps together with others; median


def format_ranks(rows: Sequence[RanksRow]) -> str:
    """Return a Markdown table."""
    header = ["images", "processes", "start", "first step s", "memory a process", "at most", "with its share"]
    cells = [
        [
            f"{row.num_images:,}",
            str(row.processes),
            row.start,
            f"{row.first_step_s:.1f}",
            *(format_bytes(number) for number in (row.own, row.most, row.share)),
        ]
        for row in rows
    ]
    return markdown_table(header, cells, ">><>>>>")


def measure_ranks(folder: Path, number: int, processes: int, progress: Callable[[str], None]) -> Iterator[RanksRow]:
    """Yield a row for a new run of `processes`, and one for the same run continued by half of them.

    folder: holds train.beton with `number` images, and val.beton; the run goes there, too.
    Raises Failure if a run ends before its time.
    """
    before = 0
    for start, world in (("new", processes), ("continued", max(1, processes // 2))):
        progress(f"{number:,} images: {world} processes, {start}")
        seconds, memory, before = _train(folder, world, before)
        own, share = ([each[part] for each in memory] for part in (0, 1))
        yield RanksRow(
            number, world, start, seconds, int(statistics.median(own)), max(own), int(statistics.median(share))
        )


def _train(folder: Path, world: int, before: int) -> tuple[float, list[tuple[int, int]], int]:
    """Train until NUM_STEPS steps after step `before`, then stop.

    Returns the seconds to the first of them, the memory of each process (own, with its share), and the last step.
    """
    output, errors = folder / "run", folder / f"errors-{world}.txt"
    batch = GLOBAL_BATCH // world
    more = {"data_path": folder, "output_dir": output, "batch_size": min(batch, 8), "update_freq": max(1, batch // 8)}
    words = [word for name, value in {**_SETTINGS, **more}.items() for word in (f"--{name}", str(value))]
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(world), "-m", "ffcv_convnext.cli"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    with open(errors, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", *launcher, "train", *words],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=file,
        )
    try:
        _wait_for(output / STEPS, before + 1, process, errors)
        seconds = time.perf_counter() - started
        _wait_for(output / STEPS, before + NUM_STEPS, process, errors)
        memory = [(anonymous_bytes(pid), proportional_bytes(pid)) for pid in family(process.pid) if _is_rank(pid)]
        process.send_signal(signal.SIGTERM)
        process.wait(TIMEOUT_S)
    finally:
        for pid in reversed(family(process.pid)) if process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        process.wait()
    if len(memory) != world:
        raise Failure(f"{len(memory)} of {world} processes were found; see {errors}")
    return seconds, memory, _last_step(output / STEPS)


def _wait_for(steps: Path, step: int, process: subprocess.Popen[bytes], errors: Path) -> None:
    give_up = time.monotonic() + TIMEOUT_S
    while _last_step(steps) < step:
        if process.poll() is not None:
            lines = errors.read_text(errors="replace").strip().splitlines()
            said = [line for line in lines if line.startswith("error: ")] or lines  # torchrun adds a page
            raise Failure(f"training ended before step {step}: {' '.join(said[-1:])}")
        if time.monotonic() > give_up:
            raise Failure(f"step {step} was not reached in {TIMEOUT_S:g} s")
        time.sleep(_POLL_S)


def _last_step(path: Path) -> int:
    entries: list[dict[str, Any]] = read_lines(path, STEP, lambda _: None)  # the last line may be half written
    return int(entries[-1]["step"]) if entries else 0


def _is_rank(pid: int) -> bool:
    try:
        return b"\0LOCAL_RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has ended
        return False
