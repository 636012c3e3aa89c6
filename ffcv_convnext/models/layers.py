"""Parts of the network: pointwise convolution, norms, activations, layer scale, a sequence of parts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution of stride 1: one matrix product over the channels for a channels_last input.

    x: (N, in_channels, H, W). Returns (N, out_channels, H, W), in channels_last memory if x is; the permutations are
    free views and nothing is copied. An input in another memory format is convolved as usual, in its own. Weight and
    bias are those of nn.Conv2d.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for x, as described above."""
        if not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        # permuted first, so that the weight's gradient gets the memory layout of a channels_last weight
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(x.permute(0, 2, 3, 1), weight, self.bias).permute(0, 3, 1, 2)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels at each position, eps 1e-6.

    x: (N, C, H, W). Returns the same shape in channels_last memory; for a channels_last input the permutations are
    free views and nothing is copied. Under autocast the data type is autocast's choice (float32 on CUDA).
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for x, as described above."""
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Float32LayerNorm2d(LayerNorm2d):
    """LayerNorm2d computed in float32, also under autocast; the result has the input's data type."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for x, as described above."""
        return super().forward(x.float()).to(x.dtype)


class LayerScale(nn.Module):
    """Multiply each channel by a learned number that starts at `initial` (Touvron et al. 2021, arXiv:2103.17239).

    x: (N, C, H, W). Returns the same shape; float32 under autocast, since the numbers are float32.
    """

    def __init__(self, num_channels: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((num_channels,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for x, as described above."""
        return x * self.gamma.view(-1, 1, 1)

    def extra_repr(self) -> str:
        """Return the number of channels, for printing."""
        return f"{len(self.gamma)}"


# A config's value -> constructor from the number of channels.
NORMS: Mapping[str, Callable[[int], nn.Module]] = {
    "bn": nn.BatchNorm2d,
    "ln": LayerNorm2d,
    "fp32ln": Float32LayerNorm2d,
}
ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {"relu": partial(nn.ReLU, inplace=True), "gelu": nn.GELU}


def sequence(parts: Mapping[str, nn.Module | None]) -> nn.Sequential:
    """Return the parts in order under their names, without those that are None."""
    return nn.Sequential(OrderedDict((name, part) for name, part in parts.items() if part is not None))
