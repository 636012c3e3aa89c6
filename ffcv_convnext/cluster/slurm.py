"""Batch jobs by way of submitit: the callable that a task runs, the sbatch script, the queue.

A job's life. Slurm sends SIGUSR2 to every task SIGNAL_DELAY_S before the time limit, SIGTERM before a pre-emption; the
training loop saves at its next step, where all ranks stand at the same one, and they exit with status 75. A task that
dies otherwise takes the others down (srun --kill-on-bad-exit). Either way srun returns to the batch script, whose last
line decides, in one place, whether the job is put back into the queue (`requeue`). A job that Slurm itself has
requeued, for a lost node or `scontrol requeue`, or that was cancelled, is left alone. When it starts again, the same
callable continues the same run folder.
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

from ffcv_convnext.cluster.requeue_policy import is_worth_another_try
from ffcv_convnext.cluster.settings import ClusterConfig
from ffcv_convnext.config import Config, nearest
from ffcv_convnext.errors import Failure, complain, exit_status
from ffcv_convnext.training import run_config

if TYPE_CHECKING:
    import submitit

SIGNAL_DELAY_S = 120  # the loop finishes its step and saves in it; --slurm_signal USR2@300 for more
DEFAULT_NGPUS = 8
ENDED = {  # squeue lists a job in these states for some minutes
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
}  # fmt: skip
FOLDER = "slurm"  # in job_dir: submitit's files, and what the tasks print


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """What every task of a job calls: one rank of a run."""

    settings: dict[str, Any]  # Config.flat()
    command: list[str]  # that submitted it, for run.json

    def __call__(self) -> None:
        """Train, or continue. A run that did not finish leaves with its exit status, which srun passes on."""
        import submitit

        task = submitit.JobEnvironment()
        os.environ.update(
            RANK=str(task.global_rank),
            WORLD_SIZE=str(task.num_tasks),
            LOCAL_RANK=str(task.local_rank),
            LOCAL_WORLD_SIZE=str(task.num_tasks // task.num_nodes),
        )  # MASTER_ADDR and MASTER_PORT are the batch script's
        sys.argv = list(self.command)
        if status := exit_status(lambda: run_config(Config.from_flat(self.settings))):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # srun's to the others; what srun sees shall be the status
            sys.exit(status)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """For submitit's own handler, which holds for the moment before a run installs its: the same again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def processes_per_node(cluster: ClusterConfig) -> int:
    return DEFAULT_NGPUS if cluster.ngpus is None else cluster.ngpus


def build_executor(
    cluster: ClusterConfig, *, code: Path, gpus: bool, max_parallel: int | None = None
) -> submitit.SlurmExecutor:
    """submitit's executor with everything but the jobs settled. Writes nothing.

    code: snapshot to run.   gpus: request them.   max_parallel: tasks of an array that run at the same time.
    Raises ValueError when submitit is not installed.
    """
    try:
        import submitit
    except ImportError:
        raise ValueError("submitit is not installed; pip install 'ffcv-convnext[slurm]', or --executor local") from None

    class Executor(submitit.SlurmExecutor):  # type: ignore[misc]
        @classmethod
        def affinity(cls) -> int:
            return 2  # whether Slurm is here, check_slurm says, in words that help; a dry run does without

    assert cluster.job_dir is not None
    folder = cluster.job_dir / FOLDER
    here, quoted = shlex.quote(sys.executable), shlex.quote(str(code))
    lost = f"error: {code} is not there on $(hostname): job_dir must lie on a file system that all nodes share"
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
        job_name=cluster.job_name,
        nodes=cluster.nodes,
        ntasks_per_node=tasks,
        gpus_per_node=tasks if gpus else None,
        cpus_per_task=cluster.cpus_per_task,
        mem=None if cluster.mem_gb is None else f"{round(cluster.mem_gb * 1024)}M",
        time=cluster.timeout_minutes,
        partition=cluster.partition,
        constraint=cluster.constraint,
        account=cluster.account,
        qos=cluster.qos,
        comment=cluster.comment,
        exclude=cluster.exclude,
        wckey=None,  # submitit's own word, which some clusters refuse
        signal_delay_s=SIGNAL_DELAY_S,
        array_parallelism=max_parallel or 256,
        setup=setup,
        # srun takes no --cpus-per-task from sbatch since Slurm 22.05: each task would have one core
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
    """What `submit` would hand to sbatch."""
    if num_jobs > 1:
        executor.parameters["map_count"] = num_jobs
    script: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return script


