"""One configurable network that serves every step from ResNet-50 to ConvNeXt.

The constructors turn the config into an ordered list of parts (convolution, norm, activation); the forward pass is
the residual sum. Source: Liu et al. 2022, "A ConvNet for the 2020s", arXiv:2201.03545, Section 2.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ffcv_convnext.config import ModelConfig
from ffcv_convnext.models.layers import ACTIVATIONS, NORMS, LayerScale, PointwiseConv2d, sequence

FAR = 10**6  # in the order of groups of layers: behind any number of blocks
EXPANSION = 4  # wide / narrow width of a block


def block_widths(config: ModelConfig, width: int) -> tuple[int, int]:
    """Return the channels inside and at the end of a block, in a stage of the given width."""
    if config.resnet_block == "inverted":
        return EXPANSION * width, width
    return width, EXPANSION * width


class Branch(nn.Sequential):
    """The parts of a block's residual branch in order, and the sum. `kernels` has a version that fuses parts."""

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:  # type: ignore[override]
        """Return shortcut + branch(x)."""
        for part in self:
            x = part(x)
        return shortcut + x


class Block(nn.Module):
    """A residual block: shortcut + branch, then an activation unless a block has only one (resnet_del_act).

    x: (N, width_in, H, W). Returns (N, out, ceil(H / stride), ceil(W / stride)), `out` from `block_widths`.
    drop_path: probability that a sample's branch is dropped in training.
    """

    def __init__(self, config: ModelConfig, width_in: int, width: int, stride: int, drop_path: float) -> None:
        super().__init__()
        hidden, out = block_widths(config, width)
        norm, activation = NORMS[config.resnet_norm_layer], ACTIVATIONS[config.resnet_act_layer]
        kernel, bias = config.resnet_kernel_size, config.resnet_block == "inverted" and config.resnet_norm_layer != "bn"

        middle = width_in if config.resnet_conv_first else hidden
        groups = middle if config.resnet_depthwise else 1
        spatial = nn.Conv2d(middle, middle, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)
        first = PointwiseConv2d(width_in, hidden, bias=bias)
        last = PointwiseConv2d(hidden, out, bias=bias)
        convolutions = (spatial, first, last) if config.resnet_conv_first else (first, spatial, last)
        norm_after = (1,) if config.resnet_reorg_norm else (1, 2, 3)
        activation_after = (2,) if config.resnet_del_act else (1, 2)

        parts: dict[str, nn.Module | None] = {"norm0": norm(width_in) if config.resnet_pre_norm else None}
        for i, convolution in enumerate(convolutions, start=1):
            parts[f"conv{i}"] = convolution
            parts[f"norm{i}"] = norm(convolution.out_channels) if i in norm_after else None
            parts[f"act{i}"] = activation() if i in activation_after else None
        scale = config.resnet_ls_init_values
        parts["scale"] = LayerScale(out, scale) if scale > 0 else None
        parts["drop_path"] = DropPath(drop_path) if drop_path > 0 else None
        self.branch = Branch(OrderedDict(sequence(parts).named_children()))

        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != out:
            self.shortcut = sequence({"conv": nn.Conv2d(width_in, out, 1, stride, bias=False), "norm": norm(out)})
        self.act = nn.Identity() if config.resnet_del_act else activation()
        self.grad_checkpointing = False  # compute the block again in the backward pass of training

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for x."""
        if self.grad_checkpointing and self.training:
            output: Tensor = checkpoint(self._compute, x, use_reentrant=False)  # restores the random generators too
            return output
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        output: Tensor = self.act(self.branch(x, self.shortcut(x)))
        return output


def build_stem(config: ModelConfig) -> nn.Sequential:
    """Build the stem: images (N, 3, H, W) -> (N, resnet_embed_dim, H / 4, W / 4)."""
    width, norm = config.resnet_embed_dim, NORMS[config.resnet_norm_layer]
    if config.resnet_stem == "patch_embed":
        return sequence(
            {"conv": nn.Conv2d(3, width, 4, stride=4), "norm": norm(width) if config.resnet_stem_norm else None}
        )
    return sequence(
        {
            "conv": nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
            "norm": norm(width),
            "act": ACTIVATIONS["relu"](),  # also if the blocks have another one
            "pool": nn.MaxPool2d(3, stride=2, padding=1),
        }
    )


def build_downsample(config: ModelConfig, width_in: int, width_out: int) -> nn.Sequential:
    """Build the separate downsampling between two stages: half the side, `width_out` channels."""
    norm, place = NORMS[config.resnet_norm_layer], config.resnet_ds_norm
    convolution = nn.Conv2d(width_in, width_out, 2, stride=2)
    if place == "pre":
        return sequence({"norm": norm(width_in), "conv": convolution})
    return sequence({"conv": convolution, "norm": norm(width_out) if place == "post" else None})


def build_stage(config: ModelConfig, index: int, width_in: int, drop_paths: Sequence[float]) -> nn.Sequential:
    """Build one stage: a separate downsampling if configured (not in the first stage), then the blocks."""
    width = config.resnet_embed_dim * 2**index
    _, out = block_widths(config, width)
    stride = 1 if index == 0 else 2
    downsample = None
    if config.resnet_sep_downsample and index > 0:
        downsample, width_in, stride = build_downsample(config, width_in, out), out, 1
    blocks = []
    for drop_path in drop_paths:
        blocks.append(Block(config, width_in, width, stride, drop_path))
        width_in, stride = out, 1
    return sequence({"downsample": downsample, "blocks": nn.Sequential(*blocks)})


class ResNet(nn.Module):
    """Stem, four stages, average pooling, linear head, all configured by `config`.

    images: (N, 3, H, W) floating, H and W at least 32, channels_last for speed. Returns logits (N, num_classes).
    Can be built on the meta device. Names in the state dict: stem.conv, stages.I.downsample.conv,
    stages.I.blocks.J.branch.conv1 (conv1 is the first in order, of any kind), ...shortcut.conv, norm, head.
    """

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.stem = build_stem(config)
        rates, stages, width_in = drop_path_rates(config), [], config.resnet_embed_dim
        for index, num_blocks in enumerate(config.resnet_layers):
            stages.append(build_stage(config, index, width_in, rates[:num_blocks]))
            rates = rates[num_blocks:]
            _, width_in = block_widths(config, config.resnet_embed_dim * 2**index)
        self.stages = nn.Sequential(*stages)
        self.norm = NORMS[config.resnet_norm_layer](width_in) if config.resnet_final_norm else nn.Identity()
        self.head = nn.Linear(width_in, num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw linear weights, and with resnet_init trunc the convolutions', from a normal with std 0.02.

        Norms start at 1 and 0. Other convolutions keep PyTorch's default. (The paper's Table 5 has 0.2, its code 0.02.)
        """
        drawn = (nn.Linear, nn.Conv2d) if self.config.resnet_init == "trunc" else (nn.Linear,)
        for module in self.modules():
            if isinstance(module, drawn):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let each block keep its input only in training, or everything; timm's interface."""
        for module in self.modules():
            if isinstance(module, Block):
                module.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:  # noqa: ARG002
        """Return `layer_group`: timm's interface for layer_decay, which numbers the groups in their order."""
        return layer_group

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        x = self.stages(self.stem(images))
        x = self.norm(x.mean((2, 3), keepdim=True))
        logits: Tensor = self.head(x.flatten(1))
        return logits


def layer_group(name: str) -> int:
    """Return the group of layers to which a parameter of `ResNet` belongs, from the stem's 0, for layer_decay.

    A stage is a group, with the downsampling before it, but the third stage has one for every three blocks; norm and
    head are the last group. So ConvNeXt-S, -B and -L have the 14 groups of the paper's code (optim_factory.py), and
    ConvNeXt-T has 8, as in its object detection.
    """
    part, *rest = name.split(".")
    if part == "stem":
        return 0
    if part != "stages":
        return FAR + 1
    stage = int(rest[0])
    if stage < 2:
        return stage + 1
    return FAR if stage == 3 else 3 + (int(rest[2]) // 3 if rest[1] == "blocks" else 0)


def drop_path_rates(config: ModelConfig) -> list[float]:
    """Return the stochastic depth rate of every block of the network: linear from 0 to `config.drop_path`."""
    num_blocks = sum(config.resnet_layers)
    return [config.drop_path * i / max(num_blocks - 1, 1) for i in range(num_blocks)]
