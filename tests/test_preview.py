"""The preview shows the very inputs of the network, with the right names under them, and is readable at any size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support.runs import train_here
from support.samples import COPY, pack_all
from torch import Tensor

from ffcv_convnext import preview as preview_module
from ffcv_convnext.augment import TrainAugment
from ffcv_convnext.cli import run_command
from ffcv_convnext.config import Config
from ffcv_convnext.data.load.loader import TrainLoader
from ffcv_convnext.preview import Shown, _in_ascii, _Page, images_of_step, mixing_weights, preview

CPU = torch.device("cpu")
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
Pixels = NDArray[np.uint8]
Seen = dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]


@pytest.fixture(scope="module")
def settings(small_settings: dict[str, Any]) -> dict[str, Any]:
    """Two epochs of five steps; a step has two micro-batches of eight images."""
    return {**small_settings, "aa": "rand-m9-mstd0.5-inc1", "update_freq": 2, "recipe_batch": 16}


@pytest.fixture(scope="module")
def seen(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Crops, inputs and targets of a training run, by optimiser step and micro-batch."""
    found: Seen = {}
    augment = TrainAugment.__call__

    def recording(self: TrainAugment, images: Tensor, labels: Tensor, *, step: int, micro_batch: int) -> Any:
        inputs, targets = augment(self, images, labels, step=step, micro_batch=micro_batch)
        found[step, micro_batch] = images.clone(), inputs.clone(), targets.clone()
        return inputs, targets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainAugment, "__call__", recording)
        train_here(settings, output_dir=tmp_path_factory.mktemp("run"))
    assert len(found) == 20
    return found


def pixels_of(inputs: Tensor) -> Pixels:
    """Undo the normalisation: (N, H, W, 3)."""
    levels = (inputs.permute(0, 2, 3, 1).double() * STD + MEAN) * 255
    return levels.round().clamp(0, 255).byte().numpy()


def places(picture: Pixels, tile: Pixels) -> list[tuple[int, int]]:
    """Where in a picture a tile is found, pixel for pixel: rows and columns."""
    height, width = tile.shape[:2]
    corners = np.argwhere((picture == tile[0, 0]).all(axis=-1))
    return [(y, x) for y, x in corners.tolist() if np.array_equal(picture[y : y + height, x : x + width], tile)]


def shown(classes: list[tuple[str, float]], side: int = 32, sample: int = 1_281_166, copy: int = 2) -> Shown:
    pixels = np.zeros((side, side, 3), np.uint8)
    return Shown(pixels, pixels, classes, ["rotate -12.3", "brightness increasing 1.84"], sample, copy)


# --- what is shown -----------------------------------------------------------------------------------------------


def test_a_preview_shows_the_pixels_that_training_fed_to_the_network(
    settings: dict[str, Any], seen: Seen, tmp_path: Path
) -> None:
    """Step 3 of epoch 1 is the run's step 8. All 16 images of the global batch, enlarged 5 times, in reading order."""
    preview(Config.from_flat(settings), tmp_path / "grid.png", epoch=1, step=3, num=16, raw=True)
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    found = []
    for micro_batch in (0, 1):
        crops, inputs, _ = seen[8, micro_batch]
        for crop, pixels in zip(crops.permute(0, 2, 3, 1).numpy(), pixels_of(inputs), strict=True):
            before, after = (each.repeat(5, axis=0).repeat(5, axis=1) for each in (crop, pixels))
            ((y, x),) = places(picture, after)
            assert (y, x - 160 - 2) in places(picture, before), "its crop is to the left of it"
            found.append((y, x))
    assert found == sorted(found)


def test_captions_name_sample_classes_and_the_weights_of_the_targets(settings: dict[str, Any], seen: Seen) -> None:
    config = Config.from_flat(settings)
    loader = TrainLoader(config.data, CPU, seed=0)
    listed = pack_all(list(loader.samples(1, 3))[:2])
    images = list(images_of_step(config, loader, CPU, 1, 3))
    assert [image.sample for image in images] == listed.tolist()
    stored = loader.decoder.labels
    num_mixed = 0
    for image, target in zip(images, torch.cat([seen[8, 0][2], seen[8, 1][2]]), strict=True):
        assert image.classes[0][0] == loader.manifest.classes[stored[image.sample]], "its own class comes first"
        weights = dict(image.classes)
        assert sum(weights.values()) == pytest.approx(1)
        smoothed = [0.9 * weights.get(name, 0) + 0.1 / 4 for name in loader.manifest.classes]
        assert smoothed == pytest.approx(target.tolist(), abs=1e-6)
        num_mixed += len(weights) == 2
    assert num_mixed > 4
    loader.close()


