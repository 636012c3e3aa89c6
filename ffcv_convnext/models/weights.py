"""Files of weights: read them in every usual wrapping and naming, fit them into a network, export a run's."""

from __future__ import annotations

import dataclasses
import logging
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ffcv_convnext.config import SETTINGS, Config, ModelConfig, format_value
from ffcv_convnext.errors import Interrupted
from ffcv_convnext.files import replacing
from ffcv_convnext.models.layouts import (
    LAYOUTS,
    OURS,
    RELEASED,
    RESNET,
    TIMM,
    TORCHVISION,
    WRAPPED,
    State,
    recognise,
    rename,
)
from ffcv_convnext.models.resnet import ResNet

log = logging.getLogger(__name__)

ExportLayout = Literal["ours", "timm", "torchvision", "released"]

MODEL_KEYS: str = SETTINGS["model_key"].default
OTHER_KEYS = ("state_dict", "model_state_dict", "net", "network", "weights", "model_ema", "ema", "state_dict_ema")

# The settings of the networks that other libraries have. Those in FREE may have any value.
CONVNEXT_CONFIG = ModelConfig(
    resnet_stem="patch_embed",
    resnet_stem_norm=True,
    resnet_depthwise=True,
    resnet_embed_dim=96,
    resnet_layers=(3, 3, 9, 3),
    resnet_block="inverted",
    resnet_conv_first=True,
    resnet_kernel_size=7,
    resnet_act_layer="gelu",
    resnet_del_act=True,
    resnet_reorg_norm=True,
    resnet_norm_layer="ln",
    resnet_final_norm=True,
    resnet_sep_downsample=True,
    resnet_ds_norm="pre",
    resnet_ls_init_values=1e-6,
)
RESNET_CONFIG = ModelConfig()
CONVNEXT_YAML, RESNET_YAML = "rn_configs/convnext_tiny.yaml", "rn_configs/00_resnet50.yaml"
FREE = {"nb_classes", "drop_path", "head_init_scale", "grad_checkpointing", "resnet_init"}
SIZE_SETTINGS = {"layers": "resnet_layers", "width": "resnet_embed_dim", "kernel size": "resnet_kernel_size"}
MODEL_SETTINGS = [field.name for field in dataclasses.fields(ModelConfig)]


class _Ignored:
    """Stands for a Python object in a checkpoint (arguments, a logger); its own code does not run."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, *_: Any) -> None:
        pass


def read_weights_file(path: Path) -> dict[str, Any]:
    """Read a file of torch.save or safetensors, whatever its suffix, after verifying the checksums that it has.

    Python objects besides tensors, numbers and containers become an object without content. Raises FileNotFoundError,
    or ValueError for a damaged file or another kind of file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    content: Any
    try:
        with path.open("rb") as file:  # torch.load goes by a path's suffix
            start = file.read(9)
            file.seek(0)
            if start[8:] == b"{":  # behind the length of the header
                content = safetensors.torch.load_file(path)
            elif zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    if damaged := archive.testzip():
                        raise ValueError(f"the checksum of its part {damaged} does not match")
                names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
                with torch.serialization.safe_globals([(_Ignored, name) for name in names]):
                    content = torch.load(file, map_location="cpu", weights_only=True)
            else:  # the format before PyTorch 1.6
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Interrupted:
        raise
    except Exception as error:  # a damaged file raises almost any type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a readable PyTorch or safetensors file: {reason}") from None
    if not isinstance(content, dict):
        kind = "Python object" if isinstance(content, _Ignored) else type(content).__name__
        raise ValueError(
            f"{path} holds a {kind}; expected a state dict or a checkpoint: torch.save(model.state_dict())"
        )
    return content


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    )


def _state_in(content: Mapping[str, Any], path: Path, model_key: str = MODEL_KEYS) -> State:
    """Return the state dict in a file's content: under one of `model_key`, a usual key, or the only one."""
    keys = model_key.split("|")
    chosen = model_key != MODEL_KEYS
    while chosen or not _is_state(content):
        entries = [key for key, value in content.items() if isinstance(value, Mapping)]
        usual = () if chosen else OTHER_KEYS
        states = [key for key in entries if _is_state(content[key])]
        key = next((key for key in (*keys, *usual) if key in entries), None)
        if key is None and chosen:
            found = _some(entries) if entries else "no entries, only weights"
            raise ValueError(f"model_key = {model_key}: {path} has {found}; leave --model_key out, or name an entry")
        if key is None and len(states) > 1:
            raise ValueError(f"{path} has several sets of weights: {_some(states)}; choose one with --model_key")
        if key is None and not states:
            raise ValueError(
                f"{path} has no weights: expected a state dict, or one under {', '.join((*keys, *usual))}; found "
                f"{_some(list(map(str, content))) or 'nothing'}"
            )
        content, chosen = content[key or states[0]], False
    return dict(content)


