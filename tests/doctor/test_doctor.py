"""The doctor's arithmetic on given rates, its reads of cold files, and one real diagnosis. No test is about speed."""

from __future__ import annotations

import importlib
import json
import mmap
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ffcv_convnext.bench.timing import RepeatedDecoding
from ffcv_convnext.cli import run_command
from ffcv_convnext.config import Config
from ffcv_convnext.doctor import Diagnosis, format_page
from ffcv_convnext.doctor import diagnosis as doctor
from ffcv_convnext.doctor.advice import advise
from ffcv_convnext.doctor.cold_read import ColdFile, StorageRate, _spread
from ffcv_convnext.doctor.measure import StepTimer, StepTimes
from ffcv_convnext.doctor.place import measure_place
from ffcv_convnext.doctor.predict import (
    File,
    Machine,
    Node,
    Place,
    Prediction,
    Rates,
    predict,
    predict_whole,
    serial_rate,
)
from ffcv_convnext.host import PAGE, is_in_memory

MACHINE = Machine(
    processor="a processor", cores=16, device="a GPU", cuda=True, memory_room_gb=100.0, load=0.2, torch="2",
    device_memory_gb=80.0, step_memory_gb=40.0,
)  # fmt: skip
RATES = Rates(
    storage=20_000, storage_in_order=60_000, decode=16_000, decode_one_worker=1_000, decode_bilinear=18_000,
    transfer=60_000, augmentation=30_000, step=3_000, whole=2_700, step_as_run=3_000,
)  # fmt: skip
FILE = File(
    path="train.beton", num_samples=1_281_167, num_samples_of_run=1_281_167, gigabytes=65.0, image_bytes=50_000.0,
    longest_side=490.0, crop_alone=1.0, remarks=(),
)  # fmt: skip
NODE = Node(gpus=8, cores=96, gpu_images_per_s=None)
CONFIG = Config.from_flat({"batch_size": 128, "update_freq": 4, "num_workers": 11})
PROCESSOR_ONLY = Node(gpus=0, cores=16, gpu_images_per_s=None)
ON_CPU = replace(MACHINE, cuda=False, device="none", device_memory_gb=None, step_memory_gb=None)
DEVICE = 1 / (1 / 30_000 + 1 / 3_000)  # images/s of a GPU that augments and steps in turn


def inputs(**changes: Any) -> dict[str, Any]:
    return {"rates": RATES, "machine": MACHINE, "file": FILE, "config": CONFIG, "node": NODE, **changes}


def predicted(**changes: Any) -> Prediction:
    return predict(**inputs(**changes))


def advice(**changes: Any) -> str:
    given = inputs(**changes)
    return "\n".join(advise(**given, prediction=predict(**given)))


# --- Bottlenecks ------------------------------------------------------------------------------------------


def test_the_gpus_are_the_bottleneck_if_the_host_can_feed_more() -> None:
    found = predicted()
    assert found.bound == "step"
    assert found.stages["decode"] == pytest.approx(88_000)  # 96 - 8 cores at 1,000
    assert found.stages["transfer"] == 480_000
    assert found.host_images_per_s == pytest.approx(88_000), "the file fits in memory, so storage does not count"
    assert found.images_per_s == pytest.approx(8 * DEVICE)
    assert found.cores_per_gpu == pytest.approx(1 + DEVICE / 1_000)
    first, later = 1_281_167 / 20_000, 1_281_167 / (8 * DEVICE)
    assert found.hours == pytest.approx((first + 299 * later) / 3600)


def test_decoding_is_the_bottleneck_with_few_cores() -> None:
    found = predicted(node=replace(NODE, cores=16))
    assert (found.bound, found.decoding_cores) == ("decode", 8)
    assert found.images_per_s == pytest.approx(8_000)


def test_the_workers_limit_the_cores_that_decode() -> None:
    found = predicted(config=CONFIG.replace(num_workers=2))
    assert found.decoding_cores == 16
    assert found.bound == "decode"


