"""Whether .beton files are whole: manifest, tables, and every image decoded to its last pixel.

Training reads the tables' hash when it starts and the parts of images that its crops touch. This looks at everything,
and does not stop at the first thing that is wrong. Data is read with `pread`, not through a memory map, where a bad
sector of the disk would kill the process instead of being reported.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.data.beton import CONVERT_AGAIN as AGAIN
from ffcv_convnext.data.beton import JPG, RAW, Manifest
from ffcv_convnext.data.beton.tables import (
    Tables,
    UnreadableTables,
    damaged_pages,
    find_betons,
    read_tables,
    shown,
)
from ffcv_convnext.data.codec.crop import HEIGHT, WIDTH, read_layout
from ffcv_convnext.data.codec.decode import NO_JPEG, OK, OUTSIDE_FILE, REASONS, UNKNOWN_MODE, addresses, decode_jpeg
from ffcv_convnext.data.convert.progress import ProgressBar
from ffcv_convnext.formatting import format_bytes

NUM_SHOWN = 20  # bad samples of a file on the page; the JSON has all
_CHUNK = 32  # images a thread decodes before it looks for more work
_FIELDS = ("image", "label")

Reasons = dict[int, list[str]]  # sample -> what is wrong with it


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that cannot be trusted."""

    sample: int  # its index
    file: str | None  # the original, relative to the source folder; none: not known
    reason: str


