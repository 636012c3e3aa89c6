"""A ladder of three steps and two seeds as one array: from its submission to the report."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from slurm.jobs import command_line
from slurm.two_nodes import TwoNodes

from ffcv_convnext.files import read_lines

pytestmark = pytest.mark.slurm

STEPS = {
    "00_start": "resnet_layers: 1-1-1-1\nresnet_embed_dim: 8\n",
    "01_stem": "base: 00_start.yaml\nresnet_stem: patch_embed\n",
    "02_gelu": "base: 01_stem.yaml\nresnet_act_layer: gelu\n",
}


def ladder(*words: str, settings: dict[str, Any] | None = None) -> str:
    """Output of `ffcv-convnext ladder ...`."""
    result = command_line(["-m", "ffcv_convnext.cli", "ladder", *words], settings=settings)
    assert result.returncode == 0, result.stderr
    return result.stdout


def submitted(output: str) -> dict[str, str]:
    """Jobs by run, "STEP/seedN"."""
    lines = re.findall(r"^submitted job (\S+): \S*/(\w+/seed\d), 1 process;", output, flags=re.MULTILINE)
    return {run: job for job, run in lines}


def states(job_dir: Path) -> dict[str, str]:
    """States of every run from `ladder status`."""
    rows = [line.split("|")[1:5] for line in ladder("status", str(job_dir)).splitlines()[2:-1]]
    return {f"{name.strip()}/seed{seed.strip()}": state.strip() for name, seed, _job, state in rows}


def test_a_ladder_of_three_steps_and_two_seeds_from_submission_to_report(
    cluster: TwoNodes, settings: dict[str, Any], tmp_path: Path
) -> None:
    configs, job_dir = tmp_path / "configs", tmp_path / "ladder"
    configs.mkdir()
    for name, text in STEPS.items():
        (configs / f"{name}.yaml").write_text(text)
    flags = {
        **{name: value for name, value in settings.items() if not name.startswith("resnet_")},
        "epochs": 1, "configs": configs, "job_dir": job_dir,
        "seeds": "0,1", "ngpus": 1, "cpus_per_task": 1, "timeout": 1, "max_parallel": 2,
    }  # fmt: skip
    runs = [f"{name}/seed{seed}" for name in STEPS for seed in (0, 1)]

    output = ladder("submit", settings=flags)
    jobs = submitted(output)
    assert list(jobs) == runs
    assert output.startswith("budget: 6 runs, 4,800 training images; hours unknown: ")
    array = jobs[runs[0]].partition("_")[0]
    assert list(jobs.values()) == [f"{array}_{task}" for task in range(6)], "one array"
    assert cluster.job(array)["ArrayTaskThrottle"] == "2"

    ladder("cancel", str(job_dir), runs[-1])
    assert jobs[runs[-1]] not in {line.split()[0] for line in cluster.queue()}
    assert states(job_dir)[runs[-1]] == "missing"
    again = submitted(ladder("submit", settings=flags))
    assert list(again) == runs[-1:], "queued and finished runs are not submitted twice"

    deadline, most = time.monotonic() + 240, 0
    while queue := cluster.queue():
        assert time.monotonic() < deadline, queue
        most = max(most, sum(line.startswith(array) and line.endswith("RUNNING") for line in queue))
        time.sleep(0.2)
    assert most == 2
    assert Counter(states(job_dir).values()) == {"done": 6}
    assert "nothing to submit: all 6 runs are finished, queued or running" in ladder("submit", settings=flags)

    report = command_line(["-m", "ffcv_convnext.cli", "report", str(job_dir), "--configs", str(configs)])
    assert report.returncode == 0, report.stderr
    [section] = json.loads((job_dir / "ladder.json").read_text())["sections"]
    assert [(row["name"], row["state"], row["seeds"]) for row in section["rows"]] == [
        (name, "done", 2) for name in STEPS
    ]
    for row in section["rows"]:
        logs = [read_lines(job_dir / row["name"] / f"seed{seed}" / "log.jsonl") for seed in (0, 1)]
        top1 = [log[-1]["test_acc1"] for log in logs]
        assert row["top1"] == pytest.approx(mean(top1), abs=1e-3)
        assert row["top1_std"] == pytest.approx(stdev(top1), abs=1e-3)
