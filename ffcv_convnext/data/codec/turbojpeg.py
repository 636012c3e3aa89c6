"""libturbojpeg through ctypes, for the conversion's worker processes: JPEG <-> planes of Y, Cb and Cr.

It is the library that FFCV is linked with, found beside FFCV without importing it: that would cost every worker
seconds. Decoders call the same library from numba code (jpeg.py).
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
MAX_JPEG_SIDE = 65500  # libjpeg's limit, just below the 65535 that FFCV's sample table can hold

# TJSAMP_*: how many pixels share a chroma sample, across and down.
_FACTORS = {"444": (1, 1), "422": (2, 1), "420": (2, 2), "grey": (1, 1), "440": (1, 2), "411": (4, 1)}
_NAMES = tuple(_FACTORS)
REDUCTIONS = (8, 4, 2, 1)
_YCBCR, _GREY = 1, 2  # TJCS_*
_NO_REALLOC, _ACCURATE_DCT = 1024, 4096  # TJFLAG_*
_Pointers, _Strides = c_void_p * 3, c_int * 3


class Header(NamedTuple):
    """What a JPEG says of itself."""

    width: int  # pixels
    height: int
    subsampling: str  # a key of _FACTORS: 420, 422, 444, 440, 411 or grey


def library_path() -> Path:
    """FFCV's extension module, whose libturbojpeg is used. Raises FileNotFoundError where there is none."""
    spec = importlib.util.find_spec("ffcv")
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        for path in sorted(Path(folder).glob("_libffcv*.so")):
            return path
    raise FileNotFoundError("ffcv is not installed; pip install 'ffcv_convnext[ffcv]'")


@cache
def library() -> ctypes.CDLL:
    """libturbojpeg, with the types of the functions that are called from Python."""
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
    """Width and height of the planes of a picture: luma is padded to whole chroma samples."""
    across, down = _FACTORS[subsampling]
    columns, rows = -(-width // across), -(-height // down)
    luma = columns * across, rows * down
    return [luma] if subsampling == "grey" else [luma, (columns, rows), (columns, rows)]


def factors(subsampling: str) -> tuple[int, int]:
    """Pixels that share a chroma sample: across, down."""
    return _FACTORS[subsampling]


def read_header(jpeg: bytes) -> Header | None:
    """None for what is no JPEG of Y, Cb and Cr or grey, or has a subsampling that the library does not know."""
    found = [c_int() for _ in range(4)]
    if library().tjDecompressHeader3(_decompressor(), jpeg, len(jpeg), *map(byref, found)) != 0:
        return None
    width, height, subsampling, space = (int(number.value) for number in found)
    if space not in (_YCBCR, _GREY) or not 0 <= subsampling < len(_NAMES) or min(width, height) < 1:
        return None
    return Header(width, height, _NAMES[subsampling])


def decode_planes(jpeg: bytes, header: Header, reduction: int = 1) -> list[Plane] | None:
    """The planes Y, Cb, Cr (grey: Y) in the JPEG's own subsampling, without colour conversion.

    reduction: out of REDUCTIONS: decode at a half, a quarter, an eighth of the size, rounded up, by smaller inverse
    DCTs.
    None when the library has anything to complain of, and be it a warning.
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
    """A baseline JPEG of a picture's planes, which have the sizes that `plane_sizes` states.

    quality: 1 to 100, libjpeg's scale.   interval: MCUs between restart markers.
    Raises RuntimeError with the library's words when it fails.
    """
    code = _NAMES.index(subsampling)
    room = int(library().tjBufSize(width, height, code))
    buffer = np.empty(room, np.uint8)
    place, size = c_void_p(buffer.ctypes.data), c_ulong(room)
    pointers, strides = _arguments(planes)
    os.environ["TJ_RESTART"] = f"{interval}B"  # version 2 of the library has no other way to ask for markers
    status = library().tjCompressFromYUVPlanes(
        *(_compressor(), pointers, width, strides, height, code, byref(place), byref(size)),
        *(quality, _NO_REALLOC | _ACCURATE_DCT),
    )
    if status != 0:
        raise RuntimeError(library().tjGetErrorStr2(_compressor()).decode(errors="replace"))
    jpeg = buffer[: size.value].tobytes()
    if jpeg.find(b"\xff\xdd\x00\x04", 0, jpeg.index(b"\xff\xda")) < 0:
        raise RuntimeError("libturbojpeg wrote no restart markers; this version takes no notice of TJ_RESTART")
    return jpeg


def _arguments(planes: Sequence[Plane]) -> tuple[ctypes.Array[c_void_p], ctypes.Array[c_int]]:
    return _Pointers(*(plane.ctypes.data for plane in planes)), _Strides(*(plane.strides[0] for plane in planes))