@dataclass(slots=True)
class FileCheck:
    """What was found in one .beton."""

    path: str
    source: str | None = None  # folder of the original files
    num_bytes: int = 0
    num_samples: int = 0
    num_decoded: int = 0  # of them, those whose data could be found
    seconds: float = 0.0  # it took to read and decode them
    problems: list[str] = field(default_factory=list)  # of the file as a whole
    bad_samples: list[BadSample] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.problems and not self.bad_samples

    def format(self) -> str:
        """Some lines of text, at most NUM_SHOWN of them about bad samples."""
        lines = [f"{shown(self.path)}: {self.num_samples:,} samples, {format_bytes(self.num_bytes)}"]
        lines += [f"  file     BAD: {shown(problem)}" for problem in self.problems]
        if not self.problems:
            lines.append("  file     good: manifest, size, hash, tables, checksums of pages, list of original files")
        if self.num_decoded:
            found = f"{len(self.bad_samples):,} BAD" if self.bad_samples else "good"
            rate = self.num_decoded / self.seconds
            lines.append(
                f"  samples  {found}: {self.num_decoded:,} decoded in {self.seconds:.1f} s, {rate:,.0f} images/s"
            )
        elif self.num_samples:
            lines.append("  samples  BAD: none could be located, so none was decoded")
        if self.bad_samples:
            if self.source:
                lines.append(f"  originals are below {shown(self.source)}")
            lines += ["", *self._table()]
        return "\n".join(lines)

    def _table(self) -> list[str]:
        rows = self.bad_samples[:NUM_SHOWN]
        files = [shown(row.file or "unknown") for row in rows]
        width = max(13, *map(len, files))
        lines = [f"  {'sample':>9}  {'original file':{width}}  reason"]
        lines += [f"  {row.sample:9}  {file:{width}}  {row.reason}" for row, file in zip(rows, files, strict=True)]
        if more := len(self.bad_samples) - len(rows):
            lines.append(f"  ... and {more:,} more; --json FILE writes all of them")
        return lines


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found in all of them."""

    files: list[FileCheck]

    @property
    def good(self) -> bool:
        return all(file.good for file in self.files)

    def format(self) -> str:
        """A page that ends with one line of summary."""
        return "\n\n".join([*(file.format() for file in self.files), self.summary()])

    def summary(self) -> str:
        num_samples = sum(file.num_samples for file in self.files)
        names = " and ".join(Path(file.path).name for file in self.files)
        if self.good:
            return f"good: {names}, {num_samples:,} samples"
        num_bad = sum(len(file.bad_samples) for file in self.files)
        num_problems = sum(len(file.problems) for file in self.files)
        found = [f"{num_bad:,} of {num_samples:,} samples"] if num_bad else []
        found += [f"{num_problems} problem{'s' * (num_problems > 1)} of whole files"] if num_problems else []
        again = AGAIN.replace("it", "them", 1)
        return f"BAD: {names}, {' and '.join(found)}; copy them again from where they are good, or {again}"

    def to_json(self) -> str:
        files = [{"good": file.good, **asdict(file)} for file in self.files]
        return json.dumps({"good": self.good, "files": files}, indent=1)


def verify_data(path: Path, num_workers: int | None = None) -> Verification:
    """Check a .beton file, or train.beton and val.beton of a folder, and decode every image in full.

    num_workers: threads that decode; none: one a core.
    Progress goes to stderr. What is wrong with the files is in the result; FileNotFoundError when there are none,
    ValueError for num_workers < 1.
    """
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0))
    if num_workers < 1:
        raise ValueError(f"num_workers = {num_workers}: expected at least 1")
    files, classes = [], {}
    for beton in find_betons(path):
        check, manifest = _verify_file(beton, num_workers)
        files.append(check)
        if manifest:
            classes[beton.name] = manifest.classes
    if len(set(classes.values())) > 1:
        files[-1].problems.append(
            f"its class list differs from {next(iter(classes))}'s, so labels mean different things; convert both with "
            "write_ffcv_dataset.py --split all --overwrite"
        )
    return Verification(files)


def _verify_file(beton: Path, num_workers: int) -> tuple[FileCheck, Manifest | None]:
    check = FileCheck(str(beton))
    manifest = _check_manifest(beton, check.problems)
    if not beton.is_file():
        return check, manifest
    check.num_bytes = beton.stat().st_size
    check.source = manifest.source if manifest else None
    files = _original_files(beton, manifest, check.problems) if manifest else []
    try:
        tables = read_tables(beton)
    except UnreadableTables as error:
        check.problems.append(_without_path(error, beton))
        return check, manifest
    check.num_samples = len(tables)
    check.problems += _table_problems(tables, manifest)
    reasons: Reasons = defaultdict(list)
    _check_rows(tables, manifest, reasons)
    started = time.perf_counter()
    check.num_decoded = _decode_all(tables, num_workers, reasons)
    if manifest:
        check.problems += _page_problems(tables, manifest, num_workers)
    check.seconds = time.perf_counter() - started
    for sample, found in sorted(reasons.items()):
        file = files[sample] if sample < len(files) else None
        check.bad_samples.append(BadSample(sample, file, "; ".join(found)))
    return check, manifest


def _check_manifest(beton: Path, problems: list[str]) -> Manifest | None:
    """The manifest where one can be read, whether or not the .beton is what it describes."""
    manifest = None
    try:
        manifest = Manifest.for_beton(beton)
        Manifest.check(beton)
    except (ValueError, FileNotFoundError) as error:
        problems.append(_without_path(error, beton))
    return manifest


def _without_path(error: Exception, beton: Path) -> str:
    return str(error).removeprefix(str(beton)).lstrip(": ")


def _original_files(beton: Path, manifest: Manifest, problems: list[str]) -> list[str]:
    """The original file of every sample; empty when the list is not the one of the manifest."""
    path = Manifest.files_path_for(beton)
    try:
        content = path.read_bytes()
    except OSError as error:
        problems.append(f"the list of original files {path.name} cannot be read: {error.strerror}; copy it again")
        return []
    if hashlib.sha256(content).hexdigest() != manifest.files_sha256:
        problems.append(
            f"the list of original files {path.name} differs from the manifest's hash: damaged, or of another "
            "conversion; copy it again"
        )
        return []
    files = [os.fsdecode(line) for line in content.split(b"\n")[:-1]]
    if len(files) != manifest.num_samples:
        problems.append(
            f"the list of original files {path.name} has {len(files)} lines where the manifest states "
            f"{manifest.num_samples} samples; {AGAIN}"
        )
        return []
    return files


def _table_problems(tables: Tables, manifest: Manifest | None) -> list[str]:
    problems = []
    if tables.fields != _FIELDS:
        problems.append(f"has the fields {', '.join(tables.fields)}: training expects {', '.join(_FIELDS)}; {AGAIN}")
    if manifest and len(tables) != manifest.num_samples:
        problems.append(f"holds {len(tables)} samples where its manifest states {manifest.num_samples}; {AGAIN}")
    if tables.num_allocations < len(tables):
        problems.append(
            f"its allocation table has {tables.num_allocations} entries for {len(tables)} samples: cut off; "
            f"copy it again, or {AGAIN}"
        )
    return problems


def _page_problems(tables: Tables, manifest: Manifest, num_workers: int) -> list[str]:
    """Every byte of the pages against the conversion's checksums: a flipped bit need not disturb a decoder."""
    problems = []
    num_pages = len(manifest.page_crc32)
    if tables.pages_end - tables.pages_start < num_pages * tables.page_size:
        return [f"has no room for the {num_pages} pages that its manifest states; copy it again, or {AGAIN}"]
    for page in damaged_pages(tables, manifest.page_crc32, num_workers):
        inside = tables.samples_in_page(page, num_pages)
        samples = f" (samples {inside.min()} to {inside.max()})" if len(inside) else ""
        problems.append(f"page {page}{samples} differs from its checksum: damaged; copy it again, or {AGAIN}")
    return problems


