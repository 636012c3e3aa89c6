"""ILSVRC2012 as it is downloaded: ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, read in place."""

from __future__ import annotations

import io
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ffcv_convnext.data.convert.archives import Index, in_threads
from ffcv_convnext.data.convert.folders import IMAGE_EXTENSIONS, ending
from ffcv_convnext.data.convert.names import Names
from ffcv_convnext.data.convert.source import Stamp
from ffcv_convnext.data.convert.tars import Member, TarImages, list_members

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


def open_train(archive: Path, extensions: tuple[str, ...] = IMAGE_EXTENSIONS) -> TarImages:
    """Index a tar of one tar for each class, `n01440764.tar`. Order and names are those of the unpacked folders.

    Raises FileNotFoundError, or ValueError as `list_members` does and for a class without images.
    """
    index = Index([archive])
    inner = sorted(_class_archives(archive), key=lambda each: each[0])
    read = in_threads(lambda each: list(list_members(archive, inside=each[1])), inner)
    for label, ((name, member), members) in enumerate(zip(inner, read, strict=True)):
        _add_class(index, 0, label, name, members, extensions)
        if not index.labels or index.labels[-1] != label:
            raise ValueError(f"{archive}/{member.name} has no images; copy the archive again")
    fields, _ = index.finish([name for name, _ in inner])
    return TarImages(location=archive, **fields)


def open_class_archives(
    folder: Path, classes: Sequence[str] | None = None, extensions: tuple[str, ...] = IMAGE_EXTENSIONS
) -> TarImages:
    """Index a folder with one archive for each class, `n01440764.tar`.

    classes: of train, for a folder that may lack some; None: the archives here.
    Raises as `open_train` does, and ValueError for an archive that is not named after one of `classes`.
    """
    archives = sorted(folder.glob("*.tar"), key=lambda archive: archive.stem)
    known = {name: label for label, name in enumerate(classes or [archive.stem for archive in archives])}
    index = Index(archives)
    if other := [archive for archive in archives if archive.stem not in known]:
        raise ValueError(f"{other[0]} is named after none of the {len(known)} classes of train; rename or remove it")
    read = in_threads(lambda archive: list(list_members(archive)), archives)
    for which, (archive, members) in enumerate(zip(archives, read, strict=True)):
        before = len(index)
        _add_class(index, which, known[archive.stem], archive.stem, members, extensions)
        if len(index) == before:
            raise ValueError(f"{archive} has no images; copy it again, or remove it")
    fields, _ = index.finish(list(known))
    return TarImages(location=folder / "*.tar", **fields)


def _add_class(
    index: Index, which: int, label: int, name: str, members: Iterable[Member], extensions: tuple[str, ...]
) -> None:
    for file, start, size in members:
        if file.lower().endswith(extensions):
            index.add(file.removeprefix("./").removeprefix(f"{name}/"), which, start, size, label)
        else:
            index.left_out[ending(file)] += 1


def list_train_classes(archive: Path) -> tuple[str, ...]:
    """Return the sorted class names of the training archive, from its outer headers."""
    return tuple(sorted(name for name, _ in _class_archives(archive)))


def _class_archives(archive: Path) -> list[tuple[str, Member]]:
    members = list(list_members(archive))
    if other := [member.name for member in members if not member.name.endswith(".tar")]:
        raise ValueError(f"{archive} holds {other[0]}; expected one .tar for each class, e.g. n01440764.tar")
    if not members:
        raise ValueError(f"{archive} holds no files; copy it again")
    named = [(member.name.rsplit("/", 1)[-1].removesuffix(".tar"), member) for member in members]
    if twice := [name for name, number in Counter(name for name, _ in named).items() if number > 1]:
        raise ValueError(f"{archive} holds two archives of class {twice[0]}; remove one")
    return named


def open_val(
    archive: Path, classes: Sequence[str], truth: dict[str, str], extensions: tuple[str, ...] = IMAGE_EXTENSIONS
) -> TarImages:
    """Index the validation archive. truth: class of each image by its name. Ordered by class, then by name.

    Raises FileNotFoundError, or ValueError as `list_members` does, and for an image without a class or a class that is
    not among `classes`.
    """
    index = Index([archive])
    truth_of = GroundTruth(truth, classes, archive)
    for name, start, size in list_members(archive):
        if name.lower().endswith(extensions):
            index.add(name.rpartition("/")[2], 0, start, size, truth_of.label(name))
        else:
            index.left_out[ending(name)] += 1
    if not len(index):
        raise ValueError(f"{archive} has no images ({', '.join(extensions)}); copy it again")
    truth_of.check_all_seen()
    fields, _ = index.finish(classes)
    return TarImages(location=archive, **fields)