def test_captions_name_the_operations_that_made_the_image(settings: dict[str, Any]) -> None:
    """Without mixing and erasing, an image of no operation is its crop; the words are those that change the others."""
    config = Config.from_flat({**settings, "mixup": 0, "cutmix": 0, "reprob": 0})
    loader = TrainLoader(config.data, CPU, seed=0)
    images = [image for step in range(5) for image in images_of_step(config, loader, CPU, 0, step)]
    untouched = [image for image in images if not image.operations]
    assert all(np.array_equal(image.pixels, image.crop) for image in untouched)
    inverted = [image for image in images if image.operations == ["invert"]]
    assert all(np.array_equal(image.pixels, 255 - image.crop) for image in inverted)
    assert len(untouched) > 10
    assert len(inverted) > 0
    assert {len(image.operations) for image in images} == {0, 1, 2}
    loader.close()
    plain = Config.from_flat({**settings, "aa": "none"})
    loader = TrainLoader(plain.data, CPU, seed=0)
    assert all(image.operations == [] for image in images_of_step(plain, loader, CPU, 0, 0))
    loader.close()


def test_copies_of_repeated_augmentation_are_numbered(settings: dict[str, Any]) -> None:
    config = Config.from_flat({**settings, "repeated_aug": 2})
    loader = TrainLoader(config.data, CPU, seed=0)
    images = list(images_of_step(config, loader, CPU, 0, 1))
    listed = pack_all(list(loader.samples(0, 1))[:2])
    assert [image.sample + image.copy * COPY for image in images] == listed.tolist()
    assert [image.copy for image in images] == [0] * 8 + [1] * 8
    loader.close()


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_mixing_weights_are_those_before_smoothing(smoothing: float) -> None:
    unsmoothed = torch.zeros(1000)
    unsmoothed[7], unsmoothed[3] = 0.3, 0.7
    found = mixing_weights(unsmoothed * (1 - smoothing) + smoothing / 1000, 7, smoothing)
    assert [index for index, _ in found] == [7, 3]
    assert [weight for _, weight in found] == pytest.approx([0.3, 0.7], abs=1e-5)
    assert mixing_weights(torch.full((1000,), 0.001), 7, 1.0) == []


