"""Evaluation apart from training: several sizes, mirror images, other sets of some classes, a file of confusions."""

from __future__ import annotations

import csv
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.imagefolder import class_name, make_image_folder
from support.nursery import Nursery
from support.runs import config_from, train_here
from torch import Tensor, nn

from ffcv_convnext.augment import Normalisation, normalise
from ffcv_convnext.cli import run_command
from ffcv_convnext.config import Config
from ffcv_convnext.data.convert.conversion import ConversionOptions, convert
from ffcv_convnext.data.load import EvalLoader
from ffcv_convnext.models import build_model
from ffcv_convnext.training.checkpoint import LAST, read_checkpoint
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.evaluation import class_rows, evaluate_only
from ffcv_convnext.training.metrics import Evaluation, evaluate

ALONE = Processes(0, 1, 0, torch.device("cpu"))
SOME = (1, 3)  # of the 4 trained classes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def settings(small_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings that evaluate a network after one epoch: it is right for some images and wrong for others."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    plain = {"mixup": 0, "cutmix": 0, "reprob": 0, "drop_path": 0, "smoothing": 0, "lr": 4e-3}
    train_here(small_settings, **plain, output_dir=folder, epochs=1, warmup_epochs=0)
    return {**small_settings, "eval": True, "resume": folder / LAST}


@pytest.fixture(scope="module")
def some_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A val.beton with other images of SOME, 7 of each."""
    folder = make_image_folder(tmp_path_factory.mktemp("some"), val_per_class=7, seed=5)
    for other in [folder / "train", *(folder / "val" / class_name(label) for label in {0, 1, 2, 3} - {*SOME})]:
        shutil.rmtree(other)
    (folder / "train").symlink_to("val")  # the class list
    convert(ConversionOptions(data_path=folder, out_dir=folder / "beton", split="val", num_workers=1))
    return folder / "beton"


def logits_by_hand(settings: dict[str, Any], data_path: Path, *, flip: bool = False) -> tuple[Tensor, Tensor]:
    """Raw weights' logits (N, 4) for a val.beton, and its labels."""
    config = config_from({**settings, "data_path": data_path})
    network = build_model(config.model, 4)
    network.load_state_dict(read_checkpoint(settings["resume"])["model"])
    network.eval()
    loader = EvalLoader(config.data, torch.device("cpu"))
    logits, labels = [], []
    with torch.inference_mode():
        for images, some in loader:
            normalised = normalise(images, Normalisation.of(config.data))
            logits.append(network(normalised.flip(3) if flip else normalised))
            labels.append(some)
    loader.close()
    return torch.cat(logits), torch.cat(labels)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


# --- sizes --------------------------------------------------------------------------------------------------------


