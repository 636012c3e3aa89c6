"""Batch jobs through submitit: the callable that a task runs, the sbatch script, the queue.

How a job ends: Slurm sends SIGUSR2 to every task SIGNAL_DELAY_S before the time limit, and SIGTERM before a
pre-emption. The training loop saves at its next step, which is the same on all ranks, and exits with status 75. If a
task fails, srun ends the others (--kill-on-bad-exit). In both cases srun returns to the batch script, and its last line
(`requeue`) decides whether the job is requeued. Jobs that were cancelled, or that Slurm has already requeued (lost
node, `scontrol requeue`), are left as they are. When the job starts again, the same callable continues the same run.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from ffcv_convnext.cluster.requeue_policy import decide, next_start
from ffcv_convnext.cluster.settings import ClusterConfig
from ffcv_convnext.config import Config, nearest
from ffcv_convnext.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE, Failure, complain, exit_status
from ffcv_convnext.files import write_atomically
from ffcv_convnext.signals import ignore_sigterm
from ffcv_convnext.training import run_config

if TYPE_CHECKING:
    import submitit

SIGNAL_DELAY_S = 120  # time to finish a step and save; --slurm_signal USR2@300 gives more
DEFAULT_NGPUS = 8
TIMEOUT_S = 60.0  # for an answer of squeue, sinfo, sacct, scontrol or scancel
ENDED = {  # squeue lists ended jobs for some minutes
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
}  # fmt: skip
# settings with the same name in ClusterConfig and in submitit
SAME_NAME = ("job_name", "nodes", "cpus_per_task", "partition", "constraint", "account", "qos", "comment", "exclude")
FOLDER = "slurm"  # in job_dir: submitit's files and the output of the tasks


class Job(Protocol):
    """The callable of every task of a job."""

    @property
    def folder(self) -> Path:
        """Where its ends are recorded."""

    @property
    def progress(self) -> list[Path] | None:
        """Files from which it continues; None: the checkpoint in `folder`."""

    def __call__(self) -> None:
        """Do the work or continue it; exit with a status other than 0 if it is not finished."""


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """The callable of every task of a job: one rank of a run."""

    settings: dict[str, Any]  # Config.flat()
    command: list[str]  # the user's command, for run.json
    num_starts: int = 0  # in the run folder when the job was submitted

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.settings["output_dir"])

    @property
    def progress(self) -> list[Path] | None:
        """None: the checkpoint."""
        return None

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
        config = next_start(Config.from_flat(self.settings), self.num_starts)
        run_task(lambda: run_config(config))

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Return the same job, for submitit's signal handler, which is active until the run installs its own."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def run_task(work: Callable[[], int]) -> None:
    """Do a task's work; if it does not finish, exit with its status, which srun passes on."""
    import submitit

    status = EXIT_FAILURE  # of an error that is not ours
    try:
        status = exit_status(work)
    finally:
        if status:
            ignore_sigterm()  # from srun; the exit status must reach srun
        if status not in (0, EXIT_INTERRUPTED):
            job = submitit.JobEnvironment().job_id
            _note_status(_status_file(Path(os.environ["SUBMITIT_FOLDER"]), job), status)
    if status:
        sys.exit(status)


def _status_file(folder: Path, job: str) -> Path:
    """Return the file with the exit status of the first task that failed: srun returns the highest one of all tasks.

    That is 75 if the others stop when srun ends them, though one of them failed.
    """
    return folder / f"{job}_status"


def _note_status(path: Path, status: int) -> None:
    with suppress(OSError), open(path, "x") as file:  # the first one stays; on a full disk srun's is used
        file.write(str(status))


def processes_per_node(cluster: ClusterConfig) -> int:
    """Return the number of tasks on each node."""
    return DEFAULT_NGPUS if cluster.ngpus is None else cluster.ngpus


