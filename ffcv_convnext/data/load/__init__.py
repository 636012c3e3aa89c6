""".beton -> batches on the device. Imports torch and numba."""

from ffcv_convnext.data.load.crops import CropKernel, center_crop_kernel, random_crop_kernel
from ffcv_convnext.data.load.decoder import BatchDecoder, SampleError
from ffcv_convnext.data.load.device import Batch
from ffcv_convnext.data.load.loader import EvalLoader, TrainLoader
from ffcv_convnext.data.load.sampler import GlobalBatchSampler, Samples
from ffcv_convnext.data.load.sources import ReadError
from ffcv_convnext.data.load.staging import NoRoom, Staged, planned_place, room_in, stage_data, staging_root

__all__ = [
    "Batch",
    "BatchDecoder",
    "CropKernel",
    "EvalLoader",
    "GlobalBatchSampler",
    "NoRoom",
    "ReadError",
    "SampleError",
    "Samples",
    "Staged",
    "TrainLoader",
    "center_crop_kernel",
    "planned_place",
    "random_crop_kernel",
    "room_in",
    "stage_data",
    "staging_root",
]
