"""Loading real .beton files: pixels against Pillow and torchvision, batches against their description, errors."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from support.imagefolder import identify
from support.samples import COPY, lists, pack, pack_all
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from torchvision import transforms as T

ffcv_reader = pytest.importorskip("ffcv.reader")

from ffcv_convnext.augment import Normalisation, normalise  # noqa: E402
from ffcv_convnext.config import Config, DataConfig  # noqa: E402
from ffcv_convnext.data.beton.manifest import Manifest  # noqa: E402
from ffcv_convnext.data.convert.conversion import ConversionOptions, convert  # noqa: E402
from ffcv_convnext.data.load.crops import (  # noqa: E402
    Key,
    RandomCrop,
    center_crop_kernel,
    random_crop,
    random_crop_kernel,
)
from ffcv_convnext.data.load.decoder import BatchDecoder, SampleError  # noqa: E402
from ffcv_convnext.data.load.device import DeviceTransfer  # noqa: E402
from ffcv_convnext.data.load.loader import (  # noqa: E402
    EvalLoader,
    TrainLoader,
)
from ffcv_convnext.data.load.sampler import GlobalBatchSampler, Samples  # noqa: E402
from ffcv_convnext.rng import Stream, sample_words, uniform  # noqa: E402

CPU = torch.device("cpu")
Batches = list[tuple[Tensor, Tensor]]

# A fresh process, since stock FFCV changes numba's types for the whole process, and imports must be its first ones.
FRESH_PROCESS = """
import sys
import torch

threads = torch.get_num_threads() + 1
torch.set_num_threads(threads)
from ffcv_convnext.data.load.loader import EvalLoader, TrainLoader
assert torch.get_num_threads() == threads, "importing our loaders changed PyTorch's number of threads"

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter

class Pictures:
    def __len__(self):
        return 12
    def __getitem__(self, i):
        return np.random.default_rng(i).integers(0, 256, (50 + i, 70 - i, 3), dtype=np.uint8), i

image = RGBImageField(write_mode="proportion", compress_probability=0.5)
for path, names in zip(sys.argv[1:], (("image", "label"), ("picture", "target"))):
    DatasetWriter(path, dict(zip(names, (image, IntField()))), num_workers=1).from_indexed_dataset(Pictures())
"""


@pytest.fixture(scope="module")
def photo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of many sizes and both orientations as .beton: 22 for training, the same for validation."""
    datasets = pytest.importorskip("sklearn.datasets")
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for name, photograph in zip(("china", "flower"), datasets.load_sample_images().images, strict=True):
        folder = root / "images/train" / name
        folder.mkdir(parents=True)
        picture = Image.fromarray(photograph)
        picture.save(folder / "whole.png")
        picture.transpose(Image.Transpose.ROTATE_90).save(folder / "upright.png")
        picture.resize((37, 300)).save(folder / "narrow.png")
        picture.resize((300, 37)).save(folder / "flat.png")
        for number in range(7):
            size = int(random.integers(40, 640)), int(random.integers(40, 427))
            left, top = int(random.integers(0, 641 - size[0])), int(random.integers(0, 428 - size[1]))
            picture.crop((left, top, left + size[0], top + size[1])).save(folder / f"crop{number}.png")
    shutil.copytree(root / "images/train", root / "images/val")
    convert(ConversionOptions(data_path=root / "images", out_dir=root / "beton", split="all", num_workers=1))
    return root / "beton"


@pytest.fixture(scope="module")
def stock_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two files by stock FFCV's writer, half raw and half JPEG; the second one has fields of other names."""
    folder = tmp_path_factory.mktemp("stock")
    paths = folder / "stock.beton", folder / "foreign.beton"
    done = subprocess.run([sys.executable, "-c", FRESH_PROCESS, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return paths


@pytest.fixture
def own_dir(beton_dir: Path, tmp_path: Path) -> Path:
    """A copy of `beton_dir` that a test may damage."""
    return Path(shutil.copytree(beton_dir, tmp_path / "beton"))


def settings(data_path: Path | None, **changes: Any) -> DataConfig:
    return DataConfig(**{"data_path": data_path, "batch_size": 8, "input_size": 32, "num_workers": 2, **changes})


@pytest.fixture(scope="module")
def train(beton_dir: Path) -> TrainLoader:
    """80 pictures in batches of 8. Tests share it: a loader may be used any number of times."""
    return TrainLoader(settings(beton_dir), CPU, seed=0)


@pytest.fixture(scope="module")
def evaluation(beton_dir: Path) -> EvalLoader:
    return EvalLoader(settings(beton_dir), CPU)


def epoch(loader: TrainLoader, number: int = 0, first_step: int = 0) -> Batches:
    return [batch for step in loader.steps(number, first_step) for batch in step]


def same(ours: Batches, theirs: Batches) -> bool:
    """Whether two lists of batches are equal bit for bit."""
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True)
    )