def test_storage_is_the_bottleneck_of_a_file_larger_than_memory() -> None:
    found = predicted(machine=replace(MACHINE, memory_room_gb=60.0))
    assert found.bound == "storage"
    assert found.images_per_s == found.first_epoch_images_per_s == 20_000


def test_storage_slows_the_first_epoch_of_a_file_that_fits_in_memory() -> None:
    found = predicted(rates=replace(RATES, storage=500.0))
    assert found.bound == "step"
    assert found.first_epoch_images_per_s == 500


def test_storage_that_was_not_measured_is_never_the_bottleneck() -> None:
    found = predicted(rates=replace(RATES, storage=None), machine=replace(MACHINE, memory_room_gb=1.0))
    assert (found.bound, found.first_epoch_images_per_s) == ("step", found.images_per_s)


def test_transfer_and_augmentation_can_be_the_bottleneck() -> None:
    assert predicted(rates=replace(RATES, transfer=100.0)).bound == "transfer"
    assert predicted(rates=replace(RATES, augmentation=1_000.0)).bound == "augmentation"


def test_without_a_gpu_here_only_the_host_is_predicted() -> None:
    found = predicted(machine=ON_CPU, rates=replace(RATES, transfer=None))
    assert found.stages["step"] is found.images_per_s is found.hours is found.cores_per_gpu is None
    assert (found.bound, found.host_images_per_s) == ("decode", pytest.approx(88_000))


def test_a_given_gpu_rate_completes_the_prediction() -> None:
    found = predicted(machine=ON_CPU, rates=replace(RATES, transfer=None), node=replace(NODE, gpu_images_per_s=1500.0))
    assert (found.bound, found.images_per_s) == ("step", 12_000)
    assert found.cores_per_gpu == pytest.approx(2.5)


def test_on_the_processor_the_stages_share_the_cores() -> None:
    rates = replace(RATES, transfer=None, decode=300, augmentation=200, step=60, storage=None)
    found = predicted(machine=ON_CPU, rates=rates, node=PROCESSOR_ONLY)
    assert serial_rate(300, 200, 60) == pytest.approx(40)  # 2 + 3 + 10 of 600
    assert (found.bound, found.images_per_s) == ("step", pytest.approx(40))
    twice = predicted(machine=ON_CPU, rates=rates, node=replace(PROCESSOR_ONLY, cores=32))
    assert twice.images_per_s == pytest.approx(80)


def test_the_loader_works_beside_a_gpu_but_shares_the_processor() -> None:
    rates = replace(RATES, transfer=None, decode=300, augmentation=200, step_as_run=60)
    assert predict_whole(rates, ON_CPU, CONFIG) == pytest.approx(40)
    assert predict_whole(rates, MACHINE, CONFIG) == pytest.approx(serial_rate(200, 60))
    assert predict_whole(rates, MACHINE, CONFIG.replace(num_workers=1)) == pytest.approx(300 / 16)


def test_the_update_time_is_divided_by_the_images_of_a_step() -> None:
    times = StepTimes(num_images=4, micro_batch_s=2.0, update_s=1.0, peak_memory_gb=None)
    assert times.images_per_s(batch_size=4, update_freq=1) == pytest.approx(4 / 3)
    assert times.images_per_s(batch_size=4, update_freq=5) == pytest.approx(20 / 11)
    assert times.images_per_s(batch_size=8, update_freq=1) == pytest.approx(8 / 5)


# --- Advice -----------------------------------------------------------------------------------------------


def test_a_node_whose_gpus_are_the_bottleneck_needs_no_change() -> None:
    assert re.fullmatch(r"the GPUs are the bottleneck, as intended: the host can feed 4\.0 times .*", advice())


def test_idle_cores_are_a_reason_for_more_workers() -> None:
    text = advice(config=CONFIG.replace(num_workers=2))
    assert "--num_workers 11 decodes 88,000 images/s instead of 16,000" in text