def build_executor(
    cluster: ClusterConfig, *, code: Path, submission: str, gpus: bool, max_parallel: int | None = None
) -> submitit.SlurmExecutor:
    """Return submitit's executor with all parameters set. Writes nothing.

    code: snapshot to run.   submission: its id.   gpus: request GPUs.   max_parallel: max tasks of an array at a time.
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
        # what submitit does after sbatch: done by the job, it does not matter when the submitting process ends
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; job=${job:-$SLURM_JOB_ID}",
        f"ln -sf {submission}_${{SLURM_ARRAY_TASK_ID:-0}}.pkl {shlex.quote(str(folder))}/${{job}}_submitted.pkl",
        f"rm -f {shlex.quote(str(folder))}/${{job}}_status",
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
    """Return the script for sbatch: of one job, or of an array."""
    if num_jobs > 1:
        executor.parameters["map_count"] = num_jobs
    script: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return script


def write_submission(executor: submitit.SlurmExecutor, submission: str, jobs: Sequence[Job]) -> Path:
    """Write everything that a job, or an array of several, reads; return the script for `sbatch`."""
    import submitit

    executor.folder.mkdir(parents=True, exist_ok=True)
    for index, job in enumerate(jobs):
        pickled = submitit.core.utils.DelayedSubmission(job)
        pickled.set_timeout(executor.parameters["time"], executor.max_num_timeout)
        pickled.dump(executor.folder / f"{submission}_{index}.pkl")
    script: Path = executor.folder / f"{submission}.sh"
    write_atomically(script, sbatch_script(executor, len(jobs)).encode())
    return script


def sbatch(script: Path, name: str, lock: IO[str]) -> str:
    """Submit a script under a name in the queue; return the job's id. Raises Failure with sbatch's message.

    lock: an open file, which sbatch inherits.
    """
    hidden = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")  # a job submitted from a job inherits nothing from it
    environment = {n: v for n, v in os.environ.items() if n == "SLURM_CONF" or not n.startswith(hidden)}
    result = subprocess.run(  # the name as a flag, which overrides SBATCH_JOB_NAME
        ["sbatch", f"--job-name={name}", str(script)],
        env=environment, pass_fds=[lock.fileno()], capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.search(r"^Submitted batch job (\d+)", result.stdout, flags=re.MULTILINE)
    if result.returncode == 0 and found:
        return found[1]
    lines = [line.strip() for line in result.stderr.splitlines() if line.startswith("sbatch: ")]
    reason = "; ".join(dict.fromkeys(lines)) or " ".join((result.stderr + result.stdout).split())
    raise Failure(reason or f"sbatch ended with exit status {result.returncode}")


def find_job(name: str, since: str) -> str | None:
    """Return the id of the user's job with this name, of an array its base id; None if Slurm has none.

    since: local time in ISO format, not later than its submission.   Raises Failure if squeue does not answer. A job
    that ended some minutes ago is only known to sacct, if there is accounting.
    """
    asked: list[tuple[str, ...]] = [("squeue", "--noheader", "--me", "--states=all", "--format=%F|%j")]
    if shutil.which("sacct"):
        columns = ("--noheader", "--parsable2", "--allocations", "--format=JobID,JobName")
        asked.append(("sacct", *columns, f"--starttime={since[:10]}"))
    for command in asked:
        try:
            lines = _run(*command).splitlines()
        except Failure:
            if command[0] == "squeue":
                raise
            continue  # no accounting
        for line in lines:
            job, _, found = line.strip().partition("|")
            if found == name:
                return job.partition("_")[0]
    return None


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
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S).stdout
    except FileNotFoundError:
        raise Failure(f"{command[0]} not found on this machine; run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise Failure(f"{command[0]} did not answer within {TIMEOUT_S:g} s; try again") from None
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
    with suppress(OSError, ValueError):
        first = int(_status_file(folder, env.job_id).read_text())
        if first == EXIT_USAGE or status == EXIT_INTERRUPTED:
            status = first
    job: Job = submitit.core.utils.DelayedSubmission.load(env.paths.submitted_pickle).function
    again, reason = decide(job.folder, env.job_id, status, job.progress)
    if not again:
        newest = "its newest checkpoint" if job.progress is None else "what is saved"
        return complain(
            f"error: job {env.job_id} {reason}; not requeued. Fix the cause and submit again: it continues from "
            f"{newest}",
            status,
        )
    complain(f"job {env.job_id} {reason}; requeued", 0)
    _run("scontrol", "requeue", env.job_id)
    return 0
