"""The diagnosis of a run: every stage measured on this machine, and the prediction for a node."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ffcv_convnext.bench.synthetic_data import write_synthetic_folder
from ffcv_convnext.bench.timing import RepeatedDecoding
from ffcv_convnext.config import Config
from ffcv_convnext.data.convert import ConversionOptions, convert
from ffcv_convnext.doctor.advice import advise
from ffcv_convnext.doctor.cold_read import ColdFile, StorageRate
from ffcv_convnext.doctor.measure import StepTimer, StepTimes, transfer_images_per_s
from ffcv_convnext.doctor.place import measure_place
from ffcv_convnext.doctor.predict import File, Machine, Node, Place, Prediction, Rates, predict, predict_whole
from ffcv_convnext.host import available_cores, available_memory, processor_name
from ffcv_convnext.rng import permutation
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.run import compiles

NUM_SYNTHETIC = 512
IMAGENET, IMAGENET_CLASSES = 1_281_167, 1000  # training images; the run is predicted for them if there is no data_path
MAX_READERS = 256
MAX_COLD = 50_000  # samples drawn for the cold reads: more than any storage reads in the time

# In the JSON: settings, and names of the prediction's fields that differ from the attribute's
_REPORTED = (
    *(
        "model",
        "input_size",
        "min_res",
        "max_res",
        "start_ramp",
        "end_ramp",
        "res_batch",
        "batch_size",
        "update_freq",
        "num_workers",
        "train_interpolation",
    ),
    *("amp", "channels_last", "compile", "epochs"),
)
_PREDICTION_KEYS = {
    "stages": "stages_images_per_s",
    "device": "device_images_per_s",
    "cores_per_gpu": "cores_a_gpu",
}

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All measured figures and the prediction."""

    config: Config
    config_names: tuple[str, ...]
    node: Node
    machine: Machine
    file: File
    rates: Rates
    prediction: Prediction
    advice: tuple[str, ...]
    num_parameters: int
    num_readers: int
    storage: StorageRate | None  # random reads; None: synthetic images in a temporary file
    storage_in_order: StorageRate | None
    step: StepTimes
    place: Place | None = None  # of stage_to

    @property
    def transfer_gigabytes_per_s(self) -> float | None:
        """Rate of uint8 pixels to one GPU, 1e9 bytes."""
        return self.rates.transfer and self.rates.transfer * 3 * self.config.data.max_train_size**2 / 1e9

    @property
    def predicted_whole(self) -> float:
        """Prediction of rates.whole from the single stages."""
        return predict_whole(self.rates, self.machine, self.config)

    def to_json(self) -> str:
        """Return the page's figures; names contain the units, rates without a unit are images/s."""
        settings, prediction = self.config.flat(), asdict(self.prediction)
        content: dict[str, Any] = {
            "configs": self.config_names,
            "settings": {"num_parameters": self.num_parameters, **{name: settings[name] for name in _REPORTED}},
            "node": asdict(self.node),
            "machine": asdict(self.machine),
            "file": asdict(self.file),
            "images_per_s": {**asdict(self.rates), "whole_predicted": self.predicted_whole},
            "storage": {
                "num_readers": self.num_readers,
                "at_random": self.storage and self.storage.to_dict(),
                "in_order": self.storage_in_order and self.storage_in_order.to_dict(),
            },
            "stage_to": self.place and asdict(self.place),
            "transfer_gigabytes_per_s": self.transfer_gigabytes_per_s,
            "step": asdict(self.step),
            "prediction": {_PREDICTION_KEYS.get(name, name): value for name, value in prediction.items()},
            "advice": self.advice,
        }
        return json.dumps(content, indent=1)


