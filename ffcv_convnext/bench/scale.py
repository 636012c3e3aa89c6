"""`bench scale`: how time and memory grow with the number of images, from 10 thousand to 14 million.

Stage `load`, the loader: the files are generated: whole tables and a whole manifest, but pages that are holes in a
sparse file. Such an image is raw and black, so everything but JPEG decoding runs as on a real file; a terabyte of
addresses takes no room. Each row is a separate process that opens the file, takes the first batch of an epoch and one
in mid-epoch, and lists the order of an epoch for one of eight ranks. Memory is what the process has for itself
(anonymous pages; the mapped tables are shared by all processes of a machine), also for each image more than in the file
with the fewest.

The other stages: scale_conversion.py (convert, join), scale_runs.py (runs) and scale_ranks.py (ranks).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ffcv_convnext.bench.compare import format_facts
from ffcv_convnext.bench.scale_conversion import ConversionScale, measure_conversion, measure_join, run_child
from ffcv_convnext.bench.scale_ranks import RanksRow, format_ranks, measure_ranks
from ffcv_convnext.bench.scale_runs import RunsRow, format_runs, measure_runs
from ffcv_convnext.data.beton import Manifest, tables_digest
from ffcv_convnext.data.beton.layout import ALLOCATION, FIELD, FIELD_TYPES, HEADER, RAW, VERSION
from ffcv_convnext.formatting import format_bytes, markdown_table
from ffcv_convnext.host import processor_name

COUNTS = (10_000, 100_000, 1_281_167, 14_197_122)  # the last two: ImageNet-1k and ImageNet-22k
NUM_CLASSES = {1_281_167: 1_000, 14_197_122: 21_841}
SIDE = 192  # pixels of an image; raw, about as large as a JPEG of 500 pixels
PAGE_BYTES = 8 << 20
RANKS = 8
BATCH = 64
VAL_IMAGES = 1000
_TIMEOUT_S = 600.0

_CHILD = """
import json, sys, threading, time
from pathlib import Path
import torch
from ffcv_convnext.bench.scale_steps import anonymous_bytes, proportional_bytes
from ffcv_convnext.config import DataConfig
from ffcv_convnext.data.load import TrainLoader
peak, done = [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous_bytes())
folder, order = sys.argv[1:]
threading.Thread(target=watch, daemon=True).start()
def load(first_step=None):
    started = time.perf_counter()
    config = DataConfig(data_path=Path(folder), batch_size=BATCH, input_size=96, num_workers=1, order=order)
    loader = TrainLoader(config, torch.device("cpu"), seed=0, rank=3, world=RANKS)
    middle = loader.steps_per_epoch // 2 if first_step is None else first_step
    steps = loader.steps(0, middle)
    next(next(steps))
    seconds = time.perf_counter() - started
    return loader, steps, seconds
loader, steps, first_s = load(0)
held, share = anonymous_bytes(), proportional_bytes()
started = time.perf_counter()
number = sum(len(samples) for samples in loader.samples(1))
order_s = time.perf_counter() - started
steps.close(); loader.close()
del loader, steps
_, steps, middle_s = load()
steps.close()
done.set()
print(json.dumps({"first_s": first_s, "order_s": order_s, "middle_s": middle_s, "held": held, "share": share,
    "peak": peak[0]}))
