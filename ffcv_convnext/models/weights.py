"""Conversion of weight names: timm's ConvNeXt and torchvision's ResNet.

One table per layout maps our name of a part to theirs; `#` stands for a number that both share.
"""

from __future__ import annotations

import dataclasses
import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ffcv_convnext.config import Config, ModelConfig, format_value
from ffcv_convnext.files import replacing
from ffcv_convnext.models.resnet import ResNet

log = logging.getLogger(__name__)

State = dict[str, Tensor]
Layout = Literal["timm", "torchvision", "ours"]

TIMM_CONVNEXT = {
    "stem.conv": "stem.0",
    "stem.norm": "stem.1",
    "stages.#.downsample.norm": "stages.#.downsample.0",
    "stages.#.downsample.conv": "stages.#.downsample.1",
    "stages.#.blocks.#.branch.conv1": "stages.#.blocks.#.conv_dw",
    "stages.#.blocks.#.branch.norm1": "stages.#.blocks.#.norm",
    "stages.#.blocks.#.branch.conv2": "stages.#.blocks.#.mlp.fc1",
    "stages.#.blocks.#.branch.conv3": "stages.#.blocks.#.mlp.fc2",
    "stages.#.blocks.#.branch.scale.gamma": "stages.#.blocks.#.gamma",
    "norm": "head.norm",
    "head": "head.fc",
}
TORCHVISION_RESNET = {  # timm's plain ResNets have the same names
    "stem.conv": "conv1",
    "stem.norm": "bn1",
    **{
        f"stages.{i}.blocks.#.{ours}": f"layer{i + 1}.#.{theirs}"
        for i in range(4)
        for ours, theirs in {
            **{f"branch.conv{k}": f"conv{k}" for k in (1, 2, 3)},
            **{f"branch.norm{k}": f"bn{k}" for k in (1, 2, 3)},
            "shortcut.conv": "downsample.0",
            "shortcut.norm": "downsample.1",
        }.items()
    },
    "head": "fc",
}

# The settings of such a network. Those in FREE_* may have any value.
CONVNEXT = ModelConfig(
    resnet_stem="patch_embed",
    resnet_stem_norm=True,
    resnet_depthwise=True,
    resnet_block="inverted",
    resnet_conv_first=True,
    resnet_act_layer="gelu",
    resnet_del_act=True,
    resnet_reorg_norm=True,
    resnet_norm_layer="ln",
    resnet_final_norm=True,
    resnet_sep_downsample=True,
    resnet_ds_norm="pre",
    resnet_ls_init_values=1e-6,
)
RESNET = ModelConfig()
FREE_RESNET = {"nb_classes", "drop_path", "resnet_layers", "resnet_init"}
FREE_CONVNEXT = FREE_RESNET | {"resnet_embed_dim", "resnet_kernel_size"}


def from_timm_convnext(state: Mapping[str, Tensor]) -> State:
    """Convert timm's ConvNeXt state dict to our names, for a `ResNet` with the settings of convnext_tiny.yaml.

    Linear weights (out, in) become 1x1 convolutions (out, in, 1, 1). The tensors share memory with the given ones.
    Raises ValueError for a state dict of another layout, as do the three functions below.
    """
    renamed = _rename(state, {theirs: ours for ours, theirs in TIMM_CONVNEXT.items()}, "timm's ConvNeXt")
    pointwise = re.compile(r"stages\..*\.conv[23]\.weight")
    return {k: v[:, :, None, None] if pointwise.fullmatch(k) and v.ndim == 2 else v for k, v in renamed.items()}


def to_timm_convnext(state: Mapping[str, Tensor]) -> State:
    """Convert our state dict to timm's ConvNeXt names; the inverse of `from_timm_convnext`."""
    renamed = _rename(state, TIMM_CONVNEXT, "our ConvNeXt")
    return {k: v.flatten(1) if re.search(r"\.fc[12]\.weight$", k) else v for k, v in renamed.items()}


def from_torchvision_resnet(state: Mapping[str, Tensor]) -> State:
    """Convert torchvision's (or timm's) bottleneck ResNet state dict to our names."""
    return _rename(state, {theirs: ours for ours, theirs in TORCHVISION_RESNET.items()}, "torchvision's ResNet")


def to_torchvision_resnet(state: Mapping[str, Tensor]) -> State:
    """Convert our state dict to torchvision's ResNet names."""
    return _rename(state, TORCHVISION_RESNET, "our ResNet-50")


def _rename(state: Mapping[str, Tensor], table: Mapping[str, str], whose: str) -> State:
    """Rename every key by the row of the table that matches; every row must be used."""
    patterns = {old: re.compile(re.escape(old).replace(r"\#", r"(\d+)") + r"(\.\w+)?") for old in table}
    renamed: State = {}
    unknown, unused = [], set(table)
    for key, tensor in state.items():
        matches = ((old, match) for old, pattern in patterns.items() if (match := pattern.fullmatch(key)))
        old, match = next(matches, (None, None))
        if old is None or match is None:
            unknown.append(key)
            continue
        *numbers, leaf = match.groups(default="")
        renamed[table[old].replace("#", "{}").format(*numbers) + leaf] = tensor
        unused.discard(old)
    if unknown or unused:
        lacks = [old for old in table if old in unused]
        raise ValueError(f"these weights do not have the layout of {whose}: {_mismatch(lacks, unknown)}")
    return renamed


