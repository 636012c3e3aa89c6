"""`doctor`: storage, decode, transfer, augmentation and step measured apart, and what they mean for a run on a node."""

from __future__ import annotations

import json
import os
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ffcv_convnext.bench.compare import processor
from ffcv_convnext.bench.stages import Decoding, Stepping, StepTimes, TransferRate, transfer
from ffcv_convnext.bench.synthetic_data import write_photo_folder
from ffcv_convnext.config import SETTINGS, Config
from ffcv_convnext.data.convert import ConversionOptions, convert
from ffcv_convnext.doctor.cold_read import ColdFile, StorageRate, available_cores, room_for_cache
from ffcv_convnext.doctor.predict import File, Machine, Node, Outlook, Rates, advise, foresee, in_figures, predict_whole
from ffcv_convnext.rng import permutation
from ffcv_convnext.training.distributed import Processes

NUM_PHOTOGRAPHS = 512
IMAGENET, IMAGENET_CLASSES = 1_281_167, 1000  # training images; what photographs stand for
MOST_READERS = 256
MOST_COLD = 50_000  # samples drawn for the cold reads: more than any storage gives in the time

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All that was measured and what follows from it."""

    config: Config
    config_names: tuple[str, ...]
    node: Node
    machine: Machine
    file: File
    rates: Rates
    outlook: Outlook
    advice: tuple[str, ...]
    num_parameters: int
    num_readers: int
    storage: StorageRate | None  # at random; none: photographs in a temporary file
    storage_in_order: StorageRate | None
    transfer: TransferRate | None
    step: StepTimes

    @property
    def predicted_whole(self) -> float:
        return predict_whole(self.rates, self.machine, self.config)

    def to_json(self) -> str:
        """The page's figures; units are in the names, rates without one are images/s."""
        images, run = self.config.data, self.config.run
        content: dict[str, Any] = {
            "configs": self.config_names,
            "settings": {
                "model": self.config.model.model,
                "num_parameters": self.num_parameters,
                "input_size": images.input_size,
                "batch_size": images.batch_size,
                "update_freq": images.update_freq,
                "num_workers": images.num_workers,
                "train_interpolation": images.train_interpolation,
                "amp": run.amp,
                "channels_last": run.channels_last,
                "compile": run.compile,
                "epochs": self.config.schedule.epochs,
            },
            "node": asdict(self.node),
            "machine": asdict(self.machine),
            "file": asdict(self.file),
            "images_per_s": {**asdict(self.rates), "whole_predicted": self.predicted_whole},
            "storage": {
                "num_readers": self.num_readers,
                "at_random": self.storage and {**asdict(self.storage), "megabytes_per_s": self.storage.megabytes_per_s},
                "in_order": self.storage_in_order
                and {**asdict(self.storage_in_order), "megabytes_per_s": self.storage_in_order.megabytes_per_s},
            },
            "transfer_gigabytes_per_s": self.transfer and self.transfer.gigabytes_per_s,
            "step": asdict(self.step),
            "outlook": {
                "bound": self.outlook.bound,
                "images_per_s": self.outlook.images_per_s,
                "first_epoch_images_per_s": self.outlook.first_epoch_images_per_s,
                "host_images_per_s": self.outlook.host_images_per_s,
                "stages_images_per_s": self.outlook.stages,
                "device_images_per_s": self.outlook.device,
                "hours": self.outlook.hours,
                "decoding_cores": self.outlook.decoding_cores,
                "cores_a_gpu": self.outlook.cores_a_gpu,
                "fits_in_memory": self.outlook.fits_in_memory,
            },
            "advice": self.advice,
        }
        return json.dumps(content, indent=1)

    def format(self) -> str:
        """The page."""
        parts = [self._heading(), self._table(), self._expected(), self._advice()]
        return "\n\n".join("\n".join(lines) for lines in parts)

    @property
    def _there(self) -> str:
        cores = f"{self.node.cores} core{'s' * (self.node.cores > 1)}"
        return f"{self.node.gpus} GPU{'s' * (self.node.gpus > 1)} and {cores}" if self.node.gpus else cores

    def _heading(self) -> list[str]:
        machine, file, config = self.machine, self.file, self.config
        names = " ".join(self.config_names) or "the default settings"
        where = file.path or f"{file.num_samples} photographs, for want of --data_path BETON_DIR"
        if file.path is None:
            where += f"; they stand for ImageNet's {file.num_samples_of_run:,}"
        crop = "no restart markers: an image is decoded whole for a crop of it"
        if file.crop_alone:
            crop = f"restart markers in {100 * file.crop_alone:.0f} % of them: there only the crop is decoded"
        memory = "" if machine.device_memory_gb is None else f", {machine.device_memory_gb:.0f} GB"
        rows = [
            (
                "machine",
                f"{machine.processor}: {_count(machine.cores, 'core')}, {machine.memory_room_gb:.1f} GB of memory free "
                f"or cache; {machine.device}{memory}; torch {machine.torch}",
            ),
            (
                "file",
                f"{file.num_samples:,} images, {file.image_bytes / 1e3:.1f} kB each, {_size(file.gigabytes)} in all; "
                + crop,
            ),
            (
                "run",
                f"{config.model.model}, {self.num_parameters / 1e6:.2f} M parameters; {config.data.input_size} "
                f"pixels, batch_size {config.data.batch_size}, amp {config.run.amp}, "
                f"{config.data.train_interpolation}; {_count(config.schedule.epochs, 'epoch')}",
            ),
        ]
        if machine.busy:
            text = (
                f"{machine.load:.1f} processes were running on {_count(machine.cores, 'core')} when this began: the "
                "rates are too low, and do not fit together well; measure again when the machine is idle"
            )
            rows.append(("note", text))
        bound, host = self.outlook.bound, _number(self.outlook.host_images_per_s)
        verdict = f"{self._there} train {_number(self.outlook.images_per_s)} images/s, bound by {bound}"
        if self.outlook.images_per_s is None:
            verdict = (
                f"the host of {self._there} feeds {host} images/s, bound by {bound}; what its GPUs train is not known"
            )
        return [
            f"{names} on {where}",
            verdict,
            "",
            *(line for name, text in rows for line in _wrapped(f"  {name:9}", text)),
        ]

    def _table(self) -> list[str]:
        rows = [("stage", "images/s here", "measured", f"{self._there}", "")]
        rows += self._storage_rows()
        rows.append(self._decode_row())
        rows += self._device_rows()
        rows.append(self._whole_row())
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        aligned = ["<", ">", "<", ">", "<"]
        lines = [
            "| "
            + " | ".join(f"{cell:{way}{width}}" for cell, way, width in zip(row, aligned, widths, strict=True))
            + " |"
            for row in rows
        ]
        rule = "|".join("-" * (w + 1) + (":" if way == ">" else "-") for w, way in zip(widths, aligned, strict=True))
        return [lines[0], f"|{rule}|", *lines[1:]]

    def _storage_rows(self) -> Iterator[tuple[str, str, str, str, str]]:
        if self.storage is None or self.storage_in_order is None:
            yield "storage", "-", "not measured: give --data_path", "not known", ""
            return
        for name, found, rate, how, there in (
            ("storage, in order", self.storage_in_order, self.rates.storage_in_order, "one reader", ""),
            (
                "storage, at random",
                self.storage,
                self.rates.storage,
                _count(self.num_readers, "reader"),
                _number(self.rates.storage),
            ),
        ):
            if rate is None or found.megabytes_per_s is None:
                yield name, "-", "stays in memory: tmpfs, in use, or not your file", "not known" if there else "", ""
                continue
            remark = self._mark("storage")
            if not remark and self.outlook.fits_in_memory:
                remark = "first epoch only: it fits in memory"
            text = f"{found.megabytes_per_s:,.0f} MB/s cold, {how}, {found.megabytes:,.0f} MB read"
            yield name, _number(rate), text, there, remark if there else ""

    def _decode_row(self) -> tuple[str, str, str, str, str]:
        rates, cores = self.rates, self.machine.cores
        a_core = rates.decode / cores
        one = f"; 1 worker: {_number(rates.decode_one_worker)}" if cores > 1 else ""
        remark = self._mark("decode") or f"{self.outlook.decoding_cores} cores decode"
        there = _number(self.outlook.stages["decode"])
        return "decode", _number(rates.decode), f"{_number(a_core)} a core, {_count(cores, 'core')}{one}", there, remark

    def _device_rows(self) -> Iterator[tuple[str, str, str, str, str]]:
        stages, rates, node = self.outlook.stages, self.rates, self.node
        device = "the GPU" if self.machine.cuda else "the processor"
        if self.transfer is None:
            there = "not known" if node.gpus else "-"
            yield "transfer", "-", "no CUDA device here" if node.gpus else "not applicable: no CUDA device", there, ""
        else:
            text = f"{self.transfer.gigabytes_per_s:.1f} GB/s, uint8 from pinned memory"
            there = _number(stages["transfer"])
            yield "transfer", _number(rates.transfer), text, there, self._mark("transfer")
        given = node.gpu_images_per_s is not None
        known = _number(stages["augmentation"]) if stages["augmentation"] else "in the step" if given else "not known"
        yield "augmentation", _number(rates.augmentation), f"on {device}", known, self._mark("augmentation")
        text = f"on {device}"
        if self.step.num_images != self.config.data.batch_size:
            text += f", {self.step.num_images} images at a time for want of time"
        there = _number(stages["step"]) if stages["step"] else "not known"
        remark = self._mark("step")
        if given:
            remark = (remark + "; " if remark else "") + f"{_number(node.gpu_images_per_s)} a GPU, as given"
        yield "step", _number(rates.step), text, there, remark

    def _whole_row(self) -> tuple[str, str, str, str, str]:
        predicted = self.predicted_whole
        how = "decode beside the GPU" if self.machine.cuda else "in turn on the same cores"
        text = f"{_number(predicted)} predicted ({how}), ratio {self.rates.whole / predicted:.2f}"
        there = _number(self.outlook.images_per_s) if self.outlook.images_per_s else "not known"
        return "all together", _number(self.rates.whole), text, there, ""

    def _mark(self, stage: str) -> str:
        if self.outlook.bound != stage:
            return ""
        return "<- the bound" if self.outlook.images_per_s else "<- bounds what the host can feed"

    def _expected(self) -> list[str]:
        outlook, node, file = self.outlook, self.node, self.file
        host = outlook.host_images_per_s
        lines = []
        if outlook.images_per_s is None:
            lines += [
                f"{outlook.bound} feeds up to {_number(host)} images/s, {_number(host / node.gpus)} a GPU. A GPU that "
                "trains faster than that waits; one that trains slower is itself the bound.",
                "How fast a GPU trains cannot be measured here: run doctor on the node, or give a known figure "
                "(images_per_s in the log of a run on one GPU) with --gpu_images_per_s.",
            ]
        else:
            a_gpu = f" ({_number(outlook.images_per_s / node.gpus)} a GPU)" if node.gpus else ""
            epochs = _count(self.config.schedule.epochs, "epoch")
            lines.append(
                f"{_number(outlook.images_per_s)} images/s{a_gpu}, bound by {outlook.bound}; {epochs} of "
                f"{file.num_samples_of_run:,} images take {_duration(outlook.hours or 0)}, evaluation not counted."
            )
            first = outlook.first_epoch_images_per_s
            if first is not None and first < 0.99 * outlook.images_per_s:
                lines.append(f"In the first epoch {_number(first)} images/s, as storage gives them.")
        if outlook.images_per_s is None and outlook.fits_in_memory and (self.rates.storage or host) < host:
            lines.append(f"In the first epoch storage feeds up to {_number(self.rates.storage)} images/s.")
        if outlook.cores_a_gpu is not None:
            lines.append(
                f"A GPU needs {outlook.cores_a_gpu:.1f} cores to be kept busy and has {node.cores / node.gpus:.1f}."
            )
        if node.gpus:
            assumed = ["cores like these", "one core a GPU feeds it and does not decode"]
            assumed += ["gradients cross between GPUs at no cost"] * (node.gpus > 1)
            assumed += ["storage and memory as here"] * (self.storage is not None)
            lines.append(f"Assumed: {', '.join(assumed)}.")
        return [f"To expect on {self._there}:", *(line for text in lines for line in _wrapped("  ", text))]

    def _advice(self) -> list[str]:
        lines = [line for i, text in enumerate(self.advice, 1) for line in _wrapped(f"  {i}. ", text)]
        return ["What to change:", *(lines or ["  nothing that these figures tell"])]


