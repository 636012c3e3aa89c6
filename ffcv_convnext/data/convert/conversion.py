"""Conversion of an ImageFolder into .beton files with their manifests. FFCV itself is imported once work begins.

What is stored, and in which order, is settled first (`_Plan`): a function of the folder and the options. Workers then
encode the files of that list, and this process writes what they answer. So the bytes of the result depend neither on
the number of workers, nor on interruptions (--resume), nor on being made in parts (--shard, --join).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from ffcv_convnext import __version__
from ffcv_convnext.data.beton import EncodedImage, Manifest, Page, SkippedFile, Split, encode_file_list, tables_digest
from ffcv_convnext.data.codec.turbojpeg import MAX_JPEG_SIDE, Subsampling
from ffcv_convnext.data.convert.encode import Encoding, Rejected, encode_files
from ffcv_convnext.data.convert.journal import Progress, Workplace, workplace
from ffcv_convnext.data.convert.progress import ProgressBar
from ffcv_convnext.data.convert.source import LAYOUT, ImageFolder, list_classes, scan
from ffcv_convnext.data.convert.worker_pool import WorkerDied, Workers
from ffcv_convnext.errors import Failure
from ffcv_convnext.formatting import format_bytes
from ffcv_convnext.rng import Stream, permutation, sample_words, uniform

if TYPE_CHECKING:
    from ffcv_convnext.data.beton.writer import BetonWriter

Say = Callable[[str], None]
logger = logging.getLogger(__name__)

MIN_PAGE_BYTES = 8 << 20  # FFCV's default
MAX_PAGE_BYTES = 64 << 20  # a loader that does without the page cache holds several pages in memory
BYTES_A_PIXEL = 3  # raw; JPEG of pure noise at quality 100 stays below
ESTIMATE_FILES = 24  # encoded in advance, to tell how much room is needed


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionOptions:
    """What to convert, and how. Checks itself; `convert` checks the folders."""

    data_path: Path
    out_dir: Path
    split: Literal["train", "val", "all"] = "all"
    max_resolution: int | None = 500  # longest side, pixels; larger images are shrunk
    jpeg_quality: int | Literal["original"] = 90  # 1 ... 100; original: JPEGs keep their coefficients
    subsampling: Subsampling = "420"  # of chroma, where a picture is encoded anew
    compress_probability: float = 1.0  # of a picture to be stored as JPEG; the others are stored as raw pixels
    shuffle_indices: bool = True  # store train in a random order, for order = quasi_random; val keeps the folder's
    num_workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    subset: int | None = None  # images of each split
    seed: int = 0  # of subset, compress_probability and shuffle_indices
    shard: tuple[int, int] | None = None  # (i, n): only the i-th of n parts, i from 0
    skip_bad: bool = False
    overwrite: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        if self.split not in ("train", "val", "all"):
            raise ValueError(f"split = {self.split}: expected train, val or all")
        if self.max_resolution is not None and not 1 <= self.max_resolution <= MAX_JPEG_SIDE:
            raise ValueError(f"max_resolution = {self.max_resolution}: expected 1 to {MAX_JPEG_SIDE} pixels, or none")
        if self.jpeg_quality != "original" and not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality = {self.jpeg_quality}: expected 1 to 100, or original")
        if self.subsampling not in get_args(Subsampling):
            raise ValueError(f"subsampling = {self.subsampling}: expected {', '.join(get_args(Subsampling))}")
        if not 0 <= self.compress_probability <= 1:
            raise ValueError(f"compress_probability = {self.compress_probability}: expected a probability")
        for name in ("num_workers", "subset"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: expected at least 1")
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed}: expected 0 or more")
        if self.shard is not None and not 0 <= self.shard[0] < self.shard[1]:
            raise ValueError(f"shard = {self.shard[0]}/{self.shard[1]}: expected i/n with i from 0 to n - 1")
        if self.overwrite and self.resume:
            raise ValueError("overwrite starts anew and resume goes on: choose one of them")

    @property
    def splits(self) -> tuple[Split, ...]:
        return get_args(Split) if self.split == "all" else (self.split,)

    @property
    def encoding(self) -> Encoding:
        """With the smallest page that surely holds any image of this resolution, within limits."""
        page = MIN_PAGE_BYTES if self.max_resolution else MAX_PAGE_BYTES
        while self.max_resolution and page < min(BYTES_A_PIXEL * self.max_resolution**2, MAX_PAGE_BYTES):
            page *= 2
        return Encoding(
            max_resolution=self.max_resolution,
            jpeg_quality=self.jpeg_quality,
            subsampling=self.subsampling,
            max_bytes=page,
        )

    def name(self, split: Split) -> str:
        """Of a split's files, without their endings."""
        return split if self.shard is None else part_name(split, *self.shard)


