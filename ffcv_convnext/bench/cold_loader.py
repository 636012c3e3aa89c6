"""`bench cold`: training batches per second from a file that is not in memory, ours beside stock FFCV.

The work is that of `bench loader`. Before each epoch a contestant evicts its own copy of the file from the page cache
and checks that it is gone; these milliseconds count. Caches behind this machine (virtual disks, disk controllers)
cannot be emptied: the facts above the table give the speed of the disk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ffcv_convnext.bench.compare import Comparison, Entry, compare, timeout_for, use_cores
from ffcv_convnext.bench.contestants.loaders import BATCH
from ffcv_convnext.bench.loader import CONTESTANTS, REFERENCE, convert_with_both, size_facts
from ffcv_convnext.bench.options import FolderOptions
from ffcv_convnext.host import evict

OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, process": {"data_cache": "process"},
    "ours, quasi_random": {"order": "quasi_random"},
    "ours, warm": {"warm": True},
}


def bench_cold(options: FolderOptions) -> Comparison:
    """Measure cold reads. The files, one for each contestant, are in the current folder, so its disk is measured."""
    options.check_num_images(BATCH)
    chosen = options.choose([REFERENCE, *OURS], REFERENCE)
    num_workers = use_cores(options.cores)
    with tempfile.TemporaryDirectory(prefix="bench-cold-", dir=Path.cwd()) as name:
        work = Path(name)
        folder = options.image_folder(work)
        options.progress(f"converting {folder}")
        paths = convert_with_both(folder, work, num_workers)
        contestants: list[Entry] = [
            (REFERENCE, f"{CONTESTANTS}:cold_stock", {"beton": str(paths["stock"]), "num_workers": num_workers})
        ]
        for number, label in enumerate(chosen[1:]):
            own = work / str(number)
            own.mkdir()
            for file in (paths["ours"], paths["ours"].with_suffix(".json")):
                shutil.copy(file, own)
            arguments = {"folder": str(own), "num_workers": num_workers, **OURS[label]}
            contestants.append((label, f"{CONTESTANTS}:cold_ours", arguments))
        facts = size_facts(folder, paths["ours"]) | _disk_rates(paths["ours"])
        timeout_s = timeout_for(facts["images"])
        return compare("cold loader", contestants, options, reference=REFERENCE, facts=facts, timeout_s=timeout_s)


def _disk_rates(path: Path) -> dict[str, str]:
    """Measure reads of a file that is not in memory: sequential, and 64 kB at random places."""
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
