"""ILSVRC2012 as it is downloaded: ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, read in place."""

from __future__ import annotations

import io
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from ffcv_convnext.data.convert.folders import IMAGE_EXTENSIONS, ending
from ffcv_convnext.data.convert.source import Stamp
from ffcv_convnext.data.convert.tars import Member, TarImages, list_members

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


def open_train(archive: Path, extensions: tuple[str, ...] = IMAGE_EXTENSIONS) -> TarImages:
    """Index a tar of one tar for each class, `n01440764.tar`. Order and names are those of the unpacked folders.

    Raises FileNotFoundError, or ValueError as `list_members` does and for a class without images.
    """
    stamp = Stamp.of(archive)
    inner = sorted(_class_archives(archive), key=lambda each: each[0])
    images: list[tuple[str, int, int, int]] = []
    left_out: Counter[str] = Counter()
    for label, (name, member) in enumerate(inner):
        before = len(images)
        for image in sorted(list_members(archive, inside=member), key=lambda each: each.name.split("/")):
            if image.name.lower().endswith(extensions):
                images.append((f"{name}/{image.name.removeprefix('./')}", image.start, image.size, label))
            else:
                left_out[ending(image.name)] += 1
        if len(images) == before:
            raise ValueError(f"{archive}/{member.name} has no images; copy the archive again")
    return TarImages.build(archive, [name for name, _ in inner], images, left_out, stamp)


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
    stamp = Stamp.of(archive)
    labels = {name: label for label, name in enumerate(classes)}
    images: list[tuple[str, int, int, int]] = []
    left_out: Counter[str] = Counter()
    for member in list_members(archive):
        if not member.name.lower().endswith(extensions):
            left_out[ending(member.name)] += 1
            continue
        file = member.name.rsplit("/", 1)[-1]
        if (name := truth.get(file)) is None:
            raise ValueError(f"{archive}: the ground truth has no class for {member.name}")
        if name not in labels:
            raise ValueError(f"{archive}: {member.name} has class {name}, not among the {len(classes)} of train")
        images.append((f"{name}/{file}", member.start, member.size, labels[name]))
    if not images:
        raise ValueError(f"{archive} has no images ({', '.join(extensions)}); copy it again")
    images.sort(key=lambda image: (image[3], image[0]))
    for one, other in pairwise(images):
        if one[0] == other[0]:
            raise ValueError(f"{archive}: two members are named {one[0].split('/')[1]}; remove one")
    return TarImages.build(archive, classes, images, left_out, stamp)


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
            f"the classes of the validation images are not known: {archive} does not exist; copy it there, or give "
            "--val_labels FILE with one `name class` a line"
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
                found[f"{folder}/{image.name.removeprefix('./')}"] = image
            del members[f"{folder}.tar"]
        elif file in members:
            found[name] = members[file]
    if missing := next((name for name in names if name not in found), None):
        raise ValueError(f"{archive} has no member for {missing}; it is not the archive that the .beton was made from")
    images = [(name, found[name].start, found[name].size, 0) for name in names]
    return TarImages.build(archive, [""], images, {}, Stamp.of(archive))