def _check_rows(tables: Tables, manifest: Manifest | None, reasons: Reasons) -> None:
    """Every row of the sample table, without a loop over the good ones."""

    def bad(where: NDArray[np.bool_], reason: Callable[[int], str]) -> None:
        for sample in np.flatnonzero(where).tolist():
            reasons[sample].append(reason(sample))

    widths, heights, labels, modes = tables.widths, tables.heights, tables.labels, tables.modes
    bad((widths == 0) | (heights == 0), lambda i: f"the sample table says {widths[i]} x {heights[i]} pixels")
    bad((modes != JPG) & (modes != RAW), lambda _: REASONS[UNKNOWN_MODE])
    if labels is not None:
        num_classes = len(manifest.classes) if manifest else 1 << 62
        bad(
            (labels < 0) | (labels >= num_classes),
            lambda i: f"its label {labels[i]} is not among the {f'{num_classes} ' if manifest else ''}classes",
        )
    known = tables.lengths >= 0
    bad(~known, lambda _: "the allocation table does not know its address")
    bad(
        known & ~tables.in_pages,
        lambda i: (
            f"its data ({tables.lengths[i]} bytes from {tables.addresses[i]} on) does not lie in a page of the file"
        ),
    )
    bad(
        known & (tables.owners != np.arange(len(tables))),
        lambda i: f"the allocation table gives its data to sample {tables.owners[i]}",
    )
    located = np.flatnonzero(tables.in_pages & (tables.owners == np.arange(len(tables))))  # the others are bad already
    if not len(located):
        return
    order = located[np.argsort(tables.addresses[located], kind="stable")]
    ends = tables.addresses[order] + tables.lengths[order]
    furthest = np.maximum.accumulate(ends)  # up to each sample, where data before it ends
    whose = np.maximum.accumulate(np.where(ends == furthest, np.arange(len(order)), 0))
    for k in (np.flatnonzero(tables.addresses[order[1:]] < furthest[:-1]) + 1).tolist():
        reasons[int(order[k])].append(f"its data overlaps that of sample {order[whose[k - 1]]}")


def _decode_all(tables: Tables, num_workers: int, reasons: Reasons) -> int:
    """Decode every sample whose data can be found, in the order of the file; returns how many there were."""
    usable = tables.in_pages & (tables.widths > 0) & (tables.heights > 0)
    usable &= (tables.modes == JPG) | (tables.modes == RAW)
    samples = np.flatnonzero(usable)
    samples = samples[np.argsort(tables.addresses[samples], kind="stable")]
    chunks = [samples[start : start + _CHUNK].tolist() for start in range(0, len(samples), _CHUNK)]
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="verify")
    name = f"{tables.path.parent.name}/{tables.path.name}"
    with open(tables.path, "rb", buffering=0) as file, ProgressBar(len(samples), name) as progress:
        try:
            decode = _Decoder(tables, file.fileno())
            for chunk, answers in zip(chunks, pool.map(decode, chunks), strict=True):
                for sample, reason in zip(chunk, answers, strict=True):
                    if reason:
                        reasons[sample].append(reason)
                progress.add(len(chunk))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return len(samples)


class _Decoder:
    """Says what is wrong with stored images; any number of threads may call it."""

    def __init__(self, tables: Tables, descriptor: int) -> None:
        self.tables = tables
        self.descriptor = descriptor
        self.functions = addresses()
        self.own = threading.local()  # a thread's buffers, as large as it has needed so far

    def __call__(self, samples: list[int]) -> list[str]:
        """For each sample the reason why it is bad, or nothing."""
        return [self._reason(sample) for sample in samples]

    def _buffer(self, name: str, size: int) -> NDArray[np.uint8]:
        buffer: NDArray[np.uint8] | None = getattr(self.own, name, None)
        if buffer is None or buffer.size < size:
            buffer = np.empty(size, np.uint8)
            setattr(self.own, name, buffer)
        return buffer[:size]

    def _reason(self, sample: int) -> str:
        table = self.tables
        width, height = int(table.widths[sample]), int(table.heights[sample])
        data = self._buffer("stored", int(table.lengths[sample]))
        try:
            done, start, view = 0, int(table.addresses[sample]), data.data
            while done < data.size and (num := os.preadv(self.descriptor, [view[done:]], start + done)):
                done += num
        except OSError as error:
            return f"its data cannot be read: {error.strerror}"
        if done < data.size:
            return REASONS[OUTSIDE_FILE]
        if table.modes[sample] == RAW:
            if data.size == height * width * 3:
                return ""
            return f"{data.size} bytes of raw pixels, where the sample table says {width} x {height} pixels"
        layout = np.zeros(8, np.int64)
        read_layout(data, layout)
        if layout[HEIGHT] and (layout[HEIGHT], layout[WIDTH]) != (height, width):  # before making room for the pixels
            return f"its JPEG has {layout[WIDTH]} x {layout[HEIGHT]} pixels, the sample table says {width} x {height}"
        if data[:2].tobytes() != b"\xff\xd8":
            return REASONS[NO_JPEG]
        status = int(decode_jpeg(data, height, width, self._buffer("pixels", height * width * 3), self.functions))
        return "" if status == OK else REASONS[status]
