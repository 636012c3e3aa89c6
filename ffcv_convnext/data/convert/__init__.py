"""Any source of images -> .beton. Imports neither torch nor ffcv until it starts to write."""

from ffcv_convnext.data.convert.conversion import convert
from ffcv_convnext.data.convert.journal import Journal
from ffcv_convnext.data.convert.options import ConversionOptions
from ffcv_convnext.data.convert.parts import Contents, Part, expect, is_finished, join_parts
from ffcv_convnext.data.convert.shards import join_shards
from ffcv_convnext.data.convert.source import ImageFolder, Source

__all__ = [
    "Contents",
    "ConversionOptions",
    "ImageFolder",
    "Journal",
    "Part",
    "Source",
    "convert",
    "expect",
    "is_finished",
    "join_parts",
    "join_shards",
]
