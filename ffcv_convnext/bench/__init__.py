"""Side-by-side measurements.

A benchmark is imported when it runs: the contestants' processes import this package too, and must not pay for it.
"""

from __future__ import annotations

from typing import Protocol

from ffcv_convnext.bench.options import FolderOptions, StepOptions

__all__ = ["FolderOptions", "Result", "StepOptions", "run_folder_benchmark", "run_step_benchmark"]


class Result(Protocol):
    """A finished measurement."""

    def format(self) -> str:
        """Return the result as Markdown."""

    def to_json(self) -> str:
        """Return all figures as JSON."""


def run_folder_benchmark(name: str, options: FolderOptions) -> Result:
    """Run 'loader', 'cold', 'convert' or 'startup'."""
    match name:
        case "loader":
            from ffcv_convnext.bench.loader import bench_loader

            return bench_loader(options)
        case "cold":
            from ffcv_convnext.bench.cold_loader import bench_cold

            return bench_cold(options)
        case "convert":
            from ffcv_convnext.bench.convert import bench_convert

            return bench_convert(options)
        case "startup":
            from ffcv_convnext.bench.startup import bench_startup

            return bench_startup(options)
    raise ValueError(f"unknown benchmark '{name}'")


def run_step_benchmark(name: str, options: StepOptions) -> Result:
    """Run 'augment' or 'step'."""
    match name:
        case "augment":
            from ffcv_convnext.bench.augment import bench_augment

            return bench_augment(options)
        case "step":
            from ffcv_convnext.bench.train_step import bench_step

            return bench_step(options)
    raise ValueError(f"unknown benchmark '{name}'")