""".replace("BATCH", str(BATCH)).replace("RANKS", str(RANKS))


@dataclass(frozen=True, slots=True)
class Row:
    """One number of images in one order."""

    num_images: int
    order: str
    first_s: float  # from the loader's start to the first batch
    middle_s: float  # the same in the middle of an epoch
    order_s: float  # to list the order of an epoch
    held: int  # bytes a process has for itself at the first batch
    share: int  # these, and its share of what it maps together with others
    peak: int  # the most it had for itself
    processes: int = 1  # that did the same at the same time; medians of them


@dataclass(frozen=True, slots=True)
class Scale:
    """A finished measurement and the machine it ran on."""

    facts: dict[str, Any]
    rows: list[Row]
    conversion: ConversionScale = field(default_factory=lambda: ConversionScale([], []))
    runs: list[RunsRow] = field(default_factory=list)
    ranks: list[RanksRow] = field(default_factory=list)

    def to_json(self) -> str:
        """Return all figures as JSON."""
        named: dict[str, list[Any]] = {"rows": self.rows, "runs": self.runs, "ranks": self.ranks}
        rows = {name: [asdict(row) for row in each] for name, each in named.items()}
        return json.dumps({"facts": self.facts, **rows, **self.conversion.to_rows()}, indent=2)

    def format(self) -> str:
        """Return a Markdown table for each stage with the facts above them."""
        parts = [self._loading()] if self.rows else []
        parts += [self.conversion.format()] if self.conversion.steps else []
        parts += [format_runs(self.runs)] if self.runs else []
        parts += [format_ranks(self.ranks)] if self.ranks else []
        return "\n\n".join([format_facts("scale", self.facts), *parts])

    def _loading(self) -> str:
        header = ["images", "order", "processes", "first batch s", "in mid-epoch s", "order of an epoch s"]
        header += ["memory a process", "bytes an image", "at most", "bytes an image", "with its share"]
        return markdown_table(header, [self._cells(row) for row in self.rows], "><>>>>>>>>>")

    def _cells(self, row: Row) -> list[str]:
        least = min((r for r in self.rows if r.order == row.order), key=lambda r: r.num_images)
        cells = [
            f"{row.num_images:,}",
            row.order,
            str(row.processes),
            *(f"{s:.2f}" for s in (row.first_s, row.middle_s, row.order_s)),
        ]
        for name in ("held", "peak"):
            more = getattr(row, name) - getattr(least, name)
            per_image = (
                f"{more / (row.num_images - least.num_images):.0f}" if row.num_images > least.num_images else "-"
            )
            cells += [format_bytes(getattr(row, name)), per_image]
        return [*cells, format_bytes(row.share)]


def classes_of(num_images: int) -> int:
    """Return how many classes a generated file has."""
    return NUM_CLASSES.get(num_images, min(1000, num_images))


def write_generated(
    folder: Path, num_images: int, split: Literal["train", "val"] = "train", num_classes: int | None = None
) -> Path:
    """Write a .beton with `num_images` black images that take no room, and its manifest; return it.

    Labels are random, so that the file counts as shuffled.   num_classes: None: as ImageNet has for this number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    beton = folder / f"{split}.beton"
    num_bytes = 3 * SIDE * SIDE
    per_page = PAGE_BYTES // num_bytes
    num_pages = -(-num_images // per_page)
    row_type = np.dtype([("", FIELD_TYPES[2]), ("", FIELD_TYPES[1])], align=True)
    descriptors = np.zeros(2, FIELD)
    for descriptor, (name, type_id) in zip(descriptors, (("image", 2), ("label", 1)), strict=True):
        descriptor["type_id"] = type_id
        descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    table_start = HEADER.itemsize + descriptors.nbytes
    pages_start = -(-(table_start + num_images * row_type.itemsize) // PAGE_BYTES) * PAGE_BYTES
    end = pages_start + num_pages * PAGE_BYTES
    num_classes = num_classes or classes_of(num_images)
    numbers = np.arange(num_images)
    rows = np.zeros(num_images, row_type)
    rows["f0"]["mode"], rows["f0"]["width"], rows["f0"]["height"] = RAW, SIDE, SIDE
    rows["f0"]["data_ptr"] = pages_start + numbers // per_page * PAGE_BYTES + numbers % per_page * num_bytes
    rows["f1"] = np.random.default_rng(0).integers(num_classes, size=num_images)
    allocations = np.zeros(num_images, ALLOCATION)
    allocations["sample_id"], allocations["ptr"], allocations["size"] = numbers, rows["f0"]["data_ptr"], num_bytes
    with open(beton, "wb") as file:
        file.write(np.array([(VERSION, 2, PAGE_BYTES, num_images, end)], HEADER).tobytes())
        file.write(descriptors.tobytes())
        rows.tofile(file)
        file.seek(end)
        allocations.tofile(file)
    Manifest(
        split=split,
        classes=tuple(f"n{number:08d}" for number in range(num_classes)),
        num_samples=num_images,
        source=str(folder),
        write_mode="raw",
        max_resolution=SIDE,
        jpeg_quality=90,
        subsampling="420",
        compress_probability=0.0,
        num_originals=0,
        shuffled=split == "train",
        seed=0,
        subset=None,
        shard=None,
        skipped=(),
        ffcv_version="",
        package_version="",
        identity="generated",
        page_bytes=PAGE_BYTES,
        page_crc32=(zlib.crc32(bytes(PAGE_BYTES)),) * num_pages,
        num_bytes=beton.stat().st_size,
        sha256=tables_digest(beton),
        files_sha256="0" * 64,
    ).write(Manifest.path_for(beton))
    return beton


def bench_scale(
    counts: Sequence[int],
    progress: Callable[[str], None],
    work: Path | None = None,
    processes: int = RANKS,
    stages: Sequence[str] = ("load",),
) -> Scale:
    """Measure each number of images in each of the stages load, convert, join, runs and ranks.

    work: a folder on a file system with sparse files, for about 60 bytes an image to load, or 2 kB an image to convert;
    None: a temporary one.   processes: that load the largest file at the same time; also the ranks that train.
    Raises Failure if a row cannot be measured.
    """
    facts = {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "ranks": RANKS,
        "batch": BATCH,
        "load of the machine before": round(os.getloadavg()[0], 1),
    }
    found = Scale(facts, [])
    for number in sorted(counts):
        for stage in stages:
            with tempfile.TemporaryDirectory(prefix="bench-scale-", dir=work) as temporary:
                folder = Path(temporary) / str(number)
                if stage == "load":
                    found.rows.extend(_load(folder, number, progress, processes if number == max(counts) else 1))
                elif stage in ("convert", "join"):
                    measure = measure_conversion if stage == "convert" else measure_join
                    found.conversion.extend(measure(number, folder, progress))
                elif stage == "ranks":
                    write_generated(folder, number)
                    write_generated(folder, VAL_IMAGES, "val", classes_of(number))
                    found.ranks.extend(measure_ranks(folder, number, processes, progress))
    if "runs" in stages:
        found.runs.extend(measure_runs(progress, work))
    return found


def _load(folder: Path, number: int, progress: Callable[[str], None], processes: int) -> Iterator[Row]:
    """Yield the rows of one generated file."""
    beton = write_generated(folder, number)
    progress(f"{number:,} images, {format_bytes(beton.stat().st_size)} of addresses")
    for order in ("random", "quasi_random"):
        _measure(folder, order)  # compiles, and reads the tables into memory
        yield Row(number, order, **_measure(folder, order))
    if processes > 1:
        progress(f"{processes} processes at the same time")
        yield _together(folder, number, processes)


def _together(folder: Path, number: int, processes: int) -> Row:
    """Return the medians of several processes that load the same file."""
    with ThreadPoolExecutor(processes) as pool:
        found = list(pool.map(_measure, [folder] * processes, ["random"] * processes))
    middle = {name: statistics.median(each[name] for each in found) for name in found[0]}
    held, share, peak = (int(middle.pop(name)) for name in ("held", "share", "peak"))
    return Row(number, "random", **middle, held=held, share=share, peak=peak, processes=processes)


def _measure(folder: Path, order: str) -> dict[str, Any]:
    command = [sys.executable, "-c", _CHILD, str(folder), order]
    return run_child(f"{folder.name} images in order {order}", command, _TIMEOUT_S)
