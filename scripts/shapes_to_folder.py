"""Write generated pictures of textured shapes as an ImageFolder of JPEGs: 200 classes for the miniature ladder.

A class is one of 20 shapes filled with one of 10 textures. Everything else varies from picture to picture: place, size,
rotation, colours, the texture's scale and direction, light, noise, and smaller shapes of other classes around it. So
neither the outline nor the texture alone names the class, and colours say nothing. 30 training and 10 validation
pictures of each class, 64x64 pixels; the same pixels for the same --seed and version of numpy.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from digits_to_folder import ORIGIN, claim
from PIL import Image

SIDE = 64  # pixels
NUM_SHAPES = 20
TEXTURES = ("plain", "stripes", "grating", "checks", "dots", "rings", "zigzag", "bricks", "grains", "clouds")
NUM_TRAIN, NUM_VAL = 30, 10  # pictures of each class
NUM_CLUTTER = 2  # shapes of other classes in a picture
TURN = 40  # largest rotation, degrees


def outlines() -> np.ndarray:
    """Return the radius of each shape over the angle: (NUM_SHAPES, 360) float64, largest value 1.

    2 to 6 lobes, deep or shallow, with round or pointed notches between them.
    """
    angles = np.deg2rad(np.arange(360))
    radii = []
    for lobes in range(2, 7):
        wave = np.cos(lobes * angles)
        for depth in (0.35, 0.7):
            round_notches, pointed_notches = 0.5 + 0.5 * wave, np.abs(np.cos(lobes * angles / 2))
            radii += [1 - depth * (1 - notches) for notches in (round_notches, pointed_notches)]
    return np.array(radii)


def texture(kind: str, along: np.ndarray, across: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a texture's values, 0..1.   along, across: rotated coordinates in periods of the texture, of one shape."""
    whole_u, whole_v = np.floor(along), np.floor(across)
    u, v = along - whole_u, across - whole_v
    match kind:
        case "plain":
            return np.full(along.shape, 0.5)
        case "stripes":
            return (u < 0.5).astype(np.float64)
        case "grating":
            return 0.5 + 0.5 * np.sin(2 * np.pi * along)
        case "checks":
            return ((whole_u + whole_v) % 2).astype(np.float64)
        case "dots":
            return (np.hypot(u - 0.5, v - 0.5) < 0.3).astype(np.float64)
        case "rings":
            return (np.hypot(along, across) % 1 < 0.5).astype(np.float64)
        case "zigzag":
            return ((along + np.abs(v - 0.5)) % 1 < 0.5).astype(np.float64)
        case "bricks":
            shifted = (along + 0.5 * (whole_v % 2)) % 2
            return ((shifted > 0.2) & (v > 0.2)).astype(np.float64)
        case "grains":
            return rng.random(along.shape)
        case "clouds":
            directions, phases = rng.uniform(0, 2 * np.pi, (2, 12))
            waves = [
                np.sin(2 * np.pi * (np.cos(angle) * along + np.sin(angle) * across) * speed + phase)
                for angle, phase, speed in zip(directions, phases, rng.uniform(0.2, 0.7, 12), strict=True)
            ]
            return np.clip(0.5 + 0.2 * np.sum(waves, axis=0), 0, 1)
    raise ValueError(f"texture {kind}: expected one of {', '.join(TEXTURES)}")


def paint(
    canvas: np.ndarray, radii: np.ndarray, kind: str, centre: np.ndarray, size: float, rng: np.random.Generator
) -> None:
    """Paint one shape over canvas.   canvas: (SIDE, SIDE, 3) float64, 0..1.   size: largest radius, pixels."""
    y, x = np.mgrid[:SIDE, :SIDE] - centre[:, None, None]
    angles = np.rad2deg(np.arctan2(y, x)) + rng.uniform(-TURN, TURN)
    edge = size * np.interp(angles, np.arange(360), radii, period=360)
    cover = np.clip(edge - np.hypot(x, y) + 0.5, 0, 1)[..., None]  # one pixel of smooth edge
    direction, period = rng.uniform(0, 2 * np.pi), rng.uniform(6, 9)
    along = (np.cos(direction) * x + np.sin(direction) * y) / period + rng.uniform(0, 1)
    across = (-np.sin(direction) * x + np.cos(direction) * y) / period + rng.uniform(0, 1)
    dark, bright = rng.uniform(0, 1, (2, 3))
    bright = np.where(np.abs(bright - dark) < 0.4, (dark + 0.5) % 1, bright)  # a texture that can be seen
    values = texture(kind, along, across, rng)[..., None]
    canvas[:] = (1 - cover) * canvas + cover * (dark + (bright - dark) * values)


def draw(shape: int, kind: str, radii: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return one picture of a class: (SIDE, SIDE, 3) uint8.   radii: of all shapes, from `outlines`."""
    canvas = np.empty((SIDE, SIDE, 3))
    canvas[:] = rng.uniform(0, 1, 3)
    for _ in range(NUM_CLUTTER):
        other = radii[rng.integers(NUM_SHAPES)]
        where = rng.uniform(0, SIDE, 2)
        paint(canvas, other, TEXTURES[rng.integers(len(TEXTURES))], where, rng.uniform(5, 12), rng)
    size = rng.uniform(18, 28)
    paint(canvas, radii[shape], kind, SIDE / 2 + rng.uniform(-6, 6, 2), size, rng)
    slope = rng.uniform(-0.4, 0.4, 2)
    ramp = np.linspace(-1, 1, SIDE)
    light = rng.uniform(0.6, 1.1) * (1 + slope[0] * ramp[:, None] + slope[1] * ramp)[..., None]
    noisy = canvas * light + rng.normal(0, 0.03, canvas.shape)
    return np.rint(255 * np.clip(noisy, 0, 1)).astype(np.uint8)


def write_folder(out: Path, seed: int) -> Counter[str]:
    """Write {train,val}/SHAPE_TEXTURE/NN.jpg below out and return the number of images in each part."""
    claim(out)
    radii = outlines()
    written: Counter[str] = Counter()
    for shape in range(NUM_SHAPES):
        for kind in TEXTURES:
            for number in range(NUM_TRAIN + NUM_VAL):
                part = "train" if number < NUM_TRAIN else "val"
                path = out / part / f"shape{shape:02d}_{kind}" / f"{number:02d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                rng = np.random.default_rng((seed, shape, TEXTURES.index(kind), number))
                Image.fromarray(draw(shape, kind, radii, rng)).save(path, quality=95)
                written[part] += 1
    (out / ORIGIN).write_text(f"{(__doc__ or '').strip()}\n\nWritten by scripts/shapes_to_folder.py --seed {seed}.\n")
    return written


def main() -> int:
    """Write the folder and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo_data/shapes"), help="folder to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pictures (%(default)s)")
    options = parser.parse_args()
    try:
        written = write_folder(options.out, options.seed)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    classes = NUM_SHAPES * len(TEXTURES)
    print(f"{options.out}: {written['train']} training and {written['val']} validation images of {classes} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
