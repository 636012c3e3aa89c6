"""`bench loader`: training batches a second, ours beside the loaders people use.

The same work for all: random resized crop to 224 (bicubic; stock FFCV has INTER_AREA only), horizontal flip, uint8
batches in memory, the machine's cores, one epoch of the same photographs a round. Nobody augments further.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ffcv_convnext.bench.photographs import write_photo_folder
from ffcv_convnext.bench.rounds import Comparison, Work, compare

SIZE, BATCH = 224, 128
REFERENCE = "stock FFCV"
Contestant = tuple[Work, Callable[[], Any]]  # a round's work, and the first batch of it


def bench_loader(
    *,
    data_path: Path | None,
    num_images: int,
    rounds: int,
    cores: int | None,
    peers: Sequence[str] | None,
    say: Callable[[str], None],
) -> Comparison:
    """Measure on an ImageFolder, or on photographs at hand when data_path is None.

    peers: names out of PEERS, beside stock FFCV; None: all whose packages are installed. Raises ValueError for an
    unknown one.
    """
    chosen = list(PEERS) if peers is None else [REFERENCE, *peers]
    for name in chosen:
        if name not in PEERS:
            raise ValueError(f"peers = {name}: expected some of {', '.join(PEERS)}")
    available = sorted(os.sched_getaffinity(0))
    if cores is not None:
        if not 1 <= cores <= len(available):
            raise ValueError(f"cores = {cores}: this process may use {len(available)}")
        os.sched_setaffinity(0, available[:cores])
    num_workers = cores or len(available)
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as work:
        if data_path is None:
            folder = write_photo_folder(Path(work) / "photographs", num_images)
        else:
            folder = _link_some(data_path, Path(work) / "subset", num_images)
        say(f"converting {folder}")
        paths = convert_for_all(folder, Path(work))
        contestants = [
            (name, f"{__name__}:{function}", {"num_workers": num_workers, **{key: str(paths[key]) for key in needs}})
            for name, (function, needs, package) in PEERS.items()
            if name in chosen and importlib.util.find_spec(package) is not None
        ]
        facts = {
            "images": num_images,
            "megabytes": round(paths["ours"].stat().st_size / 1e6),
            "torch": torch.__version__,
        }
        return compare("loader", contestants, reference=REFERENCE, rounds=rounds, facts=facts, say=say)


PEERS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "stock FFCV": ("stock_ffcv", ("stock",), "ffcv"),
    "ours": ("ours", ("ours",), "ffcv"),
    "ours, bilinear": ("ours_bilinear", ("ours",), "ffcv"),
    "ours, stock file": ("ours_on_stock", ("stock",), "ffcv"),
    "torchvision PIL": ("torchvision_pil", ("folder",), "torchvision"),
    "timm": ("timm_loader", ("folder",), "timm"),
}


def _link_some(data_path: Path, out: Path, num_images: int) -> Path:
    """A folder of links to `num_images` training images, evenly spread, so that everyone reads the same ones."""
    from torchvision.datasets import ImageFolder

    if not (data_path / "train").is_dir():
        raise FileNotFoundError(f"data_path: {data_path / 'train'} does not exist; give an ImageFolder with train/")
    files = [Path(file) for file, _ in ImageFolder(str(data_path / "train")).samples]
    for index in np.unique(np.linspace(0, len(files) - 1, min(num_images, len(files))).astype(int)):
        link = out / files[index].resolve().relative_to(data_path.resolve())
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(files[index].resolve())
    return out


def convert_for_all(folder: Path, work: Path) -> dict[str, Path]:
    """Both files of the same images: ours, and one by FFCV's own writer with the same settings."""
    from torchvision.datasets import ImageFolder

    from ffcv_convnext.data import ConversionOptions, convert, write_stock_beton

    convert(ConversionOptions(data_path=folder, out_dir=work, split="train"))
    dataset = ImageFolder(str(folder / "train"))
    stock = work / "stock.beton"
    indices = list(range(len(dataset)))
    num_workers = len(os.sched_getaffinity(0))
    write_stock_beton(stock, dataset, indices, max_resolution=500, jpeg_quality=90, num_workers=num_workers)
    return {"ours": work / "train.beton", "stock": stock, "folder": folder / "train"}


def _ours(beton: str, num_workers: int, interpolation: str) -> Contestant:
    from ffcv_convnext.config import Config
    from ffcv_convnext.data import RandomCropDecoder, SampleLoader, Shares

    config = Config.from_flat({"input_size": SIZE, "train_interpolation": interpolation}).data
    loader = SampleLoader(
        Path(beton), RandomCropDecoder(config), num_workers=num_workers, batches_ahead=3, device=torch.device("cpu")
    )
    shares = Shares(BATCH, 1, 1)
    epochs = iter(range(1 << 30))

    def work() -> int:
        epoch = next(epochs)
        return sum(
            len(images) for images, _ in loader.batches(shares.micro_batches(len(loader), 0, epoch, 0), 0, epoch)
        )

    return work, lambda: next(iter(loader.batches(shares.micro_batches(len(loader), 0, 0, 0), 0, 0)))


def ours(ours: str, num_workers: int) -> Contestant:
    return _ours(ours, num_workers, "bicubic")


def ours_bilinear(ours: str, num_workers: int) -> Contestant:
    return _ours(ours, num_workers, "bilinear")


def ours_on_stock(stock: str, num_workers: int) -> Contestant:
    return _ours(stock, num_workers, "bicubic")


def stock_ffcv(stock: str, num_workers: int) -> Contestant:
    from ffcv_convnext.data import stock_train_loader

    loader = stock_train_loader(Path(stock), size=SIZE, batch_size=BATCH, num_workers=num_workers)
    return lambda: sum(len(images) for images, _ in loader), lambda: sum(len(images) for images, _ in loader)


def _all_batches(loader: Any) -> Contestant:
    return lambda: sum(len(batch[0]) for batch in loader), lambda: next(iter(loader))


def torchvision_pil(folder: str, num_workers: int) -> Contestant:
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    dataset = datasets.ImageFolder(folder, transform)
    return _all_batches(
        DataLoader(dataset, BATCH, shuffle=True, num_workers=num_workers, drop_last=True, persistent_workers=True)
    )


def timm_loader(folder: str, num_workers: int) -> Contestant:
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", root=folder),
        input_size=(3, SIZE, SIZE),
        batch_size=BATCH,
        is_training=True,
        no_aug=False,
        scale=(0.08, 1.0),
        hflip=0.5,
        color_jitter=None,
        interpolation="bicubic",
        num_workers=num_workers,
        use_prefetcher=True,
        device=torch.device("cpu"),
        persistent_workers=True,
    )
    return _all_batches(loader)