def _mismatch(missing: list[str], unexpected: list[str], other_shape: list[str] | None = None) -> str:
    """List a few names of each kind, for messages."""
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": other_shape or []}
    return "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for kind, names in kinds.items()
        if names
    )


def load_pretrained(model: nn.Module, path: Path) -> None:
    """Load the weights in `path` into `model`, in place (--finetune).

    path: a checkpoint of a run ({"model": state dict, ...}), any {"state_dict": ...}, or a plain state dict, with our
    names, timm's (ConvNeXt) or torchvision's (ResNet). A classifier head of another size is skipped with a warning and
    keeps its initialisation. Raises ValueError, and changes nothing, if anything else does not fit.
    """
    state = _state_in(_read(path), path)
    if isinstance(model, ResNet):
        if "stem.0.weight" in state:
            state = from_timm_convnext(state)
        elif "layer1.0.conv1.weight" in state:
            state = from_torchvision_resnet(state)
    own = model.state_dict()
    head = [key for key in state if key in own and key.startswith(_head_names(model))]
    if any(state[key].shape != own[key].shape for key in head):
        log.warning(
            "%s: its head has %d classes, the model's %d; it is not loaded and keeps its initialisation",
            path,
            len(state[head[0]]),
            len(own[head[0]]),
        )
        state = {key: tensor for key, tensor in state.items() if key not in head}
        own = {key: tensor for key, tensor in own.items() if key not in head}
    # old checkpoints have no num_batches_tracked; PyTorch starts it at 0
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    other_shape = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or unexpected or other_shape:
        raise ValueError(f"{path} does not fit the model: {_mismatch(missing, unexpected, other_shape)}")
    model.load_state_dict(state, strict=False)


def _head_names(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of the names of the classifier's weights."""
    if isinstance(model, ResNet):
        return ("head.",)
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a readable PyTorch checkpoint: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a state dict or a checkpoint")
    return content


def _state_in(content: Mapping[str, Any], path: Path) -> State:
    for key in ("model", "state_dict", "ema"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} has no weights: expected a state dict, or one under 'model' or 'state_dict'")
    return dict(content)


def export_weights(checkpoint: Path, out: Path, layout: Layout, *, ema: bool = False) -> None:
    """Write a run's weights as a plain state dict that `layout`'s library loads strictly.

    checkpoint: of a run, with keys `model`, `config` (flat settings) and optionally `ema`.   out: written under a
    temporary name, then renamed; an existing file is replaced.   ema: the averaged weights instead of the raw ones.
    Raises FileNotFoundError, or ValueError for a network that the layout cannot represent.
    """
    content = _read(checkpoint)
    if not isinstance(content.get("config"), Mapping):
        raise ValueError(f"{checkpoint} has no 'config': it is not a checkpoint of ffcv-convnext")
    if ema and not content.get("ema"):
        raise ValueError(f"{checkpoint} has no averaged weights; remove --ema, or train with --model_ema true")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"folder {out.absolute().parent} does not exist")
    try:
        config = Config.from_flat(content["config"])
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None
    state = _state_in({"model": content["ema"]} if ema else content, checkpoint)
    state = _to_layout(state, config.model, layout, checkpoint)
    state = {key: tensor.contiguous() for key, tensor in state.items()}
    with replacing(out) as file:
        torch.save(state, file)


def _to_layout(state: State, config: ModelConfig, layout: Layout, source: Path) -> State:
    if layout == "ours" or (layout == "timm" and config.model != "resnet"):
        return state
    if config.model != "resnet":
        raise ValueError(f"{source}: model = {config.model} is a timm model; export it with --layout timm")
    if layout == "timm" and config.resnet_block == "inverted":
        config = dataclasses.replace(
            config,
            resnet_norm_layer="ln" if config.resnet_norm_layer == "fp32ln" else config.resnet_norm_layer,
            resnet_ls_init_values=1e-6 if config.resnet_ls_init_values > 0 else 0.0,
        )
        obstacles, rename = _unsupported(config, CONVNEXT, FREE_CONVNEXT), to_timm_convnext
    else:
        obstacles, rename = _unsupported(config, RESNET, FREE_RESNET), to_torchvision_resnet
    if not obstacles:
        return rename(state)
    raise ValueError(
        f"{source}: {layout} has no such network: {', '.join(obstacles)}; --layout ours exports it for this project"
    )


def _unsupported(config: ModelConfig, target: ModelConfig, free: set[str]) -> list[str]:
    """List the settings that the target layout cannot represent: 'name = ours (needs theirs)'."""
    return [
        f"{name} = {format_value(getattr(config, name))} (needs {format_value(getattr(target, name))})"
        for name in (field.name for field in dataclasses.fields(ModelConfig))
        if name not in free and getattr(config, name) != getattr(target, name)
    ]
