"""The quick reader of tar headers finds what tarfile finds, in archives of every kind."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from support.sources import pack

from ffcv_convnext.data.convert.tars import list_members


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **facts: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in facts.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def everything(path: Path, form: int, headers: dict[str, str] | None = None) -> Path:
    """Members of many kinds, names of every length, and sizes around a block."""
    with tarfile.open(path, "w", format=form, pax_headers=headers) as tar:
        add(tar, "train", type=tarfile.DIRTYPE)
        for size in (0, 1, 511, 512, 513, 5000):
            add(tar, f"train/{size}.jpg", bytes([size % 251]) * size, mtime=1.5)
        add(tar, "train/link.jpg", type=tarfile.SYMTYPE, linkname="1.jpg")
        add(tar, "train/hard.jpg", type=tarfile.LNKTYPE, linkname="train/1.jpg")
        add(tar, "train/pipe", type=tarfile.FIFOTYPE)
        add(tar, "._train.jpg", b"macOS")
        for length in (98, 99, 100, 101, 155, 200):
            add(tar, "/".join(["d" * 40] * (length // 60)) + "/" + "x" * 30 + f"{length}.jpg", b"name")
        if form != tarfile.USTAR_FORMAT:
            add(tar, "ä" * 90 + ".jpg", b"umlaut")
            add(tar, "long/" * 60 + "a.jpg", b"long", mtime=2.25)
        add(tar, "last.jpg", b"last", type=tarfile.CONTTYPE if headers else tarfile.REGTYPE)
    return path


def by_tarfile(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path, "r:") as tar:
        return [
            (info.name, info.offset_data, info.size)
            for info in tar
            if info.isreg() and not info.name.rpartition("/")[2].startswith(".")
        ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_tarfile_s(tmp_path: Path, form: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = everything(tmp_path / "a.tar", form)
    expected = by_tarfile(path)
    monkeypatch.setattr(tarfile, "open", None)  # none of these members is left to it
    assert [tuple(member) for member in list_members(path)] == expected
    assert len(expected) >= 13


def test_unusual_members_are_left_to_tarfile(tmp_path: Path) -> None:
    path = everything(tmp_path / "a.tar", tarfile.PAX_FORMAT, headers={"comment": "a global header"})
    assert [tuple(member) for member in list_members(path)] == by_tarfile(path)


@pytest.mark.parametrize("damaged", [0, 100, 124, 148, 156, 300])
def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path, damaged: int) -> None:
    content = bytearray(pack([("a.jpg", b"x" * 600), ("b.jpg", b"y"), ("c.jpg", b"z")]))
    content[1536 + damaged] ^= 0x55
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar is cut off or damaged .*after its member a\.jpg; copy it again"):
        list(list_members(tmp_path / "a.tar"))


def test_every_length_of_an_archive_that_is_cut_off(tmp_path: Path) -> None:
    content = pack([("a.jpg", b"x" * 600), ("b.jpg", b"y" * 500)], tarfile.PAX_FORMAT, mtime=1.5)
    end = -(-len(content.rstrip(b"\0")) // 512) * 512
    path = tmp_path / "a.tar"
    for keep in range(8, end + 600, 100):
        path.write_bytes(content[:keep])
        if keep >= end + 512:  # whole but for padding
            assert [member.name for member in list_members(path)] == ["a.jpg", "b.jpg"]
        else:
            with pytest.raises(ValueError, match=r"a\.tar is cut off or damaged"):
                list(list_members(path))


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_a_sparse_member_is_named(tmp_path: Path, form: str) -> None:
    if shutil.which("tar") is None:
        pytest.skip("no tar")
    with open(tmp_path / "holes.jpg", "wb") as file:
        file.write(b"x")
        file.truncate(1 << 20)
        file.seek(1 << 20)
        file.write(b"y")
    words = ["tar", "--sparse", f"--format={form}", "-cf", "a.tar", "holes.jpg"]
    if subprocess.run(words, cwd=tmp_path, capture_output=True, check=False).returncode:
        pytest.skip("this tar has no --sparse")
    if (tmp_path / "a.tar").stat().st_size > 1 << 20:
        pytest.skip("this file system has no holes")
    with pytest.raises(ValueError, match=r"a\.tar: \S*holes\.jpg is a sparse member; pack the archive"):
        list(list_members(tmp_path / "a.tar"))
