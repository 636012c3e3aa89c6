"""Side-by-side measurements.

Names are imported when first used: a contestant that is measured must not pay for the others' imports.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffcv_convnext.bench.augment import bench_augment as bench_augment
    from ffcv_convnext.bench.cold_loader import bench_cold as bench_cold
    from ffcv_convnext.bench.compare import Comparison as Comparison
    from ffcv_convnext.bench.convert import bench_convert as bench_convert
    from ffcv_convnext.bench.loader import bench_loader as bench_loader
    from ffcv_convnext.bench.startup import bench_startup as bench_startup
    from ffcv_convnext.bench.train_step import bench_step as bench_step

_HOMES = {
    "Comparison": "compare",
    "bench_augment": "augment",
    "bench_cold": "cold_loader",
    "bench_convert": "convert",
    "bench_loader": "loader",
    "bench_startup": "startup",
    "bench_step": "train_step",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
