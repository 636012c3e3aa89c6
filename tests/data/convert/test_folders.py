"""Folders as people have them: other endings, no class folders, archives, a level too much; each is one clean line."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from support.imagefolder import class_name, draw_image, make_image_folder

from ffcv_convnext import cli
from ffcv_convnext.data.beton import Manifest
from ffcv_convnext.data.check import describe_data
from ffcv_convnext.data.convert.folders import IMAGE_EXTENSIONS, describe_left_out

Write = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_image_folder(tmp_path / "imagenet", num_classes=3, train_per_class=3, val_per_class=2)


@pytest.fixture
def write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Write:
    """Run write_ffcv_dataset.py in this process; returns exit status, stdout, stderr."""

    def command(folder: Path, *flags: str) -> tuple[int, str, str]:
        words = ["--data_path", str(folder), "--out_dir", str(tmp_path / "out"), "--num_workers", "1", *flags]
        status = cli.run_command("write", words)
        return status, *capsys.readouterr()

    return command


def save(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_image(0, number, (48, 40))).save(path)
    return path


# --- files with other endings ----------------------------------------------------------------------------------


def add_others(folder: Path) -> None:
    """Nine .gif, three .heic, and files that are no images, hidden or not."""
    for number in range(9):
        save(folder / "train" / class_name(number % 3) / f"moving{number}.GIF", number)
    for number in range(3):
        (folder / "train" / class_name(0) / f"{number}.heic").write_bytes(b"heic")
    for name in (".DS_Store", "._000.JPEG.swp", "Thumbs.db", "notes.txt", "box.xml", "desktop.ini"):
        (folder / "train" / class_name(1) / name).touch()


def test_files_left_out_for_their_ending_are_named_in_one_line_and_in_the_manifest(
    folder: Path, tmp_path: Path, write: Write
) -> None:
    add_others(folder)
    status, stdout, stderr = write(folder)
    assert (status, stderr) == (0, "")
    lines = [line for line in stdout.splitlines() if "left out" in line]
    assert lines == ["train: 12 files left out for their ending: 9 .gif, 3 .heic; include them with --extensions .gif"]
    assert stdout.splitlines()[0] == lines[0], "before the work"
    manifest = Manifest.check(tmp_path / "out" / "train.beton")
    assert manifest.left_out == {".gif": 9, ".heic": 3, ".txt": 1, ".xml": 1}
    assert (manifest.num_samples, manifest.extensions) == (9, ())
    assert Manifest.check(tmp_path / "out" / "val.beton").left_out == {}
    described = describe_data(tmp_path / "out").format()
    assert "left out      9 .gif, 3 .heic, 1 .txt, 1 .xml (files with other endings)" in described


def test_extensions_includes_a_format_that_pillow_reads(folder: Path, tmp_path: Path, write: Write) -> None:
    add_others(folder)
    status, stdout, _ = write(folder, "--extensions", ".gif, .AVIF", "--split", "train")
    assert status == 0
    assert "train: 3 files left out for their ending: 3 .heic; Pillow reads none of them" in stdout
    manifest = Manifest.check(tmp_path / "out" / "train.beton")
    assert manifest.num_samples == 18
    assert manifest.extensions == (".gif", ".avif")
    files = manifest.original_files(tmp_path / "out" / "train.beton")
    assert files is not None
    assert sum(file.endswith(".GIF") for file in files) == 9


def test_a_format_that_pillow_cannot_read_is_the_error_of_any_bad_file(folder: Path, write: Write) -> None:
    add_others(folder)
    status, _, stderr = write(folder, "--extensions", ".heic", "--split", "train")
    assert status == 1
    line = stderr.splitlines()[-1]
    assert (
        ".heic: not an image in a known format; repair or remove the file, or skip such files with --skip_bad" in line
    )


@pytest.mark.parametrize("word", ["gif", ".gif,png", "."])
def test_extensions_must_begin_with_a_dot(folder: Path, write: Write, word: str) -> None:
    status, _, stderr = write(folder, "--extensions", word)
    assert status == 2
    assert stderr == f"error: extensions = {word}: expected endings with a dot, e.g. .gif,.avif\n"


@pytest.mark.parametrize(
    ("left_out", "words"),
    [
        ({}, None),
        ({".txt": 9, ".xml": 50_000, ".json": 1}, None),
        ({"without ending": 1}, "1 file left out for their ending: 1 without ending; Pillow reads none of them"),
        ({".pdf": 2, ".mpg": 1}, "3 files left out for their ending: 2 .pdf, 1 .mpg; Pillow reads none of them"),
        ({".jp2": 1200, ".avif": 7}, "1,200 .jp2, 7 .avif; include them with --extensions .avif,.jp2"),
        ({f".e{i}": 10 - i for i in range(8)}, "10 .e0, 9 .e1, 8 .e2, 7 .e3, 6 .e4, 5 .e5, 2 other endings;"),
        ({"in no class folder": 2}, "2 images left out because they lie in no class folder"),
    ],
)
def test_what_is_left_out_is_told_without_noise(left_out: dict[str, int], words: str | None) -> None:
    described = describe_left_out(left_out)
    assert described == words if words is None else words in (described or "")


def test_images_and_archives_beside_the_class_folders_are_mentioned(folder: Path, write: Write) -> None:
    save(folder / "train" / "stray.jpg")
    (folder / "train" / "n01440764.tar").touch()
    _, stdout, _ = write(folder, "--split", "train")
    assert (
        "train: 1 file left out for their ending: 1 .tar; Pillow reads none of them; 1 image left out because" in stdout
    )


def test_a_class_with_other_endings_only_names_them(folder: Path, write: Write) -> None:
    save(folder / "train" / "moving" / "a.gif")
    status, _, stderr = write(folder)
    assert status == 2
    assert "train: no images in class moving (1 file left out for their ending: 1 .gif; include them with" in stderr


# --- folders that are no ImageFolder -----------------------------------------------------------------------------


def flat_ilsvrc_val(root: Path) -> Path:
    shutil.rmtree(root / "val")
    for number in (1, 2, 3, 4):
        save(root / "val" / f"ILSVRC2012_val_0000000{number}.JPEG", number)
    return root


def flat_val(root: Path) -> Path:
    shutil.rmtree(root / "val")
    save(root / "val" / "a.png")
    return root


def flat_ilsvrc_train(root: Path) -> Path:
    shutil.rmtree(root / "train")
    save(root / "train" / "n01440764_10026.JPEG")
    return root


def tiny_imagenet_val(root: Path) -> Path:
    """Tiny ImageNet's: val/images/*.JPEG, with the labels in a text file."""
    shutil.rmtree(root / "val")
    for number in range(3):
        save(root / "val" / "images" / f"val_{number}.JPEG")
    (root / "val" / "val_annotations.txt").touch()
    return root


