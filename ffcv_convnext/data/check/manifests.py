"""The manifest of a .beton and the list of its original files, read without stopping at the first problem."""

from __future__ import annotations

from pathlib import Path

from ffcv_convnext.data.beton import CONVERT_AGAIN, Manifest
from ffcv_convnext.data.convert.names import Names


def read_manifest(beton: Path) -> tuple[Manifest | None, list[str]]:
    """Return the manifest, or None if it is not readable, and what is wrong with it or with the .beton."""
    manifest = None
    try:
        manifest = Manifest.for_beton(beton)
        Manifest.check(beton)
    except (ValueError, FileNotFoundError) as error:
        return manifest, [str(error).removeprefix(str(beton)).lstrip(": ")]
    return manifest, []


def read_original_files(beton: Path, manifest: Manifest) -> tuple[Names, list[str]]:
    """Return the original file of each sample, or no files, and what is wrong with the list."""
    path = Manifest.files_path_for(beton)
    content = manifest.file_list(beton)
    if content is None:
        differs = "differs from the manifest's hash: damaged, or of another conversion"
        wrong = differs if path.is_file() else "is missing"
        return Names.of([]), [f"the list of original files {path.name} {wrong}; copy it again"]
    files = Names.of_lines(content)
    if len(files) != manifest.num_samples:
        return Names.of([]), [
            f"the list of original files {path.name} has {len(files)} lines, but the manifest states "
            f"{manifest.num_samples} samples; {CONVERT_AGAIN}"
        ]
    return files, []
