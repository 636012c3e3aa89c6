"""Run each stage in a separate process with a time limit, the riskiest first; a failed one does not stop the others.

A GPU is often lent for minutes, on a machine without network, ffcv or pytest. So every figure is on disk as soon as it
is measured, and a stage that fails, hangs or lacks a package leaves its reason and the others go on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ffcv_convnext.errors import PACKAGE
from ffcv_convnext.files import write_atomically

VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}  # folders of compiled code

STAGES = {  # name -> seconds at most on a GPU; together at most nine minutes
    "facts": 25,
    "eager": 30,
    "augment": 70,
    "augment_triton": 20,
    "step": 110,  # the first step alone may take 90 s
    "step_triton": 70,
    "update": 15,
    "kernels": 40,
    "nccl": 15,
    "peers": 50,
    "resume": 30,
    "loader": 30,
    "ladder": 35,
}
COMMAND = (sys.executable, "-m", "ffcv_convnext.bench.gpu.stages")  # name, device and folder follow
CPU_FACTOR: float = 6  # a CPU needs longer, also for the small shapes it gets
RN_CONFIGS = PACKAGE.parent / "rn_configs"
RESULT = "RESULT "  # before a line of JSON on a stage's stdout
TAIL = 1500  # characters of a failed stage's output in the report
Status = Literal["ok", "failed", "timeout", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuOptions:
    """What to run and where its files go."""

    out: Path  # gpu.json, gpu.md, STAGE.log, and what the stages write
    device: Literal["cuda", "cpu"] = "cuda"  # cpu: try all of it with small shapes
    stages: Sequence[str] = tuple(STAGES)
    minutes: float = 9.0  # stages that would start later are left out
    wheels: Path | None = None  # packages that the machine lacks, such as ffcv, to unpack into `out`
    progress: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.stages if name not in STAGES]:
            raise ValueError(f"stages = {unknown[0]}: expected some of {', '.join(STAGES)}")
        if not self.minutes > 0:
            raise ValueError(f"minutes = {self.minutes:g}: expected a number > 0")
        if self.wheels is not None and not list(self.wheels.glob("*.whl")):
            raise FileNotFoundError(f"wheels = {self.wheels}: no .whl file found in this folder")


def bench_gpu(options: GpuOptions) -> dict[str, Any]:
    """Run the stages and return all figures; gpu.json in `out` holds them after every stage.

    Raises ValueError if there is no GPU to measure, or no ladder beside the package.
    """
    if not RN_CONFIGS.is_dir():
        raise ValueError(f"bench gpu: {RN_CONFIGS} not found; run it in a checkout of the project")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError(
                "bench gpu: torch finds no CUDA device; on a machine without one, try it with --device cpu"
            )
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = [str(PACKAGE.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    if options.wheels is not None:
        _unpack(sorted(options.wheels.glob("*.whl")), out / "packages")
        path.append(str(out / "packages"))
    found: dict[str, Any] = {"device": options.device, "stages": {}}
    started = time.monotonic()
    for name in options.stages:
        left = 60 * options.minutes - (time.monotonic() - started)
        limit = STAGES[name] if options.device == "cuda" else CPU_FACTOR * STAGES[name]
        if left < 10:
            found["stages"][name] = {"status": "skipped", "reason": f"the {options.minutes:g} minutes are over"}
        else:
            found["stages"][name] = _run(
                name, options.device, out, min(limit, left), os.pathsep.join(filter(None, path))
            )
        stage = found["stages"][name]
        options.progress(f"{name}: {stage['status']}{_because(stage)}, {stage.get('seconds', 0):.0f} s")
        write_atomically(out / "gpu.json", (json.dumps(found, indent=2) + "\n").encode())
    return found


def _because(stage: dict[str, Any]) -> str:
    return f" ({stage['reason']})" if "reason" in stage else ""


def _unpack(wheels: Sequence[Path], target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
    done = subprocess.run([*command, "--target", target, *wheels], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"the wheels cannot be unpacked: {' '.join(done.stderr.split())[-300:]}")


def _empty_caches(name: str, out: Path) -> dict[str, str]:
    """Return variables that give the compiled steps empty caches, so that their first step is a first one."""
    if not name.startswith("step"):
        return {}
    folder = out / f"compiled_{name}"
    shutil.rmtree(folder, ignore_errors=True)
    return {variable: str(folder / part) for variable, part in VARIABLES.items()}


def _run(name: str, device: str, out: Path, limit: float, path: str) -> dict[str, Any]:
    """Run one stage; return status, seconds, figures, and the reason if it did not end well."""
    log = out / f"{name}.log"
    started = time.monotonic()
    reason: str | None = None
    status: Status = "ok"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*COMMAND, name, device, str(out)],
            env={**os.environ, **_empty_caches(name, out), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a limit ends the stage's own children too
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            status, reason = "timeout", f"more than {limit:.0f} s"
        else:
            if code:
                status, reason = "failed", f"exit status {code}"
    lines = log.read_text(errors="replace").splitlines()
    figures = [json.loads(line[len(RESULT) :]) for line in lines if line.startswith(RESULT)]
    skipped = next((each["skipped"] for each in figures if "skipped" in each), None)
    if status == "ok" and skipped is not None:
        status, reason, figures = "skipped", skipped, []
    stage: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - started, 1), "figures": figures}
    if reason is not None:
        stage["reason"] = reason
    if status in ("failed", "timeout"):
        stage["output"] = "\n".join(line for line in lines if not line.startswith(RESULT))[-TAIL:]
    return stage