def archives_in_root(root: Path) -> Path:
    shutil.rmtree(root / "train")
    (root / "imagenet.zip").touch()
    return root


def archives_of_classes(root: Path) -> Path:
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    for name in ("n01440764.tar.gz", "n01443537.tar.gz"):
        (root / "train" / name).touch()
    return root


def archives_inside_classes(root: Path) -> Path:
    for split in ("train", "val"):
        for folder in (root / split).iterdir():
            shutil.rmtree(folder)
            folder.mkdir()
            (folder / f"{folder.name}.tar").touch()
    return root


def empty_classes(root: Path) -> Path:
    for path in root.glob("train/*/*"):
        path.unlink()
    return root


def only_other_endings(root: Path) -> Path:
    for path in root.glob("train/*/*"):
        path.rename(path.with_suffix(".gif"))
    return root


def the_split_itself(root: Path) -> Path:
    return root / "train"


def two_levels_above(root: Path) -> Path:
    nested = root.parent / "work" / "ILSVRC" / "Data" / "CLS-LOC"
    nested.parent.mkdir(parents=True)
    root.rename(nested)
    return root.parent / "work"


def level_above(root: Path) -> Path:
    return root.parent


def train_in_train(root: Path) -> Path:
    (root / "train").rename(root / "inner")
    (root / "train").mkdir()
    (root / "inner").rename(root / "train" / "train")
    return root


def classes_without_split(root: Path) -> Path:
    (root / "train").rename(root / "inner")
    shutil.rmtree(root / "val")
    return Path((root / "inner").rename(root.parent / "photos"))


def images_without_anything(root: Path) -> Path:
    save(root.parent / "photos" / "a.jpg")
    return root.parent / "photos"


