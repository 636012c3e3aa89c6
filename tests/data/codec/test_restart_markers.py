"""Giving JPEGs of any origin restart markers without a change of a pixel."""

from __future__ import annotations

import ctypes
import io
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support import REPOSITORY

from ffcv_convnext.bench.synthetic_data import find_photographs
from ffcv_convnext.data.codec.crop import HEIGHT, INTERVAL, MCU_WIDTH, WIDTH, cut_jpeg, read_layout
from ffcv_convnext.data.codec.decode import OK, addresses, decode_jpeg
from ffcv_convnext.data.codec.recompress import restart_interval
from ffcv_convnext.data.codec.restart_markers import NotTranscodable, add_restart_markers
from ffcv_convnext.data.codec.turbojpeg import library_path

Bytes = NDArray[np.uint8]
FUNCTIONS = addresses()
GREY = {"mode": "L"}
KINDS: dict[str, dict[str, Any]] = {
    "quality 30": {"quality": 30},
    "quality 75": {"quality": 75},
    "quality 100": {"quality": 100},
    "4:4:4": {"quality": 90, "subsampling": 0},
    "4:2:2": {"quality": 90, "subsampling": 1},
    "own Huffman tables": {"quality": 90, "optimize": True},
    "own Huffman tables, quality 20": {"quality": 20, "optimize": True, "subsampling": 0},
    "grey": {"quality": 90, **GREY},
    "RGB": {"quality": 90, "keep_rgb": True},
    "a marker a row": {"quality": 90, "restart_marker_rows": 1},
    "markers that straddle rows": {"quality": 90, "restart_marker_blocks": 7},
    "16-bit quantisation": {"qtables": [[300] * 64, [600] * 64]},
    "progressive": {"quality": 90, "progressive": True},
    "progressive 4:4:4": {"quality": 75, "progressive": True, "subsampling": 0},
    "progressive grey": {"quality": 90, "progressive": True, **GREY},
    "progressive RGB": {"quality": 75, "progressive": True, "keep_rgb": True},
}
CV2_SAMPLING = {"4:4:0": 0x121111, "4:1:1": 0x411111, "4:2:0": 0x221111}


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    return find_photographs()


@pytest.fixture(scope="module")
def small(photographs: list[Image.Image]) -> Image.Image:
    return photographs[0].resize((150, 90))


