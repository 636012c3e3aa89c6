"""The plan of a conversion: which images, in which order, each as JPEG or raw. All of it follows from the options."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext import __version__
from ffcv_convnext.data.beton import EncodedImage, Manifest, Split
from ffcv_convnext.data.convert.encode import Task, encode_images
from ffcv_convnext.data.convert.folders import describe_left_out
from ffcv_convnext.data.convert.journal import Identity, Journal
from ffcv_convnext.data.convert.options import ConversionOptions
from ffcv_convnext.data.convert.source import Source, labels_of, names_of
from ffcv_convnext.formatting import format_bytes
from ffcv_convnext.rng import Stream, permutation, sample_words, uniform

ESTIMATE_IMAGES = 24  # encoded to estimate the size of the files
_BLOCK = 1 << 14  # images that are handled at once, which bounds the memory

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The images of a .beton, in its order: positions from 0 to `len(plan)`."""

    split: Split
    source: Source  # all images of the split
    order: NDArray[np.int64]  # (N,) index into `source` of the image at each position
    compress: NDArray[np.bool_]  # (N,) JPEG, or raw pixels
    identity: Identity

    def __len__(self) -> int:
        return len(self.order)

    def name(self, position: int) -> str:
        """Return the name of an image."""
        return self.source.name(int(self.order[position]))

    def label(self, position: int) -> int:
        """Return the label of an image."""
        return self.source.label(int(self.order[position]))

    def task(self, positions: slice | NDArray[np.int64]) -> Task:
        """Return the task to encode these images."""
        return Task(self.source.select(self.order[positions]), self.compress[positions].tolist())


def make_plans(sources: Mapping[Split, Source], options: ConversionOptions, say: Say) -> list[Plan]:
    """Make the plan of each split. Raises ValueError if the splits in out_dir have other classes than `sources`."""
    for split in options.splits:
        if described := describe_left_out(sources[split].left_out):
            say(f"{split}: {described}")
    for other in set(get_args(Split)) - set(options.splits):
        _check_same_classes(options.out_dir / f"{other}.json", sources[options.splits[0]].classes)
    return [_make_plan(split, sources[split], options, say) for split in options.splits]


def _check_same_classes(other: Path, classes: tuple[str, ...]) -> None:
    if other.is_file() and (theirs := Manifest.read(other).classes) != classes:
        difference = sorted(set(theirs) ^ set(classes))
        raise ValueError(
            f"{other} has {len(theirs)} classes, the images have {len(classes)} "
            f"(different: {', '.join(difference[:3])}); convert both splits with --split all --overwrite, "
            "or choose another --out_dir"
        )


def _make_plan(split: Split, source: Source, options: ConversionOptions, say: Say) -> Plan:
    chosen = np.arange(len(source))
    if options.subset is not None:
        if options.subset > len(chosen):
            say(f"{split}: subset = {options.subset}, but there are only {len(chosen)} images; all are used")
        order = permutation(len(chosen), options.seed, epoch=0, stream=Stream.SUBSET)
        chosen = np.sort(order[: options.subset])
    if split == "train" and options.shuffle_indices:
        chosen = chosen[permutation(len(chosen), options.seed, epoch=0, stream=Stream.STORED_ORDER)]
    number = len(chosen)
    compress = np.empty(number, np.bool_)
    for start in range(0, number, _BLOCK):
        block = slice(start, start + _BLOCK)
        draws = uniform(sample_words(options.seed, 0, chosen[block].astype(np.uint64), Stream.COMPRESSION)[0])
        compress[block] = draws < options.compress_probability
    images = [source.classes, names_of(source, chosen), labels_of(source, chosen)]
    page_bytes = options.encoding.max_bytes
    stored = [__version__, options.max_resolution, options.jpeg_quality, options.subsampling, page_bytes]
    drawn = [options.subset, options.seed, options.shuffle_indices, options.compress_probability]
    settings = _digest([split, *stored, *drawn, options.extensions])
    choices = (value for start in range(0, number, _BLOCK) for value in compress[start : start + _BLOCK].tolist())
    identity = Identity(_digest([split, *images, choices, *stored]), settings)
    if options.shard is not None:
        index, num_shards = options.shard
        if num_shards > number:
            raise ValueError(f"shard = {index}/{num_shards}: {split} has only {number} images; use fewer shards")
        start, stop = number * index // num_shards, number * (index + 1) // num_shards
        chosen, compress = chosen[start:stop].copy(), compress[start:stop].copy()
    return Plan(split, source, chosen, compress, identity)


def _digest(facts: Iterable[Any]) -> str:
    """Return the SHA-256 of the JSON of a list. A fact that is an iterator stands for a list of what it yields."""
    digest = hashlib.sha256()
    for part in _json_parts(facts):
        digest.update(part.encode())
    return digest.hexdigest()


def _json_parts(facts: Iterable[Any]) -> Iterator[str]:
    yield "["
    for number, fact in enumerate(facts):
        yield ", " if number else ""
        if not isinstance(fact, Iterator):
            yield json.dumps(fact)
            continue
        yield "["
        separator = ""
        while block := list(islice(fact, _BLOCK)):
            yield separator + json.dumps(block)[1:-1]
            separator = ", "
        yield "]"
    yield "]"


def check_room(plans: Sequence[Plan], options: ConversionOptions, say: Say) -> None:
    """Report the expected size of the files. Raises ValueError if out_dir has less room.

    The estimate comes from ESTIMATE_IMAGES of each split, evenly spread, which are encoded for it.
    """
    page_bytes = options.encoding.max_bytes
    needed = 0
    for plan in plans:
        spread = np.unique(np.linspace(0, len(plan) - 1, ESTIMATE_IMAGES).astype(np.int64))
        regular = [plan.source.is_regular(index) for index in plan.order[spread].tolist()]
        task = plan.task(spread[regular])
        sizes = [len(each.data) for each in encode_images(task, options.encoding) if isinstance(each, EncodedImage)]
        if sizes:
            needed += int(np.ceil(np.mean(sizes) * len(plan) / page_bytes) + 1) * page_bytes
    place = next(folder for folder in (options.out_dir, *options.out_dir.absolute().parents) if folder.exists())
    unfinished = (Journal(options.out_dir, options.stem(plan.split)).beton for plan in plans)
    free = shutil.disk_usage(place).free + sum(beton.stat().st_size for beton in unfinished if beton.exists())
    if needed > free:
        raise ValueError(
            f"out_dir = {options.out_dir} has room for {format_bytes(free)}, about {format_bytes(needed)} are needed; "
            "make room, choose another --out_dir, or lower --max_resolution or --jpeg_quality"
        )
    if needed:
        number = sum(len(plan) for plan in plans)
        say(f"{number} images will take about {format_bytes(needed)}; {format_bytes(free)} are free")
