"""Add restart markers to a JPEG file without decoding its pixels, so that crops can be cut from it without loss.

A scan is one sequence of Huffman codes, block after block: the DC coefficient as a difference from the previous block,
then 63 AC coefficients. After a restart marker the data begins at a whole byte, and the first difference is from 0. So
the codes are read to find each block's DC coefficient and the position of its AC codes; then the differences are
encoded again and the AC codes are copied, bit for bit:

    difference AC | difference AC | difference AC | difference AC ...                    the original
    difference AC | difference AC | 1s RST0 | DC AC | difference AC | 1s RST1 ...       what is stored

Any decoder gives the same pixels for both. Source of the format: ITU-T T.81, Annexes B, C, F and K. The loops over the
codes are in restart_kernels.py. Imports neither ffcv, torch nor numba, because the worker processes of a conversion
import this file.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.data.codec.machine_code import Array, Functions, Kind
from ffcv_convnext.data.codec.recompress import restart_interval
from ffcv_convnext.data.codec.turbojpeg import MAX_JPEG_SIDE, library

_MAX_PIXELS = 178_956_970  # Pillow's limit: a short file that claims more is a decompression bomb

_TEM, RST0, RST7, EOI, _SOS = 0x01, 0xD0, 0xD7, 0xD9, 0xDA
_DHT, _DQT, _DRI, _APP0, _APP14 = 0xC4, 0xDB, 0xDD, 0xE0, 0xEE
_BASELINE, _PROGRESSIVE = (0xC0, 0xC1), (0xC2, 0xCA)  # SOF0, SOF1 use Huffman codes as SOF2 does, SOF10 arithmetic
_FRAMES = (*_BASELINE, *_PROGRESSIVE, 0xC9)  # SOF9: as SOF1, with arithmetic coding
_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF, 0xDE)  # lossless, hierarchical
_MARKER = re.compile(rb"\xff+([^\xff])", re.DOTALL)  # any number of fill bytes
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)

_JFIF = b"JFIF\0\1\1\0\0\1\0\1\0\0"  # version 1.1, square pixels, no thumbnail
_ADOBE = b"Adobe\0\x64\0\0\0\0"  # version 100; the next byte is the colour transform

# Sampling factors (across, down) of luma and of both chroma components: the ways in which libturbojpeg writes 4:4:4,
# 4:2:2, 4:4:0, 4:2:0 and 4:1:1.
_SAMPLINGS = {
    *(((h, v), (h, v)) for h, v in ((1, 1), (2, 1), (3, 1), (1, 2), (1, 3))),
    *(((2, 1), (1, 1)), ((2, 2), (1, 2))),
    *(((1, 2), (1, 1)), ((2, 2), (2, 1))),
    *(((2, 2), (1, 1)), ((4, 1), (1, 1))),
}

# DC tables with all categories of 8-bit JPEG, 0 to 11: numbers of codes of 1 ... 16 bits, then categories. Source:
# T.81, Tables K.3 (luminance) and K.4 (chrominance).
_LUMINANCE = bytes([0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, *range(12)])
_CHROMINANCE = bytes([0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, *range(12)])
MAX_CATEGORY = 11
MAX_DC = (1 << MAX_CATEGORY) - 1

# A lookup table's entry: the number of bits of the symbol, and from bit 6 on a DC category, or the number of
# coefficients that an AC symbol advances. The first 512 entries are for codes of up to 9 bits; a 0 there means a longer
# code, which the entries after them give for 16 bits.
SHORT, SHORT_SIZE = 9, 512
TABLE_SIZE = SHORT_SIZE + (1 << 16)
END_OF_BLOCK, UNDEFINED = 128, 100
PADDING = 512  # bytes after the data: a block of 64 * 31 bits may begin at its last bit

OK, CUT_OFF, DAMAGED, DC_RANGE, MARKERS = range(5)

_BAD_HEADER = "its JPEG header is truncated or damaged"
_REASONS = {
    CUT_OFF: "its JPEG data is truncated",
    DAMAGED: "its JPEG data is damaged: an undefined code",
    DC_RANGE: "its JPEG data is damaged: a DC coefficient beyond 11 bits",
    MARKERS: "its JPEG data is damaged: a restart marker out of order",
}


class NotTranscodable(ValueError):
    """A file is not a JPEG, is damaged, or of a kind that the loader does not decode. The message is the reason."""


def add_restart_markers(jpeg: bytes) -> bytes:
    """Return the image as a baseline JPEG of one scan with the restart markers that `crop.cut_jpeg` needs.

    jpeg: a file's content. The DCT coefficients stay, so every decoder gives the original's pixels. Progressive,
    arithmetic-coded and multi-scan JPEGs are first made baseline by libturbojpeg, which also keeps them.
    EXIF, ICC profiles, thumbnails and comments are dropped; JFIF and Adobe segments stay, because they define the
    colour space. Existing restart markers are replaced, and a second call changes nothing more.
    Raises NotTranscodable if the content is not a complete JPEG of 8 bits, grey or with three components in a usual
    subsampling. A missing end marker, or bytes after the last block of a baseline JPEG, are not damage.
    """
    headers = _read_headers(jpeg)
    if not headers.has_one_baseline_scan:
        _require_complete_scans(jpeg, headers)
        jpeg = _to_baseline(jpeg)
        headers = _read_headers(jpeg)
    scan = _Scan.of(headers)
    interval = restart_interval(headers.width, scan.mcu_width)
    components = np.array(scan.components)
    blocks_a_segment = interval * components.size
    num_blocks = scan.num_mcus * components.size
    if num_blocks > 4 * (len(jpeg) - headers.data_at):  # a block takes two bits at least
        raise NotTranscodable(_REASONS[CUT_OFF])

    kernels = _kernels()
    data = np.frombuffer(jpeg, np.uint8)
    bits = np.empty(data.size - headers.data_at + PADDING, np.uint8)
    old_interval = headers.interval or scan.num_mcus
    ends = np.empty(-(-scan.num_mcus // old_interval) + 1, np.int64)
    _require(kernels.unstuff(data, headers.data_at, bits, ends))
    specs = [*scan.dc, *scan.ac]
    tables = np.empty((len(specs), TABLE_SIZE), np.uint16)
    contents = [np.frombuffer(spec, np.uint8) for spec in specs]
    starts = [kernels.fill_table(each, i >= len(scan.dc), tables[i]) for i, each in enumerate(contents)]
    starts_of_long = np.array(starts)
    if starts_of_long.min() < 0:
        raise NotTranscodable("its Huffman tables are damaged")
    values, spans = np.empty(num_blocks, np.int64), np.empty((num_blocks, 2), np.int64)
    before = np.empty(len(scan.dc), np.int64)
    flat = tables.reshape(-1)
    _require(kernels.read_blocks(bits, ends, old_interval, components, flat, starts_of_long, before, values, spans))

    used = np.zeros((len(scan.dc), MAX_CATEGORY + 1), np.bool_)
    _require(kernels.to_differences(values, components, blocks_a_segment, before, used))
    dc = _dc_tables(scan, used)
    codes = np.array([_codes(dc[table]) for table in scan.dc_ids])
    num_segments = -(-num_blocks // blocks_a_segment)
    # A difference takes 27 bits at most, a segment 7 of padding; then every byte may need a stuffed one after it.
    out = np.empty(2 * (bits.size + 4 * num_blocks + num_segments) + 2 * num_segments, np.uint8)
    size = kernels.write_scan(bits, spans, values, components, codes, blocks_a_segment, out)
    return _assemble(headers, scan, dc, interval) + out[:size].tobytes() + bytes([0xFF, EOI])


@cache
def _kernels() -> Functions:
    bytes_, ints, matrix = Array(np.uint8), Array(np.int64), Array(np.int64, 2)
    kinds: dict[str, Sequence[Kind]] = {
        "unstuff": (bytes_, int, bytes_, ints),
        "fill_table": (bytes_, int, Array(np.uint16)),
        "read_blocks": (bytes_, ints, int, ints, Array(np.uint16), ints, ints, ints, matrix),
        "to_differences": (ints, ints, int, ints, Array(np.bool_, 2)),
        "write_scan": (bytes_, matrix, ints, ints, matrix, int, bytes_),
    }
    return Functions("ffcv_convnext.data.codec.restart_kernels", kinds)


def _require(status: int) -> None:
    if status != OK:
        raise NotTranscodable(_REASONS[status])


# --- headers -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Headers:
    """The segments before a JPEG's first scan, and that scan's header."""

    frame: int = 0  # its marker
    frame_content: bytes = b""
    height: int = 0  # pixels
    width: int = 0
    components: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # id -> factors across, down; DQT's id
    is_jfif: bool = False  # then it is YCbCr
    adobe_transform: int | None = None  # 0: RGB; else YCbCr; None: the components' ids decide
    quantisation: dict[int, bytes] = field(default_factory=dict)  # id -> precision and id, 64 values
    huffman: dict[int, bytes] = field(default_factory=dict)  # class * 16 + id -> 16 numbers of codes, the symbols
    interval: int = 0  # MCUs between restart markers, 0: none
    scan_content: bytes = b""
    data_at: int = 0

    @property
    def has_one_baseline_scan(self) -> bool:
        return self.frame in _BASELINE and self.scan_content[0] == len(self.components)


def _segments(jpeg: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Yield each marker segment: marker, content, position of its end. A scan's data is skipped."""
    if jpeg[:2] != b"\xff\xd8":
        raise NotTranscodable("not a JPEG")
    at = 2
    while True:
        found = _MARKER.match(jpeg, at)
        if found is None or found[1] == b"\0":
            raise NotTranscodable(_BAD_HEADER)
        marker, at = found[1][0], found.end()
        if marker == EOI:
            return
        if marker == _TEM or RST0 <= marker <= RST7:
            continue  # these have no content
        end = at + int.from_bytes(jpeg[at : at + 2], "big")
        if not at + 2 <= end <= len(jpeg):
            raise NotTranscodable(_BAD_HEADER)
        yield marker, jpeg[at + 2 : end], end
        at = end
        if marker == _SOS:
            after = _AFTER_SCAN.search(jpeg, at)
            if after is None:
                return
            at = after.start()


