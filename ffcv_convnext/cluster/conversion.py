"""A conversion as jobs: an array with one task for each part of the images, and a job that joins the parts after them.

The parts are those of `write_ffcv_dataset.py --shard I/N`, so the result has the bytes of one conversion on one
machine. A part that is interrupted continues from its last whole page. The same command submits what is missing.
"""

from __future__ import annotations

import signal
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ffcv_convnext.cluster import slurm
from ffcv_convnext.cluster.conversion_plan import JOIN, PLAN, ConversionPlan, latest_submissions, queued_jobs
from ffcv_convnext.cluster.intent import recover, submit_once, submitting
from ffcv_convnext.cluster.settings import ClusterConfig, flat
from ffcv_convnext.cluster.submission import CODE, check_job_dir, last_error, output_of
from ffcv_convnext.cluster.submissions import Submission
from ffcv_convnext.data.convert import ConversionOptions, convert, expect, join_parts
from ffcv_convnext.errors import Interrupted, complain
from ffcv_convnext.formatting import format_count, markdown_table
from ffcv_convnext.signals import sigterm_as_keyboard_interrupt
from ffcv_convnext.snapshot import source_commit, take_snapshot

if TYPE_CHECKING:
    import submitit

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ConversionJob:
    """The callable of a task: one part of a conversion, or the join."""

    options: dict[str, Any]  # of ConversionOptions, absolute paths; a missing one gets its default in the job
    index: int | None  # of the part; None: the join
    plan: ConversionPlan
    job_dir: Path

    @property
    def name(self) -> str:
        """Its name in the list of submissions."""
        return JOIN if self.index is None else self.plan.name(self.index)

    @property
    def folder(self) -> Path:
        """Where its ends are recorded."""
        return self.job_dir / "parts" / self.name

    @property
    def progress(self) -> list[Path]:
        """Files of the part; the join starts from the beginning each time."""
        return [] if self.index is None else [path for part in self.plan.parts(self.index) for path in part.files]

    def __call__(self) -> None:
        """Convert or join. SIGTERM and the signal before the time limit keep whole pages."""
        slurm.run_task(self._work)

    def _work(self) -> int:
        say = partial(print, flush=True)
        try:
            with sigterm_as_keyboard_interrupt(signal.SIGUSR2):
                if self.index is None:
                    replacing = self.options.get("overwrite", False)
                    join_parts(self.plan.out_dir, self.plan.splits, self.plan.num_parts, overwrite=replacing, say=say)
                else:
                    shard = (self.index, self.plan.num_parts)
                    convert(
                        ConversionOptions(**{**self.options, "overwrite": False, "resume": True, "shard": shard}), say
                    )
        except KeyboardInterrupt as interrupt:
            raise Interrupted(f"{self.name} stopped by {interrupt}; whole pages are saved") from None
        return 0

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Return the same job, for submitit's signal handler, which is active until the work installs its own."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def submit_conversion(
    options: Mapping[str, Any],
    num_parts: int,
    cluster: ClusterConfig,
    *,
    command: Sequence[str],
    dry_run: bool,
    max_parallel: int | None,
    say: Say,
) -> int:
    """Submit the parts that are neither converted nor queued as an array, and the join behind them; return 0.

    options: of ConversionOptions, parsed; without `num_workers` a job uses the cores of its task.   command: the
    user's, for the record.   max_parallel: max parts at the same time.
    Raises what `convert` raises before work, and ValueError for settings that a conversion's jobs do not have.
    """
    assert cluster.job_dir is not None
    _check(options, num_parts, cluster)
    job_dir = cluster.job_dir.absolute()
    paths = [name for name, value in options.items() if isinstance(value, Path)]
    options = {**options, **{name: options[name].absolute() for name in paths}}
    checked = ConversionOptions(**{**options, "resume": False})
    if not dry_run:
        slurm.check_slurm(cluster)
    if warning := check_job_dir(job_dir):
        complain(warning, 0)
    plan = ConversionPlan(checked.out_dir, num_parts, expect(checked, num_parts, say))
    if (job_dir / PLAN).exists() and (earlier := ConversionPlan.read(job_dir)) != plan and not checked.overwrite:
        raise ValueError(
            f"job_dir = {job_dir} holds another conversion, {format_count(earlier.num_parts, 'part')} for "
            f"{earlier.out_dir}, or the images have changed; choose another --job_dir, or replace it with --overwrite"
        )
    if not checked.overwrite and plan.is_finished():
        say(f"nothing to submit: {plan.out_dir} is complete")
        return 0
    jobs = {index: ConversionJob(dict(options), index, plan, job_dir) for index in range(num_parts)}
    join = ConversionJob(dict(options), None, plan, job_dir)
    one_task = replace(cluster, job_dir=job_dir, nodes=1, ngpus=1)
    if dry_run:
        script = _executor(one_task, job_dir / CODE / "SNAPSHOT", "SUBMISSION", max_parallel)
        say(slurm.sbatch_script(script, num_parts))
        say(f"# cluster\n{yaml.safe_dump(flat(cluster), sort_keys=False)}")
        say(f"# then, after the array: {JOIN}")
        return 0
    with submitting(job_dir) as lock:
        recover(job_dir, say)
        queued = queued_jobs(job_dir)
        wanted = [
            job
            for index, job in jobs.items()
            if job.name not in queued and (checked.overwrite or not all(p.is_finished() for p in plan.parts(index)))
        ]
        if checked.overwrite:
            if queued:
                raise ValueError(
                    f"job_dir = {job_dir}: {format_count(len(queued), 'job')} of it are queued or running; wait for "
                    "them, or cancel them with scancel, before --overwrite"
                )
            for part in (part for index in jobs for part in plan.parts(index)):
                part.remove()
        plan.write(job_dir)
        code = take_snapshot(job_dir / CODE)
        if JOIN in queued and wanted:
            slurm.cancel([queued.pop(JOIN)])  # it waits for jobs that have failed
        if wanted:
            found = _submit(wanted, one_task, code, command, max_parallel, lock)
            queued |= {job.name: submission.job for job, submission in zip(wanted, found, strict=True)}
            say(
                f"submitted job {found[0].job.partition('_')[0]}: {len(wanted)} of {format_count(num_parts, 'part')}, "
                f"{sum(c.num_samples for c in plan.splits.values())} images in all; output in {job_dir / slurm.FOLDER}"
            )
        if JOIN in queued:
            say(f"nothing to submit: {format_count(len(queued), 'job')} of this conversion are queued or running")
            return 0
        behind = one_task
        if queued:
            condition = {"dependency": f"afterok:{':'.join(queued.values())}", "kill-on-invalid-dep": "yes"}
            behind = replace(one_task, sbatch={**one_task.sbatch, **condition})
        [joining] = _submit([join], behind, code, command, None, lock)
        say(f"submitted job {joining.job}: joins the parts after them")
    return 0


