"""Single values of parquet's pages are found and read without decompressing the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ffcv_convnext.data.convert.parquet import ParquetFiles, ParquetImages

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def contents() -> list[bytes]:
    """Incompressible and compressible values, shorter and longer than a block of Snappy, some of them twice."""
    draw = np.random.default_rng(0)
    values = [draw.bytes(int(size)) for size in (0, 1, 100, 65_530, 65_536, 65_537, 200_000, 3, 70_000, 1_000)]
    values += [b"JPEG" * 50_000, b"\0" * 65_532, draw.bytes(40_000) + b"same" * 9_000, values[3], values[6][:100_000]]
    return [*values, *(draw.bytes(int(size)) for size in draw.integers(50_000, 150_000, 20))]


def written(path: Path, values: list[bytes], **options: Any) -> ParquetImages:
    rows = [{"image": {"bytes": value, "path": f"{i:04d}.jpg"}, "label": 0} for i, value in enumerate(values)]
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    images, _ = ParquetFiles(path, [path]).finish((), None, "", all_classes=True)
    return images


@pytest.mark.parametrize("compression", ["snappy", "none"])
@pytest.mark.parametrize("use_dictionary", [True, False])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_values_are_read_in_place(compression: str, use_dictionary: bool, version: str, tmp_path: Path) -> None:
    values = contents()
    options = {"compression": compression, "use_dictionary": use_dictionary, "data_page_version": version}
    images = written(tmp_path / "a.parquet", values, row_group_size=30, **options)
    assert [images.read(i) for i in range(len(images))] == values
    assert (images.inside[:, 0] >= 0).all(), "no page is read as a whole"
    assert (images.sizes <= images.inside[:, 2] + 3 * 65_536 + 100).all(), "an image is read with its own blocks only"


@pytest.mark.parametrize("compression", ["zstd", "gzip", "brotli"])
def test_other_compressions_are_read_by_page(compression: str, tmp_path: Path) -> None:
    values = contents()
    images = written(tmp_path / "a.parquet", values, row_group_size=30, compression=compression)
    assert [images.read(i) for i in range(len(images))] == values
    chosen = images.select([30, 2])
    assert [chosen.read(0), chosen.read(1)] == [values[30], values[2]]
    assert (images.inside[:, 0] < 0).all()


@pytest.mark.parametrize("compression", ["snappy", "zstd"])
def test_a_damaged_page_is_an_error_that_names_the_file(compression: str, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    images = written(path, [b"abcd" * 30_000] * 1, compression=compression, use_dictionary=False)
    with open(path, "r+b") as file:
        file.seek(60)
        file.write(b"\xff" * 40)
    with pytest.raises(OSError, match=r"a\.parquet"):
        images.read(0)


def test_a_shorter_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    images = written(path, [np.random.default_rng(0).bytes(90_000)])
    path.write_bytes(path.read_bytes()[:5_000])
    with pytest.raises(OSError, match=r"a\.parquet ends in the middle of it"):
        images.read(0)
