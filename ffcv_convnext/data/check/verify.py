"""Full check of .beton files: manifest, tables, checksums of pages, and a decode of each image.

Training checks only the hash of the tables when it starts, and decodes only crops. This check reads everything and
does not stop at the first error. It uses `pread`: with a memory map, a bad sector of the disk would kill the process.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.data.beton import CONVERT_AGAIN, JPG, RAW, Manifest
from ffcv_convnext.data.beton.tables import (
    ROWS,
    Tables,
    UnreadableTables,
    damaged_pages,
    find_betons,
    read_tables,
    shown,
)
from ffcv_convnext.data.check.manifests import check_original_files, read_manifest
from ffcv_convnext.data.codec.crop import HEIGHT, WIDTH, read_layout
from ffcv_convnext.data.codec.decode import NO_JPEG, OK, OUTSIDE_FILE, REASONS, UNKNOWN_MODE, addresses, decode_jpeg
from ffcv_convnext.data.convert.progress import ProgressBar
from ffcv_convnext.formatting import format_bytes, format_count, markdown_table

NUM_SHOWN = 20  # bad samples of a file in the text; the JSON has all
_CHUNK = 32  # images per task of a thread
_AHEAD = 8  # tasks a thread that wait: bounds the memory
_FIELDS = ("image", "label")

Reasons = dict[int, list[str]]  # sample -> what is wrong with it


@dataclass(frozen=True, slots=True)
class BadSample:
    """A damaged sample."""

    sample: int
    file: str | None  # the original, relative to the source folder; None: not known
    reason: str


@dataclass(slots=True)
class FileCheck:
    """The result for one .beton."""

    path: str
    source: str | None = None  # folder of the original files
    num_bytes: int = 0
    num_samples: int = 0
    num_decoded: int = 0  # samples whose data could be located
    seconds: float = 0.0  # to read and decode them
    problems: list[str] = field(default_factory=list)  # of the whole file
    bad_samples: list[BadSample] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and not self.bad_samples

    def format(self) -> str:
        """Return text with a table of at most NUM_SHOWN bad samples."""
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
            lines.append("  samples  BAD: no sample could be located, so none was decoded")
        if self.bad_samples:
            if self.source:
                lines.append(f"  original files are in {shown(self.source)}")
            rows = [(str(bad.sample), shown(bad.file or "unknown"), bad.reason) for bad in self.bad_samples[:NUM_SHOWN]]
            lines += ["", markdown_table(("sample", "original file", "reason"), rows, "><<")]
            if more := len(self.bad_samples) - len(rows):
                lines.append(f"... and {more:,} more; --json FILE writes all of them")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Verification:
    """The result for all files."""

    files: list[FileCheck]

    @property
    def good(self) -> bool:
        """Whether all files are good."""
        return all(file.good for file in self.files)

    def format(self) -> str:
        """Return text whose last line is the summary."""
        return "\n\n".join([*(file.format() for file in self.files), self.summary()])

    def summary(self) -> str:
        """Return one line: good or BAD, the numbers, the next action."""
        num_samples = sum(file.num_samples for file in self.files)
        names = " and ".join(Path(file.path).name for file in self.files)
        if self.good:
            return f"good: {names}, {num_samples:,} samples"
        num_bad = sum(len(file.bad_samples) for file in self.files)
        num_problems = sum(len(file.problems) for file in self.files)
        found = [f"{num_bad:,} of {num_samples:,} samples"] if num_bad else []
        found += [f"{format_count(num_problems, 'problem')} of whole files"] if num_problems else []
        again = CONVERT_AGAIN.replace("it", "them", 1)
        return f"BAD: {names}, {' and '.join(found)}; copy them again from a good copy, or {again}"

    def to_json(self) -> str:
        """Return everything as JSON."""
        files = [{"good": file.good, **asdict(file)} for file in self.files]
        return json.dumps({"good": self.good, "files": files}, indent=1)


def verify_data(path: Path, num_workers: int | None = None) -> Verification:
    """Check a .beton file, or train.beton and val.beton of a folder, and decode each image in full.

    num_workers: threads that decode; None: one per core.
    Progress goes to stderr. Damage is in the result. Raises FileNotFoundError if there are no files, ValueError for
    num_workers < 1.
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
            f"its class list differs from that of {next(iter(classes))}, so its labels have other meanings; convert "
            "both with write_ffcv_dataset.py --split all --overwrite"
        )
    return Verification(files)


