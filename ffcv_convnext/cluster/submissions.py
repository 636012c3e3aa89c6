"""The runs submitted from a job_dir: submissions.jsonl, one object per job."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from ffcv_convnext.files import Form, encode, read_lines, write_atomically
from ffcv_convnext.run_folder import SUBMISSIONS

LOCAL = "local-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A run that was submitted to Slurm or started on this machine."""

    time: str
    job: str  # its id; tasks of an array are 17_0, 17_1, ...; on this machine LOCAL and a process id
    name: str  # of the config
    seed: int
    folder: str  # the run folder
    world: int  # processes
    epochs: int
    code: str  # snapshot of the source
    commit: str
    command: list[str]
    job_name: str = ""  # in Slurm's queue; no other submission has the same one

    @property
    def is_local(self) -> bool:
        """Whether it runs on this machine instead of in a Slurm job."""
        return self.job.startswith(LOCAL)


_TEXTS = ("time", "job", "name", "folder", "code", "commit")
SUBMISSION = Form(
    {**dict.fromkeys(_TEXTS, str), **dict.fromkeys(("seed", "world", "epochs"), int), "command": [str]},
    {"job_name": str},
)


def write_submissions(job_dir: Path, submissions: list[Submission]) -> None:
    """Append to a job_dir's submissions: all or, after a crash, none. No other process may write there."""
    path = job_dir / SUBMISSIONS
    before = path.read_bytes() if path.exists() else b""
    if before and not before.endswith(b"\n"):  # a kill cut the last line short
        before += b"\n"
    write_atomically(path, before + b"".join(encode(asdict(submission)) for submission in submissions))


def read_submissions(job_dir: Path) -> list[Submission]:
    """Return a job_dir's submissions in their order; [] if there are none. A line that cannot be used is a warning."""
    known = (*SUBMISSION.required, *SUBMISSION.optional)
    entries = read_lines(job_dir / SUBMISSIONS, SUBMISSION)
    return [Submission(**{name: entry[name] for name in known if name in entry}) for entry in entries]