def test_more_threads_than_cores_are_not_needed() -> None:
    assert "--num_workers 1 is as fast" in advice(node=replace(NODE, cores=16))
    assert "is as fast" not in advice()


def test_advice_for_slow_decoding_is_restart_markers_cores_and_smaller_images() -> None:
    text = advice(node=replace(NODE, cores=16), file=replace(FILE, crop_alone=0.0))
    assert "none of the stored images have restart markers" in text
    assert "needs 3.7 cores (one of them feeds it) and has 2.0" in text
    assert "--train_interpolation bilinear decodes 18,000 images/s here, bicubic 16,000" in text
    assert "--max_resolution 358" in text
    assert "restart markers" not in advice(file=replace(FILE, crop_alone=0.0)), "decoding is not the bottleneck there"


def test_an_unknown_gpu_is_no_reason_to_change_the_images() -> None:
    text = advice(machine=ON_CPU, rates=replace(RATES, transfer=None))
    assert "--max_resolution" not in text
    assert "bilinear" not in text


def test_advice_for_slow_storage_is_more_memory_and_sequential_reads() -> None:
    text = advice(machine=replace(MACHINE, memory_room_gb=60.0))
    assert "20,000 images/s, and the file (65.0 GB) does not fit in 60.0 GB of memory" in text
    assert "60,000 images/s, 3.0 times the rate of random reads" in text
    quasi_random = CONFIG.replace(order="quasi_random")
    assert "--order" not in advice(machine=replace(MACHINE, memory_room_gb=60.0), config=quasi_random)


def test_a_file_with_a_slow_first_epoch_can_be_read_sequentially_first() -> None:
    text = advice(rates=replace(RATES, storage=500.0))
    assert "43 minutes with random reads (500 images/s) instead of 1" in text
    assert "in 0.4 minutes: --data_cache ram, or cat train.beton > /dev/null" in text


PLACE = Place(folder="/scratch", in_memory=False, write=30_000.0, at_random=40_000.0)
LARGE = replace(MACHINE, memory_room_gb=60.0)


def advised(place: Place, **changes: Any) -> str:
    given = inputs(**changes)
    (text,) = (each for each in advise(**given, prediction=predict(**given), place=place) if "stage_to" in each)
    return text


def test_slow_storage_is_a_reason_to_measure_a_copy_on_the_node() -> None:
    assert "--stage_to DIR copies the file once" in advice(machine=LARGE)
    assert "--stage_to DIR copies the file once" in advice(rates=replace(RATES, storage=500.0))
    assert "--stage_to" not in advice()


def test_a_copy_that_saves_more_than_it_takes_is_advised() -> None:
    text = advised(PLACE, machine=LARGE, rates=replace(RATES, storage=2_000.0))
    copying = 65e9 / (30_000 * 50_000) / 60
    there = copying + 300 * 1_281_167 / (8 * DEVICE) / 60
    assert f"the copy takes {copying:.1f} minutes; random reads give 40,000 images/s there, 2,000 in data_path" in text
    assert text.endswith("use it")
    assert f"300 epochs take {there:,.1f} minutes, without it {300 * 1_281_167 / 2_000 / 60:,.1f}: use it" in text
    fits = advised(PLACE, rates=replace(RATES, storage=500.0))
    assert "the first epoch takes 1.7 minutes, without it 42.7: use it" in fits


def test_a_copy_that_saves_nothing_is_not_advised() -> None:
    assert advised(PLACE).endswith("it does not pay here")
    slower = replace(PLACE, at_random=1_000.0)
    assert advised(slower, machine=LARGE, rates=replace(RATES, storage=2_000.0)).endswith("it does not pay here")


