"""`bench checkpoint`: how long a save holds up training, written by the loop and written by the thread.

The state is that of the config's network after a step: weights, averaged weights and the optimiser's moments. In each
round it is saved twice: by the loop, which waits until the file is on the disk, and as in training, where the loop
waits for a copy in memory and a thread writes that. Beside the thread the loop does small pieces of work (forward
passes of a convolution on one core), whose rate is compared with that without a thread: the interpreter's lock and the
memory are shared.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ffcv_convnext.bench.compare import format_facts
from ffcv_convnext.bench.options import StepOptions
from ffcv_convnext.bench.timing import synchronizer
from ffcv_convnext.bench.train_step import device_facts
from ffcv_convnext.formatting import format_bytes, markdown_table
from ffcv_convnext.host import available_cores, file_system, processor_name
from ffcv_convnext.training.checkpoint import LAST, Checkpoints, write_checkpoint
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.engine import Learner
from ffcv_convnext.training.run import build_learner

NUM_CLASSES = 1000
ALONE_S = 1.0  # of work without a thread, in each round


@dataclass(frozen=True, slots=True)
class Round:
    """One checkpoint, saved in both ways. All times in seconds."""

    in_loop_s: float  # until the file is on the disk; the loop waits as long
    blocked_s: float  # until the loop goes on, with the thread
    on_disk_s: float  # until the thread's file is on the disk, with blocked_s
    alone_rate: float  # pieces of work a second without the thread
    beside_rate: float  # and while the thread writes

    @property
    def share(self) -> float:
        """Of the time of a write, what the loop waits."""
        return self.blocked_s / self.on_disk_s

    @property
    def slower(self) -> float:
        """Share of the loop's work that is lost while the thread writes."""
        return 1 - self.beside_rate / self.alone_rate


@dataclass(frozen=True, slots=True)
class CheckpointTimes:
    """A finished measurement and the machine it ran on."""

    facts: Mapping[str, Any]
    num_bytes: int  # of the file
    rounds: Sequence[Round]  # the first one allocates the memory of the copy

    def to_json(self) -> str:
        """Return all figures as JSON."""
        return json.dumps(asdict(self), indent=2)

    def format(self) -> str:
        """Return Markdown: the first round, whose copy is the first, then the others."""
        later = self.rounds[1:]
        columns: dict[str, Callable[[Round], str]] = {
            "written by the loop s": lambda each: f"{each.in_loop_s:.2f}",
            "loop waits s": lambda each: f"{each.blocked_s:.3f}",
            "on disk after s": lambda each: f"{each.on_disk_s:.2f}",
            "waits, of the write": lambda each: f"{each.share:.1%}",
            "slower beside the write": lambda each: f"{each.slower:.1%}",
        }
        rows = [["first", *(cell(self.rounds[0]) for cell in columns.values())]]
        rows += [[str(number), *(cell(each) for cell in columns.values())] for number, each in enumerate(later, 2)]
        shares = [each.share for each in later]
        return "\n".join(
            [
                format_facts("a checkpoint", {"file": format_bytes(self.num_bytes), **self.facts}),
                "",
                markdown_table(["save", *columns], rows, "<" + ">" * len(columns)),
                "",
                f"After the first save the loop waits for {statistics.median(shares):.1%} "
                f"({min(shares):.1%}-{max(shares):.1%}) of the time of a write.",
            ]
        )


def bench_checkpoint(options: StepOptions) -> CheckpointTimes:
    """Save the state of the config's network, `rounds` times in each way, on the file system of output_dir.

    Raises ValueError for fewer than two rounds, Failure if a file cannot be written.
    """
    if options.rounds < 2:
        raise ValueError(f"rounds = {options.rounds}: bench checkpoint needs at least 2; the first one is different")
    if options.peers is not None:
        raise ValueError("peers: bench checkpoint has one row for each save; remove it")
    config = options.config
    processes = Processes.from_environment(config.run.device)
    num_classes = config.model.nb_classes or NUM_CLASSES
    learner = build_learner(config, processes, num_classes=num_classes, steps_per_epoch=10**6)
    content, wait = state_of(learner), synchronizer(processes.device)
    place = config.run.output_dir
    place = next(folder for folder in (place, *place.absolute().parents) if folder.is_dir()) if place else None
    work = piece_of_work()
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=place) as temporary:
        folder = Path(temporary)
        checkpoints = Checkpoints(folder)
        for number in range(options.rounds):
            wait()
            started = time.perf_counter()
            write_checkpoint(folder / "loop.pth", content)
            in_loop_s = time.perf_counter() - started
            alone_rate = rate_of(work, partial(_before, time.perf_counter() + ALONE_S))
            started = time.perf_counter()
            checkpoints.save(content)
            blocked_s = time.perf_counter() - started
            beside_rate = rate_of(work, lambda: checkpoints.writing)
            checkpoints.wait()
            on_disk_s = time.perf_counter() - started
            rounds.append(Round(in_loop_s, blocked_s, on_disk_s, alone_rate, beside_rate))
            options.progress(f"save {number + 1}/{options.rounds}: {blocked_s:.3f} of {on_disk_s:.2f} s")
        num_bytes = (folder / LAST).stat().st_size
        facts = {
            "network": config.model.model,
            "parameters": sum(parameter.numel() for parameter in learner.network.parameters()),
            "cores": available_cores(),
            "processor": processor_name(),
            "python": platform.python_version(),
            "disk": file_system(folder),
            **device_facts(processes.device),
        }
    return CheckpointTimes(facts, num_bytes, rounds)


def state_of(learner: Learner) -> dict[str, Any]:
    """Return weights, averaged weights and the optimiser's state after a step with gradients of zero."""
    for parameter in learner.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    ema = None if learner.ema is None else learner.ema.module.state_dict()
    return {"model": learner.network.state_dict(), "ema": ema, "optimizer": learner.optimizer.state_dict()}


def _before(moment: float) -> bool:
    return time.perf_counter() < moment


def piece_of_work() -> Callable[[], object]:
    """Return a function that computes for about a millisecond."""
    images, convolution = torch.rand(1, 16, 56, 56), torch.nn.Conv2d(16, 32, 3)

    def work() -> object:
        with torch.inference_mode():
            return convolution(images)

    return work


def rate_of(work: Callable[[], object], goes_on: Callable[[], bool]) -> float:
    """Do pieces of work on one core, at least one, while `goes_on`; return their number a second."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started, number = time.perf_counter(), 0
    while not number or goes_on():
        work()
        number += 1
    seconds = time.perf_counter() - started
    torch.set_num_threads(num_threads)
    return number / seconds
