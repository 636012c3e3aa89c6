"""Side-by-side measurements: ratios between interleaved runs on the same work."""

from ffcv_convnext.bench.loader import bench_loader
from ffcv_convnext.bench.rounds import Comparison
from ffcv_convnext.bench.startup import bench_startup

__all__ = ["Comparison", "bench_loader", "bench_startup"]
