"""Side-by-side measurements: ratios between interleaved runs on the same work."""

from ffcv_convnext.bench.convert import bench_convert
from ffcv_convnext.bench.loader import bench_loader
from ffcv_convnext.bench.rounds import Comparison

__all__ = ["Comparison", "bench_convert", "bench_loader"]
