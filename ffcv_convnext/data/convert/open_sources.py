"""The images of each split, in the form that --source says or data_path shows."""

from __future__ import annotations

from pathlib import Path

from ffcv_convnext.data.beton import Manifest, Split
from ffcv_convnext.data.convert.folders import IMAGE_EXTENSIONS, LAYOUT, explain_missing_split
from ffcv_convnext.data.convert.imagenet import (
    DEVKIT,
    TRAIN,
    VAL,
    list_train_classes,
    open_train,
    open_val,
    read_devkit,
    read_val_labels,
)
from ffcv_convnext.data.convert.options import ConversionOptions
from ffcv_convnext.data.convert.source import Source, list_classes, scan


def open_sources(options: ConversionOptions) -> dict[Split, Source]:
    """List the images of each split, in the form that options.source says or data_path shows."""
    root = options.data_path
    tars = (root / TRAIN).is_file() or (root / VAL).is_file()
    found = "imagenet_tars" if tars and not any((root / split).is_dir() for split in options.splits) else "folder"
    kind = found if options.source == "auto" else options.source
    if options.val_labels is not None and kind != "imagenet_tars":
        raise ValueError(f"val_labels = {options.val_labels}: only --source imagenet_tars reads it; leave it out")
    return _open_imagenet_tars(options) if kind == "imagenet_tars" else open_image_folders(options)


def _open_imagenet_tars(options: ConversionOptions) -> dict[Split, Source]:
    root, extensions = options.data_path, IMAGE_EXTENSIONS + options.further_extensions
    for split in options.splits:
        if not (archive := root / (TRAIN if split == "train" else VAL)).is_file():
            raise FileNotFoundError(f"{archive} does not exist; copy it there, or choose another --split")
    train = root / TRAIN
    classes = list_train_classes(train) if train.is_file() else _recorded_classes(options, train)
    sources: dict[Split, Source] = {}
    if "val" in options.splits:  # the smaller one first: its errors come at once
        labels = options.val_labels
        truth = read_devkit(root / DEVKIT) if labels is None else read_val_labels(labels, classes)
        sources["val"] = open_val(root / VAL, classes, truth, extensions)
    if "train" in options.splits:
        sources["train"] = open_train(root / TRAIN, extensions)
    return sources


def _recorded_classes(options: ConversionOptions, train: Path) -> tuple[str, ...]:
    """Return the classes in the manifest of train. train: where its images would be, for the message."""
    if (options.out_dir / "train.json").is_file():
        return Manifest.read(options.out_dir / "train.json").classes
    raise FileNotFoundError(
        f"the class list of train is not known: neither {train} nor {options.out_dir / 'train.json'} "
        f"exists; convert train first, or add {train}"
    )


def open_image_folders(options: ConversionOptions) -> dict[Split, Source]:
    """List the images of each split below data_path, with the class list of train."""
    root = options.data_path
    if not root.is_dir():
        unpack = "; if it is an archive, unpack it first" if root.is_file() else ""
        raise FileNotFoundError(f"data_path = {root} is not a folder{unpack}; {LAYOUT}")
    for split in options.splits:
        if not (root / split).is_dir():
            raise FileNotFoundError(explain_missing_split(root, split))
    if (root / "train").is_dir():
        classes = list_classes(root / "train")
    elif (options.out_dir / "train.json").is_file():
        classes = Manifest.read(options.out_dir / "train.json").classes
    else:
        raise FileNotFoundError(
            f"the class list of train is not known: neither {root / 'train'} nor {options.out_dir / 'train.json'} "
            f"exists; convert train first, or add the folder {root / 'train'}"
        )
    extensions = IMAGE_EXTENSIONS + options.further_extensions
    return {
        split: scan(root / split, classes, all_classes=split == "train", extensions=extensions)
        for split in options.splits
    }
