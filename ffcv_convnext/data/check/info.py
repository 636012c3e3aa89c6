"""Contents of .beton files, as text or JSON. Nothing is decoded; only the headers of some images are read."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.data.beton import CONVERT_AGAIN, JPG, RAW, Manifest, SkippedFile, tables_digest
from ffcv_convnext.data.beton.tables import Tables, find_betons, read_tables, shown
from ffcv_convnext.data.check.manifests import read_manifest
from ffcv_convnext.data.codec.crop import HEIGHT, INTERVAL, MCU_HEIGHT, MCU_WIDTH, NUM_COMPONENTS, WIDTH, read_layout
from ffcv_convnext.formatting import format_bytes, format_count

NUM_HEADERS = 1000  # images, evenly spread over the file, whose headers are read
_HEADER_BYTES = 1 << 16  # enough for a header without a large thumbnail or colour profile
_NUM_BINS = 10  # of the histogram, at most
_BAR = 40  # characters
_NUM_SKIPPED = 5  # skipped files in the text; the JSON has all
_FROM_MANIFEST = (
    *("max_resolution", "jpeg_quality", "num_originals", "shuffled", "subset", "seed"),
    *("source", "ffcv_version", "package_version"),
)
_SUBSAMPLING = {(8, 8): "4:4:4", (8, 16): "4:2:2", (16, 16): "4:2:0", (16, 8): "4:4:0", (8, 32): "4:1:1"}  # MCU h, w


@dataclass(frozen=True, slots=True)
class Spread:
    """Statistics of some numbers."""

    min: int
    median: float
    mean: float
    max: int

    @classmethod
    def of(cls, values: NDArray[np.int64] | NDArray[np.int32]) -> Spread:
        """Compute them. values: at least one."""
        return cls(int(values.min()), float(np.median(values)), float(values.mean()), int(values.max()))


@dataclass(frozen=True, slots=True)
class Bin:
    """A bar of the histogram."""

    min: int  # longest side, pixels
    max: int  # inclusive
    num_samples: int


@dataclass(frozen=True, slots=True)
class Headers:
    """Properties of some stored JPEGs, read from their headers. The counts add up to `num_read`."""

    num_read: int
    chroma_subsampling: dict[str, int]  # 4:2:0 etc., grayscale, other -> images
    restart_interval: dict[int, int]  # MCUs between markers (0: none) -> images
    num_cuttable: int  # images of which the loader decodes only the crop


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitInfo:
    """Contents of one .beton. Without a manifest, fields that come from it are None or empty."""

    path: str
    num_bytes: int
    num_samples: int
    remarks: tuple[str, ...]  # problems: no manifest, a hash that differs
    classes: tuple[str, ...]  # in index order; without a manifest the labels
    class_counts: tuple[int, ...]  # images of each
    image_bytes: Spread | None  # of a stored image; None: no sample could be located
    width: Spread  # pixels
    height: Spread
    longest_side: tuple[Bin, ...]
    encodings: dict[str, int]  # jpg, raw -> images
    headers: Headers
    max_resolution: int | None
    jpeg_quality: int | str | None
    num_originals: int | None  # images with the coefficients of their files
    shuffled: bool | None  # stored in random order, not class by class
    subset: int | None
    seed: int | None
    skipped: tuple[SkippedFile, ...]
    left_out: dict[str, int]  # files of the source that have other endings, by ending
    source: str | None
    ffcv_version: str | None
    package_version: str | None
    has_manifest: bool
    sha256: str  # of the tables, computed from the file

    def format(self) -> str:
        """Return text of about 30 lines, at most 120 characters wide unless names are longer."""
        rows: list[tuple[str, str]] = [("note", remark) for remark in self.remarks]
        rows += self._class_rows()
        if self.image_bytes:
            s = self.image_bytes
            parts = f"min {format_bytes(s.min)}, median {format_bytes(s.median)}, mean {format_bytes(s.mean)}, "
            rows.append(("image bytes", parts + f"max {format_bytes(s.max)}"))
        for name, s in (("width", self.width), ("height", self.height)):
            rows.append((name, f"min {s.min:,}, median {s.median:,.0f}, max {s.max:,} pixels"))
        rows.append(("longest side", "pixels, images"))
        rows += [("", line) for line in self._histogram()]
        rows += self._encoding_rows()
        if self.has_manifest:
            rows += self._skipped_rows()
            if self.left_out:
                left_out = ", ".join(f"{number:,} {end}" for end, number in self.left_out.items())
                rows.append(("left out", f"{left_out} (files with other endings)"))
            subset = f" (a subset of {self.subset:,} images, seed {self.seed})" if self.subset is not None else ""
            rows.append(("source", f"{self.source}{subset}"))
            rows.append(("written by", f"ffcv_convnext {self.package_version}, ffcv {self.ffcv_version}"))
        rows.append(("sha256", f"{self.sha256} (of the tables)"))
        title = f"{self.path}: {format_count(self.num_samples, 'image')}, {format_bytes(self.num_bytes)}"
        return "\n".join([shown(title), "", *(shown(f"  {name:14}{text}".rstrip()) for name, text in rows)])

    def _class_rows(self) -> list[tuple[str, str]]:
        counts, classes = np.array(self.class_counts), self.classes
        if not len(counts):
            return []
        text = f"{len(classes):,}"
        if self.has_manifest:
            names = classes if len(classes) <= 5 else [*classes[:3], "...", classes[-1]]
            text += f": {', '.join(names)}"
        rows = [("classes", text)]
        each = []
        for value in dict.fromkeys((int(counts.min()), int(counts.max()))):
            having = np.flatnonzero(counts == value)
            first = classes[having[0]] if self.has_manifest else f"label {classes[having[0]]}"
            more = f" and {len(having) - 1:,} more" if len(having) > 1 else ""
            each.append(f"{value:,} ({first}{more})")
        if len(each) == 1:
            each = [f"{counts[0]:,} each"]
        rows.append(("per class", " to ".join(each) + (f", mean {counts.mean():,.1f}" if len(each) > 1 else "")))
        return rows

    def _histogram(self) -> list[str]:
        highest = max(bar.num_samples for bar in self.longest_side)
        labels = [f"{bar.min}" if bar.min == bar.max else f"{bar.min}-{bar.max}" for bar in self.longest_side]
        width, digits = max(map(len, labels)), len(f"{highest:,}")
        return [
            f"{label:>{width}}  {bar.num_samples:>{digits},}  {'#' * -(-_BAR * bar.num_samples // highest)}"
            for label, bar in zip(labels, self.longest_side, strict=True)
        ]

    def _encoding_rows(self) -> list[tuple[str, str]]:
        kinds = {"jpg": "JPEG", "raw": "raw pixels"}
        parts = [_shares({kinds.get(name, name): number for name, number in self.encodings.items()})]
        if self.has_manifest:
            limit = f"at most {self.max_resolution} pixels" if self.max_resolution else "of the source"
            kept = f" ({format_count(self.num_originals, 'image')} unchanged)" if self.num_originals else ""
            parts += [f"quality {self.jpeg_quality}{kept}", f"longest side {limit}"]
        rows = [("encoding", ", ".join(parts))]
        if self.has_manifest:
            rows.append(("stored order", "random" if self.shuffled else "class by class"))
        if (headers := self.headers).num_read:
            named = {
                f"every {interval} MCU{'s' * (interval > 1)}" if interval else "none": number
                for interval, number in headers.restart_interval.items()
            }
            rows.append(("chroma", _shares(headers.chroma_subsampling)))
            rows.append(("restart marks", _shares(named)))
            share = _percent(headers.num_cuttable, headers.num_read)
            images = format_count(headers.num_read, "image")
            rows.append(("crops", f"{share} can be decoded without the rest of the image ({images} examined)"))
        return rows

    def _skipped_rows(self) -> list[tuple[str, str]]:
        if not self.skipped:
            return [("skipped", "no files")]
        rows = [(file.path, file.reason) for file in self.skipped[:_NUM_SKIPPED]]
        more = len(self.skipped) - len(rows)
        return [
            ("skipped", format_count(len(self.skipped), "file")),
            *(("", f"{path}: {reason}") for path, reason in rows),
            *([("", f"... and {more:,} more, listed in the manifest")] if more else []),
        ]


@dataclass(frozen=True, slots=True)
class DataInfo:
    """Contents of the .beton files of a folder."""

    splits: dict[str, SplitInfo]  # file name without .beton ->

    def format(self) -> str:
        """Return text."""
        return "\n\n".join(split.format() for split in self.splits.values())

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps({name: asdict(split) for name, split in self.splits.items()}, indent=1)


def describe_data(path: Path) -> DataInfo:
    """Describe a .beton file, or train.beton and val.beton of a folder, from tables, manifest and some headers.

    Takes about a second for ImageNet. A missing or wrong manifest is only a remark: files of stock FFCV have none.
    Raises FileNotFoundError if there is no .beton, ValueError if header or tables cannot be read.
    """
    return DataInfo({beton.stem: _describe(beton) for beton in find_betons(path) if beton.is_file()})


def _describe(beton: Path) -> SplitInfo:
    tables = read_tables(beton)
    if not len(tables):
        raise ValueError(f"{beton} has no samples; {CONVERT_AGAIN}")
    manifest, remarks = read_manifest(beton)
    located = tables.in_pages
    if num_lost := int((~located).sum()):
        remarks.append(f"the data of {format_count(num_lost, 'sample')} cannot be located; see: ffcv-convnext verify")
    classes, counts = _classes(tables, manifest, remarks)
    encodings = {"jpg": int((tables.modes == JPG).sum()), "raw": int((tables.modes == RAW).sum())}
    encodings["unknown"] = len(tables) - sum(encodings.values())
    return SplitInfo(
        path=str(beton),
        num_bytes=tables.num_bytes,
        num_samples=len(tables),
        remarks=tuple(remarks),
        classes=classes,
        class_counts=counts,
        image_bytes=Spread.of(tables.lengths[located]) if located.any() else None,
        width=Spread.of(tables.widths),
        height=Spread.of(tables.heights),
        longest_side=tuple(_bins(np.maximum(tables.widths, tables.heights))),
        encodings={name: number for name, number in encodings.items() if number},
        headers=_read_headers(tables),
        **{name: getattr(manifest, name, None) for name in _FROM_MANIFEST},
        skipped=manifest.skipped if manifest else (),
        left_out=dict(manifest.left_out) if manifest else {},
        has_manifest=manifest is not None,
        sha256=tables_digest(beton),
    )


def _classes(tables: Tables, manifest: Manifest | None, remarks: list[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the classes and their numbers of images; without a manifest, the labels found are the classes."""
    if tables.labels is None:
        remarks.append(f"has no field for labels, only {', '.join(tables.fields)}")
        return (), ()
    if manifest is None:
        values, counts = np.unique(tables.labels, return_counts=True)
        return tuple(str(value) for value in values.tolist()), tuple(counts.tolist())
    valid = (tables.labels >= 0) & (tables.labels < len(manifest.classes))
    if num_wrong := int((~valid).sum()):
        remarks.append(
            f"{format_count(num_wrong, 'label')} outside the {len(manifest.classes)} classes of the manifest"
        )
    counts = np.bincount(tables.labels[valid], minlength=len(manifest.classes))
    return manifest.classes, tuple(counts.tolist())


