"""The names that libraries give to the weights of a ConvNeXt or ResNet: tables, recognition, renaming.

A table maps our name of a part to theirs. `#` stands for the number of a block; {i} is a stage from 0, {from1} the same
from 1, {even} and {odd} are 2i and 2i + 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

State = dict[str, Tensor]
Layers = tuple[int, int, int, int]  # blocks in each stage

RELEASED_CONVNEXT = {
    "stem.conv": "downsample_layers.0.0",
    "stem.norm": "downsample_layers.0.1",
    "stages.{i}.downsample.norm": "downsample_layers.{i}.0",
    "stages.{i}.downsample.conv": "downsample_layers.{i}.1",
    "stages.{i}.blocks.#.branch.conv1": "stages.{i}.#.dwconv",
    "stages.{i}.blocks.#.branch.norm1": "stages.{i}.#.norm",
    "stages.{i}.blocks.#.branch.conv2": "stages.{i}.#.pwconv1",
    "stages.{i}.blocks.#.branch.conv3": "stages.{i}.#.pwconv2",
    "stages.{i}.blocks.#.branch.scale.gamma": "stages.{i}.#.gamma",
    "norm": "norm",
    "head": "head",
}
OPENMMLAB_CONVNEXT = {
    **RELEASED_CONVNEXT,
    "stages.{i}.blocks.#.branch.conv1": "stages.{i}.#.depthwise_conv",
    "stages.{i}.blocks.#.branch.conv2": "stages.{i}.#.pointwise_conv1",
    "stages.{i}.blocks.#.branch.conv3": "stages.{i}.#.pointwise_conv2",
    "norm": "norm3",
    "head": "head.fc",
}
TIMM_CONVNEXT = {
    "stem.conv": "stem.0",
    "stem.norm": "stem.1",
    "stages.{i}.downsample.norm": "stages.{i}.downsample.0",
    "stages.{i}.downsample.conv": "stages.{i}.downsample.1",
    "stages.{i}.blocks.#.branch.conv1": "stages.{i}.blocks.#.conv_dw",
    "stages.{i}.blocks.#.branch.norm1": "stages.{i}.blocks.#.norm",
    "stages.{i}.blocks.#.branch.conv2": "stages.{i}.blocks.#.mlp.fc1",
    "stages.{i}.blocks.#.branch.conv3": "stages.{i}.blocks.#.mlp.fc2",
    "stages.{i}.blocks.#.branch.scale.gamma": "stages.{i}.blocks.#.gamma",
    "norm": "head.norm",
    "head": "head.fc",
}
TORCHVISION_CONVNEXT = {
    "stem.conv": "features.0.0",
    "stem.norm": "features.0.1",
    "stages.{i}.downsample.norm": "features.{even}.0",
    "stages.{i}.downsample.conv": "features.{even}.1",
    "stages.{i}.blocks.#.branch.conv1": "features.{odd}.#.block.0",
    "stages.{i}.blocks.#.branch.norm1": "features.{odd}.#.block.2",
    "stages.{i}.blocks.#.branch.conv2": "features.{odd}.#.block.3",
    "stages.{i}.blocks.#.branch.conv3": "features.{odd}.#.block.5",
    "stages.{i}.blocks.#.branch.scale.gamma": "features.{odd}.#.layer_scale",
    "norm": "classifier.0",
    "head": "classifier.2",
}
TRANSFORMERS_CONVNEXT = {  # without convnext. and encoder., which WRAPPERS has
    "stem.conv": "embeddings.patch_embeddings",
    "stem.norm": "embeddings.layernorm",
    "stages.{i}.downsample.norm": "stages.{i}.downsampling_layer.0",
    "stages.{i}.downsample.conv": "stages.{i}.downsampling_layer.1",
    "stages.{i}.blocks.#.branch.conv1": "stages.{i}.layers.#.dwconv",
    "stages.{i}.blocks.#.branch.norm1": "stages.{i}.layers.#.layernorm",
    "stages.{i}.blocks.#.branch.conv2": "stages.{i}.layers.#.pwconv1",
    "stages.{i}.blocks.#.branch.conv3": "stages.{i}.layers.#.pwconv2",
    "stages.{i}.blocks.#.branch.scale.gamma": "stages.{i}.layers.#.layer_scale_parameter",
    "norm": "layernorm",
    "head": "classifier",
}
TORCHVISION_RESNET = {  # timm's plain ResNets have the same names
    "stem.conv": "conv1",
    "stem.norm": "bn1",
    **{f"stages.{{i}}.blocks.#.branch.conv{k}": f"layer{{from1}}.#.conv{k}" for k in (1, 2, 3)},
    **{f"stages.{{i}}.blocks.#.branch.norm{k}": f"layer{{from1}}.#.bn{k}" for k in (1, 2, 3)},
    "stages.{i}.blocks.#.shortcut.conv": "layer{from1}.#.downsample.0",
    "stages.{i}.blocks.#.shortcut.norm": "layer{from1}.#.downsample.1",
    "head": "fc",
}
TRANSFORMERS_RESNET = {
    "stem.conv": "embedder.embedder.convolution",
    "stem.norm": "embedder.embedder.normalization",
    **{f"stages.{{i}}.blocks.#.branch.conv{k + 1}": f"stages.{{i}}.layers.#.layer.{k}.convolution" for k in range(3)},
    **{f"stages.{{i}}.blocks.#.branch.norm{k + 1}": f"stages.{{i}}.layers.#.layer.{k}.normalization" for k in range(3)},
    "stages.{i}.blocks.#.shortcut.conv": "stages.{i}.layers.#.shortcut.convolution",
    "stages.{i}.blocks.#.shortcut.norm": "stages.{i}.layers.#.shortcut.normalization",
    "head": "classifier.1",
}
OUR_PARTS = [
    *("stem.conv", "stem.norm", "stages.{i}.downsample.norm", "stages.{i}.downsample.conv"),
    *(f"stages.{{i}}.blocks.#.branch.{kind}{k}" for kind in ("conv", "norm") for k in range(4)),
    *(f"stages.{{i}}.blocks.#.{name}" for name in ("branch.scale.gamma", "shortcut.conv", "shortcut.norm")),
    *("norm", "head"),
]

# Sizes with a name: (layers, width).
CONVNEXT_SIZES: Mapping[tuple[Layers, int], str] = {
    ((3, 3, 9, 3), 96): "ConvNeXt-T",
    ((3, 3, 27, 3), 96): "ConvNeXt-S",
    ((3, 3, 27, 3), 128): "ConvNeXt-B",
    ((3, 3, 27, 3), 192): "ConvNeXt-L",
    ((3, 3, 27, 3), 256): "ConvNeXt-XL",
}
RESNET_SIZES: Mapping[tuple[Layers, int], str] = {
    ((3, 4, 6, 3), 64): "ResNet-50",
    ((3, 4, 23, 3), 64): "ResNet-101",
    ((3, 8, 36, 3), 64): "ResNet-152",
}

# DataParallel, torch.compile, Lightning, OpenMMLab and transformers put these before the names, also nested.
WRAPPERS = ("module", "_orig_mod", "backbone", "model", "encoder", "net", "network", "convnext", "resnet", "timm_model")
WRAPPED = re.compile(rf"(?:(?:{'|'.join(WRAPPERS)})\.)*")
LEAF = r"(\.(?:weight|bias|running_mean|running_var|num_batches_tracked))?"


@dataclass(frozen=True)
class Size:
    """What the names and shapes of a network's weights tell about its size."""

    layers: Layers
    width: int  # channels after the stem
    kernel: int  # side of the blocks' spatial convolution

    def differences(self, other: Size) -> list[tuple[str, str, str]]:
        """Return what differs: (name, own value, the other's), e.g. ('layers', '3,3,27,3', '3,3,9,3')."""
        rows = (
            ("layers", ",".join(map(str, self.layers)), ",".join(map(str, other.layers))),
            ("width", str(self.width), str(other.width)),
            ("kernel size", str(self.kernel), str(other.kernel)),
        )
        return [(name, ours, theirs) for name, ours, theirs in rows if ours != theirs]


