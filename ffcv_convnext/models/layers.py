"""The small parts of the network: norms, activations, layer scale, and a sequence of named parts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels at each position, eps 1e-6.

    x: (N, C, H, W). Returns the same shape in channels_last memory; for a channels_last input the permutations are
    free views and nothing is copied. Under autocast the data type is autocast's choice (float32 on CUDA).
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Float32LayerNorm2d(LayerNorm2d):
    """LayerNorm2d computed in float32 whatever autocast does; the result has the input's data type again."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class LayerScale(nn.Module):
    """Multiply each channel by a learned number that starts at `initial` (Touvron et al. 2021, arXiv:2103.17239).

    x: (N, C, H, W). Returns the same shape; float32 under autocast, since the numbers are float32.
    """

    def __init__(self, num_channels: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((num_channels,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.view(-1, 1, 1)

    def extra_repr(self) -> str:
        return f"{len(self.gamma)}"


# A config's word -> what it builds, from the number of channels.
NORMS: Mapping[str, Callable[[int], nn.Module]] = {
    "bn": nn.BatchNorm2d,
    "ln": LayerNorm2d,
    "fp32ln": Float32LayerNorm2d,
}
ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {"relu": partial(nn.ReLU, inplace=True), "gelu": nn.GELU}


def sequence(parts: Mapping[str, nn.Module | None]) -> nn.Sequential:
    """The parts one after the other, under their names; None stands for a part that is not there."""
    return nn.Sequential(OrderedDict((name, part) for name, part in parts.items() if part is not None))
