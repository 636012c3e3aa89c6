"""JPEG decoding from numba code, by the libturbojpeg that FFCV is linked with.

FFCV's own `imdecode` drops libjpeg's return code, so a corrupt image becomes old buffer contents without a word,
and it uses the fast, less accurate DCT. Here the same library is called directly: every complaint is an error and
the DCT is the accurate one, as in Pillow.
"""

from __future__ import annotations

import ctypes

import ffcv._libffcv
import numpy as np
from numba import njit

# Status of a decoded sample; REASONS says it in words.
OK, OUTSIDE_FILE, NO_JPEG, WRONG_SIZE, CORRUPT, UNKNOWN_MODE = range(6)
REASONS = {
    OUTSIDE_FILE: "its data lies outside the file",
    NO_JPEG: "its data does not start with a readable JPEG header",
    WRONG_SIZE: "its data has another size than the sample table says",
    CORRUPT: "its JPEG data is damaged",
    UNKNOWN_MODE: "the sample table gives it an unknown encoding",
}

_RGB = 0  # TJPF_RGB
_ACCURATE_DCT = 4096  # TJFLAG_ACCURATEDCT
_STOP_ON_WARNING = 8192  # TJFLAG_STOPONWARNING


def _function(name: str, result: type | None, *arguments: type) -> ctypes._CFuncPtr:  # type: ignore[name-defined]
    function = _library[name]
    function.restype = result
    function.argtypes = list(arguments)
    return function


_library = ctypes.CDLL(ffcv._libffcv.__file__)
_pointer, _int, _ulong = ctypes.c_void_p, ctypes.c_int, ctypes.c_ulong
_init = _function("tjInitDecompress", _pointer)
_destroy = _function("tjDestroy", _int, _pointer)
_header = _function("tjDecompressHeader3", _int, _pointer, _pointer, _ulong, _pointer, _pointer, _pointer, _pointer)
_decompress = _function("tjDecompress2", _int, _pointer, _pointer, _ulong, _pointer, _int, _int, _int, _int, _int)


@njit(nogil=True, error_model="numpy")
def decode_jpeg(data, height, width, destination):  # type: ignore[no-untyped-def]
    """Decode a whole JPEG to RGB.

    data: (n,) uint8, contiguous.   height, width: the size it must have.
    destination: (>= height * width * 3,) uint8, receives rows of RGB pixels without padding.
    Returns OK, NO_JPEG, WRONG_SIZE or CORRUPT; after CORRUPT the destination is partly written.
    """
    if data.size == 0:
        return NO_JPEG
    handle = _init()
    found = np.zeros(4, np.int32)  # width, height, chroma subsampling, colour space
    at = found.ctypes.data
    if _header(handle, data.ctypes.data, data.size, at, at + 4, at + 8, at + 12) != 0:
        status = NO_JPEG
    elif found[0] != width or found[1] != height:
        status = WRONG_SIZE
    elif (
        _decompress(
            handle,
            data.ctypes.data,
            data.size,
            destination.ctypes.data,
            width,
            0,
            height,
            _RGB,
            _ACCURATE_DCT | _STOP_ON_WARNING,
        )
        != 0
    ):
        status = CORRUPT
    else:
        status = OK
    _destroy(handle)
    return status
