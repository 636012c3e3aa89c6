"""Runs on this machine: one process per device, several runs at a time on different devices.

submitit's local executor waits until every process has ended. Here a process that fails ends the others of its run,
and the run is started again by the same rule as on a cluster.

A run is started once: its folder's `.launcher` is locked from the submission on, by this process and by the run's
processes, which inherit the lock. So a second command leaves the run alone, also while it waits for its turn, and also
if this process was killed and the run's processes go on.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ffcv_convnext.cluster.requeue_policy import decide, next_start
from ffcv_convnext.cluster.submissions import LOCAL
from ffcv_convnext.config import Config
from ffcv_convnext.errors import EXIT_FAILURE, EXIT_INTERRUPTED, Interrupted
from ffcv_convnext.files import write_atomically
from ffcv_convnext.formatting import format_count
from ffcv_convnext.run_folder import read_starts, try_lock
from ffcv_convnext.signals import stop_signals

FOLDER = "local"  # in job_dir: output of the processes
LAUNCHER = ".launcher"  # in the run folder
FAILURE_GRACE_S = 30  # after a process failed, the others are killed after this time
STOP_GRACE_S = 120  # a stopped run saves at its next step; it is killed after this time
POLL_S = 0.2


def choose_devices(wanted: int | None, device: str) -> list[str]:
    """Return the devices of a run on this machine: GPU indices for CUDA_VISIBLE_DEVICES; '' for a CPU process.

    wanted: number of devices; None: all GPUs, or one CPU process if there are none.
    Raises ValueError if there are fewer GPUs.
    """
    if device == "cpu":
        return [""] * (wanted or 1)
    import torch  # takes seconds

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    gpus = visible.split(",")[:count] if visible else [str(index) for index in range(count)]
    if not gpus and device == "auto":
        return [""] * (wanted or 1)
    if wanted is not None and wanted > len(gpus):
        raise ValueError(
            f"ngpus = {wanted}: this machine has {len(gpus)} GPUs; use --ngpus {len(gpus)}, or --device cpu"
        )
    return gpus if wanted is None else gpus[:wanted]


def output_of_run(job_dir: Path, name: str, seed: int, rank: int = 0) -> Path:
    """Return the file with the output of a run's process."""
    return job_dir / FOLDER / f"{name}_seed{seed}_{rank}.log"


def launcher_of(folder: Path) -> str | None:
    """Return 'process N on HOST' for the process that starts, or has started, the run of a folder; None without one."""
    try:
        with open(folder / LAUNCHER) as file:
            return None if try_lock(file, fcntl.LOCK_SH) != "held" else file.read().strip() or "a process"
    except FileNotFoundError:
        return None


def exit_code(status: int) -> int:
    """Return the exit status of a process as shells and Slurm report it: 128 plus the signal for a killed one."""
    return status if status >= 0 else 128 - status