def checksum(batch: tuple[Tensor, Tensor]) -> str:
    return hashlib.sha256(batch[0].numpy().tobytes() + batch[1].numpy().tobytes()).hexdigest()


def stored_picture(beton: Path, sample: int) -> Image.Image:
    """A sample as stock FFCV's tables describe it, decoded by Pillow."""
    reader = ffcv_reader.Reader(str(beton))
    field = reader.metadata["f0"][sample]
    (entry,) = reader.alloc_table[reader.alloc_table["ptr"] == field["data_ptr"]]
    with open(beton, "rb") as file:
        file.seek(int(entry["ptr"]))
        content = file.read(int(entry["size"]))
    if field["mode"] == 0:
        return Image.open(io.BytesIO(content)).convert("RGB")
    return Image.frombytes("RGB", (int(field["width"]), int(field["height"])), content)


def two_passes(picture: Image.Image, size: tuple[int, int], kind: Image.Resampling) -> Image.Image:
    """Pillow's resize, horizontal pass first: Pillow 13 chooses the other order for some shapes."""
    return picture.resize((size[0], picture.height), kind).resize(size, kind)


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """Call it in a thread; a hang is a TimeoutError."""
    return ThreadPoolExecutor(1).submit(function).result(seconds)


# --- pixels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"input_size": 96, "crop_pct": 1.0},
        {"input_size": 96, "eval_interpolation": "bilinear"},
        {"input_size": 384},  # warped, as in the paper's code
        {"input_size": 384, "eval_resize": "crop"},
        {"input_size": 96, "eval_resize": "warp"},
        {"input_size": 96, "eval_resize": "warp", "crop_pct": 0.75, "eval_interpolation": "bilinear"},
    ],
    ids=str,
)
def test_evaluation_equals_torchvision_s_resize_and_centre_crop_on_pillow_images(
    photo_dir: Path, changes: dict[str, Any]
) -> None:
    """Exactly, with Pillow's passes in the order of its versions up to 12; nearly where 13 swaps them."""
    config = settings(photo_dir, **{"input_size": 224, **changes})
    kind = Image.Resampling.BILINEAR if config.eval_interpolation == "bilinear" else Image.Resampling.BICUBIC
    side = (config.eval_side, config.eval_side) if config.eval_warps else config.eval_side
    resize, crop = T.Resize(side, T.InterpolationMode(config.eval_interpolation)), T.CenterCrop(config.input_size)
    images = torch.cat([images for images, _ in EvalLoader(config, CPU)]).permute(0, 2, 3, 1).numpy()
    assert len(images) == 22
    for sample, found in enumerate(images):
        picture = stored_picture(photo_dir / "val.beton", sample)
        resized = resize(picture)
        in_two_passes = two_passes(picture, resized.size, kind)
        assert np.array_equal(found, np.asarray(crop(in_two_passes))), (sample, picture.size)
        assert np.abs(found.astype(int) - np.asarray(crop(resized))).max() <= 16


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "vgg16", "coat_lite_medium_384"])
def test_a_timm_models_evaluation_images_are_those_of_timms_own_transform(photo_dir: Path, model: str) -> None:
    config = Config.from_flat({"model": model, "data_path": photo_dir, "batch_size": 8}).data
    cfg = timm.get_pretrained_cfg(model)
    transform = create_transform(**resolve_data_config(pretrained_cfg=cfg.to_dict()))
    images = torch.cat([images for images, _ in EvalLoader(config, CPU)])
    inputs = normalise(images, Normalisation.of(config))
    for sample, found in enumerate(inputs):
        expected = transform(stored_picture(photo_dir / "val.beton", sample))
        assert found.shape == expected.shape
        levels = (found - expected).abs() * torch.tensor(cfg.std)[:, None, None] * 255
        assert levels.mean() < 0.5, "Pillow 13 swaps the passes, which changes a few values"
        assert levels.max() <= 17


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_a_training_crop_equals_pillow_s_crop_resize_and_mirror(photo_dir: Path, interpolation: Any) -> None:
    seed, size, num = 5, 64, 22
    config = settings(photo_dir, input_size=size, train_interpolation=interpolation)
    loader = TrainLoader(config, CPU, seed=seed)
    pictures = [stored_picture(photo_dir / "train.beton", sample) for sample in range(num)]
    kinds, flips = set(), set()
    for number in range(6):
        ((images, _),) = loader.decoder.batches(lists(range(num)), seed, number)
        flip = uniform(sample_words(seed, number, np.arange(num, dtype=np.uint64), Stream.FLIP)[0]) < 0.5
        draw = uniform(sample_words(seed, number, np.arange(num, dtype=np.uint64), Stream.INTERPOLATION)[0])
        for sample, picture in enumerate(pictures):
            key = Key(np.uint64(seed), np.uint64(number))
            top, left, height, width = random_crop(
                key, sample, 0, picture.height, picture.width, RandomCrop(0.08, 1, 3 / 4, 4 / 3, 0.5, 1.0)
            )
            bicubic = {"bicubic": True, "bilinear": False, "random": draw[sample] < 0.5}[interpolation]
            kind = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
            crop = picture.crop((left, top, left + width, top + height))
            expected = np.asarray(two_passes(crop, (size, size), kind))
            expected = expected[:, ::-1] if flip[sample] else expected
            assert np.array_equal(images[sample].permute(1, 2, 0).numpy(), expected), (number, sample, picture.size)
            kinds.add(bool(bicubic))
            flips.add(bool(flip[sample]))
    assert len(kinds) == (2 if interpolation == "random" else 1)
    assert len(flips) == 2