def submit(executor: submitit.SlurmExecutor, jobs: Sequence[TrainingJob]) -> list[str]:
    """Submit one job, or an array of several, all or none; returns their ids.

    Raises Failure with sbatch's words when it refuses.
    """
    import submitit

    chosen = {n: v for n, v in os.environ.items() if n == "SLURM_CONF" or n.startswith("SBATCH_")}  # by the user
    try:
        with (
            submitit.helpers.clean_env(),  # a job submitted from a job inherits nothing from it
            redirect_stderr(io.StringIO()),  # where submitit repeats sbatch's words
        ):
            os.environ.update(chosen)
            return [str(job.job_id) for job in executor.submit_array(jobs)]
    except submitit.core.utils.FailedJobError as error:
        words = [line.strip() for line in str(error).splitlines() if line.strip().startswith("sbatch: ")]
        raise Failure(
            f"nothing submitted: {'; '.join(dict.fromkeys(words)) or error}. Change the option it names; --dry_run "
            "shows the script"
        ) from None


def check_slurm(cluster: ClusterConfig) -> None:
    """Raises ValueError where there is no Slurm, no such partition, or a partition that never runs jobs so long."""
    for command in ("sbatch", "srun", "squeue", "scontrol", "sinfo"):
        if shutil.which(command) is None:
            raise ValueError(
                f"there is no {command} on this machine; submit from a login node of the cluster, or compute here with "
                "--executor local"
            )
    lines = _ask("sinfo", "--noheader", "--format=%P %l").splitlines()  # the default has a star: main* 1-00:00:00
    limits = {name: _minutes(limit) for name, limit in map(str.split, lines)}
    default = [name.rstrip("*") for name in limits if name.endswith("*")]
    limits = {name.rstrip("*"): limit for name, limit in limits.items()}
    chosen = default if cluster.partition is None else cluster.partition.split(",")
    for name in chosen:
        if name not in limits:
            raise ValueError(
                f"partition = {name}: this cluster has none of that name{nearest(name, limits)}; "
                f"there are: {', '.join(sorted(limits))}"
            )
    longest = max((limits[name] for name in chosen), default=math.inf)
    if cluster.timeout_minutes > longest and cluster.qos is None and "time" not in cluster.sbatch:  # a qos may allow it
        raise ValueError(
            f"timeout = {cluster.timeout:g}: partition {', '.join(chosen)} runs jobs of at most {longest / 60:g} "
            f"hours; say --timeout {longest / 60:g}: a run goes on in as many jobs as it takes"
        )


def _minutes(limit: str) -> float:
    """Slurm's 'infinite', '1-12:00:00', '12:00:00' or '30:00' in minutes."""
    if limit in ("infinite", "n/a"):
        return math.inf
    days, _, clock = limit.rpartition("-")
    *hours, minutes, seconds = map(int, clock.split(":"))
    return int(days or 0) * 1440 + sum(hours) * 60 + minutes + seconds / 60


def states(jobs: Iterable[str]) -> dict[str, str]:
    """Of those jobs that are still in the queue: id -> PENDING, RUNNING, REQUEUED, COMPLETING, ..."""
    wanted = set(jobs)
    if not wanted:
        return {}
    lines = _ask("squeue", "--noheader", "--me", "--array", "--states=all", "--format=%i %T").splitlines()
    found = dict(line.split() for line in lines)
    return {job: found[job] for job in wanted & found.keys() if found[job] not in ENDED}


def log_of_job(job_dir: Path, job: str) -> Path:
    """The file of what rank 0 of a job, its batch script and srun say on stderr."""
    return job_dir / FOLDER / f"{job}_0_log.err"


def cancel(jobs: Sequence[str]) -> None:
    _ask("scancel", *jobs)


def _ask(*command: str) -> str:
    """A Slurm command's output. Raises Failure with its words when it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except FileNotFoundError:
        raise Failure(f"there is no {command[0]} on this machine; ask on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise Failure(f"{command[0]} did not answer within 60 s; try again") from None
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split()) or f"exit status {error.returncode}"
        raise Failure(f"{command[0]} failed: {reason}; is this a login node of a cluster that runs?") from None


def requeue(status: int, folder: Path) -> int:
    """The last line of a batch script whose tasks ended with `status`, not 0: put the job back, or leave it.

    folder: submitit's.   Returns an exit status of its own.
    """
    import submitit

    os.environ["SUBMITIT_FOLDER"] = str(folder)
    env = submitit.JobEnvironment()
    if (state := states([env.job_id]).get(env.job_id)) != "RUNNING":
        return complain(f"job {env.job_id} is {state}: Slurm has decided what becomes of it", 0)
    job: TrainingJob = submitit.core.utils.DelayedSubmission.load(env.paths.submitted_pickle).function
    if not is_worth_another_try(Path(job.settings["output_dir"]), env.job_id, status):
        return complain(
            f"error: exit status {status}, and the jobs before it saved no newer checkpoint either; job {env.job_id} "
            "is not requeued. Mend the cause and submit again: the run continues from its last checkpoint",
            status,
        )
    complain(f"job {env.job_id} ended with exit status {status} before the run did; requeued", 0)
    _ask("scontrol", "requeue", env.job_id)
    return 0
