"""What a .beton holds: a JSON file and a list of original files beside it. Imports neither ffcv nor numba.

`train.beton` has `train.json` (classes, sample count, encoding, skipped files, a hash) and `train.files.txt`, the
original file of every sample, one a line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ffcv_convnext.data.codec.turbojpeg import Subsampling
from ffcv_convnext.files import write_atomically

Split = Literal["train", "val"]
FORMAT = 2
AGAIN = "convert it again with write_ffcv_dataset.py --overwrite"
_VERSION = 2  # of FFCV's format, which FFCV 1.0.2 writes

# FFCV 1.0.2's file header and allocation table (ffcv/types.py), declared again so that ffcv need not be imported.
_HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("table", "<u8")]
)
_ALLOCATION = np.dtype([("sample", "<u8"), ("address", "<u8"), ("size", "<u8")])


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """A source file that is not in the .beton."""

    path: str  # relative to the source folder
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a .beton holds and where it comes from."""

    split: Split
    classes: tuple[str, ...]  # in index order: a label is an index into it
    num_samples: int
    source: str  # folder that held the class folders
    write_mode: Literal["jpg", "raw", "proportion"]  # proportion: some of each
    max_resolution: int | None  # longest side, pixels
    jpeg_quality: int | Literal["original"]
    subsampling: Subsampling  # of chroma, in JPEGs that were encoded for this file
    compress_probability: float  # of a picture to be stored as JPEG
    num_originals: int  # pictures with the coefficients of their files
    shuffled: bool  # stored in a random order, not class by class
    seed: int  # of subset, compress_probability and the stored order
    subset: int | None  # images asked for; none: all
    shard: tuple[int, int] | None  # (i, n): the i-th of n parts; none: the whole
    skipped: tuple[SkippedFile, ...]
    ffcv_version: str
    package_version: str
    identity: str  # a hash of all that settled the .beton's bytes, but for the content of the image files
    page_bytes: int  # FFCV's page: a group of samples that lie together
    page_crc32: tuple[int, ...]  # of each page, in their order
    num_bytes: int  # size of the .beton
    sha256: str  # `tables_digest` of the .beton
    files_sha256: str  # of the .files.txt

    @property
    def class_to_idx(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.classes)}

    @staticmethod
    def path_for(beton: Path) -> Path:
        return beton.with_suffix(".json")

    @staticmethod
    def files_path_for(beton: Path) -> Path:
        return beton.with_suffix(".files.txt")

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raises FileNotFoundError, or ValueError for anything that is not a manifest."""
        if not path.is_file():
            raise FileNotFoundError(f"manifest {path} does not exist; write_ffcv_dataset.py makes it with the .beton")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError("it is of another version of this package")
            return cls._from_json(content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"manifest {path} is not usable ({' '.join(str(error).split())}); {AGAIN}") from None

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Manifest:
        class_to_idx = content.pop("class_to_idx")
        content["classes"] = tuple(content["classes"])
        content["shard"] = tuple(content["shard"]) if content["shard"] else None
        content["page_crc32"] = tuple(content["page_crc32"])
        content["skipped"] = tuple(SkippedFile(**entry) for entry in content["skipped"])
        manifest = cls(**content)
        if manifest.split not in get_args(Split):
            raise ValueError(f"split is {manifest.split!r}")
        if manifest.class_to_idx != class_to_idx:
            raise ValueError("classes and class_to_idx disagree")
        return manifest

    def write(self, path: Path) -> None:
        """Write atomically: readers see the old file or the complete new one."""
        content = {"format": FORMAT, **dataclasses.asdict(self), "class_to_idx": self.class_to_idx}
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def for_beton(cls, beton: Path) -> Manifest:
        """The manifest beside a .beton, not compared with it.

        Raises FileNotFoundError when the .beton is missing, ValueError when the manifest is missing or unusable.
        """
        if not beton.is_file():
            raise FileNotFoundError(f"{beton} does not exist; create it with write_ffcv_dataset.py")
        if not cls.path_for(beton).is_file():
            raise ValueError(f"{beton} has no manifest {cls.path_for(beton).name} beside it; {AGAIN}")
        return cls.read(cls.path_for(beton))

    @classmethod
    def check(cls, beton: Path) -> Manifest:
        """The manifest beside a .beton, after comparing the file's size and tables with it.

        The pages, which hold the pictures, are not read: this takes milliseconds for gigabytes, and a damaged
        picture shows when it is decoded. Raises as `for_beton` does, and ValueError for a .beton that is cut
        off, damaged or of another conversion than its manifest.
        """
        manifest = cls.for_beton(beton)
        size = beton.stat().st_size
        if size != manifest.num_bytes:
            raise ValueError(
                f"{beton} has {size} bytes where its manifest states {manifest.num_bytes}: an incomplete copy, or of "
                f"another conversion; copy it again together with its manifest, or {AGAIN}"
            )
        check_header(beton)
        if tables_digest(beton) != manifest.sha256:
            raise ValueError(
                f"{beton}: header or sample table differ from the manifest's hash: damaged, or of another conversion; "
                f"copy it again together with its manifest, or {AGAIN}"
            )
        return manifest

    def original_files(self, beton: Path) -> list[str] | None:
        """The files that samples were made from, in their order, relative to `source`; None where the list is missing
        or not of this .beton."""
        try:
            content = self.files_path_for(beton).read_bytes()
        except OSError:
            return None
        if hashlib.sha256(content).hexdigest() != self.files_sha256:
            return None
        return [os.fsdecode(line) for line in content.split(b"\n")[:-1]]

    def original_file(self, beton: Path, sample: int) -> Path | None:
        """The file a sample was made from, for error messages; None where it is not known. Reads the whole list."""
        files = self.original_files(beton)
        return None if files is None or not 0 <= sample < len(files) else Path(self.source) / files[sample]


def check_header(beton: Path) -> None:
    """Raises ValueError for a file that is no .beton of FFCV's version, or holds no samples."""
    header = _read_header(beton)
    if header["version"] != _VERSION:
        raise ValueError(
            f"{beton} does not begin with FFCV's version number {_VERSION} (found {header['version']}): no .beton, of "
            f"another FFCV, or damaged; {AGAIN}"
        )
    if header["num_samples"] == 0:
        raise ValueError(f"{beton} holds no samples: a conversion that was not finished; {AGAIN}")


