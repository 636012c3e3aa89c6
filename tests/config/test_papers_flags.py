"""Command lines of the paper's code: what each becomes here, and the table of its flags in docs/training.md."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import REPOSITORY

from ffcv_convnext.cli import run_command
from ffcv_convnext.cli.parsing import Parser
from ffcv_convnext.cluster import ClusterConfig, add_cluster_flags, cluster_from_args
from ffcv_convnext.cluster.settings import CLUSTER_SETTINGS
from ffcv_convnext.config import IMAGENET_MEAN, SETTINGS, Config, add_flags, config_from_args, format_value
from ffcv_convnext.config.papers_flags import LAYER_SCALE_OF_TIMM, PAPERS_FLAGS, PapersFlag, translate_papers_flags

DATA = "--data_path /path/to/imagenet-1k"
NODES = f"{DATA} --job_dir /path/to/save_results"
MACHINE = f"{DATA} --output_dir /path/to/save_results"
EMA = "--model_ema true --model_ema_eval true"

# Of TRAINING.md of the paper's code: name -> (flags, nodes, update_freq on the nodes, update_freq on one machine).
TRAINING = {
    "T": (f"--model convnext_tiny --drop_path 0.1 --batch_size 128 --lr 4e-3 {EMA}", 4, 1, 4),
    "S": (f"--model convnext_small --drop_path 0.4 --batch_size 128 --lr 4e-3 {EMA}", 4, 1, 4),
    "B": (f"--model convnext_base --drop_path 0.5 --batch_size 128 --lr 4e-3 {EMA}", 4, 1, 4),
    "L": (f"--model convnext_large --drop_path 0.5 --batch_size 64 --lr 4e-3 {EMA}", 8, 1, 8),
}
SIZES = {"T": "tiny", "S": "small", "B": "base", "L": "large"}
ISOTROPIC = (
    "--model convnext_isotropic_small --drop_path 0.1 --batch_size 128 --lr 4e-3 --update_freq 4 "
    f"--layer_scale_init_value 0 --warmup_epochs 50 {EMA} {MACHINE}"
)
PRETRAINING = (
    "--model convnext_base --drop_path 0.1 --batch_size 32 --lr 4e-3 --update_freq 16 --warmup_epochs 5 --epochs 90 "
    f"--data_set image_folder --nb_classes 21841 --disable_eval true {MACHINE}"
)
FINETUNING = (
    "--model convnext_base --drop_path 0.8 --input_size 384 --batch_size 32 --lr 5e-5 --update_freq 2 "
    "--warmup_epochs 0 --epochs 30 --weight_decay 1e-8 --cutmix 0 --mixup 0 "
    f"--finetune /path/to/checkpoint.pth {MACHINE}"
)
EVALUATION = f"--model convnext_base --eval true --input_size 224 --drop_path 0.2 {DATA}"


def parse(words: str) -> tuple[Config, ClusterConfig]:
    """What `train.py` understands."""
    parser = Parser(allow_abbrev=False)
    add_flags(parser)
    add_cluster_flags(parser)
    config, options = config_from_args(parser, words.split())
    return config, cluster_from_args(options, {})


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_command_of_the_paper_is_the_same_run(name: str) -> None:
    flags, nodes, on_nodes, on_machine = TRAINING[name]
    config, cluster = parse(f"--nodes {nodes} --ngpus 8 {flags} --update_freq {on_nodes} {NODES}")
    assert (cluster.nodes, cluster.ngpus, cluster.job_dir) == (nodes, 8, Path("/path/to/save_results"))
    alone, here = parse(f"{flags} --update_freq {on_machine} {MACHINE}")
    assert here.job_dir is None
    for each, processes in ((config, 8 * nodes), (alone, 8)):
        assert each.data.batch_size * each.data.update_freq * processes == each.schedule.recipe_batch == 4096
        assert (each.schedule.lr, each.schedule.epochs, each.schedule.warmup_epochs) == (4e-3, 300, 20)
        assert each.model.model == f"convnext_{SIZES[name]}"
        assert each.model.drop_path == float(flags.split()[3])
        assert each.run.model_ema
        assert each.run.model_ema_eval
        assert each.data.mean == IMAGENET_MEAN


def test_the_evaluation_command_of_the_paper_with_a_file() -> None:
    config, _ = parse(f"{EVALUATION} --resume convnext_base_22k_1k_224.pth")
    assert config.run.eval
    assert config.run.resume == Path("convnext_base_22k_1k_224.pth")
    assert (config.data.test_size, config.data.eval_side, config.data.eval_resize) == (224, 256, "crop")


def test_the_finetuning_command_of_the_paper() -> None:
    config, _ = parse(f"{FINETUNING} --layer_decay 0.7 --head_init_scale 0.001")
    assert (config.optim.layer_decay, config.model.head_init_scale) == (0.7, 0.001)
    assert config.run.finetune == Path("/path/to/checkpoint.pth")
    assert (config.data.input_size, config.schedule.lr, config.schedule.epochs) == (384, 5e-5, 30)
    assert (config.optim.weight_decay, config.augment.mixes) == (1e-8, False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            f"{EVALUATION} --resume https://host/convnext_base.pth",
            "resume = https:/host/convnext_base.pth: expected a file on this machine; download it first",
        ),
        (
            f"{FINETUNING} --finetune https://host/convnext_base.pth",
            "finetune = https:/host/convnext_base.pth: expected a file on this machine; download it first",
        ),
        (ISOTROPIC, "model = convnext_isotropic_small: neither this project nor timm has"),
        (
            f"--eval_data_path /val {MACHINE}",
            "eval_data_path = /val needs --eval true",
        ),
        (
            PRETRAINING,
            "--disable_eval true (a flag of the paper's code) is not supported: a run evaluates on val.beton",
        ),
        (EVALUATION, "val.beton does not exist; create it with write_ffcv_dataset.py"),
        (f"{EVALUATION} --pin_mem", "--pin_mem: expected a value"),
        (f"--input_size 224 {MACHINE}", "create it with: python write_ffcv_dataset.py"),
    ],
)
def test_a_command_that_cannot_run_is_one_line_with_the_next_action(
    words: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command("train", [*words.split(), "--device", "cpu"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


# value -> what the flags become here; None: refused.
VALUES: list[tuple[str, str | None]] = [
    ("--layer_scale_init_value 1e-6", "--resnet_ls_init_values 1e-6"),
    ("--layer_scale_init_value 0 --model convnext_tiny", None),
    ("--layer_scale_init_value 1e-6 --model convnext_tiny", "--model convnext_tiny"),
    ("--model=convnext_tiny --layer_scale_init_value=0.000001", "--model=convnext_tiny"),
    *(("--model_ema_force_cpu no", ""), ("--model_ema_force_cpu true", None)),
    *(("--resplit true", ""), ("--resplit maybe", None)),
    ("--imagenet_default_mean_and_std 1", "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"),
    ("--imagenet_default_mean_and_std f", "--mean 0.5,0.5,0.5 --std 0.5,0.5,0.5"),
    ("--imagenet_default_mean_and_std imagenet", None),
    *(("--data_set IMNET", ""), ("--data_set image_folder", ""), ("--data_set CIFAR", None)),
    *(("--log_dir none", ""), ("--log_dir=", ""), ("--log_dir logs", None)),
    *(("--save_ckpt true", ""), ("--save_ckpt false", None), ("--save_ckpt_num 3", None)),
    *(("--start_epoch 0", ""), ("--start_epoch 5", None)),
    *(("--disable_eval false", ""), ("--disable_eval true", None)),
    *(("--pin_mem true", ""), ("--pin_mem false", None)),
    *(("--world_size 1", ""), ("--world_size 8", None)),
    *(("--dist_on_itp false", ""), ("--dist_on_itp true", None)),
    *(("--dist_url env://", ""), ("--dist_url tcp://host:1234", None)),
    *(("--use_amp true", "--amp fp16"), ("--use_amp false", "--amp off"), ("--use_amp bf16", None)),
    *(("--enable_wandb true", "--log_wandb true"), ("--enable_wandb False", "--log_wandb false")),
    ("--enable_wandb offline", None),
    *(("--wandb_ckpt false", ""), ("--wandb_ckpt true", None)),
    ("--use_volta32 --nodes 4", "--constraint volta32gb --nodes 4"),
]


@pytest.mark.parametrize(("words", "ours"), VALUES)
def test_a_flag_of_the_paper_is_accepted_with_a_line_or_refused_with_its_replacement(
    words: str, ours: str | None
) -> None:
    if ours is None:
        with pytest.raises(ValueError, match=r"^--\w+ \S+ \(a flag of the paper's code\) is not supported: .*"):
            translate_papers_flags(words.split())
        return
    rest, (note,) = translate_papers_flags(words.split())
    assert rest == ours.split()
    assert note.startswith("--")
    assert "(a flag of the paper's code) is " in note


def test_every_flag_that_is_no_setting_has_a_case_above() -> None:
    tried = {word[2:].split("=")[0] for words, _ in VALUES for word in words.split() if word.startswith("--")}
    assert {name for name, flag in PAPERS_FLAGS.items() if flag.kind != "equal"} <= tried


def test_a_flag_that_is_a_setting_needs_no_translation() -> None:
    translated = {name for name, flag in PAPERS_FLAGS.items() if flag.kind != "equal"}
    assert not translated & {*SETTINGS, *CLUSTER_SETTINGS}, "write them with _equal() in PAPERS_FLAGS"


def test_the_lines_are_on_stderr_of_one_process(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    config, _ = parse(f"--pin_mem true --use_amp true {MACHINE}")
    assert config.run.amp == "fp16"
    assert capfd.readouterr().err.splitlines() == [
        "--pin_mem true (a flag of the paper's code) is not needed: batches are copied to a GPU from pinned memory",
        "--use_amp true (a flag of the paper's code) is --amp fp16 here",
    ]
    monkeypatch.setenv("RANK", "1")
    parse(f"--pin_mem true {MACHINE}")
    assert capfd.readouterr().err == ""


def test_a_flag_of_the_paper_in_a_file_is_refused_with_its_explanation(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("use_amp: true\n")
    with pytest.raises(ValueError, match=r"unknown setting 'use_amp'; docs/training\.md says what this flag"):
        parse(f"--config {tmp_path / 'run.yaml'}")


# --- the table in docs/training.md ------------------------------------------------------------------------------


def describe(name: str, flag: PapersFlag) -> str:
    """A row of the table."""
    declared = SETTINGS.get(name) or CLUSTER_SETTINGS.get(name)
    default = flag.default if flag.default in ("''", "a folder of images") else f"`{flag.default}`"
    if flag.kind == "equal":
        assert declared or name == "local_rank", f"--{name} is no setting"
        ours = "none" if declared is None else format_value(declared.default)
        same = declared is None or declared.parse(flag.default.strip("'")) == declared.default
        text = "" if same or flag.default.startswith("a ") else f"default `{ours}`"
    else:
        parts = [f"{spell(value)}: `{words}`" for value, words in flag.becomes.items()]
        parts = [part.replace(" *`", " VALUE`") for part in parts]
        if flag.same:
            parts.append(f"{', '.join(map(spell, flag.same))}: {flag.why}")
        if flag.instead:
            parts.append(f"other values: {flag.instead}" if parts else f"{flag.why}; {flag.instead}")
        text = "; ".join(parts)
    return f"| `--{name}` | {default} | {flag.kind} | {text} |".replace("|module", r"\|module")


def spell(value: str) -> str:
    return {"": "no value", "*": "any value"}.get(value, f"`{value}`")


def test_the_table_of_the_docs_lists_every_flag_of_the_paper_s_code() -> None:
    text = (REPOSITORY / "docs" / "training.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `--") and line.count(" | ") >= 3]
    assert rows == [describe(name, flag) for name, flag in PAPERS_FLAGS.items()]
    assert LAYER_SCALE_OF_TIMM.why in text
