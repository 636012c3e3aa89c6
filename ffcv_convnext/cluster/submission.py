"""Submit runs: check everything, take a snapshot of the source, then submit or run on this machine."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from ffcv_convnext.cluster import slurm
from ffcv_convnext.cluster.conversion_plan import AwaitedData, awaited_data
from ffcv_convnext.cluster.intent import recover, submit_once, submitting
from ffcv_convnext.cluster.local_executor import LocalRun, choose_devices, launcher_of, output_of_run, run_all
from ffcv_convnext.cluster.settings import ClusterConfig, flat
from ffcv_convnext.cluster.slurm import TrainingJob
from ffcv_convnext.cluster.submissions import LOCAL, Submission, read_submissions, write_submissions
from ffcv_convnext.config import Config
from ffcv_convnext.errors import Failure, complain
from ffcv_convnext.formatting import format_count
from ffcv_convnext.host import file_system, is_in_memory
from ffcv_convnext.run_folder import check_same_config, lock_holder, read_facts, read_scores, read_starts
from ffcv_convnext.snapshot import source_commit, take_snapshot
from ffcv_convnext.training import run_config
from ffcv_convnext.training.preflight import Plan, check_config

if TYPE_CHECKING:
    import submitit

Say = Callable[[str], None]
CODE = "code"  # in job_dir: snapshots
ERROR = re.compile(r"error: |slurmstepd: |[\w.]*(Error|Exception|Failure)\b")
PATHS = ("data_path", "output_dir", "resume", "finetune")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A run to submit. Its config is resolved: absolute paths, a fixed global batch."""

    name: str
    config: Config
    plan: Plan

    @property
    def folder(self) -> Path:
        """The run folder."""
        assert self.config.run.output_dir is not None
        return self.config.run.output_dir


def plan_task(
    name: str, config: Config, world: int, known: Plan | None = None, awaited: AwaitedData | None = None
) -> Task:
    """Resolve and check a run of `world` processes.

    A run that has started keeps its global batch on any number of processes. known: the plan of a run that differs
    only in seed and folder.   awaited: data that a conversion will have written when the run starts.
    Raises ValueError or FileNotFoundError if it cannot run.
    """
    data = config.data
    changes: dict[str, object] = {
        key: Path(value).absolute() for key, value in config.flat().items() if key in PATHS and value is not None
    }
    folder = config.run.output_dir
    begun_with = None if folder is None else read_facts(folder).get("global_batch")
    if begun_with is not None and data.global_batch not in (None, begun_with):
        raise ValueError(
            f"global_batch = {data.global_batch}: the run in {folder} started with {begun_with}, which must stay the "
            "same; choose another output_dir for a new run"
        )
    if data.global_batch is None:
        changes["global_batch"] = begun_with or data.batch_size * data.update_freq * world
    config = config.replace(**changes).for_world(world)
    if known is not None and known.global_batch == config.data.global_batch:
        if folder is not None:
            check_same_config(folder, config)
        return Task(name=name, config=config, plan=known)
    return Task(name=name, config=config, plan=check_config(config, world, awaited.plan.splits if awaited else None))


def num_processes(cluster: ClusterConfig, config: Config) -> int:
    """Return the number of processes of one run."""
    if cluster.executor == "slurm":
        return cluster.nodes * slurm.processes_per_node(cluster)
    return 1 if cluster.executor == "debug" else len(choose_devices(cluster.ngpus, config.run.device))


def check_job_dir(folder: Path) -> str | None:
    """Check that the folder can be written; return a warning if other nodes may not see it.

    Creates nothing. Raises PermissionError.
    """
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"job_dir = {folder}: {nearest} is not a writable folder; choose another")
    kind = file_system(nearest)
    if is_in_memory(nearest) or Path("/tmp") in (nearest.resolve(), *nearest.resolve().parents):
        return (
            f"warning: job_dir = {folder} seems to be local to this machine ({kind}); every node must see it, "
            "otherwise the job fails at once"
        )
    return None


