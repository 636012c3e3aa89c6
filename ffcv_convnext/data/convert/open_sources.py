"""The images of each split, in the form that --source says or data_path shows."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from ffcv_convnext.data.beton import Manifest, Split
from ffcv_convnext.data.convert.folders import (
    IMAGE_EXTENSIONS,
    LAYOUT,
    explain_missing_split,
    holds_class_folders,
    holds_flat_images,
)
from ffcv_convnext.data.convert.imagenet import (
    DEVKIT,
    TRAIN,
    VAL,
    list_train_classes,
    open_class_archives,
    open_train,
    open_val,
    read_devkit,
    read_val_labels,
)
from ffcv_convnext.data.convert.imagenet import reopen as reopen_archive
from ffcv_convnext.data.convert.labels import ClassList, read_class_names, sort_names
from ffcv_convnext.data.convert.listing import ImageList, ListedImages, open_flat
from ffcv_convnext.data.convert.names import Names
from ffcv_convnext.data.convert.options import ConversionOptions, SourceKind
from ffcv_convnext.data.convert.parquet import ParquetFiles
from ffcv_convnext.data.convert.source import Source, list_classes, scan
from ffcv_convnext.data.convert.webdataset import Shards, holds_samples

_WORDS = {"train": "train|training", "val": "val|valid|validation"}
_MAX_EXPANDED = 1_000_000


Form = Literal["folder", "flat", "train_tar", "val_tar", "class_tars", "webdataset", "parquet", "list"]
_KINDS: dict[Form, SourceKind] = {
    **{"folder": "folder", "flat": "folder"},
    **{"train_tar": "imagenet_tars", "val_tar": "imagenet_tars", "class_tars": "imagenet_tars"},
    **{"webdataset": "webdataset", "parquet": "parquet", "list": "list"},
}
_LABELLED: tuple[Form, ...] = ("webdataset", "parquet", "list")  # --classes may name them
_WITHOUT_CLASSES = ("flat", "val_tar")  # need the ground truth


class Place(NamedTuple):
    """Where the images of a split are, and in which form."""

    form: Form
    location: Path
    files: tuple[Path, ...] = ()  # archives, parquet files, or the list

    @property
    def kind(self) -> SourceKind:
        """The word for --source."""
        return _KINDS[self.form]


def open_sources(options: ConversionOptions) -> dict[Split, Source]:
    """List the images of each split. Raises FileNotFoundError or ValueError before any work."""
    places = {split: _find(options, split) for split in options.splits}
    if options.val_labels is not None and not any(place.form in _WITHOUT_CLASSES for place in places.values()):
        raise ValueError(
            f"val_labels = {options.val_labels}: only a flat val folder and {VAL} need it; leave it out, or choose "
            "--source imagenet_tars"
        )
    if options.classes is not None and not any(place.form in _LABELLED for place in places.values()):
        raise ValueError(
            f"classes = {options.classes}: only webdataset, parquet and list need it, the classes of folders are their "
            "names; leave it out"
        )
    stated = read_class_names(options.classes) if options.classes is not None else ()
    extensions = IMAGE_EXTENSIONS + options.further_extensions
    sources: dict[Split, Source] = {}
    train = _classes_of_train(options, places, stated)
    order = list(options.splits)
    if train is not None and places[order[0]].form != "folder":
        order.reverse()  # val first: it is smaller, and its errors come at once
    for split in order:
        sources[split], found = _open(options, split, places[split], stated, train, extensions)
        train = found if split == "train" else train
    return {split: sources[split] for split in options.splits}


def _classes_of_train(
    options: ConversionOptions, places: dict[Split, Place], stated: Sequence[str]
) -> ClassList | None:
    """Return the classes of train without its images, or None if only its images tell them and it is converted too."""
    place = places.get("train") or _find_train(options)
    recorded = options.out_dir / "train.json"
    if place is not None and place.form not in _LABELLED:
        return ClassList(_list_classes(place))
    if stated:
        return sort_names(stated)
    if "train" in places:
        return None
    if recorded.is_file():
        manifest = Manifest.read(recorded)
        return ClassList(manifest.classes, manifest.label_names)
    if place is not None:
        extensions = IMAGE_EXTENSIONS + options.further_extensions
        return _open(options, "train", place, stated, None, extensions)[1]
    if options.data_path.is_dir() and places["val"].form not in _LABELLED:
        raise FileNotFoundError(
            f"the class list of train is not known: neither {options.data_path / 'train'} nor {recorded} exists; "
            f"convert train first, or add the images of train ({options.data_path / 'train'} or {TRAIN})"
        )
    raise FileNotFoundError(
        f"the class list of train is not known: {recorded} does not exist; convert train first, or name the classes "
        "with --classes FILE"
    )


def _list_classes(place: Place) -> tuple[str, ...]:
    if place.form == "folder":
        return list_classes(place.location)
    if place.form == "class_tars":
        return tuple(sorted(archive.stem for archive in place.files))
    return list_train_classes(place.location)


def _open(
    options: ConversionOptions,
    split: Split,
    place: Place,
    stated: Sequence[str],
    train: ClassList | None,
    extensions: tuple[str, ...],
) -> tuple[Source, ClassList]:
    is_train = split == "train"
    if place.form in _LABELLED:
        found: Shards | ParquetFiles | ImageList
        if place.form == "webdataset":
            found = Shards(place.location, place.files, extensions)
        elif place.form == "parquet":
            found = ParquetFiles(place.location, place.files, extensions)
        else:
            found = ImageList(place.location, extensions)
        source = f"classes = {options.classes}" if options.classes is not None else "train"
        return found.finish(stated, train, source, all_classes=is_train)
    assert train is not None, "folders and archives of classes tell them"
    if place.form in _WITHOUT_CLASSES:
        labels, devkit = options.val_labels, options.data_path / DEVKIT
        truth = read_devkit(devkit) if labels is None else read_val_labels(labels, train.classes)
        opener = open_val if place.form == "val_tar" else open_flat
        return opener(place.location, train.classes, truth, extensions), train
    if place.form == "folder":
        return scan(place.location, train.classes, all_classes=is_train, extensions=extensions), train
    if place.form == "class_tars":
        return open_class_archives(place.location, None if is_train else train.classes, extensions), train
    return open_train(place.location, extensions), train


def reopen(manifest: Manifest, names: Sequence[str]) -> Source | None:
    """Return the images of a .beton, by their names in its list, from what it was made from; None: from class folders.

    Raises FileNotFoundError, or ValueError as the source does and for a name that is not there.
    """
    location, extensions = Path(manifest.source), IMAGE_EXTENSIONS + manifest.extensions
    place = _find_again(location, manifest.split, names)
    if place is None:
        return None
    if place.form in ("train_tar", "val_tar"):
        return reopen_archive(location, names)
    source: Source
    if place.form == "flat":
        unlabelled = np.zeros(len(names), np.int32)
        return ListedImages(location=location, classes=("",), names=Names.of(names), labels=unlabelled, flat=True)
    if place.form == "class_tars":
        source = open_class_archives(place.location, None, extensions)
    else:
        kind = Shards if place.form == "webdataset" else ParquetFiles
        found = kind(location, place.files, extensions)
        train = ClassList(manifest.classes, manifest.label_names)
        source, _ = found.finish((), train, "its manifest", all_classes=False)
    index = {source.name(number): number for number in range(len(source))}
    if missing := next((name for name in names if name not in index), None):
        raise ValueError(f"{location} has no image {missing}; its files are not those that the .beton was made from")
    return source.select([index[name] for name in names])


def _find_again(location: Path, split: Split, names: Sequence[str]) -> Place | None:
    if location.is_dir():
        if (location / names[0]).exists():
            return None
        if (location / names[0].rpartition("/")[2]).is_file():
            return Place("flat", location)
        if archives := _named(location, split, "tar"):
            return Place("webdataset", location, tuple(archives))
        files = _named(location, split, "parquet")
        return Place("parquet", location, tuple(files)) if files else None
    files = expand(location)
    if location.suffix == ".parquet":
        return Place("parquet", location, tuple(files))
    if holds_samples(files[0]):
        return Place("webdataset", location, tuple(files))
    return Place("class_tars", location.parent, tuple(files)) if "*" in location.name else Place("val_tar", location)


# --- Where the images are --------------------------------------------------------------------------------------------


def _find_train(options: ConversionOptions) -> Place | None:
    """Return where the images of train are if only val is converted, or None."""
    if not options.data_path.is_dir():
        return None
    wanted = (place for place in _candidates(options.data_path, "train") if place.kind == options.source)
    return next(wanted, None) or next(_candidates(options.data_path, "train"), None)


def _find(options: ConversionOptions, split: Split) -> Place:
    """Return where the images of a split are. Raises FileNotFoundError, or ValueError for a wrong --source."""
    root = options.data_path
    if not root.is_dir():
        return _find_files(options)
    wanted = (place for place in _candidates(root, split) if options.source in ("auto", place.kind))
    if (place := next(wanted, None)) is not None:
        return place
    if options.source in ("auto", "folder"):
        if (root / split).is_dir():
            return Place("folder", root / split)  # `scan` tells what it lacks
        other: Split = "val" if split == "train" else "train"
        there = next(_candidates(root, other), None)
        if there is None or there.form == "folder":
            raise FileNotFoundError(explain_missing_split(root, split))
        raise FileNotFoundError(
            f"{root} has images of {other} ({there.location}), but none of {split}: no class folders in "
            f"{root / split}, no {TRAIN if split == 'train' else VAL}, no shards, parquet files or list named after "
            f"{split}; copy them there, or choose --split {other}"
        )
    expected = {
        "imagenet_tars": f"{TRAIN if split == 'train' else VAL}",
        "webdataset": f"{split}/*.tar or NAME-{split}-NUMBER.tar",
        "parquet": f"{split}/*.parquet, {split}-*.parquet or data/{split}-*.parquet",
        "list": f"{split}.tsv",
    }[options.source]
    found = next(_candidates(root, split), None)
    hint = f"; {found.location} is of the form {found.kind}" if found else ""
    raise FileNotFoundError(
        f"{root} has no {expected}, as source = {options.source} requires for {split}{hint}; copy it there, or choose "
        "another --source or --split"
    )


def _candidates(root: Path, split: Split) -> Iterator[Place]:
    """Yield the forms in which a split lies below `root`, the first one as `auto` takes it."""
    folder = root / split
    if folder.is_dir():
        if holds_class_folders(folder):
            yield Place("folder", folder)
        if archives := _sorted(folder.glob("*.tar")):
            yield from _of_archives(folder, archives)
        if files := _sorted(folder.glob("*.parquet")):
            yield Place("parquet", folder / "*.parquet", _check_complete(files))
        if split == "val" and holds_flat_images(folder):
            yield Place("flat", folder)
    if (archive := root / (TRAIN if split == "train" else VAL)).is_file():
        yield Place("train_tar" if split == "train" else "val_tar", archive)
    if (file := root / f"{split}.tsv").is_file():
        yield Place("list", file, (file,))
    if archives := [path for path in _named(root, split, "tar") if path.name not in (TRAIN, VAL)]:
        yield Place("webdataset", root, tuple(archives))
    for place in (root, root / "data"):
        if files := _named(place, split, "parquet"):
            yield Place("parquet", place, _check_complete(files))


def _of_archives(folder: Path, archives: Sequence[Path]) -> Iterator[Place]:
    """Yield the form of a folder of archives: shards with labels, or one archive for each class."""
    place = folder / "*.tar"
    shards = Place("webdataset", place, tuple(archives))
    classes = Place("class_tars", folder, tuple(archives))
    yield from (shards, classes) if holds_samples(archives[0]) else (classes, shards)


def _named(folder: Path, split: Split, end: str) -> list[Path]:
    """Return the files that are named after the split: train.tar, imagenet1k-train-0000.tar, validation-00.tar."""
    pattern = re.compile(rf"(?:.*[-_.])?(?:{_WORDS[split]})(?:[-_.].*)?\.{end}", re.IGNORECASE)
    return _sorted(path for path in folder.glob(f"*.{end}") if pattern.fullmatch(path.name))


def _find_files(options: ConversionOptions) -> Place:
    """Return the files of one split that data_path names: one, or a pattern of several."""
    path = options.data_path
    forms: dict[str, Form] = {".tar": "webdataset", ".parquet": "parquet", ".tsv": "list"}
    form = next((form for form in _LABELLED if form == options.source), forms.get(path.suffix))
    whole = options.source == "auto" and path.suffix == ".tar" and path.is_file() and not holds_samples(path)
    if form is None or whole or path.name in (TRAIN, VAL):
        if path.name in (TRAIN, VAL) and path.is_file():
            raise FileNotFoundError(f"data_path = {path}: give the folder above it: --data_path {path.parent}")
        unpack = "; if it is an archive, unpack it first" if path.is_file() else ""
        raise FileNotFoundError(f"data_path = {path} is not a folder{unpack}; {LAYOUT}")
    files = tuple(expand(path))
    if options.split == "all":
        raise ValueError(f"data_path = {path} names the images of one split; add --split train or --split val")
    if form == "list" and len(files) != 1:
        raise ValueError(f"data_path = {path} names {len(files)} lists; expected one for each split")
    return Place(form, path, files)


def expand(pattern: Path) -> list[Path]:
    """Return the files of a pattern with {000..146}, {a,b} or *, or the file of that name.

    Raises FileNotFoundError for a missing one, ValueError for braces that are no range or list.
    """
    words = _expand_braces(str(pattern))
    paths = []
    for word in words:
        if Path(word).is_file() or not re.search(r"[*?\[]", word):
            paths.append(Path(word))
        elif found := sorted(glob.glob(word)):
            paths += map(Path, found)
        else:
            raise FileNotFoundError(f"data_path = {pattern}: no file matches {word}")
    if missing := [path for path in paths if not path.is_file()]:
        number = f"{len(missing)} of {len(paths)} files are missing: " if len(paths) > 1 else ""
        raise FileNotFoundError(f"data_path = {pattern}: {number}{missing[0]} does not exist")
    return paths


def _expand_braces(text: str) -> list[str]:
    found = re.search(r"\{([^{}]*)\}", text)
    if found is None:
        return [text]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        first, last = int(numbers[1]), int(numbers[2])
        width = len(numbers[1]) if numbers[1].startswith("0") or len(numbers[1]) == len(numbers[2]) else 0
        if not 0 <= last - first < _MAX_EXPANDED:
            raise ValueError(f"data_path = {text}: expected a range that increases, e.g. {{000..146}}")
        words = [str(number).zfill(width) for number in range(first, last + 1)]
    elif "," in found[1]:
        words = found[1].split(",")
    else:
        raise ValueError(f"data_path = {text}: expected a range or a list in braces, e.g. {{000..146}} or {{a,b}}")
    ends = _expand_braces(text[found.end() :])
    return [text[: found.start()] + word + end for word in words for end in ends]


def _check_complete(files: Sequence[Path]) -> tuple[Path, ...]:
    """Return files. Raises FileNotFoundError if one of `train-00000-of-00294.parquet` and so on is missing."""
    for path in files:
        if parts := re.fullmatch(r"(.*?)(\d+)-of-(\d+)(\.\w+)", path.name):
            stem, number, total, end = parts.groups()
            names = {each.name for each in files}
            wanted = [f"{stem}{i:0{len(number)}d}-of-{total}{end}" for i in range(int(total))]
            if missing := [name for name in wanted if name not in names]:
                raise FileNotFoundError(
                    f"{path.parent}: {len(missing)} of {int(total)} files are missing, e.g. {missing[0]}; copy them, "
                    "or give the files to convert as --data_path 'PATTERN' --split SPLIT"
                )
            break
    return tuple(files)


def _sorted(paths: Iterator[Path] | Sequence[Path]) -> list[Path]:
    """Return the files that are not hidden, by name."""
    return sorted((path for path in paths if not path.name.startswith(".")), key=lambda path: path.name)
