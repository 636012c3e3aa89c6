"""Launches of Triton kernels, recorded instead of started, and their machine code for a GPU that need not be there."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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


@dataclass(frozen=True)
class MachineCode:
    """What the code of a kernel uses. stack: bytes a thread, where numbers lie that do not fit into registers."""

    registers: int
    stack: int
    instructions: list[str]

    @property
    def float64(self) -> list[str]:
        """Return the instructions that compute in float64 or convert to or from it."""
        return [each for each in self.instructions if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|MUFU\.\w+64H|\w+\.F64", each)]


def machine_code(launch: Launch, architecture: int, options: dict[str, Any], folder: Path) -> MachineCode:
    """Compile a launch's kernel for sm_<architecture>, as Triton compiles it at the launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants = {}, {}
    for name in launch.kernel.arg_names:
        value = launch.arguments[name]
        is_constant = launch.kernel.params[launch.kernel.arg_names.index(name)].is_constexpr or value is None
        if isinstance(value, Tensor):
            types[name] = f"*{_TYPES[value.dtype]}"
        elif is_constant:
            types[name], constants[name] = "constexpr", value
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if types[name].startswith("*")}
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    code = folder / "kernel.cubin"
    code.write_bytes(compiled.asm["cubin"])
    tools = triton.knobs.nvidia
    usage = subprocess.check_output([tools.cuobjdump.path, "-res-usage", str(code)], text=True)
    listing = subprocess.check_output([tools.nvdisasm.path, "-c", str(code)], text=True, stderr=subprocess.DEVNULL)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    instructions = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listing)
    assert "EXIT" in instructions
    return MachineCode(int(found[1]), int(found[2]), instructions)