@dataclass(slots=True)
class LocalRun:
    """A run and its processes. Raises ValueError if another process starts it already."""

    name: str
    config: Config
    code: Path  # snapshot of the source
    job_dir: Path
    devices: Sequence[str] = ()
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    kill_at: float | None = None  # deadline by time.monotonic, set when the run is stopped
    status: int = 0  # exit status of the process that failed first
    failed: int = 0  # its rank
    launcher: IO[str] = field(init=False)  # locked while this process or one of the run's lives
    num_starts: int = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.launcher = open(self.folder / LAUNCHER, "a+")  # noqa: SIM115  it stays open as long as the lock is held
        if try_lock(self.launcher, fcntl.LOCK_EX) == "held":
            self.launcher.close()
            raise ValueError(f"{self.folder}: queued or running ({launcher_of(self.folder)}); wait for it or stop it")
        self.launcher.truncate(0)
        self.launcher.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.launcher.flush()
        self.num_starts = len(read_starts(self.folder))

    @property
    def folder(self) -> Path:
        """The run folder."""
        assert self.config.run.output_dir is not None
        return self.config.run.output_dir

    def log(self, rank: int) -> Path:
        """Return the file with the output of a process."""
        return output_of_run(self.job_dir, self.name, self.config.run.seed, rank)

    def start(self, devices: Sequence[str]) -> None:
        """Start a process on each device."""
        self.devices, self.kill_at, self.status = devices, None, 0
        settings = self.log(0).with_suffix(".yaml")
        settings.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(settings, next_start(self.config, self.num_starts).to_yaml().encode())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(self.code), os.environ.get("PYTHONPATH")])),
            "CUDA_VISIBLE_DEVICES": ",".join(devices).strip(","),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(len(devices)),
            "LOCAL_WORLD_SIZE": str(len(devices)),
        }
        self.processes = []
        for rank in range(len(devices)):
            with open(self.log(rank), "ab") as output:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "ffcv_convnext.cli", "train", "--config", str(settings)],
                        cwd=self.code,
                        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        pass_fds=[self.launcher.fileno()],
                        start_new_session=True,  # this process forwards Ctrl-C, once
                    )
                )

    def poll(self) -> bool:
        """Return whether all processes have ended. If one failed, stop the others."""
        statuses = [process.poll() for process in self.processes]
        if not self.status and any(statuses):
            ended = [(exit_code(status), rank) for rank, status in enumerate(statuses) if status]
            self.status, self.failed = max(ended, key=lambda each: (each[0] != EXIT_INTERRUPTED, each[0]))
            self.stop(FAILURE_GRACE_S)
        if self.kill_at is not None and time.monotonic() > self.kill_at:
            self.kill()
        return None not in statuses

    def stop(self, grace_s: float) -> None:
        """Ask the processes to save and exit; they are killed after `grace_s` seconds."""
        self.kill_at = self.kill_at or time.monotonic() + grace_s
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the processes."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)


def run_all(
    runs: Sequence[LocalRun],
    *,
    devices: Sequence[str],
    world: int,
    max_parallel: int | None,
    say: Callable[[str], None],
) -> int:
    """Run in the given order, each run on `world` devices, as many runs at a time as there are devices for.

    CPU runs share the processor: max_parallel at a time, default one.
    Returns 0, or the exit status of the first failed run, after all have ended. Raises Interrupted if a signal stopped
    the runs after they had saved.
    """
    if not devices[0]:
        devices = [""] * world * (max_parallel or 1)
    at_once = min(len(devices) // world, max_parallel or len(runs))
    waiting, result = list(runs), 0
    running: list[LocalRun] = []
    free = list(devices)
    with stop_signals() as stop:
        try:
            while running or (waiting and not stop.requested):
                while waiting and len(running) < at_once and not stop.requested:
                    run = waiting.pop(0)
                    mine, free = free[:world], free[world:]
                    run.start(mine)
                    running.append(run)
                    on = "" if not mine[0] else f" on GPU {', '.join(mine)}"
                    say(f"started {run.folder}, {format_count(world, 'process')}{on}; output in {run.log(0)}")
                if stop.requested:
                    for run in running:
                        if run.kill_at is None:
                            run.stop(STOP_GRACE_S)
                for run in [run for run in running if run.poll()]:
                    running.remove(run)
                    free = [*run.devices, *free]
                    if run.status == 0:
                        say(f"finished {run.folder}")
                    elif stop.requested:
                        say(f"stopped {run.folder}")
                    else:
                        again, reason = decide(run.folder, f"{LOCAL}{os.getpid()}", run.status)
                        if again:
                            say(f"{run.folder} {reason}; started again")
                            waiting.insert(0, run)
                            continue
                        result = result or run.status
                        say(f"error: {run.folder} {reason}; not started again; see {run.log(run.failed)}")
                    run.launcher.close()
                time.sleep(POLL_S)
        finally:  # an error or a second Ctrl-C leaves no process behind
            for run in running:
                run.kill()
    if stop.requested:
        raise Interrupted(f"stopped by {stop.name}; the same command continues")
    return EXIT_FAILURE if result > EXIT_INTERRUPTED else result  # killed by a signal
