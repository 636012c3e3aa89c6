"""What a .beton is.

Imports neither ffcv nor numba. `beton.tables` and `beton.writer` do, and are imported by name.
"""

from ffcv_convnext.data.beton.layout import (
    CONVERT_AGAIN,
    JPG,
    RAW,
    ROW,
    EncodedImage,
    Page,
    check_header,
    tables_digest,
)
from ffcv_convnext.data.beton.manifest import Manifest, SkippedFile, Split, encode_file_list, write_file_list

__all__ = [
    "CONVERT_AGAIN",
    "JPG",
    "RAW",
    "ROW",
    "EncodedImage",
    "Manifest",
    "Page",
    "SkippedFile",
    "Split",
    "check_header",
    "encode_file_list",
    "tables_digest",
    "write_file_list",
]
