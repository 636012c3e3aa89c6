"""WebDataset shards, read in place: tar archives with the files KEY.jpg and KEY.cls (or KEY.json) of each sample."""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ffcv_convnext.data.convert.archives import Index, in_threads
from ffcv_convnext.data.convert.folders import IMAGE_EXTENSIONS
from ffcv_convnext.data.convert.labels import ClassList, RawLabels, check_every_class_has_images
from ffcv_convnext.data.convert.tars import Member, TarImages, list_members

_LABEL_KEYS = ("label", "class", "cls")


class _Sample:
    """The members of a sample that count."""

    __slots__ = ("facts", "image", "text")

    def __init__(self) -> None:
        self.image: Member | None = None
        self.text: Member | None = None  # .cls
        self.facts: Member | None = None  # .json


class _Found(NamedTuple):
    """A sample with an image and a label."""

    key: str
    image: Member
    file: str  # name of the original file
    label: str
    folder: str  # of the original file, '' if it is not known


class Shards:
    """The images of WebDataset shards, whose labels are known and whose classes may not be."""

    def __init__(
        self, location: Path, archives: Sequence[Path], extensions: tuple[str, ...] = IMAGE_EXTENSIONS
    ) -> None:
        """Index the shards.

        Raises FileNotFoundError, or ValueError as `list_members` does, for a sample without a label or with two images,
        for an unreadable label and for two samples of one key.
        """
        self.location = location
        self.raw = RawLabels()
        self._index = Index(archives)
        self._keys = array("q")  # hash of each
        read = partial(_read_shard, extensions=extensions)
        for which, (samples, left_out) in enumerate(in_threads(read, archives)):
            self._index.left_out += left_out
            for key, image, file, text, folder in samples:
                code = self.raw.code(text, (self._index.archives[which], image.name), folder)
                self._index.add(file, which, image.start, image.size, code)
                self._keys.append(hash(key))
        if not len(self._index):
            raise ValueError(f"{location} has no samples with an image ({', '.join(extensions)})")
        self._check_keys(archives, extensions)

    def finish(
        self, stated: Sequence[str], train: ClassList | None, source: str, *, all_classes: bool
    ) -> tuple[TarImages, ClassList]:
        """Return the images with labels, and the classes. Arguments as of `RawLabels.resolve`.

        all_classes: each class must have an image, as in train.
        """
        found, of_codes = self.raw.resolve(stated, train, source)
        labels = of_codes[np.array(self._index.labels, np.int32)]
        if all_classes:
            check_every_class_has_images(self.location, labels, found.classes)
        fields, _ = self._index.finish(found.classes, labels)
        return TarImages(location=self.location, label_names=found.label_names, **fields), found

    def _check_keys(self, archives: Sequence[Path], extensions: tuple[str, ...]) -> None:
        in_order = np.sort(np.frombuffer(self._keys, np.int64))
        double = set(in_order[1:][in_order[1:] == in_order[:-1]].tolist())
        self._keys = array("q")
        if not double:
            return
        first: dict[str, Path] = {}
        for archive in archives:
            for member in list_members(archive):
                key, end = split_key(member.name)
                if end in extensions and hash(key) in double:
                    if key in first:
                        raise ValueError(f"{first[key]} and {archive} both hold a sample {key}; remove one")
                    first[key] = archive


def _read_shard(archive: Path, extensions: tuple[str, ...]) -> tuple[list[_Found], Counter[str]]:
    """Return the samples of a shard, and the number of other members by ending."""
    samples: dict[str, _Sample] = {}
    left_out: Counter[str] = Counter()
    for member in list_members(archive):
        key, end = split_key(member.name)
        sample = samples.get(key)
        if sample is None:
            sample = samples[key] = _Sample()
        if end == ".cls":
            sample.text = member
        elif end == ".json":
            sample.facts = member
        elif end not in extensions:
            left_out[end or "without ending"] += 1
        elif sample.image is not None and sample.image.name != member.name:  # else `list_members` tells
            raise ValueError(f"{archive}: {sample.image.name} and {member.name} are images of one sample")
        else:
            sample.image = member
    with open(archive, "rb") as file:
        number = file.fileno()
        found = [
            _read_sample(archive, number, key, sample.image, sample)
            for key, sample in samples.items()
            if sample.image is not None
        ]
    return found, left_out


def _read_sample(archive: Path, descriptor: int, key: str, image: Member, sample: _Sample) -> _Found:
    facts: dict[str, Any] = {}
    label: Any = None
    if sample.facts is not None:
        facts = _read_facts(archive, descriptor, sample.facts)
    if sample.text is None:
        label = next((facts[key] for key in _LABEL_KEYS if facts.get(key) is not None), None)
    else:
        label = os.pread(descriptor, sample.text.size, sample.text.start).decode("utf-8", "replace").strip()
    if label is None:
        raise ValueError(
            f"{archive}: {image.name} has no label; expected a member {key}.cls, or {key}.json with "
            f"{', '.join(_LABEL_KEYS[:-1])} or {_LABEL_KEYS[-1]}"
        )
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise ValueError(f"{archive}: {key}.json: the label {label!r} is no name or number")
    name = facts.get("filename")
    if isinstance(name, str) and name:
        above, _, file = name.rpartition("/")
        folder = above.rpartition("/")[2]
    else:
        file, folder = image.name.removeprefix("./"), ""
    if "\n" in file or "\r" in file:
        raise ValueError(f"{archive}: {image.name}: the file name {file!r} has a line break")
    return _Found(key, image, file, str(label), folder)


def split_key(name: str) -> tuple[str, str]:
    """Return 'a/b' and '.seg.png' for 'a/b.seg.PNG': a key ends at the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    key, dot, end = file.partition(".")
    return folder + slash + key, (dot + end).lower()


def _read_facts(archive: Path, descriptor: int, member: Member) -> dict[str, Any]:
    content = os.pread(descriptor, member.size, member.start)
    try:
        facts = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{archive}: {member.name} is not JSON ({error})") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{archive}: {member.name} is not a JSON object")
    return facts


def holds_samples(archive: Path) -> bool:
    """Return whether an archive looks like a shard: among its first members is a label."""
    for number, member in enumerate(list_members(archive)):
        if split_key(member.name)[1] in (".cls", ".json"):
            return True
        if number > 8:
            break
    return False
