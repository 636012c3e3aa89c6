"""Copy batches to the device: the one place where a loader's images reach the GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]


class DeviceTransfer:
    """Host buffers for batches, and their copy to the device.

    On a GPU the buffers are pinned, and copies run on a separate stream, beside the computation. On a CPU a batch
    stays where it was decoded.

    Pinned buffers are used again, by torch's caching host allocator (ATen/core/CachingHostAllocator.h): `.to` with
    non_blocking notes its stream at the buffer; when the last reference goes, the allocator records an event on that
    stream; and an allocation first asks, without waiting, which events have passed and takes one of their buffers. Only
    if none is free does it pin new memory. So there are as many buffers as batches are decoded or copied at a time, and
    after the first of them nothing is pinned any more. A ring of our own would do the same.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised host tensor, pinned for a GPU."""
        return torch.empty(shape, dtype=dtype, pin_memory=self._stream is not None)

    def __call__(self, images: Tensor, labels: Tensor) -> Batch:
        """Return a batch on the device, without waiting for the copy.

        images: (n, size, size, 3) uint8 from `empty`.   labels: (n,) int64 from `empty`.
        Returns images (n, 3, size, size) uint8 in channels_last memory, and labels.
        """
        images = images.permute(0, 3, 1, 2)
        if self._stream is None:
            return images, labels
        with torch.cuda.stream(self._stream):
            images = images.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for tensor in (images, labels):
            tensor.record_stream(current)
        return images, labels