def test_several_sizes_are_the_rows_of_a_table(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate_only(config_from(settings, test_sizes="32,64,96"))
    for size, scores in found.items():
        (alone,) = evaluate_only(config_from(settings, test_input_size=size)).values()
        assert scores == alone
    assert len({scores["test_loss"] for scores in found.values()}) == 3, "the sizes differ"
    head, rule, *rows = capsys.readouterr().out.splitlines()
    keys = [f"test_{name}{suffix}" for suffix in ("", "_ema") for name in ("acc1", "acc5", "loss")]
    assert cells(head) == ["test_size", *keys, "images"]
    assert {len(line) for line in (rule, *rows)} == {len(head)}, "aligned"
    assert [[float(cell) for cell in cells(row)] for row in rows] == [
        pytest.approx([size, *scores.values()], abs=1e-4) for size, scores in found.items()
    ]


def test_the_crop_ratio_of_the_evaluation_replaces_crop_pct(settings: dict[str, Any]) -> None:
    """In a single evaluation and at each of several sizes; crop_pct alone is the same for both."""

    def scores(**changes: Any) -> list[dict[str, float]]:
        return list(evaluate_only(config_from(settings, **changes)).values())

    theirs = scores(test_input_size=64, crop_pct=0.5)
    assert scores(test_input_size=64, crop_pct=0.9, test_crop_pct=0.5) == theirs
    assert scores(test_input_size=64, test_crop_pct=0.9) != theirs
    assert scores(test_sizes="32,64", test_crop_pct=0.5)[1] == theirs[0]


def test_sizes_are_refused_by_a_network_of_one_size_before_its_weights_are_read(small_settings: dict[str, Any]) -> None:
    plain = {name: value for name, value in small_settings.items() if not name.startswith("resnet_")}
    vit = {**plain, "model": "test_vit", "input_size": 160, "eval": True, "finetune": "absent.pth", "drop_path": 0}
    with pytest.raises(ValueError, match=r"model = test_vit accepts images of 160 pixels only; .* and test_sizes$"):
        evaluate_only(config_from(vit, test_sizes="160,192"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({name: value, "eval": False}, rf"{name} = \S+ needs --eval true")
            for name, value in {"test_sizes": "64", "tta": "flip", "eval_data_path": "/d", "eval_csv": "a"}.items()
        ),
        ({"test_sizes": "64,64"}, r"test_sizes = 64-64: expected each size once"),
        ({"test_sizes": "16,64"}, r"test_sizes = 16-64: expected whole numbers >= 32 or none, e\.g\. 192,224,256"),
        ({"test_sizes": "64,large"}, r"test_sizes = 64,large: expected whole numbers"),
        ({"tta": "crop"}, r"tta = crop: expected one of none, flip"),
        ({"eval_csv": "/nowhere/classes.csv"}, r"eval_csv = /nowhere/classes\.csv: expected a file in a folder"),
        ({"eval_csv": "/tmp"}, r"eval_csv = /tmp: expected a file"),
        ({"eval_data_path": "/nowhere"}, r"/nowhere/val\.beton does not exist"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate_only(config_from(settings, **changes))


# --- mirror images ------------------------------------------------------------------------------------------------


class LeftEdge(nn.Module):
    """Logits are the red values at the left edge, row i for class i: the mirror image shows the right edge."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, :, 0]


def test_flip_averages_the_logits_of_image_and_mirror_image() -> None:
    images = torch.zeros(2, 3, 3, 3, dtype=torch.uint8)
    images[0, 0] = torch.tensor([[9, 0, 0], [0, 0, 11], [0, 0, 0]])  # left edge: class 0; mean of both: class 1
    images[1, 0] = torch.tensor([[4, 0, 4], [5, 0, 0], [0, 0, 0]])  # left edge: class 1; mean of both: class 0
    batch = [(images, torch.tensor([1, 1]))]
    plain = Normalisation.of(config_from({"mean": "0,0,0", "std": "1,1,1"}).data)
    found = evaluate(LeftEdge(), batch, ALONE, lambda: torch.autocast("cpu", enabled=False), plain, flip=True)
    assert (found[""].acc1, found["_flip"].acc1) == (50.0, 50.0)
    loss = {}
    for key, rows in {"": [[9, 0, 0], [4, 5, 0]], "_flip": [[4.5, 5.5, 0], [4, 2.5, 0]]}.items():
        loss[key] = nn.functional.cross_entropy(torch.tensor(rows) / 255, torch.tensor([1, 1])).item()
        assert found[key].loss == pytest.approx(loss[key])
    assert loss[""] != loss["_flip"]


def test_flip_has_scores_of_its_own_beside_the_plain_ones(settings: dict[str, Any]) -> None:
    (alone,) = evaluate_only(config_from(settings)).values()
    (found,) = evaluate_only(config_from(settings, tta="flip")).values()
    assert {key: value for key, value in found.items() if not key.endswith("_flip")} == alone
    assert set(found) - set(alone) == {f"{key}_flip" for key in alone if key != "images"}
    logits, labels = logits_by_hand(settings, settings["data_path"])
    mean = (logits + logits_by_hand(settings, settings["data_path"], flip=True)[0]) / 2
    assert found["test_acc1_flip"] == pytest.approx(accuracy(mean, labels))
    assert found["test_loss_flip"] == pytest.approx(nn.functional.cross_entropy(mean, labels).item(), rel=1e-5)
    assert found["test_loss_flip"] != found["test_loss"]


# --- some of the classes ------------------------------------------------------------------------------------------


def test_some_of_the_classes_are_evaluated_without_the_logits_of_the_others(
    settings: dict[str, Any], some_classes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (found,) = evaluate_only(config_from(settings, eval_data_path=some_classes)).values()
    logits, labels = logits_by_hand(settings, some_classes)
    assert set(labels.tolist()) == {0, 1}
    ours = logits[:, SOME]
    assert found["images"] == 14
    assert found["test_acc1"] == pytest.approx(accuracy(ours, labels))
    assert found["test_loss"] == pytest.approx(nn.functional.cross_entropy(ours, labels).item(), rel=1e-5)
    assert found["test_acc5"] == 100, "two classes"
    assert (
        f"eval_data_path = {some_classes}: 2 of the 4 trained classes; the logits of the other 2 are left out"
        in capfd.readouterr().err
    )


def test_another_set_of_all_classes_is_evaluated_as_usual(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    plain = evaluate_only(config_from(settings))
    assert evaluate_only(config_from(settings, eval_data_path=settings["data_path"])) == plain
    assert "2 of the" not in caplog.text
    assert f"eval_data_path = {settings['data_path']}: 4 of the 4 trained classes\n" in caplog.text


def test_outputs_beyond_the_trained_classes_are_left_out_too(settings: dict[str, Any], tmp_path: Path) -> None:
    network = timm.create_model("test_convnext", num_classes=7)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    plain = {name: value for name, value in settings.items() if not name.startswith("resnet_") and name != "resume"}
    changes = {"model": "test_convnext", "nb_classes": 7, "finetune": tmp_path / "weights.pth"}
    (found,) = evaluate_only(
        config_from(plain, **changes, eval_data_path=settings["data_path"], eval_csv=tmp_path / "a.csv")
    ).values()
    assert found["images"] == 20
    with open(tmp_path / "a.csv") as file:
        assert {row["class"] for row in csv.DictReader(file)} == {class_name(label) for label in range(4)}


@pytest.mark.parametrize("job", [False, True], ids=["here", "job"])
def test_a_class_that_training_does_not_know_is_one_error_before_anything_is_built(
    settings: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], job: bool
) -> None:
    folder = make_image_folder(tmp_path / "images", num_classes=6, train_per_class=0, val_per_class=1)
    convert(ConversionOptions(data_path=folder, out_dir=tmp_path / "beton", split="val", num_workers=1))
    changes = {**settings, "eval_data_path": tmp_path / "beton", "resume": "/nowhere.pth"}
    changes |= {"job_dir": tmp_path / "job", "executor": "local", "ngpus": 1} if job else {}
    words = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    capfd.readouterr()
    assert run_command("train", words) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(
        f"error: eval_data_path = {tmp_path / 'beton'}: 2 of 6 classes are not in {settings['data_path']}/train.json: "
        "class_04, class_05; name the class folders as in training"
    )


def test_the_trained_classes_must_be_known(settings: dict[str, Any], some_classes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trained on are unknown, because data_path = \S+ has no train\.json; give"):
        evaluate_only(config_from(settings, eval_data_path=some_classes, data_path=tmp_path))
    with pytest.raises(ValueError, match=r"data_path = None has no train\.json"):
        evaluate_only(config_from(settings, eval_data_path=some_classes, data_path="none"))


def test_a_checkpoint_of_other_classes_is_refused_with_the_setting_for_them(
    settings: dict[str, Any], some_classes: Path
) -> None:
    with pytest.raises(ValueError, match=r"another number of classes than 2, which data_path = .*--eval_data_path$"):
        evaluate_only(config_from(settings, data_path=some_classes))


# --- confusions ---------------------------------------------------------------------------------------------------


def test_a_class_has_its_accuracy_and_its_most_frequent_confusions() -> None:
    pairs = [(0, 0)] * 3 + [(0, 2)] + [(1, 2), (1, 0), (1, 0), (1, 4)] + [(2, 2)] + [(4, 0), (4, 1), (4, 2), (4, 3)]
    labels, predictions = torch.tensor(pairs).T
    found = Evaluation(0.0, 0.0, 0.0, len(pairs), labels, predictions)
    assert list(class_rows(found, ["a", "b", "c", "d", "e"])) == [
        ["a", 4, 75.0, "c", 1, "", "", "", ""],
        ["b", 4, 0.0, "a", 2, "c", 1, "e", 1],
        ["c", 1, 100.0, "", "", "", "", "", ""],
        ["d", 0, "", "", "", "", "", "", ""],
        ["e", 4, 0.0, "a", 1, "b", 1, "c", 1],
    ]
    assert not list(class_rows(replace(found, labels=labels[:0]), ["a"]))


def test_the_csv_agrees_with_the_scores(settings: dict[str, Any], some_classes: Path, tmp_path: Path) -> None:
    path = tmp_path / "classes.csv"
    changes = {"test_sizes": "32,64", "tta": "flip", "eval_csv": path, "eval_data_path": some_classes}
    found = evaluate_only(config_from(settings, **changes))
    with open(path) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * len(SOME)
    for size, scores in found.items():
        for key, value in scores.items():
            if not (match := re.fullmatch(r"test_acc1(_ema)?(_flip)?", key)):
                continue
            kind = [str(size), (match[1] or "_raw")[1:], (match[2] or "_none")[1:]]
            ours = [row for row in rows if [row["test_size"], row["weights"], row["tta"]] == kind]
            assert [row["class"] for row in ours] == [class_name(label) for label in SOME]
            assert sum(int(row["images"]) * float(row["acc1"]) for row in ours) / 14 == pytest.approx(value, abs=1e-3)
            for row in ours:
                wrong = int(row["images"]) * (1 - float(row["acc1"]) / 100)
                assert int(row["images_1"] or 0) == round(wrong), "two classes: one confusion"


# --- several processes --------------------------------------------------------------------------------------------


def test_two_processes_have_the_table_and_the_csv_of_one(
    settings: dict[str, Any],
    image_folder: Path,
    nursery: Nursery,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """7 images on two processes: their shares differ."""
    convert(ConversionOptions(data_path=image_folder, out_dir=tmp_path, split="val", subset=7, num_workers=1))
    changes = {"test_sizes": "32,64", "tta": "flip", "eval_data_path": tmp_path, "batch_size": 3}
    alone = evaluate_only(config_from(settings, **changes, eval_csv=tmp_path / "one.csv"))
    table = capsys.readouterr().out.splitlines()
    assert {scores["images"] for scores in alone.values()} == {7}
    first, second = nursery.run_ranks({**settings, **changes, "eval_csv": tmp_path / "two.csv"}, strikes={})
    assert (first[0], second[0]) == (0, 0), first[1] + second[1]
    assert first[1].splitlines()[-len(table) :] == table
    assert "test_acc1" not in second[1], "one process speaks"
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


def test_the_default_has_no_predictions() -> None:
    batch = [(torch.zeros(2, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 1]))]
    plain = Normalisation.of(Config().data)
    (found,) = evaluate(LeftEdge(), batch, ALONE, lambda: torch.autocast("cpu", enabled=False), plain).values()
    assert (len(found.labels), len(found.predictions), found.images) == (0, 0, 2)