def _verify_file(beton: Path, num_workers: int) -> tuple[FileCheck, Manifest | None]:
    check = FileCheck(str(beton))
    manifest, check.problems = read_manifest(beton)
    if not beton.is_file():
        return check, manifest
    check.num_bytes = beton.stat().st_size
    if manifest:
        check.source = manifest.source
        no_files = check_original_files(beton, manifest)
        check.problems += no_files
    try:
        tables = read_tables(beton)
    except UnreadableTables as error:
        check.problems.append(str(error).removeprefix(str(beton)).lstrip(": "))
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
    files = manifest.select_original_files(beton, reasons) if manifest and reasons and not no_files else {}
    for sample, found in sorted(reasons.items()):
        check.bad_samples.append(BadSample(sample, files.get(sample), "; ".join(found)))
    return check, manifest


def _table_problems(tables: Tables, manifest: Manifest | None) -> list[str]:
    problems = []
    if tables.fields != _FIELDS:
        problems.append(
            f"has the fields {', '.join(tables.fields)}: training expects {', '.join(_FIELDS)}; {CONVERT_AGAIN}"
        )
    if manifest and len(tables) != manifest.num_samples:
        problems.append(f"has {len(tables)} samples, but its manifest states {manifest.num_samples}; {CONVERT_AGAIN}")
    if tables.num_allocations < len(tables):
        problems.append(
            f"its allocation table has {tables.num_allocations} entries for {len(tables)} samples: truncated; "
            f"copy it again, or {CONVERT_AGAIN}"
        )
    return problems


def _page_problems(tables: Tables, manifest: Manifest, num_workers: int) -> list[str]:
    """Compare the pages with the checksums of the manifest: decoders do not notice every flipped bit."""
    problems = []
    num_pages = len(manifest.page_crc32)
    if tables.pages_end - tables.pages_start < num_pages * tables.page_size:
        return [f"is too small for the {num_pages} pages that its manifest states; copy it again, or {CONVERT_AGAIN}"]
    for page in damaged_pages(tables, manifest.page_crc32, num_workers):
        inside = tables.samples_in_page(page, num_pages)
        samples = f" (samples {inside.min()} to {inside.max()})" if len(inside) else ""
        problems.append(f"page {page}{samples} differs from its checksum: damaged; copy it again, or {CONVERT_AGAIN}")
    return problems


def _check_rows(tables: Tables, manifest: Manifest | None, reasons: Reasons) -> None:
    """Check each row of the sample table; only bad rows cost a Python loop."""
    located = tables.in_pages
    num_classes = len(manifest.classes) if manifest else None
    for start in range(0, len(tables), ROWS):
        located[start : start + ROWS] = _check_part(tables, start, located[start : start + ROWS], num_classes, reasons)
    _check_overlaps(tables, tables.in_order_of_file(np.flatnonzero(located)), reasons)


def _check_part(
    tables: Tables, start: int, inside: NDArray[np.bool_], num_classes: int | None, reasons: Reasons
) -> NDArray[np.bool_]:
    """Check the samples from `start` on, and return whose data is located.

    inside: (samples of this part,) whether the data lies in the pages.   num_classes: None if it is not known.
    """
    part = slice(start, start + len(inside))
    modes, widths, heights = tables.modes[part], tables.widths[part], tables.heights[part]
    lengths, addresses, owners = tables.lengths[part], tables.addresses[part], tables.owners[part]

    def bad(where: NDArray[np.bool_], reason: Callable[[int], str]) -> None:
        for row in np.flatnonzero(where).tolist():
            reasons[start + row].append(reason(row))

    bad((widths == 0) | (heights == 0), lambda i: f"the sample table states {widths[i]} x {heights[i]} pixels")
    bad((modes != JPG) & (modes != RAW), lambda _: REASONS[UNKNOWN_MODE])
    if tables.labels is not None:
        labels = tables.labels[part]
        wrong = (labels < 0) | (labels >= (1 << 62 if num_classes is None else num_classes))
        among = "" if num_classes is None else f"{num_classes} "
        bad(wrong, lambda i: f"its label {labels[i]} is not among the {among}classes")
    known = lengths >= 0
    bad(~known, lambda _: "its address is not in the allocation table")
    bad(
        known & ~inside,
        lambda i: f"its data ({lengths[i]} bytes at {addresses[i]}) is not inside a page of the file",
    )
    mine = owners == np.arange(start, start + len(inside))
    bad(known & ~mine, lambda i: f"the allocation table assigns its data to sample {owners[i]}")
    located: NDArray[np.bool_] = inside & mine  # the others are already bad
    return located


