"""The options of a conversion. The flags of `write_ffcv_dataset.py` derive from these fields."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ffcv_convnext.config import check_ranges, collect_settings, setting
from ffcv_convnext.data.beton import Split
from ffcv_convnext.data.codec.turbojpeg import MAX_JPEG_SIDE, Subsampling
from ffcv_convnext.data.convert.encode import Encoding

SourceKind = Literal["auto", "folder", "imagenet_tars", "webdataset", "parquet", "list"]
MIN_PAGE_BYTES = 8 << 20  # FFCV's default
MAX_PAGE_BYTES = 64 << 20  # with data_cache = process, a loader holds several pages in memory
BYTES_PER_PIXEL = 3  # raw; a JPEG of pure noise at quality 100 is smaller


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionOptions:
    """Which images to convert, and how to store them."""

    data_path: Path = setting(
        help="folder with train and val: class folders, ILSVRC2012's tars, WebDataset shards, parquet files or lists "
        "(train.tsv); or the files of one split, e.g. 'DIR/train-{000..146}.tar'"
    )
    out_dir: Path = setting(help="folder for the .beton files, created if missing")
    split: Literal["train", "val", "all"] = setting("all", "splits to convert; val uses the class list of train")
    source: SourceKind = setting(
        "auto",
        "form of the images; auto: found out from data_path for each split; imagenet_tars, webdataset and parquet are "
        "read in place; list: one `path<TAB>class` a line",
    )
    val_labels: Path | None = setting(
        None,
        "classes of the images in a flat val folder or ILSVRC2012_img_val.tar: file with one `name class` a line, "
        "class as name or index; none: the development kit's",
    )
    classes: Path | None = setting(
        None,
        "webdataset, parquet, list: file with one class name a line, in the order of integer labels; none: names in "
        "the samples or the schema, else the integers",
    )
    extensions: str | None = setting(
        None,
        "endings of further image files to convert, of formats that Pillow reads; none: only the usual ones",
        example=".gif,.avif",
    )
    max_resolution: int | None = setting(
        500,
        "longest side of a stored image, pixels; larger images are shrunk; none: keep every size",
        minimum=1,
        maximum=MAX_JPEG_SIDE,
    )
    jpeg_quality: int | Literal["original"] = setting(
        90,
        "JPEG quality; original: keep the coefficients of JPEGs that are not shrunk, store other images at 95",
        minimum=1,
        maximum=100,
    )
    subsampling: Subsampling = setting("420", "chroma subsampling of the JPEGs that are encoded")
    compress_probability: float = setting(
        1.0,
        "share of images stored as JPEG, drawn with the seed; the others are stored as raw pixels",
        minimum=0,
        maximum=1,
    )
    shuffle_indices: bool = setting(
        True, "store train in random order, as --order quasi_random requires; val keeps the order of the folder"
    )
    num_workers: int = setting(
        factory=lambda: len(os.sched_getaffinity(0)),
        help="processes that decode and encode; one per core unless set",
        minimum=1,
    )
    subset: int | None = setting(None, "convert only this many images of each split, drawn at random", minimum=1)
    seed: int = setting(0, "seed of subset, compress_probability and shuffle_indices", minimum=0)
    shard: tuple[int, int] | None = setting(
        None, "convert only part I of N, numbered from 0; see --join; none: all", minimum=0, example="0/8"
    )
    skip_bad: bool = setting(
        False,
        "leave out files that cannot be decoded and list them in the manifest, instead of stopping",
        switch=True,
    )
    overwrite: bool = setting(False, "replace existing .beton files", switch=True)
    resume: bool = setting(False, "continue an interrupted conversion with the same settings", switch=True)

    def __post_init__(self) -> None:
        for name, declared in collect_settings({"conversion": ConversionOptions}).items():
            declared.parse(getattr(self, name))
        check_ranges(self)
        for end in self.further_extensions:
            if not end.startswith(".") or len(end) < 2:
                raise ValueError(f"extensions = {self.extensions}: expected endings with a dot, e.g. .gif,.avif")
        if self.shard is not None and self.shard[0] >= self.shard[1]:
            raise ValueError(f"shard = {self.shard[0]}/{self.shard[1]}: expected I/N with I from 0 to N - 1")
        if self.overwrite and self.resume:
            raise ValueError("--overwrite starts from the beginning, --resume continues: choose one of them")

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits to convert."""
        return get_args(Split) if self.split == "all" else (self.split,)

    @property
    def further_extensions(self) -> tuple[str, ...]:
        """The endings in `extensions`, in lower case."""
        return tuple(end.strip().lower() for end in (self.extensions or "").split(",") if end.strip())

    @property
    def encoding(self) -> Encoding:
        """How images are stored; pages hold any image of max_resolution, up to MAX_PAGE_BYTES."""
        page = MIN_PAGE_BYTES if self.max_resolution else MAX_PAGE_BYTES
        while self.max_resolution and page < min(BYTES_PER_PIXEL * self.max_resolution**2, MAX_PAGE_BYTES):
            page *= 2
        return Encoding(
            max_resolution=self.max_resolution,
            jpeg_quality=self.jpeg_quality,
            subsampling=self.subsampling,
            max_bytes=page,
        )

    def stem(self, split: Split) -> str:
        """Return the file name of a split's .beton without its suffix."""
        return split if self.shard is None else shard_stem(split, *self.shard)


def shard_stem(split: Split, index: int, num_shards: int) -> str:
    """Return 'train.part-0-of-8'."""
    return f"{split}.part-{index}-of-{num_shards}"