def other_name(root: Path) -> Path:
    (root / "val").rename(root / "Validation")
    return root


def an_archive(root: Path) -> Path:
    with tarfile.open(root.parent / "imagenet.tar", "w") as tar:
        tar.add(root, "imagenet")
    return root.parent / "imagenet.tar"


WRONG: dict[Callable[[Path], Path], tuple[str, ...]] = {
    flat_ilsvrc_val: (
        "the classes of the validation images are not known: they have no class folders, and {0}/ILSVRC2012_devkit_t12",
        "does not exist; copy it there, or give --val_labels FILE",
    ),
    flat_val: ("the classes of the validation images are not known", "--val_labels FILE with one `name class` a line"),
    flat_ilsvrc_train: (
        "{0}/train holds 1 file",
        "its name: n01440764_10026.JPEG into n01440764, or write a list with one `path<TAB>class` a line",
    ),
    tiny_imagenet_val: ("{0}/val holds no class folders, only images with 3 files (val_0.JPEG, ", "; move each into"),
    archives_in_root: (
        "{0}/train does not exist; {0} holds 1 file (imagenet.zip), which cannot be read in place: unpack them so that",
        "ILSVRC2012_img_train.tar and WebDataset shards like NAME-train-0000.tar need not be unpacked",
    ),
    archives_of_classes: (
        "{0}/train holds 2 files (n01440764.tar.gz, n01443537.tar.gz) and no class folders; only .tar can be read in",
        "decompress them",
    ),
    archives_inside_classes: (
        "{0}/train has no images but 3 archives (.tar, .zip); an archive {0}/train/<class>.tar is read in place",
    ),
    empty_classes: ("{0}/train has no images (.jpg, ", "its class folders are empty; copy or unpack the images"),
    only_other_endings: ("{0}/train has no images (.jpg, ", "9 files left out", "include them with --extensions .gif"),
    the_split_itself: (
        "data_path = {0} is the folder of a split; give the folder above it: --data_path ",
        "/imagenet\n",
    ),
    two_levels_above: (
        "{0}/train does not exist, but {0}/ILSVRC/Data/CLS-LOC/train does; use --data_path {0}/ILSVRC/",
    ),
    level_above: ("{0}/train does not exist, but {0}/imagenet/train does; use --data_path {0}/imagenet",),
    train_in_train: ("{0}/train holds one folder, train, which holds 3 folders and no image: a level too much; move",),
    classes_without_split: ("{0}/train does not exist, but 3 folders (class_00, ", "move them into {0}/train"),
    images_without_anything: ("{0}/train does not exist; {0} holds 1 file (a.jpg) itself; expected an ImageFolder",),
    other_name: ("{0} holds Validation, not val; rename it: mv {0}/Validation {0}/val",),
    an_archive: ("data_path = {0} is not a folder; if it is an archive, unpack it first",),
}


@pytest.mark.parametrize("change", list(WRONG))
def test_a_folder_that_is_no_image_folder_is_one_line_with_the_next_action(
    folder: Path, tmp_path: Path, write: Write, change: Callable[[Path], Path]
) -> None:
    given = change(folder)
    status, stdout, stderr = write(given)
    assert (status, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    for words in WRONG[change]:
        assert words.format(given) in stderr
    assert not (tmp_path / "out").exists()


def test_one_class_of_subfolders_with_an_image_of_its_own_is_no_nesting(tmp_path: Path, write: Write) -> None:
    """An ImageFolder may have one class, and a class may have subfolders."""
    for name in ("a.jpg", "day/b.jpg", "night/c.jpg"):
        save(tmp_path / "photos" / "train" / "only" / name)
    assert write(tmp_path / "photos", "--split", "train")[0] == 0
    assert Manifest.check(tmp_path / "out" / "train.beton").num_samples == 3


def test_every_usual_ending_needs_no_option(tmp_path: Path, write: Write) -> None:
    only = tmp_path / "photos" / "train" / "only"
    for number, end in enumerate(IMAGE_EXTENSIONS):
        save(only / f"{number}{'.png' if end == '.pgm' else end.upper()}", number)
    Image.fromarray(draw_image(0, 1, (48, 40))[..., 0]).save(only / "grey.PGM")
    status, stdout, _ = write(tmp_path / "photos", "--split", "train")
    assert status == 0
    assert "left out" not in stdout