def test_a_place_without_room_or_an_original_in_memory_has_a_reason_instead_of_rates() -> None:
    assert advised(Place(folder="/scratch", in_memory=False, problem="stage_to = /scratch: no room")).endswith("room")
    text = advised(PLACE, rates=replace(RATES, storage=None))
    assert text == (
        "stage_to = /scratch: no comparison, because the original stays in memory here and its reads were not measured"
    )


def test_settings_for_another_global_batch_are_named() -> None:
    text = advice(config=CONFIG.replace(update_freq=1))
    assert "128 x 1 x 8 = 1,024, but lr = 0.004 is meant for 4,096: use --update_freq 4" in text
    text = advice(config=CONFIG.replace(batch_size=1000, update_freq=1))
    assert "scale lr (linearly: 0.00781) and set recipe_batch to 8000" in text


def test_a_step_in_float32_or_with_free_memory_can_be_faster() -> None:
    assert "in float32; measure --amp bf16" in advice(config=CONFIG.replace(amp="off"))
    assert "measure --channels_last true" in advice(config=CONFIG.replace(channels_last=False))
    spare = replace(MACHINE, step_memory_gb=20.0)
    assert "--batch_size 256 --update_freq 2" in advice(machine=spare)


def test_a_wrong_prediction_and_poor_scaling_are_reported_unless_the_machine_is_busy() -> None:
    rates = replace(RATES, whole=1_000.0, decode_one_worker=3_000.0)
    text = advice(rates=rates)
    assert "all stages together reached 1,000 images/s; 2,727 are predicted" in text
    assert "16 cores decode only 5.3 times as fast as one" in text
    busy = advice(rates=rates, machine=replace(MACHINE, load=12.0))
    assert "all stages together" not in busy
    assert "as fast as one" not in busy


def test_a_file_that_training_cannot_use_comes_first() -> None:
    text = advice(file=replace(FILE, remarks=("train.py cannot use this file: has no manifest",)))
    assert text.startswith("train.py cannot use this file")


# --- The page ---------------------------------------------------------------------------------------------


def diagnosis(**changes: Any) -> Diagnosis:
    given = inputs(**changes)
    prediction = predict(**given)
    cuda = given["machine"].cuda
    cold = StorageRate(megabytes=2_000.0, seconds=2.0, cold=1.0)
    return Diagnosis(
        **given,
        config_names=("a.yaml",),
        prediction=prediction,
        advice=tuple(advise(**given, prediction=prediction)),
        num_parameters=25_000_000,
        num_readers=88,
        storage=cold,
        storage_in_order=cold,
        step=StepTimes(128 if cuda else 4, 0.1, 0.01, 40.0 if cuda else None),
    )


def test_the_page_says_which_of_a_runs_image_sizes_it_measured() -> None:
    ramp = {"min_res": 128, "max_res": 192, "start_ramp": 100, "end_ramp": 200}
    page = " ".join(format_page(diagnosis(config=CONFIG.replace(**ramp))).split())
    assert "; 128 to 192 (measured at 192) pixels, batch_size" in page
    assert (
        "images take at most 4.9 hours without evaluation (they have 72 % of the pixels of the largest size)." in page
    )
    assert "measured at" not in format_page(diagnosis())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"node": replace(NODE, cores=16)},
        {"machine": replace(MACHINE, memory_room_gb=60.0)},
        {"machine": ON_CPU, "rates": replace(RATES, transfer=None)},
        {"machine": ON_CPU, "rates": replace(RATES, transfer=None), "node": replace(NODE, gpu_images_per_s=900.0)},
        {"machine": ON_CPU, "rates": replace(RATES, transfer=None), "node": PROCESSOR_ONLY},
    ],
)  # fmt: skip
def test_the_page_marks_one_bottleneck_and_agrees_with_the_json(changes: dict[str, Any]) -> None:
    found = diagnosis(**changes)
    page, content = format_page(found), json.loads(found.to_json())
    marked = [line for line in page.splitlines() if "<-" in line]
    assert len(marked) == 1
    assert marked[0].startswith(f"| {content['prediction']['bound']}")
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len({len(line) for line in table}) == 1, "the columns are aligned"
    assert all(len(line) <= 120 for line in page.splitlines() if line not in table)
    expected = content["prediction"]["images_per_s"]
    assert expected is None or f"  {expected:,.0f} images/s" in page
    assert all(text[:30] in page for text in content["advice"])