def test_stock_ffcv_s_raw_and_jpeg_samples_are_read(stock_files: tuple[Path, Path]) -> None:
    beton, _ = stock_files
    assert set(ffcv_reader.Reader(str(beton)).metadata["f0"]["mode"]) == {0, 1}
    config = settings(beton.parent, crop_pct=1.0)
    loader = BatchDecoder(beton, center_crop_kernel(config), num_workers=2, batches_ahead=1, device=CPU)
    ((images, labels),) = loader.batches(lists(range(12)), 0, 0)
    assert labels.tolist() == list(range(12))
    transform = T.Compose([T.Resize(32, T.InterpolationMode.BICUBIC), T.CenterCrop(32)])
    for sample in range(12):
        expected = np.asarray(transform(stored_picture(beton, sample)))
        assert np.array_equal(images[sample].permute(1, 2, 0).numpy(), expected)


def test_images_go_with_their_labels(train: TrainLoader, evaluation: EvalLoader) -> None:
    for number, (images, labels) in enumerate([*epoch(train), *epoch(train, 1), *evaluation]):
        for image, label in zip(images, labels, strict=True):
            assert identify(image.permute(1, 2, 0).numpy())[0] == label, number


def test_batches_are_uint8_channels_last_with_int64_labels(train: TrainLoader, evaluation: EvalLoader) -> None:
    for images, labels in (epoch(train)[0], next(iter(evaluation))):
        assert images.shape == (8, 3, 32, 32)
        assert images.dtype == torch.uint8
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.shape == (8,)
        assert labels.dtype == torch.int64


# --- the crop's box ----------------------------------------------------------------------------------------------


def boxes(num: int, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]) -> NDArray[Any]:
    key = Key(np.uint64(7), np.uint64(3))
    return np.array(
        [random_crop(key, sample, 0, height, width, RandomCrop(*scale, *ratio, 0.5, 1.0)) for sample in range(num)]
    )


