"""Cut a crop out of a JPEG in the compressed domain.

The data between two restart markers of a baseline JPEG can be decoded alone. So the header with another height and
width, the segments that the crop touches with renumbered markers, and an end marker are a small valid JPEG, which any
decoder decodes to the pixels of a full decode:

    SOI ... SOF(height, width) ... SOS | s0 RST0 | s1 RST1 | s2 RST2 | ... | s23 EOI      the stored image
    SOI ... SOF(smaller)       ... SOS |           s1 RST0 | s2 RST1 |  s5 RST2 | s6 EOI  what is decoded

One pixel around the crop is included, because the decoder's chroma upsampling reads it, and the size is clipped at the
image's true edge, where the decoder replicates pixels. Source of the format: ITU-T T.81, Annex B.
"""

from __future__ import annotations

import numpy as np

from ffcv_convnext.data.codec.decode import MEMCHR, MEMCPY
from ffcv_convnext.data.codec.jit import Bytes, Ints, call, jit

# Indices into the result of `read_layout`.
SIZE_AT, HEIGHT, WIDTH, MCU_HEIGHT, MCU_WIDTH, INTERVAL, SCAN_AT, NUM_COMPONENTS = range(8)
_SOI, _EOI, _SOS, _DRI, _RST0, _RST7 = 0xD8, 0xD9, 0xDA, 0xDD, 0xD0, 0xD7
_BASELINE = (0xC0, 0xC1)  # SOF0, SOF1: sequential, Huffman
_NOT_FRAMES = (0xC4, 0xC8, 0xCC)  # DHT, JPG, DAC share the range of frame headers


@jit
def _word(data: Bytes, at: np.int64) -> np.int64:
    return np.int64(data[at]) << 8 | np.int64(data[at + 1])


@jit
def read_layout(data: Bytes, layout: Ints) -> bool:
    """Read a JPEG's headers up to its first scan.

    data: (n,) uint8.   layout: (8,) int64, result: position of height and width, the size in pixels, also of an MCU,
    the restart interval in MCUs, position of the scan's data, number of components.
    Returns whether the image can be cut: baseline, 8 bits, one scan of all components, restart markers.
    """
    num, has_frame = data.size, False
    at, interval = np.int64(2), np.int64(0)
    if num < 4 or data[0] != 0xFF or data[1] != _SOI:
        return False
    while at + 4 <= num:
        if data[at] != 0xFF:
            return False
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        length = _word(data, at + 2)
        if length < 2 or at + 2 + length > num:
            return False
        if marker in _BASELINE:
            if has_frame or length < 8 or data[at + 4] != 8:
                return False
            components = np.int64(data[at + 9])
            if length < 8 + 3 * components or components == 0:
                return False
            horizontal, vertical = np.int64(1), np.int64(1)
            for c in range(components):
                factors = np.int64(data[at + 11 + 3 * c])
                horizontal, vertical = max(horizontal, factors >> 4), max(vertical, factors & 15)
            if components == 1:  # a scan of one component has MCUs of one block, whatever its factors
                horizontal, vertical = np.int64(1), np.int64(1)
            has_frame = True
            layout[SIZE_AT], layout[HEIGHT], layout[WIDTH] = at + 5, _word(data, at + 5), _word(data, at + 7)
            layout[MCU_HEIGHT], layout[MCU_WIDTH], layout[NUM_COMPONENTS] = 8 * vertical, 8 * horizontal, components
        elif 0xC0 <= marker <= 0xCF and marker not in _NOT_FRAMES:
            return False
        elif marker == _DRI:
            if length != 4:
                return False
            interval = _word(data, at + 4)
        elif marker == _SOS:
            if not has_frame or interval == 0 or length < 3 or data[at + 4] != layout[NUM_COMPONENTS]:
                return False
            layout[INTERVAL], layout[SCAN_AT] = interval, at + 2 + length
            return bool(layout[HEIGHT] > 0 and layout[WIDTH] > 0)
        at += 2 + length
    return False


