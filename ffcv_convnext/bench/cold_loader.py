"""`bench cold`: training batches a second from a file that is not in memory, ours beside stock FFCV.

The work is that of `bench loader`. Before each epoch a contestant takes its file, a copy of its own, out of the page
cache and makes sure of it; the time that takes (milliseconds) counts. Whatever caches behind this machine, as virtual
disks and disk controllers do, cannot be emptied from here: the table's facts say how fast the disk was.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ffcv_convnext.bench.compare import Comparison, Contestant, Timed, compare, imports_done, patience, use_cores
from ffcv_convnext.bench.contestants.loaders import BATCH, SIZE, stock_ffcv
from ffcv_convnext.bench.loader import REFERENCE, choose, convert_for_all
from ffcv_convnext.bench.synthetic_data import image_folder

OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, process": {"data_cache": "process"},
    "ours, quasi_random": {"order": "quasi_random"},
    "ours, warm": {"warm": True},
}
_NUM_WINDOWS = 4  # of the file, for quasi_random


def bench_cold(
    *,
    data_path: Path | None,
    photographs: Path | None,
    num_images: int,
    rounds: int,
    cores: int | None,
    peers: Sequence[str] | None,
    say: Callable[[str], None],
) -> Comparison:
    """Measure on an ImageFolder, or on photographs (of a folder, or those at hand) when data_path is None.

    peers: how names in OURS begin, whose rows are wanted beside stock FFCV's; None: all. The files, one for each,
    are made in the current folder, whose disk is the one that is measured.
    """
    chosen = choose([REFERENCE, *OURS], peers, REFERENCE)
    num_workers = use_cores(cores)
    with tempfile.TemporaryDirectory(prefix="bench-cold-", dir=Path.cwd()) as name:
        work = Path(name)
        folder = image_folder(
            work / "images", num_images, data_path=data_path, photographs=photographs, originals=False
        )
        say(f"converting {folder}")
        paths = convert_for_all(folder, work)
        contestants: list[tuple[str, str, dict[str, Any]]] = [
            (REFERENCE, f"{__name__}:cold_stock", {"stock": str(paths["stock"]), "num_workers": num_workers})
        ]
        for number, label in enumerate(chosen[1:]):
            own = work / str(number)
            own.mkdir()
            for file in (paths["ours"], paths["ours"].with_suffix(".json")):
                shutil.copy(file, own)
            arguments = {"folder": str(own), "num_workers": num_workers, **OURS[label]}
            contestants.append((label, f"{__name__}:cold_ours", arguments))
        images = sum(file.is_file() for file in (folder / "train").rglob("*"))
        megabytes = round(paths["ours"].stat().st_size / 1e6)
        facts = {"images": images, "megabytes": megabytes, **_disk_rates(paths["ours"])}
        return compare(
            "cold loader",
            contestants,
            reference=REFERENCE,
            rounds=rounds,
            facts=facts,
            say=say,
            patience_s=patience(images),
        )


def _disk_rates(path: Path) -> dict[str, str]:
    """How fast a file that is not in memory is read: from one end to the other, and 64 kB here and there."""
    size = path.stat().st_size
    random = np.random.default_rng(0)
    scattered = random.permutation(size // 65536)[: 64 << 20 >> 16] * 65536
    rates = {}
    for name, starts, length in (("sequential", range(0, size, 8 << 20), 8 << 20), ("64 kB reads", scattered, 65536)):
        evict(path)
        with open(path, "rb", buffering=0) as file:
            if name != "sequential":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            started = time.perf_counter()
            num_bytes = sum(len(os.pread(file.fileno(), length, int(start))) for start in starts)
            rates[f"disk, {name}"] = f"{num_bytes / 1e6 / (time.perf_counter() - started):.0f} MB/s"
    return rates


def evict(path: Path) -> None:
    """Take a file out of the page cache. Raises OSError when much of it stays, as in a file system in memory."""
    from ffcv_convnext.data.load import num_bytes_in_memory

    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(f" {path.resolve()}"):  # the kernel keeps pages that a process has touched in a mapping
            first, last = (int(word, 16) for word in line.split()[0].split("-"))
            arguments = ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(mmap.MADV_DONTNEED)
            ctypes.CDLL(None).madvise(*arguments)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if num_bytes_in_memory(path) > path.stat().st_size // 50:
        raise OSError(f"{path} stays in memory: cannot measure cold reads on this file system")


def cold_stock(stock: str, num_workers: int) -> Contestant:
    work, _ = stock_ffcv(stock, num_workers)

    def cold() -> int | Timed:
        evict(Path(stock))
        return work()

    return cold, None


def cold_ours(
    folder: str, num_workers: int, data_cache: Any = "os", order: Any = "random", warm: bool = False
) -> Contestant:
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
            "shuffle_window_mb": max(1, beton.stat().st_size // 1_000_000 // _NUM_WINDOWS),
        }
    ).data
    loader = TrainLoader(config, torch.device("cpu"), seed=0)
    epochs = iter(range(1 << 30))

    def work() -> int:
        if not warm:
            evict(beton)
        return sum(len(images) for step in loader.steps(next(epochs)) for images, _ in step)

    return work, lambda: next(batch for step in loader.steps(0) for batch in step)