def part_name(split: Split, index: int, number: int) -> str:
    """'train.part-0-of-8'."""
    return f"{split}.part-{index}-of-{number}"


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a .beton is to hold, in its order."""

    split: Split
    folder: ImageFolder
    files: list[str]  # relative to folder.source
    labels: list[int]
    compress: list[bool]  # as JPEG, else raw
    identity: str  # a hash of all that settles the whole file's bytes, but for the content of the image files

    def tasks(self) -> list[tuple[str, bool]]:
        """What workers are to encode."""
        source = str(self.folder.source)
        return [(os.path.join(source, file), jpeg) for file, jpeg in zip(self.files, self.compress, strict=True)]


def convert(options: ConversionOptions, say: Say = logger.info) -> list[Manifest]:
    """Write `<split>.beton`, `<split>.json` and `<split>.files.txt` into out_dir, for each split asked for.

    say: takes one line of text, a few in all.
    What is wrong with folders and options is a ValueError or FileNotFoundError, FileExistsError, PermissionError
    before any work; what goes wrong in it is a Failure. Either way, and after Ctrl-C or SIGKILL, whole pages stay in a
    hidden folder, from which options.resume goes on; the finished files appear only when everything is written.
    """
    folders = _list_images(options)
    plans = {split: _make_plan(split, folders[split], options, say) for split in options.splits}
    done = {split: _finished(plan, options) for split, plan in plans.items()}
    _check_room([plan for split, plan in plans.items() if done[split] is None], options, say)
    manifests = []
    for split, plan in plans.items():
        if (manifest := done[split]) is None:
            manifest = _convert_split(plan, options, say)
        else:
            say(f"{options.out_dir / options.name(split)}.beton is finished")
        manifests.append(manifest)
    return manifests


def _finished(plan: _Plan, options: ConversionOptions) -> Manifest | None:
    """The manifest of a file that an earlier attempt has finished. Raises FileExistsError for one to be kept."""
    name = options.name(plan.split)
    target = options.out_dir / f"{name}.beton"
    if not target.exists():
        unfinished = options.out_dir / f".{name}.unfinished"
        if not options.resume and not options.overwrite and Workplace(unfinished, name).num_pages:
            raise FileExistsError(
                f"{unfinished} holds an unfinished conversion; go on with --resume, or start anew with --overwrite"
            )
        return None
    if options.overwrite:
        return None
    if options.resume and (manifest := Manifest.check(target)).identity == plan.identity:
        return manifest  # the name tells parts apart
    raise FileExistsError(f"{target} exists; replace it with --overwrite, or choose another --out_dir")


def _list_images(options: ConversionOptions) -> dict[Split, ImageFolder]:
    """Every split's images, with the class list of train."""
    root = options.data_path
    if not root.is_dir():
        raise FileNotFoundError(f"data_path = {root} is not a folder; {LAYOUT}")
    for split in options.splits:
        if not (root / split).is_dir():
            raise FileNotFoundError(f"{root / split} does not exist; {LAYOUT}, or choose another --split")
    if (root / "train").is_dir():
        classes = list_classes(root / "train")
    elif (options.out_dir / "train.json").is_file():
        classes = Manifest.read(options.out_dir / "train.json").classes
    else:
        raise FileNotFoundError(
            f"the class list of train is not known: neither {root / 'train'} nor {options.out_dir / 'train.json'} "
            "exists; convert train first, or put its folder beside val"
        )
    for other in set(get_args(Split)) - set(options.splits):
        _check_same_classes(options.out_dir / f"{other}.json", classes)
    return {split: scan(root / split, classes, all_classes=split == "train") for split in options.splits}