def submit_run(config: Config, cluster: ClusterConfig, *, command: Sequence[str], dry_run: bool, say: Say) -> int:
    """Submit one run, or run it on this machine with another executor; return an exit status."""
    assert cluster.job_dir is not None
    if config.run.output_dir is None:
        config = config.replace(output_dir=cluster.job_dir)
    awaited = await_data(cluster, config)
    task = plan_task(Path(config.flat()["output_dir"]).name, config, num_processes(cluster, config), awaited=awaited)
    return submit_tasks([task], cluster, command=command, dry_run=dry_run, say=say)


def await_data(cluster: ClusterConfig, config: Config) -> AwaitedData | None:
    """Return the data that a run waits for; None: it is there already. Raises what `awaited_data` raises."""
    return None if cluster.after is None else awaited_data(cluster.after, config.data.data_path)


def unfinished(tasks: Sequence[Task], job_dir: Path, say: Say) -> list[Task]:
    """Return the runs that are not finished, queued or running; report the reason for the others."""
    jobs = {s.folder: s.job for s in read_submissions(job_dir) if not s.is_local}  # latest job of each run
    folders = [str(task.folder) for task in tasks]
    try:
        queue = slurm.states(job for folder, job in jobs.items() if folder in folders)
    except Failure as error:
        raise Failure(f"nothing submitted: {error}; repeat the command when squeue answers") from None
    wanted = []
    for task, folder in zip(tasks, folders, strict=True):
        if read_scores(task.folder) is not None and task.config.run.auto_resume and not task.config.run.eval:
            say(f"{folder} is finished; nothing to do")
        elif state := queue.get(jobs.get(folder, "")):
            say(f"{folder}: job {jobs[folder]} is {state}; not submitted again")
        elif process := lock_holder(task.folder):
            say(f"{folder}: running ({process}); not submitted again")
        elif process := launcher_of(task.folder):
            say(f"{folder}: queued or running on this machine ({process}); not submitted again")
        else:
            wanted.append(task)
    return wanted


def submit_tasks(
    tasks: Sequence[Task],
    cluster: ClusterConfig,
    *,
    command: Sequence[str],
    dry_run: bool,
    say: Say,
    max_parallel: int | None = None,
    announce: Callable[[Sequence[Task]], None] = lambda _: None,
) -> int:
    """Submit those runs that are not done, queued or running, as one array if there are several.

    All have the same number of processes.   command: the user's, for run.json.   max_parallel: max runs at the same
    time.   announce: called with the runs before they are submitted, also if there are none.
    Returns 0, or with another executor than slurm the exit status of the first failed run.
    """
    assert cluster.job_dir is not None
    job_dir = cluster.job_dir.absolute()
    if tasks and (awaited := await_data(cluster, tasks[0].config)):
        cluster = replace(cluster, after=None, sbatch={**cluster.sbatch, **awaited.dependency})
    if cluster.executor == "slurm" and not dry_run:
        slurm.check_slurm(cluster)
    if (warning := check_job_dir(job_dir)) and cluster.executor == "slurm":
        complain(warning, 0)
    if dry_run or cluster.executor == "debug":
        wanted = unfinished(tasks, job_dir, say)
        _announce(wanted, announce)
        if dry_run and wanted:
            _print_submission(wanted, cluster, max_parallel, say)
        return 0 if dry_run else max((run_config(task.config) for task in wanted), default=0)
    with submitting(job_dir) as lock:
        recover(job_dir, say)
        wanted = unfinished(tasks, job_dir, say)
        _announce(wanted, announce)
        if not wanted:
            return 0
        code = take_snapshot(job_dir / CODE)
        planned = _submissions(wanted, cluster, code=code, command=command)
        if cluster.executor == "slurm":
            executor = _executor(wanted, cluster, code, planned[0].job_name, max_parallel)
            jobs = [TrainingJob(t.config.flat(), list(command), len(read_starts(t.folder))) for t in wanted]
            script = slurm.write_submission(executor, _id_of(planned[0].job_name), jobs)
            for submission in submit_once(job_dir, planned, script, lock):
                processes = format_count(submission.world, "process")
                output = job_dir / slurm.FOLDER
                say(f"submitted job {submission.job}: {submission.folder}, {processes}; output in {output}")
            return 0
        runs = [LocalRun(task.name, task.config, code, job_dir) for task in wanted]
        write_submissions(job_dir, planned)
    devices = choose_devices(None, wanted[0].config.run.device)
    return run_all(runs, devices=devices, world=planned[0].world, max_parallel=max_parallel, say=say)


