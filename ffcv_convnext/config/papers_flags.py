"""The flags of the paper's code (facebookresearch/ConvNeXt, main.py and run_with_submitit.py), and what they are here.

Most are settings of the same name. The table in docs/training.md lists all; a test compares it with PAPERS_FLAGS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

BOOLEANS = {  # str2bool of the paper's code
    **dict.fromkeys(("yes", "true", "t", "y", "1"), "true"),
    **dict.fromkeys(("no", "false", "f", "n", "0"), "false"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PapersFlag:
    """A flag of the paper's code. Without `same`, `becomes` and `instead` it is a setting here, of the same meaning."""

    default: str  # in the paper's code; '' is written as ''
    same: tuple[str, ...] = ()  # values that state what is done here anyway
    becomes: Mapping[str, str] = field(default_factory=dict)  # value -> flags with the same meaning; '*': any other
    why: str = ""  # what is done here
    instead: str = ""  # what to do about any other value
    switch: bool = False  # takes no value

    @property
    def kind(self) -> str:
        """Return equal, renamed, absorbed or refused: the best that can happen to the flag."""
        if self.becomes:
            return "renamed"
        if self.same:
            return "absorbed"
        return "refused" if self.instead else "equal"

    def translate(self, name: str, value: str) -> tuple[list[str], str]:
        """Return the words that replace `--name value` on a command line, and a line for the user.

        Raises ValueError, with the replacement, for a value that has no counterpart here.
        """
        given = f"--{name}" if self.switch else f"--{name} {value or repr(value)}"
        known = {*self.same, *self.becomes}
        if known & {"true", "false"}:
            value = BOOLEANS.get(value.lower(), value)
        elif any(map(_is_number, known)) and _is_number(value):
            value = next((word for word in self.same if _is_number(word) and float(word) == float(value)), value)
        if value in self.same:
            return [], f"{given} (a flag of the paper's code) is not needed: {self.why}"
        template = self.becomes.get(value, self.becomes.get("*"))
        if template is None:
            reason = "; ".join(filter(None, (self.why, self.instead)))
            raise ValueError(f"{given} (a flag of the paper's code) is not supported: {reason}")
        words = template.replace("*", value).strip()
        return words.split(), f"{given} (a flag of the paper's code) is {words} here"


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _equal(**defaults: str) -> dict[str, PapersFlag]:
    return {name: PapersFlag(default=default) for name, default in defaults.items()}


LAYER_SCALE_OF_TIMM = PapersFlag(  # layer_scale_init_value with --model convnext_...
    default="1e-6",
    same=("1e-6",),
    why="timm's ConvNeXts have layer scale 1e-6",
    instead="for another one use --config rn_configs/convnext_tiny.yaml --resnet_ls_init_values VALUE, without --model",
)