def _read_headers(jpeg: bytes) -> _Headers:
    """Read the headers. Raises NotTranscodable for a JPEG that cannot be transcoded or decoded."""
    headers = _Headers()
    try:
        for marker, content, end in _segments(jpeg):
            if marker in _FRAMES:
                _read_frame(headers, marker, content)
            elif marker in _OTHER_FRAMES:
                raise NotTranscodable("a lossless or hierarchical JPEG")
            elif marker == _APP0 and content[:5] == b"JFIF\0" and len(content) >= len(_JFIF):
                headers.is_jfif = True
            elif marker == _APP14 and content[:5] == b"Adobe" and len(content) > len(_ADOBE):
                headers.adobe_transform = content[11]
            elif marker == _DQT:
                while content:
                    size = 129 if content[0] & 0x10 else 65
                    if content[0] & ~0x13 or len(content) < size:
                        raise NotTranscodable(_BAD_HEADER)
                    headers.quantisation[content[0] & 3] = content[:size]
                    content = content[size:]
            elif marker == _DHT:
                while content:
                    size = 17 + sum(content[1:17])
                    if content[0] & ~0x13 or not size <= min(len(content), 17 + 256):
                        raise NotTranscodable(_BAD_HEADER)
                    headers.huffman[content[0]] = content[1:size]
                    content = content[size:]
            elif marker == _DRI:
                (headers.interval,) = struct.unpack(">H", content)
            elif marker == _SOS:
                if not headers.components or len(content) < 4 or len(content) != 4 + 2 * content[0]:
                    raise NotTranscodable(_BAD_HEADER)
                headers.scan_content, headers.data_at = content, end
                return headers
    except struct.error:  # a segment of the wrong length
        pass
    raise NotTranscodable(_BAD_HEADER)