def _unwrapped(state: State, path: Path, own: Iterable[str], prefix: str) -> State:
    """Return the weights under `prefix`, with names free of the prefixes of wrappers. Names in `own` stay."""
    own = set(own)
    if prefix:
        prefix = prefix.removesuffix(".") + "."
        below = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if not below:
            raise ValueError(f"model_prefix = {prefix}: no name in {path} begins with it; it has {_some(list(state))}")
        state = below
    places: dict[str, str] = {}
    for name in state:
        plain = name if name in own else WRAPPED.sub("", name, count=1)
        if plain in places:
            wrappers = " and ".join(f"'{full.removesuffix(plain)}'" for full in (places[plain], name))
            raise ValueError(
                f"{path} has {plain} twice, under {wrappers}: choose one of the networks with --model_prefix"
            )
        if plain != "n_averaged" or plain in own:  # a counter of PyTorch's AveragedModel
            places[plain] = name
    return {plain: state[name] for plain, name in places.items()}


def load_pretrained(
    model: nn.Module, path: Path, *, model_key: str = MODEL_KEYS, model_prefix: str = "", needs_head: bool = False
) -> None:
    """Load the weights in `path` into `model`, in place (--finetune, and --eval, which needs the head).

    The arguments and errors are those of `fit_pretrained`; if it raises, nothing is changed.
    """
    state = fit_pretrained(model, path, model_key=model_key, model_prefix=model_prefix, needs_head=needs_head)
    model.load_state_dict(state, strict=False)


def fit_pretrained(
    model: nn.Module, path: Path, *, model_key: str = MODEL_KEYS, model_prefix: str = "", needs_head: bool = False
) -> State:
    """Return the weights in `path` with the names and shapes of `model`, which may be on the meta device.

    path: of torch.save or safetensors, with the names of any layout in `LAYOUTS`, also below the prefixes of wrappers.
    model_key: entries to try, separated by |; with the default also the usual ones.   model_prefix: only the names
    that begin with it. A classifier head that is missing or has another size is left out, with a warning, unless
    needs_head is true. Raises FileNotFoundError, or ValueError if anything else does not fit.
    """
    own = model.state_dict()
    found = _unwrapped(_state_in(read_weights_file(path), path, model_key), path, own, model_prefix)
    source, target = recognise(found), recognise(own)
    state = rename(found, source, target) if source and target and source is not target else found
    state = {name: _shaped_like(tensor, own.get(name)) for name, tensor in state.items()}
    head = [name for name in own if name.startswith(_head_names(model))]
    loaded = [name for name in head if name in state]
    skipped = ""
    if head and not loaded:
        skipped = "it has no classifier head"
    elif any(state[name].shape != own[name].shape for name in loaded):
        skipped = f"its head has {len(state[loaded[0]])} classes, the model's {len(own[loaded[0]])}"
    if skipped:
        state = {name: tensor for name, tensor in state.items() if name not in head}
        own = {name: tensor for name, tensor in own.items() if name not in head}
    # old checkpoints have no num_batches_tracked; PyTorch starts it at 0
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    other_shape = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing or unexpected or other_shape:
        reason = _misfit(found, model, _mismatch(missing, unexpected, other_shape))
        raise ValueError(f"{path} does not fit the model: {reason}")
    if skipped and needs_head:
        raise ValueError(f"{path} cannot be evaluated on this data: {skipped}; train one with --finetune")
    log.info("%s: weights with the names of %s", path, source.title if source else type(model).__name__)
    if skipped:
        log.warning("%s: %s; the model's head keeps its initialisation", path, skipped)
    return state


def _shaped_like(tensor: Tensor, own: Tensor | None) -> Tensor:
    """Return the tensor in the shape of the model's, if the shapes differ in dimensions of size 1 only."""
    if own is None or [n for n in tensor.shape if n > 1] != [n for n in own.shape if n > 1]:
        return tensor
    return tensor.reshape(own.shape)