PAPERS_FLAGS: dict[str, PapersFlag] = {  # in the order of the paper's code
    **_equal(batch_size="64", epochs="300", update_freq="1"),
    **_equal(model="convnext_tiny", drop_path="0", input_size="224"),
    "layer_scale_init_value": PapersFlag(
        default="1e-6",
        becomes={"*": "--resnet_ls_init_values *"},
    ),
    **_equal(model_ema="false", model_ema_decay="0.9999"),
    "model_ema_force_cpu": PapersFlag(
        default="false",
        same=("false",),
        why="the averaged weights stay on the run's device",
        instead="remove it, or use --model_ema false",
    ),
    **_equal(model_ema_eval="false"),
    **_equal(opt="adamw", opt_eps="1e-8", opt_betas="none", clip_grad="none", momentum="0.9"),
    **_equal(weight_decay="0.05", weight_decay_end="none", lr="4e-3", layer_decay="1.0"),
    **_equal(min_lr="1e-6", warmup_epochs="20", warmup_steps="-1"),
    **_equal(color_jitter="0.4", aa="rand-m9-mstd0.5-inc1", smoothing="0.1", train_interpolation="bicubic"),
    **_equal(crop_pct="none", reprob="0.25", remode="pixel", recount="1"),
    "resplit": PapersFlag(
        default="false",
        same=("false", "true"),
        why="every image can be erased; the paper's code does not use it either",
        instead="remove it",
    ),
    **_equal(mixup="0.8", cutmix="1.0", cutmix_minmax="none"),
    **_equal(mixup_prob="1.0", mixup_switch_prob="0.5", mixup_mode="batch", finetune="''", head_init_scale="1.0"),
    **_equal(model_key="model|module", model_prefix="''", data_path="a folder of images", eval_data_path="none"),
    **_equal(nb_classes="1000"),
    "imagenet_default_mean_and_std": PapersFlag(
        default="true",
        becomes={
            "true": "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225",
            "false": "--mean 0.5,0.5,0.5 --std 0.5,0.5,0.5",
        },
        instead="expected true or false; or use --mean R,G,B --std R,G,B",
    ),
    "data_set": PapersFlag(
        default="IMNET",
        same=("IMNET", "image_folder"),
        why="images and classes are those of the files in data_path",
        instead="save the images as DIR/train/CLASS/FILE and DIR/val/CLASS/FILE and convert them with "
        "write_ffcv_dataset.py",
    ),
    **_equal(output_dir="''"),
    "log_dir": PapersFlag(
        default="none",
        same=("none", ""),
        why="TensorBoard's files are in the run folder",
        instead="use --output_dir DIR",
    ),
    **_equal(device="cuda", seed="0", resume="''", auto_resume="true"),
    "save_ckpt": PapersFlag(
        default="true",
        same=("true",),
        why="a run always saves its state",
        instead="for fewer checkpoints use --save_ckpt_freq EPOCHS",
    ),
    **_equal(save_ckpt_freq="1"),
    "save_ckpt_num": PapersFlag(
        default="3",
        why="a run keeps its last two checkpoints, and the best raw and averaged weights",
        instead="remove it",
    ),
    "start_epoch": PapersFlag(
        default="0",
        same=("0",),
        why="a run starts at epoch 0, or where its checkpoint ends",
        instead="use --resume CHECKPOINT",
    ),
    **_equal(eval="false", dist_eval="true"),
    "disable_eval": PapersFlag(
        default="false",
        same=("false",),
        why="a run evaluates on val.beton after each epoch",
        instead="to spend less time on it write a small one with write_ffcv_dataset.py --split val --subset N",
    ),
    **_equal(num_workers="10"),
    "pin_mem": PapersFlag(
        default="true",
        same=("true",),
        why="batches are copied to a GPU from pinned memory",
        instead="remove it",
    ),
    "world_size": PapersFlag(
        default="1",
        same=("1",),
        why="the number of processes comes from torchrun --nproc_per_node N, or from --job_dir DIR --nodes N --ngpus N",
        instead="remove it",
    ),
    "local_rank": PapersFlag(default="-1"),
    "dist_on_itp": PapersFlag(
        default="false",
        same=("false",),
        why="processes find each other through torchrun or Slurm",
        instead="use torchrun, or --job_dir DIR",
    ),
    "dist_url": PapersFlag(
        default="env://",
        same=("env://",),
        why="processes find each other through torchrun or Slurm",
        instead="use torchrun --rdzv_endpoint HOST:PORT, or --job_dir DIR",
    ),
    "use_amp": PapersFlag(
        default="false",
        becomes={"true": "--amp fp16", "false": "--amp off"},
        instead="expected true or false; or use --amp bf16",
    ),
    "enable_wandb": PapersFlag(
        default="false",
        becomes={"true": "--log_wandb true", "false": "--log_wandb false"},
        instead="expected true or false; or use --log_wandb true",
    ),
    **_equal(project="convnext"),
    "wandb_ckpt": PapersFlag(
        default="false",
        same=("false",),
        why="checkpoints stay in the run folder",
        instead="remove it",
    ),
    **_equal(ngpus="8", nodes="2", timeout="72", job_name="convnext", job_dir="''", partition="learnlab"),
    "use_volta32": PapersFlag(default="true", switch=True, becomes={"": "--constraint volta32gb"}),
    **_equal(comment="''"),
}


def translate_papers_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a command line without flags that only the paper's code has, and one line about each of them.

    Raises ValueError, with the replacement, for a flag or a value that has no counterpart here.
    """
    rest: list[str] = []
    notes: list[str] = []
    model = _value_of("model", argv)
    if model.startswith("convnext_isotropic"):
        raise ValueError(
            f"model = {model}: neither this project nor timm has the paper's isotropic ConvNeXts; use --model "
            "convnext_tiny, _small, _base, _large or _xlarge"
        )
    words = iter(argv)
    for word in words:
        name, given, value = word.removeprefix("--").partition("=")
        flag = PAPERS_FLAGS.get(name) if word.startswith("--") else None
        if flag is None or flag.kind == "equal":
            rest.append(word)
            continue
        if not flag.switch and not given:
            found = next(words, None)
            if found is None or found.startswith("--"):
                raise ValueError(f"--{name}: expected a value")
            value = found
        if name == "layer_scale_init_value" and model.startswith("convnext"):
            flag = LAYER_SCALE_OF_TIMM
        translation, note = flag.translate(name, value)
        rest += translation
        notes.append(note)
    return rest, notes


def _value_of(name: str, argv: Sequence[str]) -> str:
    """Return the last value of a flag on a command line, or '' if it is not there."""
    found = ""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word == f"--{name}":
            found = following
        elif word.startswith(f"--{name}="):
            found = word.partition("=")[2]
    return found
