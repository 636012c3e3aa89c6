"""Make an error of what lets the host wait for the device: values that are read, copies that are not asynchronous."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.nonzero_static, aten.masked_select}
READS |= {aten._unique, aten._unique2, aten.unique_dim, aten.repeat_interleave, aten.bincount}
READS_IN_PYTHON = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__}
MASKS = (torch.bool, torch.uint8)  # their elements are counted
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class HostWaits(AssertionError):
    """The host would wait for the device."""


class _Operators(TorchDispatchMode):
    def __init__(self, *, all_on_device: bool) -> None:
        super().__init__()
        self.all_on_device = all_on_device  # tensors on the CPU stand for those on a device, but for literals
        self.strict = True
        self.on_host = WeakIdKeyDictionary()  # literals
        self.pinned = WeakIdKeyDictionary()
        self.num_copies = 0

    def on_device(self, tensor: Tensor) -> bool:
        return tensor.is_cuda or (self.all_on_device and tensor not in self.on_host)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        operator = func.overloadpacket
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if self.strict and any(map(self.on_device, tensors)):
            indices = args[1] if operator in INDEXING else []
            if operator in READS or any(each is not None and each.dtype in MASKS for each in indices):
                raise HostWaits(f"{func} reads a tensor on the device")
        if operator is aten.record_stream:
            return None
        pin = kwargs.pop("pin_memory", False) or operator in (aten._pin_memory, aten.pin_memory)
        result = args[0].clone() if operator in (aten._pin_memory, aten.pin_memory) else func(*args, **kwargs)
        if operator is aten.lift_fresh:
            self.on_host[result] = True
        if pin or (func.is_view and args[0] in self.pinned):
            self.pinned.update((each, True) for each in tree_leaves(result))
        if operator is aten._to_copy:
            self._check_copy(args[0], result, kwargs.get("non_blocking", False))
        if operator is aten.copy_:
            self._check_copy(args[1], args[0], (*args, *kwargs.values())[2:] == (True,))
        return result

    def _check_copy(self, source: Tensor, target: Tensor, asynchronous: bool) -> None:
        if source.is_cuda == target.is_cuda or not self.strict:
            return
        if source.is_cuda:
            raise HostWaits(f"a tensor {tuple(source.shape)} is copied to the host")
        if not asynchronous or source not in self.pinned:
            what = "from pageable memory" if asynchronous else "and waited for"
            raise HostWaits(f"a tensor {tuple(source.shape)} is copied to the device {what}")
        self.num_copies += 1


class _Calls(TorchFunctionMode):
    def __init__(self, operators: _Operators) -> None:
        super().__init__()
        self.operators = operators

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operators = self.operators
        if func in READS_IN_PYTHON and operators.strict and operators.on_device(args[0]):
            raise HostWaits(f"{func.__name__} reads a tensor on the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waits(*, all_on_device: bool = False) -> Iterator[_Operators]:
    """Raise HostWaits if the host would wait for the device.

    all_on_device: tensors on the CPU stand for those on a device, except literals, which a run compares on the host.
    """
    with _Operators(all_on_device=all_on_device) as operators, _Calls(operators):
        yield operators


class _Stream(torch.Stream):
    def wait_stream(self, other: torch.Stream) -> None:
        """Return at once."""


class _Slices(TorchFunctionMode):
    """Slices and steps into a tensor by operators: Python's brackets ask the driver for the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        tensor, index = args
        parts = list(index) if isinstance(index, tuple) else [index]
        given = sum(each is not None and each is not Ellipsis for each in parts)
        parts = [p for each in parts for p in ([slice(None)] * (tensor.ndim - given) if each is Ellipsis else [each])]
        dim, indices = 0, []
        for each in parts:
            if isinstance(each, int):
                tensor, dim = tensor.select(dim, each), dim - 1
            elif each is None:
                tensor = tensor.unsqueeze(dim)
            elif isinstance(each, slice):
                tensor = aten.slice(tensor, dim, each.start, each.stop, each.step or 1)
            else:
                indices += [None] * (dim - len(indices)) + [each]
            dim += 1
        return aten.index(tensor, indices) if indices else tensor


@contextmanager
def fake_cuda(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `cuda` be a device of tensors without values, with one stream.

    Autograd needs a real device: gradients cannot be computed.
    """
    stream = _Stream(stream_id=0, device_index=0, device_type=1)
    patch.setattr(torch.cuda, "Stream", lambda _: stream)
    patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    patch.setattr(torch.cuda, "current_stream", lambda _: stream)
    with FakeTensorMode(allow_non_fake_inputs=True), _Slices():
        yield
