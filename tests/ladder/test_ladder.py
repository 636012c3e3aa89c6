"""rn_configs/: every file loads, every step is one change, and its network has the size in the ladder's table."""

from __future__ import annotations

import contextlib
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import REPOSITORY
from support.runs import train_here

from ffcv_convnext.config import ModelConfig, load_config
from ffcv_convnext.ladder import (
    STARTING_POINT,
    PaperResult,
    describe,
    format_table,
    read_ladder,
    read_paper,
    read_released,
    read_step,
    size_of,
)
from ffcv_convnext.ladder.size import count_resnet
from ffcv_convnext.models import build_model, count_gmacs, count_parameters

CONFIGS = REPOSITORY / "rn_configs"
FOLDERS = ["", "kernel_sizes", "resnet200", "resnet200/kernel_sizes"]

RESNET50_COLUMN = {
    "00_resnet50": (25_557_032, 4.089, 78.82, STARTING_POINT),
    "01_stage_ratio": (28_628_520, 4.526, 79.36, "--resnet_layers 3-3-9-3"),
    "02_patchify_stem": (28_622_120, 4.418, 79.51, "--resnet_stem patch_embed"),
    "03_depthwise": (15_722_600, 2.350, 78.28, "--resnet_depthwise true"),
    "04_wider": (33_760_936, 5.268, 80.50, "--resnet_embed_dim 96"),
    "05_inverted": (25_851_400, 4.644, 80.64, "--resnet_block inverted"),
    "06_depthwise_first": (25_625_416, 4.065, 79.92, "--resnet_conv_first true"),
    "07_kernel7": (25_863_496, 4.146, 80.57, "--resnet_kernel_size 7"),
    "08_gelu": (25_863_496, 4.146, 80.62, "--resnet_act_layer gelu"),
    "09_fewer_activations": (25_863_496, 4.146, 81.27, "--resnet_del_act true"),
    "10_fewer_norms": (25_797_256, 4.146, 81.41, "--resnet_reorg_norm true"),
    "11_layernorm": (25_836_328, 4.146, 81.47, "--resnet_norm_layer ln"),
    "12_final_norm": (25_837_864, 4.146, None, "--resnet_final_norm true"),
    "13_separate_downsampling": (28_580_968, 4.456, 81.97, "--resnet_sep_downsample true"),
    "convnext_tiny": (
        28_589_128,
        4.456,
        82.1,
        "--resnet_ls_init_values 1e-06 --resnet_stem_norm true --resnet_ds_norm pre --resnet_init trunc",
    ),
}
RESNET200_COLUMN = {
    "00_resnet200": (15.007, 81.14),
    "01_stage_ratio": (14.518, 81.33),
    "02_patchify_stem": (14.376, 81.59),
    "03_depthwise": (7.234, 80.54),
    "04_wider": (16.764, 81.85),
    "05_inverted": (15.679, 82.64),
    "06_depthwise_first": (14.627, 82.04),
    "07_kernel7": (14.807, 82.30),
    "08_gelu": (14.807, 82.19),
    "09_fewer_activations": (14.807, 82.71),
    "10_fewer_norms": (14.807, 83.17),
    "11_layernorm": (14.807, 83.35),
    "12_final_norm": (14.807, None),
    "13_separate_downsampling": (15.355, 83.60),
    "convnext_base": (15.355, 83.8),
}
KERNELS = {"07_kernel5": (4.097, 80.35), "07_kernel9": (4.210, 80.57), "07_kernel11": (4.291, 80.47)}
KERNELS_200 = {"07_kernel5": 82.32, "07_kernel9": 82.27, "07_kernel11": 82.18}


@cache
def rows(folder: str) -> list[dict[str, Any]]:
    return describe(CONFIGS / folder)


def test_the_resnet50_column_has_the_sizes_of_the_table() -> None:
    measured = {r["name"]: (r["parameters"], r["gmacs"], r["paper_top1"], r["change"]) for r in rows("")}
    assert measured == RESNET50_COLUMN
    assert list(measured) == list(RESNET50_COLUMN)


def test_the_resnet200_column_has_the_sizes_of_the_table() -> None:
    measured = {r["name"]: (r["gmacs"], r["paper_top1"]) for r in rows("resnet200")}
    assert measured == RESNET200_COLUMN
    assert list(measured) == list(RESNET200_COLUMN)