@dataclass(frozen=True, eq=False)
class Layout:
    """How a library names the parts of a network.

    owner, family: for messages, "timm's" and 'ConvNeXt'.   table: as described above.   sizes: their names.
    """

    owner: str
    family: str
    table: Mapping[str, str]
    sizes: Mapping[tuple[Layers, int], str]

    @property
    def title(self) -> str:
        """The layout's name in messages."""
        return f"{self.owner} {self.family}"

    @property
    def is_resnet(self) -> bool:
        """Whether these are the names of a ResNet-50, not of a ConvNeXt."""
        return self.family == "ResNet"

    @cached_property
    def _rows(self) -> list[tuple[str, str]]:
        """The table with every stage written out."""
        return [
            (ours.format(**stage), theirs.format(**stage))
            for ours, theirs in self.table.items()
            for stage in ([_stage(i) for i in range(4)] if "{" in ours else [{}])
            if "downsample" not in ours or stage["i"] > 0
        ]

    @cached_property
    def _reading(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(theirs), ours) for ours, theirs in self._rows]

    @cached_property
    def _writing(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(ours), theirs) for ours, theirs in self._rows]

    def to_ours(self, names: Iterable[str]) -> dict[str, str]:
        """Return their names of weights -> ours, for the names that the layout has."""
        return _renamed(names, self._reading)

    def from_ours(self, names: Iterable[str]) -> dict[str, str]:
        """Return our names of weights -> theirs, for the names that the layout has."""
        return _renamed(names, self._writing)

    def size(self, state: Mapping[str, Tensor]) -> Size | None:
        """Return the size of the network of these weights, or None if they lack a part of it, as basic blocks do."""
        ours = {name: state[theirs] for theirs, name in self.to_ours(state).items()}
        blocks = {match.groups() for name in ours if (match := re.match(r"stages\.(\d)\.blocks\.(\d+)\.", name))}
        kernels = [
            tensor.shape[-1]
            for name, tensor in ours.items()
            if re.fullmatch(r"stages\.0\.blocks\.0\.branch\.conv\d\.weight", name) and tensor.ndim == 4
        ]
        if not kernels or not {"stem.conv.weight", "stages.0.blocks.0.branch.conv3.weight"} <= ours.keys():
            return None
        stages = [stage for stage, _ in blocks]
        first, second, third, fourth = (stages.count(str(i)) for i in range(4))
        if not (first and second and third and fourth):
            return None
        return Size((first, second, third, fourth), len(ours["stem.conv.weight"]), max(kernels))

    def describe(self, state: Mapping[str, Tensor]) -> str:
        """Return the title, with the size if it has a name: "torchvision's ConvNeXt-S"."""
        size = self.size(state)
        name = self.sizes.get((size.layers, size.width)) if size else None
        return f"{self.owner} {name or self.family}"