def _bins(sides: NDArray[np.int32]) -> list[Bin]:
    """Return bars of one round width from the shortest to the longest side."""
    shortest, longest = int(sides.min()), int(sides.max())
    round_widths = (n * 10**power for power in range(5) for n in (1, 2, 5))
    width = next(w for w in round_widths if longest // w - shortest // w < _NUM_BINS)
    first = shortest // width
    counts = np.bincount(sides // width - first)
    return [
        Bin(max(shortest, (first + k) * width), min(longest, (first + k + 1) * width - 1), int(number))
        for k, number in enumerate(counts)
    ]


def _read_headers(tables: Tables) -> Headers:
    """Read the headers of up to NUM_HEADERS stored JPEGs, in the order of the file."""
    jpegs = np.flatnonzero(tables.in_pages & (tables.modes == JPG))
    chosen = jpegs[np.linspace(0, len(jpegs) - 1, min(len(jpegs), NUM_HEADERS)).astype(np.int64)]
    chosen = chosen[np.argsort(tables.addresses[chosen])]
    chroma: Counter[str] = Counter()
    intervals: Counter[int] = Counter()
    num_cuttable = 0
    with open(tables.path, "rb", buffering=0) as file:
        for sample in chosen.tolist():
            num_bytes = min(int(tables.lengths[sample]), _HEADER_BYTES)
            data = np.frombuffer(os.pread(file.fileno(), num_bytes, int(tables.addresses[sample])), np.uint8)
            layout = np.zeros(8, np.int64)
            can_be_cut = read_layout(data, layout)
            if layout[NUM_COMPONENTS] == 1:
                chroma["grayscale"] += 1
            else:
                chroma[_SUBSAMPLING.get((int(layout[MCU_HEIGHT]), int(layout[MCU_WIDTH])), "other")] += 1
            interval = int(layout[INTERVAL])
            intervals[interval] += 1
            if can_be_cut and (layout[HEIGHT], layout[WIDTH]) == (tables.heights[sample], tables.widths[sample]):
                mcus_a_row = -(-int(layout[WIDTH]) // int(layout[MCU_WIDTH]))
                num_cuttable += mcus_a_row % interval == 0  # required by cut_jpeg
    return Headers(len(chosen), dict(chroma.most_common()), dict(sorted(intervals.items())), num_cuttable)


def _percent(part: int, whole: int) -> str:
    """Return '98.0 %'; '100 %' and '0 %' only if exact."""
    if part in (0, whole):
        return f"{100 * part // max(whole, 1)} %"
    return f"{min(max(100 * part / whole, 0.1), 99.9):.1f} %"


def _shares(counts: dict[str, int]) -> str:
    """Return '4:2:0 (98.0 %), 4:4:4 (2.0 %)', or '4:2:0' if it is the only one."""
    if len(counts) == 1:
        return next(iter(counts))
    whole = sum(counts.values())
    return ", ".join(f"{name} ({_percent(number, whole)})" for name, number in counts.items())
