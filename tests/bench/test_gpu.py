"""`bench gpu` without a GPU: every stage on small shapes, stages that go wrong, and the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ffcv_convnext.bench.gpu import STAGES, GpuOptions, bench_gpu, to_markdown
from ffcv_convnext.bench.gpu import runner as runner_module
from ffcv_convnext.cli import main


def test_the_stages_together_take_at_most_nine_minutes() -> None:
    assert sum(STAGES.values()) <= 9 * 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ["facts", "warp"]}, "stages = warp: expected some of facts, eager, "),
        ({"minutes": 0}, "minutes = 0: expected a number > 0"),
        ({"wheels": Path("/nowhere")}, "wheels = /nowhere: no .whl file found"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        GpuOptions(out=tmp_path, **options)


def test_a_machine_without_a_gpu_is_told_how_to_try_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    assert main(["bench", "gpu", "--out", str(tmp_path / "out")]) == 2
    assert "try it with --device cpu" in capsys.readouterr().err


STAGES_THAT_GO_WRONG = """
import sys, time
name = sys.argv[1]
print('RESULT {"before": 1}', flush=True)
if name == "eager":
    time.sleep(60)
if name == "augment":
    raise SystemExit("no compiler")
if name == "step":
    print('RESULT {"skipped": "needs a compiler"}', flush=True)
"""


def test_a_stage_that_hangs_or_fails_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "stages.py"
    script.write_text(STAGES_THAT_GO_WRONG)
    monkeypatch.setattr(runner_module, "COMMAND", (sys.executable, str(script)))
    monkeypatch.setattr(runner_module, "CPU_FACTOR", 0.05)
    lines: list[str] = []
    names = ("facts", "eager", "augment", "step")
    found = bench_gpu(GpuOptions(out=tmp_path / "out", device="cpu", stages=names, progress=lines.append))
    stages = found["stages"]
    assert [stages[name]["status"] for name in names] == ["ok", "timeout", "failed", "skipped"]
    assert stages["eager"]["figures"] == [{"before": 1}], "what was measured before the limit is kept"
    assert stages["eager"]["reason"] == "more than 2 s"
    assert stages["augment"]["output"] == "no compiler"
    assert stages["step"]["reason"] == "needs a compiler"
    assert json.loads((tmp_path / "out" / "gpu.json").read_text()) == found
    assert lines[1].startswith("eager: timeout (more than 2 s)")
    text = to_markdown(found)
    assert "| eager" in text
    assert "more than 2 s" in text


def test_stages_after_the_limit_are_left_out(tmp_path: Path) -> None:
    found = bench_gpu(GpuOptions(out=tmp_path, device="cpu", stages=["facts"], minutes=0.01))
    assert found["stages"]["facts"] == {"status": "skipped", "reason": "the 0.01 minutes are over"}


def test_the_report_has_the_ratios_that_a_gpu_must_confirm() -> None:
    def stage(*figures: dict[str, Any]) -> dict[str, Any]:
        return {"status": "ok", "seconds": 1.0, "figures": list(figures)}

    found = {
        "device": "cuda",
        "stages": {
            "facts": stage({"device": "a GPU"}, {"copy_gb_per_s": 2800.0}),
            "eager": stage({"images_per_s": 1200.0}),
            "step": stage({"images_per_s": 2400.0}, {"ms": 50.0}),
            "step_triton": stage({"images_per_s": 3000.0}),
            "augment": stage({"ms": 2.0}),
            "peers": stage({"compiled": "false", "images_per_s": 800.0}, {"compiled": "true", "images_per_s": 2000.0}),
            "loader": stage({"images": "augmented"}, {"share_of_synthetic": 0.99}),
        },
    }
    text = " ".join(to_markdown(found).split())
    for words in (
        "device a GPU, copy_gb_per_s 2800",
        "eager step, images/s, ours / timm's | 1.500",
        "compiled step, images/s, ours / timm's | 1.200",
        "Triton kernels / PyTorch's | 1.250",
        "augmentation / compiled step, time | 0.040",
        "from crops in memory, images/s | 0.990",
    ):
        assert words in text


@pytest.mark.slow
def test_every_stage_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["bench", "gpu", "--device", "cpu", "--minutes", "30", "--out", str(tmp_path)])
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert status == 0, {name: stage for name, stage in stages.items() if stage["status"] != "ok"}
    assert [name for name, stage in stages.items() if stage["status"] != "ok"] == ["step_triton"]
    figures = {name: {k: v for each in stage["figures"] for k, v in each.items()} for name, stage in stages.items()}
    assert figures["augment"]["max_levels"] <= 1.01
    assert max(figures["kernels"]["relative_errors"]) < 0.02
    assert figures["nccl"]["all_reduce"] is True
    assert figures["resume"]["max_difference"] == 0
    assert 5 <= figures["resume"]["killed_after_step"] < figures["resume"]["steps"]
    assert len(stages["ladder"]["figures"]) == 15
    assert (tmp_path / "gpu.md").read_text() == capsys.readouterr().out
