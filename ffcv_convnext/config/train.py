"""Every setting of a run: one flat name each, on the command line, in the YAML and here.

Defaults < YAML (its `base:` first) < command line. A name nobody declared is an error that lists the nearest
ones: a silently ignored setting costs a run. Nothing else steers a run, so `config.yaml` in a run folder
repeats it.

The names are those of the paper's code (Liu et al. 2022, "A ConvNet for the 2020s", arXiv:2201.03545).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from ffcv_convnext.config.fields import Setting, format_value, nearest, setting, to_plain
from ffcv_convnext.policy_grammar import parse_policy


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which images, and how many at a time."""

    data_path: Path | None = setting(
        None, "folder with train.beton, val.beton and their manifests, made by write_ffcv_dataset.py", free=True
    )
    batch_size: int = setting(128, "images in a micro-batch: what one device holds at a time")
    update_freq: int = setting(
        1,
        "micro-batches a device accumulates for an optimiser step; global batch = batch_size x update_freq x devices",
        free=True,  # the global batch must stay, which the run checks itself
    )
    global_batch: int | None = setting(
        None,
        "images of an optimiser step; update_freq then follows from it, for any number of devices; "
        "none: batch_size x update_freq x devices",
        free=True,
    )
    input_size: int = setting(224, "side of the square crop the network sees, pixels")
    crop_pct: float | None = setting(
        None, "evaluation resizes the short side to input_size / crop_pct; none: 224/256 below 384 pixels, else 1"
    )
    train_interpolation: Literal["bicubic", "bilinear", "random"] = setting(
        "bicubic", "antialiased resize of training crops; random: one of the two for each sample"
    )
    scale: tuple[float, float] = setting((0.08, 1.0), "area of a random resized crop, as a share of the image")
    ratio: tuple[float, float] = setting((3 / 4, 4 / 3), "aspect ratio of a random resized crop, width / height")
    hflip: float = setting(0.5, "probability of a horizontal flip in training")
    bad_samples: Literal["error", "skip"] = setting(
        "error",
        "a training sample that cannot be decoded stops the run, or the next good one of its batch takes its place",
    )
    order: Literal["random", "quasi_random"] = setting(
        "random",
        "order of the training samples: any after any, or, for files larger than memory, shuffled inside windows of "
        "pages that are drawn anew each epoch; the file must have been written shuffled",
    )
    repeated_aug: int = setting(
        1,
        "copies of a sample in a global batch, each cropped and augmented anew, among as many samples fewer; true: 3, "
        "DeiT's; 1, 0 or none: off",
        aliases={"true": "3", "false": "1", "off": "1", "none": "1", "0": "1"},
    )
    shuffle_window_mb: int = setting(
        2048,
        "window of order quasi_random, MB of the file: twice as much memory a node keeps what an epoch reads ahead",
    )
    data_cache: Literal["os", "process", "ram"] = setting(
        "os",
        "the file mapped, its pages kept by the operating system as far as memory goes; read into buffers of each "
        "process; or brought into memory whole before the first step, and kept there",
        free=True,
    )
    num_workers: int = setting(10, "threads that decode images, per process", free=True)
    batches_ahead: int = setting(3, "micro-batches decoded in advance", free=True)

    def __post_init__(self) -> None:
        for name in ("batch_size", "update_freq", "repeated_aug", "shuffle_window_mb", "num_workers", "batches_ahead"):
            _require(getattr(self, name) >= 1, f"{name} = {getattr(self, name)}: expected at least 1")
        _require(
            self.global_batch is None or (self.global_batch >= 1 and self.global_batch % self.batch_size == 0),
            f"global_batch = {self.global_batch}: expected a multiple of batch_size = {self.batch_size}",
        )
        _require(self.input_size >= 32, f"input_size = {self.input_size}: expected at least 32 pixels")
        _require(
            self.crop_pct is None or 0 < self.crop_pct <= 1, f"crop_pct = {self.crop_pct}: expected a number in (0, 1]"
        )
        _require(0 < self.scale[0] <= self.scale[1] <= 1, f"scale = {self.scale}: expected 0 < low <= high <= 1")
        _require(0 < self.ratio[0] <= self.ratio[1], f"ratio = {self.ratio}: expected 0 < low <= high")
        _require(0 <= self.hflip <= 1, f"hflip = {self.hflip}: expected a probability")

    @property
    def eval_resize(self) -> int:
        """Short side of an evaluation image before its central input_size crop, pixels."""
        crop_pct = self.crop_pct
        if crop_pct is None:
            crop_pct = 224 / 256 if self.input_size < 384 else 1.0
        return int(self.input_size / crop_pct)


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """What happens to a batch on the device, and to its targets (paper, Table 5)."""

    aa: str = setting(
        "rand-m9-mstd0.5-inc1",
        "policy in timm's spelling: rand-..., v0, v0r, original, originalr, 3a; torchvision's ta_wide; or none",
        aliases={"false": "none", "off": "none"},
    )
    color_jitter: float | None = setting(
        0.4,
        "strength of brightness, contrast and saturation jitter; as in timm, it applies only when aa is none or has 3a",
    )
    smoothing: float = setting(0.1, "label smoothing")
    mixup: float = setting(0.8, "Mixup's beta parameter; 0 switches it off")
    cutmix: float = setting(1.0, "CutMix's beta parameter; 0 switches it off")
    cutmix_minmax: tuple[float, float] | None = setting(
        None, "side of the pasted box as a share of the image, least and most; switches CutMix on"
    )
    mixup_prob: float = setting(1.0, "probability of mixing at all")
    mixup_switch_prob: float = setting(0.5, "probability of CutMix where both are on")
    mixup_mode: Literal["batch", "pair", "elem"] = setting("batch", "one draw for a batch, a pair or an image")
    reprob: float = setting(0.25, "probability of random erasing")
    remode: Literal["pixel", "rand", "const"] = setting(
        "pixel", "erased area: noise per pixel, one random colour, or the mean colour"
    )
    recount: int = setting(1, "erased boxes in an image, at most: 1 to this many")

    def __post_init__(self) -> None:
        if self.aa != "none":
            parse_policy(self.aa)  # refuses what is none
        for name in ("smoothing", "mixup_prob", "mixup_switch_prob", "reprob"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{name} = {value}: expected a number in [0, 1]")
        for name in ("mixup", "cutmix"):
            _require(getattr(self, name) >= 0, f"{name} = {getattr(self, name)}: expected 0 or more")
        if self.cutmix_minmax is not None:
            low, high = self.cutmix_minmax
            _require(0 < low < high <= 1, f"cutmix_minmax = {self.cutmix_minmax}: expected 0 < least < most <= 1")
        _require(self.recount >= 1, f"recount = {self.recount}: expected at least 1")
        _require(
            self.color_jitter is None or 0 <= self.color_jitter <= 1,
            f"color_jitter = {self.color_jitter}: expected a number in [0, 1] or none",
        )

    @property
    def jitters(self) -> bool:
        """Whether colours are jittered."""
        return bool(self.color_jitter) and (self.aa == "none" or "3a" in self.aa)

    @property
    def mixes(self) -> bool:
        """Whether Mixup or CutMix can happen."""
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None)


