"""Decode mutated samples in memory with guarded edges; test_faults.py runs this file in a separate process.

The decoders are the real ones, in BatchDecoders of real .beton files. The mapped file, every scratch buffer and the
images end where a page begins that cannot be touched, and begin behind bytes that must stay as they are: reading or
writing behind an end kills the process, writing before a beginning is found afterwards. Scratch has the size that
the decoder asks for in a file of this one sample, so that its end is near. Where a mutated image is decoded without
complaint, that is done again over other old contents of all scratch: the pixels must be the same.

    python fuzz.py FOLDER NUM SEED [FIRST]     prints how often each status came, as JSON
"""

from __future__ import annotations

import ctypes
import faulthandler
import io
import json
import mmap
import random
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch
from ffcv.fields import IntField, RGBImageField
from ffcv.reader import Reader
from ffcv.types import ALLOC_TABLE_TYPE, HeaderType
from ffcv.writer import DatasetWriter
from numpy.typing import NDArray
from PIL import Image
from support.imagefolder import draw_image, make_image_folder

from ffcv_convnext.config import DataConfig
from ffcv_convnext.data.codec.decode import OK, REASONS
from ffcv_convnext.data.codec.recompress import restart_interval
from ffcv_convnext.data.convert.conversion import ConversionOptions, convert
from ffcv_convnext.data.load.crops import CropKernel, Key, Scratch, center_crop_kernel, random_crop_kernel
from ffcv_convnext.data.load.decoder import BatchDecoder
from ffcv_convnext.data.load.sampler import Samples
from ffcv_convnext.data.load.sources import Mmap, Stored

Bytes = NDArray[np.uint8]
PAGE, PATTERN, SIZE = mmap.PAGESIZE, 0xA5, 32
LIBC = ctypes.CDLL(None, use_errno=True)
LONGEST = 1 << 20  # bytes; no mutated image is longer
MAP_NORESERVE = 0x4000  # a damaged table asks for much more than is ever touched
SAMPLING = (0x111111, 0x211111, 0x221111, 0x121111, 0x411111)  # as cv2 names them
EXTREMES = (0, 1, 2, 7, 8, 255, 256, 65534, 65535)


