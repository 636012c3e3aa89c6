"""Machine code of a Triton kernel for a GPU that need not be there, and what it needs of a multiprocessor."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any, NamedTuple


class Resources(NamedTuple):
    """registers: of a thread.   spilled: bytes of a thread that do not fit into them.   shared: bytes of a program.

    warps: of the 64 that a multiprocessor can hold, with 65,536 registers and the given shared memory.
    """

    registers: int
    spilled: int
    shared: int
    warps: int


SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024}  # of a multiprocessor, bytes


def compile_kernel(kernel: Any, architecture: int, num_warps: int, num_stages: int = 3, **args: Any) -> Resources:
    """args: a type ("*bf16", "i32"), a constant or None for each argument of the kernel."""
    import triton
    from triton import JITFunction
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    while not isinstance(kernel, JITFunction):
        kernel = kernel.fn
    types = {name: args[name] if isinstance(args[name], str) else "constexpr" for name in kernel.arg_names}
    constants = {name: value for name, value in args.items() if not isinstance(value, str)}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if types[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    registers, spilled = map(int, found.groups())
    shared = compiled.metadata.shared
    of_a_warp = -(-registers // 8) * 8 * 32  # allocated by 256
    programs = min(65536 // (of_a_warp * num_warps), SHARED_MEMORY[architecture] // (shared + 1024), 64 // num_warps)
    return Resources(registers, spilled, shared, programs * num_warps)