class GroundTruth:
    """The classes of validation images by file name, and which of them were found."""

    def __init__(self, truth: Mapping[str, str], classes: Sequence[str], place: Path) -> None:
        self.place = place  # the archive or folder with the images, for messages
        self._truth, self._classes, self._seen = truth, len(classes), set[str]()
        self._labels = {name: label for label, name in enumerate(classes)}

    def label(self, name: str) -> int:
        """Return the label of an image. Raises ValueError if it has none, or a class that train lacks."""
        file = name.rpartition("/")[2]
        if (wanted := self._truth.get(file)) is None:
            raise ValueError(f"{self.place}: the ground truth has no class for {name}")
        if wanted not in self._labels:
            raise ValueError(f"{self.place}: {name} has class {wanted}, not among the {self._classes} of train")
        self._seen.add(file)
        return self._labels[wanted]

    def check_all_seen(self) -> None:
        """Raise ValueError if an image of the ground truth is missing."""
        if missing := next((file for file in self._truth if file not in self._seen), None):
            raise ValueError(
                f"{self.place} has {len(self._seen):,} of the {len(self._truth):,} images of the ground truth; "
                f"{missing} is missing: copy the images again, or give their classes alone with --val_labels FILE"
            )


def read_val_labels(path: Path, classes: Sequence[str]) -> dict[str, str]:
    """Read `name class` lines; the class is a name or an index into `classes`. Raises ValueError with the line."""
    if not path.is_file():
        raise FileNotFoundError(f"val_labels = {path} does not exist; expected a file with one `name class` a line")
    truth: dict[str, str] = {}
    known = set(classes)
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2:
            raise ValueError(f"{path}, line {number}: {line[:60]!r}; expected `name class`")
        file, name = words[0].rsplit("/", 1)[-1], words[1]
        if name not in known and name.isascii() and name.isdigit() and int(name) < len(classes):
            name = classes[int(name)]
        if name not in known:
            raise ValueError(
                f"{path}, line {number}: {name} is neither a class of train nor an index below {len(classes)}"
            )
        if file in truth:
            raise ValueError(f"{path}, line {number}: {file} has a class already; remove one line")
        truth[file] = name
    return truth


def read_devkit(archive: Path) -> dict[str, str]:
    """Return the class (WordNet ID) of each validation image, from the development kit.

    Line i of its ground truth is the ILSVRC2012_ID of image i; meta.mat has the WordNet ID of each.
    Raises FileNotFoundError, or ValueError for a damaged kit or without scipy, which reads meta.mat.
    """
    if not archive.is_file():
        raise FileNotFoundError(
            "the classes of the validation images are not known: they have no class folders, and "
            f"{archive} does not exist; copy it there, or give --val_labels FILE with one `name class` a line"
        )
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ValueError(
            f"{archive}: its meta.mat needs scipy; install it with: pip install 'ffcv-convnext[imagenet]', or give "
            "--val_labels FILE with one `name class` a line"
        ) from None
    try:
        content: dict[str, bytes] = {}
        with tarfile.open(archive) as tar:
            for info in tar:
                if (found := re.search(r"data/(meta\.mat|ILSVRC2012_validation_ground_truth\.txt)$", info.name)) and (
                    file := tar.extractfile(info)
                ):
                    content[found[1]] = file.read()
        synsets = loadmat(io.BytesIO(content["meta.mat"]), squeeze_me=True)["synsets"]
        ids = {int(each["ILSVRC2012_ID"]): str(each["WNID"]) for each in synsets}
        lines = content["ILSVRC2012_validation_ground_truth.txt"].split()
        return {f"ILSVRC2012_val_{number:08d}.JPEG": ids[int(line)] for number, line in enumerate(lines, 1)}
    except (tarfile.TarError, EOFError, OSError, KeyError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"{archive} is not a usable development kit ({type(error).__name__}: {error}); copy it again"
        ) from None


def reopen(archive: Path, names: Sequence[str]) -> TarImages:
    """Return the images of a .beton that was made from one of the two archives, by their names in its list.

    Their labels are 0. Raises FileNotFoundError, or ValueError as `list_members` does and for a name that is not there.
    """
    members = {member.name.rsplit("/", 1)[-1]: member for member in list_members(archive)}
    found: dict[str, Member] = {}
    for name in names:
        folder, _, file = name.partition("/")
        if inner := members.get(f"{folder}.tar"):
            for image in list_members(archive, inside=inner):
                found[f"{folder}/{image.name.removeprefix('./').removeprefix(f'{folder}/')}"] = image
            del members[f"{folder}.tar"]
        elif file in members:
            found[name] = members[file]
    if missing := next((name for name in names if name not in found), None):
        raise ValueError(f"{archive} has no member for {missing}; it is not the archive that the .beton was made from")
    images = [found[name] for name in names]
    return TarImages(
        location=archive,
        classes=("",),
        archives=(str(archive),),
        stamps=(Stamp.of(archive),),
        which=np.zeros(len(images), np.int32),
        starts=np.array([image.start for image in images], np.int64),
        sizes=np.array([image.size for image in images], np.int64),
        labels=np.zeros(len(images), np.int32),
        names=Names.of(names),
    )