def diagnose(
    config: Config,
    *,
    config_names: tuple[str, ...],
    gpus: int | None,
    cores: int | None,
    gpu_images_per_s: float | None,
    seconds: float,
    progress: Progress,
) -> Diagnosis:
    """Measure every stage for about `seconds` on this machine, and scale the rates to the node.

    gpus, cores: the node's; None: this machine's.   gpu_images_per_s: of one GPU, if it is known.
    Raises ValueError or FileNotFoundError for settings or data that cannot be used.
    """
    _check(gpus, cores, gpu_images_per_s, seconds)
    device = Processes.from_environment(config.run.device).device
    if config.run.amp == "fp16" and device.type == "cpu":
        raise ValueError("amp = fp16 needs a CUDA device; use --amp bf16 or --amp off on a CPU")
    load = os.getloadavg()[0]
    here = available_cores()
    num_devices = torch.cuda.device_count() if device.type == "cuda" else 0
    node = Node(gpus=num_devices if gpus is None else gpus, cores=cores or here, gpu_images_per_s=gpu_images_per_s)
    num_readers = min(max(1, node.gpus) * config.data.num_workers, MAX_READERS)
    with _training_file(config, progress) as (beton, own):
        file, num_classes = _describe(beton, own, config)
        storage = in_order = place = None
        if own:
            progress("storage: reading samples that are not in memory")
            storage, in_order = _read_cold(beton, seconds, num_readers)
        if own and config.data.stage_to is not None:
            progress("stage_to: writing there, and reading again")
            place = measure_place(config, _lengths(beton), seconds, num_readers)
        progress(f"decode: 1 worker, then {here}")
        one, every, bilinear = _decode(beton, config, seconds, here)
        step_timer = StepTimer(config, device, num_classes=num_classes)
        progress(f"augmentation on {device}")
        augmentation = step_timer.augmentation_images_per_s(seconds / 2)
        transfer = None
        if device.type == "cuda":
            progress("transfer")
            transfer = transfer_images_per_s(config, device, seconds / 4)
        progress(f"step on {device}" + (" (torch.compile may take minutes)" if compiles(config, device) else ""))
        step = step_timer.times(1.5 * seconds)
        progress("all together")
        with closing(RepeatedDecoding(beton, config.data, device, num_workers=config.data.num_workers)) as decoding:
            decoding.warm(seconds)
            whole = step_timer.whole_images_per_s(decoding, 1.5 * seconds)
    image_bytes = file.image_bytes
    rates = Rates(
        storage=_images(storage, image_bytes),
        storage_in_order=_images(in_order, image_bytes),
        decode=every,
        decode_one_worker=one,
        decode_bilinear=bilinear,
        transfer=transfer,
        augmentation=augmentation,
        step=step.images_per_s(batch_size=config.data.batch_size, update_freq=config.data.update_freq),
        whole=whole,
        step_as_run=step.images_per_s(batch_size=step.num_images, update_freq=1),
    )
    machine = describe_machine(device, load=load, step_memory_gb=step.peak_memory_gb)
    prediction = predict(rates, machine, file, config, node)
    return Diagnosis(
        config=config,
        config_names=config_names,
        node=node,
        machine=machine,
        file=file,
        rates=rates,
        prediction=prediction,
        advice=tuple(advise(rates, machine, file, config, node, prediction, place)),
        num_parameters=step_timer.num_parameters,
        num_readers=num_readers,
        storage=storage,
        storage_in_order=in_order,
        step=step,
        place=place,
    )


