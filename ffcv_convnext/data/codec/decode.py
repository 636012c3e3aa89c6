"""Decode JPEGs from numba code with the libturbojpeg that FFCV is linked with.

FFCV's `imdecode` ignores libjpeg's return code, so a corrupt image silently becomes old buffer contents, and it uses
the fast, less accurate DCT. Here the same library is called directly: every error and warning is an error, and the
DCT is the accurate one, as in Pillow.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.data.codec.jit import Bytes, Ints, call, jit
from ffcv_convnext.data.codec.turbojpeg import library_path

# Status of a decoded sample; REASONS describes it.
OK, OUTSIDE_FILE, NO_JPEG, WRONG_SIZE, CORRUPT, UNKNOWN_MODE, DAMAGED_PAGE = range(7)
REASONS = {
    OUTSIDE_FILE: "its data lies outside the file",
    NO_JPEG: "its data does not start with a readable JPEG header",
    WRONG_SIZE: "its data has another size than the sample table says",
    CORRUPT: "its JPEG data is damaged",
    UNKNOWN_MODE: "the sample table gives it an unknown encoding",
    DAMAGED_PAGE: "its page differs from its checksum in the manifest",
}

_RGB = 0  # TJPF_RGB
_ACCURATE_DCT = 4096  # TJFLAG_ACCURATEDCT
_STOP_ON_WARNING = 8192  # TJFLAG_STOPONWARNING
_LIMIT_SCANS = 32768  # TJFLAG_LIMITSCANS: at most 500 scans, which bounds the time for a malicious image

# Indices into the result of `addresses`.
_INIT, _DESTROY, _HEADER, _DECOMPRESS, MEMCHR, MEMCPY = range(6)


def addresses() -> NDArray[np.int64]:
    """Return (6,) int64: addresses of the C functions that compiled code calls, in the order of the constants above."""
    turbojpeg = ctypes.CDLL(str(library_path()))
    functions = [
        *(turbojpeg[name] for name in ("tjInitDecompress", "tjDestroy", "tjDecompressHeader3", "tjDecompress2")),
        *(ctypes.CDLL(None)[name] for name in ("memchr", "memcpy")),
    ]
    return np.array([ctypes.cast(function, ctypes.c_void_p).value for function in functions], dtype=np.int64)


@jit
def decode_jpeg(data: Bytes, height: int, width: int, destination: Bytes, functions: Ints) -> int:
    """Decode a whole JPEG to RGB.

    data: (n,) uint8, contiguous.   height, width: expected size.
    destination: (>= height * width * 3,) uint8, receives rows of RGB pixels without padding.
    functions: from `addresses`.
    Returns OK, NO_JPEG, WRONG_SIZE or CORRUPT; with CORRUPT the destination is partly written.
    """
    if data.size == 0:
        return NO_JPEG
    zero = np.int64(0)
    handle = call(functions[_INIT], ())
    found = np.zeros(4, np.int32)  # width, height, chroma subsampling, colour space
    source, num_bytes, at = np.int64(data.ctypes.data), np.int64(data.size), np.int64(found.ctypes.data)
    if np.int32(call(functions[_HEADER], (handle, source, num_bytes, at, at + 4, at + 8, at + 12))) != 0 or (
        found[0] == 0  # a file of quantisation and Huffman tables only
    ):
        status = NO_JPEG
    elif found[0] != width or found[1] != height:
        status = WRONG_SIZE
    else:
        target, flags = np.int64(destination.ctypes.data), np.int64(_ACCURATE_DCT | _STOP_ON_WARNING | _LIMIT_SCANS)
        arguments = (handle, source, num_bytes, target, np.int64(width), zero, np.int64(height), np.int64(_RGB), flags)
        status = OK if np.int32(call(functions[_DECOMPRESS], arguments)) == 0 else CORRUPT
    call(functions[_DESTROY], (handle,))
    return status
