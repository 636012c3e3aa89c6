"""Copies of a run's state in host memory, which a thread can write while training continues."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """Host memory for copies of a tree of tensors, used again for the next copy.

    Costs as much host memory as the tensors of the tree have; page-locked if they lie on a GPU.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def take(self, tree: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of `tree` (dicts, lists, tuples, tensors, plain values) that later steps do not change.

        It is complete on return, and valid until the next call. Tensors keep shape, dtype and strides.
        """
        used: dict[tuple[Any, ...], Tensor] = {}
        result: dict[str, Any] = self._copy(tree, (), used)
        if any(buffer.is_pinned() for buffer in used.values()):
            torch.cuda.synchronize()  # the copies from the GPU are queued only
        self._buffers = used  # memory of tensors that are gone is given back
        return result

    def _copy(self, value: Any, path: tuple[Any, ...], used: dict[tuple[Any, ...], Tensor]) -> Any:
        if isinstance(value, Tensor):
            value, buffer = value.detach(), self._buffers.get(path)
            layout = (value.shape, value.dtype, value.stride())
            if buffer is None or (buffer.shape, buffer.dtype, buffer.stride()) != layout:
                buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            used[path] = buffer.copy_(value, non_blocking=value.is_cuda)
            return buffer
        if isinstance(value, dict):
            result = copy.copy(value)  # a state_dict keeps its versions as an attribute
            for key, item in value.items():
                result[key] = self._copy(item, (*path, key), used)
            return result
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, (*path, number), used) for number, item in enumerate(value))
        return copy.deepcopy(value)
