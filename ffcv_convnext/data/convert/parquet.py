"""Parquet files as Hugging Face's: a column `image` of {bytes, path} and a column of labels.

pyarrow reads whole row groups, 100 to 1,000 images at once, but a conversion reads images in random order. So the index
has the place of each image inside its page, and a worker reads that part alone (parquet_pages.py). With another
compression than Snappy it has the page, which a worker decompresses as a whole.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.data.convert.archives import ArchivedImages, Index, open_archive
from ffcv_convnext.data.convert.folders import IMAGE_EXTENSIONS, NO_ENDING, ending
from ffcv_convnext.data.convert.labels import ClassList, RawLabels, check_every_class_has_images, check_names
from ffcv_convnext.data.convert.parquet_pages import (
    PageError,
    Read,
    indices_of,
    list_pages,
    locate,
    to_snappy,
    values_of,
)
from ffcv_convnext.data.convert.source import Stamp

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "cls")
_CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "ZSTD", "BROTLI")
_HAS_LEVELS = 16  # added to the number of a codec
_ENCODINGS = {"PLAIN", "PLAIN_DICTIONARY", "RLE_DICTIONARY", "RLE", "BIT_PACKED"}  # the last two: of levels
_PAGES_IN_MEMORY = 8  # in a worker
_WHOLE_PAGE = -1
# What pyarrow and this file raise for a damaged file, beside pyarrow's own exceptions.
_DAMAGE = (OSError, UnicodeDecodeError, LookupError, TypeError, AttributeError, OverflowError, MemoryError)
_CLASS_AT_END = re.compile(r"(.+)_(n\d{8})(\.\w+)")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ParquetImages(ArchivedImages):
    """Images of parquet files. `starts` and `sizes`: of the blocks that hold them; or the page, and the place in it."""

    codecs: NDArray[np.uint8]  # (N,) compression of each image's page
    # (N, 3): bytes of the blocks when decompressed, bytes of them before the image, bytes of the image. Where the page
    # is decompressed as a whole: _WHOLE_PAGE, position of the row group's dictionary page (-1: none), 0.
    inside: NDArray[np.int64]

    def read(self, index: int) -> bytes:  # noqa: D102  see Source
        archive, stamp = self.archives[self.which[index]], self.stamps[self.which[index]]
        start, size, codec = int(self.starts[index]), int(self.sizes[index]), int(self.codecs[index])
        full, skip, length = self.inside[index].tolist()
        try:
            if full == _WHOLE_PAGE:
                return _read_page(archive, stamp, start, skip, codec)[size]
        except (ValueError, IndexError) as error:
            raise OSError(errno.EIO, f"{archive} is damaged or has changed: {' '.join(str(error).split())}") from None
        content = self.read_at(index, start, size)
        if _CODECS[codec % _HAS_LEVELS] != "UNCOMPRESSED":
            try:
                content = _decompress("SNAPPY", to_snappy(content, full), full)
            except (ValueError, OSError):
                raise OSError(errno.EIO, f"{archive} is damaged or has changed") from None
        return content[skip : skip + length]

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> Self:  # noqa: D102  see Source
        chosen = np.asarray(indices, np.int64)
        images = ArchivedImages.select(self, indices)
        return dataclasses.replace(images, inside=self.inside[chosen], codecs=self.codecs[chosen])


@lru_cache(_PAGES_IN_MEMORY)
def _read_page(archive: str, stamp: Stamp, page: int, dictionary: int, codec: int) -> list[bytes]:
    """Return the values of a page. dictionary: position of its dictionary page; -1: it has none, or is one."""
    descriptor = open_archive(archive, stamp)

    def read(at: int, size: int) -> bytes:
        return os.pread(descriptor.number, size, at)

    words = None if dictionary < 0 else _read_page(archive, stamp, dictionary, -1, codec)
    decompress = partial(_decompress, _CODECS[codec % _HAS_LEVELS])
    return values_of(read, page, words, decompress, codec >= _HAS_LEVELS)


def _decompress(codec: str, content: bytes, size: int) -> bytes:
    if codec == "UNCOMPRESSED":
        return content
    import pyarrow

    return bytes(pyarrow.Codec(codec.lower()).decompress(content, size, asbytes=True))


class _Columns(NamedTuple):
    """Columns of a file."""

    content: int  # of the images: number among the leaves
    content_name: str  # 'image.bytes'
    path_name: str | None  # 'image.path'
    label: str
    class_names: tuple[str, ...]  # in the order of integer labels; empty: the schema has none


class ParquetFiles:
    """The images of parquet files, whose labels are known and whose classes may not be."""

    def __init__(self, location: Path, files: Sequence[Path], extensions: tuple[str, ...] = IMAGE_EXTENSIONS) -> None:
        """Index the files.

        Raises ValueError without pyarrow, for a file that is cut off or has other columns, for a null image or label,
        and FileNotFoundError.
        """
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(
                f"{location}: parquet files need pyarrow; install it with: pip install 'ffcv-convnext[parquet]'"
            ) from None
        self.location = location
        self.raw = RawLabels()
        self.class_names: tuple[str, ...] = ()
        self._index = Index(files)
        self._inside, self._codecs = array("q"), array("B")
        for which, path in enumerate(files):
            if not path.is_file():
                raise FileNotFoundError(f"{path} does not exist or is no file")
            try:
                with pyarrow.parquet.ParquetFile(path) as file:
                    self._add(which, path, file, extensions)
            except (pyarrow.ArrowException, PageError, *_DAMAGE) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"{path} is cut off or damaged ({reason}); copy it again") from None
        if not len(self._index):
            raise ValueError(f"{location} has no images")

    def finish(
        self, stated: Sequence[str], train: ClassList | None, source: str, *, all_classes: bool
    ) -> tuple[ParquetImages, ClassList]:
        """Return the images with labels, and the classes. Arguments as of `RawLabels.resolve`.

        all_classes: each class must have an image, as in train.
        """
        if not stated and train is not None and self.class_names and train.label_names:
            _check_same(train.label_names, self.class_names, source, str(self.location))
        found, of_codes = self.raw.resolve(stated or self.class_names, train, source)
        labels = of_codes[np.array(self._index.labels, np.int32)]
        if all_classes:
            check_every_class_has_images(self.location, labels, found.classes)
        fields, order = self._index.finish(found.classes, labels)
        more: dict[str, Any] = {
            "inside": np.array(self._inside, np.int64).reshape(-1, 3)[order],
            "codecs": np.array(self._codecs, np.uint8)[order],
        }
        return ParquetImages(location=self.location, label_names=found.label_names, **fields, **more), found

    def _add(self, which: int, path: Path, file: Any, extensions: tuple[str, ...]) -> None:
        columns = _find_columns(path, file)
        if which == 0:
            self.class_names = columns.class_names
        _check_same(self.class_names, columns.class_names, self._index.archives[0], str(path))
        descriptor = open_archive(str(path), self._index.stamps[which])
        read = lambda at, size: os.pread(descriptor.number, size, at)  # noqa: E731
        row = 0
        for group in range(file.num_row_groups):
            wanted = [columns.label, *([columns.path_name] if columns.path_name else [])]
            table = file.read_row_group(group, columns=wanted)
            labels = table.column(columns.label).to_pylist()
            names = [None] * len(labels)
            if columns.path_name:
                names = table.column(columns.path_name.partition(".")[0]).combine_chunks().field("path").to_pylist()
            _check_no_nulls(path, file, columns, group, row)
            at = 0
            for codec, start, size, inside in _places(path, file, columns.content, group, read):
                label, name = labels[at], names[at]
                if label is None:
                    raise ValueError(f"{path}: row {row}: the label is null")
                file_name, folder = _split_name(name or "")
                if "\n" in file_name or "\r" in file_name:
                    raise ValueError(f"{path}: row {row}: the file name {file_name!r} has a line break")
                code = self.raw.code(str(label), (str(path), f"row {row}"), folder)
                end = ending(file_name)
                if file_name and end != NO_ENDING and not end.endswith(extensions):
                    self._index.left_out[end] += 1
                else:
                    self._index.add(file_name or f"{path.stem}-{row:07d}", which, start, size, code)
                    self._inside.extend(inside)
                    self._codecs.append(codec)
                at += 1
                row += 1
            if at != len(labels):
                raise PageError(f"row group {group} has pages for {at} of {len(labels)} rows")


def _split_name(name: str) -> tuple[str, str]:
    """Return the name of an image file, and its class folder if the name tells it.

    Hugging Face's copy of ImageNet adds the class: n01440764_10026_n01440764.JPEG stands for n01440764_10026.JPEG.
    """
    file = name.rpartition("/")[2]
    if found := _CLASS_AT_END.fullmatch(file):
        return found[1] + found[3], found[2]
    return file, ""


def _places(
    path: Path, file: Any, column: int, group: int, read: Read
) -> Iterator[tuple[int, int, int, tuple[int, int, int]]]:
    """Yield codec, start, size and `inside` of each image of a row group, as `ParquetImages` has them."""
    chunk = file.metadata.row_group(group).column(column)
    if chunk.compression not in _CODECS or (other := set(chunk.encodings) - _ENCODINGS):
        what = f"encoding {min(other)}" if chunk.compression in _CODECS else f"compression {chunk.compression}"
        raise ValueError(
            f"{path}: its images have {what}, which cannot be read in place; write the file again with pyarrow"
        )
    has_levels = file.schema.column(column).max_definition_level > 0
    codec = _CODECS.index(chunk.compression) + _HAS_LEVELS * has_levels
    decompress = partial(_decompress, chunk.compression)
    first = chunk.dictionary_page_offset if chunk.dictionary_page_offset else chunk.data_page_offset
    dictionary, words = -1, None
    for start, page in list_pages(read, min(first, chunk.data_page_offset), chunk.total_compressed_size):
        spans = locate(read, page, chunk.compression, decompress, has_levels)
        compressed = page.is_compressed
        if not page.is_data:
            dictionary, words = start, spans
            continue
        if spans is None and words is not None:
            chosen = indices_of(read, start, decompress, has_levels)
            if chosen and max(chosen) >= len(words):
                raise PageError(f"the page at byte {start} is damaged")
            spans, compressed = [words[i] for i in chosen], True
        if spans is not None:
            for span in spans:
                yield codec if compressed else 0, span.start, span.stored, (span.full, span.skip, span.size)
        else:
            for position in range(page.num_values):
                yield codec, start, position, (_WHOLE_PAGE, dictionary, 0)


def _check_no_nulls(path: Path, file: Any, columns: _Columns, group: int, row: int) -> None:
    """Raise ValueError for a null image. row: the first of the row group."""
    chunk = file.metadata.row_group(group).column(columns.content)
    if chunk.physical_type != "BYTE_ARRAY":
        raise PageError(f"row group {group} has other columns")  # its statistics would end the process
    statistics = chunk.statistics
    if statistics is not None and statistics.has_null_count and not statistics.null_count:
        return
    column = file.read_row_group(group, columns=[columns.content_name]).column(0).combine_chunks()
    nulls = column.is_null() if "." not in columns.content_name else column.flatten()[0].is_null()
    found = np.flatnonzero(np.asarray(nulls.to_numpy(zero_copy_only=False), bool))
    if len(found):
        raise ValueError(f"{path}: row {row + int(found[0])}: the image is null; remove the row")


def _check_same(names: Sequence[str], others: Sequence[str], place: str, other: str) -> None:
    if tuple(names) != tuple(others):
        raise ValueError(
            f"{place} and {other} have different class names ({len(names)} and {len(others)}); give the names in label "
            "order with --classes FILE"
        )


def _find_columns(path: Path, file: Any) -> _Columns:
    schema = file.schema_arrow
    features: dict[str, Any] = {}
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        kinds = {name: about.get("_type") for name, about in features.items() if isinstance(about, dict)}
    except (ValueError, AttributeError):
        raise ValueError(f"{path}: the metadata `huggingface` of its schema is not usable") from None
    image = _choose(path, schema.names, [name for name, kind in kinds.items() if kind == "Image"], IMAGE_COLUMNS)
    label = _choose(path, schema.names, [name for name, kind in kinds.items() if kind == "ClassLabel"], LABEL_COLUMNS)
    leaves = {file.schema.column(number).path: number for number in range(len(file.schema))}
    content = f"{image}.bytes" if f"{image}.bytes" in leaves else image
    if content not in leaves or file.schema.column(leaves[content]).physical_type != "BYTE_ARRAY":
        raise ValueError(f"{path}: the column {image} has no binary field `bytes`; expected image {{bytes, path}}")
    if label not in leaves or file.schema.column(leaves[label]).physical_type not in ("INT32", "INT64", "BYTE_ARRAY"):
        raise ValueError(f"{path}: the column {label} is neither whole numbers nor text; expected labels")
    names = features.get(label, {}).get("names")
    names = check_names(tuple(map(str, names)), f"{path}: the schema's {label}") if isinstance(names, list) else ()
    path_name = f"{image}.path" if f"{image}.path" in leaves else None
    return _Columns(leaves[content], content, path_name, label, names)


def _choose(path: Path, columns: Sequence[str], stated: Sequence[str], usual: Sequence[str]) -> str:
    """Return the column that the schema states, or the one with a usual name."""
    stated = [name for name in stated if name in columns]
    named = [name for name in usual if name in (stated or columns)]
    if len(stated) == 1 or named:
        return named[0] if named else stated[0]
    raise ValueError(
        f"{path} has no column {' or '.join(usual)}; it has {', '.join(columns)}: expected image {{bytes, path}} and "
        "label"
    )