class Guarded:
    """Memory that ends at an inaccessible page."""

    def __init__(self, num_bytes: int) -> None:
        self.end = (-(-num_bytes // PAGE) + 1) * PAGE
        self.region = mmap.mmap(-1, self.end + PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        page = ctypes.addressof(ctypes.c_char.from_buffer(self.region)) + self.end
        assert LIBC.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0, ctypes.get_errno()
        self.before = np.empty(0, np.uint8)

    def last(self, num_bytes: int) -> Bytes:
        """The last bytes; those before them must not change any more."""
        everything, start = np.frombuffer(self.region, np.uint8), self.end - num_bytes
        assert start >= 0
        self.before = everything[max(0, start - 256) : start]
        self.before[:] = PATTERN
        return everything[start : self.end]

    def check(self) -> None:
        assert (self.before == PATTERN).all(), "something wrote before the beginning of a buffer"


class Bench:
    """A decoder at work on guarded memory, one list of samples at a time, in this thread."""

    def __init__(self, beton: Path, kernel: CropKernel) -> None:
        self.decoder = BatchDecoder(beton, kernel, num_workers=1, batches_ahead=1, device=torch.device("cpu"))
        num = len(self.decoder)
        self.scratch: list[Guarded] = []
        self.place_scratch(self.decoder.rows, self.decoder.source.max_bytes)
        self.images, self.status = Guarded(num * SIZE * SIZE * 3), Guarded(num * 4)

    def place_scratch(self, rows: NDArray[Any], max_bytes: int) -> None:
        """Give the decoder the scratch that its kernel needs for these samples, its end at a guarded page."""
        guarded = iter(self.scratch)

        def allocate(size: int, dtype: Any) -> NDArray[Any]:
            num_bytes = size * np.dtype(dtype).itemsize
            memory = next(guarded, None)
            if memory is None:
                memory = Guarded(num_bytes + LONGEST)
                self.scratch.append(memory)
            return memory.last(num_bytes).view(dtype)

        sizes = self.decoder.kernel.scratch_sizes(rows, max_bytes)
        self.decoder._own.scratch = Scratch(**{name: allocate(*size) for name, size in sizes.items()})

    def decode(self, samples: list[int], stored: Stored, draws: tuple[int, int]) -> tuple[Bytes, NDArray[np.int32]]:
        """Images (n, SIZE, SIZE, 3) and status (n,) as views.   draws: seed, epoch."""
        num = len(samples)
        images = self.images.last(num * SIZE * SIZE * 3).reshape(num, SIZE, SIZE, 3)
        status = self.status.last(num * 4).view(np.int32)
        status[:] = -1
        batch: Any = SimpleNamespace(
            samples=Samples.of(np.array(samples)),
            data=SimpleNamespace(wait=lambda: stored),
            images=torch.from_numpy(images),
            status=status,
        )
        self.decoder._decode(batch, slice(0, num), Key(np.uint64(draws[0]), np.uint64(draws[1])))
        for guarded in (*self.scratch, self.images, self.status):
            guarded.check()
        return images, status

    def decode_one(
        self, sample: int, num_bytes: int, stored: Stored, draws: tuple[int, int], fill: int
    ) -> tuple[Bytes, int]:
        """Image and status, with scratch as for a file that holds nothing else, all its bytes equal to `fill`."""
        self.place_scratch(self.decoder.rows[sample : sample + 1], num_bytes)
        for memory in self.decoder._own.scratch:
            memory.view(np.uint8)[:] = fill
        images, status = self.decode([sample], stored, draws)
        return images[0].copy(), int(status[0])

    def close(self) -> None:
        self.decoder.close()


# --- mutations of a JPEG: each changes `jpeg`; `others` are more of the same size -------------------------------


def markers(jpeg: bytearray, low: int = 0xC0, high: int = 0xFE) -> list[int]:
    """Where 0xFF stands before a byte of that range."""
    return [i for i in range(2, len(jpeg) - 1) if jpeg[i] == 0xFF and low <= jpeg[i + 1] <= high]


def flip_bits(jpeg: bytearray, draw: random.Random, _others: list[bytes]) -> None:
    for _ in range(draw.randint(1, 8)):
        jpeg[draw.randrange(len(jpeg))] ^= 1 << draw.randrange(8)


def flip_header_bits(jpeg: bytearray, draw: random.Random, _others: list[bytes]) -> None:
    for _ in range(draw.randint(1, 4)):
        jpeg[draw.randrange(min(len(jpeg), 640))] ^= 1 << draw.randrange(8)


def set_bytes(jpeg: bytearray, draw: random.Random, _others: list[bytes]) -> None:
    start = draw.randrange(len(jpeg))
    end = min(len(jpeg), start + draw.choice((1, 2, 16, 300)))
    jpeg[start:end] = draw.choice((bytes(end - start), b"\xff" * (end - start), draw.randbytes(end - start)))


def truncate(jpeg: bytearray, draw: random.Random, _others: list[bytes]) -> None:
    del jpeg[draw.choice((0, 1, 2, 3, 4, draw.randrange(len(jpeg)), draw.randrange(len(jpeg)))) :]
    if draw.random() < 0.3:
        jpeg += b"\xff\xd9"


def become_garbage(jpeg: bytearray, draw: random.Random, _others: list[bytes]) -> None:
    start = draw.choice((0, 2, draw.randrange(len(jpeg))))
    jpeg[start:] = draw.randbytes(draw.randrange(2000))


def insert(jpeg: bytearray, draw: random.Random, _others: list[bytes]) -> None:
    at, start = draw.randrange(len(jpeg)), draw.randrange(len(jpeg))
    piece = draw.choice((b"\xff", b"\xff" * 50, b"\xff\xd9", bytes(jpeg[start : start + 200]), draw.randbytes(30)))
    jpeg[at:at] = piece * draw.choice((1, 1, 1, 40))


def delete(jpeg: bytearray, draw: random.Random, _others: list[bytes]) -> None:
    at = draw.randrange(len(jpeg))
    del jpeg[at : at + draw.choice((1, 2, 3, 100))]


def cross(jpeg: bytearray, draw: random.Random, others: list[bytes]) -> None:
    other = draw.choice(others)
    jpeg[draw.randrange(len(jpeg)) :] = other[draw.randrange(len(other)) :]


def shuffle_restarts(jpeg: bytearray, draw: random.Random, others: list[bytes]) -> None:
    """Restart markers out of order, missing, duplicated, or turned into other markers."""
    places = markers(jpeg, 0xD0, 0xD7)
    if not places:
        return insert(jpeg, draw, others)
    at = draw.choice(places)
    match draw.randrange(6):
        case 0:
            other = draw.choice(places)
            jpeg[at + 1], jpeg[other + 1] = jpeg[other + 1], jpeg[at + 1]
        case 1:
            del jpeg[at : at + 2]
        case 2:
            jpeg[at:at] = jpeg[at : at + 2] * draw.choice((1, 8, 500))
        case 3:
            jpeg[at + 1] = draw.choice((0xD0, 0xD7, 0xD8, 0xD9, 0xDA, 0xC0, 0xC4, 0xDD, 0xFF, 0x00))
        case 4:
            step = draw.randint(1, 7)
            for place in places[places.index(at) :]:
                jpeg[place + 1] = 0xD0 + (jpeg[place + 1] - 0xD0 + step) % 8
        case 5:  # segments without data
            jpeg[at:] = b"".join(bytes((0xFF, 0xD0 + i % 8)) for i in range(draw.choice((1, 30, 3000)))) + b"\xff\xd9"
    return None


def change_segment(jpeg: bytearray, draw: random.Random, others: list[bytes]) -> None:
    """A header segment's length, kind or contents; or the segment twice, or not at all."""
    places = [at for at in markers(jpeg) if jpeg[at + 1] in (0xC0, 0xC1, 0xC2, 0xC4, 0xDA, 0xDB, 0xDD, 0xE0, 0xEE)]
    if not places or (at := draw.choice(places)) + 4 > len(jpeg):
        return flip_bits(jpeg, draw, others)
    length = int.from_bytes(jpeg[at + 2 : at + 4], "big")
    match draw.randrange(5):
        case 0:
            length = draw.choice((*EXTREMES, length - 1, length + 1, len(jpeg) - at - 2, len(jpeg) - at - 3)) & 0xFFFF
            jpeg[at + 2 : at + 4] = length.to_bytes(2, "big")
        case 1:
            jpeg[at + 1] = draw.choice((0x01, 0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xC9, 0xCC, 0xD9, 0xDA, 0xDC, 0xDD, 0xFE))
        case 2:
            for _ in range(draw.randint(1, 10)):
                jpeg[min(at + 4 + draw.randrange(max(length, 1)), len(jpeg) - 1)] = draw.randrange(256)
        case 3:
            jpeg[at:at] = jpeg[at : at + 2 + length] * draw.choice((1, 1, 20))
        case 4:
            del jpeg[at : at + 2 + length]
    return None


def change_frame(jpeg: bytearray, draw: random.Random, others: list[bytes]) -> None:
    """Size, precision, number or sampling of the components: huge, zero, or only not what the table says."""
    places = [at for at in markers(jpeg, 0xC0, 0xC2) if at + 19 <= len(jpeg)]
    if not places:
        return flip_header_bits(jpeg, draw, others)
    at = places[0]
    for _ in range(draw.randint(1, 2)):
        match draw.randrange(4):
            case 0 | 1:
                side = at + draw.choice((5, 7))
                value = int.from_bytes(jpeg[side : side + 2], "big")
                value = draw.choice((*EXTREMES, value - 1, value + 1, 2 * value, value + 8)) & 0xFFFF
                jpeg[side : side + 2] = value.to_bytes(2, "big")
            case 2:
                jpeg[at + draw.choice((4, 9, 10, 12))] = draw.choice((0, 1, 2, 3, 4, 8, 12, 16, 255))
            case 3:
                jpeg[at + 11 + 3 * draw.randrange(3)] = draw.choice(
                    (0x00, 0x11, 0x21, 0x12, 0x22, 0x14, 0x41, 0x44, 0xFF)
                )
    return None


def change_interval(jpeg: bytearray, draw: random.Random, _others: list[bytes]) -> None:
    places = [at for at in markers(jpeg, 0xDD, 0xDD) if at + 6 <= len(jpeg)]
    value = draw.choice((0, 1, 2, 3, 4, 5, 7, 100, 65535)).to_bytes(2, "big")
    if places:
        jpeg[places[0] + 4 : places[0] + 6] = value
    elif scans := markers(jpeg, 0xDA, 0xDA):
        jpeg[scans[0] : scans[0]] = b"\xff\xdd\x00\x04" + value


Mutation = Callable[[bytearray, random.Random, list[bytes]], None]
MUTATIONS: tuple[Mutation, ...] = (
    flip_bits, flip_header_bits, set_bytes, truncate, become_garbage, insert, delete, cross, shuffle_restarts,
    shuffle_restarts, change_segment, change_segment, change_frame, change_frame, change_interval,
)  # fmt: skip


# --- the files ---------------------------------------------------------------------------------------------------


class Pictures:
    """For stock FFCV's writer, which stores half of them raw."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> tuple[Bytes, int]:
        return draw_image(i % 4, i, (1 + (37 * i) % 130, 1 + (53 * i) % 110)), i % 4


def write_files(folder: Path) -> list[Path]:
    """One file of ours, with restart markers, and one of stock FFCV's, without and half of it raw."""
    make_image_folder(folder / "images", num_classes=4, train_per_class=6, width=(1, 150), height=(1, 150))
    convert(ConversionOptions(data_path=folder / "images", out_dir=folder, split="train", num_workers=1))
    image = RGBImageField(write_mode="proportion", compress_probability=0.6)
    stock = folder / "stock.beton"
    DatasetWriter(str(stock), {"image": image, "label": IntField()}, num_workers=1).from_indexed_dataset(Pictures())
    return [folder / "train.beton", stock]


def encodings(width: int, height: int, index: int) -> list[bytes]:
    """A picture of that size as JPEGs of every kind: samplings, restart intervals, grey, progressive, CMYK."""
    pixels = draw_image(index % 4, index, (width, height))[:, :, ::-1]
    found = []
    for sampling in SAMPLING:
        for interval in (0, 1, restart_interval(width), 3):
            flags = [cv2.IMWRITE_JPEG_RST_INTERVAL, interval, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
            found.append(cv2.imencode(".jpg", pixels, flags)[1].tobytes())
    for options in ([cv2.IMWRITE_JPEG_RST_INTERVAL, 1], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]):
        found.append(cv2.imencode(".jpg", pixels, options)[1].tobytes())
        found.append(cv2.imencode(".jpg", np.ascontiguousarray(pixels[:, :, 0]), options)[1].tobytes())
    cmyk = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(cmyk, "JPEG")
    return [*found, cmyk.getvalue()]


def kernels() -> list[CropKernel]:
    config = DataConfig(input_size=SIZE)
    return [random_crop_kernel(config), center_crop_kernel(config)]


# --- two kinds of attack -----------------------------------------------------------------------------------------


def attack_images(betons: list[Path], num: int, seed: int, first: int, seen: Counter[str]) -> None:
    """Mutate one stored image at a time; it is the last thing in the file, so that reading past it shows."""
    benches = [[Bench(beton, kernel) for kernel in kernels()] for beton in betons]
    file = Guarded(max(beton.stat().st_size for beton in betons) + LONGEST)
    kinds = {}
    for which, (bench, _) in enumerate(benches):
        table = bench.decoder.rows
        for sample in range(len(table)):
            width, height = int(table["width"][sample]), int(table["height"][sample])
            kinds[which, sample] = encodings(width, height, sample)
    for number in range(first, first + num):
        draw = random.Random(f"{seed} {number}")
        which = draw.randrange(len(benches))
        decoder = benches[which][0].decoder
        sample = draw.randrange(len(decoder))
        row = decoder.rows[sample]
        original = draw.choice(kinds[which, sample])
        is_good = row["mode"] == 0 and original != kinds[which, sample][-1]  # libturbojpeg makes no RGB of CMYK
        if row["mode"] != 0 and draw.random() < 0.5:
            original, is_good = bytes(int(row["width"]) * int(row["height"]) * 3), True
        jpeg = bytearray(original)
        for _ in range(draw.choice((1, 1, 1, 1, 2, 3)) if number % 50 else 0):
            if jpeg:
                draw.choice(MUTATIONS)(jpeg, draw, kinds[which, sample])
        start = int(row["data_ptr"])
        content = file.last(start + len(jpeg))
        content[start:] = np.frombuffer(jpeg, np.uint8)
        seen["mutated" if jpeg != original else "unmutated"] += 1
        for bench in benches[which]:
            stored, draws = mapped(bench.decoder).stored, (seed, number)
            sizes = np.where(stored.addresses == start, np.uint64(len(jpeg)), stored.sizes)
            stored = stored._replace(content=content, sizes=sizes)
            image, status = bench.decode_one(sample, len(jpeg), stored, draws, fill=0)
            seen[describe(status)] += 1
            if status == OK:
                again, _ = bench.decode_one(sample, len(jpeg), stored, draws, fill=255)
                assert np.array_equal(image, again), f"{number}: pixels that are in no file"
                seen["mutated, decoded"] += jpeg != original
            else:
                assert jpeg != original or not is_good, f"{number}: {describe(status)}"
        file.check()
        if number % 2000 == 0:
            sys.stderr.write(f"{number}\n")
    for bench in (bench for pair in benches for bench in pair):
        bench.close()


def attack_tables(betons: list[Path], rounds: int, seed: int, seen: Counter[str]) -> None:
    """Mutate sample and allocation tables (addresses, lengths, sizes, modes, labels), and build loaders of the file."""
    damaged = betons[0].with_name("damaged.beton")
    for number in range(rounds):
        draw = random.Random(f"tables {seed} {number}")
        beton = draw.choice(betons)
        shutil.copyfile(beton, damaged)
        content = np.memmap(damaged, np.uint8, "r+")
        header = content[: HeaderType.itemsize].view(HeaderType)[0]
        reader = Reader(str(beton))
        start = HeaderType.itemsize + reader.field_descriptors.nbytes
        table = content[start : start + reader.metadata.nbytes].view(reader.metadata.dtype)
        allocations = content[int(header["alloc_table_ptr"]) :].view(ALLOC_TABLE_TYPE)
        wide = draw.choice((0, 1, 4000, 65535))
        for sample in range(len(table)):
            row, entry = table["f0"][sample : sample + 1], allocations[sample : sample + 1]
            places = (0, 1, content.size - 1, content.size, content.size + 1, 1 << 32, (1 << 63) - 1, (1 << 64) - 5)
            address, length = (
                draw.choice((*places, draw.randrange(content.size))),
                draw.choice((*places, 7, 600, 90_000)),
            )
            match draw.randrange(7):
                case 0:
                    row["data_ptr"] = entry["ptr"] = address
                case 1:
                    entry["size"] = length
                case 2:
                    row["data_ptr"] = entry["ptr"] = address
                    entry["size"] = length
                case 3:
                    row["data_ptr"] = draw.choice((address, int(table["f0"]["data_ptr"][draw.randrange(len(table))])))
                case 4:
                    row["width"] = draw.choice((wide, 0, 1, int(row["width"][0]) + 1, int(row["height"][0])))
                    row["height"] = draw.choice((4000, 0, 1, int(row["height"][0]) - 1, int(row["height"][0])))
                case 5:
                    row["mode"] = draw.choice((0, 1, 2, 255))
                case 6:
                    table["f1"][sample] = draw.choice((-1, 1 << 40, -(1 << 63)))
        content.flush()
        file = Guarded(content.size)
        whole = file.last(content.size)
        whole[:] = content
        for kernel in kernels():
            bench = Bench(damaged, kernel)
            stored = mapped(bench.decoder).stored._replace(content=whole)
            _, status = bench.decode(list(range(len(table))), stored, (seed, number))
            seen.update(describe(int(each)) for each in status)
            bench.close()


def mapped(decoder: BatchDecoder) -> Mmap:
    assert isinstance(decoder.source, Mmap)
    return decoder.source


def describe(status: int) -> str:
    return "ok" if status == OK else REASONS[status]  # KeyError: an unknown status


def main(folder: str, num: str, seed: str, first: str = "0") -> None:
    faulthandler.enable()
    warnings.simplefilter("error")
    betons = write_files(Path(folder))
    images: Counter[str] = Counter()
    tables: Counter[str] = Counter()
    attack_images(betons, int(num), int(seed), int(first), images)
    attack_tables(betons, 100, int(seed), tables)
    sys.stdout.write(json.dumps({"images": images, "tables": tables}))


if __name__ == "__main__":
    main(*sys.argv[1:])
