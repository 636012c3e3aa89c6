"""ImageFolder -> .beton, read back by stock FFCV; bad inputs; interruptions."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from support import REPOSITORY
from support.imagefolder import class_name, draw_every_mode, draw_image, identify, make_image_folder

from ffcv_convnext import cli
from ffcv_convnext.data.beton import RAW
from ffcv_convnext.data.beton.manifest import Manifest
from ffcv_convnext.data.beton.tables import read_tables
from ffcv_convnext.data.convert import ConversionOptions, convert
from ffcv_convnext.data.convert.encode import Encoding, encode
from ffcv_convnext.data.convert.journal import open_journal
from ffcv_convnext.data.convert.source import list_classes, scan
from ffcv_convnext.data.convert.worker_pool import Workers
from ffcv_convnext.errors import Failure

SCRIPT = REPOSITORY / "write_ffcv_dataset.py"

# Creating an FFCV Loader changes numba's types for the whole process, so it gets a separate one.
READ_WITH_STOCK_FFCV = """
import sys
import numpy as np
from ffcv.loader import Loader, OrderOption
from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder, SimpleRGBImageDecoder

for beton, kind, cache in (argument.split("|") for argument in sys.argv[1:]):
    decoder = SimpleRGBImageDecoder() if kind == "as_stored" else CenterCropRGBImageDecoder((48, 48), 1.0)
    loader = Loader(beton, batch_size=5, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False,
                    os_cache=cache == "os_cache", pipelines={"image": [decoder], "label": [IntDecoder()]})
    batches = [(images.copy(), labels.copy()) for images, labels in loader]
    np.savez(beton + "." + cache + ".npz", images=np.concatenate([b[0] for b in batches]),
             labels=np.concatenate([b[1] for b in batches])[:, 0])
"""

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def write(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process; returns its exit status and what it wrote to stderr."""

    def run(data_path: Path, out_dir: Path, *flags: str) -> tuple[int, str]:
        status = cli.run_command("write", ["--data_path", str(data_path), "--out_dir", str(out_dir), *flags])
        return status, capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """A small folder a test may damage."""
    return make_image_folder(tmp_path / "own", num_classes=2, train_per_class=3, val_per_class=1)


def assert_one_line(stderr: str, *words: str) -> None:
    assert stderr.count("\n") == 1, stderr
    assert stderr.startswith("error: ")
    assert "Traceback" not in stderr
    for word in words:
        assert word in stderr


def assert_nothing_left(out_dir: Path) -> None:
    assert [path.name for path in out_dir.glob("*")] == []


