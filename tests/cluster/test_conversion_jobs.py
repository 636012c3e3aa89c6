"""A conversion as jobs: what is submitted, what is left out, and what a run that waits for it sees. Slurm is fake."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from support.imagefolder import make_image_folder
from support.slurm_commands import words
from support.sources import add_list, add_parquet, add_shards, classes_of, make_imagenet, write

from ffcv_convnext.cli import run_command
from ffcv_convnext.cluster import read_submissions
from ffcv_convnext.cluster.conversion import ConversionJob
from ffcv_convnext.cluster.requeue_policy import decide

SBATCH = """#!/bin/sh
cd '{folder}'
echo "$2" >> scripts
grep '^#SBATCH --dependency' "$2" >> dependencies
echo "$1" >> sbatch.calls
n=$(wc -l < sbatch.calls)
echo "$n|${{1#--job-name=}}" >> jobs
echo "Submitted batch job $n"
"""
SQUEUE = r"""#!/bin/sh
cd '{folder}'
touch jobs
case "$*" in
  *%F*) cat jobs ;;
  *) for n in $(cut -d'|' -f1 jobs); do printf '%s PENDING\n' $n ${{n}}_0 ${{n}}_1 ${{n}}_2; done ;;
esac
"""


@pytest.fixture
def queue(commands: Path) -> Path:
    """A Slurm that keeps its jobs in a file; each is pending, until its line is removed."""
    for name, script in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (commands / name).write_text(script.format(folder=commands))
    return commands


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """Twelve images for train and twelve for val, in three parts."""
    images = make_image_folder(tmp_path / "images", train_per_class=3, val_per_class=3)
    return {"data_path": images, "out_dir": tmp_path / "beton", "job_dir": tmp_path / "job", "shards": 3}


def submit(options: dict[str, Any], *flags: str) -> int:
    return run_command("write", [*words(options), *flags])


def jobs_of(queue: Path) -> list[ConversionJob]:
    """The callables of the latest submission, as its tasks would load them."""
    script = Path((queue / "scripts").read_text().splitlines()[-1])
    found = sorted(script.parent.glob(f"{script.stem}_*.pkl"), key=lambda path: int(path.stem.rpartition("_")[2]))
    return [pickle.loads(path.read_bytes()).function for path in found]


def run_jobs(queue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do the work of the latest submission here, and empty the queue."""
    monkeypatch.setattr("ffcv_convnext.cluster.slurm.run_task", lambda work: work())
    for job in jobs_of(queue):
        job()
    (queue / "jobs").write_text("")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("train.beton", "val.beton", "train.files.txt")}