OURS = Layout("this project's", "network", {part: part for part in OUR_PARTS}, {})
RELEASED = Layout("the paper's", "ConvNeXt", RELEASED_CONVNEXT, CONVNEXT_SIZES)
TIMM = Layout("timm's", "ConvNeXt", TIMM_CONVNEXT, CONVNEXT_SIZES)
TORCHVISION = Layout("torchvision's", "ConvNeXt", TORCHVISION_CONVNEXT, CONVNEXT_SIZES)
RESNET = Layout("torchvision's", "ResNet", TORCHVISION_RESNET, RESNET_SIZES)
LAYOUTS = (
    *(OURS, RELEASED, TIMM, TORCHVISION, RESNET),
    Layout("transformers'", "ConvNext", TRANSFORMERS_CONVNEXT, CONVNEXT_SIZES),
    Layout("transformers'", "ResNet", TRANSFORMERS_RESNET, RESNET_SIZES),
    Layout("OpenMMLab's", "ConvNeXt", OPENMMLAB_CONVNEXT, CONVNEXT_SIZES),
    Layout("OpenMMLab's", "ResNet", {**TORCHVISION_RESNET, "head": "head.fc"}, RESNET_SIZES),
)


def recognise(names: Iterable[str]) -> Layout | None:
    """Return the layout that has the most of these names of weights, or None if none has half of them."""
    names = list(names)
    known, best = max(((len(layout.to_ours(names)), layout) for layout in LAYOUTS), key=lambda pair: pair[0])
    return best if 2 * known >= len(names) else None


def rename(state: Mapping[str, Tensor], source: Layout, target: Layout) -> State:
    """Return the weights with the target's names. Names that one of the layouts does not have stay."""
    ours = source.to_ours(state)
    theirs = target.from_ours(ours.values())
    return {theirs.get(ours.get(name, ""), name): tensor for name, tensor in state.items()}


def _stage(i: int) -> dict[str, Any]:
    return {"i": i, "from1": i + 1, "even": 2 * i, "odd": 2 * i + 1}


def _pattern(part: str) -> re.Pattern[str]:
    return re.compile(re.escape(part).replace(r"\#", r"(\d+)") + LEAF)


def _renamed(names: Iterable[str], rows: list[tuple[re.Pattern[str], str]]) -> dict[str, str]:
    renamed = {}
    for name in names:
        found = next(((match, new) for pattern, new in rows if (match := pattern.fullmatch(name))), None)
        if found:
            *numbers, leaf = found[0].groups(default="")
            renamed[name] = found[1].replace("#", "{}").format(*numbers) + leaf
    return renamed