def _check_overlaps(tables: Tables, order: NDArray[np.int64], reasons: Reasons) -> None:
    """Find data that overlaps that of an earlier sample. order: samples by their addresses."""
    furthest, owner = 0, -1  # end of all data so far, and the sample that it belongs to
    for start in range(0, len(order), ROWS):
        samples = order[start : start + ROWS]
        begins = tables.addresses[samples]
        ends = begins + tables.lengths[samples]
        reached = np.maximum.accumulate(np.concatenate([[furthest], ends]))  # before each sample, and after the last
        numbers = np.arange(1, len(samples) + 1)
        latest = np.maximum.accumulate(np.where(ends == reached[1:], numbers, 0))  # in this part, from 1; 0: before it
        owners = np.where(latest > 0, samples[latest - 1], owner)
        before = np.concatenate([[owner], owners[:-1]])
        for k in np.flatnonzero(begins < reached[:-1]).tolist():
            reasons[int(samples[k])].append(f"its data overlaps that of sample {before[k]}")
        furthest, owner = int(reached[-1]), int(owners[-1])


def _decode_all(tables: Tables, num_workers: int, reasons: Reasons) -> int:
    """Decode each sample whose data is located, in the order of the file; return their number."""
    usable = tables.in_pages & (tables.widths > 0) & (tables.heights > 0)
    usable &= (tables.modes == JPG) | (tables.modes == RAW)
    samples = tables.in_order_of_file(np.flatnonzero(usable))
    chunks = (samples[start : start + _CHUNK].tolist() for start in range(0, len(samples), _CHUNK))
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="verify")
    name = f"{tables.path.parent.name}/{tables.path.name}"
    waiting: deque[tuple[list[int], Future[list[str]]]] = deque()
    with open(tables.path, "rb", buffering=0) as file, ProgressBar(len(samples), name) as progress:
        try:
            decode = _Decoder(tables, file.fileno())
            while True:
                more = islice(chunks, _AHEAD * num_workers - len(waiting))
                waiting.extend((chunk, pool.submit(decode, chunk)) for chunk in more)
                if not waiting:
                    break
                chunk, answers = waiting.popleft()
                for sample, reason in zip(chunk, answers.result(), strict=True):
                    if reason:
                        reasons[sample].append(reason)
                progress.add(len(chunk))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return len(samples)


class _Decoder:
    """Find what is wrong with stored images; thread-safe."""

    def __init__(self, tables: Tables, descriptor: int) -> None:
        self.tables = tables
        self.descriptor = descriptor
        self.functions = addresses()
        self.own = threading.local()  # each thread's buffers, which grow as needed

    def __call__(self, samples: list[int]) -> list[str]:
        """Return for each sample the reason why it is bad, or ''."""
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
            return f"{data.size} bytes of raw pixels, but the sample table states {width} x {height} pixels"
        layout = np.zeros(8, np.int64)
        read_layout(data, layout)
        if layout[HEIGHT] and (layout[HEIGHT], layout[WIDTH]) != (height, width):  # before the buffer is allocated
            return f"its JPEG has {layout[WIDTH]} x {layout[HEIGHT]} pixels, the sample table states {width} x {height}"
        if data[:2].tobytes() != b"\xff\xd8":
            return REASONS[NO_JPEG]
        try:
            pixels = self._buffer("pixels", height * width * 3)
        except MemoryError:
            return f"the sample table states {width} x {height} pixels, more than the memory can hold"
        status = int(decode_jpeg(data, height, width, pixels, self.functions))
        return "" if status == OK else REASONS[status]
