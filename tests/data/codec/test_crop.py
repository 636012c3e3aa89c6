"""Cutting a crop out of a JPEG with restart markers."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images

from ffcv_convnext.data.codec.crop import INTERVAL, MCU_HEIGHT, MCU_WIDTH, cut_jpeg, read_layout
from ffcv_convnext.data.codec.decode import CORRUPT, NO_JPEG, OK, WRONG_SIZE, addresses, decode_jpeg
from ffcv_convnext.data.codec.recompress import restart_interval
from ffcv_convnext.data.load.crops import CropKernel  # noqa: F401  loads ffcv, whose libturbojpeg is used

Bytes = NDArray[np.uint8]
SAMPLING = {"444": 0x111111, "422": 0x211111, "420": 0x221111, "440": 0x121111, "411": 0x411111}
MCU = {"444": (8, 8), "422": (8, 16), "420": (16, 16), "440": (16, 8), "411": (8, 32), "gray": (8, 8)}
FUNCTIONS = addresses()


@pytest.fixture(scope="module")
def photograph() -> Bytes:
    return np.ascontiguousarray(load_sample_images().images[0])


def encode(pixels: Bytes, sampling: str, interval: int, *options: int) -> Bytes:
    flags = [cv2.IMWRITE_JPEG_QUALITY, 90, cv2.IMWRITE_JPEG_RST_INTERVAL, interval, *options]
    if sampling == "gray":
        return cv2.imencode(".jpg", pixels[:, :, 0], flags)[1].reshape(-1)
    flags += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SAMPLING[sampling]]
    return cv2.imencode(".jpg", pixels[:, :, ::-1], flags)[1].reshape(-1)


def decode(data: Bytes, height: int, width: int) -> tuple[int, Bytes]:
    pixels = np.zeros((height, width, 3), np.uint8)
    return decode_jpeg(data, height, width, pixels.reshape(-1), FUNCTIONS), pixels


def cut(data: Bytes, box: tuple[int, int, int, int], room: int | None = None) -> tuple[Bytes, tuple[int, ...]]:
    layout, ends = np.zeros(8, np.int64), np.zeros(10_000, np.int64)
    assert read_layout(data, layout)
    out = np.zeros(data.size if room is None else room, np.uint8)
    size, *place = cut_jpeg(data, *box, layout, ends, out, FUNCTIONS)
    return out[:size], tuple(place)


def boxes(height: int, width: int, num: int, seed: int) -> Iterator[tuple[int, int, int, int]]:
    random = np.random.default_rng(seed)
    for _ in range(num):
        h, w = int(random.integers(1, height + 1)), int(random.integers(1, width + 1))
        yield int(random.integers(0, height - h + 1)), int(random.integers(0, width - w + 1)), h, w


@pytest.mark.parametrize("sampling", list(MCU))
def test_a_crop_cut_out_of_the_stream_has_the_pixels_of_a_full_decode(photograph: Bytes, sampling: str) -> None:
    random = np.random.default_rng(1)
    for seed in range(12):
        height, width = (int(x) for x in random.integers(17, 420, 2))
        mcus_a_row = -(-width // MCU[sampling][1])
        interval = next((k for k in (2, 3, 4) if mcus_a_row % k == 0), 1)
        data = encode(photograph[:height, :width], sampling, interval)
        status, whole = decode(data, height, width)
        assert status == OK
        for top, left, h, w in boxes(height, width, 8, seed):
            part, (part_top, part_left, part_height, part_width) = cut(data, (top, left, h, w))
            status, pixels = decode(part, part_height, part_width)
            assert status == OK
            y, x = top - part_top, left - part_left
            assert np.array_equal(pixels[y : y + h, x : x + w], whole[top : top + h, left : left + w])


def test_a_small_crop_is_cut_from_a_small_part_of_the_data(photograph: Bytes) -> None:
    data = encode(photograph[:400, :480], "420", restart_interval(480))
    part, (_, _, height, width) = cut(data, (100, 100, 64, 64))
    assert height <= 64 + 2 * 16
    assert width <= 64 + 2 * 32
    assert part.size < data.size / 8


def test_the_layout_of_a_jpeg_is_read_from_its_header(photograph: Bytes) -> None:
    layout = np.zeros(8, np.int64)
    for sampling, (mcu_height, mcu_width) in MCU.items():
        assert read_layout(encode(photograph, sampling, 3), layout)
        assert (layout[MCU_HEIGHT], layout[MCU_WIDTH], layout[INTERVAL]) == (mcu_height, mcu_width, 3)


def test_what_cannot_be_cut_is_said_to_be_so(photograph: Bytes) -> None:
    layout = np.zeros(8, np.int64)
    pixels = photograph[:100, :160]
    assert not read_layout(encode(pixels, "420", 0), layout), "no restart markers"
    assert not read_layout(encode(pixels, "420", 2, cv2.IMWRITE_JPEG_PROGRESSIVE, 1), layout), "progressive"
    data = encode(pixels, "420", 2)
    for num_bytes in (0, 1, 3, 20, 200, 600):
        assert not read_layout(data[:num_bytes].copy(), layout), "cut off in the header"
    straddling, _ = cut(encode(pixels, "420", 3), (10, 10, 20, 20))  # 10 MCUs a row
    assert straddling.size == 0
    too_small, _ = cut(data, (10, 10, 20, 20), room=700)
    assert too_small.size == 0


def test_a_restart_marker_out_of_order_is_not_cut_and_the_whole_image_is_damaged(photograph: Bytes) -> None:
    data = encode(photograph[:100, :160], "420", 1)
    at = next(i for i in range(data.size - 1) if data[i] == 0xFF and data[i + 1] == 0xD3)
    data[at + 1] = 0xD5
    part, _ = cut(data, (60, 60, 30, 30))
    assert part.size == 0
    assert decode(data, 100, 160)[0] == CORRUPT


def test_a_damaged_jpeg_has_another_status_than_a_good_one(photograph: Bytes) -> None:
    data = encode(photograph[:100, :160], "420", 2)
    assert decode(data, 100, 161)[0] == WRONG_SIZE
    assert decode(data[: data.size // 2].copy(), 100, 160)[0] == CORRUPT
    assert decode(np.zeros(100, np.uint8), 100, 160)[0] == NO_JPEG
    assert decode(np.zeros(0, np.uint8), 100, 160)[0] == NO_JPEG


def scan_after_scan(pixels: Bytes, num_scans: int) -> Bytes:
    """A JPEG whose first component's scan comes again and again, which the format allows without limit.

    pixels: (h, w) grey.
    """
    grey = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_RST_INTERVAL, 0])[1].tobytes()
    frame, scan = grey.index(b"\xff\xc0"), grey.index(b"\xff\xda")
    components = b"".join(bytes((number, 0x11, 0)) for number in (1, 2, 3))
    header = grey[:frame] + b"\xff\xc0\x00\x11" + grey[frame + 4 : frame + 9] + b"\x03" + components
    header += grey[frame + 13 : scan]
    numbers = [1] * (num_scans - 2) + [2, 3]
    scans = b"".join(b"\xff\xda\x00\x08\x01" + bytes((number,)) + grey[scan + 6 : -2] for number in numbers)
    return np.frombuffer(header + scans + b"\xff\xd9", np.uint8).copy()


def test_a_jpeg_of_endless_scans_is_given_up_after_500(photograph: Bytes) -> None:
    pixels = np.ascontiguousarray(photograph[:32, :40, 0])
    for num_scans, expected in ((3, OK), (500, OK), (501, CORRUPT), (5000, CORRUPT)):
        status, decoded = decode(scan_after_scan(pixels, num_scans), 32, 40)
        assert status == expected, num_scans
        assert (status != OK) or decoded.std() > 10


def test_huffman_tables_without_a_picture_are_no_jpeg_even_for_a_size_of_zero(photograph: Bytes) -> None:
    data = encode(photograph[:32, :32], "420", 0).tobytes()
    start = data.index(b"\xff\xdb")
    tables = np.frombuffer(data[:2] + data[start : data.index(b"\xff\xc0")] + b"\xff\xd9", np.uint8).copy()
    assert decode(tables, 0, 0)[0] == NO_JPEG
    assert decode(tables, 32, 32)[0] == NO_JPEG


def test_no_mutation_of_a_jpeg_reads_or_writes_outside_its_buffers(photograph: Bytes) -> None:
    """2,000 mutated streams; guard bytes around every buffer stay as they are."""
    random = np.random.default_rng(5)
    data = encode(photograph[:90, :150], "420", 1)
    layout, ends = np.zeros(8, np.int64), np.full(1_000, -1, np.int64)
    out, pixels = np.full(data.size + 64, 77, np.uint8), np.full(90 * 150 * 3 + 64, 77, np.uint8)
    statuses = set()
    for _ in range(2_000):
        mutated = data.copy()
        for at in random.integers(0, data.size, int(random.integers(1, 6))):
            mutated[at] = random.integers(0, 256)
        mutated = mutated[: int(random.integers(1, data.size + 1))] if random.random() < 0.3 else mutated
        box = next(boxes(90, 150, 1, int(random.integers(1 << 30))))
        if read_layout(mutated, layout) and layout[1] == 90 and layout[2] == 150:
            size, _, _, height, width = cut_jpeg(mutated, *box, layout, ends[:900], out[: data.size], FUNCTIONS)
            if size:
                assert 0 < height <= 90
                assert 0 < width <= 150
                statuses.add(decode_jpeg(out[:size], height, width, pixels[: 90 * 150 * 3], FUNCTIONS))
        statuses.add(decode_jpeg(mutated, 90, 150, pixels[: 90 * 150 * 3], FUNCTIONS))
        assert (out[data.size :] == 77).all()
        assert (pixels[90 * 150 * 3 :] == 77).all()
        assert (ends[900:] == -1).all()
    assert {OK, NO_JPEG, WRONG_SIZE, CORRUPT} <= statuses
