"""Write an ImageFolder of very many tiny pictures, for measurements: hard links, so that they take little room.

The pictures of a class are the same file under many names: 1,281,167 pictures take 1,000 files and about 100 MB of
folders. `ffcv-convnext bench scale` makes such folders itself; this is for trying other commands by hand.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ffcv_convnext.bench.many_images import write_many_images


def main() -> int:
    """Write the folder and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write; its train/ and val/ must not exist")
    parser.add_argument("--num_images", type=int, default=1_281_167, help="in train (default %(default)s)")
    parser.add_argument("--num_val", type=int, default=1_000, help="in val (default %(default)s)")
    parser.add_argument("--num_classes", type=int, default=1_000, help="folders (default %(default)s)")
    parser.add_argument("--side", type=int, default=32, help="pixels of a side (default %(default)s)")
    options = parser.parse_args()
    try:
        for split, number in (("train", options.num_images), ("val", options.num_val)):
            write_many_images(options.out / split, number, options.num_classes, options.side)
            print(f"{options.out / split}: {number:,} pictures in {options.num_classes:,} folders")
    except (FileExistsError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
