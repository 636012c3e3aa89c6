"""Manifest of a .beton: a JSON file and a list of original files beside it. Imports neither ffcv nor numba.

`train.beton` has `train.json` (classes, number of samples, encoding, skipped files, hashes) and `train.files.txt`, the
original file of every sample, one per line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ffcv_convnext.data.beton.layout import CONVERT_AGAIN, check_header, table_sizes, tables_digest
from ffcv_convnext.data.codec.turbojpeg import Subsampling
from ffcv_convnext.files import replacing, write_atomically

Split = Literal["train", "val"]
FORMAT = 2
_BLOCK = 1 << 14  # lines of a list of files


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """A source file that is not in the .beton."""

    path: str  # relative to the source folder
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Content and origin of a .beton."""

    split: Split
    classes: tuple[str, ...]  # in index order: a label is an index into it
    num_samples: int
    source: str  # folder that held the class folders
    write_mode: Literal["jpg", "raw", "proportion"]  # proportion: both occur
    max_resolution: int | None  # longest side, pixels
    jpeg_quality: int | Literal["original"]
    subsampling: Subsampling  # of chroma, in JPEGs that were encoded for this file
    compress_probability: float  # probability that an image is stored as JPEG
    num_originals: int  # images that keep the DCT coefficients of their files
    shuffled: bool  # stored in a random order, not class by class
    seed: int  # of subset, compress_probability and the stored order
    subset: int | None  # requested number of images; None: all
    shard: tuple[int, int] | None  # (i, n): the i-th of n parts; None: not a part
    skipped: tuple[SkippedFile, ...]
    extensions: tuple[str, ...] = ()  # further endings of image files
    left_out: Mapping[str, int] = field(default_factory=dict)  # files of the source that have other endings, by ending
    label_names: tuple[str, ...] = ()  # class of each integer label in the source, if its labels are integers
    ffcv_version: str
    package_version: str
    identity: str  # hash of all that determines the .beton's bytes, except the content of the image files
    page_bytes: int  # size of an FFCV page, a group of adjacent samples
    page_crc32: tuple[int, ...]  # of each page, in their order
    num_bytes: int  # size of the .beton
    sha256: str  # `tables_digest` of the .beton
    files_sha256: str  # of the .files.txt

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Label of each class."""
        return {name: index for index, name in enumerate(self.classes)}

    @staticmethod
    def path_for(beton: Path) -> Path:
        """Return where the manifest of a .beton lies."""
        return beton.with_suffix(".json")

    @staticmethod
    def files_path_for(beton: Path) -> Path:
        """Return where the list of original files of a .beton lies."""
        return beton.with_suffix(".files.txt")

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a manifest. Raises FileNotFoundError, or ValueError if the file is not a manifest."""
        if not path.is_file():
            raise FileNotFoundError(f"manifest {path} not found; write_ffcv_dataset.py writes it beside the .beton")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError("written by another version of this package")
            return cls._from_json(content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"manifest {path} is not usable ({' '.join(str(error).split())}); {CONVERT_AGAIN}"
            ) from None

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Manifest:
        class_to_idx = content.pop("class_to_idx")
        content["classes"] = tuple(content["classes"])
        content["shard"] = tuple(content["shard"]) if content["shard"] else None
        content["page_crc32"] = tuple(content["page_crc32"])
        for name in ("extensions", "label_names"):  # not in all manifests
            content[name] = tuple(content.get(name, ()))
        content["skipped"] = tuple(SkippedFile(**entry) for entry in content["skipped"])
        manifest = cls(**content)
        for name, kind in get_type_hints(cls).items():
            if not _is_of_type(value := getattr(manifest, name), kind):
                raise ValueError(f"{name} is {ascii(value)[:60]}")
        for name in ("num_samples", "page_bytes", "num_bytes"):
            if getattr(manifest, name) <= 0:
                raise ValueError(f"{name} is {getattr(manifest, name)}")
        for name in ("sha256", "files_sha256"):
            if not re.fullmatch("[0-9a-f]{64}", getattr(manifest, name)):
                raise ValueError(f"{name} is {ascii(getattr(manifest, name))[:60]}")
        if manifest.class_to_idx != class_to_idx:
            raise ValueError("classes and class_to_idx disagree")
        return manifest

    def write(self, path: Path) -> None:
        """Write atomically: a reader gets the old file or the complete new one."""
        content = {"format": FORMAT, **dataclasses.asdict(self), "class_to_idx": self.class_to_idx}
        if not self.label_names:
            del content["label_names"]
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def for_beton(cls, beton: Path) -> Manifest:
        """Read the manifest beside a .beton without comparing the two.

        Raises FileNotFoundError if the .beton is missing, ValueError if the manifest is missing or unusable.
        """
        if not beton.is_file():
            raise FileNotFoundError(f"{beton} does not exist; create it with write_ffcv_dataset.py")
        if not cls.path_for(beton).is_file():
            raise ValueError(f"{beton} has no manifest {cls.path_for(beton).name} beside it; {CONVERT_AGAIN}")
        return cls.read(cls.path_for(beton))

    @classmethod
    def check(cls, beton: Path) -> Manifest:
        """Read the manifest beside a .beton and compare the file's size and tables with it.

        The pages, which hold the images, are not read, so this takes milliseconds for gigabytes; a damaged image is
        found when it is decoded. Raises as `for_beton` does, and ValueError if the .beton is truncated, damaged or from
        another conversion than its manifest.
        """
        manifest = cls.for_beton(beton)
        size = beton.stat().st_size
        if size != manifest.num_bytes:
            raise ValueError(
                f"{beton} has {size} bytes, its manifest states {manifest.num_bytes}: an incomplete copy or from "
                f"another conversion; copy it again together with its manifest, or {CONVERT_AGAIN}"
            )
        check_header(beton)
        if tables_digest(beton) != manifest.sha256:
            raise ValueError(
                f"{beton}: header or sample table differ from the manifest's hash: damaged or from another conversion; "
                f"copy it again together with its manifest, or {CONVERT_AGAIN}"
            )
        num_samples, page_bytes, num_pages = table_sizes(beton)
        stated = manifest.num_samples, manifest.page_bytes, len(manifest.page_crc32) or num_pages
        if stated != (num_samples, page_bytes, num_pages):
            raise ValueError(
                f"{beton} has {num_samples} samples in {num_pages} pages of {page_bytes} bytes, its manifest states "
                f"{stated[0]}, {stated[2]} and {stated[1]}: damaged; copy both again, or {CONVERT_AGAIN}"
            )
        return manifest

    def file_list(self, beton: Path) -> bytes | None:
        """Return the samples' original files, a line each, in sample order and relative to `source`.

        None if the list is missing or belongs to another .beton.
        """
        try:
            content = self.files_path_for(beton).read_bytes()
        except OSError:
            return None
        return content if hashlib.sha256(content).hexdigest() == self.files_sha256 else None

    def original_files(self, beton: Path) -> list[str] | None:
        """Return the samples' original files, or None as `file_list`. Takes 100 bytes a sample."""
        content = self.file_list(beton)
        return None if content is None else [os.fsdecode(line) for line in content.split(b"\n")[:-1]]

    def original_file(self, beton: Path, sample: int) -> Path | None:
        """Return the original file of a sample, or None if it is unknown. Reads the whole list."""
        found = self.select_original_files(beton, (sample,))
        return Path(self.source) / found[sample] if sample in found else None

    def select_original_files(self, beton: Path, samples: Collection[int]) -> dict[int, str]:
        """Return the original files of some samples, where known. Reads the whole list; keeps only these in memory."""
        digest, found = hashlib.sha256(), {}
        try:
            with open(self.files_path_for(beton), "rb") as file:
                for number, line in enumerate(file):
                    digest.update(line)
                    if number in samples:
                        found[number] = os.fsdecode(line.removesuffix(b"\n"))
        except OSError:
            return {}
        return found if digest.hexdigest() == self.files_sha256 else {}

    def count_original_files(self, beton: Path) -> int | None:
        """Return the number of lines of the list of original files, or None as `file_list`."""
        digest, number = hashlib.sha256(), 0
        try:
            with open(self.files_path_for(beton), "rb") as file:
                while part := file.read(1 << 20):
                    digest.update(part)
                    number += part.count(b"\n")
        except OSError:
            return None
        return number if digest.hexdigest() == self.files_sha256 else None


def _is_of_type(value: Any, kind: Any) -> bool:
    """Return whether a value that was read from JSON is of a field's type."""
    origin, kinds = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in kinds and not isinstance(value, bool)
    if origin in (Union, UnionType):
        return any(_is_of_type(value, each) for each in kinds)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        each = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        return len(value) == len(each) and all(map(_is_of_type, value, each))
    if origin is Mapping:
        return isinstance(value, dict) and all(_is_of_type(item, kinds[1]) for item in value.values())
    if kind is SkippedFile:
        return isinstance(value, kind) and isinstance(value.path, str) and isinstance(value.reason, str)
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def encode_file_list(files: Iterable[str]) -> Iterator[bytes]:
    """Yield the content of a .files.txt in parts. Names that are not UTF-8 keep their bytes."""
    left = iter(files)
    while block := list(islice(left, _BLOCK)):
        yield os.fsencode("\n".join([*block, ""]))


def write_file_list(path: Path, parts: Iterable[bytes]) -> str:
    """Write a .files.txt atomically and return its SHA-256.   parts: its content, in order."""
    digest = hashlib.sha256()
    with replacing(path) as file:
        for part in parts:
            file.write(part)
            digest.update(part)
    return digest.hexdigest()