def test_the_kernel_sizes_have_the_sizes_of_the_table() -> None:
    assert {r["name"]: (r["gmacs"], r["paper_top1"]) for r in rows("kernel_sizes")} == KERNELS
    assert [r["name"] for r in rows("kernel_sizes")] == list(KERNELS)  # 5, 9, 11: ordered by value
    assert {r["name"]: r["paper_top1"] for r in rows("resnet200/kernel_sizes")} == KERNELS_200


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_config_loads_and_is_explained(path: Path) -> None:
    load_config(path)
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_step_changes_exactly_one_setting(folder: str) -> None:
    two_in_the_paper = {"00_resnet200": 2, "01_stage_ratio": 2 if folder == "resnet200" else 1}
    for step in read_ladder(CONFIGS / folder):
        own = yaml.safe_load(step.path.read_text())
        if "base" not in own:
            assert step.name == "00_resnet50"
            continue
        expected = two_in_the_paper.get(step.name, 1)
        assert len(own) - 1 == expected, f"{step.path} sets {own}"
        assert step.change.count("--") == expected, f"{step.path} repeats a setting of its base"


@pytest.mark.parametrize("folder", ["", "resnet200"])
def test_every_step_builds_on_the_one_before(folder: str) -> None:
    steps = read_ladder(CONFIGS / folder)
    assert [step.name[:2] for step in steps] == [f"{i:02}" for i in range(14)]
    for before, step in zip(steps, [*steps[1:], *read_released(CONFIGS / folder)], strict=True):
        assert yaml.safe_load(step.path.read_text())["base"] == before.path.name


@pytest.mark.parametrize("folder", FOLDERS)
def test_header_comments_agree_with_sizes_and_paper(folder: str) -> None:
    paper = read_paper(CONFIGS / folder)
    for row in rows(folder):
        path = CONFIGS / folder / f"{row['name']}.yaml"
        text = path.read_text()
        assert f"# Cost: {row['parameters'] / 1e6:.3f} M parameters, {row['gmacs']:.3f} GMACs" in text
        assert f"--config {path.relative_to(CONFIGS.parent)} " in text
        result = re.search(r"# Paper: ([\d.]+)(?: \+- ([\d.]+) %)?", text)
        if row["paper_top1"] is None:
            assert result is None
        else:
            assert result is not None
            assert float(result[1]) == row["paper_top1"]
            assert (None if result[2] is None else float(result[2])) == paper[row["name"]].std


def test_the_base_has_the_papers_recipe() -> None:
    config = load_config(CONFIGS / "00_resnet50.yaml").flat()
    expected = {
        **{"lr": 4e-3, "recipe_batch": 4096, "weight_decay": 0.05, "min_lr": 1e-6, "warmup_epochs": 20, "epochs": 300},
        **{"opt": "adamw", "aa": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0, "mixup_switch_prob": 0.5},
        **{"reprob": 0.25, "remode": "pixel", "smoothing": 0.1, "drop_path": 0.1, "model_ema": True},
        **{"model_ema_decay": 0.9999, "train_interpolation": "bicubic", "input_size": 224, "crop_pct": 0.875},
        **{"batch_size": 128, "update_freq": 1, "clip_grad": None},
    }
    assert {name: config[name] for name in expected} == expected
    assert load_config(CONFIGS / "00_resnet50.yaml").data.eval_side == 256


RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
# Recipes that are not shortened schedules of ours: the step that the source trained, and the source's settings.
FROM_PAPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rsb_a3": (
        "00_resnet50.yaml",
        {"opt": "lamb", "lr": 8e-3, "weight_decay": 0.02, "recipe_batch": 2048, "epochs": 100, "warmup_epochs": 5}
        | {"input_size": 160, "test_input_size": 224, "crop_pct": 0.95, "loss": "bce", "bce_target_thresh": 0.2}
        | {"smoothing": 0.0, "aa": "rand-m6-mstd0.5-inc1", "mixup": 0.1, "cutmix": 1.0, "reprob": 0.0}
        | {"drop_path": 0.0, "model_ema": False, "model_ema_eval": False},
    ),
    "finetune_384": (
        "convnext_tiny.yaml",
        {"lr": 5e-5, "weight_decay": 1e-8, "recipe_batch": 512, "batch_size": 32, "epochs": 30, "warmup_epochs": 0}
        | {"layer_decay": 0.7, "head_init_scale": 0.001, "input_size": 384, "mixup": 0.0, "cutmix": 0.0}
        | {"drop_path": 0.1, "smoothing": 0.1, "reprob": 0.25, "aa": "rand-m9-mstd0.5-inc1"}
        | {"model_ema": False, "model_ema_eval": False},
    ),
}


