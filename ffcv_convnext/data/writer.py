"""Conversion of an ImageFolder into .beton files with their manifests. FFCV itself is imported once work begins."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal, get_args

from tqdm import tqdm

from ffcv_convnext import __version__
from ffcv_convnext.data.folder import LAYOUT, ImageFolder, list_classes, scan
from ffcv_convnext.data.images import MAX_JPEG_SIDE, EncodedImage, Encoding, Rejected, encode_files
from ffcv_convnext.data.manifest import Manifest, SkippedFile, Split, encode_file_list, tables_digest
from ffcv_convnext.data.workers import WorkerDied, Workers
from ffcv_convnext.errors import Failure
from ffcv_convnext.rng import Stream, permutation

if TYPE_CHECKING:
    from ffcv_convnext.data.beton import BetonWriter

Say = Callable[[str], None]
logger = logging.getLogger(__name__)

MIN_PAGE_BYTES = 8 << 20  # FFCV's default
MAX_PAGE_BYTES = 64 << 20  # a loader that does without the page cache holds several pages in memory
BYTES_A_PIXEL = 3  # JPEG of pure noise at quality 100 stays below
PLAIN_SECONDS = 10.0  # between progress lines where there is no terminal


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionOptions:
    """What to convert, and how. Checks itself; `convert` checks the folders."""

    data_path: Path
    out_dir: Path
    split: Literal["train", "val", "all"] = "all"
    max_resolution: int | None = 500  # longest side, pixels; larger images are shrunk
    jpeg_quality: int = 90  # 1 ... 100
    num_workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    subset: int | None = None  # images of each split
    seed: int = 0  # of the subset
    skip_bad: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.split not in ("train", "val", "all"):
            raise ValueError(f"split = {self.split}: expected train, val or all")
        if self.max_resolution is not None and not 1 <= self.max_resolution <= MAX_JPEG_SIDE:
            raise ValueError(f"max_resolution = {self.max_resolution}: expected 1 to {MAX_JPEG_SIDE} pixels, or none")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality = {self.jpeg_quality}: expected 1 to 100")
        for name in ("num_workers", "subset"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: expected at least 1")
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed}: expected 0 or more")

    @property
    def splits(self) -> tuple[Split, ...]:
        return get_args(Split) if self.split == "all" else (self.split,)

    @property
    def encoding(self) -> Encoding:
        """With the smallest page that surely holds any image of this resolution, within limits."""
        page = MIN_PAGE_BYTES if self.max_resolution else MAX_PAGE_BYTES
        while self.max_resolution and page < min(BYTES_A_PIXEL * self.max_resolution**2, MAX_PAGE_BYTES):
            page *= 2
        return Encoding(max_resolution=self.max_resolution, jpeg_quality=self.jpeg_quality, max_bytes=page)


def convert(options: ConversionOptions, say: Say = logger.info) -> list[Manifest]:
    """Write `<split>.beton`, `<split>.json` and `<split>.files.txt` into out_dir, for each split asked for.

    say: takes one line of text, twice or so a split.
    What is wrong with folders and options is a ValueError or FileNotFoundError, FileExistsError, PermissionError
    before any work; what goes wrong in it is a Failure. Either way, and after Ctrl-C, nothing half-written stays.
    """
    for split in options.splits:
        target = options.out_dir / f"{split}.beton"
        if target.exists() and not options.overwrite:
            raise FileExistsError(f"{target} exists; replace it with --overwrite, or choose another --out_dir")
    folders = _list_images(options)
    with ExitStack() as stack:
        workplaces = {split: stack.enter_context(_workplace(options.out_dir, split)) for split in options.splits}
        return [_convert_split(split, folders[split], options, workplaces[split], say) for split in options.splits]


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
def _workplace(out_dir: Path, split: Split) -> Iterator[Path]:
    """A hidden folder in out_dir for unfinished files, removed at the end whatever happens.

    A lock on it, which the kernel drops with the process, tells a conversion that runs from the leftovers of one
    that was killed: those are removed.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for leftover in out_dir.glob(f".{split}.tmp-*"):
            with _locked(leftover) as free:
                if not free:
                    raise ValueError(f"another conversion is writing {out_dir / split}.beton ({leftover} is locked)")
                shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{split}.tmp-", dir=out_dir))
    except OSError as error:
        raise PermissionError(f"out_dir = {out_dir} cannot be written: {error.strerror}; choose another") from None
    try:
        with _locked(work):
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock; False when another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError:  # a file system without locks: leftovers and running conversions look alike
            yield True
        else:
            yield True
    finally:
        os.close(descriptor)


def _convert_split(split: Split, folder: ImageFolder, options: ConversionOptions, work: Path, say: Say) -> Manifest:
    chosen: Sequence[int] = range(len(folder.files))
    if options.subset is not None:
        if options.subset > len(chosen):
            say(f"{split}: subset = {options.subset}, there are {len(chosen)} images, all are taken")
        order = permutation(len(chosen), options.seed, epoch=0, stream=Stream.SUBSET)
        chosen = sorted(order[: options.subset].tolist())
    started = time.monotonic()
    target = options.out_dir / f"{split}.beton"
    result = _write_beton(work / target.name, folder, chosen, options, shown_as=target)
    seconds = time.monotonic() - started
    manifest = _write_manifest(split, folder, result, options, work)
    _publish(work, options.out_dir, split)
    say(
        f"{target}: {manifest.num_samples} images of {len(manifest.classes)} classes, "
        f"{manifest.num_bytes / 1e6:.1f} MB, {seconds:.1f} s, {manifest.num_samples / seconds:.0f} images/s, "
        f"{len(manifest.skipped)} skipped" + (f" (listed in {target.stem}.json)" if manifest.skipped else "")
    )
    return manifest


