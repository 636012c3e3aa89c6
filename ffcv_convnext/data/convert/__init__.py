"""Any source of images -> .beton. Imports neither torch nor ffcv until work begins."""

from ffcv_convnext.data.convert.conversion import ConversionOptions, convert, ending_like_ctrl_c
from ffcv_convnext.data.convert.shards import join_parts

__all__ = ["ConversionOptions", "convert", "ending_like_ctrl_c", "join_parts"]
