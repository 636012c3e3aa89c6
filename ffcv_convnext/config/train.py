"""Every setting of a training run, under the names of the paper's code (Liu et al. 2022, arXiv:2201.03545).

Defaults < YAML (its `base:` first) < command line. Nothing else changes a run, so the `config.yaml` in its folder
repeats it. An unknown name is an error: a setting that is silently ignored costs a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ffcv_convnext.config.fields import (
    Setting,
    check_ranges,
    collect_settings,
    format_value,
    nearest,
    setting,
    to_plain,
)
from ffcv_convnext.config.papers_flags import PAPERS_FLAGS
from ffcv_convnext.config.timm_defaults import TIMM_IMAGES, timm_images
from ffcv_convnext.policy_grammar import parse_policy

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RES_STEP = 32  # pixels; sizes of progressive resizing are multiples of it
WARPED_FROM = 384  # pixels; datasets.py of the paper's code


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which images, and how many at a time."""

    data_path: Path | None = setting(
        None, "folder with train.beton, val.beton and their manifests, made by write_ffcv_dataset.py", free=True
    )
    stage_to: str | None = setting(
        None,
        "folder on each node, also $VARIABLE, to copy the data to once and train from; auto: SLURM_TMPDIR or TMPDIR on "
        "a local disk, or memory (/dev/shm), or no copy if they have no room; none: train from data_path",
        free=True,
        example="/local/scratch",
    )
    stage_evict: bool = setting(
        False, "with stage_to: if there is no room, remove older copies of this package that nothing uses", free=True
    )
    batch_size: int = setting(128, "images in a micro-batch: what one device processes at a time", minimum=1)
    update_freq: int = setting(
        1,
        "micro-batches a device accumulates for an optimiser step; global batch = batch_size x update_freq x devices",
        free=True,  # the run checks that the global batch stays the same
        minimum=1,
    )
    global_batch: int | None = setting(
        None,
        "images in an optimiser step; update_freq then follows from it, for any number of devices; "
        "none: batch_size x update_freq x devices",
        free=True,
        minimum=1,
    )
    input_size: int = setting(224, "side of the square input image, pixels", minimum=32)
    test_input_size: int | None = setting(
        None, "side of the input image in evaluation, pixels; none: input_size", minimum=32
    )
    min_res: int | None = setting(
        None,
        "progressive resizing: side of the training images up to epoch start_ramp, instead of input_size; a multiple "
        "of 32, as max_res",
        minimum=32,
    )
    max_res: int | None = setting(None, "side of the training images from epoch end_ramp on", minimum=32)
    start_ramp: int | None = setting(None, "epoch, from 0, after which the training images grow", minimum=0)
    end_ramp: int | None = setting(None, "epoch, from 0, at which they have their final size", minimum=0)
    res_batch: bool = setting(
        False,
        "progressive resizing: join micro-batches of small images to larger ones, up to the pixels of one at max_res; "
        "the global batch stays the same",
    )
    mean: tuple[float, float, float] = setting(
        IMAGENET_MEAN, "mean of the pixels, red, green and blue from 0 to 1, for normalisation", minimum=0, maximum=1
    )
    std: tuple[float, float, float] = setting(
        IMAGENET_STD, "standard deviation of the pixels, for normalisation", above=0, maximum=1
    )
    crop_pct: float | None = setting(
        None,
        "evaluation resizes images to test_input_size / crop_pct before the central crop; none: 224/256, or 1 from 384 "
        "pixels on and for warped images",
        above=0,
        maximum=1,
    )
    test_crop_pct: float | None = setting(
        None, "replaces crop_pct, for images of test_input_size or test_sizes; none: crop_pct", above=0, maximum=1
    )
    eval_resize: Literal["auto", "crop", "warp"] = setting(
        "auto",
        "evaluation images are resized by their short side (crop) or to a square (warp), then cropped; auto, as the "
        "paper's code: crop below 384 pixels, from there on warp to input_size without a crop",
    )
    eval_interpolation: Literal["bicubic", "bilinear"] = setting("bicubic", "antialiased resize of evaluation images")
    train_interpolation: Literal["bicubic", "bilinear", "random"] = setting(
        "bicubic", "antialiased resize of training crops; random: one of the two for each sample"
    )
    scale: tuple[float, float] = setting(
        (0.08, 1.0), "area of a random resized crop, as a share of the image: min and max", above=0, maximum=1
    )
    ratio: tuple[float, float] = setting(
        (3 / 4, 4 / 3), "aspect ratio of a random resized crop, width / height: min and max", above=0
    )
    hflip: float = setting(0.5, "probability of a horizontal flip in training", minimum=0, maximum=1)
    bad_samples: Literal["error", "skip"] = setting(
        "error",
        "a training sample that cannot be decoded: stop the run, or use the next good sample of its batch instead",
    )
    order: Literal["random", "quasi_random"] = setting(
        "random",
        "order of the training samples; quasi_random, for files larger than memory: shuffled inside windows of pages, "
        "with new windows each epoch; the file must have been written shuffled",
    )
    repeated_aug: int = setting(
        1,
        "copies of each sample in a global batch, each with its own crop and augmentation; the batch then has that "
        "many times fewer different samples; true: 3, as in DeiT; 1, 0 or none: off",
        aliases={"true": "3", "false": "1", "off": "1", "none": "1", "0": "1"},
        minimum=1,
    )
    shuffle_window_mb: int = setting(
        2048,
        "window of order quasi_random, MB of the file; a node needs twice this memory to read each page once an epoch",
        minimum=1,
    )
    data_cache: Literal["os", "process", "ram"] = setting(
        "os",
        "os: the file is memory-mapped and the page cache keeps what fits; process: read into buffers of each process; "
        "ram: read whole into memory before the first step",
        free=True,
    )
    check_data: Literal["first_read", "never"] = setting(
        "first_read",
        "first_read: compare each page of the file with its checksum when a process first uses it, if that needs no "
        "additional reads; never: check the tables only",
        free=True,
    )
    num_workers: int = setting(10, "threads that decode images, per process", free=True, minimum=1)
    batches_ahead: int = setting(3, "micro-batches decoded in advance", free=True, minimum=1)

    def __post_init__(self) -> None:
        check_ranges(self)
        _require(
            self.global_batch is None or self.global_batch % self.batch_size == 0,
            f"global_batch = {self.global_batch}: expected a multiple of batch_size = {self.batch_size}",
        )
        _require(
            self.stage_to is None or self.stage_to == "auto" or self.stage_to[0] in "/$~",
            f"stage_to = {self.stage_to}: expected a folder that begins with /, ~ or a variable ($TMPDIR), or auto",
        )
        _require(self.stage_to is not None or not self.stage_evict, "stage_evict = true needs --stage_to DIR")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            _require(low <= high, f"{name} = {low},{high}: expected min,max with min <= max")
        self._check_ramp()

    def _check_ramp(self) -> None:
        ramp = {name: getattr(self, name) for name in ("min_res", "max_res", "start_ramp", "end_ramp")}
        missing = [name for name, value in ramp.items() if value is None]
        _require(
            len(missing) in (0, len(ramp)),
            f"progressive resizing needs --{' --'.join(missing)} too, or none of the four",
        )
        for name in ("min_res", "max_res"):
            _require(
                ramp[name] is None or ramp[name] % RES_STEP == 0, f"{name} = {ramp[name]}: expected a multiple of 32"
            )
        for low, high in (("min_res", "max_res"), ("start_ramp", "end_ramp")):
            _require(
                ramp[low] is None or ramp[low] <= ramp[high],
                f"{low} = {ramp[low]}: expected at most {high} = {ramp[high]}",
            )
        _require(
            not self.res_batch or not missing,
            f"res_batch = true needs progressive resizing: --{' --'.join(ramp)}",
        )

    def train_size(self, epoch: int) -> int:
        """Return the side of the training images of an epoch, from 0, in pixels.

        With progressive resizing it grows linearly from min_res to max_res, rounded to multiples of 32, as in
        ffcv-imagenet.
        """
        if self.min_res is None or self.max_res is None or self.start_ramp is None or self.end_ramp is None:
            return self.input_size
        if epoch <= self.start_ramp or epoch >= self.end_ramp:
            return self.min_res if epoch <= self.start_ramp else self.max_res
        share = (epoch - self.start_ramp) / (self.end_ramp - self.start_ramp)
        return round((self.min_res + share * (self.max_res - self.min_res)) / RES_STEP) * RES_STEP

    def num_joined(self, size: int) -> int:
        """Return how many micro-batches of images of `size` pixels a device processes as one; 1 without res_batch.

        The largest divisor of update_freq with which they have at most the pixels of one micro-batch at max_train_size.
        """
        if not self.res_batch:
            return 1
        divisors = (num for num in range(1, self.update_freq + 1) if self.update_freq % num == 0)
        return max(num for num in divisors if num == 1 or num * size**2 <= self.max_train_size**2)

    @property
    def max_train_size(self) -> int:
        """Side of the largest training images of a run, pixels."""
        return self.input_size if self.max_res is None else self.max_res

    @property
    def test_size(self) -> int:
        """Side of the square evaluation image, pixels."""
        return self.input_size if self.test_input_size is None else self.test_input_size

    @property
    def eval_warps(self) -> bool:
        """Whether evaluation images are resized to a square, which changes their aspect ratio."""
        return self.eval_resize == "warp" or (self.eval_resize == "auto" and self.test_size >= WARPED_FROM)

    @property
    def eval_side(self) -> int:
        """Side of a resized evaluation image before its crop, pixels: the short one, or both if it is warped."""
        if self.eval_resize == "auto" and self.eval_warps:
            return self.test_size  # the paper's code does not use crop_pct here
        crop_pct = self.crop_pct if self.test_crop_pct is None else self.test_crop_pct
        if crop_pct is None:
            crop_pct = 224 / 256 if self.test_size < WARPED_FROM and not self.eval_warps else 1.0
        return int(self.test_size / crop_pct)


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Augmentation of a batch and its targets on the device (paper, Table 5)."""

    aa: str = setting(
        "rand-m9-mstd0.5-inc1",
        "policy in timm's notation: rand-..., v0, v0r, original, originalr, 3a; torchvision's ta_wide; or none",
        aliases={"false": "none", "off": "none"},
    )
    color_jitter: float | None = setting(
        0.4,
        "strength of brightness, contrast and saturation jitter; as in timm, used only if aa is none or contains 3a",
        minimum=0,
        maximum=1,
    )
    smoothing: float = setting(0.1, "label smoothing", minimum=0, maximum=1)
    mixup: float = setting(0.8, "Mixup's beta parameter; 0: no Mixup", minimum=0)
    cutmix: float = setting(1.0, "CutMix's beta parameter; 0: no CutMix", minimum=0)
    cutmix_minmax: tuple[float, float] | None = setting(
        None, "side of the pasted box as a share of the image, min and max; enables CutMix", above=0, maximum=1
    )
    mixup_prob: float = setting(1.0, "probability of Mixup or CutMix", minimum=0, maximum=1)
    mixup_switch_prob: float = setting(0.5, "probability of CutMix if both are enabled", minimum=0, maximum=1)
    mixup_mode: Literal["batch", "pair", "elem"] = setting("batch", "one draw for a batch, a pair or an image")
    reprob: float = setting(0.25, "probability of random erasing", minimum=0, maximum=1)
    remode: Literal["pixel", "rand", "const"] = setting(
        "pixel", "erased area: noise per pixel, one random colour, or the mean colour"
    )
    recount: int = setting(1, "maximum number of erased boxes in an image; the number is drawn from 1", minimum=1)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.aa != "none":
            parse_policy(self.aa)  # raises ValueError for an unknown policy

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
    """The network: `resnet` with the settings resnet_*, or the name of a timm model."""

    model: str = setting("resnet", "resnet (configured by resnet_*) or the name of a timm model")
    nb_classes: int | None = setting(None, "number of classes; none: the number in the data's manifest", minimum=1)
    drop_path: float = setting(
        0.0, "stochastic depth: rate of the last block; rates rise linearly from 0", minimum=0, below=1
    )
    head_init_scale: float = setting(
        1.0, "factor of the head's initial weight and bias, unless finetune loads the head", above=0
    )
    grad_checkpointing: bool = setting(
        False,
        "keep each block's input only, and compute the block again in the backward pass: less memory, more time, the "
        "same gradients",
        free=True,
    )
    resnet_layers: tuple[int, int, int, int] = setting((3, 4, 6, 3), "blocks in each stage", minimum=1)
    resnet_stem: Literal["original", "patch_embed"] = setting(
        "original", "7x7 stride-2 convolution and max-pool, or one 4x4 stride-4 convolution"
    )
    resnet_stem_norm: bool = setting(False, "a norm after the patch_embed stem")
    resnet_depthwise: bool = setting(False, "the spatial convolution of a block is depthwise")
    resnet_embed_dim: int = setting(64, "width of the first stage; it doubles from stage to stage", minimum=1)
    resnet_block: Literal["normal", "inverted"] = setting("normal", "bottleneck: narrow (normal) or wide inside")
    resnet_conv_first: bool = setting(False, "the spatial convolution comes first in an inverted block")
    resnet_kernel_size: Literal[3, 5, 7, 9, 11] = setting(3, "side of the blocks' spatial convolution")
    resnet_act_layer: Literal["relu", "gelu"] = setting("relu", "activation in the blocks")
    resnet_del_act: bool = setting(False, "only one activation in a block")
    resnet_reorg_norm: bool = setting(False, "only one norm in a block, after the depthwise convolution")
    resnet_pre_norm: bool = setting(False, "with resnet_reorg_norm: also a norm before the convolution")
    resnet_norm_layer: Literal["bn", "ln", "fp32ln"] = setting(
        "bn", "BatchNorm, LayerNorm over channels, LayerNorm in float32"
    )
    resnet_final_norm: bool = setting(False, "a norm between pooling and head")
    resnet_sep_downsample: bool = setting(False, "a 2x2 stride-2 convolution between stages; blocks keep stride 1")
    resnet_ds_norm: Literal["none", "pre", "post"] = setting(
        "none", "a norm before or after that convolution", aliases={"true": "post", "false": "none"}
    )
    resnet_ls_init_values: float = setting(
        0.0, "initial layer scale of the residual branch; 0: no layer scale", minimum=0
    )
    resnet_init: Literal["default", "trunc"] = setting(
        "default", "convolutions: PyTorch's default, or truncated normal with std 0.02"
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.model != "resnet":
            for field in dataclasses.fields(self):
                value = getattr(self, field.name)
                _require(
                    not field.name.startswith("resnet_") or value == field.default,
                    f"{field.name} = {format_value(value)} has no effect with model = {self.model}; "
                    "remove it, or use --model resnet",
                )
        needs: list[tuple[str, bool, str]] = [
            ("resnet_conv_first", self.resnet_block == "inverted", "resnet_block inverted"),
            ("resnet_reorg_norm", self.resnet_block == "inverted", "resnet_block inverted"),
            ("resnet_reorg_norm", self.resnet_conv_first, "resnet_conv_first true"),
            ("resnet_pre_norm", self.resnet_reorg_norm, "resnet_reorg_norm true"),
            ("resnet_stem_norm", self.resnet_stem == "patch_embed", "resnet_stem patch_embed"),
            ("resnet_ds_norm", self.resnet_sep_downsample, "resnet_sep_downsample true"),
        ]
        for name, met, other in needs:
            value = getattr(self, name)
            _require(met or value in (False, "none"), f"{name} = {format_value(value)} needs --{other}")

    @property
    def architecture(self) -> ModelConfig:
        """These settings without those that do not change what trained weights compute in evaluation."""
        return dataclasses.replace(self, nb_classes=None, drop_path=0.0, head_init_scale=1.0, grad_checkpointing=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The loss, and the optimiser by timm's names."""

    loss: Literal["ce", "bce"] = setting(
        "ce", "cross-entropy, or binary cross-entropy of each class (arXiv:2110.00476), with soft targets"
    )
    bce_target_thresh: float | None = setting(
        None, "loss bce: targets above this become 1, others 0; none: soft targets", minimum=0, below=1
    )
    opt: str = setting("adamw", "optimiser, any name of timm.optim")
    opt_eps: float | None = setting(None, "optimiser's epsilon; none: its own default (AdamW: 1e-8)", above=0)
    opt_betas: tuple[float, float] | None = setting(
        None, "optimiser's betas; none: its own default (AdamW: 0.9,0.999)", minimum=0, below=1
    )
    momentum: float | None = setting(None, "momentum, for optimisers that have one; none: 0.9", minimum=0)
    weight_decay: float = setting(
        0.05, "weight decay; not on biases, norms and other parameters of one dimension", minimum=0
    )
    weight_decay_end: float | None = setting(
        None, "weight decay of the last step (cosine between); none: constant", minimum=0
    )
    layer_decay: float = setting(
        1.0,
        "factor of the learning rate from each group of layers to the one before it, for fine-tuning; groups as in the "
        "paper's code, or timm's own of a timm model; 1: one learning rate",
        above=0,
        maximum=1,
    )
    clip_grad: float | None = setting(None, "maximum norm of the gradient; none: no clipping", above=0)

    def __post_init__(self) -> None:
        check_ranges(self)
        _require(
            self.bce_target_thresh is None or self.loss == "bce",
            f"bce_target_thresh = {self.bce_target_thresh} needs --loss bce",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate over optimiser steps: linear warm-up, then a cosine or a line down."""

    epochs: int = setting(300, "passes over the training set", minimum=1)
    lr: float = setting(4e-3, "peak learning rate, for a global batch of recipe_batch; never rescaled", above=0)
    min_lr: float = setting(1e-6, "learning rate at the end of the decay, and of the cooldown", minimum=0)
    sched: Literal["cosine", "linear", "cyclic"] = setting(
        "cosine",
        "decay after the warm-up: a cosine, or a line to min_lr; cyclic (ffcv-imagenet): a line from lr / 10000 to the "
        "peak at the end of the warm-up, and one to min_lr",
    )
    warmup_epochs: int = setting(20, "epochs of linear warm-up from 0, counted in optimiser steps", minimum=0)
    warmup_steps: int = setting(-1, "warm-up in optimiser steps; if positive, it replaces warmup_epochs")
    cooldown_epochs: int = setting(0, "last epochs, part of `epochs`, with learning rate min_lr", minimum=0)
    recipe_batch: int = setting(4096, "global batch that lr is chosen for; a different one causes a warning", minimum=1)

    def __post_init__(self) -> None:
        check_ranges(self)
        _require(self.min_lr <= self.lr, f"min_lr = {self.min_lr}: expected at most lr = {self.lr}")
        _require(
            self.cooldown_epochs < self.epochs,
            f"cooldown_epochs = {self.cooldown_epochs}: expected fewer than epochs = {self.epochs}",
        )
        left = self.epochs - self.cooldown_epochs
        _require(
            self.warmup_epochs <= left or self.warmup_steps > 0,
            f"warmup_epochs = {self.warmup_epochs}: expected at most epochs = {self.epochs}"
            + (f" without cooldown_epochs = {self.cooldown_epochs}, {left}" if self.cooldown_epochs else ""),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The run: output folder, seed, precision, checkpoints, logging."""

    output_dir: Path | None = setting(None, "run folder, for log, checkpoints and the resolved config", free=True)
    seed: int = setting(0, "seed of every random decision", minimum=0, maximum=2**63 - 1)
    device: Literal["auto", "cuda", "cpu"] = setting("auto", "auto: cuda if available", free=True)
    amp: Literal["bf16", "fp16", "off"] = setting(
        "bf16",
        "mixed precision: data type of autocast, or off for float32 (fp16 synchronises with the device at every step "
        "unless opt is adamw, adam or sgd)",
        aliases={"false": "off"},  # YAML reads off as false
    )
    channels_last: bool = setting(True, "memory format of images and convolutions", free=True)
    compile: Literal["auto", "true", "false"] = setting(
        "auto",
        "torch.compile the network for training (evaluation runs eagerly); auto: on a CUDA device",
        free=True,
    )
    cuda_graphs: Literal["auto", "true", "false"] = setting(
        "auto",
        "record forward and backward once for each image size as a CUDA graph (one CUDA device, update_freq 1, bf16 or "
        "float32); auto: off, as no GPU has measured it yet",
        free=True,
    )
    matmul_precision: Literal["highest", "high", "medium"] = setting(
        "high",
        "products of float32 matrices, as in torch.set_float32_matmul_precision: highest: float32; high: TF32, as the "
        "paper's code with its version of torch; medium: TF32 or bfloat16. Matters with amp off",
        free=True,
    )
    kernels: Literal["auto", "torch", "triton"] = setting(
        "auto",
        "augmentation, blocks of the network and optimiser: PyTorch's operations, or this package's Triton kernels "
        "(CUDA only); auto: on a CUDA device, for each of the three what was measured to be faster on it",
        free=True,
    )
    affinity: Literal["auto", "none"] = setting(
        "auto",
        "bind a process's threads to processor cores near its GPU, which the processes of a node share equally; none: "
        "leave them to the system",
        free=True,
    )
    model_ema: bool = setting(False, "keep an exponential moving average (EMA) of the weights")
    model_ema_decay: float = setting(0.9999, "decay of the EMA per optimiser step", minimum=0, below=1)
    model_ema_eval: bool = setting(True, "evaluate the averaged weights as well as the raw ones")
    model_ema_bn: Literal["average", "recompute"] = setting(
        "average",
        "BatchNorm statistics of the averaged weights: averaged like them, or computed for them from the first 10,000 "
        "training images of each epoch, before evaluation",
    )
    dist_eval: bool = setting(
        True, "split the evaluation among the processes; false: each process evaluates everything", free=True
    )
    eval: bool = setting(False, "only evaluate: --resume CHECKPOINT, or the newest one in output_dir", free=True)
    test_sizes: tuple[int, ...] | None = setting(
        None,
        "with eval: sides of the input image to evaluate one after the other, instead of test_input_size; prints a "
        "table",
        free=True,
        minimum=32,
        example="192,224,256",
    )
    tta: Literal["none", "flip"] = setting(
        "none",
        "with eval: flip also evaluates the mean of the logits of each image and its mirror image, as scores of their "
        "own (suffix _flip)",
        free=True,
    )
    eval_data_path: Path | None = setting(
        None,
        "with eval: folder of another val.beton, whose classes are some or all of those in data_path, by name",
        free=True,
    )
    eval_csv: Path | None = setting(
        None, "with eval: file to write with the accuracy and the most frequent confusions of each class", free=True
    )
    resume: Path | None = setting(None, "checkpoint to continue from while output_dir has none", free=True)
    auto_resume: bool = setting(True, "continue from the newest complete checkpoint in output_dir", free=True)
    finetune: Path | None = setting(
        None, "start from the weights in this checkpoint; a head of a different size is not loaded"
    )
    model_key: str = setting(
        "model|module", "with finetune: entry of the file that holds the weights, or several to try, separated by |"
    )
    model_prefix: str = setting("", "with finetune: load only names that begin with this prefix, without it")
    save_ckpt_freq: int = setting(1, "epochs between checkpoints", free=True, minimum=1)
    save_ckpt_steps: int = setting(
        0, "optimiser steps between checkpoints inside an epoch; 0: none", free=True, minimum=0
    )
    log_every: int = setting(
        10, "optimiser steps between log points, the only places that wait for the device", free=True, minimum=1
    )
    log_wandb: bool = setting(False, "also log to Weights & Biases", free=True)
    project: str = setting("ffcv-convnext", "Weights & Biases project", free=True)

    def __post_init__(self) -> None:
        check_ranges(self)
        for name, path in (("resume", self.resume), ("finetune", self.finetune)):
            _require(
                not str(path).startswith(("http:", "https:")),
                f"{name} = {path}: expected a file on this machine; download it first",
            )
        needs = {
            **dict.fromkeys(("model_key", "model_prefix"), (self.finetune is not None, "finetune FILE")),
            **dict.fromkeys(("test_sizes", "tta", "eval_data_path", "eval_csv"), (self.eval, "eval true")),
        }
        for field in dataclasses.fields(self):
            met, other = needs.get(field.name, (True, ""))
            value = getattr(self, field.name)
            _require(met or value == field.default, f"{field.name} = {format_value(value)} needs --{other}")
        if self.test_sizes is not None and len(set(self.test_sizes)) < len(self.test_sizes):
            raise ValueError(f"test_sizes = {format_value(self.test_sizes)}: expected each size once")
        _require(
            self.model_ema_bn == "average" or (self.model_ema and self.model_ema_eval),
            "model_ema_bn = recompute needs --model_ema true --model_ema_eval true",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All settings of a run, in groups. `from_flat()` reverses `flat()`."""

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
            f"batch_size = {size}: mixup_mode = pair needs an even number",
        )
        if self.run.kernels == "triton":
            for problem in (self.network_without_triton(), self.optimizer_without_triton()):
                _require(problem is None, f"kernels = triton {problem}")
        end_ramp, epochs = self.data.end_ramp, self.schedule.epochs
        _require(
            end_ramp is None or end_ramp < epochs,
            f"end_ramp = {end_ramp}: expected at most {epochs - 1}, the last of {epochs} epochs",
        )
        if self.data.test_crop_pct is not None and self.data.eval_resize == "auto":
            largest = max(self.run.test_sizes or (self.data.test_size,))
            _require(
                largest < WARPED_FROM,
                f"test_crop_pct = {self.data.test_crop_pct:g} has no effect on test images of {largest} pixels, which "
                f"eval_resize = auto warps from {WARPED_FROM} on; add --eval_resize crop, or remove it",
            )
        if self.augment.cutmix_minmax is not None:
            (low, high), side = self.augment.cutmix_minmax, self.train_sizes()[0]
            _require(
                int(side * low) < int(side * high),
                f"cutmix_minmax = {low},{high}: expected min,max at least one pixel apart at input_size = {side}",
            )

    def network_without_triton(self) -> str | None:
        """Return why the Triton kernels of the blocks cannot be used with these settings, None if they can."""
        if self.model.model != "resnet":
            return f"does not support model = {self.model.model}; use --kernels torch"
        return None if self.run.channels_last else "needs --channels_last true"

    def optimizer_without_triton(self) -> str | None:
        """Return why the Triton kernel of the optimiser cannot be used with these settings, None if it can."""
        opt = self.optim.opt
        return None if opt.lower() == "adamw" else f"does not support opt = {opt}; use --kernels auto"

    def train_sizes(self) -> list[int]:
        """Return the different sides of the training images of a run, in their order, pixels."""
        return list(dict.fromkeys(map(self.data.train_size, range(self.schedule.epochs))))

    def relative_pixels(self) -> float:
        """Return the pixels of all training images, as a share of those of a run at max_train_size."""
        sizes = [self.data.train_size(epoch) for epoch in range(self.schedule.epochs)]
        return sum(size**2 for size in sizes) / (len(sizes) * self.data.max_train_size**2)

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> Config:
        """Build a config from flat names; strings are parsed, missing settings keep their defaults.

        With a timm model, missing settings about images are the model's own (see timm_images).
        Raises ValueError for an unknown name, with the most similar ones, or an unusable value.
        """
        groups: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
        for name, raw in values.items():
            declared = find_setting(name)
            groups[declared.group][name] = declared.parse(raw)
        model = groups["model"].get("model", "resnet")
        if model != "resnet" and (missing := [name for name in TIMM_IMAGES if name not in values]):
            own = timm_images(model)
            groups["data"] |= {name: own[name] for name in missing if name in own}
        return cls(**{name: GROUPS[name](**group) for name, group in groups.items()})

    @classmethod
    def recorded(cls, values: Mapping[str, Any]) -> Config:
        """Build the config of a run from the settings in its folder or checkpoint, also of an older version.

        Before 0.3.0 all models had ImageNet's mean and std and bicubic central crops, without settings for them, and
        products of float32 matrices had torch's default precision.
        """
        before: dict[str, Any] = {"matmul_precision": "highest"}
        if "mean" not in values:
            before |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "eval_interpolation": "bicubic"}
            if int(values.get("input_size", 0)) >= WARPED_FROM:
                before["eval_resize"] = "crop"
        return cls.from_flat({**before, **values})

    def flat(self) -> dict[str, Any]:
        """Return every setting by its flat name, as plain YAML values (paths and number lists as strings)."""
        return {
            setting.name: to_plain(getattr(getattr(self, setting.group), setting.name)) for setting in SETTINGS.values()
        }

    def replace(self, **changes: Any) -> Config:
        """Return a copy with some settings changed, checked again; all others stay, also with another model."""
        return Config.from_flat({**self.flat(), **changes})

    def for_world(self, world: int) -> Config:
        """Return this config for `world` processes: update_freq follows from global_batch if that is set.

        Raises ValueError, with the possible numbers of processes, if the global batch cannot be divided equally.
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
        """Return the text of a config.yaml."""
        return yaml.safe_dump(self.flat(), sort_keys=False)


GROUPS: dict[str, type] = {
    "data": DataConfig,
    "augment": AugmentConfig,
    "model": ModelConfig,
    "optim": OptimConfig,
    "schedule": ScheduleConfig,
    "run": RunConfig,
}
SETTINGS: dict[str, Setting] = collect_settings(GROUPS)


def find_setting(name: str) -> Setting:
    """Return a declared setting. Raises ValueError for an unknown name, with the most similar ones."""
    if name not in SETTINGS:
        hint = nearest(name, SETTINGS)
        if name in PAPERS_FLAGS:
            hint = "; docs/training.md says what this flag of the paper's code is here"
        raise ValueError(f"unknown setting '{name}'{hint}")
    return SETTINGS[name]


def steps_per_epoch(num_samples: int, batch_size: int, update_freq: int, world: int, copies: int) -> int:
    """Return the number of optimiser steps in an epoch; leftover samples are skipped.

    copies: of a sample in a global batch.   Raises ValueError if they exceed it, or if the samples do not fill it.
    """
    global_batch = batch_size * update_freq * world
    if copies > global_batch:
        raise ValueError(
            f"repeated_aug = {copies}: the copies of a sample do not fit into the global batch of {global_batch}; "
            "lower repeated_aug, or raise batch_size or update_freq"
        )
    if num_samples < global_batch:
        raise ValueError(
            f"the training set has {num_samples} images, fewer than the global batch of {global_batch} "
            f"(batch_size {batch_size} x update_freq {update_freq} x {world} processes); "
            "lower batch_size or update_freq"
        )
    return num_samples // global_batch


def differences(ours: Config, theirs: Config) -> list[str]:
    """Return the settings that differ and change what is computed, each as 'name: ours != theirs'."""
    mine, other = ours.flat(), theirs.flat()
    return [
        f"{name}: {format_value(mine[name])} != {format_value(other[name])}"
        for name, declared in SETTINGS.items()
        if not declared.free and mine[name] != other[name]
    ]
