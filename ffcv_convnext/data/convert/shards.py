"""Shards that were converted separately (--shard) -> the file that one conversion of everything would write."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from ffcv_convnext.data.beton import JPG, EncodedImage, Manifest, Split, tables_digest
from ffcv_convnext.data.convert.conversion import open_writer, publish, write_list, write_manifest
from ffcv_convnext.data.convert.encode import Encoding
from ffcv_convnext.data.convert.journal import Identity, open_journal
from ffcv_convnext.data.convert.options import shard_stem
from ffcv_convnext.errors import Failure
from ffcv_convnext.formatting import format_bytes

Shard = tuple[Path, Manifest]


def join_shards(out_dir: Path, split: Split, *, overwrite: bool, say: Callable[[str], None]) -> Manifest:
    """Join the `<split>.part-<i>-of-<n>.beton` of out_dir to `<split>.beton`, and remove them.

    The result has the bytes of one conversion of everything. Raises FileNotFoundError for missing shards, ValueError
    for damaged shards or different conversions, FileExistsError without `overwrite`, Failure if the file cannot be
    written.
    """
    target = out_dir / f"{split}.beton"
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; replace it with --overwrite, or choose another --out_dir")
    shards = [(path, Manifest.check(path)) for path in _find_shards(out_dir, split)]
    first_path, first = shards[0]
    for path, manifest in shards:
        if manifest.identity != first.identity:
            raise ValueError(
                f"{path} has other images or settings than {first_path.name}; convert it again with the same "
                "--data_path and settings, and --overwrite"
            )
    started = time.monotonic()
    skipped = tuple(file for _, manifest in shards for file in manifest.skipped)
    num_samples = sum(manifest.num_samples for _, manifest in shards)
    for path, manifest in shards:
        _read_list(path, manifest)  # checked before any work
    encoding = Encoding(
        max_resolution=first.max_resolution,
        jpeg_quality=first.jpeg_quality,
        subsampling=first.subsampling,
        max_bytes=first.page_bytes,
    )
    with open_journal(out_dir, split) as journal:
        journal.begin(Identity(first.identity, settings=""))
        writer = open_writer(journal.beton, encoding, capacity=num_samples + len(skipped))
        try:
            writer.write(_read_samples(shards), lambda _page: None)
        except OSError as error:
            raise Failure(f"{target} cannot be written: {error.strerror}; make room") from error
        joined = dataclasses.replace(
            first,
            num_samples=num_samples,
            num_originals=sum(manifest.num_originals for _, manifest in shards),
            shard=None,
            skipped=skipped,
            page_crc32=tuple(page.crc32 for page in writer.pages),
            num_bytes=journal.beton.stat().st_size,
            sha256=tables_digest(journal.beton),
            files_sha256=write_list((_read_list(*shard) for shard in shards), journal.beton, target),
        )
        write_manifest(joined, journal.beton, target)
        publish(journal, out_dir)
    for shard, _ in shards:
        for path in (shard, Manifest.path_for(shard), Manifest.files_path_for(shard)):
            path.unlink(missing_ok=True)
    say(
        f"{target}: joined {len(shards)} shards, {joined.num_samples} images, {len(joined.classes)} classes, "
        f"{format_bytes(joined.num_bytes)}, {time.monotonic() - started:.1f} s, {len(skipped)} skipped"
    )
    return joined


def _find_shards(out_dir: Path, split: Split) -> list[Path]:
    """Return all shards in order."""
    numbers = {
        int(found["number"])
        for path in out_dir.glob(f"{split}.part-*.beton")
        if (found := re.fullmatch(rf"{split}\.part-\d+-of-(?P<number>\d+)\.beton", path.name))
    }
    if not numbers:
        raise FileNotFoundError(
            f"{out_dir} contains no shards of {split}; write them with --shard 0/N to --shard N-1/N"
        )
    if len(numbers) > 1:
        raise ValueError(
            f"{out_dir} contains shards of {split} of several conversions: N = {', '.join(map(str, sorted(numbers)))}; "
            "remove the files of all but one"
        )
    (number,) = numbers
    shards = [out_dir / f"{shard_stem(split, index, number)}.beton" for index in range(number)]
    if missing := [f"{index}/{number}" for index, shard in enumerate(shards) if not shard.exists()]:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise FileNotFoundError(
            f"{out_dir}: {len(missing)} of {number} shards of {split} are missing; convert them with --shard {shown}"
        )
    return shards


def _read_list(shard: Path, manifest: Manifest) -> bytes:
    content = manifest.file_list(shard)
    if content is None or content.count(b"\n") != manifest.num_samples:
        path = Manifest.files_path_for(shard)
        raise ValueError(f"{path} is missing or differs from the manifest's hash; copy it again")
    return content


def _read_samples(shards: Sequence[Shard]) -> Iterator[tuple[EncodedImage, int]]:
    from ffcv_convnext.data.beton.tables import damaged_pages, read_tables

    for path, manifest in shards:
        tables = read_tables(path)
        if damaged := damaged_pages(tables, manifest.page_crc32):
            raise ValueError(f"{path}: page {damaged[0]} differs from its checksum; copy it again, or convert it again")
        if tables.labels is None or not tables.in_pages.all():
            raise ValueError(f"{path}: damaged tables; copy it again, or convert it again")
        with open(path, "rb", buffering=0) as file:
            for sample in range(len(tables)):
                data = os.pread(file.fileno(), int(tables.lengths[sample]), int(tables.addresses[sample]))
                mode: Literal["jpg", "raw"] = "jpg" if tables.modes[sample] == JPG else "raw"
                width, height = int(tables.widths[sample]), int(tables.heights[sample])
                yield EncodedImage(width, height, data, mode), int(tables.labels[sample])
