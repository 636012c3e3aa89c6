"""Machine code of a Triton kernel for a GPU that need not be there, and what it needs of a multiprocessor."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from typing import Any

SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024}  # of a multiprocessor, bytes
REGISTERS = 16384  # of each quarter of a multiprocessor, given out in eights for each thread of a warp


@dataclass(frozen=True)
class Machine:
    """A compiled kernel.

    registers: of a thread.   spilled: bytes of a thread that do not fit into them.   shared: bytes of a program.
    """

    registers: int
    spilled: int
    shared: int
    warps_each: int  # of a program
    architecture: int
    ptx: str
    cubin: bytes

    @property
    def warps(self) -> int:
        """How many fit on a multiprocessor, of 64."""
        of_registers = 4 * min(16, REGISTERS // (32 * -(-self.registers // 8) * 8))
        of_memory = SHARED_MEMORY[self.architecture] // (self.shared + 1024)
        return self.warps_each * min(of_registers // self.warps_each, 32, of_memory)

    @cached_property
    def instructions(self) -> list[str]:
        """The names of the instructions."""
        import triton

        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
            listing = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
        found = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listing)
        assert "EXIT" in found
        return found

    @property
    def float64(self) -> list[str]:
        """The instructions that compute in float64 or convert to or from it."""
        return [each for each in self.instructions if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|MUFU\.\w+64H|\w+\.F64", each)]

    def __str__(self) -> str:
        return f"{self.registers} registers, {self.spilled} bytes spilled, {self.shared} shared, {self.warps} warps"


def compile_kernel(kernel: Any, architecture: int, *, aligned: bool = True, **args: Any) -> Machine:
    """Compile for sm_<architecture>.

    args: for each of the kernel's arguments a type ("*bf16", "i32"), a constant or None; beside them options of Triton
    ("num_warps", "num_stages", "maxnreg").   aligned: pointers are, by 16 bytes, as torch's tensors.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    names = kernel.arg_names
    types = {name: args[name] if isinstance(args[name], str) else "constexpr" for name in names}
    constants = {name: args[name] for name in names if types[name] == "constexpr"}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if aligned and types[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    options = {"enable_fp_fusion": True, **{name: value for name, value in args.items() if name not in names}}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    cubin = compiled.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    assert found is not None, usage
    registers, spilled, shared = map(int, found.groups())
    shared = max(shared, compiled.metadata.shared)
    warps = options.get("num_warps", 4)
    return Machine(registers, spilled, shared, warps, architecture, compiled.asm["ptx"], cubin)