def diagnose(
    config: Config,
    *,
    config_names: tuple[str, ...],
    gpus: int | None,
    cores: int | None,
    gpu_images_per_s: float | None,
    seconds: float,
    say: Say,
) -> Diagnosis:
    """Measure every stage for about `seconds` on this machine, and scale the rates to the node.

    gpus, cores: the node's; none: this machine's.   gpu_images_per_s: of one GPU, where it is known.
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
    num_readers = min(max(1, node.gpus) * config.data.num_workers, MOST_READERS)
    with _training_file(config, say) as (beton, own):
        file, num_classes = _describe(beton, own, config)
        storage = in_order = None
        if own:
            say("storage: reading samples that were put out of memory")
            storage, in_order = _read_cold(beton, seconds, num_readers)
        say(f"decode: 1 worker, then {here}")
        one, every, bilinear = _decode(beton, config, seconds, here)
        stepping = Stepping(config, device, num_classes=num_classes)
        say(f"augmentation on {device}")
        augmentation = stepping.augmentation_images_per_s(seconds / 2)
        transferred = None
        if device.type == "cuda":
            say("transfer")
            transferred = transfer(config, device, seconds / 4)
        say(f"step on {device}" + (" (torch.compile takes its time)" if config.run.compile else ""))
        step = stepping.times(1.5 * seconds)
        say("all together")
        with closing(Decoding(beton, config.data, device, num_workers=config.data.num_workers)) as decoding:
            decoding.warm(seconds)
            whole = stepping.whole_images_per_s(decoding, 1.5 * seconds)
    image_bytes = file.image_bytes
    rates = Rates(
        storage=_images(storage, image_bytes),
        storage_in_order=_images(in_order, image_bytes),
        decode=every,
        decode_one_worker=one,
        decode_bilinear=bilinear,
        transfer=None if transferred is None else transferred.images_per_s,
        augmentation=augmentation,
        step=step.images_per_s(batch_size=config.data.batch_size, update_freq=config.data.update_freq),
        whole=whole,
        step_as_run=step.images_per_s(batch_size=step.num_images, update_freq=1),
    )
    machine = _machine(device, here, load, step)
    return Diagnosis(
        config=config,
        config_names=config_names,
        node=node,
        machine=machine,
        file=file,
        rates=rates,
        outlook=foresee(rates, machine, file, config, node),
        advice=tuple(advise(rates, machine, file, config, node)),
        num_parameters=stepping.num_parameters,
        num_readers=num_readers,
        storage=storage,
        storage_in_order=in_order,
        transfer=transferred,
        step=step,
    )


def _check(gpus: int | None, cores: int | None, gpu_images_per_s: float | None, seconds: float) -> None:
    for name, value in (("gpus", gpus), ("cores", cores)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: expected at least 1")
    if gpu_images_per_s is not None:
        if not gpu_images_per_s > 0:
            raise ValueError(f"gpu_images_per_s = {gpu_images_per_s:g}: expected a positive rate")
        if gpus is None:
            raise ValueError("gpu_images_per_s needs --gpus: how many GPUs the node has")
    if not 0 < seconds <= 600:
        raise ValueError(f"seconds = {seconds:g}: expected 0 to 600 for each stage")


@contextmanager
def _training_file(config: Config, say: Say) -> Iterator[tuple[Path, bool]]:
    """The .beton to measure with, and whether it is the user's own."""
    if config.data.data_path is not None:
        beton = config.data.data_path / "train.beton"
        if not beton.is_file():
            raise FileNotFoundError(
                f"data_path: {beton} does not exist; create it with: python write_ffcv_dataset.py --data_path IMAGENET "
                f"--out_dir {config.data.data_path} --split train, or leave --data_path out to measure photographs"
            )
        yield beton, True
        return
    with tempfile.TemporaryDirectory(prefix="doctor-") as work:
        say(f"no --data_path: writing {NUM_PHOTOGRAPHS} photographs to measure with")
        try:
            folder = write_photo_folder(Path(work) / "photographs", NUM_PHOTOGRAPHS)
        except ValueError:
            raise ValueError(
                "data_path is not set, and no photographs are at hand to measure with; give --data_path BETON_DIR, or "
                "install scikit-learn, which brings some"
            ) from None
        convert(ConversionOptions(data_path=folder, out_dir=Path(work), split="train"))
        yield Path(work) / "train.beton", False