def _check(options: Mapping[str, Any], num_parts: int, cluster: ClusterConfig) -> None:
    if num_parts < 1:
        raise ValueError(f"shards = {num_parts}: expected at least 1")
    if cluster.executor != "slurm":
        raise ValueError(
            f"executor = {cluster.executor}: a conversion on this machine needs no jobs; leave out --job_dir, --shards "
            "and the options of a cluster"
        )
    for name, default in (("nodes", 1), ("ngpus", None), ("after", None)):
        if getattr(cluster, name) != default:
            raise ValueError(f"{name} has no effect on a conversion, whose parts are tasks of one process; remove it")
    if options.get("shard") is not None:
        raise ValueError("--shard is one part on this machine; with --job_dir give the number of parts: --shards N")


def _executor(cluster: ClusterConfig, code: Path, submission: str, max_parallel: int | None) -> submitit.SlurmExecutor:
    return slurm.build_executor(cluster, code=code, submission=submission, gpus=False, max_parallel=max_parallel)


def _submit(
    jobs: Sequence[ConversionJob],
    cluster: ClusterConfig,
    code: Path,
    command: Sequence[str],
    max_parallel: int | None,
    lock: Any,
) -> list[Submission]:
    submission = uuid.uuid4().hex[:12]
    now, commit = time.strftime("%Y-%m-%dT%H:%M:%S%z"), source_commit()
    planned = [
        Submission(
            time=now,
            job="",
            name=job.name,
            seed=0,
            folder=str(job.folder),
            world=1,
            epochs=0,
            code=str(code),
            commit=commit,
            command=list(command),
            job_name=f"{cluster.job_name}-{submission}",
        )
        for job in jobs
    ]
    script = slurm.write_submission(_executor(cluster, code, submission, max_parallel), submission, jobs)
    return submit_once(jobs[0].job_dir, planned, script, lock)


def conversion_status(job_dir: Path) -> str:
    """Return a table with the state of each part and of the join, and a line of totals.

    Raises FileNotFoundError if no conversion was submitted from job_dir.
    """
    plan, latest = ConversionPlan.read(job_dir), latest_submissions(job_dir)
    states = slurm.states(each.job for each in latest.values())
    rows, done = [], 0
    for index in range(plan.num_parts):
        parts = plan.parts(index)
        saved, number = sum(part.num_done() for part in parts), sum(part.num_images for part in parts)
        done += saved
        rows.append(
            _row(plan.name(index), latest, states, job_dir, finished=saved == number, saved=f"{saved}/{number}")
        )
    finished = plan.is_finished()
    rows.append(_row(JOIN, latest, states, job_dir, finished=finished, saved="-"))
    total = sum(contents.num_samples for contents in plan.splits.values())
    table = markdown_table(("part", "job", "state", "images", "last error"), rows, "<<<><")
    where = f"{plan.out_dir} is complete" if finished else f"for {plan.out_dir}"
    return f"{table}\n{done} of {total} images are saved, {where}"


def _row(
    name: str, latest: Mapping[str, Submission], states: Mapping[str, str], job_dir: Path, *, finished: bool, saved: str
) -> tuple[str, ...]:
    submission = latest.get(name)
    if submission is None:
        return name, "-", "missing", saved, ""
    if finished:
        return name, submission.job, "done", saved, ""
    state = states.get(submission.job)
    error = "" if state else last_error(output_of(submission, job_dir))
    return name, submission.job, state.lower() if state else "failed" if error else "missing", saved, error[:60]
