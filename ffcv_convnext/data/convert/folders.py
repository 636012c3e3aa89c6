"""What a folder of images holds besides usable images, and what to do if it is not an ImageFolder."""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ffcv_convnext.formatting import format_count

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
LAYOUT = "expected an ImageFolder: data_path/train/<class>/<image> and data_path/val/<class>/<image>"
NO_ENDING = "without ending"
NO_CLASS = "in no class folder"
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
_NO_IMAGES = {".txt", ".xml", ".json", ".jsonl", ".csv", ".tsv", ".md", ".html", ".yaml", ".yml", ".db", ".ini", ".log"}
_OTHER_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
_DEPTH = 4  # folders between data_path and a split that is found below it
_MAX_FOLDERS = 50  # a folder with more holds classes, not a nesting


def ending(name: str) -> str:
    """Return '.gif' for 'a.GIF', NO_ENDING for 'a'."""
    return os.path.splitext(name)[1].lower() or NO_ENDING


def holds_class_folders(folder: Path) -> bool:
    """Return whether a split's folder has folders."""
    return any(not is_hidden(entry.name) for entry in _folders(folder))


def holds_flat_images(folder: Path) -> bool:
    """Return whether images lie in a folder itself."""
    with os.scandir(folder) as entries:
        return any(each.name.lower().endswith(IMAGE_EXTENSIONS) and not is_hidden(each.name) for each in entries)


def is_hidden(name: str) -> bool:
    """Return whether a file is one of a desktop or an editor, and nobody's data."""
    return name.startswith(".") or name in ("Thumbs.db", "desktop.ini")


def describe_left_out(left_out: Mapping[str, int]) -> str | None:
    """Return '12 files left out for their ending: 9 .gif, 3 .heic; ...', or None if there are none that may be images.

    left_out: number of files by ending; NO_CLASS: images beside the class folders.
    """
    counts = Counter({end: number for end, number in left_out.items() if end not in _NO_IMAGES})
    outside = counts.pop(NO_CLASS, 0)
    parts = []
    if counts:
        shown = [f"{number:,} {end}" for end, number in counts.most_common(6)]
        more = [f"{len(counts) - 6} other endings"] if len(counts) > 6 else []
        readable = _readable(counts)
        advice = f"include them with --extensions {','.join(readable)}" if readable else "Pillow reads none of them"
        number = format_count(counts.total(), "file")
        parts.append(f"{number} left out for their ending: {', '.join(shown + more)}; {advice}")
    if outside:
        parts.append(f"{format_count(outside, 'image')} left out because they lie in no class folder")
    return "; ".join(parts) or None


def _readable(endings: Iterable[str]) -> list[str]:
    """Return the endings of formats that Pillow reads as images."""
    from PIL import Image

    formats = Image.registered_extensions()
    return sorted(end for end in endings if formats.get(end) in Image.OPEN and formats[end] not in ("PDF", "MPEG"))


def explain_missing_split(root: Path, split: str) -> str:
    """Return what `root`, a folder without a folder `split`, seems to hold instead, and the next action."""
    if root.resolve().name in _OTHER_NAMES:
        above = root.resolve().parent
        return f"data_path = {root} is the folder of a split; give the folder above it: --data_path {above}"
    for entry in _folders(root):
        if entry.name.lower() in _OTHER_NAMES[split]:
            return f"{root} holds {entry.name}, not {split}; rename it: mv {entry.path} {root / split}"
    if nested := _find_below(root, split):
        return f"{root / split} does not exist, but {nested / split} does; use --data_path {nested}"
    if archives := _names(root, _ARCHIVES):
        return (
            f"{root / split} does not exist; {root} holds {_some(archives)}, which cannot be read in place: unpack "
            f"them so that images lie in {root / split}/<class>/ (ILSVRC2012_img_{split}.tar and WebDataset shards "
            f"like NAME-{split}-0000.tar need not be unpacked)"
        )
    if images := _names(root, IMAGE_EXTENSIONS):
        return f"{root / split} does not exist; {root} holds {_some(images)} itself; {LAYOUT}"
    if holding := [entry.name for entry in _folders(root) if _names(Path(entry.path), IMAGE_EXTENSIONS)]:
        return (
            f"{root / split} does not exist, but {_some(holding, 'folder')} of {root} with images; if these are the "
            f"classes, move them into {root / split}"
        )
    return f"{root / split} does not exist; {LAYOUT}, or choose another --split"


