"""Call libturbojpeg through ctypes: JPEG <-> planes of Y, Cb and Cr, for the conversion's workers.

The library is the one that FFCV is linked with. It is found beside FFCV without importing FFCV, which would cost every
worker seconds. The loader calls the same library from numba code (decode.py).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_ulong, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Subsampling = Literal["420", "422", "444"]
Plane = NDArray[np.uint8]
MAX_JPEG_SIDE = 65500  # libjpeg's limit; FFCV's sample table holds up to 65535

# TJSAMP_*: how many pixels share a chroma sample, across and down.
_FACTORS = {"444": (1, 1), "422": (2, 1), "420": (2, 2), "grey": (1, 1), "440": (1, 2), "411": (4, 1)}
_NAMES = tuple(_FACTORS)
REDUCTIONS = (8, 4, 2, 1)
_YCBCR, _GREY = 1, 2  # TJCS_*
_NO_REALLOC, _ACCURATE_DCT = 1024, 4096  # TJFLAG_*
_Pointers, _Strides = c_void_p * 3, c_int * 3


class Header(NamedTuple):
    """Size and chroma subsampling of a JPEG."""

    width: int  # pixels
    height: int
    subsampling: str  # a key of _FACTORS: 420, 422, 444, 440, 411 or grey


def library_path() -> Path:
    """Return the path of FFCV's extension module. Raises FileNotFoundError if FFCV is not installed."""
    spec = importlib.util.find_spec("ffcv")
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        for path in sorted(Path(folder).glob("_libffcv*.so")):
            return path
    raise FileNotFoundError("ffcv is not installed; pip install 'ffcv_convnext[ffcv]'")


@cache
def library() -> ctypes.CDLL:
    """Load libturbojpeg and declare the types of the functions that are called from Python."""
    turbojpeg = ctypes.CDLL(str(library_path()))
    for name in ("tjInitDecompress", "tjInitCompress", "tjInitTransform"):
        getattr(turbojpeg, name).restype = c_void_p
    turbojpeg.tjDecompressHeader3.argtypes = (c_void_p, c_char_p, c_ulong, *(POINTER(c_int),) * 4)
    planes: tuple[Any, ...] = (_Pointers, c_int, _Strides, c_int)
    result: tuple[Any, ...] = (POINTER(c_void_p), POINTER(c_ulong))
    turbojpeg.tjDecompressToYUVPlanes.argtypes = (c_void_p, c_char_p, c_ulong, *planes, c_int)
    turbojpeg.tjCompressFromYUVPlanes.argtypes = (c_void_p, *planes, c_int, *result, c_int, c_int)
    turbojpeg.tjBufSize.restype = c_ulong
    turbojpeg.tjGetErrorStr2.argtypes = [c_void_p]
    turbojpeg.tjGetErrorStr2.restype = c_char_p
    return turbojpeg


@cache
def _decompressor() -> int:
    return int(library().tjInitDecompress())


@cache
def _compressor() -> int:
    return int(library().tjInitCompress())


def plane_sizes(width: int, height: int, subsampling: str) -> list[tuple[int, int]]:
    """Return width and height of each plane of an image; luma is padded to whole chroma samples."""
    across, down = _FACTORS[subsampling]
    columns, rows = -(-width // across), -(-height // down)
    luma = columns * across, rows * down
    return [luma] if subsampling == "grey" else [luma, (columns, rows), (columns, rows)]


def factors(subsampling: str) -> tuple[int, int]:
    """Return the number of pixels that share a chroma sample: across, down."""
    return _FACTORS[subsampling]


def read_header(jpeg: bytes) -> Header | None:
    """Read a JPEG's header; None if it is not YCbCr or grey, or has a subsampling that the library does not support."""
    found = [c_int() for _ in range(4)]
    if library().tjDecompressHeader3(_decompressor(), jpeg, len(jpeg), *map(byref, found)) != 0:
        return None
    width, height, subsampling, space = (int(number.value) for number in found)
    if space not in (_YCBCR, _GREY) or not 0 <= subsampling < len(_NAMES) or min(width, height) < 1:
        return None
    return Header(width, height, _NAMES[subsampling])


def decode_planes(jpeg: bytes, header: Header, reduction: int = 1) -> list[Plane] | None:
    """Decode the planes Y, Cb, Cr (grey: Y) in the JPEG's subsampling, without colour conversion.

    reduction: one of REDUCTIONS: decode at 1/2, 1/4 or 1/8 of the size, rounded up, with smaller inverse DCTs.
    Returns None if libjpeg-turbo reports an error or a warning.
    """
    width, height = -(-header.width // reduction), -(-header.height // reduction)
    sizes = plane_sizes(width, height, header.subsampling)
    planes = [np.empty((rows, columns), np.uint8) for columns, rows in sizes]
    pointers, strides = _arguments(planes)
    status = library().tjDecompressToYUVPlanes(
        _decompressor(), jpeg, len(jpeg), pointers, width, strides, height, _ACCURATE_DCT
    )
    return planes if status == 0 else None


def encode_planes(
    planes: Sequence[Plane], width: int, height: int, subsampling: Subsampling, quality: int, interval: int
) -> bytes:
    """Encode an image's planes, of the sizes given by `plane_sizes`, as a baseline JPEG.

    quality: 1 to 100, libjpeg's scale.   interval: MCUs between restart markers.
    Raises RuntimeError with the library's message if it fails.
    """
    code = _NAMES.index(subsampling)
    room = int(library().tjBufSize(width, height, code))
    buffer = np.empty(room, np.uint8)
    place, size = c_void_p(buffer.ctypes.data), c_ulong(room)
    pointers, strides = _arguments(planes)
    os.environ["TJ_RESTART"] = f"{interval}B"  # version 2 of the library has no other setting for markers
    status = library().tjCompressFromYUVPlanes(
        *(_compressor(), pointers, width, strides, height, code, byref(place), byref(size)),
        *(quality, _NO_REALLOC | _ACCURATE_DCT),
    )
    if status != 0:
        raise RuntimeError(library().tjGetErrorStr2(_compressor()).decode(errors="replace"))
    jpeg = buffer[: size.value].tobytes()
    if jpeg.find(b"\xff\xdd\x00\x04", 0, jpeg.index(b"\xff\xda")) < 0:
        raise RuntimeError("libturbojpeg wrote no restart markers; this version ignores TJ_RESTART")
    return jpeg


def _arguments(planes: Sequence[Plane]) -> tuple[ctypes.Array[c_void_p], ctypes.Array[c_int]]:
    return _Pointers(*(plane.ctypes.data for plane in planes)), _Strides(*(plane.strides[0] for plane in planes))
