"""Conversion of images to .beton files with their manifests. Imports FFCV when it starts to write.

A plan (plan.py) first lists what is stored, in which order; it depends on the images and the options only. Workers
encode the images of the plan and this process writes them in order. So the bytes of the result depend neither on the
number of workers, nor on interruptions (--resume), nor on a conversion in parts (--shard, --join).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ffcv_convnext import __version__
from ffcv_convnext.data.beton import (
    EncodedImage,
    Manifest,
    Page,
    SkippedFile,
    Split,
    encode_file_list,
    tables_digest,
    write_file_list,
)
from ffcv_convnext.data.convert.encode import Encoded, Encoding, Rejected, Task, encode_stamped
from ffcv_convnext.data.convert.journal import Journal, JournalEntry, open_journal
from ffcv_convnext.data.convert.open_sources import open_sources
from ffcv_convnext.data.convert.options import ConversionOptions
from ffcv_convnext.data.convert.plan import Plan, Say, check_room, make_plans
from ffcv_convnext.data.convert.progress import ProgressBar
from ffcv_convnext.data.convert.source import Source, Stamp, names_of
from ffcv_convnext.data.convert.worker_pool import WorkerDied, Workers
from ffcv_convnext.errors import Failure
from ffcv_convnext.formatting import format_bytes, format_count
from ffcv_convnext.signals import signals_deferred

if TYPE_CHECKING:
    from ffcv_convnext.data.beton.writer import BetonWriter

logger = logging.getLogger(__name__)

MAX_CHUNK = 32  # images per task of a worker


def convert(
    options: ConversionOptions, say: Say = logger.info, sources: Mapping[Split, Source] | None = None
) -> list[Manifest]:
    """Write `<split>.beton`, `<split>.json` and `<split>.files.txt` to out_dir for each split in the options.

    say: gets a few lines of text.   sources: images of each split; None: found at data_path.
    Raises ValueError, FileNotFoundError, FileExistsError or PermissionError for wrong options and folders, before any
    work, and Failure if the work fails. After any failure, also Ctrl-C and SIGKILL, whole pages stay in a hidden
    folder, from which options.resume continues; finished files appear only when they are complete.
    """
    plans = make_plans(open_sources(options) if sources is None else sources, options, say)
    finished = [_find_finished(plan, options) for plan in plans]
    check_room([plan for plan, manifest in zip(plans, finished, strict=True) if manifest is None], options, say)
    manifests = []
    for plan, manifest in zip(plans, finished, strict=True):
        if manifest is not None:
            say(f"{options.out_dir / options.stem(plan.split)}.beton is already complete")
        manifests.append(manifest or _convert_split(plan, options, say))
    return manifests


def _find_finished(plan: Plan, options: ConversionOptions) -> Manifest | None:
    """Return the manifest of a finished .beton that --resume accepts. Raises FileExistsError if one is in the way."""
    stem = options.stem(plan.split)
    target = options.out_dir / f"{stem}.beton"
    if options.overwrite:
        return None
    if not target.exists():
        journal = Journal(options.out_dir, stem)
        if not options.resume and journal.num_pages:
            raise FileExistsError(
                f"{journal.folder} contains an unfinished conversion; continue it with --resume, or start from the "
                "beginning with --overwrite"
            )
        return None
    if options.resume and (manifest := Manifest.check(target)).identity == plan.identity.beton:
        return manifest
    raise FileExistsError(f"{target} exists; replace it with --overwrite, or choose another --out_dir")


def _convert_split(plan: Plan, options: ConversionOptions, say: Say) -> Manifest:
    stem = options.stem(plan.split)
    target = options.out_dir / f"{stem}.beton"
    with open_journal(options.out_dir, stem) as journal:
        started = time.monotonic()
        kept = journal.read(plan.identity, plan.source, plan.order) if options.resume else None
        if options.resume and kept is None:
            say(f"{target}: nothing to resume for these images and settings; it is written from the beginning")
        work = _Conversion(plan, options, journal, target)
        try:
            work.run(kept or [])
            seconds = time.monotonic() - started
            manifest = work.write_manifest()
            publish(journal, options.out_dir)
        except BaseException:
            if journal.num_pages:
                say(
                    f"{target}: {work.num_safe} of {len(plan)} images are saved; the same command with --resume "
                    "continues from there, with --overwrite it starts from the beginning"
                )
            raise
    kept_note = f" ({work.num_kept} of them from an earlier attempt)" if work.num_kept else ""
    say(
        f"{target}: {manifest.num_samples} images{kept_note}, {len(manifest.classes)} classes, "
        f"{format_bytes(manifest.num_bytes)}, {seconds:.1f} s, "
        f"{(manifest.num_samples - work.num_kept) / seconds:.0f} images/s, "
        f"{len(manifest.skipped)} skipped" + (f" (listed in {stem}.json)" if manifest.skipped else "")
    )
    return manifest


class _Tasks(Sequence[Task]):
    """The tasks of a plan from a position on, `size` images each. A task is made when it is asked for."""

    def __init__(self, plan: Plan, first: int, size: int) -> None:
        self.plan = plan
        self.starts = range(first, len(plan), size)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Task:  # type: ignore[override]  # no slices
        start = self.starts[index]
        return self.plan.task(slice(start, start + self.starts.step))


class _Conversion:
    """Encode a plan's images in worker processes, write them in order, and add each page to the journal."""

    def __init__(self, plan: Plan, options: ConversionOptions, journal: Journal, target: Path) -> None:
        self.plan = plan
        self.options = options
        self.journal = journal
        self.target = target  # for messages
        self.num_done = 0  # images that are stored or skipped
        self.num_safe = 0  # of them, those up to the last whole page
        self.num_kept = 0  # images stored by an earlier attempt
        self.num_originals = 0  # images with the coefficients of their files
        self.skipped: list[SkippedFile] = []
        self.stamps: list[Stamp] = []  # of the source files of all images that were read since the last page
        self.pages: list[Page] = []
        self._num_journalled = 0  # skipped files that are in the journal

    def run(self, earlier: Sequence[JournalEntry]) -> None:
        """Write what `earlier` does not contain. Raises Failure."""
        plan, options, num_images = self.plan, self.options, len(self.plan)
        writer = None
        if earlier:
            writer = open_writer(self.journal.beton, options.encoding, num_images)
            earlier = earlier[: writer.keep_pages([entry.page for entry in earlier])]
        self.journal.begin(plan.identity, plan.source, earlier)
        for entry in earlier:
            self.num_done, self.num_originals = entry.num_done, entry.num_originals
            self.num_kept += len(entry.page.rows)
            self.skipped += [SkippedFile(name, reason) for name, reason in entry.skipped]
        self.num_safe, self._num_journalled = self.num_done, len(self.skipped)
        size = max(1, min(MAX_CHUNK, (num_images - self.num_done) // (4 * options.num_workers)))
        tasks = _Tasks(plan, self.num_done, size)
        try:
            with Workers(partial(encode_stamped, encoding=options.encoding), tasks, options.num_workers) as answers:
                if writer is None or not earlier:  # takes seconds, while the workers already encode
                    writer = open_writer(self.journal.beton, options.encoding, num_images)
                try:
                    num_samples = writer.write(self._samples(answers), self._add_to_journal)
                except OSError as error:
                    raise Failure(self._describe_full_disk(writer.num_bytes, error)) from error
        except WorkerDied as died:
            images: Source = died.task.images
            first, last = (images.location / images.name(index) for index in (0, len(images) - 1))
            raise Failure(
                f"a worker process ended ({died.how}) while it encoded {format_count(len(images), 'file')}, {first} to "
                f"{last}; if memory ran out, lower --num_workers"
            ) from died
        if num_samples == 0:
            raise Failure(
                f"none of the {num_images} files in {plan.source.location} could be decoded; {self.target} is not "
                "written"
            )
        self.pages = writer.pages

    def _samples(self, answers: Iterable[Encoded]) -> Iterator[tuple[EncodedImage, int]]:
        """Yield (image, label). An image counts as done once the writer requests the next one."""
        total, name = len(self.plan), f"{self.options.out_dir.name}/{self.target.name}"
        with ProgressBar(total, name, self.num_done) as progress:
            for images, stamps in answers:
                for image, stamp in zip(images, stamps, strict=True):
                    if isinstance(image, EncodedImage):
                        yield image, self.plan.label(self.num_done)
                        self.num_originals += image.is_original
                    else:
                        self._skip(image)
                    self.num_done += 1
                    self.stamps.append(stamp)
                progress.add(len(images))

    def _skip(self, image: Rejected) -> None:
        name = self.plan.name(self.num_done)
        message = f"{self.plan.source.location / name}: {image.reason}"
        if not image.skippable:
            raise Failure(message)
        if not self.options.skip_bad:
            raise Failure(f"{message}; repair or remove the file, or skip such files with --skip_bad")
        self.skipped.append(SkippedFile(name, image.reason))

    def _add_to_journal(self, page: Page) -> None:
        skipped = [(file.path, file.reason) for file in self.skipped[self._num_journalled :]]
        self.num_safe, self._num_journalled = self.num_done, len(self.skipped)
        stamps = np.array(self.stamps, np.int64).reshape(-1, 2)
        self.journal.append(JournalEntry(page, self.num_done, self.num_originals, skipped, stamps))
        self.stamps = []

    def _describe_full_disk(self, num_bytes: int, error: OSError) -> str:
        number, total = self.num_done - len(self.skipped), len(self.plan)
        needed = f", about {format_bytes(num_bytes * total / number)} are needed" if number else ""
        return (
            f"{self.target} cannot be written: {error.strerror} after {format_bytes(num_bytes)} "
            f"({number} of {total} images{needed}); make room or choose another --out_dir"
        )

    def write_manifest(self) -> Manifest:
        """Write the manifest beside the unfinished .beton."""
        plan, options, beton = self.plan, self.options, self.journal.beton
        skipped = {file.path for file in self.skipped}
        names = (name for name in names_of(plan.source, plan.order) if name not in skipped)
        files_sha256 = write_list(encode_file_list(names), beton, self.target)
        share = options.compress_probability
        manifest = Manifest(
            split=plan.split,
            classes=plan.source.classes,
            num_samples=sum(len(page.rows) for page in self.pages),
            source=str(plan.source.location.resolve()),
            write_mode="jpg" if share == 1 else "raw" if share == 0 else "proportion",
            max_resolution=options.max_resolution,
            jpeg_quality=options.jpeg_quality,
            subsampling=options.subsampling,
            compress_probability=share,
            num_originals=self.num_originals,
            shuffled=plan.split == "train" and options.shuffle_indices,
            seed=options.seed,
            subset=options.subset,
            shard=options.shard,
            skipped=tuple(self.skipped),
            extensions=options.further_extensions,
            left_out=plan.source.left_out,
            label_names=getattr(plan.source, "label_names", ()),
            ffcv_version=version("ffcv"),
            package_version=__version__,
            identity=plan.identity.beton,
            page_bytes=options.encoding.max_bytes,
            page_crc32=tuple(page.crc32 for page in self.pages),
            num_bytes=beton.stat().st_size,
            sha256=tables_digest(beton),
            files_sha256=files_sha256,
        )
        write_manifest(manifest, beton, self.target)
        return manifest


def open_writer(path: Path, encoding: Encoding, capacity: int) -> BetonWriter:
    """Return a writer; the first call imports FFCV, which takes seconds."""
    with signals_deferred():
        from ffcv_convnext.data.beton.writer import BetonWriter
    return BetonWriter(path, encoding, capacity)


def write_list(parts: Iterable[bytes], beton: Path, target: Path) -> str:
    """Write the list of a .beton's original files beside it, return its SHA-256. target: the path for messages."""
    try:
        return write_file_list(Manifest.files_path_for(beton), parts)
    except OSError as error:
        raise Failure(f"the list of original files of {target} cannot be written: {error.strerror}") from error


def write_manifest(manifest: Manifest, beton: Path, target: Path) -> None:
    """Write a .beton's manifest beside it. target: the path for messages."""
    try:
        manifest.write(Manifest.path_for(beton))
    except OSError as error:
        raise Failure(f"the manifest of {target} cannot be written: {error.strerror}") from error


def publish(journal: Journal, out_dir: Path) -> None:
    """Rename the finished files into out_dir, the .beton last: once it exists, all of them do.

    Between the renames an older .beton may lie beside the new manifest; `Manifest.check` detects that.
    """
    beton = journal.beton
    try:
        for path in (Manifest.files_path_for(beton), Manifest.path_for(beton), beton):
            os.replace(path, out_dir / path.name)
        descriptor = os.open(out_dir, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise Failure(
            f"{out_dir / beton.name} cannot be moved into place: {error.strerror} ({error.filename2})"
        ) from error
