"""Start the process that generates the code, and collect its figures."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ffcv_convnext.bench.gpu_code.fake_device import ARCHITECTURES
from ffcv_convnext.config import Config
from ffcv_convnext.errors import Failure

PHASES = ("augmentation", "forward", "backward", "optimiser + EMA")
Figures = dict[str, dict[str, Any]]  # phase -> error, launches, kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuCodeOptions:
    """What to generate. compile: kernels to machine code too, which takes minutes.

    Raises ValueError for an unknown architecture, or if the machine lacks what it takes.
    """

    arch: str = "sm_90"
    compile: bool = True
    phases: tuple[str, ...] = PHASES
    debug: bool = False  # the process ends with a traceback at the first error
    progress: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"arch = {self.arch}: expected one of {', '.join(ARCHITECTURES)}")
        unknown = [each for each in self.phases if each not in PHASES]
        if unknown or not self.phases:
            raise ValueError(f"phases = {', '.join(unknown)}: expected some of {', '.join(PHASES)}")
        check_tools()


def check_tools() -> None:
    """Raise ValueError, in one line, if torch has no CUDA, or Triton or a C compiler is not installed."""
    if torch.version.cuda is None:
        raise ValueError(
            f"bench gpu-code generates CUDA code, and torch {torch.__version__} was built without CUDA; install "
            "torch's CUDA version, which needs no GPU"
        )
    if find_spec("triton") is None:
        raise ValueError("bench gpu-code compiles with Triton's ptxas: the package triton is not installed; install it")
    compiler()


def compiler() -> list[str]:
    """Return the command of a C compiler. Raises ValueError if there is none."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    for name in ("gcc", "clang", "cc"):
        if shutil.which(name):
            return [name]
    raise ValueError("bench gpu-code needs a C compiler: install gcc or clang, or name another one in CC")


def generate(config: Config, options: GpuCodeOptions) -> Figures:
    """Return the figures of each phase of a step of the config.

    config.run.kernels selects the kernels.   Raises Failure if the process ends without a result, e.g. at a Triton
    kernel with a matrix product that counting.py does not know.
    """
    with tempfile.TemporaryDirectory(prefix="gpu-code-") as temporary:
        folder = Path(temporary)
        library = build_runtime(folder, options.arch)
        request = {
            "config": config.replace(update_freq=1).flat(),
            "arch": options.arch,
            "phases": options.phases,
            "compile": options.compile,
            "debug": options.debug,
        }
        (folder / "request.json").write_text(json.dumps(request, default=str))
        command = [sys.executable, "-m", f"{__package__}.capture", str(folder / "request.json")]
        process = subprocess.run(
            [*command, str(folder / "result.json")],
            env=environment_of(folder, library),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        if process.returncode or not (folder / "result.json").exists():
            lines = [line for line in process.stderr.splitlines() if line.strip()] or ["no message"]
            text = process.stderr if options.debug else lines[-1]
            ending = f"status {process.returncode}: {text}"
            if process.returncode < 0:  # the last line is then anything, e.g. a warning
                ending = f"{signal.Signals(-process.returncode).name}; --debug shows where"
            raise Failure(f"bench gpu-code: code generation ended with {ending}")
        found: Figures = json.loads((folder / "result.json").read_text())
    return found


def environment_of(folder: Path, library: Path) -> dict[str, str]:
    """Return the environment of the process: `library` comes before the real runtime; caches lie in `folder`."""
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")])),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    environment.pop("TRITON_INTERPRET", None)
    return environment


def build_runtime(folder: Path, arch: str) -> Path:
    """Compile the CUDA runtime and driver that do nothing into `folder`; return the library.

    Raises Failure if the compiler fails.
    """
    source = folder / "runtime.c"
    source.write_text(files("ffcv_convnext.bench.gpu_code").joinpath("runtime.c").read_text())
    library = folder / "libcuda.so.1"
    device = ARCHITECTURES[arch]
    command = [
        *compiler(), "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1",
        f"-DMAJOR={device['major']}", f"-DMINOR={device['minor']}",
        f"-DMULTIPROCESSORS={device['multi_processor_count']}", str(source), "-o", str(library),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise Failure(f"bench gpu-code: {shlex.join(command[:1])} could not compile {source.name}: {lines[-1]}")
    return library
