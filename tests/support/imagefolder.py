"""Small ImageFolders of real JPEG and PNG files whose colours encode class and index, and the same in a tar."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ffcv_convnext.data.convert.source import Stamp


def class_name(label: int) -> str:
    return f"class_{label:02d}"


def draw_image(label: int, index: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return a smooth image, shape (height, width, 3), uint8, that JPEG and resizing hardly change.

    size: (width, height). Mean red encodes the label (mod 6), mean green the index (mod 8), in steps larger than any
    JPEG error; blue increases from left to right and decreases from top to bottom, so that flips and crops are visible.
    """
    width, height = size
    x = np.linspace(0, 1, width)[None, :]
    y = np.linspace(0, 1, height)[:, None]
    wave = 8 * np.sin(2 * np.pi * (x + y))
    channels = [30 + 36 * (label % 6) + wave, 30 + 26 * (index % 8) - wave, 60 + 140 * (0.7 * x + 0.3 * (1 - y))]
    rounded: NDArray[np.uint8] = np.stack([np.round(c + 0 * (x + y)) for c in channels], axis=-1).astype(np.uint8)
    return rounded


def identify(pixels: NDArray[np.uint8]) -> tuple[int, int]:
    """Return (label mod 6, index mod 8) of an image of any size, from its mean colours."""
    red, green = pixels[..., 0].mean(), pixels[..., 1].mean()
    return round((red - 30) / 36), round((green - 30) / 26)


def make_image_folder(
    root: Path,
    *,
    num_classes: int = 4,
    train_per_class: int = 8,
    val_per_class: int = 3,
    width: tuple[int, int] = (40, 90),
    height: tuple[int, int] = (40, 90),
    seed: int = 0,
) -> Path:
    """Draw `root`/train and `root`/val and return root. Every third file is a PNG, the others are JPEGs.

    width, height: min and max, pixels. An image of val has the colours of the image with its name in train.
    """
    sizes = np.random.default_rng(seed)
    for split, per_class in (("train", train_per_class), ("val", val_per_class)):
        for label in range(num_classes):
            folder = root / split / class_name(label)
            folder.mkdir(parents=True)
            for index in range(per_class):
                size = int(sizes.integers(*width, endpoint=True)), int(sizes.integers(*height, endpoint=True))
                image = Image.fromarray(draw_image(label, index, size))
                if index % 3 == 2:
                    image.save(folder / f"{index:03d}.png")
                else:
                    image.save(folder / f"{index:03d}.JPEG", quality=95)
    return root


@dataclass(frozen=True)
class TarSource:
    """Images of a tar file `class/name`: a second implementation of the converter's Source."""

    location: Path
    classes: tuple[str, ...]
    members: list[tuple[str, int, int]]  # name, first byte, number of bytes
    left_out: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def pack(cls, folder: Path, tar: Path) -> TarSource:
        """Write the files of an ImageFolder's split to a tar file."""
        with tarfile.open(tar, "w") as archive:
            archive.add(folder, arcname="", filter=lambda info: info)
        with tarfile.open(tar) as archive:
            members = sorted((info.name, info.offset_data, info.size) for info in archive if info.isfile())
        return cls(tar, tuple(sorted({name.split("/")[0] for name, _, _ in members})), members)

    def __len__(self) -> int:
        return len(self.members)

    def read(self, index: int) -> bytes:
        _, start, size = self.members[index]
        with open(self.location, "rb") as file:
            file.seek(start)
            return file.read(size)

    def label(self, index: int) -> int:
        return self.classes.index(self.name(index).split("/")[0])

    def name(self, index: int) -> str:
        return self.members[index][0]

    def stamp(self, index: int) -> Stamp:
        assert index >= 0
        return Stamp.of(self.location)

    def is_regular(self, index: int) -> bool:
        return index >= 0

    def select(self, indices: Sequence[int]) -> TarSource:
        return replace(self, members=[self.members[index] for index in indices])


def _blocks(*colours: tuple[int, ...]) -> NDArray[np.uint8]:
    """Four vertical bars of 16 x 48 pixels, aligned with JPEG's blocks. Shape (48, 64, channels)."""
    return np.repeat(np.array([colours], dtype=np.uint8), 16, axis=1).repeat(48, axis=0)