def test_the_header_states_where_in_the_run_the_images_are_from(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = []
    monkeypatch.setattr(_Page, "draw", lambda self: headers.append(" ".join(self.header)) or Image.new("RGB", (1, 1)))
    config = Config.from_flat({**settings, "seed": 7})
    preview(config, tmp_path / "grid.png", config_names=("a.yaml", "b.yaml"), epoch=1, step=3, num=5)
    for fact in (
        "a.yaml b.yaml",
        "seed 7, epoch 1 (of 0 to 1), step 3 (of 0 to 4), optimiser step 8 of the run",
        "images 0 to 4 of the global batch of 16 (8 x 2), 32 pixels",
        "aa rand-m9-mstd0.5-inc1, mixup 0.8, cutmix 1, reprob 0.25",
    ):
        assert fact in headers[0]


def test_the_images_of_an_epoch_have_its_size(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers, sides = [], []
    monkeypatch.setattr(_Page, "draw", lambda self: headers.append(" ".join(self.header)) or Image.new("RGB", (1, 1)))
    original = preview_module.images_of_step

    def seen(*arguments: Any) -> Any:
        for image in original(*arguments):
            sides.append(image.pixels.shape[0])
            yield image

    monkeypatch.setattr(preview_module, "images_of_step", seen)
    ramp = {"min_res": 32, "max_res": 64, "start_ramp": 0, "end_ramp": 1}
    for epoch in (0, 1):
        preview(Config.from_flat({**settings, **ramp}), tmp_path / "grid.png", epoch=epoch, num=2)
    assert sides == [32, 32, 64, 64]
    assert [f"{side} pixels" in header for side, header in zip((32, 64), headers, strict=True)] == [True, True]


# --- readable at any size ----------------------------------------------------------------------------------------


def width_of(text: str) -> float:
    from ffcv_convnext.preview import _FONT

    return _FONT.getlength(text)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("side", [32, 96, 224])
@pytest.mark.parametrize("num", [1, 2, 7, 40])
def test_everything_lies_within_the_picture_and_its_cell(side: int, num: int, raw: bool) -> None:
    names = ["tench", "n02107908 Appenzeller or Entlebucher, a mountain dog of the Alps", "x" * 300]
    images = [shown([(names[i % 3], 0.73), (names[(i + 1) % 3], 0.27)], side) for i in range(num)]
    page = _Page(["a/very/long/name/" * 20 + " of a config", "seed 0, " * 50], images, raw=raw)
    assert all(width_of(line) <= page.width for line in page.header)
    assert all(width_of(line) <= page.cell_width for caption in page.captions for line, _ in caption)
    picture = page.draw()
    assert picture.width >= 480
    assert picture.height < 400 or picture.width / picture.height > 0.6
    ink = (np.asarray(picture) < 250).any(axis=-1)
    assert not ink[-12:].any()
    assert not ink[:, :11].any()
    assert not ink[:, -12:].any()


def caption(classes: list[tuple[str, float]]) -> list[str]:
    return [line for line, _ in _Page(["header"], [shown(classes)], raw=False).captions[0]]


def test_a_name_that_is_too_long_keeps_its_ends_and_its_weight() -> None:
    name = "n02107908_appenzeller_or_entlebucher_mountain_dog"
    rest = ["sample 1281166, copy 2:", "rotate -12.3, brightness", "increasing 1.84"]
    assert caption([(name, 0.73), ("tench", 0.27)]) == ["n0210790…tain_dog 0.73", "tench 0.27", *rest]
    assert caption([("tench", 0.73), ("goose", 0.27)]) == ["tench 0.73 + goose 0.27", *rest]
    assert caption([]) == ["all classes equal", *rest]


def test_names_that_the_font_cannot_draw_are_spelt_in_ascii() -> None:
    assert _in_ascii("Käse, crème brûlée\n猫") == "Kase, creme brulee \\u732b"


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def command(settings: dict[str, Any], tmp_path: Path) -> Callable[..., int]:
    """`ffcv-convnext data preview` with these settings in a file, writing grid.png unless told otherwise."""
    config = tmp_path / "settings.yaml"
    config.write_text(Config.from_flat(settings).to_yaml())

    def run(*words: str, out: Path | str = tmp_path / "grid.png") -> int:
        return run_command("data", ["preview", "--config", str(config), "--out", str(out), *words])

    return run


def test_the_command_writes_a_picture(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--epoch", "1", "--seed", "3", "--hflip", "1") == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'grid.png'}: 16 images of epoch 1, step 0; ")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.format == "PNG"
    assert command("--num", "3", "--raw", "true", "--aa", "none", out=tmp_path / "grid.jpg") == 0
    with Image.open(tmp_path / "grid.jpg") as picture:
        assert picture.format == "JPEG"
    assert {path.name for path in tmp_path.iterdir()} == {"settings.yaml", "grid.png", "grid.jpg"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epoch", "2"], "--epoch 2: expected 0 to 1"),
        (["--epoch", "-1"], "--epoch -1: expected 0 to 1"),
        (["--step", "5"], "--step 5: expected 0 to 4"),
        (["--num", "17"], "--num 17: expected 1 to 16"),
        (["--num", "0"], "--num 0: expected 1 to 16"),
        (["--num", "many"], "argument --num: invalid int value: 'many'"),
        (["--raw", "maybe"], "argument --raw: 'maybe': expected true or false"),
        (["--data_path", "nowhere"], "data_path: nowhere/train.beton does not exist; create it with: python write_"),
        (["--nb_classes", "3"], "nb_classes = 3: the data has 4 classes; remove it, or raise it"),
        (["--mixupp", "1"], "unknown option '--mixupp'; did you mean --mixup"),
        (["--stepp", "1"], "unknown option '--stepp'; did you mean --step"),
    ],
)
def test_invalid_arguments_are_one_line(
    command: Callable[..., int], words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*words) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("data_cache = os"))
    assert error.startswith(f"error: {message}")
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("grid.gif", "expected a name that ends with .png, .jpg, .jpeg"),
        ("nowhere/grid.png", "expected a file in a folder that exists"),
        ("folder.png", "expected a file in a folder that exists"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_work_begins(
    command: Callable[..., int], out: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.png").mkdir()
    assert command("--data_path", "nowhere", out=tmp_path / out) == 2
    assert capsys.readouterr().err == f"error: --out {tmp_path / out}: {message}\n"


def test_a_read_only_folder_is_refused(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.access", lambda path, _: Path(path) != tmp_path)  # root may write anywhere
    assert command() == 2
    assert "is not writable" in capsys.readouterr().err
