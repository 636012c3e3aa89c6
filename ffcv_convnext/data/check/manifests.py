"""The manifest of a .beton and the list of its original files, read without stopping at the first problem."""

from __future__ import annotations

from pathlib import Path

from ffcv_convnext.data.beton import CONVERT_AGAIN, Manifest


def read_manifest(beton: Path) -> tuple[Manifest | None, list[str]]:
    """Return the manifest, or None if it is not readable, and what is wrong with it or with the .beton."""
    manifest = None
    try:
        manifest = Manifest.for_beton(beton)
        Manifest.check(beton)
    except (ValueError, FileNotFoundError) as error:
        return manifest, [str(error).removeprefix(str(beton)).lstrip(": ")]
    return manifest, []


def read_original_files(beton: Path, manifest: Manifest) -> tuple[list[str], list[str]]:
    """Return the original file of each sample, or no files, and what is wrong with the list."""
    path = Manifest.files_path_for(beton)
    files = manifest.original_files(beton)
    if files is None:
        differs = "differs from the manifest's hash: damaged, or of another conversion"
        wrong = differs if path.is_file() else "is missing"
        return [], [f"the list of original files {path.name} {wrong}; copy it again"]
    if len(files) != manifest.num_samples:
        return [], [
            f"the list of original files {path.name} has {len(files)} lines, but the manifest states "
            f"{manifest.num_samples} samples; {CONVERT_AGAIN}"
        ]
    return files, []