@pytest.mark.parametrize("form", ["shards", "parquet", "list"])
def test_the_jobs_read_every_form_with_relative_paths(
    form: str, options: dict[str, Any], queue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_imagenet(tmp_path / "folder")
    write(tmp_path / "classes.txt", "".join(f"{name}\n" for name in classes_of(folder)).encode())
    if form == "shards":
        add_shards(folder, tmp_path, "train", "cls", "x/{:02d}.tar")
    elif form == "parquet":
        add_parquet(folder, tmp_path, "train", stated=False)
    else:
        add_list(folder, tmp_path, "train")
    path = {"shards": "x/{00..02}.tar", "parquet": "data/*.parquet", "list": "train.tsv"}[form]
    monkeypatch.chdir(tmp_path)
    options |= {"data_path": Path(path), "classes": Path("classes.txt"), "split": "train"}
    assert submit(options) == 0
    both = (queue / "scripts").read_text().splitlines(keepends=True)
    assert len(both) == 2
    monkeypatch.chdir("/")
    for script in both:  # the array, then the join
        (queue / "scripts").write_text(script)
        run_jobs(queue, monkeypatch)
    whole = {"data_path": folder, "out_dir": tmp_path / "whole", "split": "train"}
    assert run_command("write", words(whole)) == 0
    assert (tmp_path / "beton" / "train.beton").read_bytes() == (tmp_path / "whole" / "train.beton").read_bytes()


def test_the_jobs_write_the_bytes_of_one_conversion(
    options: dict[str, Any],
    queue: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert submit(options) == 0
    out = capsys.readouterr().out
    assert re.search(r"^submitted job 1: 3 of 3 parts, 24 images in all; output in ", out, re.MULTILINE)
    assert "submitted job 2: joins the parts after them" in out
    assert [s.name for s in read_submissions(tmp_path / "job")] == [*(f"part-{i}-of-3" for i in range(3)), "join"]
    assert (queue / "dependencies").read_text() == "#SBATCH --dependency=afterok:1_0:1_1:1_2\n"

    assert submit(options) == 0
    assert "nothing to submit: 4 jobs of this conversion are queued or running" in capsys.readouterr().out
    assert len((queue / "sbatch.calls").read_text().splitlines()) == 2

    (queue / "scripts").write_text("".join((queue / "scripts").read_text().splitlines(keepends=True)[:1]))
    run_jobs(queue, monkeypatch)  # the array's tasks
    capsys.readouterr()
    assert submit(options) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("joins the parts after them")
    assert (queue / "dependencies").read_text().count("\n") == 1, "the parts are there: the join waits for nothing"
    run_jobs(queue, monkeypatch)
    assert submit(options) == 0
    assert f"nothing to submit: {tmp_path / 'beton'} is complete" in capsys.readouterr().out
    assert not list((tmp_path / "beton").glob("*part*"))

    whole = tmp_path / "whole"
    assert run_command("write", words({"data_path": options["data_path"], "out_dir": whole})) == 0
    assert bytes_of(tmp_path / "beton") == bytes_of(whole)
    assert run_command("write", ["--job_dir", str(tmp_path / "job"), "--status"]) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[-1] == f"24 of 24 images are saved, {tmp_path / 'beton'} is complete"
    assert table.count("| done ") == 4


def test_parts_that_failed_are_submitted_again_with_a_new_join(
    options: dict[str, Any],
    queue: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert submit(options) == 0
    (queue / "jobs").write_text("2|the join still waits\n")
    first, _, last = jobs_of_array(queue)
    monkeypatch.setattr("ffcv_convnext.cluster.slurm.run_task", lambda work: work())
    first()
    last()
    output = tmp_path / "job" / "slurm" / "1_1_0_log.err"
    output.write_text("error: images/c1/3.jpg: cannot be decoded\n")
    capsys.readouterr()
    assert run_command("write", ["--job_dir", str(tmp_path / "job"), "--status"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"part-1-of-3 +\| 1_1 +\| failed +\| +0/8 \| error: images/c1/3.jpg: cannot be decoded", table)
    assert re.search(r"join +\| 2 +\| pending ", table)
    assert table.splitlines()[-1].startswith("16 of 24 images are saved, for ")

    assert submit(options) == 0
    assert (queue / "scancel.calls").read_text().split() == ["2"], "the old join waits for a part that failed"
    assert "submitted job 3: 1 of 3 parts, " in capsys.readouterr().out
    assert (queue / "dependencies").read_text().splitlines()[-1] == "#SBATCH --dependency=afterok:3"


def jobs_of_array(queue: Path) -> list[ConversionJob]:
    """The callables of the first submission."""
    scripts = (queue / "scripts").read_text().splitlines()
    (queue / "scripts").write_text(f"{scripts[0]}\n")
    return jobs_of(queue)


def test_an_interrupted_join_is_completed(options: dict[str, Any], queue: Path, tmp_path: Path) -> None:
    assert submit(options) == 0
    [join] = jobs_of(queue)
    for part in jobs_of_array(queue):
        part._work()
    kept = {path: path.read_bytes() for path in (tmp_path / "beton").glob("train.part-1-*")}
    assert len(kept) == 3
    join._work()
    for path, content in kept.items():
        path.write_bytes(content)  # as if it had been killed while it removed the parts
    (tmp_path / "beton" / "val.beton").touch()  # changes nothing
    join._work()
    assert not list((tmp_path / "beton").glob("*part*"))


def test_a_task_keeps_whole_pages_when_slurm_stops_it(
    options: dict[str, Any], queue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy sees progress if the journal is newer."""
    assert submit(options) == 0
    job = jobs_of_array(queue)[0]
    monkeypatch.setattr("ffcv_convnext.cluster.requeue_policy.MAX_FAILURES", 2)
    assert decide(job.folder, "1_0", 1, job.progress).again
    page = job.progress[1]
    page.parent.mkdir(parents=True)
    page.touch()
    assert decide(job.folder, "1_0", 1, job.progress).again, "saved pages reset the count"
    again = decide(job.folder, "1_0", 1, job.progress)
    assert not again.again
    assert again.reason.endswith("2 times without saving more images")


def test_a_ladder_waits_for_the_data(
    options: dict[str, Any], queue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "00_start.yaml").write_text("resnet_layers: 1-1-1-1\nresnet_embed_dim: 8\n")
    run = {
        "configs": tmp_path / "configs", "data_path": options["out_dir"], "job_dir": tmp_path / "ladder", "seeds": 0,
        "input_size": 32, "batch_size": 4, "recipe_batch": 4, "epochs": 2, "warmup_epochs": 0,
        "device": "cpu", "amp": "off", "ngpus": 1, "after": options["job_dir"],
    }  # fmt: skip
    assert run_command("ladder", ["submit", *words(run)]) == 2
    assert "holds no conversion" in capsys.readouterr().err
    assert submit(options) == 0
    capsys.readouterr()
    assert run_command("ladder", ["submit", *words({**run, "data_path": tmp_path})]) == 2
    assert f"that conversion writes {tmp_path / 'beton'}" in capsys.readouterr().err
    assert run_command("ladder", ["submit", *words(run)]) == 0
    assert capsys.readouterr().out.startswith("budget: 1 run, 24 training images"), "3 steps of 4 images, 2 epochs"
    assert (queue / "dependencies").read_text().splitlines()[-1] == "#SBATCH --dependency=afterok:2"
    (queue / "jobs").write_text("")
    assert run_command("ladder", ["submit", *words({**run, "job_dir": tmp_path / "other"})]) == 1
    assert "neither complete nor queued" in capsys.readouterr().err
    assert run_command("ladder", ["submit", *words({**run, "executor": "local"})]) == 2
    assert "cannot wait for a Slurm job" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": 13}, "shards = 13: train has only 12 images; use --shards 12 or fewer"),
        ({"shards": 0}, "shards = 0: expected at least 1"),
        ({"executor": "local"}, "a conversion on this machine needs no jobs"),
        ({"nodes": 2}, "nodes has no effect on a conversion"),
        ({"shard": "0/3"}, "with --job_dir give the number of parts: --shards N"),
        ({"out_dir": "OTHER"}, "holds another conversion, 3 parts for "),
        ({"seed": 7}, "holds another conversion"),
    ],
)
def test_what_cannot_be_submitted_is_one_line(
    change: dict[str, Any], message: str, options: dict[str, Any], queue: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "another" in message:
        assert submit(options) == 0
        (queue / "jobs").write_text("")
        capsys.readouterr()
    before = (queue / "sbatch.calls").read_text() if "another" in message else ""
    assert submit({**options, **change}) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert ((queue / "sbatch.calls").read_text() if before else "") == before


def test_flags_that_need_each_other(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    without = {name: value for name, value in options.items() if name != "job_dir"}
    assert submit(without) == 2
    assert "a conversion as jobs needs --job_dir DIR" in capsys.readouterr().err
    assert run_command("write", ["--status"]) == 2
    assert "--status accepts only --job_dir DIR" in capsys.readouterr().err
    assert run_command("write", ["--join", "--out_dir", "x", "--partition", "main"]) == 2
    assert "--join accepts only --out_dir, --split and --overwrite, not --partition" in capsys.readouterr().err


def test_overwrite_starts_from_the_beginning(
    options: dict[str, Any], queue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(options) == 0
    for job in jobs_of_array(queue):
        job._work()
    assert submit({**options, "seed": 7}, "--overwrite") == 2
    assert "4 jobs of it are queued or running; wait for them" in capsys.readouterr().err
    (queue / "jobs").write_text("")
    assert submit({**options, "seed": 7}, "--overwrite") == 0
    assert not list((tmp_path / "beton").glob("*part*")), "no file of the other conversion is left"