def _read_frame(headers: _Headers, marker: int, content: bytes) -> None:
    precision, height, width, num_components = struct.unpack(">BHHB", content[:6])
    components = {
        content[i]: (content[i + 1] >> 4, content[i + 1] & 15, content[i + 2]) for i in range(6, len(content) - 2, 3)
    }
    if headers.components or len(content) != 6 + 3 * num_components or len(components) != num_components:
        raise NotTranscodable(_BAD_HEADER)
    if precision != 8:
        raise NotTranscodable(f"a JPEG of {precision} bits, not 8")
    if not (0 < width <= MAX_JPEG_SIDE and 0 < height <= MAX_JPEG_SIDE):
        raise NotTranscodable(f"{width} x {height} pixels: expected 1 to {MAX_JPEG_SIDE} a side")
    if width * height > _MAX_PIXELS:
        raise NotTranscodable(f"{width} x {height} pixels: expected {_MAX_PIXELS} at most")
    if num_components not in (1, 3):
        raise NotTranscodable(f"a JPEG of {num_components} colour components (CMYK or YCCK), not 1 or 3")
    luma, *chroma = ((across, down) for across, down, _ in components.values())
    is_grey = not chroma and all(1 <= factor <= 4 for factor in luma)  # without effect on one component
    if not is_grey and not (chroma and chroma[0] == chroma[1] and (luma, chroma[0]) in _SAMPLINGS):
        shown = ", ".join(f"{across}x{down}" for across, down in (luma, *chroma))
        raise NotTranscodable(f"sampling factors {shown}: expected grey, 4:4:4, 4:2:2, 4:2:0, 4:4:0 or 4:1:1")
    headers.frame, headers.frame_content, headers.components = marker, content, components
    headers.height, headers.width = height, width