@dataclass(slots=True)
class _Result:
    files: list[str] = field(default_factory=list)  # in sample order
    skipped: list[SkippedFile] = field(default_factory=list)


def _write_beton(
    path: Path, folder: ImageFolder, chosen: Sequence[int], options: ConversionOptions, shown_as: Path
) -> _Result:
    """Encode the chosen images in worker processes and write them in their order."""
    result = _Result()
    size = max(1, min(32, len(chosen) // (4 * options.num_workers)))
    chunks = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    tasks = [[str(folder.source / folder.files[index]) for index in chunk] for chunk in chunks]
    encoder = partial(encode_files, encoding=options.encoding)

    def samples(answers: Workers[list[str], list[EncodedImage | Rejected]]) -> Iterator[tuple[EncodedImage, int]]:
        with _Progress(len(chosen), f"{options.out_dir.name}/{shown_as.name}") as progress:
            for chunk, images in zip(chunks, answers, strict=True):
                for index, image in zip(chunk, images, strict=True):
                    file = folder.files[index]
                    if isinstance(image, EncodedImage):
                        result.files.append(file)
                        yield image, folder.labels[index]
                    elif image.skippable and options.skip_bad:
                        result.skipped.append(SkippedFile(file, image.reason))
                    else:
                        raise Failure(_refusal(folder.source / file, image))
                progress.add(len(chunk))

    try:
        with Workers(encoder, tasks, options.num_workers) as answers:
            writer = _open_writer(path, options.encoding)  # takes seconds, in which the workers already encode
            try:
                number = writer.write(len(chosen), samples(answers))
            except OSError as error:
                raise Failure(_full(shown_as, writer.num_bytes, len(result.files), len(chosen), error)) from error
    except WorkerDied as died:
        raise Failure(
            f"a worker process was ended ({died.how}) on one of {len(died.task)} files from {died.task[0]} to "
            f"{died.task[-1]}; if memory ran out, lower --num_workers"
        ) from died
    if number == 0:
        raise Failure(f"none of the {len(chosen)} files in {folder.source} could be decoded; {shown_as} is not written")
    return result


def _open_writer(path: Path, encoding: Encoding) -> BetonWriter:
    """Importing ffcv sets PyTorch's number of CPU threads to 1; a caller that goes on to train wants its own."""
    import torch

    num_threads = torch.get_num_threads()
    try:
        from ffcv_convnext.data.beton import BetonWriter
    finally:
        torch.set_num_threads(num_threads)
    return BetonWriter(path, encoding)


def _refusal(path: Path, image: Rejected) -> str:
    if not image.skippable:
        return f"{path}: {image.reason}"
    return f"{path}: {image.reason}; repair or remove the file, or leave such files out with --skip_bad"


def _full(path: Path, num_bytes: int, number: int, total: int, error: OSError) -> str:
    """num_bytes: written for the first `number` of `total` images."""
    needed = f", about {num_bytes * total / number / 1e6:.0f} MB are needed" if number else ""
    return (
        f"{path} cannot be written: {error.strerror} after {num_bytes / 1e6:.0f} MB "
        f"({number} of {total} images{needed}); make room or choose another --out_dir"
    )


def _write_manifest(
    split: Split, folder: ImageFolder, result: _Result, options: ConversionOptions, work: Path
) -> Manifest:
    beton = work / f"{split}.beton"
    files = encode_file_list(result.files)
    manifest = Manifest(
        split=split,
        classes=folder.classes,
        num_samples=len(result.files),
        source=str(folder.source.resolve()),
        write_mode="jpg",
        max_resolution=options.max_resolution,
        jpeg_quality=options.jpeg_quality,
        seed=options.seed,
        subset=options.subset,
        skipped=tuple(result.skipped),
        ffcv_version=version("ffcv"),
        package_version=__version__,
        num_bytes=beton.stat().st_size,
        sha256=tables_digest(beton),
        files_sha256=hashlib.sha256(files).hexdigest(),
    )
    try:
        with open(Manifest.files_path_for(beton), "wb") as file:
            file.write(files)
            file.flush()
            os.fsync(file.fileno())
        manifest.write(Manifest.path_for(beton))
    except OSError as error:
        raise Failure(f"the manifest of {options.out_dir / beton.name} cannot be written: {error.strerror}") from error
    return manifest


def _publish(work: Path, out_dir: Path, split: Split) -> None:
    """Rename the finished files into out_dir, the .beton last: once it is there, everything is.

    Between the renames an older .beton may lie beside the new manifest; `Manifest.check` tells them apart.
    """
    beton = work / f"{split}.beton"
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


class _Progress:
    """A bar on a terminal, elsewhere a line on stderr every ten seconds; both with images/s and time left."""

    def __init__(self, total: int, name: str) -> None:
        self.bar = tqdm(
            total=total,
            desc=name,
            unit=" images",
            smoothing=0.05,
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self.name, self.total, self.done = name, total, 0
        self.started = self.said = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, number: int) -> None:
        self.done += number
        self.bar.update(number)
        now = time.monotonic()
        if self.bar.disable and now - self.said >= PLAIN_SECONDS:
            self.said = now
            text = tqdm.format_meter(
                self.done, self.total, now - self.started, prefix=self.name, unit=" images", ncols=0
            )
            sys.stderr.write(text.strip() + "\n")
            sys.stderr.flush()
