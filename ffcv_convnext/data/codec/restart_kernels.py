"""The loops over a JPEG's Huffman codes for restart_markers.py, compiled by numba to code that needs no numba to run.

So they allocate nothing, and numba's reference counting is switched off. They are called through machine_code.py; this
file is imported only to compile them.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ffcv_convnext.data.codec.jit import Bytes, Function, Ints
from ffcv_convnext.data.codec.restart_markers import (
    CUT_OFF,
    DAMAGED,
    DC_RANGE,
    END_OF_BLOCK,
    EOI,
    MARKERS,
    MAX_CATEGORY,
    MAX_DC,
    OK,
    RST0,
    RST7,
    SHORT,
    SHORT_SIZE,
    TABLE_SIZE,
    UNDEFINED,
)

_TO_SHORT, _TO_LONG = np.uint64(64 - SHORT), np.uint64(64 - 16)
_OPTIONS = {"_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def _kernel(function: Function) -> Function:
    """Let numba compile a function when it is asked for a signature, without what calls from Python would need."""
    compiled: Function = njit(nogil=True, error_model="numpy", **_OPTIONS)(function)
    return compiled


@_kernel
def unstuff(data: Bytes, at: int, bits: Bytes, ends: Ints) -> int:
    """Copy a scan's data without stuffed zeros and restart markers.

    data: (n,) uint8, read from `at` on.   bits: (n - at + PADDING,) uint8, result; the rest of it is zero.
    ends: (num_segments + 1,) int64, result: where each segment begins in `bits`, and where the last one ends.
    Missing segments are empty. Returns OK or MARKERS.
    """
    size, found, num_segments = 0, 0, ends.size - 1
    ends[0] = 0
    while at < data.size and found < num_segments:
        byte = data[at]
        at += 1
        if byte == 0xFF:
            while at < data.size and data[at] == 0xFF:  # fill bytes
                at += 1
            marker = data[at] if at < data.size else np.uint8(EOI)
            at += 1
            if marker != 0:
                found += 1
                ends[found] = size
                if found < num_segments:
                    if not RST0 <= marker <= RST7:
                        break
                    if marker != RST0 + ((found - 1) & 7):
                        return MARKERS
                continue
        bits[size] = byte
        size += 1
    ends[found + (found < num_segments) :] = size
    bits[size:] = 0
    return OK


@_kernel
def fill_table(codes: Bytes, is_ac: bool, table: NDArray[np.uint16]) -> int:
    """Convert a Huffman table to a lookup table for the next 9, or 16, bits; for its entries see above.

    codes: uint8, number of codes of 1 ... 16 bits, then their symbols.   table: (TABLE_SIZE,) uint16, result.
    Returns the 16 bits that begin with the first code of more than 9 bits; -1 for tables that libjpeg refuses as
    well: too many codes, a code of ones only, or a DC category above 15.
    """
    code, at, start = 0, 16, 0
    for num_bits in range(1, 17):
        for _ in range(codes[num_bits - 1]):
            first, end = code << (16 - num_bits), (code + 1) << (16 - num_bits)
            if end > 0xFFFF:
                return -1
            symbol = np.int64(codes[at])
            at += 1
            code += 1
            if is_ac:
                run, size = symbol >> 4, symbol & 15
                forward = run + 1  # size 0: 16 zeros, or the end of a block
                if size == 0 and run != 15:
                    forward = np.int64(END_OF_BLOCK if run == 0 else UNDEFINED)
                entry = np.uint16(num_bits + size | forward << 6)
            elif symbol > 15:
                return -1
            else:
                entry = np.uint16(num_bits | symbol << 6)
            if num_bits <= SHORT:
                table[first >> 16 - SHORT : end >> 16 - SHORT] = entry
            else:
                table[SHORT_SIZE + first - start : SHORT_SIZE + end - start] = entry
        if num_bits == SHORT:
            start = code << 16 - SHORT
            table[start >> 16 - SHORT : SHORT_SIZE] = 0
            table[SHORT_SIZE : TABLE_SIZE - start] = np.uint16(UNDEFINED << 6)
        code <<= 1
    return start


@_kernel
def _window(bits: Bytes, at: int) -> np.uint64:
    """Return the bits from bit `at` on, 57 or more, at the upper end of a uint64; the rest is zero."""
    i, word = np.uint64(at >> 3), np.uint64(0)
    for k in range(8):
        word = word << np.uint64(8) | np.uint64(bits[i + np.uint64(k)])
    return word << np.uint64(at & 7)


@_kernel
def read_blocks(
    bits: Bytes,
    ends: Ints,
    interval: int,
    components: Ints,
    tables: NDArray[np.uint16],
    starts_of_long: Ints,
    before: Ints,
    values: Ints,
    spans: Ints,
) -> int:
    """Read all blocks. Source: T.81, F.2.2.

    bits, ends: from unstuff.   interval: MCUs a segment.   components: (blocks of an MCU,) int64.
    tables: (2 * num_components * TABLE_SIZE,) uint16, one for each component's DC and then AC, filled by fill_table.
    starts_of_long: (2 * num_components,) int64, its results.   before: (num_components,) int64, overwritten.
    values: (num_blocks,) int64, result: the DC coefficients.
    spans: (num_blocks, 2) int64, result: the bits of `bits` with a block's AC codes: first, and after the last.
    Returns a status.
    """
    num_components = before.size
    blocks_a_segment = interval * components.size
    for first in range(0, values.size, blocks_a_segment):
        segment, mcu_block = first // blocks_a_segment, 0
        at, end = 8 * ends[segment], 8 * ends[segment + 1]
        before[:] = 0
        for block in range(first, min(first + blocks_a_segment, values.size)):
            component = components[mcu_block]
            mcu_block = mcu_block + 1 if mcu_block + 1 < components.size else 0
            # Positions in `tables`: slices of it, or passing it to a function, would cost reference counting in numba.
            short = np.uint64(TABLE_SIZE * component)
            long = short + np.uint64(SHORT_SIZE - starts_of_long[component])
            window = _window(bits, at)
            entry = np.int64(tables[short + (window >> _TO_SHORT)])
            if entry == 0:
                entry = np.int64(tables[long + (window >> _TO_LONG)])
            num_bits, category = entry & 63, entry >> 6
            if category > MAX_CATEGORY:
                return DAMAGED if at + 16 <= end else CUT_OFF
            window <<= np.uint64(num_bits)
            if category > 0:
                value = np.int64(window >> np.uint64(64 - category))
                if value >> (category - 1) == 0:
                    value += 1 - (1 << category)
                before[component] += value
                if abs(before[component]) > MAX_DC:
                    return DC_RANGE
                window <<= np.uint64(category)
            values[block] = before[component]
            at += num_bits + category
            spans[block, 0] = at
            left = 57 - num_bits - category  # bits left in the window
            short = np.uint64(TABLE_SIZE * (num_components + component))
            long = short + np.uint64(SHORT_SIZE - starts_of_long[num_components + component])
            k = np.int64(1)
            while k < 64:
                if left < 31:  # an AC code and its value
                    window, left = _window(bits, at), np.int64(57)
                entry = np.int64(tables[short + (window >> _TO_SHORT)])
                if entry == 0:
                    entry = np.int64(tables[long + (window >> _TO_LONG)])
                num_bits = entry & 63
                window <<= np.uint64(num_bits)
                left -= num_bits
                at += num_bits
                k += entry >> 6
            spans[block, 1] = at
            if at > end:
                return CUT_OFF
            if 64 < k < END_OF_BLOCK:
                return DAMAGED
    return OK


@_kernel
def to_differences(values: Ints, components: Ints, blocks_a_segment: int, before: Ints, used: NDArray[np.bool_]) -> int:
    """Replace DC coefficients by their differences inside a segment, and mark the categories that a component uses.

    before: (num_components,) int64, overwritten.
    Returns a status: blocks that were in different segments may differ by more than 11 bits.
    """
    for first in range(0, values.size, blocks_a_segment):
        before[:] = 0
        mcu_block = 0
        for block in range(first, min(first + blocks_a_segment, values.size)):
            component, value = components[mcu_block], values[block]
            mcu_block = mcu_block + 1 if mcu_block + 1 < components.size else 0
            difference = value - before[component]
            if abs(difference) > MAX_DC:
                return DC_RANGE
            values[block] = difference
            before[component] = value
            used[component, _category(difference)] = True
    return OK


@_kernel
def _category(difference: int) -> int:
    size, category = abs(difference), 0
    while size > 0:
        size >>= 1
        category += 1
    return category


@_kernel
def write_scan(
    bits: Bytes, spans: Ints, differences: Ints, components: Ints, codes: Ints, blocks_a_segment: int, out: Bytes
) -> int:
    """Encode differences, copy AC codes, write restart markers.

    codes: (num_components, 12) int64, from _codes.   out: uint8, result: the scan's data, of the worst case's size.
    Returns its number of bytes.
    """
    word, count, size = np.uint64(0), 0, 0  # bits not yet written: the lower `count` ones of the word
    for first in range(0, differences.size, blocks_a_segment):
        if first > 0:
            size = _flush(word, count, out, size)
            out[size], out[size + 1] = 0xFF, RST0 + ((first // blocks_a_segment - 1) & 7)
            word, count, size = np.uint64(0), 0, size + 2
        mcu_block = 0
        for block in range(first, min(first + blocks_a_segment, differences.size)):
            difference = differences[block]
            category = _category(difference)
            code = codes[components[mcu_block], category]
            mcu_block = mcu_block + 1 if mcu_block + 1 < components.size else 0
            if difference < 0:
                difference += (1 << category) - 1
            num_bits, bits_to_put = (code & 31) + category, np.uint64((code >> 5) << category | difference)
            at, end = spans[block, 0], spans[block, 1]
            while True:
                word, count = word << np.uint64(num_bits) | bits_to_put, count + num_bits
                if count >= 32:
                    count -= 32
                    for shift in (24, 16, 8, 0):
                        byte = np.uint8(word >> np.uint64(count + shift))
                        out[size] = byte
                        size += 1
                        if byte == 0xFF:
                            out[size] = 0  # stuffed, so that it does not look like a marker
                            size += 1
                if at >= end:
                    break
                num_bits = min(end - at, 32)
                bits_to_put = _window(bits, at) >> np.uint64(64 - num_bits)
                at += num_bits
    return _flush(word, count, out, size)


@_kernel
def _flush(word: np.uint64, count: int, out: Bytes, size: int) -> int:
    """Write the remaining bits, the last byte filled with ones. Returns the number of bytes."""
    while count > 0:
        if count < 8:
            word, count = word << np.uint64(8 - count) | np.uint64((1 << (8 - count)) - 1), 8
        byte = np.uint8(word >> np.uint64(count - 8))
        out[size] = byte
        size += 1
        if byte == 0xFF:
            out[size] = 0
            size += 1
        count -= 8
    return size