class _Scan(NamedTuple):
    """Layout of a baseline JPEG's only scan. Its components are in the frame's order (T.81, B.2.3)."""

    mcu_width: int  # pixels
    num_mcus: int
    components: list[int]  # of each block of an MCU
    dc_ids: list[int]  # of each component
    dc: list[bytes]  # tables, of each component
    ac_ids: list[int]
    ac: list[bytes]

    @staticmethod
    def of(headers: _Headers) -> _Scan:
        """Read the layout. Raises NotTranscodable if the scan refers to a missing component or table."""
        content = headers.scan_content
        ids, selectors = content[1:-3:2], content[2:-3:2]
        quantisation = {table for _, _, table in headers.components.values()}
        if list(ids) != list(headers.components) or not quantisation <= set(headers.quantisation):
            raise NotTranscodable(_BAD_HEADER)
        dc_ids, ac_ids = [s >> 4 for s in selectors], [s & 15 for s in selectors]
        try:
            dc, ac = [headers.huffman[i] for i in dc_ids], [headers.huffman[16 + i] for i in ac_ids]
        except KeyError:
            raise NotTranscodable("it has no Huffman tables") from None
        # An MCU of a single component is one block, whatever the factors.
        factors = [(1, 1)] if len(ids) == 1 else [headers.components[i][:2] for i in ids]
        across, down = (8 * max(each) for each in zip(*factors, strict=True))
        num_mcus = -(-headers.width // across) * -(-headers.height // down)
        blocks = [i for i, (h, v) in enumerate(factors) for _ in range(h * v)]
        return _Scan(across, num_mcus, blocks, dc_ids, dc, ac_ids, ac)


def _segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def _assemble(headers: _Headers, scan: _Scan, dc: dict[int, bytes], interval: int) -> bytes:
    """Return everything before the scan's data, without unused tables."""
    tables = {table for _, _, table in headers.components.values()}
    colour = b""
    if headers.is_jfif:
        colour = _segment(_APP0, _JFIF)
    elif headers.adobe_transform is not None:
        colour = _segment(_APP14, _ADOBE + bytes([headers.adobe_transform != 0]))
    ac = dict(zip(scan.ac_ids, scan.ac, strict=True))
    huffman = [bytes([i]) + dc[i] for i in sorted(dc)] + [bytes([16 + i]) + ac[i] for i in sorted(ac)]
    return b"".join(
        [
            b"\xff\xd8",
            colour,
            _segment(_DQT, b"".join(headers.quantisation[i] for i in sorted(tables))),
            _segment(headers.frame, headers.frame_content),
            _segment(_DHT, b"".join(huffman)),
            _segment(_DRI, struct.pack(">H", interval)),
            _segment(_SOS, headers.scan_content[:-3] + b"\x00\x3f\x00"),
        ]
    )


def _dc_tables(scan: _Scan, used: NDArray[np.bool_]) -> dict[int, bytes]:
    """Return the DC tables to write: the original's, or T.81's if the original's lacks a category that is used.

    used: (components, 12), whether a component's differences use a category.
    """
    tables = dict(zip(scan.dc_ids, scan.dc, strict=True))
    for i, table in enumerate(scan.dc_ids):
        if not set(np.flatnonzero(used[i]).tolist()) <= set(tables[table][16:]):
            tables[table] = _LUMINANCE if table == scan.dc_ids[0] else _CHROMINANCE
    return tables


def _codes(table: bytes) -> list[int]:
    """Return the code of each category, 0 to 11, as code * 32 + number of bits; 0: no code. Source: T.81, Annex C."""
    codes, code, at = [0] * (MAX_CATEGORY + 1), 0, 16
    for num_bits in range(1, 17):
        for category in table[at : at + table[num_bits - 1]]:
            if category <= MAX_CATEGORY:
                codes[category] = code << 5 | num_bits
            code += 1
        at += table[num_bits - 1]
        code <<= 1
    return codes


# --- libturbojpeg: JPEGs that are not baseline -------------------------------------------------------------------

_COPY_NO_MARKERS = 64  # TJXOPT_COPYNONE
_STRICT = 8192 | 32768  # TJFLAG_STOPONWARNING, TJFLAG_LIMITSCANS


class _Transform(ctypes.Structure):
    """libturbojpeg's tjtransform: no rotation, no cropping."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("x", "y", "width", "height", "operation", "options")),
        *((name, ctypes.c_void_p) for name in ("data", "custom_filter")),
    ]


def _to_baseline(jpeg: bytes) -> bytes:
    """Return the same coefficients in one baseline scan. Raises NotTranscodable with the library's reason."""
    turbojpeg = library()
    handle = ctypes.c_void_p(turbojpeg.tjInitTransform())
    buffer, size, transform = ctypes.c_void_p(), ctypes.c_ulong(), _Transform(options=_COPY_NO_MARKERS)
    references = ctypes.byref(buffer), ctypes.byref(size), ctypes.byref(transform)
    try:
        if turbojpeg.tjTransform(handle, jpeg, ctypes.c_ulong(len(jpeg)), 1, *references, _STRICT):
            raise NotTranscodable(f"libturbojpeg: {turbojpeg.tjGetErrorStr2(handle).decode(errors='replace')}")
        return ctypes.string_at(buffer, size.value)
    finally:
        turbojpeg.tjFree(buffer)
        turbojpeg.tjDestroy(handle)


def _require_complete_scans(jpeg: bytes, headers: _Headers) -> None:
    """Raise NotTranscodable if scans are missing: libjpeg then smooths the image, a baseline JPEG cannot."""
    unknown = {component: np.ones(64, np.bool_) for component in headers.components}
    for marker, content, _ in _segments(jpeg):
        if marker != _SOS:
            continue
        if len(content) < 4 or not set(content[1:-3:2]) <= set(unknown):
            raise NotTranscodable(_BAD_HEADER)
        first, last, low_bit = (
            (content[-3], content[-2], content[-1] & 15) if headers.frame in _PROGRESSIVE else (0, 63, 0)
        )
        for component in content[1:-3:2]:
            unknown[component][first : last + 1] = low_bit > 0
    if any(each.any() for each in unknown.values()):
        raise NotTranscodable("its progressive JPEG data is truncated: scans are missing")