def _check(gpus: int | None, cores: int | None, gpu_images_per_s: float | None, seconds: float) -> None:
    for name, value in (("gpus", gpus), ("cores", cores)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: expected at least 1")
    if gpu_images_per_s is not None:
        if not gpu_images_per_s > 0:
            raise ValueError(f"gpu_images_per_s = {gpu_images_per_s:g}: expected a positive rate")
        if gpus is None:
            raise ValueError("gpu_images_per_s needs --gpus, the number of GPUs of the node")
    if not 0 < seconds <= 600:
        raise ValueError(f"seconds = {seconds:g}: expected more than 0 and at most 600 for each stage")


@contextmanager
def _training_file(config: Config, progress: Progress) -> Iterator[tuple[Path, bool]]:
    """Yield the .beton to measure with, and whether it is the user's own."""
    if config.data.data_path is not None:
        beton = config.data.data_path / "train.beton"
        if not beton.is_file():
            raise FileNotFoundError(
                f"data_path: {beton} not found; create it with: python write_ffcv_dataset.py --data_path IMAGENET "
                f"--out_dir {config.data.data_path} --split train, or omit --data_path to measure synthetic images"
            )
        yield beton, True
        return
    with tempfile.TemporaryDirectory(prefix="doctor-") as work:
        progress(f"no --data_path: writing {NUM_SYNTHETIC} synthetic images")
        try:
            folder = write_synthetic_folder(Path(work) / "images", NUM_SYNTHETIC)
        except ValueError:
            raise ValueError(
                "data_path is not set, and no photographs for synthetic images are installed; give --data_path "
                "BETON_DIR, or install scikit-learn, which has some"
            ) from None
        convert(ConversionOptions(data_path=folder, out_dir=Path(work), split="train"))
        yield Path(work) / "train.beton", False


def _describe(beton: Path, own: bool, config: Config) -> tuple[File, int]:
    """Return the file's facts, and the number of classes of a network for it."""
    from ffcv_convnext.data.check import describe_data

    info = describe_data(beton).splits[beton.stem]
    if info.image_bytes is None or not info.headers.num_read:
        raise ValueError(f"{beton} has no readable JPEG images; check it with: ffcv-convnext verify {beton}")
    num_classes = len(info.classes) if info.has_manifest else 1 + max(map(int, info.classes))
    if not own:
        num_classes = IMAGENET_CLASSES
    sides = [(bar.min + bar.max) / 2 * bar.num_samples for bar in info.longest_side]
    file = File(
        path=str(beton) if own else None,
        num_samples=info.num_samples,
        num_samples_of_run=info.num_samples if own else IMAGENET,
        gigabytes=(info.num_bytes if own else info.image_bytes.mean * IMAGENET) / 1e9,
        image_bytes=info.image_bytes.mean,
        longest_side=sum(sides) / info.num_samples,
        crop_alone=info.headers.num_cuttable / info.headers.num_read,
        remarks=tuple(f"train.py cannot use this file: {remark}" for remark in info.remarks),
    )
    return file, max(num_classes, config.model.nb_classes or 1)


def _read_cold(beton: Path, seconds: float, num_readers: int) -> tuple[StorageRate, StorageRate]:
    """Return the rates of random and of sequential reads."""
    from ffcv_convnext.data.beton.tables import read_tables

    tables = read_tables(beton)
    order = permutation(len(tables), 0, 0)[:MAX_COLD]
    order = order[tables.in_pages[order]]
    parts = [(int(tables.addresses[i]), int(tables.addresses[i] + tables.lengths[i])) for i in order]
    with ColdFile(beton) as file:
        return file.at_random(parts, seconds, num_readers=num_readers), file.in_order(seconds / 2)


def _lengths(beton: Path) -> list[int]:
    """Return the bytes of stored images, in a random order."""
    from ffcv_convnext.data.beton.tables import read_tables

    tables = read_tables(beton)
    order = permutation(len(tables), 0, 0)[:MAX_COLD]
    return [int(length) for length in tables.lengths[order[tables.in_pages[order]]]]


def _images(found: StorageRate | None, image_bytes: float) -> float | None:
    if found is None or found.megabytes_per_s is None:
        return None
    return found.megabytes_per_s * 1e6 / image_bytes


def _decode(beton: Path, config: Config, seconds: float, cores: int) -> tuple[float, float, float | None]:
    """Return images/s with one worker, with one per core, and the latter with bilinear instead of bicubic resizing."""
    cpu, found = torch.device("cpu"), []
    bicubic = config.data.train_interpolation == "bicubic"
    for num_workers in (1, cores) if cores > 1 else (1,):
        with closing(RepeatedDecoding(beton, config.data, cpu, num_workers=num_workers)) as decoding:
            decoding.warm(seconds)
            found.append(decoding.images_per_s(seconds))
    if not bicubic:
        return found[0], found[-1], None
    bilinear = config.replace(train_interpolation="bilinear").data
    with closing(RepeatedDecoding(beton, bilinear, cpu, num_workers=cores)) as decoding:
        decoding.warm(seconds)
        return found[0], found[-1], decoding.images_per_s(seconds)


def describe_machine(device: torch.device, *, load: float, step_memory_gb: float | None) -> Machine:
    """Return this machine's facts; load: running processes before the measurement."""
    cuda = device.type == "cuda"
    return Machine(
        processor=processor_name(),
        cores=available_cores(),
        device=torch.cuda.get_device_name(device) if cuda else "no CUDA device in use",
        cuda=cuda,
        memory_room_gb=available_memory().num_bytes / 1e9,
        load=load,
        torch=torch.__version__,
        device_memory_gb=torch.cuda.get_device_properties(device).total_memory / 1e9 if cuda else None,
        step_memory_gb=step_memory_gb,
    )