def spoil(folder: Path, split: str = "train", label: int = 0, index: int = 1) -> Path:
    path = folder / split / class_name(label) / f"{index:03d}.JPEG"
    path.write_bytes(b"not an image")
    return path


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Three conversions and what stock FFCV reads from them, all in one process since its start takes long."""
    root = tmp_path_factory.mktemp("stock")
    modes = root / "modes_folder"
    expected = draw_every_mode(modes / "train" / "only")
    make_image_folder(root / "mixed_folder", num_classes=6)
    shutil.rmtree(root / "mixed_folder" / "val" / class_name(1))
    bad = [spoil(root / "mixed_folder", label=0, index=0), spoil(root / "mixed_folder", label=3, index=7)]
    convert(ConversionOptions(data_path=modes, out_dir=root / "modes", split="train", num_workers=2))
    convert(ConversionOptions(data_path=root / "mixed_folder", out_dir=root / "mixed", num_workers=2, skip_bad=True))
    jobs = [
        f"{root}/modes/train.beton|as_stored|os_cache",
        f"{root}/modes/train.beton|as_stored|process_cache",
        f"{root}/mixed/train.beton|cropped|process_cache",
        f"{root}/mixed/val.beton|cropped|os_cache",
    ]
    subprocess.run([sys.executable, "-c", READ_WITH_STOCK_FFCV, *jobs], check=True, timeout=300)
    return {"root": root, "expected": expected, "bad": bad}


@pytest.mark.parametrize("cache", ["os_cache", "process_cache"])
def test_stock_ffcv_reads_every_mode(stock, cache: str) -> None:
    beton = stock["root"] / "modes" / "train.beton"
    read = np.load(f"{beton}.{cache}.npz")
    manifest = Manifest.check(beton)
    assert len(read["images"]) == manifest.num_samples == len(stock["expected"])
    for sample, pixels in enumerate(read["images"]):
        original = manifest.original_file(beton, sample)
        assert original is not None
        error = np.abs(pixels.astype(int) - stock["expected"][original.name])
        inside = [x for x in range(64) if 2 <= x % 16 < 14]  # chroma subsampling blurs where bars meet
        assert error[:, inside].max() <= 16, original.name


def test_stock_ffcv_reads_labels_that_match_the_images_around_skipped_files(stock) -> None:
    beton = stock["root"] / "mixed" / "train.beton"
    read = np.load(f"{beton}.process_cache.npz")
    manifest = Manifest.check(beton)
    assert {Path(manifest.source, skipped.path) for skipped in manifest.skipped} == set(stock["bad"])
    assert manifest.skipped[0].reason == "not an image in a known format"
    assert len(read["labels"]) == manifest.num_samples == 6 * 8 - 2
    for sample, (pixels, label) in enumerate(zip(read["images"], read["labels"], strict=True)):
        original = manifest.original_file(beton, sample)
        assert original is not None
        assert original.parent.name == manifest.classes[label]
        assert identify(pixels) == (label, int(original.stem))


def test_val_has_the_labels_of_train_if_it_lacks_a_class(stock) -> None:
    read = np.load(stock["root"] / "mixed" / "val.beton.os_cache.npz")
    manifest = Manifest.check(stock["root"] / "mixed" / "val.beton")
    assert manifest.classes == tuple(class_name(label) for label in range(6))
    assert manifest.class_to_idx[class_name(2)] == 2
    assert read["labels"].tolist() == [0] * 3 + [2] * 3 + [3] * 3 + [4] * 3 + [5] * 3
    assert [identify(pixels) for pixels in read["images"]] == [
        (label, index) for label in (0, 2, 3, 4, 5) for index in range(3)
    ]


def test_jpegs_have_the_pixels_of_ffcvs_own_field_and_restart_markers_that_never_straddle_rows() -> None:
    from ffcv.fields.rgb_image import encode_jpeg

    for size in ((300, 200), (199, 301), (100, 100)):
        pixels = draw_image(1, 1, size)
        ours = encode(pixels, Encoding(max_resolution=None, jpeg_quality=85, max_bytes=8 << 20))
        assert (ours.width, ours.height) == size
        theirs = cv2.imdecode(encode_jpeg(pixels, 85), cv2.IMREAD_COLOR)
        assert np.array_equal(cv2.imdecode(np.frombuffer(ours.data, np.uint8), cv2.IMREAD_COLOR), theirs)
        at = ours.data.index(b"\xff\xdd\x00\x04") + 4
        assert -(-ours.width // 16) % int.from_bytes(ours.data[at : at + 2], "big") == 0


def test_originals_that_need_not_shrink_keep_their_pixels(tmp_path: Path) -> None:
    train = tmp_path / "folder" / "train" / "only"
    train.mkdir(parents=True)
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (90, 120, 3), dtype=np.uint8))
    kinds = ({"quality": 60}, {"subsampling": 0}, {"progressive": True}, {"optimize": True, "restart_marker_rows": 1})
    for number, kind in enumerate(kinds):
        noise.save(train / f"{number}.jpg", **kind)
    noise.convert("L").save(train / "grey.jpg")
    noise.resize((300, 200)).save(train / "large.jpg")
    noise.convert("CMYK").save(train / "inks.jpg")
    noise.save(train / "a.png")
    base = ConversionOptions(data_path=tmp_path / "folder", out_dir=tmp_path / "out", split="train", num_workers=2)
    (manifest,) = convert(dataclasses.replace(base, max_resolution=200, jpeg_quality="original"))
    assert (manifest.jpeg_quality, manifest.num_originals) == ("original", 5)
    tables = read_tables(tmp_path / "out" / "train.beton")
    with open(tables.path, "rb") as file:
        for sample in range(8):
            original = manifest.original_file(tables.path, sample)
            assert original is not None
            file.seek(tables.addresses[sample])
            stored = file.read(tables.lengths[sample])
            assert b"\xff\xdd\x00\x04" in stored  # restart markers
            same = np.array_equal(Image.open(io.BytesIO(stored)).convert("RGB"), Image.open(original).convert("RGB"))
            assert same == (original.name not in ("large.jpg", "inks.jpg", "a.png"))


def test_the_seed_decides_which_images_are_stored_raw(folder: Path, tmp_path: Path) -> None:
    base = ConversionOptions(data_path=folder, out_dir=tmp_path, split="train", compress_probability=0.5, num_workers=2)
    (manifest,) = convert(base)
    modes = read_tables(tmp_path / "train.beton").modes
    assert manifest.write_mode == "proportion"
    assert 8 <= (modes == RAW).sum() <= 24
    convert(dataclasses.replace(base, num_workers=1, overwrite=True))
    assert np.array_equal(read_tables(tmp_path / "train.beton").modes, modes)
    convert(dataclasses.replace(base, seed=1, overwrite=True))
    assert not np.array_equal(read_tables(tmp_path / "train.beton").modes, modes)


def test_classes_files_and_labels_are_torchvisions(own_folder: Path) -> None:
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    from ffcv_convnext.data.convert.source import IMAGE_EXTENSIONS

    train = own_folder / "train"
    deep = train / class_name(1) / "b.d"
    deep.mkdir()
    for name in ("z.PNG", "a.tiff", "notes.txt", ".hidden.jpg"):
        (deep / name).touch()
    theirs = ImageFolder(train)
    ours = scan(train, list_classes(train), all_classes=True)
    assert IMAGE_EXTENSIONS == IMG_EXTENSIONS
    assert list(ours.classes) == theirs.classes
    assert [(str(train / file), label) for file, label in zip(ours.files, ours.labels, strict=True)] == theirs.samples


def test_a_conversion_prints_its_numbers_and_writes_three_files_per_split(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["write", "--data_path", str(folder), "--out_dir", str(tmp_path / "new" / "out")]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    room, train, val = printed.out.splitlines()
    assert room.startswith("44 images will take about 33.6 MB; ")
    assert "train.beton: 32 images, 4 classes" in train
    assert "images/s, 0 skipped" in val
    names = [f"{split}.{end}" for split in ("train", "val") for end in ("beton", "files.txt", "json")]
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == names


def test_the_file_does_not_depend_on_the_number_of_workers(folder: Path, tmp_path: Path, write: Run) -> None:
    for workers in (1, 2):
        flags = ("--split", "train", "--subset", "9", "--seed", "3", "--num_workers", str(workers))
        assert write(folder, tmp_path / str(workers), *flags) == (0, "")
    for name in ("train.beton", "train.json", "train.files.txt"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    manifest = Manifest.check(tmp_path / "1" / "train.beton")
    files = (tmp_path / "1" / "train.files.txt").read_text().splitlines()
    assert (manifest.num_samples, manifest.subset, manifest.seed, len(manifest.classes)) == (9, 9, 3, 4)
    assert files != sorted(files)  # stored in a random order
    write(folder, tmp_path / "other", "--split", "train", "--subset", "9", "--seed", "4")
    assert (tmp_path / "other" / "train.files.txt").read_text().splitlines() != files


def test_a_subset_larger_than_the_split_uses_all_and_prints_it(own_folder: Path, tmp_path: Path, capsys) -> None:
    cli.run_command("write", ["--data_path", str(own_folder), "--out_dir", str(tmp_path / "out"), "--subset", "5"])
    assert "val: subset = 5, but there are only 2 images; all are used" in capsys.readouterr().out
    assert Manifest.check(tmp_path / "out" / "train.beton").num_samples == 5


def test_existing_files_are_replaced_on_request_only(own_folder: Path, tmp_path: Path, write: Run) -> None:
    out = tmp_path / "out"
    assert write(own_folder, out, "--split", "val") == (0, "")
    before = (out / "val.beton").stat().st_mtime_ns
    status, stderr = write(own_folder, out)
    assert status == 2
    assert_one_line(stderr, "val.beton exists", "--overwrite")
    assert (out / "val.beton").stat().st_mtime_ns == before
    assert not (out / "train.beton").exists()
    assert write(own_folder, out, "--overwrite", "--jpeg_quality", "50") == (0, "")
    assert Manifest.check(out / "val.beton").jpeg_quality == 50


def test_val_alone_takes_the_classes_of_an_earlier_train(own_folder: Path, tmp_path: Path, write: Run) -> None:
    out = tmp_path / "out"
    shutil.move(own_folder / "train", tmp_path / "train_elsewhere")
    status, stderr = write(own_folder, out, "--split", "val")
    assert status == 2
    assert_one_line(stderr, "class list of train is not known", "convert train first")
    (tmp_path / "first").mkdir()
    shutil.move(tmp_path / "train_elsewhere", tmp_path / "first" / "train")
    assert write(tmp_path / "first", out, "--split", "train") == (0, "")
    shutil.rmtree(own_folder / "val" / class_name(0))
    assert write(own_folder, out, "--split", "val") == (0, "")
    assert Manifest.check(out / "val.beton").classes == (class_name(0), class_name(1))
    (tmp_path / "first" / "train" / class_name(1)).rename(tmp_path / "first" / "train" / "renamed")
    status, stderr = write(tmp_path / "first", out, "--split", "train", "--overwrite")
    assert status == 2
    assert_one_line(stderr, "val.json has 2 classes", "class_01, renamed", "--split all --overwrite")


def damage(folder: Path, how: str) -> None:
    train, val = folder / "train", folder / "val"
    if how == "no train":
        shutil.rmtree(train)
    elif how == "no val":
        shutil.rmtree(val)
    elif how == "no classes":
        shutil.rmtree(train)
        train.mkdir()
    elif how == "empty class":
        (train / "nothing_here").mkdir()
    elif how == "empty classes":
        for name in "abcd":
            (train / name).mkdir()
    elif how == "unknown class":
        shutil.copytree(val / class_name(0), val / "unheard_of")
    elif how == "no val images":
        for path in val.glob("*/*"):
            path.unlink()
    elif how == "line break":
        (train / class_name(0) / "a\nb.jpg").touch()
    else:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no train", ("train does not exist", "data_path/train/<class>/<image>")),
        ("no val", ("val does not exist", "--split")),
        ("no classes", ("train has no class folders", "data_path/train/<class>/<image>")),
        ("empty class", ("train: no images in class nothing_here", "remove the folder")),
        ("empty classes", ("no images in 4 classes (a, b, c, ...)",)),
        ("unknown class", ("val: class unheard_of not among the 2 classes of train",)),
        ("no val images", ("val has no images (.jpg,",)),
        ("line break", ("contains a line break; rename it",)),
        ("nothing", ("data_path =", "is not a folder")),
    ],
)
def test_a_wrong_folder_is_one_line_and_no_work(
    own_folder: Path, tmp_path: Path, write: Run, how: str, words: tuple[str, ...]
) -> None:
    damage(own_folder, how)
    status, stderr = write(own_folder, tmp_path / "out")
    assert status == 2
    assert_one_line(stderr, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--split", "test"), ("split = test: expected one of train, val, all",)),
        (("--max_resolution", "0"), ("max_resolution = 0", "[1, 65500]")),
        (("--max_resolution", "big"), ("max_resolution = big", "a whole number", "or none")),
        (("--jpeg_quality", "101"), ("jpeg_quality = 101", "[1, 100] or original")),
        (("--num_workers", "0"), ("num_workers = 0", ">= 1")),
        (("--subset", "0"), ("subset = 0",)),
        (("--seed", "-1"), ("seed = -1",)),
        (("--overwright",), ("unknown option '--overwright'; did you mean --overwrite?",)),
        (("stray",), ("unexpected argument 'stray'",)),
    ],
)
def test_a_wrong_flag_is_one_line(folder: Path, tmp_path: Path, write: Run, flags, words) -> None:
    status, stderr = write(folder, tmp_path / "out", *flags)
    assert status == 2
    assert_one_line(stderr, *words)


def test_an_output_that_cannot_be_written_is_one_line(own_folder: Path, tmp_path: Path, write: Run) -> None:
    (tmp_path / "file").touch()
    status, stderr = write(own_folder, tmp_path / "file" / "out")
    assert status == 2
    assert_one_line(stderr, "cannot be written", "Not a directory", "choose another")


def test_a_second_conversion_to_the_same_folder_is_refused(own_folder: Path, tmp_path: Path, write: Run) -> None:
    with open_journal(tmp_path, "train"):
        status, stderr = write(own_folder, tmp_path, "--split", "train")
        assert status == 2
        assert_one_line(stderr, "another conversion is writing")
        assert write(own_folder, tmp_path, "--split", "val") == (0, "")


def test_a_bad_file_stops_the_conversion_with_its_path(own_folder: Path, tmp_path: Path, write: Run) -> None:
    bad = spoil(own_folder)
    status, stderr = write(own_folder, tmp_path / "out")
    assert status == 1
    assert_one_line(stderr, f"{bad}: not an image", "--skip_bad")
    assert_nothing_left(tmp_path / "out")


def test_skip_bad_does_not_hide_a_failing_disk(own_folder: Path, tmp_path: Path, write: Run) -> None:
    (own_folder / "train" / class_name(0) / "gone.jpg").symlink_to(tmp_path / "nowhere")
    status, stderr = write(own_folder, tmp_path / "out", "--skip_bad")
    assert status == 1
    assert_one_line(stderr, "gone.jpg: cannot be read: No such file or directory")


def test_skipping_every_file_is_a_failure(own_folder: Path, tmp_path: Path, write: Run) -> None:
    for path in (own_folder / "val").glob("*/*"):
        path.write_bytes(b"")
    status, stderr = write(own_folder, tmp_path / "out", "--skip_bad", "--split", "val")
    assert status == 1
    assert_one_line(stderr, "none of the 2 files", "could be decoded")
    assert_nothing_left(tmp_path / "out")


def test_a_full_disk_is_one_line_and_leaves_nothing(own_folder: Path, tmp_path: Path, write: Run) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 << 20, hard))  # ends inside the first page
    try:
        status, stderr = write(own_folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1
    assert_one_line(stderr, "out/train.beton cannot be written: File too large after", "of 6 images", "make room")
    assert_nothing_left(tmp_path / "out")


def living_processes() -> dict[int, tuple[int, int]]:
    """Process id -> (parent, session), zombies left out."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if state != "Z":
                found[int(stat.parent.name)] = int(parent), int(session)
    return found