def _describe(beton: Path, own: bool, config: Config) -> tuple[File, int]:
    """The file's facts, and the number of classes of a network for it."""
    from ffcv_convnext.data.check import describe_data

    info = describe_data(beton).splits[beton.stem]
    if info.image_bytes is None or not info.headers.num_read:
        raise ValueError(f"{beton} has no JPEG images that can be located; see: ffcv-convnext verify {beton}")
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
        remarks=tuple(f"train.py refuses this file: {remark}" for remark in info.remarks),
    )
    return file, max(num_classes, config.model.nb_classes or 1)


def _read_cold(beton: Path, seconds: float, num_readers: int) -> tuple[StorageRate, StorageRate]:
    """At random, and in order."""
    from ffcv_convnext.data.beton.tables import read_tables

    tables = read_tables(beton)
    order = permutation(len(tables), 0, 0)[:MOST_COLD]
    order = order[tables.in_pages[order]]
    parts = [(int(tables.addresses[i]), int(tables.addresses[i] + tables.lengths[i])) for i in order]
    announced = "data_cache" in SETTINGS  # then the loader asks the kernel for batches in advance
    with ColdFile(beton) as file:
        return (
            file.at_random(parts, seconds, num_readers=num_readers, announced=announced),
            file.in_order(seconds / 2),
        )


