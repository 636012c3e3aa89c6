"""Batch jobs through submitit: the callable that a task runs, the sbatch script, the queue.

How a job ends: Slurm sends SIGUSR2 to every task SIGNAL_DELAY_S before the time limit, and SIGTERM before a
pre-emption. The training loop saves at its next step, which is the same on all ranks, and exits with status 75. If a
task fails, srun ends the others (--kill-on-bad-exit). In both cases srun returns to the batch script, and its last line
(`requeue`) decides whether the job is requeued. Jobs that were cancelled, or that Slurm has already requeued (lost
node, `scontrol requeue`), are left as they are. When the job starts again, the same callable continues the same run.
"""

from __future__ import annotations

import io
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffcv_convnext.cluster.requeue_policy import should_requeue
from ffcv_convnext.cluster.settings import ClusterConfig
from ffcv_convnext.config import Config, nearest
from ffcv_convnext.errors import Failure, complain, exit_status
from ffcv_convnext.training import run_config

if TYPE_CHECKING:
    import submitit

SIGNAL_DELAY_S = 120  # time to finish a step and save; --slurm_signal USR2@300 gives more
DEFAULT_NGPUS = 8
ENDED = {  # squeue lists ended jobs for some minutes
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
}  # fmt: skip
# settings with the same name in ClusterConfig and in submitit
SAME_NAME = ("job_name", "nodes", "cpus_per_task", "partition", "constraint", "account", "qos", "comment", "exclude")
FOLDER = "slurm"  # in job_dir: submitit's files and the output of the tasks


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """The callable of every task of a job: one rank of a run."""

    settings: dict[str, Any]  # Config.flat()
    command: list[str]  # the user's command, for run.json

    def __call__(self) -> None:
        """Train or continue. If the run does not finish, exit with its status, which srun passes on."""
        import submitit

        task = submitit.JobEnvironment()
        os.environ.update(
            RANK=str(task.global_rank),
            WORLD_SIZE=str(task.num_tasks),
            LOCAL_RANK=str(task.local_rank),
            LOCAL_WORLD_SIZE=str(task.num_tasks // task.num_nodes),
        )  # the batch script sets MASTER_ADDR and MASTER_PORT
        sys.argv = list(self.command)
        if status := exit_status(lambda: run_config(Config.from_flat(self.settings))):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from srun; the exit status must reach srun
            sys.exit(status)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Return the same job, for submitit's signal handler, which is active until the run installs its own."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def processes_per_node(cluster: ClusterConfig) -> int:
    """Return the number of tasks on each node."""
    return DEFAULT_NGPUS if cluster.ngpus is None else cluster.ngpus


def build_executor(
    cluster: ClusterConfig, *, code: Path, gpus: bool, max_parallel: int | None = None
) -> submitit.SlurmExecutor:
    """Return submitit's executor with all parameters set. Writes nothing.

    code: snapshot to run.   gpus: request GPUs.   max_parallel: max tasks of an array at the same time.
    Raises ValueError if submitit is not installed.
    """
    try:
        import submitit
    except ImportError:
        raise ValueError("submitit is not installed; pip install 'ffcv-convnext[slurm]', or --executor local") from None

    class Executor(submitit.SlurmExecutor):  # type: ignore[misc]
        @classmethod
        def affinity(cls) -> int:
            return 2  # available: check_slurm checks for Slurm, and a dry run works without it

    assert cluster.job_dir is not None
    folder = cluster.job_dir / FOLDER
    here, quoted = shlex.quote(sys.executable), shlex.quote(str(code))
    lost = f"error: {code} not found on $(hostname): job_dir must be on a file system that all nodes share"
    setup = [
        f'cd {quoted} || {{ echo "{lost}" >&2; exit 2; }}',
        f"export PYTHONPATH={quoted}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export MASTER_ADDR=$(hostname)  # the batch script runs where rank 0 will",
        f'export MASTER_PORT=$({here} -c \'import socket; s = socket.socket(); s.bind(("", 0)); '
        "print(s.getsockname()[1])')",
    ]
    if cluster.nodes > 1:
        test = f'test -d {quoted} || {{ echo "{lost}" >&2; exit 1; }}'
        setup += [
            'srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 '
            f"bash -c {shlex.quote(test)} || exit 2"
        ]
    tasks = processes_per_node(cluster)
    executor = Executor(folder)
    executor.update_parameters(
        **{name: getattr(cluster, name) for name in SAME_NAME},
        ntasks_per_node=tasks,
        gpus_per_node=tasks if gpus else None,
        mem=None if cluster.mem_gb is None else f"{round(cluster.mem_gb * 1024)}M",
        time=cluster.timeout_minutes,
        wckey=None,  # submitit sets one, which some clusters refuse
        signal_delay_s=SIGNAL_DELAY_S,
        array_parallelism=max_parallel or 256,
        setup=setup,
        # since Slurm 22.05 srun ignores sbatch's --cpus-per-task: each task would have one core
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={cluster.cpus_per_task}"],
        teardown=[
            "status=$?",
            f"[ $status -eq 0 ] || {here} -m ffcv_convnext.cluster $status {shlex.quote(str(folder))}",
            "exit $status",
        ],
        additional_parameters={"requeue": True, **{n: v == "true" or v for n, v in cluster.sbatch.items()}},
    )
    return executor


def sbatch_script(executor: submitit.SlurmExecutor, num_jobs: int) -> str:
    """Return the script that `submit` passes to sbatch."""
    if num_jobs > 1:
        executor.parameters["map_count"] = num_jobs
    script: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return script


def submit(executor: submitit.SlurmExecutor, jobs: Sequence[TrainingJob]) -> list[str]:
    """Submit one job, or an array of several, all or none; return their ids.

    Raises Failure with sbatch's message if it fails.
    """
    import submitit

    chosen = {n: v for n, v in os.environ.items() if n == "SLURM_CONF" or n.startswith("SBATCH_")}  # set by the user
    try:
        with (
            submitit.helpers.clean_env(),  # a job submitted from a job inherits nothing from it
            redirect_stderr(io.StringIO()),  # submitit repeats sbatch's message there
        ):
            os.environ.update(chosen)
            return [str(job.job_id) for job in executor.submit_array(jobs)]
    except submitit.core.utils.FailedJobError as error:
        messages = [line.strip() for line in str(error).splitlines() if line.strip().startswith("sbatch: ")]
        raise Failure(
            f"nothing submitted: {'; '.join(dict.fromkeys(messages)) or error}. Change that option; --dry_run prints "
            "the script"
        ) from None


def check_slurm(cluster: ClusterConfig) -> None:
    """Raise ValueError if Slurm or the partition is not found, or if the time limit exceeds the partition's."""
    for command in ("sbatch", "srun", "squeue", "scontrol", "sinfo"):
        if shutil.which(command) is None:
            raise ValueError(
                f"{command} not found on this machine; submit from a login node of the cluster, or run on this machine "
                "with --executor local"
            )
    lines = _run("sinfo", "--noheader", "--format=%P %l").splitlines()  # the default has a star: main* 1-00:00:00
    limits = {name: _minutes(limit) for name, limit in map(str.split, lines)}
    default = [name.rstrip("*") for name in limits if name.endswith("*")]
    limits = {name.rstrip("*"): limit for name, limit in limits.items()}
    chosen = default if cluster.partition is None else cluster.partition.split(",")
    for name in chosen:
        if name not in limits:
            raise ValueError(
                f"partition = {name}: not found on this cluster{nearest(name, limits)}; "
                f"partitions: {', '.join(sorted(limits))}"
            )
    longest = max((limits[name] for name in chosen), default=math.inf)
    if cluster.timeout_minutes > longest and cluster.qos is None and "time" not in cluster.sbatch:  # a qos may allow it
        raise ValueError(
            f"timeout = {cluster.timeout:g}: partition {', '.join(chosen)} runs jobs of at most {longest / 60:g} "
            f"hours; use --timeout {longest / 60:g}: a run continues in as many jobs as it needs"
        )


def _minutes(limit: str) -> float:
    """Convert Slurm's 'infinite', '1-12:00:00', '12:00:00' or '30:00' to minutes."""
    if limit in ("infinite", "n/a"):
        return math.inf
    days, _, clock = limit.rpartition("-")
    *hours, minutes, seconds = map(int, clock.split(":"))
    return int(days or 0) * 1440 + sum(hours) * 60 + minutes + seconds / 60


def states(jobs: Iterable[str]) -> dict[str, str]:
    """Return the states of the jobs that are still in the queue: id -> PENDING, RUNNING, REQUEUED, COMPLETING, ..."""
    wanted = set(jobs)
    if not wanted:
        return {}
    lines = _run("squeue", "--noheader", "--me", "--array", "--states=all", "--format=%i %T").splitlines()
    found = dict(line.split() for line in lines)
    return {job: found[job] for job in wanted & found.keys() if found[job] not in ENDED}


def output_of_job(job_dir: Path, job: str) -> Path:
    """Return the file with stderr of a job's rank 0, batch script and srun."""
    return job_dir / FOLDER / f"{job}_0_log.err"


def cancel(jobs: Sequence[str]) -> None:
    """Cancel queued and running jobs."""
    _run("scancel", *jobs)


def _run(*command: str) -> str:
    """Return a Slurm command's output. Raises Failure with its message if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except FileNotFoundError:
        raise Failure(f"{command[0]} not found on this machine; run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise Failure(f"{command[0]} did not answer within 60 s; try again") from None
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split()) or f"exit status {error.returncode}"
        raise Failure(f"{command[0]} failed: {reason}; is this a login node, and does the cluster run?") from None


def requeue(status: int, folder: Path) -> int:
    """Requeue the job whose tasks ended with `status` (not 0), or leave it; return the exit status of this command.

    folder: submitit's.   The last line of the batch script calls this.
    """
    import submitit

    os.environ["SUBMITIT_FOLDER"] = str(folder)
    env = submitit.JobEnvironment()
    if (state := states([env.job_id]).get(env.job_id)) != "RUNNING":
        return complain(
            f"job {env.job_id} is {state or 'not in the queue'}; not requeued: Slurm has ended or requeued it", 0
        )
    job: TrainingJob = submitit.core.utils.DelayedSubmission.load(env.paths.submitted_pickle).function
    if not should_requeue(Path(job.settings["output_dir"]), env.job_id, status):
        return complain(
            f"error: exit status {status}, and previous starts saved no newer checkpoint; job {env.job_id} is not "
            "requeued. Fix the cause and submit again: the run continues from its last checkpoint",
            status,
        )
    complain(f"job {env.job_id} ended with exit status {status} before the run was finished; requeued", 0)
    _run("scontrol", "requeue", env.job_id)
    return 0
