"""Labels as shards, parquet files and lists state them, names or integers, -> classes in ImageFolder's order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_INTEGER = re.compile("0|[1-9][0-9]{0,8}")


class ClassList(NamedTuple):
    """The classes of a data set."""

    classes: tuple[str, ...]  # sorted, as ImageFolder's
    label_names: tuple[str, ...] = ()  # class of each integer label in the source; empty: the source has no integers


class RawLabels:
    """The different labels of a source while they are found, as text. Each has a code, which images refer to."""

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}
        self._places: list[str] = []  # where each was found first
        self._folders: list[str] = []  # of the original files of each, '' if unknown or not always the same

    def code(self, text: str, place: Sequence[str], folder: str = "") -> int:
        """Return the code of a label. place: archive and member.   folder: of the original file, if it is known."""
        code = self.codes.get(text)
        if code is None:
            where = ": ".join(place)
            if not text or "\n" in text or "\r" in text or "\0" in text:
                raise ValueError(f"{where}: the label {text[:60]!r} is empty or has line breaks; expected one name")
            code = self.codes[text] = len(self._places)
            self._places.append(where)
            self._folders.append(folder)
        elif self._folders[code] != folder:
            self._folders[code] = ""
        return code

    def resolve(
        self, stated: Sequence[str] = (), train: ClassList | None = None, source: str = "train"
    ) -> tuple[ClassList, NDArray[np.int32]]:
        """Return the classes, and the label of each code.

        stated: class names in the order of integer labels, from a file or a schema; source: its name, for messages.
        train: the classes of train; None: this is train, or they are not known.
        Without both, names are classes, and integers get the names of their original folders, or zero-padded numbers.
        Raises ValueError for a label that belongs to no class.
        """
        texts = list(self.codes)
        if train is None:
            train = sort_names(stated) if stated else self._derive(texts)
        labels = {name: label for label, name in enumerate(train.classes)}
        by_number = {str(number): labels.get(name, -1) for number, name in enumerate(train.label_names)}
        if not by_number and all(name.isascii() and name.isdigit() for name in train.classes):
            by_number = {str(int(name)): label for label, name in enumerate(train.classes)}
        found = []
        for text, place in zip(texts, self._places, strict=True):
            label = labels.get(text, -1)
            label = by_number.get(text, -1) if label < 0 else label
            if label < 0:
                advice = "; give the class names in label order with --classes FILE" if not by_number else ""
                raise ValueError(
                    f"{place}: the label {text} is none of the {len(train.classes)} classes of {source}"
                    + (advice if _INTEGER.fullmatch(text) else "")
                )
            found.append(label)
        return train, np.array(found, np.int32)

    def _derive(self, texts: Sequence[str]) -> ClassList:
        if not all(map(_INTEGER.fullmatch, texts)):
            if negative := next((text for text in texts if re.fullmatch("-[0-9]+", text)), None):
                raise ValueError(f"{self._places[self.codes[negative]]}: the label {negative} means that there is none")
            return ClassList(tuple(sorted(texts)))
        numbers = sorted(map(int, texts))
        width = len(str(numbers[-1]))
        names = [""] * (numbers[-1] + 1)
        known = all(self._folders) and len(set(self._folders)) == len(texts)
        for text, code in self.codes.items():
            names[int(text)] = self._folders[code] if known else text.zfill(width)
        return ClassList(tuple(sorted(filter(None, names))), tuple(names))


def sort_names(names: Sequence[str]) -> ClassList:
    """Return the classes of names that stand in the order of integer labels."""
    return ClassList(tuple(sorted(names)), tuple(names))


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read class names, one a line, in the order of integer labels.

    Raises FileNotFoundError, and ValueError for an empty file and for an empty or a doubled line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"classes = {path} does not exist; expected a file with one class name a line")
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").rstrip().splitlines()
    names = tuple(line.strip() for line in lines)
    return check_names(names, str(path), "line")


def check_names(names: tuple[str, ...], place: str, noun: str = "name") -> tuple[str, ...]:
    """Return class names. Raises ValueError if there are none, or for an empty or a doubled one."""
    if not names:
        raise ValueError(f"{place} names no classes; expected one class name a line, in label order")
    seen: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name or "\n" in name:
            raise ValueError(f"{place}, {noun} {number}: {name!r} is no class name")
        if name in seen:
            raise ValueError(f"{place}, {noun} {number}: the class {name} is {noun} {seen[name]} already; remove one")
        seen[name] = number
    return names


def check_every_class_has_images(location: Path, labels: NDArray[np.int32], classes: Sequence[str]) -> None:
    """Raise ValueError if a class has no image, as ImageFolder does for an empty folder of train."""
    empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    if len(empty):
        named = ", ".join(classes[label] for label in empty[:3]) + (", ..." if len(empty) > 3 else "")
        number = "class" if len(empty) == 1 else f"{len(empty)} classes"
        raise ValueError(
            f"{location}: no images of {number} {named}; add the missing part of the images, or leave out --classes, "
            "for the classes that have some"
        )
