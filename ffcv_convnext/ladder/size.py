"""Parameters and multiply-accumulates of the ladder's networks, counted from their settings without building them.

The counting mirrors the constructors in models/resnet.py; a test compares it with the built networks.
"""

from __future__ import annotations

from ffcv_convnext.config import ModelConfig

EXPANSION = 4  # wide / narrow width of a block


class _Counter:
    """Sums over layers. Sides are those of square feature maps, in pixels."""

    def __init__(self) -> None:
        self.parameters = 0
        self.macs = 0

    def conv(self, width_in: int, width_out: int, kernel: int, side: int, *, bias: bool, groups: int = 1) -> None:
        """Add a convolution with an output of `side` x `side`."""
        weights = width_in // groups * kernel**2 * width_out
        self.parameters += weights + width_out * bias
        self.macs += weights * side**2

    def norm(self, width: int) -> None:
        """Add a BatchNorm or LayerNorm: weight and bias."""
        self.parameters += 2 * width


def count_resnet(config: ModelConfig, input_size: int, num_classes: int) -> tuple[int, int]:
    """Return parameters and multiply-accumulates (convolutions and linear layers) of a `resnet` network.

    input_size: side of the square image, pixels.
    """
    total = _Counter()
    side = _count_stem(total, config, input_size)
    width_in = config.resnet_embed_dim
    for stage, num_blocks in enumerate(config.resnet_layers):
        width = config.resnet_embed_dim * 2**stage
        out = width if config.resnet_block == "inverted" else EXPANSION * width
        stride = 1 if stage == 0 else 2
        if stage > 0 and config.resnet_sep_downsample:
            side //= 2
            total.conv(width_in, out, 2, side, bias=True)
            if config.resnet_ds_norm != "none":
                total.norm(width_in if config.resnet_ds_norm == "pre" else out)
            width_in, stride = out, 1
        for _ in range(num_blocks):
            side = _count_block(total, config, width_in, width, side, stride)
            width_in, stride = out, 1
    if config.resnet_final_norm:
        total.norm(width_in)
    total.conv(width_in, num_classes, 1, 1, bias=True)  # the head
    return total.parameters, total.macs


def _count_stem(total: _Counter, config: ModelConfig, side: int) -> int:
    """Return the side of the stem's output."""
    width = config.resnet_embed_dim
    if config.resnet_stem == "patch_embed":
        side //= 4
        total.conv(3, width, 4, side, bias=True)
        if config.resnet_stem_norm:
            total.norm(width)
        return side
    side = (side + 1) // 2
    total.conv(3, width, 7, side, bias=False)
    total.norm(width)
    return (side + 1) // 2  # the pooling


def _count_block(total: _Counter, config: ModelConfig, width_in: int, width: int, side: int, stride: int) -> int:
    """Return the side of the block's output."""
    inverted = config.resnet_block == "inverted"
    hidden, out = (EXPANSION * width, width) if inverted else (width, EXPANSION * width)
    bias = inverted and config.resnet_norm_layer != "bn"
    spatial = width_in if config.resnet_conv_first else hidden
    side_out = (side + stride - 1) // stride
    groups = spatial if config.resnet_depthwise else 1
    total.conv(spatial, spatial, config.resnet_kernel_size, side_out, bias=bias, groups=groups)
    total.conv(width_in, hidden, 1, side_out if config.resnet_conv_first else side, bias=bias)
    total.conv(hidden, out, 1, side_out, bias=bias)
    if config.resnet_pre_norm:
        total.norm(width_in)
    total.norm(spatial if config.resnet_conv_first else hidden)  # after the first convolution
    if not config.resnet_reorg_norm:
        total.norm(hidden)
        total.norm(out)
    if config.resnet_ls_init_values > 0:
        total.parameters += out
    if stride != 1 or width_in != out:
        total.conv(width_in, out, 1, side_out, bias=False)
        total.norm(out)
    return side_out
