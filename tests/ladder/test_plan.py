"""ladder plan: arithmetic by hand, and what it prints and refuses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from support.ladder_runs import CONFIGS, steps_of, write_run

from ffcv_convnext.cli import run_command
from ffcv_convnext.ladder import Budget, find_recipes, parse_budget, plan_budget, read_ladder, resolvable
from ffcv_convnext.ladder.plan import pooled_std

STEPS = steps_of()[:2]
BUDGET = Budget(8, "H100", 12.0)
RECIPES = CONFIGS / "recipes"


def test_a_budget_is_gpus_times_hours() -> None:
    assert parse_budget("8xH100:12h") == BUDGET
    assert BUDGET.gpu_hours == 96
    assert parse_budget("1xA100-80GB:0.5h").gpu_hours == 0.5


@pytest.mark.parametrize("text", ["8xH100", "H100:12h", "8xH100:12", "0xH100:12h", "8xH100:0h", "-1xH100:2h", ""])
def test_another_budget_is_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["ladder", "plan", f"--budget={text}", "--configs", str(CONFIGS)]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--budget {text}: expected" in line
    assert "8xH100:12h" in line


def test_the_cost_is_images_times_pixels_over_the_rate() -> None:
    plan = plan_budget(
        BUDGET, STEPS, [RECIPES / "30_epochs.yaml"], images_per_s=10_000, runs=None, train_images=1_000_000
    )
    short, full = plan.offers
    # 2 steps x 30 M images at 10,000 a second are 6,000 s on 8 GPUs.
    assert short.seed_gpu_hours == pytest.approx(8 * 6000 / 3600)
    assert full.seed_gpu_hours == pytest.approx(10 * short.seed_gpu_hours)
    assert (short.num_seeds, full.num_seeds) == (7, 0)
    assert plan.best is short


def test_smaller_images_cost_their_share_of_pixels() -> None:
    paths = [RECIPES / "30_epochs.yaml", RECIPES / "fast_30.yaml"]
    plan = plan_budget(BUDGET, STEPS, paths, images_per_s=10_000, runs=None)
    cost = {offer.name: offer.seed_gpu_hours for offer in plan.offers}
    sizes = [STEPS[0].config.replace(min_res=128, max_res=192, start_ramp=8, end_ramp=22, epochs=30).data.train_size(e)
             for e in range(30)]  # fmt: skip
    assert cost["fast_30"] / cost["30_epochs"] == pytest.approx(sum(size**2 for size in sizes) / (30 * 224**2))


def test_recipes_on_larger_images_are_left_out() -> None:
    plan = plan_budget(BUDGET, STEPS, find_recipes(CONFIGS), images_per_s=10_000, runs=None)
    names = {offer.name for offer in plan.offers}
    assert "finetune_384" not in names
    assert {"fast_16", "fast_30", "fast_50", "30_epochs", "100_epochs", "full"} <= names


def test_the_smallest_difference_worked_by_hand() -> None:
    # t(0.975, 4) = 2.77645, t(0.8, 4) = 0.94096
    assert resolvable(0.1, 3) == pytest.approx((2.77645 + 0.94096) * 0.1 * math.sqrt(2 / 3), rel=1e-5)
    assert resolvable(0.1, 1) is None
    assert pooled_std([(0.3, 3), (0.1, 2), (9.0, 1)]) == pytest.approx(math.sqrt((2 * 0.09 + 0.01) / 3))
    assert pooled_std([(0.3, 1)]) is None


def test_neighbours_that_are_too_close_are_named() -> None:
    plan = plan_budget(BUDGET, read_ladder(CONFIGS), find_recipes(CONFIGS), images_per_s=20_000, runs=None)
    assert plan.best is not None
    assert plan.best.name == "fast_16"
    assert plan.best.resolves == pytest.approx(0.18, abs=0.02)
    assert ("07_kernel7", "08_gelu") in [pair[:2] for pair in plan.close]
    assert ("03_depthwise", "04_wider") not in [pair[:2] for pair in plan.close]


def test_rate_and_spread_are_measured_in_earlier_runs(tmp_path: Path) -> None:
    for seed, top1 in enumerate((80.0, 81.0)):
        write_run(tmp_path / STEPS[0].name / f"seed{seed}", STEPS[0], seed=seed, top1=top1, epochs=None)
    plan = plan_budget(Budget(4, "H200", 12), STEPS, [], images_per_s=None, runs=tmp_path)
    assert plan.std == pytest.approx(math.sqrt(0.5))
    assert "measured in" in plan.std_source
    # 9,000 images/s on 8 GPUs are 4,500 on 4.
    assert plan.offers[0].seed_gpu_hours == pytest.approx(4 * 2 * 300 * 1_281_167 / 4500 / 3600, rel=0.01)
    assert "1 of 2 steps without a run take the median" in plan.rate_source


def test_the_command_ends_with_the_command_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ladder", "plan", "--configs", str(CONFIGS), "--budget", "8xH100:12h", "--images_per_s", "20000"]
    assert run_command([*words, "--only", "00..03"]) == 0
    printed = capsys.readouterr().out
    assert "the paper's, 13 steps" in printed
    last = printed.splitlines()[-1]
    assert last.startswith(f"ffcv-convnext ladder submit --configs {CONFIGS} --config ")
    assert "--only 00..03 --seeds 0,1,2" in last


def test_where_nothing_fits_the_cheapest_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ladder", "plan", "--configs", str(CONFIGS), "--budget", "1xH100:1h", "--images_per_s", "2000"]
    assert run_command(words) == 0
    printed = capsys.readouterr().out
    assert "nothing fits: the cheapest, fast_16 with one seed, needs 22.0 GPU-hours" in printed
    assert "ladder submit" not in printed


def test_a_rate_is_never_invented(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ladder", "plan", "--configs", str(CONFIGS), "--budget", "8xH100:12h"]
    assert run_command(words) != 0
    assert "with --images_per_s, or measured runs with --runs DIR" in capsys.readouterr().err
    assert run_command([*words, "--runs", str(tmp_path)]) != 0
    assert "has been measured" in capsys.readouterr().err
    assert run_command([*words, "--runs", str(tmp_path / "none")]) != 0
    assert "is not a folder" in capsys.readouterr().err
    assert run_command([*words, "--images_per_s", "0"]) != 0
    assert "--images_per_s 0: expected a positive number" in capsys.readouterr().err