def explain_no_classes(folder: Path) -> str:
    """Return what a split's folder without class folders holds instead, and the next action."""
    if archives := _names(folder, _ARCHIVES):
        return (
            f"{folder} holds {_some(archives)} and no class folders; only .tar can be read in place, one for each "
            f"class (n01440764.tar) or WebDataset's: decompress them, or unpack them so that images lie in "
            f"{folder}/<class>/"
        )
    if images := _names(folder, IMAGE_EXTENSIONS):
        return f"{folder} holds {_some(images)} without class folders; {_move_to_classes(images[0])}"
    return f"{folder} has no class folders; {LAYOUT}"


def explain_nesting(folder: Path, classes: tuple[str, ...]) -> str | None:
    """Return the error for a split whose only class folder is a level too much, or None."""
    if len(classes) != 1 or _names(inner := folder / classes[0], IMAGE_EXTENSIONS):
        return None
    nested = sum(1 for _ in _folders(inner))
    if nested < 2:
        return None
    return (
        f"{folder} holds one folder, {classes[0]}, which holds {nested:,} folders and no image: a level too much; move "
        f"these up: mv {inner}/* {folder} && rmdir {inner}"
    )


def explain_unknown_class(folder: Path, classes: tuple[str, ...]) -> str | None:
    """Return the error for a split whose only folder holds images of all classes, or None."""
    if len(classes) != 1 or len(images := _names(folder / classes[0], IMAGE_EXTENSIONS)) < 2:
        return None
    return f"{folder} holds no class folders, only {classes[0]} with {_some(images)}; {_move_to_classes(images[0])}"


def explain_no_images(folder: Path, left_out: Mapping[str, int]) -> str:
    """Return why no file below a split's class folders is an image, and the next action."""
    if archives := sum(left_out.get(end, 0) for end in _ARCHIVES):
        reason = (
            f"but {format_count(archives, 'archive')} (.tar, .zip); an archive {folder}/<class>.tar is read in place: "
            "move them there, without the class folders, or unpack them where they are"
        )
    elif described := describe_left_out(left_out):
        reason = f"({', '.join(IMAGE_EXTENSIONS)}); {described}"
    else:
        reason = f"({', '.join(IMAGE_EXTENSIONS)}): its class folders are empty; copy or unpack the images into them"
    return f"{folder} has no images {reason}"


def _move_to_classes(image: str) -> str:
    if image.startswith("ILSVRC2012_val_"):
        return "validation images may lie in data_path/val itself, with ILSVRC2012_devkit_t12.tar.gz in data_path"
    if found := re.match(r"(n\d{8})_\d+\.", image):
        return (
            f"move each into a folder of its class, the first part of its name: {image} into {found[1]}, or write a "
            "list with one `path<TAB>class` a line (data_path/train.tsv)"
        )
    return (
        "move each into a folder that is named after its class, or write a list with one `path<TAB>class` a line "
        "(data_path/train.tsv, data_path/val.tsv)"
    )


def _find_below(root: Path, split: str) -> Path | None:
    """Return the nearest folder below `root` that has a folder `split`."""
    waiting = deque([(root, 0)])
    while waiting:
        folder, depth = waiting.popleft()
        entries = [entry for entry in _folders(folder) if not is_hidden(entry.name)]
        if depth and any(entry.name == split for entry in entries):
            return folder
        if depth < _DEPTH and len(entries) <= _MAX_FOLDERS:
            waiting += [(Path(entry.path), depth + 1) for entry in sorted(entries, key=lambda entry: entry.name)]
    return None


def _folders(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the folders in a folder; none if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            yield from [entry for entry in entries if entry.is_dir()]
    except OSError:
        return


def _names(folder: Path, endings: tuple[str, ...]) -> list[str]:
    """Return the sorted names of the files in a folder that have one of these endings."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(endings) and not is_hidden(entry.name) and not entry.is_dir()
        )


def _some(names: list[str], noun: str = "file") -> str:
    """Return '50,000 files (a, b, c, ...)'."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{format_count(len(names), noun)} ({shown})"
