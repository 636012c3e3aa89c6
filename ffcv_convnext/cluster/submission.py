"""Submit runs: check everything, take a snapshot of the source, then submit or run on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from ffcv_convnext.cluster import slurm
from ffcv_convnext.cluster.local_executor import LocalRun, choose_devices, output_of_run, run_all
from ffcv_convnext.cluster.settings import ClusterConfig, flat
from ffcv_convnext.cluster.submissions import LOCAL, Submission, read_submissions, write_submissions
from ffcv_convnext.config import Config
from ffcv_convnext.errors import complain
from ffcv_convnext.formatting import format_count
from ffcv_convnext.run_folder import check_same_config, lock_holder, read_facts, read_scores
from ffcv_convnext.snapshot import source_commit, take_snapshot
from ffcv_convnext.training import run_config
from ffcv_convnext.training.preflight import Plan, check_config

Say = Callable[[str], None]
CODE = "code"  # in job_dir: snapshots
MEMORY = ("tmpfs", "ramfs", "devtmpfs")
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


def plan_task(name: str, config: Config, world: int, known: Plan | None = None) -> Task:
    """Resolve and check a run of `world` processes.

    A run that has started keeps its global batch on any number of processes. known: the plan of a run that differs
    only in seed and folder. Raises ValueError or FileNotFoundError if it cannot run.
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
    return Task(name=name, config=config, plan=check_config(config, world))


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
    kind = _file_system(nearest.resolve())
    if kind in MEMORY or Path("/tmp") in (nearest.resolve(), *nearest.resolve().parents):
        return (
            f"warning: job_dir = {folder} seems to be local to this machine ({kind}); every node must see it, "
            "otherwise the job fails at once"
        )
    return None


def _file_system(path: Path) -> str:
    """Return the type of a path's file system: ext4, tmpfs, nfs4, ..., or unknown."""
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return "unknown"
    mounts = [(mount.replace("\\040", " "), kind) for _, mount, kind, *_ in map(str.split, lines)]
    holding = [(len(mount), i, kind) for i, (mount, kind) in enumerate(mounts) if path.is_relative_to(mount)]
    return max(holding, default=(0, 0, "unknown"))[2]


def submit_run(config: Config, cluster: ClusterConfig, *, command: Sequence[str], dry_run: bool, say: Say) -> int:
    """Submit one run, or run it on this machine with another executor; return an exit status."""
    assert cluster.job_dir is not None
    if config.run.output_dir is None:
        config = config.replace(output_dir=cluster.job_dir)
    task = plan_task(Path(config.flat()["output_dir"]).name, config, num_processes(cluster, config))
    tasks = unfinished([task], cluster.job_dir, say)
    return submit_tasks(tasks, cluster, command=command, dry_run=dry_run, say=say) if tasks else 0


def unfinished(tasks: Sequence[Task], job_dir: Path, say: Say) -> list[Task]:
    """Return the runs that are not finished, queued or running; report the reason for the others."""
    jobs = {s.folder: s.job for s in read_submissions(job_dir) if not s.is_local}  # latest job of each run
    folders = [str(task.folder) for task in tasks]
    queue = slurm.states(job for folder, job in jobs.items() if folder in folders)
    wanted = []
    for task, folder in zip(tasks, folders, strict=True):
        if read_scores(task.folder) is not None and task.config.run.auto_resume and not task.config.run.eval:
            say(f"{folder} is finished; nothing to do")
        elif state := queue.get(jobs.get(folder, "")):
            say(f"{folder}: job {jobs[folder]} is {state}; not submitted again")
        elif process := lock_holder(task.folder):
            say(f"{folder}: running ({process}); not submitted again")
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
) -> int:
    """Submit runs with the same number of processes, as one array if there are several.

    command: the user's, for run.json.   max_parallel: max runs at the same time.
    Returns 0, or with another executor than slurm the exit status of the first failed run.
    """
    assert cluster.job_dir is not None
    job_dir = cluster.job_dir.absolute()
    on_slurm, device = cluster.executor == "slurm", tasks[0].config.run.device
    world = num_processes(cluster, tasks[0].config)
    if on_slurm and not dry_run:
        slurm.check_slurm(cluster)
    warning = check_job_dir(job_dir)
    if warning and on_slurm:
        complain(warning, 0)
    for line in sorted({line for task in tasks if (line := _recipe_warning(task))}):
        complain(line, 0)
    if cluster.executor == "debug" and not dry_run:
        return max(run_config(task.config) for task in tasks)
    code = job_dir / CODE / "SNAPSHOT" if dry_run else take_snapshot(job_dir / CODE)
    if on_slurm:
        executor = slurm.build_executor(cluster, code=code, gpus=device != "cpu", max_parallel=max_parallel)
    if dry_run:
        if on_slurm:
            say(slurm.sbatch_script(executor, len(tasks)))
        say(f"# cluster\n{yaml.safe_dump(flat(cluster), sort_keys=False)}")
        for task in tasks:
            say(f"# {task.folder}\n{task.config.to_yaml()}")
        return 0
    if on_slurm:
        ids = slurm.submit(executor, [slurm.TrainingJob(task.config.flat(), list(command)) for task in tasks])
    else:
        ids = [f"{LOCAL}{os.getpid()}"] * len(tasks)
    _record(tasks, ids, job_dir, code=code, world=world, command=command)
    if on_slurm:
        processes = format_count(world, "process")
        for job, task in zip(ids, tasks, strict=True):
            say(f"submitted job {job}: {task.folder}, {processes}; output in {job_dir / slurm.FOLDER}")
        return 0
    runs = [LocalRun(task.name, task.config, code, job_dir) for task in tasks]
    return run_all(runs, devices=choose_devices(None, device), world=world, max_parallel=max_parallel, say=say)


def _record(
    tasks: Sequence[Task], ids: Sequence[str], job_dir: Path, *, code: Path, world: int, command: Sequence[str]
) -> None:
    now, commit = time.strftime("%Y-%m-%dT%H:%M:%S%z"), source_commit()
    submissions = [
        Submission(
            time=now,
            job=job,
            name=task.name,
            seed=task.config.run.seed,
            folder=str(task.folder),
            world=world,
            epochs=task.config.schedule.epochs,
            code=str(code),
            commit=commit,
            command=list(command),
        )
        for job, task in zip(ids, tasks, strict=True)
    ]
    write_submissions(job_dir, submissions)


def output_of(submission: Submission, job_dir: Path) -> Path:
    """Return the file with stderr of a run's rank 0."""
    if submission.is_local:
        return output_of_run(job_dir, submission.name, submission.seed)
    return slurm.output_of_job(job_dir, submission.job)


def _recipe_warning(task: Task) -> str | None:
    schedule, batch = task.config.schedule, task.plan.global_batch
    if batch == schedule.recipe_batch:
        return None
    return (
        f"warning: the global batch is {batch}, but lr = {schedule.lr:g} is meant for {schedule.recipe_batch} "
        f"(recipe_batch): set --global_batch {schedule.recipe_batch}, or scale lr and set recipe_batch"
    )