def save(image: Image.Image, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    image.convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def pillow(jpeg: bytes) -> Bytes:
    return np.asarray(Image.open(io.BytesIO(jpeg)))


def ours(jpeg: bytes | Bytes, height: int, width: int) -> Bytes:
    """By the decoder of training, which takes every complaint of libjpeg for an error."""
    pixels = np.zeros((height, width, 3), np.uint8)
    assert decode_jpeg(np.frombuffer(jpeg, np.uint8), height, width, pixels.reshape(-1), FUNCTIONS) == OK
    return pixels


def check(original: bytes, num_boxes: int = 2, decode: Callable[[bytes], Bytes] | None = pillow) -> bytes:
    """Transcode; compare all pixels and those of cut crops; look at the layout; transcode again."""
    jpeg = add_restart_markers(original)
    if decode is not None:
        assert np.array_equal(decode(jpeg), decode(original))
    data, layout, ends, out = np.frombuffer(jpeg, np.uint8), np.zeros(8, np.int64), np.zeros(9999, np.int64), None
    assert read_layout(data, layout)
    height, width, interval = int(layout[HEIGHT]), int(layout[WIDTH]), int(layout[INTERVAL])
    assert interval == restart_interval(width, int(layout[MCU_WIDTH]))
    whole = ours(original, height, width)
    assert np.array_equal(ours(jpeg, height, width), whole)
    out, random = np.zeros(data.size, np.uint8), np.random.default_rng(len(jpeg))
    for _ in range(num_boxes):
        h, w = int(random.integers(1, height + 1)), int(random.integers(1, width + 1))
        top, left = int(random.integers(0, height - h + 1)), int(random.integers(0, width - w + 1))
        size, cut_top, cut_left, *cut_size = cut_jpeg(data, top, left, h, w, layout, ends, out, FUNCTIONS)
        assert size > 0
        y, x = top - cut_top, left - cut_left
        assert np.array_equal(ours(out[:size], *cut_size)[y : y + h, x : x + w], whole[top : top + h, left : left + w])
    assert add_restart_markers(jpeg) == jpeg
    return jpeg


def num_markers(jpeg: bytes) -> int:
    return len(re.findall(rb"\xff[\xd0-\xd7]", jpeg))


def segments(jpeg: bytes) -> Iterator[tuple[int, bytes]]:
    """The marker segments up to the first scan."""
    at = 2
    while jpeg[at + 1] != 0xDA:
        length = int.from_bytes(jpeg[at + 2 : at + 4], "big")
        yield jpeg[at + 1], jpeg[at + 4 : at + 2 + length]
        at += 2 + length
    yield 0xDA, jpeg[at + 4 : at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")]


def join(parts: list[tuple[int, bytes]]) -> bytes:
    return b"".join(struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content for marker, content in parts)


def scan_data(jpeg: bytes) -> bytes:
    """What lies between the header of the first scan and the end marker, which must be the file's end."""
    assert jpeg.endswith(b"\xff\xd9")
    return jpeg[2 + len(join(list(segments(jpeg)))) : -2]


def with_frame(jpeg: bytes, change: Callable[[bytearray], None], marker: int = 0xC0) -> bytes:
    parts = []
    for found, content in segments(jpeg):
        if found == 0xC0:
            frame = bytearray(content)
            change(frame)
            parts.append((marker, bytes(frame)))
        else:
            parts.append((found, content))
    return b"\xff\xd8" + join(parts) + scan_data(jpeg) + b"\xff\xd9"


# --- pixels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_photograph_keeps_every_pixel_and_can_be_cut(photographs: list[Image.Image], kind: str) -> None:
    for photograph in photographs:
        original = save(photograph, **KINDS[kind])
        jpeg = check(original)
        # A marker takes 2 bytes and padding half a one; a DC from 0 instead of a difference takes up to a byte more in
        # each component. Baseline with T.81's Huffman tables is up to a quarter larger than progressive with its own.
        share = 1.25 if KINDS[kind].get("progressive") else 1
        assert len(jpeg) <= share * len(original) + 6 * num_markers(jpeg) + 100


def test_markers_make_photographs_of_usual_quality_a_few_percent_larger(photographs: list[Image.Image]) -> None:
    originals = [save(photograph, quality=90) for photograph in photographs]
    sizes = sum(len(add_restart_markers(original)) for original in originals)
    assert 1.01 < sizes / sum(map(len, originals)) < 1.05


@pytest.mark.parametrize("kind", ["4:2:0", "4:4:4", "4:2:2", "grey", "RGB", "progressive"])
def test_pictures_of_one_to_forty_pixels_keep_every_pixel(photographs: list[Image.Image], kind: str) -> None:
    for width in range(1, 41):
        for height in {width, 41 - width, 7 * width % 40 + 1}:
            check(save(photographs[0].crop((200, 100, 200 + width, 100 + height)), **KINDS.get(kind, {})))


@pytest.mark.parametrize("num_mcus", [11, 13, 17, 19, 23])
def test_rows_of_a_prime_number_of_mcus_keep_every_pixel(photographs: list[Image.Image], num_mcus: int) -> None:
    for mcu_width, kind in ((8, KINDS["4:4:4"]), (8, KINDS["grey"]), (16, KINDS["4:2:2"]), (16, KINDS["quality 75"])):
        width = num_mcus * mcu_width - 3
        jpeg = check(save(photographs[1].resize((width, 100)), **kind))
        assert num_markers(jpeg) == (13 - 1 if mcu_width == 8 else num_mcus * (13 if "subsampling" in kind else 7) - 1)


@pytest.mark.parametrize("sampling", list(CV2_SAMPLING))
@pytest.mark.parametrize("optimise", [0, 1])
@pytest.mark.parametrize("interval", [0, 1, 5])
def test_opencv_s_jpegs_keep_every_pixel(
    photographs: list[Image.Image], sampling: str, optimise: int, interval: int
) -> None:
    for size in ((500, 375), (333, 500), (33, 65)):
        options = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, CV2_SAMPLING[sampling], cv2.IMWRITE_JPEG_OPTIMIZE, optimise]
        options += [cv2.IMWRITE_JPEG_RST_INTERVAL, interval]
        check(cv2.imencode(".jpg", np.asarray(photographs[1].resize(size)), options)[1].tobytes())


def first_table(jpeg: bytes) -> bytes:
    """The DC table of luminance: 16 numbers of codes, then categories."""
    table = next(content for marker, content in segments(jpeg) if marker == 0xC4)
    assert table[0] == 0
    return table[1 : 17 + sum(table[1:17])]


def test_dc_tables_are_replaced_only_where_they_lack_a_category(photographs: list[Image.Image]) -> None:
    rows, columns = np.mgrid[:80, :96] // 8
    extreme = np.where((rows + columns) % 2 == 0, 0, 255).astype(np.uint8)  # differences of 2040
    ramp = np.broadcast_to(np.arange(120, 216, dtype=np.uint8), (80, 96))  # DC differences are small, DCs are not
    for pixels in (extreme, ramp):
        for mode in ("L", "RGB"):
            original = save(Image.fromarray(pixels), mode, quality=100, subsampling=0, optimize=True)
            assert len(first_table(original)) < 16 + 12
            assert first_table(check(original, num_boxes=20))[16:] == bytes(range(12))
    original = save(photographs[0], optimize=True)
    assert first_table(check(original)) == first_table(original) != first_table(save(photographs[0]))


def test_scans_of_one_component_each_are_interleaved(photographs: list[Image.Image]) -> None:
    for size, share in (((200, 120), 1), ((201, 119), 2), ((37, 23), 2)):
        planes = [photographs[0].resize(size).convert("YCbCr").getchannel(i) for i in range(3)]
        chroma = -(-size[0] // share), -(-size[1] // share)
        grey = [save(plane if i == 0 else plane.resize(chroma), "L", quality=90) for i, plane in enumerate(planes)]
        parts = dict(segments(grey[0]))
        frame = struct.pack(">BHHB", 8, size[1], size[0], 3)
        frame += bytes([1, 0x11 * share, 0, 2, 0x11, 0, 3, 0x11, 0])
        tables = [part for part in segments(grey[0]) if part[0] in (0xE0, 0xDB, 0xC4)]
        jpeg = b"\xff\xd8" + join([*tables, (0xC0, frame)])
        for i, each in enumerate(grey):
            jpeg += join([(0xDA, bytes([1, i + 1, 0, 0, 63, 0]))]) + scan_data(each)
        assert parts[0xDA][0] == 1
        check(jpeg + b"\xff\xd9")
        with pytest.raises(NotTranscodable, match="scans are missing"):
            add_restart_markers(jpeg[: jpeg.rindex(b"\xff\xda")] + b"\xff\xd9")


@pytest.mark.parametrize("flags", [0, 16384], ids=["sequential", "progressive"])
def test_arithmetic_coding_is_replaced(
    photographs: list[Image.Image], flags: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TJ_ARITHMETIC", "1")  # libturbojpeg's own switch
    library = ctypes.CDLL(str(library_path()))
    library.tjInitCompress.restype = ctypes.c_void_p
    handle, buffer, size = ctypes.c_void_p(library.tjInitCompress()), ctypes.c_void_p(), ctypes.c_ulong()
    pixels = np.ascontiguousarray(photographs[0])
    height, width, _ = pixels.shape
    source, result = ctypes.c_void_p(pixels.ctypes.data), (ctypes.byref(buffer), ctypes.byref(size))
    assert library.tjCompress2(handle, source, width, 0, height, 0, *result, 2, 90, flags) == 0
    original = ctypes.string_at(buffer, size.value)
    library.tjFree(buffer)
    library.tjDestroy(handle)
    if not {0xC9, 0xCA} & {marker for marker, _ in segments(original)}:
        pytest.skip("this libturbojpeg was built without arithmetic coding")
    check(original, decode=None)  # Pillow's libjpeg may lack it


# --- headers -----------------------------------------------------------------------------------------------------


def test_segments_that_pixels_do_not_depend_on_are_dropped(small: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = save(small)
    assert save(small, exif=exif, icc_profile=b"profile" * 99, comment=b"a comment", dpi=(72, 72)) != plain
    jpeg = check(save(small, exif=exif, icc_profile=b"profile" * 99, comment=b"a comment"))
    assert jpeg == add_restart_markers(plain)
    assert [marker for marker, _ in segments(jpeg)] == [0xE0, 0xDB, 0xC0, 0xC4, 0xDD, 0xDA]
    rgb = add_restart_markers(save(small, keep_rgb=True))
    assert next(marker for marker, _ in segments(rgb)) == 0xEE, "Adobe's segment tells that there is no YCbCr"


def test_fill_bytes_garbage_behind_the_picture_and_a_missing_end_marker_do_no_harm(small: Image.Image) -> None:
    for options in ({}, {"restart_marker_blocks": 7}):
        plain = save(small, **options)
        expected = add_restart_markers(plain)
        filled = plain[:2] + b"".join(b"\xff\xff\xff" + join([part]) for part in segments(plain))
        filled += re.sub(rb"(?=\xff[\xd0-\xd7])", b"\xff\xff", scan_data(plain)) + b"\xff\xff\xff\xd9"
        behind = plain[:-2] + b"\0\x12\x34" + plain[-2:] + plain
        for each in (filled, behind, plain + b"garbage", plain[:-2], plain[:-1], plain[:-2] + b"\xff\xff\xff"):
            assert add_restart_markers(each) == expected
        assert len(set(map(len, (filled, behind, plain)))) == 3


def factors(*values: int) -> Callable[[bytearray], None]:
    def change(frame: bytearray) -> None:
        frame[7::3] = bytes(values)

    return change


def put(at: int, value: bytes) -> Callable[[bytearray], None]:
    def change(frame: bytearray) -> None:
        frame[at : at + len(value)] = value

    return change


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda _: b"", "not a JPEG"),
        (lambda _: b"\x89PNG\r\n\x1a\n" + bytes(99), "not a JPEG"),
        (lambda jpeg: jpeg[:300], "header is truncated or damaged"),
        (lambda _: b"\xff\xd8\xff\xd9", "header is truncated or damaged"),
        (lambda jpeg: jpeg[:-400], "data is truncated"),
        (lambda jpeg: with_frame(jpeg, put(0, b"\x0c"), 0xC1), "of 12 bits, not 8"),
        (lambda jpeg: with_frame(jpeg, put(1, b"\0\0")), "150 x 0 pixels"),
        (lambda jpeg: with_frame(jpeg, put(3, b"\xff\xff")), "65535 x 90 pixels: expected 1 to 65500"),
        (lambda jpeg: with_frame(jpeg, put(1, b"\xff\0\xff\0")), "65280 x 65280 pixels: expected 178956970 at most"),
        (lambda jpeg: with_frame(jpeg, put(1, b"\x20\0\x20\0")), "data is truncated"),
        (lambda jpeg: with_frame(jpeg, put(8, b"\3")), "header is truncated or damaged"),  # a table there is not
        (lambda jpeg: with_frame(jpeg, bytearray.copy, 0xC3), "lossless or hierarchical"),
        (lambda jpeg: with_frame(jpeg, factors(0x21, 0x11, 0x12)), "sampling factors 2x1, 1x1, 1x2"),
        (lambda jpeg: with_frame(jpeg, factors(0x31, 0x11, 0x11)), "sampling factors 3x1, 1x1, 1x1"),
        (lambda jpeg: with_frame(jpeg, factors(0x22, 0x00, 0x11)), "sampling factors 2x2, 0x0, 1x1"),
        (lambda jpeg: with_frame(jpeg, factors(0x51, 0x51, 0x51)), "sampling factors 5x1, 5x1, 5x1"),
        (lambda jpeg: re.sub(rb"\xff\xc4.*?\xff\xda", b"\xff\xda", jpeg, flags=re.DOTALL), "no Huffman tables"),
    ],
)
def test_a_jpeg_that_cannot_be_transcoded_gives_the_reason(
    small: Image.Image, spoil: Callable[[bytes], bytes], reason: str
) -> None:
    with pytest.raises(NotTranscodable, match=reason):
        add_restart_markers(spoil(save(small)))


def test_four_colour_components_are_refused(small: Image.Image) -> None:
    for options in ({}, {"progressive": True}):
        with pytest.raises(NotTranscodable, match="4 colour components"):
            add_restart_markers(save(small, "CMYK", **options))


def test_progressive_data_with_a_missing_scan_is_an_error(small: Image.Image) -> None:
    """libjpeg smooths what such a file shows; its coefficients alone do not give these pixels."""
    jpeg = save(small, progressive=True)
    scans = [found.start() for found in re.finditer(rb"\xff\xda", jpeg)]
    assert len(scans) > 5
    for at in scans[1:]:
        with pytest.raises(NotTranscodable, match="scans are missing"):
            add_restart_markers(jpeg[:at] + b"\xff\xd9")
    with pytest.raises(NotTranscodable, match="libturbojpeg: "):
        add_restart_markers(jpeg[: scans[-1] + 100])


def test_neighbours_that_differ_by_more_than_11_bits_are_refused(small: Image.Image) -> None:
    """Possible where the original has a restart marker between them: DC 2047, end of block; DC -2047, end of block."""
    grey = save(small.crop((0, 0, 16, 8)), "L", restart_marker_blocks=1)
    header = b"\xff\xd8" + join(list(segments(grey)))
    # Codes of T.81, K.3: 11 bits follow: 111111110; end of block: 1010
    plus, minus = (int(f"111111110{11 * bit}1010", 2).to_bytes(3, "big") for bit in "10")
    plus, minus = (data.replace(b"\xff", b"\xff\0") for data in (plus, minus))
    check(header + plus + b"\xff\xd0" + plus + b"\xff\xd9")
    with pytest.raises(NotTranscodable, match="DC coefficient beyond 11 bits"):
        add_restart_markers(header + plus + b"\xff\xd0" + minus + b"\xff\xd9")


def test_restart_markers_out_of_order_are_refused(small: Image.Image) -> None:
    jpeg = save(small, restart_marker_blocks=7)
    with pytest.raises(NotTranscodable, match="restart marker out of order"):
        add_restart_markers(jpeg.replace(b"\xff\xd3", b"\xff\xd5"))


def test_grey_with_sampling_factors_keeps_every_pixel(small: Image.Image) -> None:
    check(with_frame(save(small, "L"), factors(0x22)))  # they mean nothing with one component


@pytest.mark.parametrize(
    ("sampling", "height"),
    [((0x22, 0x12, 0x12), 96), ((0x22, 0x21, 0x21), 96), ((0x12, 0x12, 0x12), 64), ((0x21, 0x21, 0x21), 64)],
)
def test_unusual_ways_to_write_a_usual_subsampling_keep_every_pixel(
    small: Image.Image, sampling: tuple[int, ...], height: int
) -> None:
    """Made from RGB, whose blocks all use one pair of Huffman tables: they may be taken for others."""

    def change(frame: bytearray) -> None:
        factors(*sampling)(frame)
        put(1, bytes([0, height]))(frame)

    check(with_frame(save(small.resize((128, 64)), keep_rgb=True), change), num_boxes=20)


# --- arbitrary files ---------------------------------------------------------------------------------------------


def test_a_truncated_file_is_an_error_unless_only_its_end_marker_is_missing(small: Image.Image) -> None:
    for options in ({}, {"restart_marker_blocks": 7}, {"optimize": True, "mode": "L"}):
        jpeg = save(small.resize((40, 24)), **options)
        for size in range(len(jpeg) - 2):
            with pytest.raises(NotTranscodable):
                add_restart_markers(jpeg[:size])
        assert add_restart_markers(jpeg[:-2]) == add_restart_markers(jpeg)


def mutations(jpegs: list[bytes], num: int, seed: int) -> Iterator[bytes]:
    """Flipped bits, other bytes, swapped bytes, cut-off ends, doubled and lost parts; half of them in the header."""
    random = np.random.default_rng(seed)
    for number in range(num):
        jpeg = bytearray(jpegs[number % len(jpegs)])
        end = len(jpeg) if random.random() < 0.5 else jpeg.index(b"\xff\xda") + 20
        kind = random.integers(6)
        for _ in range(int(random.integers(1, 4))):
            a, b = (int(x) for x in random.integers(2, min(end, len(jpeg)), 2))
            if kind == 0:
                jpeg[a] ^= 1 << int(random.integers(8))
            elif kind == 1:
                jpeg[a] = int(random.integers(256))
            elif kind == 2:
                jpeg[a], jpeg[b] = jpeg[b], jpeg[a]
            elif kind == 3:
                jpeg[a] = 0xFF
            elif kind == 4:
                del jpeg[a : a + int(random.integers(1, 9))]
            else:
                jpeg[a:a] = jpeg[b : b + int(random.integers(1, 9))]
        yield bytes(jpeg[: int(random.integers(len(jpeg)))] if random.random() < 0.1 else jpeg)


def victims(small: Image.Image) -> list[bytes]:
    kinds = (
        "quality 75",
        "own Huffman tables, quality 20",
        "grey",
        "4:2:2",
        "markers that straddle rows",
        "progressive",
    )
    return [save(small.crop((0, 0, 70, 50)), **KINDS[kind]) for kind in kinds]


def test_no_mutated_file_writes_outside_its_buffers_and_what_is_accepted_keeps_its_pixels(
    small: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3,000 files; every buffer has guard bytes on both sides."""
    empty, guard, buffers = np.empty, 4096, []

    def guarded(shape: Any, dtype: Any) -> Any:
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = empty(num_bytes + 2 * guard, np.uint8)
        raw[:] = 0xA5
        buffers.append(raw)
        return raw[guard : guard + num_bytes].view(dtype).reshape(shape)

    monkeypatch.setattr(np, "empty", guarded)
    reasons: dict[str, int] = {}
    num_compared = 0
    for jpeg in mutations(victims(small), 3_000, seed=3):
        buffers.clear()
        try:
            result = add_restart_markers(jpeg)
        except NotTranscodable as error:
            reasons[str(error)] = reasons.get(str(error), 0) + 1
            result = None
        for raw in buffers:
            assert (raw[:guard] == 0xA5).all()
            assert (raw[-guard:] == 0xA5).all()
        if result is not None:
            layout = np.zeros(8, np.int64)
            assert read_layout(np.frombuffer(result, np.uint8), layout)
            ours(result, int(layout[HEIGHT]), int(layout[WIDTH]))  # without a complaint
            try:
                expected = pillow(jpeg)
            except (OSError, SyntaxError, ValueError):
                continue  # Pillow reads more of the header than pixels need
            assert np.array_equal(pillow(result), expected)
            num_compared += 1
    assert num_compared > 300
    assert len(reasons) > 10


BOUNDS_CHECK = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:]
from numba.core import config
assert config.BOUNDSCHECK
import test_restart_markers as t
small = t.find_photographs()[0].resize((150, 90))
accepted = 0
for jpeg in [*t.victims(small), *t.mutations(t.victims(small), 1500, seed=4)]:
    try:
        accepted += len(t.add_restart_markers(jpeg)) > 0
    except t.NotTranscodable:
        pass
print(accepted)
"""


@pytest.mark.slow
def test_no_mutated_file_reads_or_writes_outside_its_buffers(tmp_path: Path) -> None:
    """Compiled again with numba's bounds checks, which raises IndexError."""
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", BOUNDS_CHECK, str(REPOSITORY), str(REPOSITORY / "tests"), str(here)],
        env={**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 200


def test_a_worker_needs_neither_ffcv_nor_torch(small: Image.Image, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(save(small, progressive=True))
    program = (
        "import sys\nfrom ffcv_convnext.data.codec.restart_markers import add_restart_markers\n"
        "print(len(add_restart_markers(open(sys.argv[1], 'rb').read())), {'ffcv', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.jpg")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split(maxsplit=1)[1].strip() == "set()"


def test_segments_are_32_to_64_pixels_wide_where_that_divides_a_row() -> None:
    for mcu_width in (8, 16, 32):
        for width in range(1, 2000):
            mcus, interval = -(-width // mcu_width), restart_interval(width, mcu_width)
            assert mcus % interval == 0
            possible = [mcu_width * k for k in range(1, mcus + 1) if mcus % k == 0]
            between = [pixels for pixels in possible if 32 <= pixels <= 64]
            if between:
                assert interval * mcu_width == between[0]
            elif mcu_width > 8 or any(16 <= pixels < 32 for pixels in possible):
                assert interval * mcu_width == max(pixels for pixels in possible if pixels < 32)
            else:
                assert interval * mcu_width == next((pixels for pixels in possible if pixels > 64), 8)