@jit
def _find_segments(data: Bytes, start: int, num_segments: int, ends: Ints, functions: Ints) -> bool:
    """Find segments: ends[k] is segment k's first byte, and ends[k + 1] - 2 is its marker.

    Returns whether num_segments were found, each followed by the expected restart marker (the last one of an image by
    EOI).
    """
    base, num, at, found = np.int64(data.ctypes.data), data.size, start, 0
    ends[0] = start
    while found < num_segments:
        hit = call(functions[MEMCHR], (base + at, np.int64(0xFF), np.int64(num - at)))
        if hit == 0:
            return False
        at = hit - base + 1
        if at >= num:
            return False
        marker = data[at]
        if marker == 0:  # a stuffed 0xFF of the data
            at += 1
        elif _RST0 <= marker <= _RST7:
            if marker != _RST0 + (found & 7):
                return False
            found += 1
            at += 1
            ends[found] = at
        elif marker == _EOI:
            found += 1
            ends[found] = at + 1
            if found < num_segments:
                return False
        elif marker != 0xFF:
            return False
    return True


@jit
def cut_jpeg(
    data: Bytes,
    top: int,
    left: int,
    height: int,
    width: int,
    layout: Ints,
    ends: Ints,
    out: Bytes,
    functions: Ints,
) -> tuple[np.int64, np.int64, np.int64, np.int64, np.int64]:
    """Assemble a small JPEG that contains a box of a large one.

    data: (n,) uint8.   top, left, height, width: the box, pixels, inside the image.   layout: from read_layout.
    ends: int64 scratch.   out: uint8, receives the JPEG.   functions: from decode.addresses.
    Returns its number of bytes, and top, left, height, width of the pixels that it decodes to. 0 bytes if the image
    cannot be cut (unexpected markers, or a buffer is too small): then decode it whole.
    """
    none = (np.int64(0), np.int64(0), np.int64(0), np.int64(0), np.int64(0))
    full_height, full_width, interval = layout[HEIGHT], layout[WIDTH], layout[INTERVAL]
    mcu_height, scan_at = layout[MCU_HEIGHT], layout[SCAN_AT]
    mcus_a_row = (full_width + layout[MCU_WIDTH] - 1) // layout[MCU_WIDTH]
    num_rows = (full_height + mcu_height - 1) // mcu_height
    if mcus_a_row % interval != 0:  # segments straddle rows
        return none
    a_row, segment_width = mcus_a_row // interval, interval * layout[MCU_WIDTH]
    first_column, first_row = max(left - 1, 0) // segment_width, max(top - 1, 0) // mcu_height
    end_column = min((left + width + segment_width) // segment_width, a_row)
    end_row = min((top + height + mcu_height) // mcu_height, num_rows)
    if end_row * a_row + 1 > ends.size or scan_at > out.size:
        return none
    if not _find_segments(data, scan_at, end_row * a_row, ends, functions):
        return none
    source, target = np.int64(data.ctypes.data), np.int64(out.ctypes.data)
    call(functions[MEMCPY], (target, source, scan_at))
    size, number = scan_at, 0
    for row in range(first_row, end_row):
        for column in range(first_column, end_column):
            start, end = ends[row * a_row + column], ends[row * a_row + column + 1]
            if size + end - start > out.size:
                return none
            call(functions[MEMCPY], (target + size, source + start, end - start))
            size += end - start
            out[size - 1] = _RST0 + (number & 7)
            number += 1
    out[size - 1] = _EOI
    cut_top, cut_left = first_row * mcu_height, first_column * segment_width
    cut_height = min(full_height, end_row * mcu_height) - cut_top
    cut_width = min(full_width, end_column * segment_width) - cut_left
    at = layout[SIZE_AT]
    out[at], out[at + 1] = cut_height >> 8, cut_height & 255
    out[at + 2], out[at + 3] = cut_width >> 8, cut_width & 255
    return size, cut_top, cut_left, cut_height, cut_width
