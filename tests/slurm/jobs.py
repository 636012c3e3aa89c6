"""Training jobs on the two-node cluster: submitted like a user does, and watched."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm.two_nodes import ENDED, TwoNodes, processes_of, wait_until

from ffcv_convnext.files import read_lines

ROOT = Path(__file__).resolve().parents[2]
ONE_HOUR = ("--timeout", "1")  # what the partition allows
TWO_BY_TWO = ("--nodes", "2", "--ngpus", "2", "--cpus_per_task", "2", *ONE_HOUR)
TWO_BY_ONE = ("--nodes", "2", "--ngpus", "1", "--cpus_per_task", "2", "--global_batch", "32", *ONE_HOUR)


def command_line(
    words: list[str], *, code: Path = ROOT, settings: Mapping[str, Any] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python with these words and settings as flags in a copy of the repository, one thread a process."""
    flags = [word for name, value in (settings or {}).items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(code)}
    return subprocess.run(
        [sys.executable, *words, *flags],
        cwd=code, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def submit(cluster: TwoNodes, folder: Path, settings: Mapping[str, Any], *flags: str, code: Path = ROOT) -> Job:
    """Run `train.py --job_dir FOLDER`; fails unless it submits exactly one job."""
    before = set(cluster.queue())
    words = ["train.py", "--job_dir", str(folder), *flags]
    result = command_line(words, code=code, settings=settings)
    assert result.returncode == 0, result.stderr
    [job_id] = re.findall(r"^submitted job (\S+): ", result.stdout, flags=re.MULTILINE)
    assert {line.split()[0] for line in set(cluster.queue()) - before} == {job_id}
    return Job(cluster, job_id, folder)


@dataclass(frozen=True)
class Job:
    cluster: TwoNodes
    id: str
    folder: Path  # job_dir, which is the run folder too

    def steps(self) -> int:
        """Optimiser steps in the log."""
        return max((entry["step"] for entry in read_lines(self.folder / "steps.jsonl")), default=0)

    def output(self, rank: int) -> str:
        """Output of a rank in all starts of the job."""
        return "".join((self.folder / "slurm" / f"{self.id}_{rank}_log.{end}").read_text() for end in ("out", "err"))

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        def there() -> bool:
            assert self.cluster.state(self.id) not in ENDED, self.cluster.describe(self.id)
            return self.steps() >= step

        wait_until(there, seconds, lambda: f"step {step}, but {self.steps()} of {self.cluster.describe(self.id)}")

    def wait_for_restart(self, seconds: float) -> None:
        wait_until(
            lambda: int(self.cluster.job(self.id)["Restarts"]) > 0,
            seconds, lambda: f"a restart of {self.cluster.describe(self.id)}",
        )  # fmt: skip

    def finish(self, seconds: float = 150) -> dict[str, str]:
        """Slurm's record of the job after its successful end."""
        record = self.cluster.wait_for_end(self.id, seconds)
        assert record["JobState"] == "COMPLETED", self.cluster.describe(self.id)
        return record

    def process(self, rank: int) -> int:
        """Process id of a rank."""
        marks = {f"SLURM_PROCID={rank}".encode(), f"SLURM_JOB_ID={self.id}".encode()}
        for pid in processes_of(self.cluster.folder):
            with contextlib.suppress(OSError):
                if marks <= set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
                    return pid
        raise AssertionError(f"no process of rank {rank}: {self.cluster.describe(self.id)}")