@pytest.mark.parametrize("recipe", [p for p in RECIPES if p.stem not in FROM_PAPERS], ids=lambda p: p.stem)
def test_a_recipe_changes_only_the_schedule_of_a_step(recipe: Path) -> None:
    step = CONFIGS / "07_kernel7.yaml"
    alone, short = load_config(step).flat(), load_config(step, recipe).flat()
    changed = {name for name in alone if alone[name] != short[name]}
    ramp = {"min_res", "max_res", "start_ramp", "end_ramp", "test_input_size", "model_ema_decay"}
    assert changed == {"epochs", "warmup_epochs"} | (ramp if recipe.stem.startswith("fast") else set())
    assert str(short["epochs"]) in recipe.stem.split("_")


@pytest.mark.parametrize("recipe", sorted((CONFIGS / "recipes").glob("fast_*.yaml")), ids=lambda p: p.stem)
def test_a_fast_recipe_states_its_cost(recipe: Path) -> None:
    config = load_config(CONFIGS / "07_kernel7.yaml", recipe)
    images = config.schedule.epochs * 1_281_167 / 1e6
    share = config.relative_pixels() * (config.data.max_train_size / 224) ** 2
    text = recipe.read_text()
    assert f"Cost: {images:.1f} M images at {100 * share:.0f} % of the pixels" in text
    assert f": {images * share:.1f} M images of 224 pixels" in text
    assert f"a run of {config.schedule.epochs * (1_281_167 // 4096):,}." in text
    assert f"look back on {1 / (1 - config.run.model_ema_decay):,.0f} steps" in text
    assert (config.data.test_size, config.data.eval_side) == (224, 256)


@pytest.mark.parametrize("name", FROM_PAPERS)
def test_a_recipe_of_a_paper_has_its_settings_and_states_its_cost(name: str) -> None:
    step, expected = FROM_PAPERS[name]
    recipe = CONFIGS / "recipes" / f"{name}.yaml"
    config, alone = load_config(CONFIGS / step, recipe), load_config(CONFIGS / step)
    flat = config.flat()
    assert {setting: flat[setting] for setting in expected} == expected
    changed = {setting for setting, value in alone.flat().items() if flat[setting] != value}
    assert changed <= expected.keys()
    images, share = config.schedule.epochs * 1_281_167 / 1e6, (config.data.input_size / 224) ** 2
    text = recipe.read_text()
    assert f"Cost: {images:.1f} M images at {100 * share:.0f} % of the pixels of 224" in text
    assert f": {images * share:.1f} M images of 224 pixels" in text
    numbers = re.findall(r"is \d+: (\d+) processes x (\d+) x update_freq (\d+)", text)[0]
    processes, per_process, update_freq = map(int, numbers)
    assert per_process == config.data.batch_size
    assert processes * per_process * update_freq == config.schedule.recipe_batch
    assert f"--update_freq {update_freq}" in text


@pytest.mark.parametrize("name", FROM_PAPERS)
def test_a_recipe_of_a_paper_trains_any_step(name: str, small_settings: dict[str, Any], tmp_path: Path) -> None:
    _, settings = FROM_PAPERS[name]
    sizes = {"input_size", "test_input_size", "epochs", "warmup_epochs", "batch_size", "recipe_batch"}
    recipe = {setting: value for setting, value in settings.items() if setting not in sizes}
    steps = ("00_resnet50.yaml", "convnext_tiny.yaml")
    for step in steps:
        flat = load_config(CONFIGS / step).flat()
        switches = {key: value for key, value in flat.items() if key.startswith("resnet_")}
        small = {"resnet_layers": "1-1-1-1", "resnet_embed_dim": 8, "epochs": 1, "warmup_epochs": 0}
        folder = tmp_path / step
        scores = train_here({**small_settings, **switches, **small, **recipe, "output_dir": str(folder)})
        assert 0 <= scores["test_acc1"] <= 100


def test_rows_have_the_documented_keys_and_survive_json() -> None:
    assert all(list(r) == ["name", "change", "parameters", "gmacs", "paper_top1"] for r in rows(""))
    assert json.loads(json.dumps(rows(""))) == rows("")


SWITCHES: dict[str, tuple[Any, ...]] = {
    "resnet_layers": ((1, 1, 1, 1), (1, 2, 1, 2)),
    "resnet_stem": ("original", "patch_embed"),
    "resnet_embed_dim": (8, 12),
    "resnet_block": ("normal", "inverted"),
    "resnet_kernel_size": (3, 7),
    "resnet_norm_layer": ("bn", "ln", "fp32ln"),
    "resnet_ds_norm": ("none", "pre", "post"),
    "resnet_ls_init_values": (0.0, 1e-6),
    **{
        f"resnet_{name}": (False, True)
        for name in ("stem_norm", "depthwise", "conv_first", "del_act", "reorg_norm", "pre_norm", "final_norm")
    },
    "resnet_sep_downsample": (False, True),
}


