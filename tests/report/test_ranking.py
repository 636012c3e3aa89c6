"""Rankings and neighbours, from run folders written by hand: pairs, numbers, what is left out, pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.ladder_runs import CONFIGS, steps_of, write_run

from ffcv_convnext.cli import run_command
from ffcv_convnext.ladder.statistics import kendall_tau_b, mean_interval, spearman_rho
from ffcv_convnext.report import Report, neighbours, rankings, summarise, to_html, to_markdown
from ffcv_convnext.report.ranking import CONFIGS_RECIPE, PAPER
from ffcv_convnext.report.scatter import draw_rankings

STEPS = {step.name: step for step in steps_of()}
NAMES = ("05_inverted", "06_depthwise_first", "07_kernel7", "08_gelu")
LONG = {"05_inverted": 80.6, "06_depthwise_first": 79.9, "07_kernel7": 80.6, "08_gelu": 80.7}
SHORT = {"lr": 2e-3}
OTHER_DATA = {"num_classes": 200, "images": {"train": 6000, "val": 2000}}


def write(folder: Path, scores: Mapping[str, float], *, seeds: int = 3, gap: float = 0.1, **more: object) -> None:
    """One run for each step and seed; seeds are `gap` apart around the score."""
    for name, top1 in scores.items():
        for seed in range(seeds):
            place = top1 + gap * (seed - (seeds - 1) / 2)
            write_run(folder / name / f"seed{seed}", STEPS[name], top1=place, seed=seed, **more)


@pytest.fixture
def report(tmp_path: Path) -> Report:
    write(tmp_path / "long", LONG)
    write(tmp_path / "short", {**LONG, "05_inverted": 70.0, "07_kernel7": 72.0}, **SHORT)
    return summarise([tmp_path], CONFIGS)


def test_each_recipe_is_ranked_against_the_paper_and_each_pair_once(report: Report) -> None:
    found = {(ranking.recipe, ranking.reference): ranking for ranking in rankings(report)}
    short = "--lr 0.002"
    assert list(found) == [(CONFIGS_RECIPE, PAPER), (short, PAPER), (short, CONFIGS_RECIPE)]
    paper = [STEPS_PAPER[name] for name in NAMES]
    ours = [70.0, 79.9, 72.0, 80.7]
    assert found[short, PAPER].tau == pytest.approx(kendall_tau_b(paper, ours))
    assert found[short, PAPER].rho == pytest.approx(spearman_rho(paper, ours))
    pair = found[short, CONFIGS_RECIPE]
    assert pair.tau == pytest.approx(kendall_tau_b(list(LONG.values()), ours))
    assert [point.name for point in pair.points] == list(NAMES)
    assert [point.reference.mean for point in pair.points] == pytest.approx(list(LONG.values()))
    assert pair.tau_interval is not None
    assert pair.tau_interval.low <= pair.tau <= pair.tau_interval.high


STEPS_PAPER = {"05_inverted": 80.64, "06_depthwise_first": 79.92, "07_kernel7": 80.57, "08_gelu": 80.62}


def test_two_steps_have_no_order_and_other_data_is_another_matter(tmp_path: Path) -> None:
    write(tmp_path / "two", {name: LONG[name] for name in NAMES[:2]})
    assert rankings(summarise([tmp_path / "two"], CONFIGS)) == []
    write(tmp_path / "three", {name: LONG[name] for name in NAMES[:3]}, facts=OTHER_DATA)
    write(tmp_path / "other", {name: LONG[name] for name in NAMES[:3]}, **SHORT)
    found = rankings(summarise([tmp_path / "three", tmp_path / "other"], CONFIGS))
    assert [ranking.reference for ranking in found] == [PAPER, PAPER], "recipes on different data are not a pair"


def test_unfinished_runs_and_equal_scores(tmp_path: Path) -> None:
    write(tmp_path / "equal", dict.fromkeys(NAMES[:3], 80.0), seeds=1)
    write_run(tmp_path / "equal" / "08_gelu" / "seed0", STEPS["08_gelu"], top1=81.0, epochs=100)
    report = summarise([tmp_path], CONFIGS)
    [ranking] = rankings(report)
    assert math.isnan(ranking.tau)
    assert ranking.tau_interval is None
    assert len(ranking.points) == 3
    text = to_markdown(report)
    assert "-: all scores of one side are equal" in text
    assert draw_rankings([ranking], ["png"])[0].startswith(b"\x89PNG")


def test_neighbours_by_hand(tmp_path: Path) -> None:
    base, step = [80.0, 80.2, 80.1], [80.5, 80.9, 80.4]
    for name, scores in (("07_kernel7", base), ("08_gelu", step), ("06_depthwise_first", [80.0])):
        for seed, top1 in enumerate(scores):
            write_run(tmp_path / name / f"seed{seed}", STEPS[name], top1=top1, seed=seed)
    write_run(tmp_path / "08_gelu" / "seed7", STEPS["08_gelu"], top1=99.0, seed=7)  # its base has no such seed
    report = summarise([tmp_path], CONFIGS)
    kernel, gelu = neighbours(report.sections[0])
    assert (gelu.step, gelu.base) == ("08_gelu", "07_kernel7")
    assert gelu.differences == pytest.approx([0.5, 0.7, 0.3])
    assert gelu.interval == mean_interval(gelu.differences)
    assert gelu.told_apart is True  # 0.5 +- 0.497
    assert (kernel.step, len(kernel.differences), kernel.told_apart) == ("07_kernel7", 1, None)
    text = to_markdown(report)
    assert "| 08_gelu    |     3 |   +0.50 | +0.00 to +1.00 | yes        |" in text.replace(
        "|        yes |", "| yes        |"
    )
    assert "1 of 2 have one seed, so nothing is known about their spread" in text


def test_neighbours_that_cannot_be_told_apart_are_named(report: Report) -> None:
    text = to_markdown(report)
    long, short = (neighbours(section) for section in report.sections)
    assert all(each.told_apart for each in short), "the seeds' differences are equal, so their spread is 0"
    assert [each.told_apart for each in long] == [True, True, True]
    assert "These seeds tell every step apart from its base" in text


def test_files_page_and_json(report: Report, tmp_path: Path) -> None:
    assert report.sections
    out = tmp_path / "out"
    command = ["report", str(tmp_path / "long"), str(tmp_path / "short"), "--configs", str(CONFIGS), "--html"]
    assert run_command("report", [*command[1:], "--out", str(out)]) == 0
    assert {"order.svg", "order.png"} <= {path.name for path in out.iterdir()}
    found = json.loads((out / "ladder.json").read_text())
    assert [ranking["reference"] for ranking in found["rankings"]] == [PAPER, PAPER, CONFIGS_RECIPE]
    assert found["rankings"][0]["steps"] == list(NAMES)
    assert len(found["rankings"][0]["tau_b_interval"]) == 2
    assert found["sections"][0]["neighbours"][0]["base"] == "05_inverted"
    page = (out / "ladder.html").read_text()
    assert page.count("<h2>Order of the steps</h2>") == 1
    assert page.count("<h2>Neighbouring steps: ") == 2
    assert "id='scatter'" in page
    assert to_html(report).count("<svg") == 2
