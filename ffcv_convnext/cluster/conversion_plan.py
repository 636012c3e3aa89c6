"""What the jobs of a conversion make, which of them are queued, and waiting for them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from ffcv_convnext.cluster import slurm
from ffcv_convnext.cluster.submissions import Submission, read_submissions
from ffcv_convnext.data.beton import Split
from ffcv_convnext.data.convert import Contents, Part, is_finished
from ffcv_convnext.errors import Failure
from ffcv_convnext.files import Form, read_object, write_object

PLAN = "conversion.json"  # in job_dir
JOIN = "join"  # name of the job after the array
PLAN_FORM = Form({"out_dir": str, "num_parts": int, "splits": dict})


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """What the jobs of a job_dir make."""

    out_dir: Path
    num_parts: int
    splits: dict[Split, Contents]

    def name(self, index: int) -> str:
        """Return 'part-3-of-32'."""
        return f"part-{index}-of-{self.num_parts}"

    def parts(self, index: int) -> list[Part]:
        """Return one part of each split."""
        return [Part(self.out_dir, split, index, self.num_parts, each) for split, each in self.splits.items()]

    def is_finished(self) -> bool:
        """Return whether all splits are joined. Raises FileExistsError for a .beton with other images."""
        return all(is_finished(self.out_dir, split, contents) for split, contents in self.splits.items())

    def write(self, job_dir: Path) -> None:
        """Write it to a job_dir."""
        splits = {split: asdict(contents) for split, contents in self.splits.items()}
        write_object(job_dir / PLAN, {"out_dir": str(self.out_dir), "num_parts": self.num_parts, "splits": splits})

    @classmethod
    def read(cls, job_dir: Path) -> ConversionPlan:
        """Read a job_dir's. Raises FileNotFoundError if no conversion was submitted from there."""
        found = read_object(job_dir / PLAN, PLAN_FORM)
        if found is None:
            raise FileNotFoundError(
                f"{job_dir} holds no conversion; submit one with write_ffcv_dataset.py --job_dir {job_dir} --shards N"
            )
        splits = {
            split: Contents(each["num_samples"], tuple(each["classes"]), each["identity"])
            for split, each in found["splits"].items()
        }
        return cls(Path(found["out_dir"]), found["num_parts"], splits)


def latest_submissions(job_dir: Path) -> dict[str, Submission]:
    """Return the latest submission of each part and of the join."""
    return {submission.name: submission for submission in read_submissions(job_dir)}


def queued_jobs(job_dir: Path) -> dict[str, str]:
    """Return the jobs that are queued or running: name -> id."""
    latest = latest_submissions(job_dir)
    states = slurm.states(each.job for each in latest.values())
    return {name: each.job for name, each in latest.items() if each.job in states}


@dataclass(frozen=True, slots=True)
class AwaitedData:
    """The data of a conversion that runs wait for."""

    plan: ConversionPlan
    job: str | None  # of the join; None: it is complete

    @property
    def dependency(self) -> dict[str, str]:
        """Options of sbatch."""
        return {} if self.job is None else {"dependency": f"afterok:{self.job}", "kill-on-invalid-dep": "yes"}


def awaited_data(job_dir: Path, data_path: Path | None) -> AwaitedData:
    """Return what a run with this data_path waits for.

    Raises ValueError if the conversion writes somewhere else, and Failure if it is neither complete nor queued.
    """
    plan = ConversionPlan.read(job_dir)
    if data_path is None or data_path.absolute() != plan.out_dir:
        raise ValueError(
            f"after = {job_dir}: that conversion writes {plan.out_dir}, but data_path = {data_path}; use --data_path "
            f"{plan.out_dir}"
        )
    if plan.is_finished():
        return AwaitedData(plan, None)
    job = queued_jobs(job_dir).get(JOIN)
    if job is None:
        raise Failure(
            f"after = {job_dir}: that conversion is neither complete nor queued; see write_ffcv_dataset.py --job_dir "
            f"{job_dir} --status, and submit it again"
        )
    return AwaitedData(plan, job)