def _check_same_classes(other: Path, classes: tuple[str, ...]) -> None:
    """Labels of the two splits in out_dir must mean the same."""
    if other.is_file() and (theirs := Manifest.read(other).classes) != classes:
        difference = sorted(set(theirs) ^ set(classes))
        raise ValueError(
            f"{other} was made with {len(theirs)} classes, here are {len(classes)} "
            f"(differing: {', '.join(difference[:3])}); convert both with --split all --overwrite, "
            "or choose another --out_dir"
        )


@contextmanager
def ending_like_ctrl_c() -> Iterator[None]:
    """SIGTERM and a closed terminal end the body with KeyboardInterrupt, so that it can clean up."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    stops = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    previous = {stop: signal.signal(stop, interrupt) for stop in stops}
    try:
        yield
    finally:
        for stop, handler in previous.items():
            signal.signal(stop, handler)


@contextmanager
def _stops_deferred() -> Iterator[None]:
    """A signal to stop that arrives inside takes effect at the end: libraries swallow exceptions while they load."""
    caught: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if in_main else ()
    previous = {stop: signal.signal(stop, lambda number, _frame: caught.append(number)) for stop in stops}
    try:
        yield
    finally:
        for stop, handler in previous.items():
            signal.signal(stop, handler)
    if caught:
        signal.raise_signal(caught[0])


def _make_plan(split: Split, folder: ImageFolder, options: ConversionOptions, say: Say) -> _Plan:
    """Choose the images, their order and their encoding, all from the seed."""
    chosen = np.arange(len(folder.files))
    if options.subset is not None:
        if options.subset > len(chosen):
            say(f"{split}: subset = {options.subset}, there are {len(chosen)} images, all are taken")
        order = permutation(len(chosen), options.seed, epoch=0, stream=Stream.SUBSET)
        chosen = np.sort(order[: options.subset])
    if split == "train" and options.shuffle_indices:
        chosen = chosen[permutation(len(chosen), options.seed, epoch=0, stream=Stream.STORED_ORDER)]
    draws = uniform(sample_words(options.seed, 0, chosen.astype(np.uint64), Stream.COMPRESSION)[0])
    files = [folder.files[index] for index in chosen]
    labels = [folder.labels[index] for index in chosen]
    compress = (draws < options.compress_probability).tolist()
    facts = [
        *(split, folder.classes, files, labels, compress, __version__),
        *(options.max_resolution, options.jpeg_quality, options.subsampling, options.encoding.max_bytes),
    ]
    identity = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    part = slice(None)
    if options.shard is not None:
        index, number = options.shard
        if number > len(files):
            raise ValueError(f"shard = {index}/{number}: {split} has {len(files)} images only; lower the number")
        part = slice(len(files) * index // number, len(files) * (index + 1) // number)
    return _Plan(split, folder, files[part], labels[part], compress[part], identity)


def _check_room(plans: Sequence[_Plan], options: ConversionOptions, say: Say) -> None:
    """Say how much room the files will need, and raise ValueError where the disk has less.

    A few dozen images, evenly spread, are encoded to know it.
    """
    needed = 0
    for plan in plans:
        spread = np.unique(np.linspace(0, len(plan.files) - 1, ESTIMATE_FILES).astype(int))
        tasks = plan.tasks()
        some = [tasks[index] for index in spread if _is_regular(tasks[index][0])]
        images = [image for image in encode_files(some, options.encoding) if isinstance(image, EncodedImage)]
        if images:
            pages = np.mean([len(image.data) for image in images]) * len(plan.files) / options.encoding.max_bytes
            needed += int(np.ceil(pages) + 1) * options.encoding.max_bytes
    place = next(folder for folder in (options.out_dir, *options.out_dir.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    for plan in plans:  # what lies there already need not be written again
        with_pages = options.out_dir / f".{options.name(plan.split)}.unfinished" / f"{options.name(plan.split)}.beton"
        if with_pages.exists():
            free += with_pages.stat().st_size
    if needed > free:
        raise ValueError(
            f"out_dir = {options.out_dir} has room for {format_bytes(free)}, about {format_bytes(needed)} are needed; "
            "make room, choose another --out_dir, or lower --max_resolution or --jpeg_quality"
        )
    if needed:
        number = sum(len(plan.files) for plan in plans)
        say(f"{number} images will take about {format_bytes(needed)} of the {format_bytes(free)} that are free")


def _is_regular(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _convert_split(plan: _Plan, options: ConversionOptions, say: Say) -> Manifest:
    name = options.name(plan.split)
    target = options.out_dir / f"{name}.beton"
    with workplace(options.out_dir, name) as place:
        started = time.monotonic()
        kept = place.read(plan.identity) if options.resume else None
        if options.resume and kept is None:
            say(f"{target}: nothing to resume, or of other images or settings; it is written from the start")
        writing = _Writing(plan, options, place, shown_as=target)
        try:
            writing.run(kept or [])
            seconds = time.monotonic() - started
            manifest = _write_manifest(plan, writing, options)
            publish(place, options.out_dir)
        except BaseException:
            if place.num_pages:
                say(
                    f"{target}: {writing.num_safe} of {len(plan.files)} images are kept; the same command with "
                    "--resume goes on from there, with --overwrite it starts anew"
                )
            raise
    again = f" ({writing.num_kept} of them from an earlier attempt)" if writing.num_kept else ""
    say(
        f"{target}: {manifest.num_samples} images{again} of {len(manifest.classes)} classes, "
        f"{manifest.num_bytes / 1e6:.1f} MB, {seconds:.1f} s, "
        f"{(manifest.num_samples - writing.num_kept) / seconds:.0f} images/s, "
        f"{len(manifest.skipped)} skipped" + (f" (listed in {name}.json)" if manifest.skipped else "")
    )
    return manifest


class _Writing:
    """Encode a plan's images in worker processes and write them in their order, journalling each page."""

    def __init__(self, plan: _Plan, options: ConversionOptions, place: Workplace, shown_as: Path) -> None:
        self.plan = plan
        self.options = options
        self.place = place
        self.shown_as = shown_as
        self.num_files = 0  # settled: stored, or skipped
        self.num_safe = 0  # of them, those up to the last whole page
        self.num_kept = 0  # pictures that an earlier attempt has stored
        self.num_originals = 0  # pictures with the coefficients of their files
        self.skipped: list[SkippedFile] = []
        self.pages: list[Page] = []
        self._num_skipped = 0  # of them in the journal

    def run(self, earlier: Sequence[Progress]) -> None:
        """Write what `earlier` lacks. Raises Failure."""
        plan, options = self.plan, self.options
        writer = None
        if earlier:
            writer = open_writer(self.place.beton, options.encoding, len(plan.files))
            earlier = earlier[: writer.keep_pages([progress.page for progress in earlier])]
        self.place.begin(plan.identity, earlier)
        for progress in earlier:
            self.num_files, self.num_originals = progress.num_files, progress.num_originals
            self.num_kept += len(progress.page.rows)
            self.skipped += [SkippedFile(path, reason) for path, reason in progress.skipped]
        self.num_safe = self.num_files
        self._num_skipped = len(self.skipped)
        tasks = plan.tasks()[self.num_files :]
        size = max(1, min(32, len(tasks) // (4 * options.num_workers)))
        chunks = [tasks[start : start + size] for start in range(0, len(tasks), size)]
        try:
            with Workers(partial(encode_files, encoding=options.encoding), chunks, options.num_workers) as answers:
                if writer is None or not earlier:  # takes seconds, in which the workers already encode
                    writer = open_writer(self.place.beton, options.encoding, len(plan.files))
                try:
                    number = writer.write(self._samples(answers), self._journal)
                except OSError as error:
                    raise Failure(self._full(writer.num_bytes, error)) from error
        except WorkerDied as died:
            (first, _), (last, _) = died.task[0], died.task[-1]
            raise Failure(
                f"a worker process was ended ({died.how}) on one of {len(died.task)} files from {first} to {last}; "
                "if memory ran out, lower --num_workers"
            ) from died
        if number == 0:
            raise Failure(
                f"none of the {len(plan.files)} files in {plan.folder.source} could be decoded; {self.shown_as} is not "
                "written"
            )
        self.pages = writer.pages

    def _samples(self, answers: Iterable[list[EncodedImage | Rejected]]) -> Iterator[tuple[EncodedImage, int]]:
        """A picture is settled when the next one is asked for."""
        name = f"{self.options.out_dir.name}/{self.shown_as.name}"
        with ProgressBar(len(self.plan.files), name, self.num_files) as progress:
            for images in answers:
                for image in images:
                    if isinstance(image, EncodedImage):
                        yield image, self.plan.labels[self.num_files]
                        self.num_originals += image.is_original
                    else:
                        self.skipped.append(self._skip(image))
                    self.num_files += 1
                progress.add(len(images))

    def _skip(self, image: Rejected) -> SkippedFile:
        file = self.plan.files[self.num_files]
        path = self.plan.folder.source / file
        if not image.skippable:
            raise Failure(f"{path}: {image.reason}")
        if not self.options.skip_bad:
            raise Failure(f"{path}: {image.reason}; repair or remove the file, or leave such files out with --skip_bad")
        return SkippedFile(file, image.reason)

    def _journal(self, page: Page) -> None:
        skipped = [(file.path, file.reason) for file in self.skipped[self._num_skipped :]]
        self._num_skipped = len(self.skipped)
        self.num_safe = self.num_files
        self.place.append(Progress(page, self.num_files, self.num_originals, skipped))

    def _full(self, num_bytes: int, error: OSError) -> str:
        number, total = self.num_files - len(self.skipped), len(self.plan.files)
        needed = f", about {num_bytes * total / number / 1e6:.0f} MB are needed" if number else ""
        return (
            f"{self.shown_as} cannot be written: {error.strerror} after {num_bytes / 1e6:.0f} MB "
            f"({number} of {total} images{needed}); make room or choose another --out_dir"
        )


def open_writer(path: Path, encoding: Encoding, capacity: int) -> BetonWriter:
    """FFCV is imported here, once work has begun."""
    with _stops_deferred():
        from ffcv_convnext.data.beton.writer import BetonWriter
    return BetonWriter(path, encoding, capacity)


def _write_manifest(plan: _Plan, writing: _Writing, options: ConversionOptions) -> Manifest:
    beton = writing.place.beton
    skipped = {file.path for file in writing.skipped}
    files = [file for file in plan.files if file not in skipped]
    share = options.compress_probability
    manifest = Manifest(
        split=plan.split,
        classes=plan.folder.classes,
        num_samples=len(files),
        source=str(plan.folder.source.resolve()),
        write_mode="jpg" if share == 1 else "raw" if share == 0 else "proportion",
        max_resolution=options.max_resolution,
        jpeg_quality=options.jpeg_quality,
        subsampling=options.subsampling,
        compress_probability=options.compress_probability,
        num_originals=writing.num_originals,
        shuffled=plan.split == "train" and options.shuffle_indices,
        seed=options.seed,
        subset=options.subset,
        shard=options.shard,
        skipped=tuple(writing.skipped),
        ffcv_version=version("ffcv"),
        package_version=__version__,
        identity=plan.identity,
        page_bytes=options.encoding.max_bytes,
        page_crc32=tuple(page.crc32 for page in writing.pages),
        num_bytes=beton.stat().st_size,
        sha256=tables_digest(beton),
        files_sha256=hashlib.sha256(encode_file_list(files)).hexdigest(),
    )
    write_manifest(manifest, files, beton, shown_as=writing.shown_as)
    return manifest


def write_manifest(manifest: Manifest, files: Sequence[str], beton: Path, shown_as: Path) -> None:
    """Write a .beton's manifest and the list of its original files beside it, synced to the disk."""
    try:
        with open(Manifest.files_path_for(beton), "wb") as file:
            file.write(encode_file_list(files))
            file.flush()
            os.fsync(file.fileno())
        manifest.write(Manifest.path_for(beton))
    except OSError as error:
        raise Failure(f"the manifest of {shown_as} cannot be written: {error.strerror}") from error


def publish(place: Workplace, out_dir: Path) -> None:
    """Rename the finished files into out_dir, the .beton last: once it is there, everything is.

    Between the renames an older .beton may lie beside the new manifest; `Manifest.check` tells them apart.
    """
    beton = place.beton
    try:
        for path in (Manifest.files_path_for(beton), Manifest.path_for(beton), beton):
            os.replace(path, out_dir / path.name)
        descriptor = os.open(out_dir, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise Failure(f"{out_dir / beton.name} cannot be put in place: {error.strerror} ({error.filename2})") from error
