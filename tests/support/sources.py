"""The same pictures in every form that the converter reads: tars, shards, parquet files, lists, flat folders."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from support.imagefolder import make_image_folder

from ffcv_convnext.data.convert.imagenet import DEVKIT, TRAIN, VAL

Files = list[tuple[str, bytes]]


def make_imagenet(root: Path, *, num_classes: int = 3, train_per_class: int = 4, val_per_class: int = 2) -> Path:
    """Class folders with ImageNet's names. Numbers have different lengths, and val's are not in the classes' order."""
    make_image_folder(root, num_classes=num_classes, train_per_class=train_per_class, val_per_class=val_per_class)
    for split in ("train", "val"):
        for label, folder in enumerate(sorted((root / split).iterdir())):
            folder.rename(folder.parent / f"n{label * 7 + 1440764:08d}")
    for folder in (root / "train").iterdir():
        for number, path in enumerate(sorted(folder.iterdir())):
            path.rename(folder / f"{folder.name}_{(9, 10, 100, 2)[number % 4] + 1000 * (number // 4)}.JPEG")
    images = sorted((root / "val").glob("*/*"), key=lambda path: (path.name, path.parent.name))
    for number, path in enumerate(images, 1):
        path.rename(path.parent / f"ILSVRC2012_val_{number:08d}.JPEG")
    return root


def classes_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "train").iterdir())


def images_of(folder: Path, split: str) -> list[tuple[str, str, bytes]]:
    """Class, file name and content of each image, shuffled."""
    found = [(path.parent.name, path.name, path.read_bytes()) for path in sorted((folder / split).glob("*/*"))]
    random.Random(3).shuffle(found)
    return found


def pack(files: Iterable[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT, mtime: float = 0) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=form) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime  # type: ignore[assignment]  # webdataset writes fractions
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def class_archives(folder: Path, split: str) -> Files:
    return [
        (f"{name}.tar", pack((file, content) for each, file, content in images_of(folder, split) if each == name))
        for name in reversed(classes_of(folder))
    ]


def add_train_tar(folder: Path, root: Path) -> None:
    write(root / TRAIN, pack(class_archives(folder, "train")))


def add_class_tars(folder: Path, root: Path) -> None:
    for name, content in class_archives(folder, "train"):
        write(root / "train" / name, content)


def add_val_tar(folder: Path, root: Path) -> None:
    write(root / VAL, pack((file, content) for _, file, content in images_of(folder, "val")))
    add_devkit(folder, root)


def add_flat_val(folder: Path, root: Path) -> None:
    for _, file, content in images_of(folder, "val"):
        write(root / "val" / file, content)
    add_devkit(folder, root)


def add_folders(folder: Path, root: Path, split: str) -> None:
    for name, file, content in images_of(folder, split):
        write(root / split / name / file, content)


def add_devkit(folder: Path, root: Path) -> None:
    """ILSVRC2012's development kit; its IDs are in reverse order of the names."""
    import scipy.io

    classes = classes_of(folder)
    ids = {name: len(classes) - label for label, name in enumerate(classes)}
    kinds: Any = [("ILSVRC2012_ID", object), ("WNID", object)]
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array([(ids[name], name) for name in classes], dtype=kinds).reshape(-1, 1)})
    val = sorted((folder / "val").glob("*/*"), key=lambda path: path.name)
    truth = "".join(f"{ids[path.parent.name]}\n" for path in val).encode()
    kit = [("data/meta.mat", meta.getvalue()), ("data/ILSVRC2012_validation_ground_truth.txt", truth)]
    write(root / DEVKIT, gzip.compress(pack((f"ILSVRC2012_devkit_t12/{name}", content) for name, content in kit)))


def samples(folder: Path, split: str, style: str) -> list[Files]:
    """The files of each sample. style: cls, json or names."""
    classes = classes_of(folder)
    found = []
    for name, file, content in images_of(folder, split):
        key, label = Path(file).stem, str(classes.index(name))
        if style == "names":
            found.append([(f"{name}/{key}.jpg", content), (f"{name}/{key}.cls", name.encode())])
        elif style == "cls":
            found.append([(f"{key}.cls", label.encode()), (f"{key}.jpg", content), (f"{key}.txt", b"a caption")])
        else:
            facts = {"filename": f"{name}/{file}", "label": int(label), "width": 1}
            found.append(
                [(f"{key}.jpeg", content), (f"{key}.cls", label.encode()), (f"{key}.json", json.dumps(facts).encode())]
            )
    return found


def add_shards(folder: Path, root: Path, split: str, style: str, pattern: str, num_shards: int = 3) -> list[Path]:
    """pattern: of the shards' paths below root, with {} for the number."""
    found = samples(folder, split, style)
    return [
        write(
            root / pattern.format(i),
            pack((file for sample in found[i::num_shards] for file in sample), tarfile.PAX_FORMAT, mtime=1.5 * (i % 2)),
        )
        for i in range(num_shards)
    ]


def add_parquet(
    folder: Path, root: Path, split: str, *, num_files: int = 2, stated: bool = True, paths: bool = True, **options: Any
) -> list[Path]:
    """Hugging Face's layout. stated: class names are in the schema.   paths: file names are stored, in any order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    classes = classes_of(folder)
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())])
    features: dict[str, Any] = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": classes}}
    if stated:
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    found = images_of(folder, split) if paths else sorted(images_of(folder, split))
    rows = [
        {
            "image": {"bytes": content, "path": f"{Path(file).stem}_{name}.JPEG" if paths else None},
            "label": classes.index(name),
        }
        for name, file, content in found
    ]
    word = "validation" if split == "val" else split
    written = []
    for i in range(num_files):
        path = root / "data" / f"{word}-{i:05d}-of-{num_files:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(rows[len(rows) * i // num_files : len(rows) * (i + 1) // num_files], schema)
        pq.write_table(table, path, **{"row_group_size": 5, "data_page_size": 4096, **options})
        written.append(path)
    return written


def add_list(folder: Path, root: Path, split: str) -> Path:
    for name, file, content in images_of(folder, split):
        write(root / "images" / split / name / file, content)
    lines = [f"images/{split}/{name}/{file}\t{name}\n" for name, file, _ in images_of(folder, split)]
    return write(root / f"{split}.tsv", "".join(lines).encode())
