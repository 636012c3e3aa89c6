"""Compile kernels for a GPU that need not be there; read registers, spills and instructions from the code."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ffcv_convnext.bench.gpu_code.counting import OwnKernel


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel's machine code in one configuration.

    registers: of a thread.   spilled_bytes: of a thread's stack, where values lie that did not fit into registers.
    shared_bytes: of a program.   float64: instructions on 64-bit floating point numbers.
    """

    name: str
    kind: str  # inductor, own
    config: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    float64: int


def compile_phase(sources: Mapping[str, str], own: Iterable[OwnKernel], folder: Path) -> list[Compiled]:
    """Compile a phase's kernels, each in every configuration that could be chosen.

    sources: modules of inductor's kernels, by name.   folder: for temporary files.
    """
    found: list[Compiled] = []
    for name, source in sources.items():
        file = folder / f"{name}.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kernel = getattr(module, name)
        for config in kernel.configs:
            binary = kernel._precompile_config(config).kernel
            found.append(read_code(name, "inductor", f"{config.kwargs}", config.num_warps, binary, folder))
    for each in own:
        for options in each.options:
            binary = compile_own(each, options)
            shown = {k: v for k, v in options.items() if k in each.function.arg_names}
            found.append(read_code(each.name, "own", f"{shown}", binary.metadata.num_warps, binary, folder))
    return found


def compile_own(kernel: OwnKernel, options: Mapping[str, Any]) -> Any:
    """Compile one of the package's kernels with the arguments of a launch; pointers are aligned to 16 bytes."""
    from triton.runtime.jit import MockTensor

    args = {k: MockTensor(v) if isinstance(v, torch.dtype) and k not in options else v for k, v in kernel.args.items()}
    return kernel.function.run(grid=(1,), warmup=True, **(args | dict(options)))


def read_code(name: str, kind: str, config: str, warps: int, binary: Any, folder: Path) -> Compiled:
    """Return what the machine code of a compiled Triton kernel needs."""
    from triton import knobs

    code = folder / "kernel.cubin"
    code.write_bytes(binary.asm["cubin"])
    usage = subprocess.check_output([knobs.nvidia.cuobjdump.path, "-res-usage", str(code)], text=True)
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert numbers is not None, usage
    text = subprocess.check_output([knobs.nvidia.nvdisasm.path, "-c", str(code)], text=True)
    return Compiled(
        name=name,
        kind=kind,
        config=config,
        warps=int(warps),
        registers=int(numbers[1]),
        spilled_bytes=int(numbers[2]),
        shared_bytes=int(binary.metadata.shared),
        float64=num_float64(text),
    )


def num_float64(assembly: str) -> int:
    """Count float64 instructions in a listing of nvdisasm: DADD, DMUL, DFMA, DSETP, DMMA, conversions."""
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", assembly)
    names = Counter(lines)
    return sum(n for name, n in names.items() if re.match(r"D(ADD|MUL|FMA|SETP|MMA|MNMX)\b", name) or ".F64" in name)