def _images(found: StorageRate | None, image_bytes: float) -> float | None:
    if found is None or found.megabytes_per_s is None:
        return None
    return found.megabytes_per_s * 1e6 / image_bytes


def _decode(beton: Path, config: Config, seconds: float, cores: int) -> tuple[float, float, float | None]:
    """Images/s with one worker, with one a core, and so with bilinear interpolation where the config is bicubic."""
    cpu, found = torch.device("cpu"), []
    bicubic = config.data.train_interpolation == "bicubic"
    for num_workers in (1, cores) if cores > 1 else (1,):
        with closing(Decoding(beton, config.data, cpu, num_workers=num_workers)) as decoding:
            decoding.warm(seconds)
            found.append(decoding.images_per_s(seconds))
    if not bicubic:
        return found[0], found[-1], None
    bilinear = config.replace(train_interpolation="bilinear").data
    with closing(Decoding(beton, bilinear, cpu, num_workers=cores)) as decoding:
        decoding.warm(seconds)
        return found[0], found[-1], decoding.images_per_s(seconds)


def _machine(device: torch.device, cores: int, load: float, step: StepTimes) -> Machine:
    cuda = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9 if cuda else None
    return Machine(
        processor=processor(),
        cores=cores,
        device=torch.cuda.get_device_name(device) if cuda else "no CUDA device in use",
        cuda=cuda,
        memory_room_gb=room_for_cache() / 1e9,
        load=load,
        torch=torch.__version__,
        device_memory_gb=memory,
        step_memory_gb=step.peak_memory_gb,
    )


def _wrapped(start: str, text: str) -> list[str]:
    """Lines of at most 120 characters, the later ones indented like the first one's text."""
    lines = textwrap.wrap(text, 120 - len(start), break_long_words=False, break_on_hyphens=False)
    return [(start if i == 0 else " " * len(start)) + line for i, line in enumerate(lines)]


def _number(value: float | None) -> str:
    return "-" if value is None else in_figures(value)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _size(gigabytes: float) -> str:
    return f"{gigabytes:.1f} GB" if gigabytes >= 1 else f"{1000 * gigabytes:.1f} MB"


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 72 else f"{hours / 24:,.1f} days"
