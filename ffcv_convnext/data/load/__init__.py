""".beton -> batches on the device."""

from ffcv_convnext.data.load.crops import RandomCropDecoder
from ffcv_convnext.data.load.loader import EvalLoader, SampleError, SampleLoader, TrainLoader
from ffcv_convnext.data.load.sampler import COPY, Shares
from ffcv_convnext.data.load.sources import ReadError

__all__ = [
    "COPY",
    "EvalLoader",
    "RandomCropDecoder",
    "ReadError",
    "SampleError",
    "SampleLoader",
    "Shares",
    "TrainLoader",
]