def random_networks(number: int) -> Iterator[ModelConfig]:
    """Networks with every switch drawn at random, without those that cannot be combined."""
    draw = random.Random(0)
    while number:
        with contextlib.suppress(ValueError):
            yield ModelConfig(**{name: draw.choice(values) for name, values in SWITCHES.items()})
            number -= 1


def sizes(config: ModelConfig, input_size: int, num_classes: int) -> tuple[int, int]:
    """Parameters and multiply-accumulates of the built network."""
    with torch.device("meta"):
        model = build_model(config, num_classes)
    return count_parameters(model), round(count_gmacs(model, input_size) * 1e9)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONFIGS)))
def test_counted_sizes_are_those_of_the_built_networks(path: Path) -> None:
    config = load_config(path).model
    assert count_resnet(config, 224, 1000) == sizes(config, 224, 1000)


def test_counted_sizes_hold_for_any_combination_of_switches() -> None:
    for number, config in enumerate(random_networks(30)):
        input_size = (32, 65, 100)[number % 3]
        assert count_resnet(config, input_size, 7) == sizes(config, input_size, 7), config


def test_the_ladder_is_described_without_torch_and_a_network_of_timm_is_built() -> None:
    program = (
        "import sys; from pathlib import Path; from ffcv_convnext.ladder import describe\n"
        f"describe(Path({str(CONFIGS)!r}))\n"
        "assert not {'torch', 'timm', 'matplotlib', 'submitit'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert size_of(ModelConfig(model="resnet18"), 224, 1000) == (11_689_512, 1.814)


def test_the_table_is_aligned_markdown() -> None:
    lines = format_table(rows("")).splitlines()
    assert len(lines) == 2 + len(RESNET50_COLUMN)
    assert len({len(line) for line in lines}) == 1
    assert all(line.count("|") == 6 for line in lines)
    assert re.search(r"\| 07_kernel7 +\| --resnet_kernel_size 7 +\| +25,863,496 \| +4.146 \| +80.57 \|", lines[9])


def test_the_miniature_ladder_is_a_ladder() -> None:
    rows = describe(CONFIGS / "demo_ladder", input_size=64, num_classes=200)
    assert [row["change"].partition(" ")[0].removeprefix("--") for row in rows] == [
        "", "resnet_stem", "resnet_depthwise", "resnet_embed_dim", "resnet_block", "resnet_conv_first",
    ]  # fmt: skip
    assert [row["parameters"] for row in rows] == [679_384, 677_784, 447_816, 923_720, 457_904, 441_008]


@pytest.mark.parametrize(("recipe", "sizes"), [("short", [64] * 6), ("progressive", [32, 32, 32, 64, 64, 64])])
def test_recipes_of_the_miniature_ladder_are_shorter(recipe: str, sizes: list[int]) -> None:
    folder = CONFIGS / "demo_ladder"
    long = load_config(folder / "05_depthwise_first.yaml")
    config = load_config(folder / "05_depthwise_first.yaml", folder / "recipes" / f"{recipe}.yaml")
    assert [config.data.train_size(epoch) for epoch in range(config.schedule.epochs)] == sizes
    assert config.schedule.epochs < 0.4 * long.schedule.epochs
    assert config.model == long.model


def test_a_change_lists_the_differences_from_the_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("drop_path: 0.1\n")
    step = tmp_path / "step.yaml"
    step.write_text("base: base.yaml\nresnet_layers: 1-1-1-1\ndrop_path: 0.1\nresnet_depthwise: true\n")
    assert read_step(step).change == "--resnet_layers 1-1-1-1 --resnet_depthwise true"


def test_a_folder_without_steps_and_a_broken_paper_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no ladder"):
        describe(tmp_path)
    assert read_paper(tmp_path) == {}
    (tmp_path / "paper.json").write_text('{"00_x": {"top1": 80.5, "std": null}}')
    assert read_paper(tmp_path) == {"00_x": PaperResult("00_x", 80.5, None)}
    (tmp_path / "paper.json").write_text('{"00_x": 3}')
    with pytest.raises(ValueError, match=r"paper\.json: expected"):
        read_paper(tmp_path)
