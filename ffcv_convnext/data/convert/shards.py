"""Parts that were converted one by one (--shard) -> the file that an undivided conversion would have written."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from ffcv_convnext.data.beton import EncodedImage, Manifest, Page, Split, encode_file_list, tables_digest
from ffcv_convnext.data.convert.conversion import open_writer, part_name, publish, write_manifest
from ffcv_convnext.data.convert.encode import Encoding
from ffcv_convnext.data.convert.journal import workplace
from ffcv_convnext.errors import Failure


def join_parts(out_dir: Path, split: Split, *, overwrite: bool, say: Callable[[str], None]) -> Manifest:
    """Write `<split>.beton` and its companions from `<split>.part-<i>-of-<n>.beton` in out_dir, and remove the parts.

    The result has the bytes of an undivided conversion. Raises FileNotFoundError for missing parts, ValueError for
    parts that do not belong together or are damaged, FileExistsError without `overwrite`, Failure when it cannot be
    written.
    """
    target = out_dir / f"{split}.beton"
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; replace it with --overwrite, or choose another --out_dir")
    parts = _find_parts(out_dir, split)
    manifests = [Manifest.check(part) for part in parts]
    for part, manifest in zip(parts, manifests, strict=True):
        if manifest.identity != manifests[0].identity:
            raise ValueError(
                f"{part} was made from other images or with other settings than {parts[0].name}; convert it again with "
                "the same --data_path and settings, and --overwrite"
            )
    started = time.monotonic()
    skipped = tuple(file for manifest in manifests for file in manifest.skipped)
    files = [file for part, manifest in zip(parts, manifests, strict=True) for file in _files(part, manifest)]
    with workplace(out_dir, split) as place:
        place.begin(manifests[0].identity)
        pages = _write(place.beton, target, parts, manifests, capacity=len(files) + len(skipped))
        whole = dataclasses.replace(
            manifests[0],
            num_samples=len(files),
            num_originals=sum(manifest.num_originals for manifest in manifests),
            shard=None,
            skipped=skipped,
            page_crc32=tuple(page.crc32 for page in pages),
            num_bytes=place.beton.stat().st_size,
            sha256=tables_digest(place.beton),
            files_sha256=hashlib.sha256(encode_file_list(files)).hexdigest(),
        )
        write_manifest(whole, files, place.beton, shown_as=target)
        publish(place, out_dir)
    for part in parts:
        for path in (part, Manifest.path_for(part), Manifest.files_path_for(part)):
            path.unlink(missing_ok=True)
    say(
        f"{target}: {whole.num_samples} images of {len(whole.classes)} classes out of {len(parts)} parts, "
        f"{whole.num_bytes / 1e6:.1f} MB, {time.monotonic() - started:.1f} s, {len(skipped)} skipped"
    )
    return whole


def _find_parts(out_dir: Path, split: Split) -> list[Path]:
    """All parts in their order."""
    numbers = {
        int(found["number"])
        for path in out_dir.glob(f"{split}.part-*.beton")
        if (found := re.fullmatch(rf"{split}\.part-\d+-of-(?P<number>\d+)\.beton", path.name))
    }
    if not numbers:
        raise FileNotFoundError(f"{out_dir} holds no parts of {split}; make them with --shard 0/n to --shard n-1/n")
    if len(numbers) > 1:
        raise ValueError(
            f"{out_dir} holds parts of several divisions of {split}: into {', '.join(map(str, sorted(numbers)))}; "
            "remove those that do not count"
        )
    (number,) = numbers
    parts = [out_dir / f"{part_name(split, index, number)}.beton" for index in range(number)]
    missing = [index for index, part in enumerate(parts) if not part.exists()]
    if missing:
        shown = ", ".join(f"{index}/{number}" for index in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise FileNotFoundError(f"{out_dir}: {len(missing)} of {number} parts of {split} are missing: --shard {shown}")
    return parts


def _files(part: Path, manifest: Manifest) -> list[str]:
    files = manifest.original_files(part)
    if files is None:
        raise ValueError(
            f"{Manifest.files_path_for(part)} is missing or differs from the manifest's hash; copy it again"
        )
    return files


def _write(
    beton: Path, target: Path, parts: Sequence[Path], manifests: Sequence[Manifest], capacity: int
) -> list[Page]:
    first = manifests[0]
    encoding = Encoding(
        max_resolution=first.max_resolution,
        jpeg_quality=first.jpeg_quality,
        subsampling=first.subsampling,
        max_bytes=first.page_bytes,
    )
    writer = open_writer(beton, encoding, capacity)
    try:
        writer.write(_samples(parts, manifests), lambda _page: None)
    except OSError as error:
        raise Failure(f"{target} cannot be written: {error.strerror}; make room") from error
    return writer.pages


def _samples(parts: Sequence[Path], manifests: Sequence[Manifest]) -> Iterator[tuple[EncodedImage, int]]:
    from ffcv_convnext.data.beton import JPG
    from ffcv_convnext.data.beton.tables import damaged_pages, read_tables

    for part, manifest in zip(parts, manifests, strict=True):
        tables = read_tables(part)
        if damaged := damaged_pages(tables, manifest.page_crc32):
            raise ValueError(f"{part}: page {damaged[0]} differs from its checksum; copy it again, or convert it again")
        assert tables.labels is not None
        with open(part, "rb") as file:
            for sample, label in enumerate(tables.labels.tolist()):
                file.seek(tables.addresses[sample])
                data = file.read(tables.lengths[sample])
                mode: Literal["jpg", "raw"] = "jpg" if tables.modes[sample] == JPG else "raw"
                yield EncodedImage(int(tables.widths[sample]), int(tables.heights[sample]), data, mode), label
