"""The plan of a conversion: which images, in which order, each as JPEG or raw. All of it follows from the options."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ffcv_convnext import __version__
from ffcv_convnext.data.beton import EncodedImage, Manifest, Split
from ffcv_convnext.data.convert.encode import Task, encode_images
from ffcv_convnext.data.convert.folders import describe_left_out
from ffcv_convnext.data.convert.journal import Identity, Journal
from ffcv_convnext.data.convert.options import ConversionOptions
from ffcv_convnext.data.convert.source import Source
from ffcv_convnext.formatting import format_bytes
from ffcv_convnext.rng import Stream, permutation, sample_words, uniform

ESTIMATE_IMAGES = 24  # encoded to estimate the size of the files

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """The images of a .beton, in its order."""

    split: Split
    source: Source
    compress: list[bool]  # for each image: JPEG, or raw pixels
    everything: Source  # all images of the split, in the order of the source
    identity: Identity

    def task(self, indices: Sequence[int]) -> Task:
        """Return the task to encode these images."""
        return Task(self.source.select(indices), [self.compress[index] for index in indices])


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
    everything, chosen = source, np.arange(len(source))
    if options.subset is not None:
        if options.subset > len(chosen):
            say(f"{split}: subset = {options.subset}, but there are only {len(chosen)} images; all are used")
        order = permutation(len(chosen), options.seed, epoch=0, stream=Stream.SUBSET)
        chosen = np.sort(order[: options.subset])
    if split == "train" and options.shuffle_indices:
        chosen = chosen[permutation(len(chosen), options.seed, epoch=0, stream=Stream.STORED_ORDER)]
    draws = uniform(sample_words(options.seed, 0, chosen.astype(np.uint64), Stream.COMPRESSION)[0])
    compress = (draws < options.compress_probability).tolist()
    source = source.select(chosen.tolist())
    number = len(source)
    images = [source.classes, [source.name(i) for i in range(number)], [source.label(i) for i in range(number)]]
    page_bytes = options.encoding.max_bytes
    stored = [__version__, options.max_resolution, options.jpeg_quality, options.subsampling, page_bytes]
    drawn = [options.subset, options.seed, options.shuffle_indices, options.compress_probability]
    settings = _digest([split, *stored, *drawn, options.extensions])
    identity = Identity(_digest([split, *images, compress, *stored]), settings)
    if options.shard is not None:
        index, num_shards = options.shard
        if num_shards > number:
            raise ValueError(f"shard = {index}/{num_shards}: {split} has only {number} images; use fewer shards")
        start, stop = number * index // num_shards, number * (index + 1) // num_shards
        source, compress = source.select(range(start, stop)), compress[start:stop]
    return Plan(split, source, compress, everything, identity)


def _digest(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def check_room(plans: Sequence[Plan], options: ConversionOptions, say: Say) -> None:
    """Report the expected size of the files. Raises ValueError if out_dir has less room.

    The estimate comes from ESTIMATE_IMAGES of each split, evenly spread, which are encoded for it.
    """
    page_bytes = options.encoding.max_bytes
    needed = 0
    for plan in plans:
        spread = np.unique(np.linspace(0, len(plan.source) - 1, ESTIMATE_IMAGES).astype(int)).tolist()
        task = plan.task([index for index in spread if plan.source.is_regular(index)])
        sizes = [len(each.data) for each in encode_images(task, options.encoding) if isinstance(each, EncodedImage)]
        if sizes:
            needed += int(np.ceil(np.mean(sizes) * len(plan.source) / page_bytes) + 1) * page_bytes
    place = next(folder for folder in (options.out_dir, *options.out_dir.absolute().parents) if folder.exists())
    unfinished = (Journal(options.out_dir, options.stem(plan.split)).beton for plan in plans)
    free = shutil.disk_usage(place).free + sum(beton.stat().st_size for beton in unfinished if beton.exists())
    if needed > free:
        raise ValueError(
            f"out_dir = {options.out_dir} has room for {format_bytes(free)}, about {format_bytes(needed)} are needed; "
            "make room, choose another --out_dir, or lower --max_resolution or --jpeg_quality"
        )
    if needed:
        number = sum(len(plan.source) for plan in plans)
        say(f"{number} images will take about {format_bytes(needed)}; {format_bytes(free)} are free")
