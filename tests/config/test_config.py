"""Settings: where they come from, which one wins, what is refused and with which message; exit statuses."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from support import REPOSITORY

from ffcv_convnext import __version__, cli, errors
from ffcv_convnext.config import (
    SETTINGS,
    Config,
    add_flags,
    config_from_args,
    differences,
    format_value,
    load_config,
    nearest,
    read_yaml,
)
from ffcv_convnext.config.timm_defaults import TIMM_IMAGES
from ffcv_convnext.errors import Failure, Interrupted

RAMP = ("min_res", "max_res", "start_ramp", "end_ramp")  # all four or none

# One accepted value for each setting, other than its default, in the words of a command line.
OTHER_WORDS: dict[str, str] = {
    "data_path": "/data/beton",
    "stage_to": "/local/scratch",
    "stage_evict": "true",
    "batch_size": "64",
    "update_freq": "4",
    "global_batch": "512",
    "input_size": "160",
    "test_input_size": "288",
    "min_res": "128",
    "max_res": "192",
    "start_ramp": "2",
    "end_ramp": "9",
    "res_batch": "true",
    "mean": "0.5,0.5,0.5",
    "std": "0.25,0.5,1",
    "crop_pct": "0.95",
    "test_crop_pct": "0.9",
    "eval_resize": "warp",
    "eval_interpolation": "bilinear",
    "train_interpolation": "random",
    "scale": "0.35,1",
    "ratio": "0.5,2",
    "hflip": "0",
    "bad_samples": "skip",
    "order": "quasi_random",
    "repeated_aug": "3",
    "shuffle_window_mb": "512",
    "data_cache": "process",
    "check_data": "never",
    "num_workers": "3",
    "batches_ahead": "1",
    "aa": "none",
    "color_jitter": "none",
    "smoothing": "0",
    "mixup": "0.2",
    "cutmix": "0",
    "cutmix_minmax": "0.2,0.8",
    "mixup_prob": "0.5",
    "mixup_switch_prob": "0.25",
    "mixup_mode": "pair",
    "reprob": "0",
    "remode": "const",
    "recount": "3",
    "model": "resnet50",
    "nb_classes": "10",
    "drop_path": "0.1",
    "head_init_scale": "0.001",
    "grad_checkpointing": "true",
    "resnet_layers": "3-3-9-3",
    "resnet_stem": "patch_embed",
    "resnet_stem_norm": "true",
    "resnet_depthwise": "true",
    "resnet_embed_dim": "96",
    "resnet_block": "inverted",
    "resnet_conv_first": "true",
    "resnet_kernel_size": "7",
    "resnet_act_layer": "gelu",
    "resnet_del_act": "true",
    "resnet_reorg_norm": "true",
    "resnet_pre_norm": "true",
    "resnet_norm_layer": "fp32ln",
    "resnet_final_norm": "true",
    "resnet_sep_downsample": "true",
    "resnet_ds_norm": "pre",
    "resnet_ls_init_values": "1e-6",
    "resnet_init": "trunc",
    "loss": "bce",
    "bce_target_thresh": "0.2",
    "opt": "lamb",
    "opt_eps": "1e-6",
    "opt_betas": "0.9,0.95",
    "momentum": "0.8",
    "weight_decay": "0.1",
    "weight_decay_end": "0.2",
    "layer_decay": "0.7",
    "clip_grad": "5",
    "epochs": "100",
    "lr": "1e-3",
    "min_lr": "1e-5",
    "sched": "cyclic",
    "warmup_epochs": "5",
    "warmup_steps": "2000",
    "cooldown_epochs": "10",
    "recipe_batch": "1024",
    "output_dir": "/runs/a",
    "seed": "9223372036854775807",
    "device": "cpu",
    "amp": "fp16",
    "channels_last": "false",
    "compile": "true",
    "cuda_graphs": "true",
    "matmul_precision": "medium",
    "kernels": "triton",
    "affinity": "none",
    "model_ema": "true",
    "model_ema_decay": "0.99",
    "model_ema_eval": "false",
    "model_ema_bn": "recompute",
    "dist_eval": "false",
    "eval": "true",
    "test_sizes": "192-224-288",
    "tta": "flip",
    "eval_data_path": "/data/other",
    "eval_csv": "classes.csv",
    "resume": "/runs/a/checkpoint-last.pth",
    "auto_resume": "false",
    "finetune": "/runs/b/checkpoint-best.pth",
    "model_key": "model_ema",
    "model_prefix": "backbone.",
    "save_ckpt_freq": "2",
    "save_ckpt_steps": "500",
    "log_every": "50",
    "log_wandb": "true",
    "project": "ladder",
}

# Settings that a setting needs.
NEEDED: dict[str, dict[str, str]] = {
    "resnet_conv_first": {"resnet_block": "inverted"},
    "resnet_reorg_norm": {"resnet_block": "inverted", "resnet_conv_first": "true"},
    "resnet_pre_norm": {"resnet_block": "inverted", "resnet_conv_first": "true", "resnet_reorg_norm": "true"},
    "resnet_stem_norm": {"resnet_stem": "patch_embed"},
    "resnet_ds_norm": {"resnet_sep_downsample": "true"},
    "bce_target_thresh": {"loss": "bce"},
    "model_ema_bn": {"model_ema": "true"},
    "model_key": {"finetune": "/runs/b/checkpoint-best.pth"},
    "model_prefix": {"finetune": "/runs/b/checkpoint-best.pth"},
    **{name: {"eval": "true"} for name in ("test_sizes", "tta", "eval_data_path", "eval_csv")},
    "stage_evict": {"stage_to": "/local/scratch"},
    "res_batch": {name: OTHER_WORDS[name] for name in RAMP},
    **{name: {other: OTHER_WORDS[other] for other in RAMP if other != name} for name in RAMP},
}

FLAGS_OF_THE_RECIPE = """--epochs --lr --min_lr --warmup_epochs --warmup_steps --weight_decay --weight_decay_end --opt
    --opt_betas --opt_eps --clip_grad --smoothing --mixup --cutmix --cutmix_minmax --mixup_prob --mixup_switch_prob
    --mixup_mode --aa --color_jitter --reprob --remode --recount --train_interpolation --crop_pct --input_size
    --mean --std --eval_resize --eval_interpolation
    --model_ema --model_ema_decay --model_ema_eval --save_ckpt_freq --save_ckpt_steps --resume --auto_resume --eval
    --finetune --model_key --model_prefix --seed --num_workers --output_dir --dist_eval --amp --compile
    --channels_last --data_path --model --batch_size --update_freq --drop_path --resnet_layers
    --resnet_stem --log_wandb"""


def parse(*words: str) -> Config:
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    add_flags(parser)
    return config_from_args(parser, list(words))[0]


def write_yaml(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def value(config: Config, name: str) -> Any:
    return getattr(getattr(config, SETTINGS[name].group), name)


# --- every setting -----------------------------------------------------------------------------------------------


def test_the_table_above_covers_every_setting() -> None:
    assert list(OTHER_WORDS) == list(SETTINGS)


@pytest.mark.parametrize("name", OTHER_WORDS)
def test_a_setting_survives_flag_flat_and_yaml(name: str) -> None:
    words = {**NEEDED.get(name, {}), name: OTHER_WORDS[name]}
    config = parse(*(word for key, text in words.items() for word in (f"--{key}", text)))
    assert value(config, name) != SETTINGS[name].default
    assert Config.from_flat(config.flat()) == config
    assert Config.from_flat(yaml.safe_load(config.to_yaml())) == config
    assert set(config.flat()) == set(SETTINGS)
    changed = {key for key in SETTINGS if value(config, key) != SETTINGS[key].default}
    followed = {key for key in TIMM_IMAGES if name == "model" and key in changed}  # the timm model's own
    assert Config().replace(**words, **{key: value(config, key) for key in followed}) == config
    assert changed - followed == set(words), "a setting changed another one"


def test_defaults_survive_yaml() -> None:
    assert Config.from_flat(yaml.safe_load(Config().to_yaml())) == Config() == Config.from_flat({})


@pytest.mark.parametrize("flag", FLAGS_OF_THE_RECIPE.split())
def test_the_recipe_s_flag_exists(flag: str) -> None:
    assert flag[2:] in SETTINGS


def test_defaults_are_the_paper_s_recipe() -> None:
    """Liu et al. 2022, Table 5."""
    config = Config()
    expected = {
        "opt": "adamw", "lr": 4e-3, "min_lr": 1e-6, "weight_decay": 0.05, "warmup_epochs": 20, "epochs": 300,
        "recipe_batch": 4096, "aa": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0, "mixup_switch_prob": 0.5,
        "reprob": 0.25, "remode": "pixel", "smoothing": 0.1, "model_ema_decay": 0.9999, "input_size": 224,
    }  # fmt: skip
    assert {name: value(config, name) for name in expected} == expected
    assert config.data.eval_side == 256


@pytest.mark.parametrize(
    ("settings", "pixels"),
    [
        ({"input_size": 160}, (182, False)),
        ({"crop_pct": 0.95}, (235, False)),
        ({"crop_pct": 1}, (224, False)),
        ({"input_size": 352}, (402, False)),
        ({"input_size": 384}, (384, True)),  # the paper's code warps from here on, whatever crop_pct
        ({"input_size": 384, "crop_pct": 0.875}, (384, True)),
        ({"input_size": 384, "eval_resize": "crop"}, (384, False)),
        ({"input_size": 384, "eval_resize": "crop", "crop_pct": 0.875}, (438, False)),
        ({"eval_resize": "warp"}, (224, True)),
        ({"eval_resize": "warp", "crop_pct": 0.875}, (256, True)),  # timm's squash
        ({"input_size": 160, "test_input_size": 224, "crop_pct": 0.875, "test_crop_pct": 1}, (224, False)),
        ({"input_size": 160, "test_input_size": 224, "test_crop_pct": 0.7}, (320, False)),
        ({"eval_resize": "crop", "test_input_size": 384, "test_crop_pct": 0.8}, (480, False)),
        ({"eval_resize": "warp", "crop_pct": 0.875, "test_crop_pct": 0.5}, (448, True)),
    ],
)
def test_evaluation_images_are_resized_as_in_the_papers_code(
    settings: dict[str, Any], pixels: tuple[int, bool]
) -> None:
    data = Config.from_flat(settings).data
    assert (data.eval_side, data.eval_warps) == pixels


# --- progressive resizing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ramp", "sizes"),
    [
        # ffcv-imagenet's schedules of 16 and 88 epochs: 160 to 192 pixels
        ("160 192 11 13", {0: 160, 11: 160, 12: 192, 13: 192, 15: 192}),
        ("160 192 65 76", {65: 160, 70: 160, 71: 192, 76: 192, 87: 192}),
        ("128 256 4 12", {4: 128, 5: 128, 6: 160, 8: 192, 10: 224, 11: 256, 12: 256}),  # 144, 240: half to even
        ("128 192 0 0", {0: 128, 1: 192}),
        ("160 160 0 5", {0: 160, 3: 160, 9: 160}),
    ],
)
def test_the_training_images_grow_as_in_ffcv_imagenet(ramp: str, sizes: dict[int, int]) -> None:
    config = Config.from_flat({**dict(zip(RAMP, ramp.split(), strict=True)), "input_size": 224})
    assert {epoch: config.data.train_size(epoch) for epoch in sizes} == sizes
    assert config.data.test_size == 224
    assert config.data.max_train_size == int(ramp.split()[1])


def test_a_run_knows_its_sizes_and_its_share_of_the_pixels() -> None:
    config = Config.from_flat({**dict(zip(RAMP, (128, 192, 1, 3), strict=True)), "epochs": 4, "warmup_epochs": 0})
    assert config.train_sizes() == [128, 160, 192]
    assert config.relative_pixels() == pytest.approx((2 * 128**2 + 160**2 + 192**2) / (4 * 192**2))
    assert Config().train_sizes() == [224]
    assert Config().relative_pixels() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_res": 128}, "progressive resizing needs --max_res --start_ramp --end_ramp too, or none of the four"),
        ({"min_res": 100}, "min_res = 100: expected a multiple of 32"),
        ({"max_res": 200}, "max_res = 200: expected a multiple of 32"),
        ({"min_res": 224}, "min_res = 224: expected at most max_res = 192"),
        ({"start_ramp": 10}, "start_ramp = 10: expected at most end_ramp = 9"),
        ({"epochs": 9, "warmup_epochs": 0}, "end_ramp = 9: expected at most 8, the last of 9 epochs"),
    ],
)
def test_a_wrong_ramp_is_refused(changes: dict[str, Any], message: str) -> None:
    good = {"min_res": 128, "max_res": 192, "start_ramp": 2, "end_ramp": 9}
    Config.from_flat(good)
    with pytest.raises(ValueError, match=message):
        Config.from_flat(changes if list(changes) == ["min_res"] and changes["min_res"] == 128 else {**good, **changes})


@pytest.mark.parametrize(
    ("update_freq", "joined"),
    [  # pixels at most: 4 times at 96, 2.56 at 120 (not used), 2.25 at 128, 1.44 at 160, 1 at 192
        (1, [1, 1, 1, 1]),
        (2, [2, 2, 1, 1]),
        (3, [3, 1, 1, 1]),
        (4, [4, 2, 1, 1]),
        (6, [3, 2, 1, 1]),
        (8, [4, 2, 1, 1]),
    ],
)
def test_res_batch_joins_micro_batches_up_to_the_pixels_of_one_at_max_res(update_freq: int, joined: list[int]) -> None:
    ramp = {"min_res": 96, "max_res": 192, "start_ramp": 2, "end_ramp": 9}
    data = Config.from_flat({**ramp, "update_freq": update_freq, "res_batch": True}).data
    assert [data.num_joined(size) for size in (96, 128, 160, 192)] == joined
    off = Config.from_flat({**ramp, "update_freq": update_freq}).data
    assert [off.num_joined(size) for size in (96, 128, 160, 192)] == [1, 1, 1, 1]


def test_res_batch_needs_a_ramp() -> None:
    with pytest.raises(ValueError, match=r"^res_batch = true needs progressive resizing: --min_res --max_res --start"):
        Config.from_flat({"res_batch": True})


@pytest.mark.parametrize(
    "changes", [{"test_input_size": 384}, {"input_size": 384}, {"eval": True, "test_sizes": "224,384"}]
)
def test_a_crop_ratio_that_the_evaluation_would_not_use_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"^test_crop_pct = 0\.9 has no effect on test images of 384 .* --eval_resize crop"
    ):
        Config.from_flat({"test_crop_pct": 0.9, **changes})
    Config.from_flat({"test_crop_pct": 0.9, "eval_resize": "crop", **changes})


# --- timm models --------------------------------------------------------------------------------------------------

OF_TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"input_size": 224, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 0.9},
    "inception_v3": {"input_size": 299, "mean": (0.5, 0.5, 0.5), "crop_pct": 0.875, "eval_resize": "crop"},
    "vgg16": {"input_size": 224, "eval_interpolation": "bilinear", "mean": (0.485, 0.456, 0.406)},
    "fastvit_mci0": {"input_size": 256, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
    "coat_lite_medium_384": {"input_size": 384, "eval_resize": "warp", "crop_pct": 1.0},
}


@pytest.mark.parametrize("model", OF_TIMM)
def test_a_timm_models_images_are_its_own(model: str) -> None:
    data = Config.from_flat({"model": model}).data
    assert {name: getattr(data, name) for name in OF_TIMM[model]} == OF_TIMM[model]


def test_settings_override_a_timm_models_images() -> None:
    data = Config.from_flat({"model": "vit_tiny_patch16_224", "mean": "0.4,0.5,0.6", "crop_pct": "none"}).data
    assert (data.mean, data.std, data.crop_pct) == ((0.4, 0.5, 0.6), (0.5, 0.5, 0.5), None)


def test_a_recorded_config_keeps_the_images_of_its_timm_model(tmp_path: Path) -> None:
    config = Config.from_flat({"model": "vit_tiny_patch16_224"})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert "mean: 0.5,0.5,0.5\n" in config.to_yaml()
    assert load_config(tmp_path / "config.yaml") == config


def test_a_timm_model_without_a_configuration_in_timm_gets_the_recipes_images() -> None:
    assert Config.from_flat({"model": "no_such_model"}).data == Config().data, "building it is the error"


def test_a_timm_model_of_images_that_are_not_square_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = dataclasses.replace(timm.get_pretrained_cfg("vit_tiny_patch16_224"), input_size=(3, 1024, 768))
    monkeypatch.setattr(timm.models, "get_pretrained_cfg", lambda _: cfg)
    with pytest.raises(ValueError, match=r"takes images of 3 x 1024 x 768; expected square RGB"):
        Config.from_flat({"model": "vit_tiny_patch16_224"})


def test_a_config_without_a_matmul_precision_is_of_a_version_that_used_torchs_default() -> None:
    assert Config.from_flat({}).run.matmul_precision == "high"
    assert Config.recorded({}).run.matmul_precision == "highest"
    assert Config.recorded(Config().flat()) == Config()


# --- precedence ---------------------------------------------------------------------------------------------------


def test_precedence_is_flag_then_last_yaml_then_first_yaml_then_its_base_then_default(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write_yaml(tmp_path / "root.yaml", "lr: 1e-3\nepochs: 50\nseed: 1\nmixup: 0.1\ncutmix: 0.1")
    write_yaml(tmp_path / "deep/middle.yaml", "base: ../root.yaml\nepochs: 60\nseed: 2\nmixup: 0.2")
    first = write_yaml(tmp_path / "first.yaml", "base: deep/middle.yaml\nseed: 3\nmixup: 0.3")
    other_root = write_yaml(tmp_path / "other_root.yaml", "seed: 4")
    second = write_yaml(tmp_path / "second.yaml", f"base: {other_root}\nmixup: 0.4")
    config = parse("--config", str(first), str(second), "--mixup", "0.5")
    found = [value(config, name) for name in ("lr", "epochs", "seed", "mixup", "cutmix", "min_lr")]
    assert found == [1e-3, 60, 4, 0.5, 0.1, 1e-6]
    assert parse("--config", str(first), "--config", str(second), "--mixup", "0.5") == config
    assert parse("--mixup", "0.5", "--config", str(first), str(second)) == config
    assert parse("--config", str(second), str(first)).run.seed == 3


def test_an_empty_yaml_changes_nothing(tmp_path: Path) -> None:
    assert load_config(write_yaml(tmp_path / "empty.yaml", "# only a comment\n")) == Config()


def test_a_resolved_config_repeats_itself(tmp_path: Path) -> None:
    config = parse("--resnet_layers", "3-3-9-3", "--opt_betas", "0.9", "0.95", "--data_path", "~/beton", "--amp", "off")
    assert load_config(write_yaml(tmp_path / "config.yaml", config.to_yaml())) == config
    assert config.data.data_path == Path.home() / "beton"


# --- spellings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("amp: off", "amp", "off"),
        ("amp: 'off'", "amp", "off"),
        ("amp: BF16", "amp", "bf16"),
        ("lr: 4e-3", "lr", 4e-3),  # YAML 1.1 reads this as text: it wants 4.0e-3
        ("lr: 4.0e-3", "lr", 4e-3),
        ("lr: 1", "lr", 1.0),
        ("crop_pct: none", "crop_pct", None),
        ("crop_pct:", "crop_pct", None),
        ("crop_pct: null", "crop_pct", None),
        ("color_jitter: none", "color_jitter", None),
        ("aa: none", "aa", "none"),
        ("repeated_aug: true", "repeated_aug", 3),
        ("repeated_aug: 2", "repeated_aug", 2),
        ("repeated_aug: 0", "repeated_aug", 1),
        ("repeated_aug: false", "repeated_aug", 1),
        ("repeated_aug: none", "repeated_aug", 1),
        ("model_ema: yes", "model_ema", True),
        ("model_ema: 'True'", "model_ema", True),
        ("resnet_layers: 3-3-9-3", "resnet_layers", (3, 3, 9, 3)),
        ("resnet_layers: [3, 3, 9, 3]", "resnet_layers", (3, 3, 9, 3)),
        ("resnet_layers: 3,24,36,3", "resnet_layers", (3, 24, 36, 3)),
        ("opt_betas: [0.9, 0.999]", "opt_betas", (0.9, 0.999)),
        ("opt_betas: 0.9 0.999", "opt_betas", (0.9, 0.999)),
        ("scale: 8e-2,1", "scale", (0.08, 1.0)),
        ("resnet_sep_downsample: true\nresnet_ds_norm: true", "resnet_ds_norm", "post"),
        ("resnet_sep_downsample: true\nresnet_ds_norm: false", "resnet_ds_norm", "none"),
        ("resnet_ds_norm: none", "resnet_ds_norm", "none"),
        ("resnet_kernel_size: 11", "resnet_kernel_size", 11),
        ("output_dir: runs/7", "output_dir", Path("runs/7")),
    ],
)
def test_accepted_spellings_in_yaml(tmp_path: Path, text: str, name: str, expected: Any) -> None:
    found = value(load_config(write_yaml(tmp_path / "words.yaml", text)), name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("words", [["0.9", "0.999"], ["0.9,0.999"], ["(0.9, 0.999)"]])
def test_betas_may_be_two_arguments_or_one(words: list[str]) -> None:
    assert parse("--opt_betas", *words).optim.opt_betas == (0.9, 0.999)


def test_every_step_of_the_ladder_can_be_written_as_flags() -> None:
    steps = {
        "--resnet_layers": "3-3-9-3", "--resnet_stem": "patch_embed", "--resnet_depthwise": "true",
        "--resnet_embed_dim": "96", "--resnet_block": "inverted", "--resnet_conv_first": "true",
        "--resnet_kernel_size": "7", "--resnet_act_layer": "gelu", "--resnet_del_act": "true",
        "--resnet_reorg_norm": "true", "--resnet_norm_layer": "ln", "--resnet_final_norm": "true",
        "--resnet_sep_downsample": "true",
    }  # fmt: skip
    flags = ["--model", "resnet", "--batch_size", "128", "--drop_path", "0.1"]
    repository = REPOSITORY
    for number, step in enumerate(["", *steps]):
        flags += [step, steps[step]] if step else []
        (file,) = (repository / "rn_configs").glob(f"{number:02d}_*.yaml")
        assert parse(*flags).model == load_config(file).model, file.name


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("resnet_layer", "resnet_layers"), ("warmup_epoch", "warmup_epochs"), ("learn_rate", None), ("Lr", "lr")],
)
def test_an_unknown_name_is_refused_with_similar_names(tmp_path: Path, wrong: str, right: str | None) -> None:
    base = write_yaml(tmp_path / "wrong.yaml", f"{wrong}: 1")
    by_base = write_yaml(tmp_path / "top.yaml", f"base: {base.name}")
    attempts = {
        f"{base}: unknown setting '{wrong}'": lambda: load_config(base),
        f"{tmp_path}/wrong.yaml: unknown setting '{wrong}'": lambda: load_config(by_base),
        f"unknown option '--{wrong}'": lambda: parse(f"--{wrong}", "1"),
        f"unknown setting '{wrong}'": lambda: Config.from_flat({wrong: 1}),
    }
    for start, attempt in attempts.items():
        with pytest.raises(ValueError, match=f"^{re.escape(start)}") as caught:
            attempt()
        assert right is None or right in str(caught.value).split("did you mean")[1]


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (["--ngpus", "lr"], "; did you mean --ngpus?"),
        (["ngpu1", "ngpu2"], "; did you mean ngpu2 or ngpu1?"),
        (["ngpu1", "ngpu2", "gpu"], "; did you mean ngpu2, ngpu1 or gpu?"),
        (["lr"], ""),
    ],
)
def test_similar_names_are_suggested(known: list[str], expected: str) -> None:
    assert nearest("ngpu", known) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stray"], "unexpected argument 'stray'"),
        (["--lr", "1e-3", "2e-3"], "unexpected argument '2e-3'"),
        (["--lrr=3"], "unknown option '--lrr'; did you mean --lr"),
        (["--mixu", "0.1"], "unknown option '--mixu'; did you mean --mixup"),
    ],
)
def test_an_extra_argument_or_an_abbreviated_option_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(*words)


@pytest.mark.parametrize(
    ("name", "word", "expectation"),
    [
        ("epochs", "many", "a whole number"),
        ("epochs", "1e3", "a whole number"),
        ("epochs", "0", "a whole number >= 1"),
        ("lr", "fast", "a number"),
        ("lr", "nan", "a number > 0"),
        ("lr", "inf", "a number > 0"),
        ("lr", "0", "a number > 0"),
        ("min_lr", "1", "at most lr = 0.004"),
        ("min_lr", "-1", "a number >= 0"),
        ("warmup_epochs", "301", "at most epochs = 300"),
        ("warmup_epochs", "-1", "a whole number >= 0"),
        ("recipe_batch", "0", ">= 1"),
        ("batch_size", "0", ">= 1"),
        ("batch_size", "true", "a whole number"),
        ("update_freq", "0", ">= 1"),
        ("repeated_aug", "-1", ">= 1"),
        ("num_workers", "0", ">= 1"),
        ("batches_ahead", "0", ">= 1"),
        ("input_size", "31", "a whole number >= 32"),
        ("crop_pct", "0", "a number in (0, 1]"),
        ("crop_pct", "1.1", "a number in (0, 1]"),
        ("test_crop_pct", "0", "a number in (0, 1] or none"),
        ("test_crop_pct", "1.1", "a number in (0, 1] or none"),
        ("test_crop_pct", "big", "a number in (0, 1] or none"),
        ("crop_pct", "big", "a number"),
        ("train_interpolation", "lanczos", "one of bicubic, bilinear, random"),
        ("scale", "0.9,0.1", "min,max with min <= max"),
        ("scale", "0,1", "2 numbers in (0, 1]"),
        ("scale", "0.5", "2 numbers"),
        ("ratio", "2,1", "min,max with min <= max"),
        ("hflip", "2", "a number in [0, 1]"),
        ("smoothing", "1.5", "a number in [0, 1]"),
        ("mixup_prob", "-0.1", "a number in [0, 1]"),
        ("mixup_switch_prob", "1.01", "a number in [0, 1]"),
        ("reprob", "25", "a number in [0, 1]"),
        ("mixup", "-1", ">= 0"),
        ("cutmix", "-1", ">= 0"),
        ("cutmix_minmax", "0.8,0.2", "at least one pixel apart at input_size = 224"),
        ("cutmix_minmax", "0.2,0.2001", "at least one pixel apart at input_size = 224"),
        ("mixup_mode", "half", "one of batch, pair, elem"),
        ("remode", "black", "one of pixel, rand, const"),
        ("recount", "0", ">= 1"),
        ("color_jitter", "2", "a number in [0, 1] or none"),
        ("nb_classes", "0", ">= 1"),
        ("drop_path", "1", "a number in [0, 1)"),
        ("resnet_layers", "3-3-9", "4 whole numbers"),
        ("resnet_layers", "3-3-9-3-3", "4 whole numbers"),
        ("resnet_layers", "3-3-0-3", "4 whole numbers >= 1"),
        ("resnet_layers", "a-b-c-d", "4 whole numbers"),
        ("resnet_embed_dim", "0", ">= 1"),
        ("resnet_kernel_size", "4", "one of 3, 5, 7, 9, 11"),
        ("resnet_ls_init_values", "-1", ">= 0"),
        ("resnet_depthwise", "1", "true or false"),
        ("opt_eps", "0", "a number > 0"),
        ("opt_betas", "0.9,1", "2 numbers in [0, 1)"),
        ("opt_betas", "0.9", "2 numbers"),
        ("momentum", "-1", ">= 0"),
        ("weight_decay", "-0.1", ">= 0"),
        ("weight_decay_end", "-0.1", ">= 0"),
        ("clip_grad", "0", "a number > 0"),
        ("seed", "-1", "a whole number in [0, 9223372036854775807]"),
        ("seed", str(2**63), "a whole number in [0, 9223372036854775807]"),
        ("amp", "float16", "one of bf16, fp16, off"),
        ("device", "tpu", "one of auto, cuda, cpu"),
        ("model_ema_decay", "1", "a number in [0, 1)"),
        ("save_ckpt_freq", "0", ">= 1"),
        ("save_ckpt_steps", "-1", ">= 0"),
        ("log_every", "0", ">= 1"),
    ],
)
def test_an_error_names_setting_value_and_expectation(name: str, word: str, expectation: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        Config.from_flat({name: word})
    message = str(caught.value)
    assert message.startswith(f"{name} = ")
    assert expectation in message.split("expected", 1)[1]
    assert "\n" not in message


def test_a_wrong_value_in_a_yaml_names_the_file(tmp_path: Path) -> None:
    base = write_yaml(tmp_path / "root.yaml", "epochs: many")
    top = write_yaml(tmp_path / "top.yaml", "base: root.yaml\nepochs: 3")
    with pytest.raises(ValueError, match=re.escape(f"{base}: epochs = many: expected a whole number")):
        load_config(top)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resnet_conv_first": True}, "resnet_conv_first = true needs --resnet_block inverted"),
        ({"resnet_reorg_norm": True}, "resnet_reorg_norm = true needs --resnet_block inverted"),
        ({"resnet_reorg_norm": True, "resnet_block": "inverted"}, "needs --resnet_conv_first true"),
        ({"resnet_pre_norm": True}, "needs --resnet_reorg_norm true"),
        ({"resnet_stem_norm": True}, "needs --resnet_stem patch_embed"),
        ({"resnet_ds_norm": "pre"}, "resnet_ds_norm = pre needs --resnet_sep_downsample true"),
        ({"model": "resnet50", "resnet_layers": "3-3-9-3"}, "resnet_layers = 3-3-9-3 has no effect with model"),
        ({"batch_size": 1}, "batch_size = 1: Mixup and CutMix need at least 2 images"),
        ({"batch_size": 7, "mixup_mode": "pair"}, "batch_size = 7: mixup_mode = pair needs an even number"),
    ],
)
def test_contradicting_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Config.from_flat(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 1, "mixup": 0, "cutmix": 0},
        {"batch_size": 1, "mixup_prob": 0},
        {"batch_size": 7, "mixup_mode": "elem"},
        {"epochs": 5, "warmup_steps": 100},  # the 20 warm-up epochs of the default do not count then
        {"epochs": 20},
        {"model": "convnext_tiny", "drop_path": 0.1},
    ],
)
def test_these_combinations_are_accepted(settings: dict[str, Any]) -> None:
    Config.from_flat(settings)


def test_a_cycle_of_bases_is_refused(tmp_path: Path) -> None:
    write_yaml(tmp_path / "a.yaml", "base: b.yaml")
    write_yaml(tmp_path / "b.yaml", "base: ./a.yaml")
    with pytest.raises(ValueError, match=r"cycle of bases: .*a\.yaml -> .*b\.yaml -> "):
        read_yaml(tmp_path / "a.yaml")


def test_a_missing_base_is_named_with_the_file_that_names_it(tmp_path: Path) -> None:
    top = write_yaml(tmp_path / "top.yaml", "base: gone.yaml")
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml does not exist \(the base of .*top\.yaml\)"):
        read_yaml(top)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml does not exist"):
        read_yaml(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"lr: [1,", "not readable YAML"),
        (b"lr: 1\n\tseed: 2", "not readable YAML"),
        (b"\xff\xfe\x00", "not readable YAML"),
        (b"- lr\n- seed\n", "expected lines of the form 'name: value'"),
        (b"just words", "expected lines of the form 'name: value'"),
        (b"lr: 1\nseed: 2\nlr: 3", "'lr' occurs twice"),
        (b"lr: {peak: 1}", "expected a number"),
        (b"3: 1", "unknown setting '3'"),
    ],
)
def test_an_unreadable_yaml_file_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_bytes(content)
    top = write_yaml(tmp_path / "top.yaml", "base: bad.yaml")
    for file in (bad, top):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            read_yaml(file)
        assert str(bad) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_unreadable_base_is_refused(tmp_path: Path) -> None:
    write_yaml(tmp_path / "base.txt", "some other text")
    with pytest.raises(ValueError, match=r"base\.txt: expected lines"):
        read_yaml(write_yaml(tmp_path / "top.yaml", "base: base.txt"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_yaml(write_yaml(tmp_path / "folder.yaml", "base: ."))


# --- two configs -------------------------------------------------------------------------------------------------


def test_differences_lists_what_changes_the_computation_only() -> None:
    ours = Config.from_flat({"lr": 1e-3, "num_workers": 3, "output_dir": "/a", "opt_betas": "0.9,0.95"})
    assert differences(ours, ours) == []
    assert differences(ours, Config()) == ["opt_betas: 0.9,0.95 != none", "lr: 0.001 != 0.004"]
    assert differences(Config(), Config.from_flat({"batches_ahead": 9, "device": "cpu", "save_ckpt_freq": 3})) == []


def test_a_config_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().data.batch_size = 3  # type: ignore[misc]


# --- the command line --------------------------------------------------------------------------------------------


def test_help_shows_every_setting_with_its_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # a line each
    with pytest.raises(SystemExit) as ended:
        cli.run_command("train", ["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name, declared in SETTINGS.items():
        entry = re.search(rf"^ +--{name} VALUE(?: \[VALUE \.\.\.\])?\s+(.*)$", shown, re.MULTILINE)
        assert entry, name
        assert entry[1].startswith(declared.help)
        assert entry[1].endswith(f"; default {format_value(declared.default)})")


@pytest.mark.parametrize(
    "argv",
    [
        ["--lrr", "1"],
        ["--lr", "fast"],
        ["--lr"],
        ["--eval"],
        ["--epochs", "5"],
        ["--config", "/nowhere.yaml"],
        ["--config"],
        ["stray"],
    ],
)
def test_wrong_usage_is_one_line_and_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_command("train", argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Failure("the disk is full"), 1),
        (ValueError("lr = x"), 2),
        (FileNotFoundError("no such folder"), 2),
        (FileExistsError("it is there"), 2),
        (PermissionError("not yours"), 2),
        (Interrupted("saved"), 75),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_of_the_package_have_exit_statuses(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(_: Any) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", command)
    monkeypatch.setattr(errors, "PACKAGE", Path(__file__).resolve().parent)  # this file counts as ours
    assert cli.run_command("train", []) == status
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert str(error) in line


def test_a_full_disk_is_one_line_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(_argv: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/log.jsonl")

    monkeypatch.setitem(cli.COMMANDS, "fill", command)
    assert cli.run_command("fill", []) == 1
    assert capsys.readouterr().err == "error: runs/x/log.jsonl cannot be written: No space left on device; make room\n"


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "train", lambda _: len(Path("x").with_name("")))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name"):  # raised inside pathlib
        cli.run_command("train", [])
    monkeypatch.setitem(cli.COMMANDS, "train", lambda _: len(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        cli.run_command("train", [])


def test_the_program_lists_its_commands_and_refuses_unknown_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"
    assert cli.main(["fly"]) == 2
    shown_error = capsys.readouterr().err
    assert shown_error.startswith("error: unknown command 'fly'")
    assert "train" in shown_error
    assert cli.main(["train", "--lr", "0"]) == 2
