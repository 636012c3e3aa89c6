"""The contestants of `bench loader` and `bench cold`: each loads training batches in its own documented way.

The work is the same for all: random resized crop to 224 (8 to 100 % of the area, aspect 3:4 to 4:3), horizontal flip
of every other image, batches of 128 uint8 images in memory. The resize is the recipe's, antialiased bicubic, or the
contestant's nearest one, which the name of its row gives.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

from ffcv_convnext.bench.compare import Contestant, Timed, first_result, imports_done
from ffcv_convnext.host import evict

SIZE, BATCH = 224, 128
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
DALI_AHEAD = 2  # batches, DALI's default


def _all_batches(loader: Any) -> Contestant:
    return lambda: sum(len(batch[0]) for batch in loader), lambda: next(iter(loader))


def _counted(batches: Iterable[Sized]) -> int:
    """Return the number of images, for a loader that cannot be left after its first batch."""
    images = 0
    for batch in batches:
        first_result()
        images += len(batch)
    return images


# --- .beton files -----------------------------------------------------------------------------------------


def ours(beton: str, num_workers: int, interpolation: str, check_pages: bool = False) -> Contestant:
    """Load with our loader, without the manifest that TrainLoader needs: from stock FFCV's file too.

    check_pages: each round is like the first epoch of a run, in which check_data first_read checks every page.
    """
    import torch

    from ffcv_convnext.config import Config
    from ffcv_convnext.data.beton import Manifest
    from ffcv_convnext.data.load import BatchDecoder, GlobalBatchSampler, random_crop_kernel

    imports_done()
    config = Config.from_flat({"input_size": SIZE, "train_interpolation": interpolation}).data
    loader = BatchDecoder(
        Path(beton), random_crop_kernel(config), num_workers=num_workers, batches_ahead=3, device=torch.device("cpu")
    )
    sampler = GlobalBatchSampler(BATCH, 1, 1)
    epochs = iter(range(1 << 30))
    page_crc32 = Manifest.for_beton(Path(beton)).page_crc32 if check_pages else ()

    def work() -> int:
        epoch = next(epochs)
        loader.check_pages(page_crc32)
        return sum(
            len(images) for images, _ in loader.batches(sampler.micro_batches(len(loader), 0, epoch, 0), 0, epoch)
        )

    return work, lambda: next(iter(loader.batches(sampler.micro_batches(len(loader), 0, 0, 0), 0, 0)))


def stock_ffcv(beton: str, num_workers: int) -> Contestant:
    """Load with FFCV's own Loader."""
    from ffcv_convnext.bench.stock_ffcv import stock_train_loader

    imports_done()
    loader = stock_train_loader(Path(beton), size=SIZE, batch_size=BATCH, num_workers=num_workers)

    # An epoch that is left early leaks a thread and its memory.
    return lambda: _counted(images for images, _ in loader), None


# --- .beton files that are not in memory ------------------------------------------------------------------


def cold_stock(beton: str, num_workers: int) -> Contestant:
    """Evict the file, then load an epoch with FFCV's own Loader."""
    work, _ = stock_ffcv(beton, num_workers)

    def cold() -> int | Timed:
        evict(Path(beton))
        return work()

    return cold, None


def cold_ours(
    folder: str, num_workers: int, data_cache: Any = "os", order: Any = "random", warm: bool = False
) -> Contestant:
    """Evict the file unless `warm`, then load an epoch; with order quasi_random in four windows."""
    import torch

    from ffcv_convnext.config import Config
    from ffcv_convnext.data.load import TrainLoader

    imports_done()
    beton = Path(folder) / "train.beton"
    config = Config.from_flat(
        {
            "data_path": folder,
            "input_size": SIZE,
            "batch_size": BATCH,
            "num_workers": num_workers,
            "data_cache": data_cache,
            "order": order,
            "shuffle_window_mb": max(1, beton.stat().st_size // 1_000_000 // 4),
        }
    ).data
    loader = TrainLoader(config, torch.device("cpu"), seed=0)
    epochs = iter(range(1 << 30))

    def work() -> int:
        if not warm:
            evict(beton)
        return sum(len(images) for step in loader.steps(next(epochs)) for images, _ in step)

    return work, lambda: next(batch for step in loader.steps(0) for batch in step)


# --- Folders and tar files of JPEGs -----------------------------------------------------------------------


def _pil_transform() -> Any:
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, SCALE, RATIO, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )


def torchvision_pil(folder: str, num_workers: int) -> Contestant:
    """Load with torch's DataLoader and torchvision's transforms of PIL images."""
    from torch.utils.data import DataLoader
    from torchvision import datasets

    transform = _pil_transform()
    imports_done()
    dataset = datasets.ImageFolder(folder, transform)
    return _all_batches(
        DataLoader(dataset, BATCH, shuffle=True, num_workers=num_workers, drop_last=True, persistent_workers=True)
    )


def timm_loader(folder: str, num_workers: int) -> Contestant:
    """Load with timm's loader, without its prefetcher: that normalises, on the device."""
    import torch
    from timm.data import create_dataset, create_loader

    imports_done()
    loader = create_loader(
        create_dataset("", root=folder),
        input_size=(3, SIZE, SIZE),
        batch_size=BATCH,
        is_training=True,
        no_aug=False,
        scale=SCALE,
        ratio=RATIO,
        hflip=0.5,
        color_jitter=None,
        interpolation="bicubic",
        num_workers=num_workers,
        use_prefetcher=True,
        device=torch.device("cpu"),
        persistent_workers=True,
    )
    return _all_batches(loader.loader)


def dali(folder: str, num_workers: int) -> Contestant:
    """Load with NVIDIA DALI without a GPU: decoding fused with the crop, antialiased resize.

    DALI continues to decode after the end of an epoch; these first batches of the next epoch do not count.
    """
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIClassificationIterator, LastBatchPolicy

    imports_done()

    @pipeline_def(batch_size=BATCH, num_threads=num_workers, device_id=None, prefetch_queue_depth=DALI_AHEAD)  # type: ignore[untyped-decorator]
    def pipeline() -> Any:
        jpegs, labels = fn.readers.file(file_root=folder, random_shuffle=True, name="files")
        crops = fn.decoders.image_random_crop(
            jpegs, device="cpu", random_area=list(SCALE), random_aspect_ratio=list(RATIO)
        )
        images = fn.resize(crops, resize_x=SIZE, resize_y=SIZE, interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    loader = DALIClassificationIterator(
        pipeline(), reader_name="files", last_batch_policy=LastBatchPolicy.DROP, auto_reset=True
    )

    def work() -> int:
        images = _counted(batch[0]["data"] for batch in loader) - DALI_AHEAD * BATCH
        if images <= 0:
            raise ValueError(f"num_images: DALI needs at least {(DALI_AHEAD + 1) * BATCH} here")
        return images

    return work, None


def webdataset(shards: str, num_workers: int) -> Contestant:
    """Read tar files in turn with DataLoader workers, shuffle among 1000 images, decode with Pillow."""
    import webdataset
    from torch.utils.data import DataLoader

    transform = _pil_transform()
    imports_done()
    files = sorted(map(str, Path(shards).glob("*.tar")))
    dataset = (
        webdataset.WebDataset(files, shardshuffle=len(files))
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, int)
    )
    return _all_batches(DataLoader(dataset, BATCH, num_workers=num_workers, persistent_workers=True))


def spdl(folder: str, num_workers: int) -> Contestant:
    """Load with SPDL's threads around FFmpeg: decode, then crop, scale and flip as one filter graph per image."""
    import spdl.io
    import torch
    from spdl.pipeline import PipelineBuilder
    from torchvision.transforms import RandomResizedCrop

    files = [str(file) for file in sorted(Path(folder).rglob("*")) if file.is_file()]
    spdl.io.to_torch  # noqa: B018  loads FFmpeg
    imports_done()

    def shuffled() -> Iterator[str]:
        yield from random.sample(files, len(files))

    def decode(file: str) -> Any:
        packets = spdl.io.demux_image(file)
        area = torch.empty(1).expand(3, packets.height, packets.width)
        top, left, height, width = RandomResizedCrop.get_params(area, list(SCALE), list(RATIO))
        flip = ",hflip" if random.random() < 0.5 else ""
        steps = f"crop={width}:{height}:{left}:{top}:exact=1,scale={SIZE}:{SIZE}:flags=bicubic{flip},format=rgb24"
        return spdl.io.decode_packets(packets, filter_desc=steps)

    def batch(frames: list[Any]) -> Any:
        return spdl.io.to_torch(spdl.io.convert_frames(frames))

    def work() -> int:
        pipeline = (
            PipelineBuilder()
            .add_source(shuffled())
            .pipe(decode, concurrency=num_workers, output_order="completion")
            .aggregate(BATCH, drop_last=True)
            .pipe(batch)
            .add_sink(3)
            .build(num_threads=num_workers)
        )
        with pipeline.auto_stop():
            return _counted(pipeline.get_iterator())

    return work, None
