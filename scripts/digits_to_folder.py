"""Write scikit-learn's handwritten digits as an ImageFolder of JPEGs: real images for the demo, without a download.

1797 scans of 8x8 pixels and 17 gray levels (UCI "Optical Recognition of Handwritten Digits", test part), enlarged
to 48x48. Every sixth image of a class goes to val/: 1501 and 296 images, the same ones on every machine.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIDE = 48  # pixels
BRIGHTEST = 16  # white in the scans
VAL_EVERY = 6
ORIGIN = "ORIGIN.txt"  # written last: its presence means that the folder is complete


def to_image(scan: np.ndarray) -> Image.Image:
    """Return a gray image of SIDE x SIDE pixels.   scan: (8, 8) floating, 0..16."""
    levels = np.rint(scan * (255 / BRIGHTEST)).astype(np.uint8)
    return Image.fromarray(levels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def claim(out: Path) -> None:
    """Mark out as incomplete. Raises FileExistsError if it has files that no such script wrote."""
    if out.exists() and any(out.iterdir()) and not (out / ORIGIN).exists():
        others = [path.name for path in out.iterdir() if path.name not in ("train", "val")]
        if others:
            raise FileExistsError(f"--out {out} contains other files ({others[0]}, ...); name a new folder")
    (out / ORIGIN).unlink(missing_ok=True)


def write_folder(out: Path) -> Counter[str]:
    """Write {train,val}/{0..9}/NNNN.jpg below out and return the number of images in each part."""
    claim(out)
    digits = load_digits()
    seen: Counter[int] = Counter()
    written: Counter[str] = Counter()
    for number, (scan, label) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
        seen[label] += 1
        part = "val" if seen[label] % VAL_EVERY == 0 else "train"
        path = out / part / str(label) / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_image(scan).save(path, quality=95)
        written[part] += 1
    (out / ORIGIN).write_text(f"{(__doc__ or '').strip()}\n\nWritten by scripts/digits_to_folder.py.\n")
    return written


def main() -> int:
    """Write the folder and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo_data/digits"), help="folder to write (%(default)s)")
    out = parser.parse_args().out
    try:
        written = write_folder(out)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {written['train']} training and {written['val']} validation images of 10 digits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
