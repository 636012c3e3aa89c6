"""Launches of Triton kernels, recorded instead of started, and their machine code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from support.ptx import Machine, compile_kernel
from torch import Tensor

_TYPES = {
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64", torch.float32: "fp32", torch.bfloat16: "bf16",
    torch.float16: "fp16",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch: a kernel, the number of programs, and each argument by name."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Size of all tensors among the arguments: what a kernel moves that reads or writes each value once."""
        tensors = {id(each): each for each in self.arguments.values() if isinstance(each, Tensor)}
        return sum(each.nbytes for each in tensors.values())


@dataclass
class Recorder:
    """Takes the place of augment.kernels.launch.launch."""

    launches: list[Launch]

    def __call__(self, kernel: Any, programs: int, _: Tensor, *args: Any, **constants: Any) -> None:
        """Record a launch."""
        names = kernel.arg_names
        self.launches.append(Launch(kernel, programs, {**dict(zip(names, args, strict=False)), **constants}))


def machine_code(launch: Launch, architecture: int, options: dict[str, Any]) -> Machine:
    """Compile a launch's kernel for sm_<architecture>, as Triton compiles it at the launch."""
    kernel, given = launch.kernel, {}
    for name, parameter in zip(kernel.arg_names, kernel.params, strict=True):
        value = launch.arguments[name]
        if isinstance(value, Tensor):
            given[name] = f"*{_TYPES[value.dtype]}"
        elif parameter.is_constexpr or value is None:
            given[name] = value
        else:
            given[name] = "fp32" if isinstance(value, float) else "i32"
    return compile_kernel(kernel, architecture, **given, **options)
