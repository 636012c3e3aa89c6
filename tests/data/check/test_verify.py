"""`verify` finds each kind of damage and names the sample; `data info` describes the content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.imagefolder import class_name, make_image_folder

pytest.importorskip("ffcv.writer")

from ffcv.fields import FloatField, IntField, RGBImageField
from ffcv.memory_allocator import MemoryAllocator
from ffcv.writer import DatasetWriter, handle_sample

from ffcv_convnext import cli
from ffcv_convnext.data.beton import tables as tables_module
from ffcv_convnext.data.beton.manifest import Manifest, tables_digest
from ffcv_convnext.data.beton.tables import UNKNOWN, read_tables
from ffcv_convnext.data.check import verify as verify_module
from ffcv_convnext.data.check.info import _bins, describe_data
from ffcv_convnext.data.check.verify import NUM_SHOWN, verify_data
from ffcv_convnext.data.convert import ConversionOptions, convert
from ffcv_convnext.formatting import format_bytes

Run = Callable[..., tuple[int, str, str]]


def write_like_stock(path: Path, **fields: Any) -> Path:
    """Write 12 images of noise, JPEG and raw in turn, with the steps of stock FFCV's writer in one process."""
    writer = DatasetWriter(str(path), fields)
    writer.num_samples = 12
    writer.prepare()
    table = np.frombuffer(writer.metadata_sm.buf, writer.metadata_type)
    pages = MemoryAllocator(writer.fname, writer.data_region_start, writer.page_size)
    with pages:
        for i in range(12):
            pixels = np.random.default_rng(i).integers(0, 256, (50 + i, 70 - i, 3), dtype=np.uint8)
            image = RGBImageField(write_mode=("jpg", "raw")[i % 2])
            encoders = {name: image if isinstance(field, RGBImageField) else field for name, field in fields.items()}
            handle_sample((pixels, i // 4), i, writer.metadata_type.names, table, pages, encoders)
    writer.finalize(pages.allocations)
    del table  # a view of what is closed now
    writer.metadata_sm.close()
    writer.metadata_sm.unlink()
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; returns exit status, stdout, stderr."""

    def command(name: str, *arguments: object) -> tuple[int, str, str]:
        status = cli.run_command(name, [str(each) for each in arguments])
        return status, *capsys.readouterr()

    return command


@pytest.fixture
def own_dir(beton_dir: Path, tmp_path: Path) -> Path:
    """A copy of `beton_dir` that a test may damage."""
    return Path(shutil.copytree(beton_dir, tmp_path / "beton"))


@pytest.fixture(scope="module")
def stock_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """By stock FFCV: (image, label), half of the images raw; (picture, score)."""
    folder = tmp_path_factory.mktemp("stock")
    return (
        write_like_stock(folder / "stock.beton", image=RGBImageField(), label=IntField()),
        write_like_stock(folder / "foreign.beton", picture=RGBImageField(), score=FloatField()),
    )


class Damage:
    """Bytes of a .beton, to be changed in place."""

    def __init__(self, beton: Path) -> None:
        self.tables = read_tables(beton)
        self.bytes: Any = np.memmap(beton, np.uint8, mode="r+")
        table = self.bytes[: self.tables.pages_start]
        self.rows = table[len(table) - 24 * len(self.tables) :].reshape(-1, 24)  # mode, width, height, address | label
        self.allocations = self.bytes[self.tables.pages_end :].view("<u8").reshape(-1, 3)  # sample, address, length

    def image(self, sample: int) -> Any:
        start = int(self.tables.addresses[sample])
        return self.bytes[start : start + int(self.tables.lengths[sample])]


def state_the_hash_again(beton: Path) -> None:
    """Write the manifest as if the damage had existed before."""
    manifest = Manifest.for_beton(beton)
    changed = dataclasses.replace(manifest, sha256=tables_digest(beton), num_bytes=beton.stat().st_size)
    changed.write(Manifest.path_for(beton))


def found(folder: Path) -> dict[int, str]:
    """Bad samples of train.beton -> reason."""
    return {bad.sample: bad.reason for bad in verify_data(folder, num_workers=2).files[0].bad_samples}


# --- verify ------------------------------------------------------------------------------------------------


def test_good_files_verify(beton_dir: Path, tmp_path: Path, run: Run) -> None:
    status, page, _ = run("verify", beton_dir, "--json", tmp_path / "found.json", "--num_workers", 2)
    assert status == 0
    assert page.splitlines()[-1] == "good: train.beton and val.beton, 100 samples"
    assert "80 decoded in" in page
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["good"]
    assert [(file["num_decoded"], file["problems"]) for file in content["files"]] == [(80, []), (20, [])]


def test_one_file_can_be_named(beton_dir: Path, run: Run) -> None:
    status, page, _ = run("verify", beton_dir / "val.beton")
    assert (status, page.splitlines()[-1]) == (0, "good: val.beton, 20 samples")


def test_damaged_images_are_found(own_dir: Path, run: Run) -> None:
    damage = Damage(own_dir / "train.beton")
    scan = damage.image(17)
    scan[len(scan) * 3 // 4 :][:40] ^= 0x55
    damage.image(41)[:] = 0
    damage.image(42)[-60:] = 0  # the last rows, which a crop seldom touches
    status, page, _ = run("verify", own_dir)
    assert status == 1
    manifest = Manifest.check(own_dir / "train.beton")  # the manifest's hash does not cover images
    lines = page.splitlines()
    assert f"  original files are in {manifest.source}" in lines
    assert lines[1].startswith("  file     BAD: page 0 (samples 0 to 79) differs from its checksum: damaged; copy it")
    assert lines[-1].startswith("BAD: train.beton and val.beton, 3 of 100 samples and 1 problem of whole files; copy")
    for sample, reason in ((17, "is damaged"), (41, "readable JPEG header"), (42, "is damaged")):
        (line,) = (line for line in lines if line.split()[:2] == ["|", str(sample)])
        original = manifest.original_file(own_dir / "train.beton", sample)
        assert original is not None
        assert f"{original.parent.name}/{original.name}" in line
        assert reason in line


def test_a_single_flipped_bit_is_found_if_no_decoder_notices(own_dir: Path, run: Run) -> None:
    damage = Damage(own_dir / "train.beton")
    image = damage.image(33)
    quantiser = bytes(image).index(b"\xff\xdb") + 20  # another value gives other pixels, without a warning
    image[quantiser] ^= 1
    status, page, _ = run("verify", own_dir / "train.beton")
    assert status == 1
    assert "BAD: page 0 (samples 0 to 79) differs from its checksum" in page
    assert page.splitlines()[-1].startswith("BAD: train.beton, 1 problem of whole files")
    image[quantiser] ^= 1
    assert run("verify", own_dir / "train.beton")[0] == 0


def test_repair_restores_damaged_pages(own_dir: Path, run: Run) -> None:
    beton = own_dir / "train.beton"
    before = beton.read_bytes()
    damage = Damage(beton)
    damage.image(17)[100:900] = 0
    damage.image(60)[-1] ^= 4
    assert run("verify", own_dir)[0] == 1
    assert beton.read_bytes() != before
    status, page, _ = run("verify", own_dir, "--repair")
    assert status == 0
    assert f"{beton}: page 0 repaired from the original files" in page
    assert page.splitlines()[-1] == "after the repair: good: train.beton and val.beton, 100 samples"
    assert beton.read_bytes() == before


def test_pages_that_cannot_be_repaired_stay_with_a_reason(own_dir: Path, tmp_path: Path, run: Run) -> None:
    beton = own_dir / "train.beton"
    Damage(beton).image(17)[100:900] = 0
    damaged = beton.read_bytes()
    manifest = Manifest.check(beton)
    originals = Path(shutil.copytree(manifest.source, tmp_path / "originals"))
    moved = dataclasses.replace(manifest, source=str(originals))
    moved.write(Manifest.path_for(beton))
    original = moved.original_file(beton, 3)
    assert original is not None
    original.write_bytes(next(path for path in originals.rglob("*.JPEG") if path != original).read_bytes())
    _, page, _ = run("verify", beton, "--repair")
    assert re.search(
        r"page 0 not repaired: (\S+ has changed since sample 3 was made|its 80 original files now give)", page
    )
    original.unlink()
    status, page, _ = run("verify", beton, "--repair")
    assert status == 1
    assert f"page 0 not repaired: {original}: No such file or directory" in page
    Manifest.files_path_for(beton).unlink()
    assert "not repaired: the list of original files is missing" in run("verify", beton, "--repair")[1]
    assert beton.read_bytes() == damaged
    Damage(beton).rows[7, 1] += 1
    status, _, stderr = run("verify", beton, "--repair")
    assert status == 2
    assert "header or sample table differ from the manifest's hash" in stderr


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda d: d.rows[7].__setitem__(1, d.rows[7, 1] + 1),
            r"its JPEG has \d+ x \d+ pixels, the sample table states",
        ),
        (lambda d: d.rows[7].__setitem__(slice(1, 3), 0), r"the sample table states 0 x \d+ pixels"),
        (lambda d: d.rows[7].__setitem__(0, 9), "unknown encoding"),
        (lambda d: d.rows[7].__setitem__(0, 1), r"bytes of raw pixels, but the sample table states"),
        (lambda d: d.rows[7].__setitem__(16, 4), "its label 4 is not among the 4 classes"),
        (lambda d: d.rows[7].__setitem__(23, 0x80), r"its label -92233720368547758\d\d is not among"),
        (lambda d: d.rows[7].__setitem__(12, 0xFF), "its address is not in the allocation table"),
        (lambda d: d.rows[7].__setitem__(slice(5, 13), d.rows[8, 5:13]), "assigns its data to sample 8"),
        (lambda d: d.allocations[7].__setitem__(2, 1 << 40), r"\(1099511627776 bytes .* is not inside a page"),
        (lambda d: d.allocations[7].__setitem__(2, 2**64 - 1), "is not inside a page"),
        (lambda d: d.allocations[7].__setitem__(2, 0), "is not inside a page"),
        (lambda d: d.allocations[7].__setitem__(2, d.allocations[7, 2] - 200), "its JPEG data is damaged"),
    ],
)
def test_a_bad_row_of_the_tables_is_named(own_dir: Path, change: Callable[[Damage], None], reason: str) -> None:
    """The hash differs, and each sample is still checked to find the reason."""
    change(Damage(own_dir / "train.beton"))
    train, val = verify_data(own_dir, num_workers=2).files
    assert [problem.split(":")[0] for problem in train.problems] == [
        "header or sample table differ from the manifest's hash"
    ]
    assert val.good
    state_the_hash_again(own_dir / "train.beton")
    bad = verify_data(own_dir, num_workers=2).files[0]
    assert bad.problems == []
    assert [each.sample for each in bad.bad_samples] == [7]
    assert re.search(reason, bad.bad_samples[0].reason)


@pytest.mark.parametrize("rows", [2, 11, 1 << 16])
def test_overlapping_data_is_found_also_behind_a_long_neighbour(
    own_dir: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables_module, "ROWS", rows)
    monkeypatch.setattr(verify_module, "ROWS", rows)
    damage = Damage(own_dir / "train.beton")
    damage.allocations[10, 2] = int(damage.allocations[10:14, 2].sum())  # reaches over 11, 12 and 13
    assert found(own_dir) == dict.fromkeys((11, 12, 13), "its data overlaps that of sample 10")


@pytest.mark.parametrize("rows", [3, 1 << 16])
def test_tables_are_the_same_for_any_order_of_the_allocations(
    own_dir: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    beton = own_dir / "train.beton"
    expected = read_tables(beton)
    monkeypatch.setattr(tables_module, "ROWS", rows)
    found_before = found(own_dir)
    damage = Damage(beton)
    damage.allocations[:] = damage.allocations[np.random.default_rng(0).permutation(len(expected))].copy()
    shuffled = read_tables(beton)
    for name in ("addresses", "lengths", "owners", "labels", "modes"):
        assert np.array_equal(getattr(shuffled, name), getattr(expected, name)), name
    assert shuffled.owners.tolist() == list(range(len(expected)))
    damage.allocations[-1, 1] = 1  # one is missing now
    assert (read_tables(beton).lengths == UNKNOWN).sum() == 1
    assert found_before == {}


def test_many_bad_samples_are_counted_and_the_json_has_all(own_dir: Path, tmp_path: Path, run: Run) -> None:
    damage = Damage(own_dir / "train.beton")
    for sample in range(30):
        damage.image(sample)[:] = 0
    status, page, _ = run("verify", own_dir, "--json", tmp_path / "found.json")
    assert status == 1
    assert page.count("readable JPEG header") == NUM_SHOWN == 20
    assert "... and 10 more; --json FILE writes all of them" in page
    train = json.loads((tmp_path / "found.json").read_text())["files"][0]
    assert [bad["sample"] for bad in train["bad_samples"]] == list(range(30))
    original = Manifest.for_beton(own_dir / "train.beton").original_file(own_dir / "train.beton", 29)
    assert original is not None
    assert train["bad_samples"][29]["file"] == f"{original.parent.name}/{original.name}"


def test_a_cut_off_file_is_bad_as_a_whole(own_dir: Path, run: Run) -> None:
    beton = own_dir / "train.beton"
    size = beton.stat().st_size
    with open(beton, "r+b") as file:
        file.truncate(size - 30)  # the last two entries of the allocation table
    train = verify_data(own_dir).files[0]
    assert [train.problems[0].split(":")[0], train.num_decoded] == [
        f"has {size - 30} bytes, its manifest states {size}", 78,
    ]  # fmt: skip
    assert "has 78 entries for 80 samples" in train.problems[1]
    assert [bad.sample for bad in train.bad_samples] == [78, 79]
    for remaining, words in (
        (size // 2, "no sample could be located"),
        (100, "do not fit into the file"),
        (5, "less than a header"),
    ):
        with open(beton, "r+b") as file:
            file.truncate(remaining)
        status, page, _ = run("verify", own_dir)
        assert status == 1
        assert words in page
        assert "good" in page.split("val.beton: ")[1]  # and the other file is still looked at


def test_manifest_and_list_are_checked_and_do_not_stop_the_rest(own_dir: Path, run: Run) -> None:
    (own_dir / "train.files.txt").write_text("of\nanother\n")
    (own_dir / "val.json").unlink()
    train, val = verify_data(own_dir).files
    assert [problem.split(":")[0] for problem in train.problems] == [
        "the list of original files train.files.txt differs from the manifest's hash"
    ]
    assert val.problems == [
        "has no manifest val.json beside it; convert it again with write_ffcv_dataset.py --overwrite"
    ]
    assert (train.num_decoded, val.num_decoded, train.bad_samples, val.bad_samples) == (80, 20, [], [])
    (own_dir / "train.files.txt").unlink()
    (own_dir / "train.beton").unlink()
    status, page, _ = run("verify", own_dir)
    assert status == 1
    assert "does not exist; create it with write_ffcv_dataset.py" in page


def test_a_list_of_another_length_and_other_class_lists_are_found(own_dir: Path) -> None:
    content = b"one\ntwo\n"
    (own_dir / "train.files.txt").write_bytes(content)
    manifest = Manifest.for_beton(own_dir / "train.beton")
    dataclasses.replace(manifest, files_sha256=hashlib.sha256(content).hexdigest()).write(own_dir / "train.json")
    manifest = Manifest.for_beton(own_dir / "val.beton")
    dataclasses.replace(manifest, classes=("a", "b", "c", "d")).write(own_dir / "val.json")
    train, val = verify_data(own_dir).files
    assert "has 2 lines, but the manifest states 80 samples" in train.problems[0]
    assert "its class list differs from that of train.beton" in val.problems[0]


def test_a_file_of_stock_ffcv_is_decoded_and_missing_parts_are_named(stock_files: tuple[Path, Path]) -> None:
    (stock,) = verify_data(stock_files[0]).files
    assert (stock.num_decoded, stock.bad_samples) == (12, [])
    assert [problem.split(";")[0] for problem in stock.problems] == ["has no manifest stock.json beside it"]
    (foreign,) = verify_data(stock_files[1]).files
    assert (foreign.num_decoded, foreign.bad_samples) == (12, [])
    assert "has the fields picture, score: training expects image, label" in foreign.problems[1]


@pytest.mark.parametrize("content", [b"", b"x" * 5000, b"\2\0\1\0" + b"\0" * 5000, b"\2\0\0\0" + b"\0" * 5000])
@pytest.mark.parametrize("command", [("verify",), ("data", "info")])
def test_a_file_that_is_not_a_beton_is_an_error(
    tmp_path: Path, run: Run, content: bytes, command: tuple[str, ...]
) -> None:
    (tmp_path / "train.beton").write_bytes(content)
    status, page, stderr = run(*command, tmp_path)
    if command == ("verify",):
        assert status == 1
        assert page.splitlines()[-1].startswith("BAD: train.beton, ")
    else:
        assert status == 2
        assert stderr.startswith("error: ")
        assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify", "{tmp}/nowhere"], "does not exist; give a folder with train.beton"),
        (["verify", "{tmp}"], "holds neither train.beton nor val.beton; create them with"),
        (["verify", "{beton}", "--num_workers", "0"], "num_workers = 0"),
        (["verify", "{beton}", "--json", "{tmp}/nowhere/x.json"], "expected a file in a folder that exists"),
        (["verify"], "the following arguments are required: data"),
        (["data", "info", "{tmp}/nowhere"], "does not exist; give a folder with train.beton"),
        (["data", "info", "{tmp}"], "holds neither train.beton nor val.beton; create them with"),
        (["data"], "required: ACTION; ffcv-convnext data --help"),
        (["data", "inform", "{beton}"], "invalid choice: 'inform'"),
    ],
)
def test_wrong_usage_is_one_line(
    beton_dir: Path, tmp_path: Path, run: Run, arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["ffcv-convnext"])
    status, page, stderr = run(*(each.format(tmp=tmp_path, beton=beton_dir) for each in arguments))
    assert (status, page) == (2, "")
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert words in stderr


# --- data info ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 images of known sizes in 3 classes, one more skipped: 100 x 40, 60 x 100, 4 times 200 x 30."""
    root = tmp_path_factory.mktemp("known")
    make_image_folder(root / "folder", num_classes=3, train_per_class=1, width=(200, 200), height=(30, 30))
    shutil.rmtree(root / "folder/val")
    train = root / "folder/train"
    Image.new("RGB", (100, 40)).save(train / class_name(0) / "first.png")
    Image.new("RGB", (60, 100)).save(train / class_name(0) / "second.png")
    Image.new("RGB", (400, 60)).save(train / class_name(1) / "shrunk.png")
    (train / class_name(2) / "bad.png").write_bytes(b"not an image")
    options = ConversionOptions(
        data_path=root / "folder", out_dir=root / "out", split="train", num_workers=1, skip_bad=True,
        max_resolution=200, jpeg_quality=85,
    )  # fmt: skip
    convert(options)
    return root / "out"


def test_info_has_the_known_numbers(known: Path) -> None:
    (split,) = describe_data(known).splits.values()
    lengths = read_tables(known / "train.beton").lengths
    assert (split.num_samples, split.classes, split.class_counts) == (6, tuple(map(class_name, range(3))), (3, 2, 1))
    assert (split.width.min, split.width.median, split.width.max) == (60, 200, 200)
    assert (split.height.min, split.height.median, split.height.max) == (30, 30, 100)
    assert [(bar.min, bar.max, bar.num_samples) for bar in split.longest_side if bar.num_samples] == [
        (100, 119, 2), (200, 200, 4),
    ]  # fmt: skip
    assert split.image_bytes is not None
    assert split.image_bytes.mean == pytest.approx(lengths.mean())
    assert (split.max_resolution, split.jpeg_quality, split.encodings) == (200, 85, {"jpg": 6})
    # 4:2:0 has MCUs of 16 pixels: 200 pixels are 13 of them, 100 are 7, 60 are 4
    assert split.headers.restart_interval == {1: 5, 2: 1}
    assert (split.headers.chroma_subsampling, split.headers.num_cuttable) == ({"4:2:0": 6}, 6)
    assert [(file.path, file.reason) for file in split.skipped] == [
        (f"{class_name(2)}/bad.png", "not an image in a known format")
    ]
    assert (split.remarks, split.sha256) == ((), Manifest.check(known / "train.beton").sha256)


def test_info_prints_text_and_json(known: Path, beton_dir: Path, run: Run) -> None:
    status, page, _ = run("data", "info", known)
    assert status == 0
    for words in (
        "train.beton: 6 images, ",
        "1 (class_02) to 3 (class_00), mean 2.0",
        "200  4  ########################################\n",
        "JPEG, quality 85, longest side at most 200 pixels",
        "every 1 MCU (83.3 %), every 2 MCUs (16.7 %)",
        "100 % can be decoded without the rest of the image (6 images examined)",
        "class_02/bad.png: not an image in a known format",
        "folder/train\n",
    ):
        assert words in page
    assert max(map(len, page.splitlines())) <= 120
    status, text, _ = run("data", "info", beton_dir, "--json")
    content = json.loads(text)
    assert status == 0
    assert [content[split]["num_samples"] for split in ("train", "val")] == [80, 20]
    assert content["val"]["class_counts"] == [5] * 4


def test_info_describes_a_file_of_stock_ffcv(stock_files: tuple[Path, Path], run: Run) -> None:
    split = describe_data(stock_files[0]).splits["stock"]
    assert (split.has_manifest, split.source, split.jpeg_quality) == (False, None, None)
    assert (split.classes, split.class_counts) == (("0", "1", "2"), (4, 4, 4))
    assert (split.width.min, split.height.max) == (59, 61)
    assert split.encodings == {"jpg": 6, "raw": 6}
    assert (split.headers.num_read, split.headers.num_cuttable) == (6, 0)
    assert (split.headers.restart_interval, split.headers.chroma_subsampling) == ({0: 6}, {"4:2:0": 6})
    status, page, _ = run("data", "info", stock_files[0])
    assert status == 0
    assert "note          has no manifest stock.json beside it" in page
    assert "4 each" in page
    status, page, _ = run("data", "info", stock_files[1])
    assert status == 0
    assert "has no field for labels, only picture, score" in page


def test_info_notes_differences_from_the_manifest(own_dir: Path) -> None:
    damage = Damage(own_dir / "train.beton")
    damage.rows[7, 16], damage.rows[8, 12] = 200, 0xFF
    remarks = describe_data(own_dir).splits["train"].remarks
    assert "differ from the manifest's hash" in remarks[0]
    assert remarks[1:] == (
        "the data of 1 sample cannot be located; see: ffcv-convnext verify",
        "1 label outside the 4 classes of the manifest",
    )


@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (500, 500), (37, 500), (1, 65500), (499, 501), (90, 119)])
def test_bars_are_few_and_cover_every_size(shortest: int, longest: int) -> None:
    bars = _bins(np.array([longest, shortest, (shortest + longest) // 2]))
    assert 1 <= len(bars) <= 10
    assert (bars[0].min, bars[-1].max) == (shortest, longest)
    assert all(a.max + 1 == b.min for a, b in pairwise(bars))
    assert sum(bar.num_samples for bar in bars) == 3


def test_sizes_are_written_in_readable_units() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 48_123, 999_960, 65.2e9, 3e12)] == [
        "0 B", "999 B", "1.0 kB", "48.1 kB", "1.0 MB", "65.2 GB", "3.00 TB",
    ]  # fmt: skip