def running_workers() -> list[int]:
    children = [pid for pid, (parent, _) in living_processes().items() if parent == os.getpid()]
    return [pid for pid in children if b"worker_pool" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def processes_of_session(session: int) -> list[int]:
    return [pid for pid, (_, its_session) in living_processes().items() if its_session == session]


@pytest.fixture
def stuck_folder(own_folder: Path) -> Iterator[Path]:
    """A folder whose conversion never ends: one of its images is a pipe without a writer."""
    os.mkfifo(own_folder / "train" / class_name(1) / "pipe.jpg")
    yield own_folder
    (own_folder / "train" / class_name(1) / "pipe.jpg").unlink()


def test_a_killed_worker_is_reported_immediately(stuck_folder: Path, tmp_path: Path, write: Run) -> None:
    killed = []

    def kill_the_worker() -> None:
        while not (workers := running_workers()):
            time.sleep(0.05)
        time.sleep(0.5)
        killed.append(time.monotonic())
        os.kill(workers[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_the_worker)
    thread.start()
    status, stderr = write(stuck_folder, tmp_path / "out", "--num_workers", "1")
    seconds = time.monotonic() - killed[0]
    thread.join()
    assert status == 1
    assert_one_line(stderr, "killed by SIGKILL", str(stuck_folder), "--num_workers")
    assert seconds < 2
    assert running_workers() == []
    assert_nothing_left(tmp_path / "out")


def test_sigterm_in_the_middle_of_writing_cleans_up(stuck_folder: Path, tmp_path: Path, write: Run) -> None:
    out, handler = tmp_path / "out", signal.getsignal(signal.SIGTERM)

    def stop() -> None:
        while not list(out.glob(".train.unfinished*/train.beton")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert write(stuck_folder, out, "--num_workers", "2") == (130, "interrupted\n")
    thread.join()
    assert running_workers() == []
    assert signal.getsignal(signal.SIGTERM) == handler
    assert_nothing_left(out)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_conversion_leaves_no_beton_and_no_process(stuck_folder: Path, tmp_path: Path, stop: int) -> None:
    out, shared = tmp_path / "out", set(os.listdir("/dev/shm"))
    arguments = ["--data_path", str(stuck_folder), "--out_dir", str(out), "--split", "train", "--num_workers", "2"]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    patience = time.monotonic() + 60
    while len(processes_of_session(process.pid)) < 3 and time.monotonic() < patience:  # itself and two workers
        time.sleep(0.05)
    if stop == signal.SIGINT:
        os.killpg(process.pid, stop)  # as a terminal does
    else:
        process.send_signal(stop)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == ((130, "interrupted\n") if stop == signal.SIGINT else (-stop, ""))
    patience = time.monotonic() + 5
    while processes_of_session(process.pid) and time.monotonic() < patience:
        time.sleep(0.05)
    assert processes_of_session(process.pid) == []
    assert set(os.listdir("/dev/shm")) <= shared
    assert [path.suffix for path in out.iterdir() if not path.name.startswith(".train.unfinished")] == []
    assert len(list(out.iterdir())) == (0 if stop == signal.SIGINT else 1)
    if stop == signal.SIGKILL:  # what it left is removed by the next conversion
        pipe = stuck_folder / "train" / class_name(1) / "pipe.jpg"
        pipe.rename(tmp_path / "pipe")
        assert cli.run_command("write", arguments) == 0
        assert sorted(path.name for path in out.iterdir()) == ["train.beton", "train.files.txt", "train.json"]
        (tmp_path / "pipe").rename(pipe)


def test_the_script_prints_errors_without_a_traceback(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--data_path", str(tmp_path / "none"), "--out_dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert_one_line(result.stderr, "data_path =", "is not a folder")


def test_an_image_with_a_name_that_is_not_utf8_keeps_it(own_folder: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    Image.fromarray(draw_image(0, 0, (20, 20))).save(own_folder / "train" / class_name(0) / name)
    spoil(own_folder).rename(own_folder / "train" / class_name(0) / f"bad_{name}")
    options = ConversionOptions(data_path=own_folder, out_dir=tmp_path, split="train", skip_bad=True)
    (manifest,) = convert(options)
    originals = [manifest.original_file(tmp_path / "train.beton", sample) for sample in range(manifest.num_samples)]
    assert own_folder / "train" / class_name(0) / name in originals
    assert Manifest.check(tmp_path / "train.beton").skipped[0].path == f"{class_name(0)}/bad_{name}"


def test_the_page_grows_with_the_resolution() -> None:
    def page(max_resolution: int | None) -> int:
        options = ConversionOptions(data_path=Path(), out_dir=Path(), max_resolution=max_resolution)
        return options.encoding.max_bytes >> 20

    assert [page(500), page(2000), page(20000), page(None)] == [8, 16, 64, 64]


def test_a_worker_loads_neither_torch_nor_ffcv() -> None:
    """Each would cost every worker seconds and hundreds of megabytes."""
    code = "import sys, ffcv_convnext.data.convert.encode\n"
    code += "print([m for m in ('torch', 'ffcv', 'numba') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "[]\n"


def test_workers_answer_in_the_order_of_their_tasks() -> None:
    with Workers(math.sqrt, [float(n * n) for n in range(50)], num_workers=2) as answers:
        assert list(answers) == list(range(50))


def test_an_exception_in_a_worker_comes_back_with_its_traceback() -> None:
    with (
        pytest.raises(RuntimeError, match=r"(?s)worker process failed.*FileNotFoundError.*nowhere"),
        Workers(os.listdir, ["/", "/nowhere"], num_workers=1) as answers,
    ):
        list(answers)


def test_progress_without_a_terminal_is_plain_lines(
    own_folder: Path, tmp_path: Path, write: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ffcv_convnext.data.convert.progress.PLAIN_SECONDS", 0.0)
    status, stderr = write(own_folder, tmp_path / "out", "--split", "train", "--num_workers", "1")
    assert status == 0
    assert "\r" not in stderr
    assert stderr.splitlines()[-1].startswith("out/train.beton: 100%")
    assert "images/s" in stderr


def test_a_failed_rename_is_not_a_success_but_can_be_resumed(own_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "train.json").mkdir(parents=True)
    options = ConversionOptions(data_path=own_folder, out_dir=out, split="train")
    said: list[str] = []
    with pytest.raises(Failure, match=r"train\.beton cannot be moved into place: Is a directory .*train\.json"):
        convert(options, said.append)
    assert not (out / "train.beton").exists()
    assert said[-1].endswith("6 of 6 images are saved; the same command with --resume continues from there, "
                             "with --overwrite it starts from the beginning")  # fmt: skip
    (out / "train.json").rmdir()
    (manifest,) = convert(dataclasses.replace(options, resume=True))
    assert Manifest.check(out / "train.beton") == manifest
    assert sorted(path.name for path in out.iterdir()) == ["train.beton", "train.files.txt", "train.json"]
