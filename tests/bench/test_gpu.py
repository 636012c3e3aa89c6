"""`bench gpu` without a GPU: every stage on small shapes, stages that go wrong, and the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from gpu_tables import BEGIN, END, PAGE, add_section

from ffcv_convnext.bench.gpu import (
    STAGES,
    GpuOptions,
    bench_gpu,
    choice_row,
    describe_row,
    merge_row,
    to_markdown,
)
from ffcv_convnext.bench.gpu import runner as runner_module
from ffcv_convnext.cli import main
from ffcv_convnext.training.kernel_choice import PARTS, is_faster, read_table


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
    found = {
        "device": "cuda",
        "stages": {
            "facts": stage({"device": "a GPU"}, {"copy_gb_per_s": 2800.0}),
            "eager": stage({"images_per_s": 1200.0}),
            "step": stage(
                {"first_s": 45.0, "first_goal_s": 90.0}, {"images_per_s": 2400.0}, {"ms": 50.0}, {"graphs_ms": 40.0}
            ),
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
        "compiled step, time / time as a CUDA graph | 1.250",
        "first step, time / goal of 90 s | 0.500",
        "augmentation / compiled step, time | 0.040",
        "from crops in memory, images/s | 0.990",
    ):
        assert words in text


def rounds(torch: list[float], triton: list[float], part: str) -> dict[str, Any]:
    """Stages that measured one part of a step."""
    names = {"augment": ("augment", "augment_triton"), "network": ("step", "step_triton")}
    if part == "optimizer":
        return {"update": stage({"torch_rounds_ms": torch}, {"triton_rounds_ms": triton})}
    first, second = names[part]
    return {first: stage({"rounds_ms": torch}), second: stage({"rounds_ms": triton})}


def stage(*figures: dict[str, Any], status: str = "ok") -> dict[str, Any]:
    return {"status": status, "seconds": 1.0, "figures": list(figures)}


FACTS = {"facts": stage({"python": "3.12"}, {"device": "GPU A", "torch": "2.15", "triton": "3.8"})}


def test_triton_is_chosen_where_it_is_faster_by_more_than_the_spread() -> None:
    stages = {
        **FACTS,
        **rounds([4.0, 4.2, 4.1], [2.0, 2.1, 2.05], "augment"),
        **rounds([10.0, 11.0, 10.5], [9.5, 10.2, 9.6], "network"),  # its median is shorter, but the ranges overlap
        **rounds([1.0, 1.0], [1.5, 1.6], "optimizer"),
    }
    device, row = choice_row({"device": "cuda", "stages": stages}, "2026-12-01")
    assert device == "GPU A"
    assert row == {
        "date": "2026-12-01",
        "versions": {"torch": "2.15", "triton": "3.8"},
        "augment": {"speedup": 2.0, "min_speedup": 1.9048, "max_speedup": 2.1},
        "network": {"speedup": 1.0938, "min_speedup": 0.9804, "max_speedup": 1.1579},
        "optimizer": {"speedup": 0.6452, "min_speedup": 0.625, "max_speedup": 0.6667},
    }
    assert [is_faster(row[part]) for part in PARTS] == [True, False, False]
    line = "--kernels auto on GPU A: augment triton (PyTorch's time / Triton's 2, 1.9 to 2.1), network torch ("
    assert describe_row(device, row).startswith(line)


def test_a_part_without_both_measurements_is_left_to_the_rule() -> None:
    failed = stage({"rounds_ms": [1.0]}, status="failed")
    stages = {**FACTS, **rounds([2.0], [1.0], "network"), **rounds([2.0], [1.0], "augment"), "augment_triton": failed}
    _, row = choice_row({"device": "cuda", "stages": stages}, "2026-12-01")
    assert [part for part in PARTS if part in row] == ["network"]
    with pytest.raises(ValueError, match="nothing to choose"):
        choice_row({"device": "cuda", "stages": {**FACTS, "step": stages["step"]}}, "2026-12-01")
    with pytest.raises(ValueError, match="needs a measurement on a GPU"):
        choice_row({"device": "cpu", "stages": stages}, "2026-12-01")


def test_a_row_replaces_the_one_of_its_device_in_the_table(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text('{"devices": {}}')
    part = {"speedup": 2.0, "min_speedup": 1.9, "max_speedup": 2.1}
    merge_row("GPU B", {"date": "2026-12-01", "versions": {}, "augment": part}, path)
    merge_row("GPU A", {"date": "2026-12-01", "versions": {}, "network": part}, path)
    merge_row("GPU B", {"date": "2026-12-02", "versions": {}, "network": part}, path)
    assert read_table(path) == {
        "GPU A": {"date": "2026-12-01", "versions": {}, "network": part},
        "GPU B": {"date": "2026-12-02", "versions": {}, "network": part},
    }


def test_the_tables_go_between_their_markers_and_may_go_there_again() -> None:
    page = f"# Page\n\n{BEGIN}\n{END}\n\nText behind.\n"
    of_a = {"device": "cuda", "stages": {**FACTS, **rounds([2.0], [1.0], "network")}}
    of_b = {"device": "cuda", "stages": {"facts": stage({"device": "GPU B"}), "eager": stage({"ms": 5.0})}}
    both = add_section(add_section(page, of_b), of_a)
    assert both == add_section(add_section(page, of_a), of_b) == add_section(add_section(both, of_a), of_b)
    assert both.startswith(f"# Page\n\n{BEGIN}\n")
    assert both.endswith(f"{END}\n\nText behind.\n")
    assert [line for line in both.splitlines() if line.startswith("### ")] == ["### GPU A", "### GPU B"]
    assert "#### Step without a compiler" in both
    of_b["stages"]["eager"] = stage({"ms": 6.0})
    assert "| ms     |     6 |" in (changed := add_section(both, of_b))
    assert "| ms     |     5 |" not in changed
    with pytest.raises(ValueError, match="figures of GPUs only"):
        add_section(page, {**of_a, "device": "cpu"})
    with pytest.raises(ValueError, match="lacks the markers"):
        add_section("# Page\n", of_a)


def test_the_page_of_the_repository_has_the_markers() -> None:
    of_a = {"device": "cuda", "stages": FACTS}
    assert "### GPU A" in add_section(PAGE.read_text(), of_a)


@pytest.mark.slow
def test_every_stage_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["bench", "gpu", "--device", "cpu", "--minutes", "30", "--out", str(tmp_path)])
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert status == 0, {name: stage for name, stage in stages.items() if stage["status"] != "ok"}
    assert [name for name, stage in stages.items() if stage["status"] != "ok"] == ["augment_triton", "step_triton"]
    figures = {name: {k: v for each in stage["figures"] for k, v in each.items()} for name, stage in stages.items()}
    assert figures["augment"]["max_levels"] <= 1.01
    assert max(figures["kernels"]["relative_errors"]) < 0.02
    assert figures["nccl"]["all_reduce"] is True
    assert figures["resume"]["max_difference"] == 0
    assert 5 <= figures["resume"]["killed_after_step"] < figures["resume"]["steps"]
    assert len(stages["ladder"]["figures"]) == 15
    assert (tmp_path / "gpu.md").read_text() == capsys.readouterr().out