def _read_header(beton: Path) -> np.void:
    """What stands where the header should be; zeros where the file is shorter."""
    with open(beton, "rb") as file:
        content = file.read(_HEADER.itemsize)
    header: np.void = np.frombuffer(content.ljust(_HEADER.itemsize, b"\0"), dtype=_HEADER)[0]
    return header


def encode_file_list(files: Sequence[str]) -> bytes:
    """The content of a .files.txt. Names that are not UTF-8 keep their bytes."""
    return b"".join(os.fsencode(file) + b"\n" for file in files)


def tables_digest(beton: Path) -> str:
    """SHA-256 over a .beton without its pages: header, field descriptors, sample table, allocation table.

    Page contents (the pictures) are not covered; the sample table's addresses and sizes are. A file too damaged
    to find the tables in gives a text that equals no digest.
    """
    digest = hashlib.sha256()
    header = _read_header(beton)
    table, num_samples = int(header["table"]), int(header["num_samples"])
    with open(beton, "rb") as file:
        if num_samples == 0 or table + num_samples * _ALLOCATION.itemsize != beton.stat().st_size:
            return "no whole allocation table"
        file.seek(table)
        allocations = file.read()
        rest = min(int(np.frombuffer(allocations, dtype=_ALLOCATION)["address"].min()), table)  # first page's start
        file.seek(0)
        while rest and (piece := file.read(min(rest, 1 << 20))):
            digest.update(piece)
            rest -= len(piece)
    digest.update(allocations)
    return digest.hexdigest()
