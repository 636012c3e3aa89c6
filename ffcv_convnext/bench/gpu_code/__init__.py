"""`bench gpu-code`: the code of a training step for a GPU that need not be there, its bytes, launches and registers.

Inductor and Triton generate and compile for sm_80 or sm_90 in a process whose CUDA runtime does nothing; the host's
side runs on fake tensors, so that every launch is counted. No figure of it is a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ffcv_convnext.bench.gpu_code.report import LADDER_HEADER, NOTE, GpuCode, ladder_rows
from ffcv_convnext.bench.gpu_code.run import PHASES, GpuCodeOptions, generate
from ffcv_convnext.config import load_config

__all__ = [
    "LADDER_HEADER",
    "NOTE",
    "PHASES",
    "GpuCode",
    "GpuCodeOptions",
    "bench_gpu_code",
    "ladder_rows",
    "ladder_steps",
]


def bench_gpu_code(
    file: Path, options: GpuCodeOptions, *, kernels: Sequence[str], overrides: Mapping[str, Any] | None = None
) -> GpuCode:
    """Generate and count one step of the config in `file`.

    kernels: "torch", "triton" or both.   overrides: settings on top of the file's, e.g. batch_size.
    Raises ValueError for wrong settings, Failure if no code is generated.
    """
    configs = {each: load_config(file, overrides={**(overrides or {}), "kernels": each}) for each in kernels}
    paths = {}
    for each, config in configs.items():
        options.progress(f"generating {file.stem}, --kernels {each}")
        paths[each] = generate(config, options)
    data = next(iter(configs.values())).data
    versions = {name: version(name) for name in ("torch", "triton")}
    return GpuCode(file.stem, options.arch, data.batch_size, data.input_size, versions, paths)


def ladder_steps(folder: Path) -> list[Path]:
    """Return the files of the ladder's steps in a folder, in order. Raises ValueError if there are none."""
    files = [*sorted(folder.glob("[0-9]*.yaml")), *folder.glob("convnext_tiny.yaml")]
    if not files:
        raise ValueError(f"--ladder {folder}: no step found (00_NAME.yaml); give the folder rn_configs")
    return files