def _announce(tasks: Sequence[Task], announce: Callable[[Sequence[Task]], None]) -> None:
    announce(tasks)
    for line in sorted({line for task in tasks if (line := _recipe_warning(task))}):
        complain(line, 0)


def _executor(
    tasks: Sequence[Task], cluster: ClusterConfig, code: Path, job_name: str, max_parallel: int | None
) -> submitit.SlurmExecutor:
    gpus = tasks[0].config.run.device != "cpu"
    return slurm.build_executor(cluster, code=code, submission=_id_of(job_name), gpus=gpus, max_parallel=max_parallel)


def _id_of(job_name: str) -> str:
    return job_name.rpartition("-")[2]


def _print_submission(tasks: Sequence[Task], cluster: ClusterConfig, max_parallel: int | None, say: Say) -> None:
    assert cluster.job_dir is not None
    if cluster.executor == "slurm":
        code = cluster.job_dir.absolute() / CODE / "SNAPSHOT"
        say(slurm.sbatch_script(_executor(tasks, cluster, code, "SUBMISSION", max_parallel), len(tasks)))
    say(f"# cluster\n{yaml.safe_dump(flat(cluster), sort_keys=False)}")
    for task in tasks:
        say(f"# {task.folder}\n{task.config.to_yaml()}")


def _submissions(
    tasks: Sequence[Task], cluster: ClusterConfig, *, code: Path, command: Sequence[str]
) -> list[Submission]:
    """Return what is recorded of the runs; on Slurm their jobs have no ids yet."""
    on_slurm = cluster.executor == "slurm"
    now, commit = time.strftime("%Y-%m-%dT%H:%M:%S%z"), source_commit()
    job_name = f"{cluster.job_name}-{uuid.uuid4().hex[:12]}" if on_slurm else ""
    return [
        Submission(
            time=now,
            job="" if on_slurm else f"{LOCAL}{os.getpid()}",
            name=task.name,
            seed=task.config.run.seed,
            folder=str(task.folder),
            world=num_processes(cluster, task.config),
            epochs=task.config.schedule.epochs,
            code=str(code),
            commit=commit,
            command=list(command),
            job_name=job_name,
        )
        for task in tasks
    ]


def output_of(submission: Submission, job_dir: Path) -> Path:
    """Return the file with stderr of a run's rank 0."""
    if submission.is_local:
        return output_of_run(job_dir, submission.name, submission.seed)
    return slurm.output_of_job(job_dir, submission.job)


def last_error(path: Path) -> str:
    """Return the last line of a file with an error; '' if there is none."""
    if not path.exists():
        return ""
    lines = path.read_text(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if ERROR.match(line.strip())), "")


def _recipe_warning(task: Task) -> str | None:
    schedule, batch = task.config.schedule, task.plan.global_batch
    if batch == schedule.recipe_batch:
        return None
    return (
        f"warning: the global batch is {batch}, but lr = {schedule.lr:g} is meant for {schedule.recipe_batch} "
        f"(recipe_batch): set --global_batch {schedule.recipe_batch}, or scale lr and set recipe_batch"
    )