def _misfit(state: State, model: nn.Module, names: str) -> str:
    """Explain why weights do not fit: which layout they look like, and how network or size differ; else by names."""
    own = model.state_dict()
    source, target = recognise(state), recognise(own)
    if source is None:
        if 2 * len(own.keys() & state.keys()) >= len(own):  # the model's own names, which are in no table
            return names
        titles = ", ".join(layout.title for layout in LAYOUTS)
        return f"it is none of: {titles}; names below a prefix are loaded with --model_prefix; {names}"
    looks = f"it looks like {source.describe(state)}"
    if isinstance(model, ResNet) and source is not OURS:
        family, config = (RESNET_CONFIG, RESNET_YAML) if source.is_resnet else (CONVNEXT_CONFIG, CONVNEXT_YAML)
        if _unsupported(model.config, family, FREE | set(SIZE_SETTINGS.values())):
            return f"{looks}, the model is another network; start from --config {config}"
    its, models = source.size(state), target.size(own) if target else None
    if its and models and (differences := its.differences(models)):
        theirs = ", ".join(f"{part} {value}" for part, value, _ in differences)
        has = ", ".join(value if len(differences) == 1 else f"{part} {value}" for part, _, value in differences)
        flags = " ".join(f"--{SIZE_SETTINGS[part]} {value}" for part, value, _ in differences)
        return (
            f"{looks} ({theirs}; the model has {has}); use {flags if isinstance(model, ResNet) else 'another --model'}"
        )
    return f"{looks}; {names}"


def _head_names(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of the names of the classifier's weights."""
    if isinstance(model, ResNet):
        return ("head.",)
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _mismatch(missing: list[str], unexpected: list[str], other_shape: list[str]) -> str:
    """List a few names of each kind, for messages."""
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": other_shape}
    return "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds.items() if names)


def export_weights(checkpoint: Path, out: Path, layout: ExportLayout, *, ema: bool = False) -> None:
    """Write a run's weights so that `layout`'s library loads them strictly.

    checkpoint: of a run, with keys `model`, `config` (flat settings) and optionally `ema`.   out: a state dict, in
    safetensors format if it ends in .safetensors; `released` nests it as the paper's code does, {"model": ...}, except
    in safetensors. Written under a temporary name, then renamed; an existing file is replaced.   ema: the averaged
    weights instead of the raw ones.   Raises FileNotFoundError, or ValueError for a network that the layout cannot
    represent.
    """
    content = read_weights_file(checkpoint)
    if not isinstance(content.get("config"), Mapping):
        raise ValueError(f"{checkpoint} has no 'config': it is not a checkpoint of ffcv-convnext")
    if ema and not content.get("ema"):
        raise ValueError(f"{checkpoint} has no averaged weights; remove --ema, or train with --model_ema true")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"folder {out.absolute().parent} does not exist")
    try:
        config = Config.recorded(content["config"])
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None
    state = _state_in({"model": content["ema"]} if ema else content, checkpoint)
    state = _to_layout(state, config.model, layout, checkpoint)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    with replacing(out) as file:
        if out.suffix == ".safetensors":
            file.write(safetensors.torch.save(state, metadata={"format": "pt"}))
        else:
            torch.save({"model": state} if layout == "released" else state, file)


def _to_layout(state: State, config: ModelConfig, layout: ExportLayout, source: Path) -> State:
    if layout == "ours" or (layout == "timm" and config.model != "resnet"):
        return state
    if config.model != "resnet":
        raise ValueError(f"{source}: model = {config.model} is a timm model; export it with --layout timm")
    convnext = layout == "released" or config.resnet_block == "inverted"
    target = {"released": RELEASED, "timm": TIMM, "torchvision": TORCHVISION}[layout] if convnext else RESNET
    free = FREE | {"resnet_layers"}
    if convnext:
        free |= {"resnet_embed_dim"} | ({"resnet_kernel_size"} if target is TIMM else set())
    needed = CONVNEXT_CONFIG if convnext else RESNET_CONFIG
    if obstacles := _unsupported(config, needed, free):
        listed = ", ".join(
            f"{name} = {format_value(ours)} (needs {format_value(its)})" for name, ours, its in obstacles
        )
        raise ValueError(f"{source}: {layout} has no such network: {listed}; --layout ours exports it for this project")
    renamed = rename(state, OURS, target)
    if not convnext:
        return renamed
    shaped = {name: tensor.flatten(1) if tensor.shape[2:] == (1, 1) else tensor for name, tensor in renamed.items()}
    return {name: tensor[:, None, None] if "layer_scale" in name else tensor for name, tensor in shaped.items()}


def _unsupported(config: ModelConfig, needed: ModelConfig, free: set[str]) -> list[tuple[str, Any, Any]]:
    """List the settings that a layout cannot represent: (name, value, value that it needs)."""
    config = dataclasses.replace(
        config,
        resnet_norm_layer="ln" if config.resnet_norm_layer == "fp32ln" else config.resnet_norm_layer,
        resnet_ls_init_values=1e-6 if config.resnet_ls_init_values > 0 else 0.0,
    )
    values = ((name, getattr(config, name), getattr(needed, name)) for name in MODEL_SETTINGS if name not in free)
    return [(name, ours, its) for name, ours, its in values if ours != its]