def test_the_page_warns_if_the_machine_was_busy() -> None:
    assert "12.0 processes were running on 16 cores" in format_page(diagnosis(machine=replace(MACHINE, load=12.0)))
    assert "were running" not in format_page(diagnosis())


def test_a_file_that_stays_in_memory_has_no_storage_rate() -> None:
    found = replace(diagnosis(rates=replace(RATES, storage=None)), storage=StorageRate(0.0, 1.0, cold=0.0))
    row = next(line for line in format_page(found).splitlines() if line.startswith("| storage, at random"))
    assert "stays in memory" in row
    assert "not known" in row


# --- Cold files -------------------------------------------------------------------------------------------


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    """8 MiB and a bit, on the disk."""
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.write(os.urandom(8 << 20) + b"end")
        file.flush()
        os.fsync(file.fileno())
    return path


def test_only_evicted_pages_count_as_read_from_storage(big_file: Path) -> None:
    size = big_file.stat().st_size
    with ColdFile(big_file) as file:
        gone = file.evict([(0, size)])
        if not gone:
            pytest.skip("the temporary folder is in memory")
        assert gone == -(-size // PAGE) * PAGE
        parts = [(start, start + 50_000) for start in range(0, 8 << 20, 100_000)]
        found = file.at_random(parts, 10.0, num_readers=4)
        assert 0 < found.megabytes <= sum(-(-end // PAGE) - start // PAGE for start, end in parts) * PAGE / 1e6
        assert 0 < found.cold <= 1
        assert found.seconds > 0
        whole = file.in_order(10.0)
        assert whole.megabytes == pytest.approx(gone / 1e6)
        assert whole.megabytes_per_s == pytest.approx(whole.megabytes / whole.seconds)


def test_a_file_that_a_process_keeps_in_memory_has_no_rate(big_file: Path) -> None:
    with open(big_file, "rb") as held, mmap.mmap(held.fileno(), 0, prot=mmap.PROT_READ) as memory:
        assert sum(memory[::PAGE]) > 0  # touches every page
        with ColdFile(big_file) as file:
            assert file.in_order(5.0).megabytes_per_s is None
            assert file.at_random([(0, 4 << 20)], 5.0, num_readers=2).megabytes_per_s is None


@pytest.mark.parametrize("num", [1, 2, 3, 10, 97])
def test_stretches_are_spread_and_each_is_read_once(num: int) -> None:
    spread = list(_spread(list(range(num))))
    assert sorted(spread) == list(range(num))


# --- Real stages ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_the_step_measured_is_the_training_step(small_settings: dict[str, Any]) -> None:
    step_timer = StepTimer(Config.from_flat(small_settings), torch.device("cpu"), num_classes=4)
    before = [p.detach().clone() for p in step_timer.learner.network.parameters()]
    times = step_timer.times(0.05)
    assert step_timer.learner.augment is step_timer.augment, "the loader's batches are augmented again"
    assert times.num_images in (8, 4, 2)
    steps = step_timer.learner.state.step
    config = Config.from_flat(small_settings).data
    decoding = RepeatedDecoding(config.data_path / "train.beton", config, torch.device("cpu"), num_workers=2)
    try:
        decoding.warm(5.0)
        assert len(decoding.samples) == 80
        assert step_timer.whole_images_per_s(decoding, 0.05) > 0
    finally:
        decoding.close()
    assert step_timer.learner.state.step > steps
    after = step_timer.learner.network.parameters()
    assert any((a != b).any() for a, b in zip(before, after, strict=True)), "the optimiser took steps"


def test_batches_have_the_given_size_even_if_the_file_is_small(small_settings: dict[str, Any]) -> None:
    config = Config.from_flat({**small_settings, "batch_size": 128}).data
    decoding = RepeatedDecoding(config.data_path / "train.beton", config, torch.device("cpu"), num_workers=1)
    try:
        decoding.warm(5.0)
        images, labels = next(decoding.batches())
    finally:
        decoding.close()
    assert images.shape == (128, 3, 32, 32)
    assert set(labels.tolist()) == {0, 1, 2, 3}


def flags(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def test_the_place_of_a_copy_is_written_and_read_and_left_as_it_was(
    small_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.from_flat({**small_settings, "stage_to": str(tmp_path)})
    place = measure_place(config, [50_000, 20_000], 0.1, num_readers=2)
    assert place.folder == str(tmp_path)
    assert place.write is not None
    assert place.write_megabytes_per_s == pytest.approx(place.write * 35_000 / 1e6)
    assert place.in_memory == is_in_memory(tmp_path)
    assert list(tmp_path.iterdir()) == []
    staging = importlib.import_module("ffcv_convnext.data.load.staging")
    monkeypatch.setattr(staging, "room_in", lambda _: (1000, "there"))
    full = measure_place(config, [50_000], 0.1, num_readers=2)
    assert full.write is None
    assert f"{tmp_path} has no room: train.beton and val.beton need" in str(full.problem)
    found = diagnosis()
    assert "stage_to, write" in format_page(replace(found, place=place))
    assert "no copy: see below" in format_page(replace(found, place=full))
    assert json.loads(replace(found, place=full).to_json())["stage_to"]["write"] is None


@pytest.mark.usefixtures("one_thread")
def test_a_diagnosis_of_a_real_file(
    small_settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    arguments = [*flags(small_settings), "--gpus", "8", "--cores", "96", "--seconds", "0.05", "--json", str(out)]
    assert run_command("doctor", arguments) == 0
    page, content = capsys.readouterr().out, json.loads(out.read_text())
    assert "80 images" in page
    assert "Prediction for 8 GPUs and 96 cores" in page
    rates = content["images_per_s"]
    assert rates["transfer"] is None
    assert all(rates[name] > 0 for name in ("decode", "decode_one_worker", "augmentation", "step", "whole"))
    assert content["file"]["crop_alone"] == 1
    assert content["node"] == {"gpus": 8, "cores": 96, "gpu_images_per_s": None}
    a_core = rates["decode"] / content["machine"]["cores"]
    assert content["prediction"]["stages_images_per_s"]["decode"] == pytest.approx(16 * a_core)  # 8 x num_workers 2


@pytest.mark.slow
def test_without_data_synthetic_images_are_measured(
    small_settings: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(doctor, "NUM_SYNTHETIC", 20)
    settings = {name: value for name, value in small_settings.items() if name != "data_path"}
    assert run_command("doctor", [*flags(settings), "--seconds", "0.05"]) == 0
    page = capsys.readouterr().out
    assert "20 synthetic images (no --data_path BETON_DIR), in place of ImageNet's 1,281,167" in page
    assert "not measured: give --data_path" in page


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--gpus", "0"], "gpus = 0"),
        (["--gpu_images_per_s", "1000"], "needs --gpus"),
        (["--gpus", "8", "--gpu_images_per_s", "-1"], "gpu_images_per_s = -1"),
        (["--seconds", "0"], "seconds = 0"),
        (["--data_path", "nowhere"], "nowhere/train.beton not found"),
        (["--json", "."], "expected a file"),
        (["--core", "96"], "did you mean --cores"),
        (["--device", "cpu", "--amp", "fp16"], "fp16"),
    ],
)
def test_wrong_usage_is_an_error_before_the_work(
    arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("doctor", arguments) == 2
    error = capsys.readouterr().err
    assert answer in error
    assert error.count("\n") == 1