def boxes_of_torchvision(
    num: int, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> NDArray[Any]:
    image = torch.empty((3, height, width))
    torch.manual_seed(0)
    return np.array([T.RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(num)])


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (375, 500, (0.08, 1.0), (3 / 4, 4 / 3)),
        (500, 200, (0.08, 1.0), (3 / 4, 4 / 3)),  # most tries do not fit
        (64, 64, (0.35, 1.0), (1.0, 1.0)),
        (100, 300, (0.2, 0.5), (0.5, 3.0)),
    ],
)
def test_random_crops_are_distributed_like_torchvision_s(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    num = 4000
    ours, theirs = (f(num, height, width, scale, ratio) for f in (boxes, boxes_of_torchvision))
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()

    def describe(found: NDArray[Any]) -> NDArray[Any]:
        top, left, h, w = found.T.astype(float)
        values = np.stack([h * w / (height * width), np.log(w / h), (top + h / 2) / height, (left + w / 2) / width])
        return np.concatenate(
            [values.mean(axis=1), values.std(axis=1), np.quantile(values, [0.1, 0.9], axis=1).ravel()]
        )

    assert np.allclose(describe(ours), describe(theirs), atol=0.03)


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (20, 1000, (0.08, 1.0), (3 / 4, 4 / 3)),
        (1000, 20, (0.08, 1.0), (3 / 4, 4 / 3)),
        (7, 300, (0.5, 1.0), (3 / 4, 4 / 3)),
        (1, 1, (2.5, 3.0), (3 / 4, 4 / 3)),  # no try fits, and the aspect ratio does: everything
        (50, 60, (2.0, 3.0), (3 / 4, 4 / 3)),
    ],
)
def test_where_no_crop_fits_the_central_one_of_torchvision_is_taken(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    ours, theirs = (f(20, height, width, scale, ratio) for f in (boxes, boxes_of_torchvision))
    assert len(np.unique(ours, axis=0)) == 1
    assert np.array_equal(ours, theirs)


# --- which batches, and when -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 3])
def test_batches_do_not_depend_on_the_number_of_workers(beton_dir: Path, train: TrainLoader, num_workers: int) -> None:
    other = TrainLoader(settings(beton_dir, num_workers=num_workers, batches_ahead=num_workers + 1), CPU, seed=0)
    for number in (0, 1):
        assert same(epoch(other, number), epoch(train, number))
    other.close()


@pytest.mark.parametrize("batches_ahead", [1, 7, 100])
def test_batches_do_not_depend_on_how_many_are_decoded_in_advance(
    train: TrainLoader, batches_ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = epoch(train)
    monkeypatch.setattr(train.decoder, "batches_ahead", batches_ahead)
    assert same(epoch(train), expected)


def test_epochs_and_seeds_differ_and_repeat(train: TrainLoader) -> None:
    first, second = epoch(train, 0), epoch(train, 1)
    assert not same(first, second)
    assert same(epoch(train, 0), first)
    order = [labels.tolist() for _, labels in first]
    assert order != [labels.tolist() for _, labels in second]
    other = train.decoder.batches(train.sampler.micro_batches(80, 1, 0, rank=0), seed=1, epoch=0)
    assert [labels.tolist() for _, labels in other] != order


def test_the_same_sample_gets_another_crop_in_another_epoch(train: TrainLoader) -> None:
    found = [next(iter(train.decoder.batches(lists([3]), 0, number))) for number in range(8)]
    assert len({checksum(batch) for batch in found}) == 8


def test_batches_do_not_change_after_they_are_handed_out(train: TrainLoader) -> None:
    kept, sums = [], []
    for number in (0, 1):
        for step in train.steps(number):
            for batch in step:
                kept.append(batch)
                sums.append(checksum(batch))
    assert [checksum(batch) for batch in kept] == sums
    assert len({images.data_ptr() for images, _ in kept}) == len(kept)
    expected = epoch(train)
    for images, labels in train.decoder.batches(lists(range(8)) * 3, 0, 0):
        images.zero_()  # the caller's own: nothing else changes with it
        labels.zero_()
    assert same(epoch(train), expected)


@pytest.mark.parametrize("first_step", [1, 4, 9, 10])
def test_an_epoch_continues_from_any_step(train: TrainLoader, first_step: int) -> None:
    assert same(epoch(train, 2, first_step), epoch(train, 2)[first_step:])


def test_of_two_ranks_the_second_one_sees_every_second_micro_batch(beton_dir: Path, train: TrainLoader) -> None:
    """A rank that accumulates two has both: see test_sampler.py."""
    alone = epoch(train, 3)
    loader = TrainLoader(settings(beton_dir), CPU, seed=0, rank=1, world=2)
    assert loader.steps_per_epoch == 5
    assert same(epoch(loader, 3), alone[1::2])
    assert same(epoch(loader, 3, first_step=2), alone[5::2])


def test_a_step_is_update_freq_micro_batches(train: TrainLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = epoch(train)
    monkeypatch.setattr(train, "sampler", GlobalBatchSampler(8, 3, 1))
    monkeypatch.setattr(train, "steps_per_epoch", 3)
    steps = [list(step) for step in train.steps(0)]
    assert [len(step) for step in steps] == [3, 3, 3]
    assert same([batch for step in steps for batch in step], alone[:9])


@pytest.mark.parametrize("changes", [{}, {"order": "quasi_random", "shuffle_window_mb": 8, "data_cache": "process"}])
def test_copies_of_a_sample_have_its_label_and_different_crops(
    beton_dir: Path, train: TrainLoader, changes: dict[str, Any]
) -> None:
    """Two global batches of 24: 8 samples, three times each, in three micro-batches."""
    config = settings(beton_dir, update_freq=3, repeated_aug=3, **changes)
    repeating = TrainLoader(config, CPU, seed=0)
    assert repeating.steps_per_epoch == 3
    found = epoch(repeating, 1)
    for number, step in enumerate(pack_all(repeating.samples(1)).reshape(3, 24)):
        images, labels = (torch.cat(parts) for parts in zip(*found[3 * number : 3 * number + 3], strict=True))
        for sample in np.unique(step % COPY).tolist():
            copies = [images[step == sample + copy * COPY][0] for copy in range(3)]
            assert len({copy.numpy().tobytes() for copy in copies}) == 3, "each has another crop"
            assert len(set(labels[step % COPY == sample].tolist())) == 1
            ((alone, label),) = train.decoder.batches(lists([sample]), 0, 1)
            assert torch.equal(copies[0], alone[0]), "the first one is that of an epoch without copies"
            assert label == labels[step % COPY == sample][0]
    assert same(epoch(repeating, 1, first_step=2), found[6:]), "an epoch continues"
    ranks = [
        TrainLoader(settings(beton_dir, repeated_aug=3, num_workers=1, **changes), CPU, seed=0, rank=rank, world=3)
        for rank in range(3)
    ]
    in_turn = [batch for at_once in zip(*(epoch(rank, 1) for rank in ranks), strict=True) for batch in at_once]
    assert same(in_turn, found), "neither ranks nor workers matter"
    for loader in (repeating, *ranks):
        loader.close()


def test_a_copy_s_crop_and_flip_are_drawn_for_its_number(photo_dir: Path) -> None:
    loader = TrainLoader(settings(photo_dir, input_size=64), CPU, seed=5)
    samples = Samples(np.arange(22), np.full(22, 2))
    ((images, _),) = loader.decoder.batches([samples], 5, 1)
    listed = pack(samples)
    flip = uniform(sample_words(5, 1, listed.astype(np.uint64), Stream.FLIP)[0]) < 0.5
    assert 0 < flip.sum() < 22
    for sample in range(22):
        picture = stored_picture(photo_dir / "train.beton", sample)
        top, left, height, width = random_crop(
            Key(np.uint64(5), np.uint64(1)),
            sample,
            2,
            picture.height,
            picture.width,
            RandomCrop(0.08, 1, 3 / 4, 4 / 3, 0.5, 1.0),
        )
        crop = picture.crop((left, top, left + width, top + height))
        expected = np.asarray(two_passes(crop, (64, 64), Image.Resampling.BICUBIC))
        assert np.array_equal(images[sample].permute(1, 2, 0), expected[:, ::-1] if flip[sample] else expected)


def test_more_copies_than_a_global_batch_holds_are_refused(beton_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"repeated_aug = 9: .* the global batch of 8"):
        TrainLoader(settings(beton_dir, repeated_aug=9), CPU, seed=0)


def test_an_epoch_left_early_leaves_no_work_behind_and_the_loader_usable(
    train: TrainLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = epoch(train)
    started, running = [], []
    decode = train.decoder._decode

    def watched(*arguments: Any) -> None:
        started.append(1)
        running.append(1)
        decode(*arguments)
        running.pop()

    monkeypatch.setattr(train.decoder, "_decode", watched)
    num_threads = threading.active_count()
    for _ in range(10):
        steps = train.steps(0)
        next(next(steps))
        steps.close()
        assert not running
    num_started = len(started)
    assert num_started < 10 * 10, "batches that were not requested were not decoded"
    for step in train.steps(0):  # left inside a step, without closing
        next(step)
        break
    assert threading.active_count() == num_threads
    assert same(epoch(train), expected)


def test_two_loaders_can_be_read_in_turn_and_at_once(train: TrainLoader, evaluation: EvalLoader) -> None:
    alone = epoch(train), list(evaluation)
    in_turn: tuple[Batches, Batches] = [], []
    iterators: list[Iterator[Any]] = [(batch for step in train.steps(0) for batch in step), iter(evaluation)]
    for number in range(13):
        which = number % 2 if number < 6 else 0
        in_turn[which].append(next(iterators[which]))
    assert all(same(found, expected) for found, expected in zip(in_turn, alone, strict=True))
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(epoch, train), pool.submit(list, evaluation)] * 2
        assert same(jobs[0].result(60), alone[0])
        assert same(jobs[1].result(60), alone[1])


def test_one_loader_can_be_read_twice_at_once(train: TrainLoader) -> None:
    together = list(zip(epoch(train, 0), epoch(train, 1), strict=True))
    iterators = [(batch for step in train.steps(number) for batch in step) for number in (0, 1)]
    found = list(zip(*iterators, strict=True))
    for mine, other in zip(found, together, strict=True):
        assert same(list(mine), list(other))


def test_waiting_is_measured(train: TrainLoader) -> None:
    before = train.wait_s
    epoch(train)
    assert 0 < train.wait_s - before < 60


def test_numbers_of_classes_samples_and_steps(train: TrainLoader, evaluation: EvalLoader) -> None:
    assert (train.num_classes, train.num_samples, train.steps_per_epoch) == (4, 80, 10)
    assert (evaluation.num_classes, evaluation.num_samples) == (4, 20)


# --- evaluation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 7, 30])
def test_evaluation_shares_each_image_once_among_the_ranks(beton_dir: Path, world: int) -> None:
    loaders = [EvalLoader(settings(beton_dir), CPU, rank=rank, world=world) for rank in range(world)]
    samples = [batch for loader in loaders for batch in loader.samples]
    assert pack_all(samples).tolist() == list(range(20))
    if world == 30:
        assert list(loaders[29]) == []


def test_a_rank_s_evaluation_batches_are_its_part_of_the_whole_and_leave_pytorch_s_threads_alone(
    beton_dir: Path, evaluation: EvalLoader
) -> None:
    alone = torch.cat([images for images, _ in evaluation])
    threads = torch.get_num_threads() + 3
    torch.set_num_threads(threads)
    loader = EvalLoader(settings(beton_dir, batch_size=3), CPU, rank=1, world=3)
    batches = list(loader)
    assert torch.get_num_threads() == threads, "neither building nor reading it changes PyTorch's number of threads"
    assert [labels.tolist() for _, labels in batches] == [[1, 1, 1], [2, 2, 2], [2]]
    assert torch.equal(torch.cat([images for images, _ in batches]), alone[7:14])
    assert same(list(loader), batches)


# --- damage ------------------------------------------------------------------------------------------------------


def flip_first_byte(jpeg: bytearray) -> None:
    jpeg[0] ^= 0xFF


def change_height(jpeg: bytearray) -> None:
    jpeg[jpeg.index(b"\xff\xc0") + 6] ^= 1


def put_a_marker_in_the_middle(jpeg: bytearray) -> None:
    middle = (jpeg.index(b"\xff\xda") + len(jpeg)) // 2
    jpeg[middle : middle + 2] = b"\xff\xc4"


def zero_the_second_half(jpeg: bytearray) -> None:
    half = (jpeg.index(b"\xff\xda") + len(jpeg)) // 2
    jpeg[half:] = bytes(len(jpeg) - half)


def zero_everything(jpeg: bytearray) -> None:
    jpeg[:] = bytes(len(jpeg))


def zero_the_tables(jpeg: bytearray) -> None:
    start = jpeg.index(b"\xff\xc4")
    jpeg[start + 4 : start + 24] = b"\xff" * 20


DAMAGES = {
    1: flip_first_byte,
    3: change_height,
    5: put_a_marker_in_the_middle,
    7: zero_the_second_half,
    9: zero_everything,
    11: zero_the_tables,
}


def damage(beton: Path, harms: dict[int, Callable[[bytearray], None]]) -> None:
    """Damage some samples, each in its own way; tables and manifest stay as they are."""
    reader = ffcv_reader.Reader(str(beton))
    with open(beton, "r+b") as file:
        for sample, harm in harms.items():
            pointer = reader.metadata["f0"][sample]["data_ptr"]
            (entry,) = reader.alloc_table[reader.alloc_table["ptr"] == pointer]
            file.seek(int(pointer))
            jpeg = bytearray(file.read(int(entry["size"])))
            harm(jpeg)
            file.seek(int(pointer))
            file.write(jpeg)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_sample_is_an_error_that_names_it_and_its_file(own_dir: Path, split: str) -> None:
    """Crops that need the whole picture: a crop that does not touch the damage comes out right without an error."""
    damage(own_dir / f"{split}.beton", DAMAGES)
    config = settings(own_dir, scale=(1.0, 1.0), ratio=(0.4, 2.5), check_data="never")
    loader = TrainLoader(config, CPU, seed=0) if split == "train" else EvalLoader(config, CPU)
    manifest = Manifest.for_beton(own_dir / f"{split}.beton")
    for sample, harm in DAMAGES.items():

        def read(sample: int = sample) -> list[Any]:
            return list(loader.decoder.batches(lists([0, 2], [4, sample, 6], [8]), 0, 0))

        with pytest.raises(SampleError) as caught:
            within(60, read)
        message = str(caught.value)
        name = manifest.original_file(own_dir / f"{split}.beton", sample)
        assert f"{split}.beton: sample {sample} (original file: {name}) cannot be decoded: its " in message, harm
        assert "write_ffcv_dataset.py --overwrite" in message
        assert "\n" not in message
    found = loader.decoder.batches(lists([0], [1], [2]), 0, 0)
    next(found)  # what comes before the damage comes out
    with pytest.raises(SampleError, match="sample 1 "):
        next(found)
    assert next(found, None) is None
    good = [sample for sample in range(12) if sample not in DAMAGES]
    ((images, labels),) = loader.decoder.batches(lists(good), 0, 0)  # the loader still works
    assert [identify(image.permute(1, 2, 0).numpy())[0] for image in images] == labels.tolist()


def test_bad_samples_skip_replaces_a_bad_training_sample_by_the_next_good_one(
    own_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(own_dir / "train.beton", {5: zero_everything, 6: flip_first_byte, 9: zero_everything})
    config = settings(own_dir, bad_samples="skip", check_data="never")
    loader = TrainLoader(config, CPU, seed=0)
    with caplog.at_level("WARNING"):
        ((images, labels),) = loader.decoder.batches(lists([4, 5, 6, 27, 8, 9]), 0, 0)
    assert torch.equal(images[1], images[3]), "the next good one stands in, here for two"
    assert torch.equal(images[2], images[3])
    assert torch.equal(images[5], images[0]), "from the end on, the first"
    stored = loader.decoder.labels
    assert labels.tolist() == stored[[4, 27, 27, 27, 8, 4]].tolist()
    assert loader.num_replaced == 3
    assert "sample 9 (original file: " in caplog.text
    assert "replaced by sample 4" in caplog.text
    with pytest.raises(SampleError):
        list(loader.decoder.batches(lists([5, 6]), 0, 0))  # nothing good to take
    damage(own_dir / "val.beton", {3: zero_everything})
    with pytest.raises(SampleError, match="sample 3 "):
        list(EvalLoader(config, CPU))  # an evaluation that left images out would not be exact


def test_a_crop_that_does_not_touch_the_damage_comes_out_right(photo_dir: Path, tmp_path: Path) -> None:
    """Of a JPEG with restart markers only the part that holds the crop is decoded."""
    own = Path(shutil.copytree(photo_dir, tmp_path / "beton"))
    beton, epochs = own / "train.beton", range(20)
    high_up = []  # (sample, epoch) of crops that end in the upper third
    for sample in range(22):
        width, height = stored_picture(beton, sample).size
        for number in epochs:
            key = Key(np.uint64(0), np.uint64(number))
            top, _, rows, _ = random_crop(key, sample, 0, height, width, RandomCrop(0.08, 1.0, 3 / 4, 4 / 3, 0.5, 1.0))
            if top + rows < height / 3:
                high_up.append((sample, number))
    assert len(high_up) > 5
    loader = TrainLoader(settings(own), CPU, seed=0)

    def read() -> Batches:
        return [next(loader.decoder.batches(lists([sample]), 0, number)) for sample, number in high_up]

    before = read()
    damage(beton, {sample: zero_the_second_half for sample, _ in high_up})
    assert same(read(), before)


def test_an_error_inside_a_worker_surfaces(train: TrainLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = epoch(train)
    decode, calls = train.decoder._decode, iter(range(1000))

    def fail_at_the_third(*arguments: Any) -> None:
        if next(calls) == 2:
            raise MemoryError("no memory")
        decode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train.decoder, "_decode", fail_at_the_third)
        with pytest.raises(SampleError, match=r"decoding samples \[\d+, .*\] failed: MemoryError\('no memory'\)"):
            within(60, lambda: epoch(train))
    assert same(epoch(train), expected)


# --- what is refused before work begins --------------------------------------------------------------------------


def remove_beton(folder: Path) -> None:
    (folder / "train.beton").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / "train.json").unlink()


def cut_off(folder: Path) -> None:
    with open(folder / "train.beton", "r+b") as file:
        file.truncate((folder / "train.beton").stat().st_size // 2)


def forget_classes(folder: Path) -> None:
    manifest = json.loads((folder / "train.json").read_text())
    manifest["classes"] = manifest["classes"][:2]
    manifest["class_to_idx"] = {name: index for index, name in enumerate(manifest["classes"])}
    (folder / "train.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (
            remove_beton,
            FileNotFoundError,
            r"train\.beton does not exist; create it with: python write_ffcv_dataset\.py",
        ),
        (remove_manifest, ValueError, r"train\.beton has no manifest train\.json"),
        (cut_off, ValueError, r"train\.beton has \d+ bytes, its manifest states \d+"),
        (forget_classes, ValueError, r"labels 0 to 3 do not fit 2 classes"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_refused_in_one_line(
    own_dir: Path, harm: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    harm(own_dir)
    with pytest.raises(error, match=message) as caught:
        TrainLoader(settings(own_dir), CPU, seed=0)
    assert "\n" not in str(caught.value)


def test_a_missing_data_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data_path is not set; give the folder with train"):
        TrainLoader(settings(None), CPU, seed=0)
    with pytest.raises(FileNotFoundError, match=r"nowhere/val\.beton does not exist; create it with: .*--split val"):
        EvalLoader(settings(tmp_path / "nowhere"), CPU)


def test_a_file_with_other_fields_is_refused(stock_files: tuple[Path, Path]) -> None:
    _, foreign = stock_files
    decoder = random_crop_kernel(settings(foreign.parent))
    with pytest.raises(ValueError, match=r"foreign\.beton has the fields picture, target: expected image, label"):
        BatchDecoder(foreign, decoder, num_workers=1, batches_ahead=1, device=CPU)
    with pytest.raises(ValueError, match="has no manifest"):
        EvalLoader(settings(Path(shutil.copy(foreign, foreign.with_name("val.beton"))).parent), CPU)


def test_a_training_set_smaller_than_the_global_batch_is_refused(beton_dir: Path) -> None:
    with pytest.raises(ValueError, match="80 images, fewer than the global batch of 96"):
        TrainLoader(settings(beton_dir, update_freq=3), CPU, seed=0, world=4)


@pytest.mark.gpu
def test_pinned_buffers_are_used_again_once_their_copy_has_ended() -> None:
    device = torch.device("cuda", 0)
    transfer = DeviceTransfer(device)
    pinned, sums = [], []
    for number in range(64):
        images = transfer.empty(64, 224, 224, 3, dtype=torch.uint8).fill_(number)
        labels = transfer.empty(64, dtype=torch.int64).fill_(number)
        batch = transfer(images, labels)
        sums.append(torch.stack([batch[0].float().mean(), batch[1].float().mean()]))
        del images, labels
        if number % 4 == 3:
            torch.cuda.synchronize(device)  # at most four copies at a time
        pinned.append(torch.cuda.host_memory_stats()["num_host_alloc"])
    assert pinned[-1] == pinned[3], "nothing is pinned after the first four"
    assert torch.stack(sums).cpu().tolist() == [[number, number] for number in range(64)]
