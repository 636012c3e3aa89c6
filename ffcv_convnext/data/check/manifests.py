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


def check_original_files(beton: Path, manifest: Manifest) -> list[str]:
    """Return what is wrong with the list of original files."""
    return _problems(beton, manifest, manifest.count_original_files(beton))


def read_original_files(beton: Path, manifest: Manifest) -> tuple[Names, list[str]]:
    """Return the original file of each sample, or no files, and what is wrong with the list."""
    content = manifest.file_list(beton)
    files = None if content is None else Names.of_lines(content)
    problems = _problems(beton, manifest, None if files is None else len(files))
    return Names.of([]) if problems or files is None else files, problems


def _problems(beton: Path, manifest: Manifest, number: int | None) -> list[str]:
    """Return what is wrong with a list of `number` files; None: it is missing or damaged."""
    path = Manifest.files_path_for(beton)
    if number is None:
        differs = "differs from the manifest's hash: damaged, or of another conversion"
        wrong = differs if path.is_file() else "is missing"
        return [f"the list of original files {path.name} {wrong}; copy it again"]
    if number != manifest.num_samples:
        return [
            f"the list of original files {path.name} has {number} lines, but the manifest states "
            f"{manifest.num_samples} samples; {CONVERT_AGAIN}"
        ]
    return []
