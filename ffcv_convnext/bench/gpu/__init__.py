"""`bench gpu`: the first minutes on a GPU that has never run the project: stages in processes, one report."""

from __future__ import annotations

from ffcv_convnext.bench.gpu.choice import choice_row, describe_row, merge_row
from ffcv_convnext.bench.gpu.report import to_markdown
from ffcv_convnext.bench.gpu.runner import STAGES, GpuOptions, bench_gpu

__all__ = ["STAGES", "GpuOptions", "bench_gpu", "choice_row", "describe_row", "merge_row", "to_markdown"]
