"""An ImageNet-like folder: synthetic images cut from a few photographs, or a part of an ImageFolder.

The photographs are those of scikit-image and scikit-learn, or of a given folder. Crops of them are scaled so that the
sizes are distributed like ImageNet's with a limit of 500 pixels: 464 x 396 on average, JPEG quality 90, about 60 kB. As
originals they have quality 95 and a tenth of them is 2.4 to 4 times as large, longer side 1200 to 2000; an enlargement
is smoother than a camera's picture, so its file is smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

NUM_CLASSES = 10
MAX_PHOTOGRAPHS = 100  # all of them are in memory
LARGE_SHARE, LARGE = 0.1, (2.4, 4.0)  # of originals: share that is enlarged, and the factor's range


def image_folder(out: Path, num: int, *, data_path: Path | None, photographs: Path | None, originals: bool) -> Path:
    """Make an ImageFolder out/train/<class>/: links to `num` training images of data_path, or synthetic images.

    photographs: a folder to cut images from; None: those of installed packages. Raises ValueError if both folders are
    given or no photographs are found, FileNotFoundError if data_path/train is missing.
    """
    if num < 1:
        raise ValueError(f"num_images = {num}: expected at least 1")
    if data_path is None:
        return write_synthetic_folder(out, num, photographs=photographs, originals=originals)
    if photographs is not None:
        raise ValueError("give --data_path (an ImageFolder, used as it is) or --photographs (cut to size), not both")
    return _link_some(data_path, out, num)


def find_photographs(folder: Path | None = None) -> list[Image.Image]:
    """Return RGB photographs of `folder` and the folders in it, or those that scikit-image and scikit-learn ship.

    At most MAX_PHOTOGRAPHS of a folder, evenly spread. Raises ValueError if there are none, or one is broken.
    """
    found = list(_shipped()) if folder is None else list(_read(folder))
    found = [image for image in found if min(image.size) >= 200]
    if not found:
        raise ValueError(
            "no photographs found (JPEG or PNG, at least 200 pixels); install scikit-image or scikit-learn, or give a "
            "folder of photographs: --photographs DIR, or an ImageFolder: --data_path DIR"
        )
    return found


def _read(folder: Path) -> Iterator[Image.Image]:
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in (".jpg", ".jpeg", ".png")]
    for file in files[:: max(1, -(-len(files) // MAX_PHOTOGRAPHS))]:
        try:
            with Image.open(file) as image:
                yield image.convert("RGB")
        except OSError as error:
            raise ValueError(f"{file} is not a picture ({error}); remove it, or give another folder") from None


def _shipped() -> Iterator[Image.Image]:
    try:
        from skimage import data

        for name in ("astronaut", "coffee", "chelsea", "rocket"):
            yield Image.fromarray(getattr(data, name)())
    except (ImportError, OSError):  # not installed, or a picture that would be downloaded
        pass
    try:
        from sklearn.datasets import load_sample_images

        yield from (Image.fromarray(image) for image in load_sample_images().images)
    except ImportError:
        pass


def write_synthetic_folder(
    out: Path, num: int, *, photographs: Path | None = None, originals: bool = False, seed: int = 0
) -> Path:
    """Write `num` synthetic JPEGs to out/train/<class>/ and return out."""
    sources = find_photographs(photographs)
    random = np.random.default_rng(seed)
    for i in range(num):
        folder = out / "train" / f"class{i % NUM_CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        source = sources[int(random.integers(len(sources)))]
        width, height = (
            (500, int(random.integers(330, 460))) if random.random() < 0.7 else (int(random.integers(330, 420)), 500)
        )
        share = random.uniform(0.7, 1.0) * min(source.width / width, source.height / height)
        box_width, box_height = int(width * share), int(height * share)
        left = int(random.integers(0, source.width - box_width + 1))
        top = int(random.integers(0, source.height - box_height + 1))
        factor = random.uniform(*LARGE) if originals and random.random() < LARGE_SHARE else 1.0
        crop = source.resize(
            (int(width * factor), int(height * factor)),
            Image.Resampling.BICUBIC,
            (left, top, left + box_width, top + box_height),
        )
        crop.save(folder / f"{i:06d}.jpg", quality=95 if originals else 90)
    return out


def _link_some(data_path: Path, out: Path, num: int) -> Path:
    """Link `num` training images of data_path, evenly spread, so that all contestants read the same ones."""
    from torchvision.datasets import ImageFolder

    if not (data_path / "train").is_dir():
        raise FileNotFoundError(f"data_path: {data_path / 'train'} not found; give an ImageFolder with train/")
    files = [Path(file) for file, _ in ImageFolder(str(data_path / "train")).samples]
    for index in np.unique(np.linspace(0, len(files) - 1, min(num, len(files))).astype(int)):
        link = out / files[index].relative_to(data_path)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(files[index].resolve())
    return out
