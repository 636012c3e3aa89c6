"""Our declaration of the format is FFCV's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.imagefolder import draw_image

from ffcv_convnext.data.beton import JPG, RAW, EncodedImage, layout
from ffcv_convnext.data.beton.ffcv_import import importing_ffcv
from ffcv_convnext.data.beton.tables import read_tables
from ffcv_convnext.data.convert.encode import Encoding

with importing_ffcv():
    from ffcv import types
    from ffcv.fields import BytesField, FloatField, IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.reader import Reader
    from ffcv.writer import DatasetWriter

    from ffcv_convnext.data.beton.writer import BetonWriter


def test_version_and_dtypes_are_ffcv_s() -> None:
    assert layout.VERSION == types.CURRENT_VERSION
    assert types.HeaderType == layout.HEADER
    assert types.FieldDescType == layout.FIELD
    assert layout.ALLOCATION == types.ALLOC_TABLE_TYPE
    assert dict(IMAGE_MODES) == {"jpg": JPG, "raw": RAW}
    for field in (FloatField(), IntField(), RGBImageField()):
        (type_id,) = (number for number, handler in types.TYPE_ID_HANDLER.items() if handler is type(field))
        assert layout.FIELD_TYPES[type_id] == field.metadata_type


def test_ffcv_reads_what_our_writer_writes(tmp_path: Path) -> None:
    """Header, descriptors and tables, with unused room for samples that did not come."""
    encoding = Encoding(max_resolution=500, jpeg_quality=90, max_bytes=8 << 20)
    writer = BetonWriter(tmp_path / "ours.beton", encoding, capacity=10)
    images = [EncodedImage(3, 2, bytes(range(18)), "raw"), EncodedImage(5, 4, b"\xff\xd8 not decoded here", "jpg")]
    assert writer.write(zip(images, (7, 8), strict=True), lambda _page: None) == 2
    reader = Reader(str(tmp_path / "ours.beton"))
    assert (list(reader.handlers), reader.num_samples, reader.page_size) == (["image", "label"], 2, 8 << 20)
    assert reader.metadata["f1"].tolist() == [7, 8]
    assert reader.metadata["f0"][["mode", "width", "height"]].tolist() == [(RAW, 3, 2), (JPG, 5, 4)]
    assert reader.alloc_table["size"].tolist() == [len(image.data) for image in images]
    with open(tmp_path / "ours.beton", "rb") as file:
        for image, address in zip(images, reader.metadata["f0"]["data_ptr"], strict=True):
            file.seek(int(address))
            assert file.read(len(image.data)) == image.data


@pytest.mark.parametrize("extra", [{}, {"weight": FloatField()}, {"blob": BytesField()}])
def test_tables_of_stock_ffcv_are_read_with_any_of_its_fields(extra: dict[str, object], tmp_path: Path) -> None:
    class Samples:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[object, ...]:
            values = {"weight": 0.5, "blob": np.arange(4, dtype=np.uint8)}
            return (draw_image(1, index, (20, 10)), index, *(values[name] for name in extra))

    path = tmp_path / "stock.beton"
    fields = {"picture": RGBImageField(write_mode="raw"), "target": IntField(), **extra}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(Samples())
    tables, reader = read_tables(path), Reader(str(path))
    assert tables.fields == tuple(fields)
    assert tables.labels is not None
    assert tables.labels.tolist() == [0, 1, 2]
    assert tables.addresses.tolist() == reader.metadata["f0"]["data_ptr"].tolist()
    assert set(tables.lengths.tolist()) == {20 * 10 * 3}
