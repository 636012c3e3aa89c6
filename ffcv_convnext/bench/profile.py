"""Time of a step by part, and the limits of the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ffcv_convnext.bench.timing import repeat, synchronizer

AUGMENTATION, UPDATE = "augmentation", "optimiser and EMA"  # ranges in a step, see marked()
STEP = "whole step"
OF_DEPTHWISE = ("depthwise", "_convolve", "_weight_gradient")  # names of kernels, PyTorch's and ours
CONVOLUTION, DEPTHWISE, REST = "convolution", "depthwise convolution", "rest"
# In this order: a kernel that fuses several operations counts for the first part whose word is in its name.
WORDS = {
    "communication": ("nccl", "allreduce", "c10d", "gloo"),
    CONVOLUTION: ("conv", "depthwise", "fprop", "dgrad", "wgrad", "_weight_gradient"),
    "matrix products": ("::mm", "addmm", "bmm", "matmul", "linear", "gemm", "nvjet", "cutlass"),
    "norm": ("norm", "welford"),
    "activation": ("gelu", "relu", "threshold"),
    "compiled, parts unknown": ("torch-compiled", "compiledfunction", "inductor"),  # on a CPU
}


def marked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function wrapped so that all of its time counts for `part`."""

    def with_mark(*arguments: Any, **named: Any) -> Any:
        with record_function(part):
            return function(*arguments, **named)

    return with_mark


def profile_step(step: Callable[[], object], device: torch.device, *, num_steps: int = 3) -> dict[str, float]:
    """Return each part's percentage of the step's time, largest first; the sum is 100.

    On a GPU it is the time of its kernels, on a CPU the host's time, including Python's between operations.
    """
    wait = synchronizer(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    wait()
    with profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        for _ in range(num_steps):
            with record_function(STEP):
                step()
        wait()
    events = list(profiler.events() or ())
    times = _kernel_times(events) if device.type == "cuda" else _host_times(events)
    total = sum(times.values())
    return {part: 100 * time / total for part, time in times.most_common()}


def _host_times(events: Iterable[Any]) -> Counter[str]:
    times: Counter[str] = Counter()
    for event in events:
        if any(each.name == STEP for each in _ancestry(event)):
            times[_part(event.name, event)] += event.self_cpu_time_total
    return times


def _kernel_times(events: Iterable[Any]) -> Counter[str]:
    """Count each kernel for the operation that launched it, or by its own name if the profiler has no operation."""
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    annotations = {event.name for event in on_host if event.is_user_annotation} | {STEP, AUGMENTATION, UPDATE}
    times: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    for event in events:
        if event.device_type == DeviceType.CUDA and event.name not in annotations:
            unknown[event.name] += event.time_range.elapsed_us()
    for event in on_host:
        for kernel in event.kernels:
            if kernel.name not in annotations:
                times[_part(f"{event.name} {kernel.name}", event)] += kernel.duration
                unknown[kernel.name] -= kernel.duration
    for name, time in unknown.items():
        times[_part(name, None)] += max(time, 0)
    return times


def _ancestry(event: Any) -> Iterable[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _part(name: str, event: Any) -> str:
    for each in _ancestry(event):
        if each.name in (AUGMENTATION, UPDATE):
            return str(each.name)
    name = name.lower()
    part = next((part for part, words in WORDS.items() if any(word in name for word in words)), REST)
    if part == CONVOLUTION and (_is_depthwise(event) or any(word in name for word in OF_DEPTHWISE)):
        return DEPTHWISE
    return part


def _is_depthwise(event: Any) -> bool:
    """Check for depthwise weights (C, 1, k, k) in the arguments, without the first: it may be an image's gradient."""
    shapes = [] if event is None else [shape for shape in event.input_shapes[1:] if len(shape) == 4]
    return any(shape[1] == 1 and shape[2] > 1 for shape in shapes)


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sum of the bytes of every tensor that an operation reads or writes; views are free."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = func._schema
        if func.is_view or "empty" in schema.name or "detach" in schema.name:
            return result
        given = dict(zip([argument.name for argument in schema.arguments], args, strict=False)) | kwargs
        for argument in schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            self.bytes += (1 + written) * _num_bytes(given.get(argument.name))
        if not any(each.alias_info is not None for each in schema.returns):
            self.bytes += _num_bytes(result)
        return result


def _num_bytes(values: Any) -> int:
    tensors: list[Tensor] = [each for each in tree_leaves(values) if isinstance(each, Tensor)]
    total: int = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total


def step_bytes(step: Callable[[], object]) -> int:
    """Return the bytes that the operations of an eager step read and write, without any cache between two of them."""
    counted = _Traffic()
    with counted:
        step()
    return counted.bytes


def ceilings(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> dict[str, float]:
    """Measure flops_per_s of a large matrix product in `dtype`, and bytes_per_s (read and written) of a copy."""
    wait = synchronizer(device)
    side, num = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 28)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(num, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def product() -> int:
        torch.mm(a, b)
        return 2 * side**3

    def copy() -> int:
        target.copy_(source)
        return 2 * num

    found = {}
    for name, work in (("flops_per_s", product), ("bytes_per_s", copy)):
        work()
        timed = repeat(work, seconds, wait)
        found[name] = timed.images / timed.seconds
    return found