def draw_every_mode(folder: Path) -> dict[str, NDArray[np.uint8]]:
    """Draw one 64 x 48 image of each mode into `folder`; return file name -> expected RGB, computed by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    expected: dict[str, NDArray[np.uint8]] = {}

    def draw(name: str, image: Image.Image, rgb: NDArray[np.uint8], **options: object) -> None:
        image.save(folder / name, **options)
        expected[name] = rgb

    rgb = draw_image(1, 2, (64, 48))
    draw("rgb.png", Image.fromarray(rgb), rgb)
    draw("rgb.JPEG", Image.fromarray(rgb), rgb, quality=95)
    draw("png_inside.JPEG", Image.fromarray(rgb), rgb, format="PNG")
    draw("rgb.webp", Image.fromarray(rgb), rgb, lossless=True)
    draw("rgb.bmp", Image.fromarray(rgb), rgb)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation: rotate by 90 degrees, which torchvision's loader ignores
    draw("exif_rotated.jpg", Image.fromarray(rgb), rgb, quality=95, exif=rotated)

    ramp = np.tile(np.linspace(0, 65535, 64), (48, 1))
    grey = np.round(ramp / 257).astype(np.uint8)
    grey_rgb = np.repeat(grey[..., None], 3, axis=2)
    draw("grey.png", Image.fromarray(grey), grey_rgb)
    draw("grey.jpg", Image.fromarray(grey), grey_rgb, quality=95)
    draw("grey16.png", Image.fromarray(np.round(ramp).astype(np.uint16)), grey_rgb)
    draw("grey16.tif", Image.frombytes("I;16B", (64, 48), np.round(ramp).astype(">u2").tobytes()), grey_rgb)
    draw("grey32.tif", Image.fromarray(np.round(ramp).astype(np.int32)), grey_rgb)

    black, white = (0, 0, 0), (255, 255, 255)
    bits = Image.fromarray(_blocks(black, white, black, white)[..., 0]).convert("1")
    draw("bits.png", bits, _blocks(black, white, black, white))

    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (90, 90, 90)]
    indices = _blocks((0,), (1,), (2,), (3,))[..., 0]
    palette = Image.frombytes("P", (64, 48), indices.tobytes())
    palette.putpalette([value for colour in colours for value in colour])
    draw("palette.png", palette, _blocks(*colours))
    draw("palette_one_transparent.png", palette, _blocks(white, *colours[1:]), transparency=0)
    half = (30 + 225 * 127 / 255, 200 + 55 * 127 / 255, 30 + 225 * 127 / 255)  # alpha 128 on white
    draw(
        "palette_alpha.png",
        palette,
        _blocks(colours[0], tuple(round(value) for value in half), white, colours[3]),
        transparency=bytes([255, 128, 0, 255]),
    )

    bars = [(200, 30, 30, 255), (30, 200, 30, 128), (30, 30, 200, 0), (90, 90, 90, 255)]
    on_white = _blocks(colours[0], tuple(round(value) for value in half), white, colours[3])
    draw("rgba.png", Image.fromarray(_blocks(*bars)), on_white)
    grey_bars = _blocks((90, 255), (30, 128), (30, 0), (200, 255))
    grey_on_white = [(90,) * 3, (round(30 + 225 * 127 / 255),) * 3, white, (200,) * 3]
    draw("grey_alpha.png", Image.fromarray(grey_bars), _blocks(*grey_on_white))
    draw("rgb_key.png", Image.fromarray(_blocks(*colours)), _blocks(white, *colours[1:]), transparency=colours[0])

    inks = [(255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 0, 155), (0, 0, 0, 0)]
    draw(
        "cmyk.jpg",
        Image.frombytes("CMYK", (64, 48), _blocks(*inks).tobytes()),
        _blocks((0, 255, 255), (255, 0, 255), (100, 100, 100), white),
        quality=95,
    )
    # YCCK: Pillow writes CMYK only, inverted. So store (Y, Cb, Cr, K) = (55, 128, 128, 255) and declare the
    # transform in Adobe's marker. In Adobe's inverted scale this is cyan = magenta = yellow = 55, no black.
    ycck = folder / "ycck.jpg"
    Image.new("CMYK", (64, 48), (255 - 55, 255 - 128, 255 - 128, 0)).save(ycck)
    content = bytearray(ycck.read_bytes())
    marker = content.index(b"Adobe")
    assert content[marker + 11] == 0
    content[marker + 11] = 2
    ycck.write_bytes(content)
    expected["ycck.jpg"] = np.full((48, 64, 3), 200, dtype=np.uint8)
    return expected
