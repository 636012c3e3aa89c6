"""`ladder plan`: costs by hand, the proposal, what it does without a rate, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.ladder_runs import CONFIGS, steps_of, write_run

from ffcv_convnext.cli import run_command
from ffcv_convnext.ladder import Budget, find_recipes, make_offers, read_paper, select_steps, spread_of
from ffcv_convnext.ladder.plan import choose, close_neighbours
from ffcv_convnext.ladder.statistics import resolved_difference

FAST_16 = CONFIGS / "recipes" / "fast_16.yaml"


def plan(capsys: pytest.CaptureFixture[str], *flags: str, configs: Path = CONFIGS) -> str:
    assert run_command("ladder", ["plan", "--configs", str(configs), *flags]) == 0
    return capsys.readouterr().out


def row_of(table: str, recipe: str) -> list[str]:
    [line] = [line for line in table.splitlines() if line.startswith(f"| {recipe} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_costs_by_hand() -> None:
    steps = select_steps(CONFIGS, "07..08")
    budget = Budget.parse("8xH100:12h")
    assert (budget.gpu_hours, budget.kind) == (96, "H100")
    offers = {offer.name: offer for offer in make_offers(steps, [FAST_16], budget, {s.name: 20_000 for s in steps})}
    # 300 epochs x 1,281,167 images / 20,000 a second are 5.338 h on 8 devices; two steps.
    whole = offers["the configs' recipe"]
    assert whole.gpu_hours == pytest.approx(2 * 8 * 300 * 1_281_167 / 20_000 / 3600)
    assert whole.num_seeds == 1
    # fast_16: the squares of its 16 sizes over 224 squared.
    sizes = [128] * 4 + [128, 128, 160, 160, 160, 160, 192, 192] + [192] * 4
    fast = offers["fast_16"]
    assert fast.gpu_hours == pytest.approx(whole.gpu_hours / 300 * sum(size**2 for size in sizes) / 224**2, rel=0.03)
    assert fast.num_seeds == 20, "more are not counted"


def test_the_proposal_is_the_longest_recipe_with_three_seeds() -> None:
    steps = select_steps(CONFIGS)
    recipes, left_out = find_recipes(CONFIGS / "recipes")
    assert left_out == ["finetune_384", "rsb_a3"]
    rates = {step.name: 20_000.0 for step in steps}

    def proposed(budget: str) -> tuple[str, int] | None:
        chosen = choose(make_offers(steps, recipes, Budget.parse(budget), rates))
        return chosen and (chosen.name, chosen.num_seeds)

    assert proposed("8xH100:12h") == ("fast_16", 5)
    assert proposed("8xH100:24h") == ("fast_50", 3)
    assert proposed("8xH100:300h") == ("the configs' recipe", 3)
    assert proposed("8xH100:3h") == ("fast_16", 1)
    assert proposed("8xH100:1h") is None


def test_the_page_of_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, "--budget", "8xH100:12h", "--images_per_s", "20000")
    fast = row_of(text, "fast_16")
    assert fast[1] == "16"
    assert fast[4] == "5"
    points = resolved_difference(spread := 0.0964, 5)
    assert points is not None
    assert float(fast[5]) == pytest.approx(points, abs=0.02), spread
    assert "convnext_tiny" in fast[6], "0.13 points above its base"
    assert row_of(text, "fast_50")[5] == "-", "one seed resolves nothing"
    assert "--config rn_configs/recipes/fast_16.yaml --seeds 0,1,2".replace("rn_configs", str(CONFIGS)) in text
    nothing = plan(capsys, "--budget", "1xA100:2h", "--images_per_s", "2000")
    assert "nothing fits: the cheapest, fast_16 with one seed, needs 22" in nothing
    assert "; 1 step would fit: --only 00_resnet50" in nothing
    assert "ladder submit" not in nothing


def test_neighbours_that_are_closer_in_the_paper() -> None:
    steps, paper = select_steps(CONFIGS), read_paper(CONFIGS)
    assert close_neighbours(steps, paper, 0.06) == ["08_gelu"]  # 80.57 and 80.62
    assert close_neighbours(steps, paper, 0.061) == ["08_gelu", "11_layernorm"]  # 81.41 and 81.47


def test_rates_and_spread_of_earlier_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = {step.name: step for step in steps_of()}
    for seed, top1 in enumerate((80.0, 80.4)):
        write_run(tmp_path / "07_kernel7" / f"seed{seed}", steps["07_kernel7"], top1=top1, seed=seed)
    write_run(tmp_path / "08_gelu" / "seed0", steps["08_gelu"], top1=81.0)
    spread = spread_of(tmp_path, read_paper(CONFIGS))
    assert spread is not None
    assert spread.std == pytest.approx(0.2 * 2**0.5, abs=1e-6)
    assert "1 step with several seeds" in spread.source
    text = plan(capsys, "--budget", "16xH200:12h", "--runs", str(tmp_path), "--only", "07..08")
    assert "measured in" in text
    assert "2 of 2 steps, scaled to the budget's devices" in text
    rate = json.loads((tmp_path / "08_gelu" / "seed0" / "log.jsonl").read_text().splitlines()[0])["images_per_s"]
    hours = 300 * 1_281_167 / (2 * rate) / 3600 * 16 * 2  # 8 processes were measured; two steps
    assert float(row_of(text, "the configs' recipe")[3].replace(",", "")) == pytest.approx(hours, rel=0.01)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget", "H100"], "budget = H100: expected devices, their kind and hours, e.g. 8xH100:12h"),
        (["--budget", "0xH100:12h"], "budget = 0xH100:12h: expected"),
        (["--budget", "8xH100:12h"], "no rate is given: give the images of 224 pixels that 8 devices train per second"),
        (["--budget", "8xH100:12h", "--images_per_s", "0"], "expected a positive rate"),
        (["--budget", "8xH100:12h", "--images_per_s", "9", "--recipes", "fast"], "recipes = fast: "),
        (["--budget", "8xH100:12h", "--runs", "nowhere"], "runs = nowhere is not a folder"),
    ],
)
def test_wrong_input_is_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("ladder", ["plan", "--configs", str(CONFIGS), *flags]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
