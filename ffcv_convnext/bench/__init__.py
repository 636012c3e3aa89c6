"""Side-by-side measurements.

A benchmark is imported when it runs: the contestants' processes import this package too, and must not pay for it.
"""

from __future__ import annotations

from typing import Protocol

from ffcv_convnext.bench.options import FolderOptions, StepOptions

__all__ = ["FolderOptions", "Result", "StepOptions", "bench_folder", "bench_training"]


class Result(Protocol):
    """A finished measurement."""

    def format(self) -> str:
        """Return Markdown."""

    def to_json(self) -> str:
        """Return all figures as JSON."""


def bench_folder(name: str, options: FolderOptions) -> Result:
    """Run the benchmark 'loader', 'cold', 'convert' or 'startup'."""
    if name == "startup":
        from ffcv_convnext.bench.startup import bench_startup

        return bench_startup(options)
    if name == "loader":
        from ffcv_convnext.bench.loader import bench_loader as bench
    elif name == "cold":
        from ffcv_convnext.bench.cold_loader import bench_cold as bench
    else:
        from ffcv_convnext.bench.convert import bench_convert as bench
    return bench(options)


def bench_training(name: str, options: StepOptions) -> Result:
    """Run the benchmark 'augment', 'step', 'progressive' or 'checkpoint'."""
    if name == "checkpoint":
        from ffcv_convnext.bench.checkpoint import bench_checkpoint

        return bench_checkpoint(options)
    if name == "progressive":
        from ffcv_convnext.bench.progressive import bench_progressive

        return bench_progressive(options)
    if name == "augment":
        from ffcv_convnext.bench.augment import bench_augment

        return bench_augment(options)
    from ffcv_convnext.bench.train_step import bench_step

    return bench_step(options)
