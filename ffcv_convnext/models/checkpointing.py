"""Gradient checkpointing: activations of a block are computed again in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def checkpoint_gradients(model: nn.Module, name: str) -> None:
    """Let `model` compute its blocks again in the backward pass, in place, by timm's interface for it.

    Raises ValueError, with the model's name, if it does not support this.
    """
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError):  # timm's answer, and that of a model without the interface
        raise ValueError(
            f"grad_checkpointing = true does not support model = {name}; use --grad_checkpointing false"
        ) from None


def batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers of a network."""
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


@contextmanager
def fixed_statistics(network: nn.Module) -> Iterator[None]:
    """Leave BatchNorm's running statistics as they are: for a backward pass, which computes blocks again.

    BatchNorm still normalises with the statistics of its batch in training.
    """
    norms = batch_norms(network)
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None  # the share of the batch, and no counter
        yield
    finally:
        for norm, (momentum, number) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, number