KERNEL_SIZES = (3, 5, 7, 9, 11)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The network: `resnet` with the ladder's switches, or a name timm knows."""

    model: str = setting("resnet", "resnet (steered by the resnet_* settings) or any timm model name")
    nb_classes: int | None = setting(None, "number of classes; none: as many as the data's manifest lists")
    drop_path: float = setting(0.0, "stochastic depth: rate of the last block, rising linearly from 0")
    resnet_layers: tuple[int, int, int, int] = setting((3, 4, 6, 3), "blocks in each stage, e.g. 3-3-9-3")
    resnet_stem: Literal["original", "patch_embed"] = setting(
        "original", "7x7 stride-2 convolution and max-pool, or one 4x4 stride-4 convolution"
    )
    resnet_stem_norm: bool = setting(False, "a norm after the patch_embed stem")
    resnet_depthwise: bool = setting(False, "the spatial convolution of a block is depthwise")
    resnet_embed_dim: int = setting(64, "width of the first stage; it doubles from stage to stage")
    resnet_block: Literal["normal", "inverted"] = setting("normal", "bottleneck: narrow (normal) or wide inside")
    resnet_conv_first: bool = setting(False, "the spatial convolution comes first in an inverted block")
    resnet_kernel_size: Literal[3, 5, 7, 9, 11] = setting(3, "side of the blocks' spatial convolution")
    resnet_act_layer: Literal["relu", "gelu"] = setting("relu", "activation in the blocks")
    resnet_del_act: bool = setting(False, "one activation a block is left")
    resnet_reorg_norm: bool = setting(False, "one norm a block is left, after the depthwise convolution")
    resnet_pre_norm: bool = setting(False, "with resnet_reorg_norm: one norm before the convolution as well")
    resnet_norm_layer: Literal["bn", "ln", "fp32ln"] = setting(
        "bn", "BatchNorm, LayerNorm over channels, LayerNorm in float32"
    )
    resnet_final_norm: bool = setting(False, "a norm between pooling and head")
    resnet_sep_downsample: bool = setting(False, "a 2x2 stride-2 convolution between stages; blocks keep stride 1")
    resnet_ds_norm: Literal["none", "pre", "post"] = setting(
        "none", "a norm before or after that convolution", aliases={"true": "post", "false": "none"}
    )
    resnet_ls_init_values: float = setting(0.0, "initial layer scale of the residual branch; 0: no layer scale")
    resnet_init: Literal["default", "trunc"] = setting(
        "default", "convolutions: PyTorch's default, or truncated normal with std 0.02"
    )

    def __post_init__(self) -> None:
        if self.model != "resnet":
            for field in dataclasses.fields(self):
                value = getattr(self, field.name)
                _require(
                    not field.name.startswith("resnet_") or value == field.default,
                    f"{field.name} = {format_value(value)} has no meaning with model = {self.model}; "
                    "drop it, or use --model resnet",
                )
        _require(
            self.nb_classes is None or self.nb_classes >= 1, f"nb_classes = {self.nb_classes}: expected at least 1"
        )
        _require(0 <= self.drop_path < 1, f"drop_path = {self.drop_path}: expected a rate in [0, 1)")
        _require(
            all(n >= 1 for n in self.resnet_layers),
            f"resnet_layers = {format_value(self.resnet_layers)}: expected four positive numbers such as 3-3-9-3",
        )
        _require(self.resnet_embed_dim >= 1, f"resnet_embed_dim = {self.resnet_embed_dim}: expected at least 1")
        _require(
            self.resnet_ls_init_values >= 0, f"resnet_ls_init_values = {self.resnet_ls_init_values}: expected 0 or more"
        )
        needs: list[tuple[str, bool, str]] = [
            ("resnet_conv_first", self.resnet_block == "inverted", "resnet_block inverted"),
            ("resnet_reorg_norm", self.resnet_block == "inverted", "resnet_block inverted"),
            ("resnet_reorg_norm", self.resnet_conv_first, "resnet_conv_first true"),
            ("resnet_pre_norm", self.resnet_reorg_norm, "resnet_reorg_norm true"),
            ("resnet_stem_norm", self.resnet_stem == "patch_embed", "resnet_stem patch_embed"),
        ]
        for name, met, other in needs:
            _require(not getattr(self, name) or met, f"{name} = true has no meaning without --{other}")
        _require(
            self.resnet_ds_norm == "none" or self.resnet_sep_downsample,
            f"resnet_ds_norm = {self.resnet_ds_norm} has no meaning without --resnet_sep_downsample true",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The optimiser, by timm's names."""

    opt: str = setting("adamw", "optimiser, any name of timm.optim")
    opt_eps: float | None = setting(None, "optimiser's epsilon; none: its own default (AdamW: 1e-8)")
    opt_betas: tuple[float, float] | None = setting(
        None, "optimiser's betas; none: its own default (AdamW: 0.9, 0.999)"
    )
    momentum: float | None = setting(None, "momentum, for optimisers that have one; none: 0.9")
    weight_decay: float = setting(0.05, "weight decay; not on biases, norms and other parameters of one dimension")
    weight_decay_end: float | None = setting(None, "weight decay of the last step (cosine between); none: constant")
    clip_grad: float | None = setting(None, "largest norm of the gradient; none: no clipping")

    def __post_init__(self) -> None:
        for name in ("weight_decay", "weight_decay_end", "momentum"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"{name} = {value}: expected 0 or more")
        _require(self.opt_eps is None or self.opt_eps > 0, f"opt_eps = {self.opt_eps}: expected a positive number")
        _require(
            self.clip_grad is None or self.clip_grad > 0, f"clip_grad = {self.clip_grad}: expected a positive number"
        )
        if self.opt_betas is not None:
            _require(
                all(0 <= b < 1 for b in self.opt_betas), f"opt_betas = {self.opt_betas}: expected numbers in [0, 1)"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate over optimiser steps: linear warm-up, then a cosine."""

    epochs: int = setting(300, "passes over the training set")
    lr: float = setting(4e-3, "peak learning rate, at the recipe's global batch; it is not rescaled")
    min_lr: float = setting(1e-6, "learning rate at the end of the cosine")
    warmup_epochs: int = setting(20, "epochs of linear warm-up from 0, counted in optimiser steps")
    warmup_steps: int = setting(-1, "warm-up in optimiser steps; above 0 it replaces warmup_epochs")
    recipe_batch: int = setting(4096, "global batch that lr is meant for; another one is warned about")

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, f"epochs = {self.epochs}: expected at least 1")
        _require(self.lr > 0, f"lr = {self.lr}: expected a positive number")
        _require(0 <= self.min_lr <= self.lr, f"min_lr = {self.min_lr}: expected a number from 0 to lr = {self.lr}")
        _require(
            0 <= self.warmup_epochs <= self.epochs or self.warmup_steps > 0,
            f"warmup_epochs = {self.warmup_epochs}: expected 0 to epochs = {self.epochs}",
        )
        _require(self.recipe_batch >= 1, f"recipe_batch = {self.recipe_batch}: expected at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The run itself: where it writes, how it computes, when it saves."""

    output_dir: Path | None = setting(None, "run folder; log, checkpoints and the resolved config go there", free=True)
    seed: int = setting(0, "every random decision is a function of it")
    device: Literal["auto", "cuda", "cpu"] = setting("auto", "auto: cuda where there is one", free=True)
    amp: Literal["bf16", "fp16", "off"] = setting(
        "bf16",
        "mixed precision: autocast's type (fp16 waits for the device at every step unless opt is adamw, adam or sgd), "
        "or off for float32",
        aliases={"false": "off"},  # YAML reads off as false
    )
    channels_last: bool = setting(True, "memory format of images and convolutions", free=True)
    compile: Literal["auto", "true", "false"] = setting(
        "auto",
        "torch.compile the network for training; evaluation stays eager; auto: on a CUDA device",
        free=True,
    )
    kernels: Literal["torch", "triton"] = setting(
        "torch", "depthwise convolutions, the norms after them and residual sums: PyTorch's, or ours (CUDA)", free=True
    )
    model_ema: bool = setting(False, "keep an exponential moving average of the weights")
    model_ema_decay: float = setting(0.9999, "its decay, per optimiser step")
    model_ema_eval: bool = setting(True, "evaluate the averaged weights too, beside the raw ones")
    dist_eval: bool = setting(
        True, "share the evaluation among the processes; false: each evaluates everything", free=True
    )
    eval: bool = setting(False, "only evaluate (with --resume CHECKPOINT or the newest one in output_dir)", free=True)
    resume: Path | None = setting(
        None, "continue from this checkpoint where output_dir has none of its own yet", free=True
    )
    auto_resume: bool = setting(True, "continue from the newest complete checkpoint in output_dir", free=True)
    finetune: Path | None = setting(None, "start from the weights in this checkpoint; a head of other size is left out")
    save_ckpt_freq: int = setting(1, "epochs between checkpoints", free=True)
    save_ckpt_steps: int = setting(0, "optimiser steps between checkpoints inside an epoch; 0: none", free=True)
    log_every: int = setting(10, "optimiser steps between log points; the device is waited for only there", free=True)
    log_wandb: bool = setting(False, "log to Weights & Biases too", free=True)
    project: str = setting("ffcv-convnext", "Weights & Biases project", free=True)

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**63, f"seed = {self.seed}: expected 0 to 2^63 - 1")
        _require(
            0 <= self.model_ema_decay < 1, f"model_ema_decay = {self.model_ema_decay}: expected a number in [0, 1)"
        )
        _require(self.save_ckpt_freq >= 1, f"save_ckpt_freq = {self.save_ckpt_freq}: expected at least 1")
        _require(self.save_ckpt_steps >= 0, f"save_ckpt_steps = {self.save_ckpt_steps}: expected 0 or more")
        _require(self.log_every >= 1, f"log_every = {self.log_every}: expected at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All settings of a run, grouped by concern. `flat()` and `from_flat()` are each other's inverse."""

    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        mode, size = self.augment.mixup_mode, self.data.batch_size
        _require(not self.augment.mixes or size >= 2, f"batch_size = {size}: Mixup and CutMix need at least 2 images")
        _require(
            not (self.augment.mixes and mode == "pair") or size % 2 == 0,
            f"batch_size = {size}: mixup_mode pair needs an even number",
        )
        if self.run.kernels == "triton":
            model = self.model.model
            _require(model == "resnet", f"kernels = triton has no meaning with model = {model}; use --kernels torch")
            _require(self.run.channels_last, "kernels = triton needs --channels_last true")
        minmax, side = self.augment.cutmix_minmax, self.data.input_size
        _require(
            minmax is None or int(side * minmax[0]) < int(side * minmax[1]),
            f"cutmix_minmax = {minmax}: expected two different numbers of pixels at input_size = {side}",
        )

    @classmethod
    def from_flat(cls, values: Mapping[str, Any], *, source: str = "setting") -> Config:
        """Build a config from flat names; strings are parsed, what is missing keeps its default.

        Raises ValueError for an unknown name (listing the nearest ones) or an unusable value.
        """
        groups: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
        for name, raw in values.items():
            declared = find_setting(name, source=source)
            groups[declared.group][name] = declared.parse(raw)
        return cls(**{name: GROUPS[name](**group) for name, group in groups.items()})

    def flat(self) -> dict[str, Any]:
        """Every setting by its flat name, as plain YAML values (paths and number lists as strings)."""
        return {
            setting.name: to_plain(getattr(getattr(self, setting.group), setting.name)) for setting in SETTINGS.values()
        }

    def replace(self, **changes: Any) -> Config:
        """This config with some flat names changed; everything is checked anew."""
        return Config.from_flat({**self.flat(), **changes})

    def for_world(self, world: int) -> Config:
        """This config on `world` processes: update_freq follows from global_batch, where that is set.

        Raises ValueError, naming the numbers of processes that are possible, when the arithmetic does not divide.
        """
        data = self.data
        if data.global_batch is None:
            return self
        micro_batches = data.global_batch // data.batch_size
        if micro_batches % world:
            possible = [str(n) for n in range(1, micro_batches + 1) if micro_batches % n == 0]
            raise ValueError(
                f"global_batch = {data.global_batch} is {micro_batches} micro-batches of batch_size {data.batch_size}, "
                f"which {world} processes cannot share equally; {', '.join(possible)} processes can"
            )
        return self.replace(update_freq=micro_batches // world)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.flat(), sort_keys=False)


GROUPS: dict[str, type] = {
    "data": DataConfig,
    "augment": AugmentConfig,
    "model": ModelConfig,
    "optim": OptimConfig,
    "schedule": ScheduleConfig,
    "run": RunConfig,
}


def collect_settings(groups: Mapping[str, type]) -> dict[str, Setting]:
    """The settings that dataclasses declare with `setting()`, by their flat names."""
    settings: dict[str, Setting] = {}
    for group, cls in groups.items():
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if "help" not in field.metadata:
                continue
            assert field.name not in settings, f"two settings are called {field.name}"
            settings[field.name] = Setting(
                name=field.name,
                group=group,
                type=hints[field.name],
                default=field.default,
                **{key: field.metadata[key] for key in ("help", "free", "aliases")},
            )
    return settings


SETTINGS: dict[str, Setting] = collect_settings(GROUPS)


def find_setting(name: str, *, source: str) -> Setting:
    if name in SETTINGS:
        return SETTINGS[name]
    raise ValueError(f"{source}: nobody declared '{name}'{nearest(name, SETTINGS)}")


class _StrictLoader(yaml.SafeLoader):
    """Refuses a name that stands twice in a mapping; YAML would drop the first one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.MarkedYAMLError(problem=f"'{name}' stands there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path) -> dict[str, Any]:
    """What a YAML file of lines `name: value` holds. Raises ValueError for another file."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected lines of the form 'name: value'")
    return content


def read_yaml(path: Path) -> dict[str, Any]:
    """The flat settings a YAML file states, its `base:` (relative to the file) read first and overridden.

    Raises FileNotFoundError, or ValueError for text that is not a mapping, an unknown name or a circle of bases.
    """
    chain: list[Path] = []
    layers: list[dict[str, Any]] = []
    current: Path | None = Path(path)
    while current is not None:
        if not current.is_file():
            named_by = f" (named as base by {chain[-1]})" if chain else ""
            raise FileNotFoundError(f"config {current} does not exist{named_by}")
        if current.resolve() in [p.resolve() for p in chain]:
            raise ValueError(f"{current}: its base leads back to itself: {' -> '.join(map(str, [*chain, current]))}")
        chain.append(current)
        content = read_mapping(current)
        base = content.pop("base", None)
        for name, raw in content.items():
            declared = find_setting(str(name), source=str(current))
            try:
                declared.parse(raw)
            except ValueError as error:
                raise ValueError(f"{current}: {error}") from None
        layers.append({str(name): raw for name, raw in content.items()})
        current = None if base is None else current.parent / str(base)
    merged: dict[str, Any] = {}
    for layer in reversed(layers):
        merged |= layer
    return merged


def load_config(*paths: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Defaults < each YAML in turn (its bases first) < `overrides`."""
    values: dict[str, Any] = {}
    for path in paths:
        values |= read_yaml(path)
    return Config.from_flat({**values, **(overrides or {})}, source="command line")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare `--config` and one flag for every setting, grouped, with default and explanation."""
    parser.usage = "%(prog)s [--config YAML ...] [--SETTING VALUE ...]"
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="YAML",
        help="settings to start from; a later file wins over an earlier one, a flag over both",
    )
    add_setting_flags(parser, GROUPS)


def add_setting_flags(parser: argparse.ArgumentParser, groups: Mapping[str, type]) -> None:
    """Declare one flag for every setting of some dataclasses; one that is not given is not in the namespace."""
    settings = collect_settings(groups)
    for group, cls in groups.items():
        section = parser.add_argument_group(group, (cls.__doc__ or "").splitlines()[0])
        for declared in (s for s in settings.values() if s.group == group):
            section.add_argument(
                f"--{declared.name}",
                nargs="+" if declared.holds_several else None,
                default=argparse.SUPPRESS,
                metavar="VALUE",
                help=f"{declared.help} ({declared.words}; default {format_value(declared.default)})".replace("%", "%%"),
            )


def settings_from_args(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[dict[str, Any], argparse.Namespace]:
    """The settings a command line states, unparsed, and everything it says; the parser has `add_flags`' flags.

    Unknown flags raise ValueError with the nearest.
    """
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0]
        known = [flag[2:] for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        raise ValueError(f"command line: nobody declared '{unknown[0]}'{nearest(name, known)}")
    return {name: getattr(namespace, name) for name in SETTINGS if hasattr(namespace, name)}, namespace


def config_from_args(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    """The config a command line asks for, and everything it says; raises as `settings_from_args` does."""
    overrides, namespace = settings_from_args(parser, argv)
    return load_config(*namespace.config, overrides=overrides), namespace


def differences(ours: Config, theirs: Config) -> list[str]:
    """Settings that change what is computed and differ: 'name: ours != theirs' each."""
    mine, other = ours.flat(), theirs.flat()
    return [
        f"{name}: {format_value(mine[name])} != {format_value(other[name])}"
        for name, declared in SETTINGS.items()
        if not declared.free and mine[name] != other[name]
    ]
