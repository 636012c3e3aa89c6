"""Predict a node's training rate, its bottleneck and the duration of a run from measured rates.

Pure arithmetic. Assumptions, which the page repeats: a node's cores decode as fast as these, one core per GPU is busy
feeding it, GPUs do not slow each other down, and all of them share the storage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ffcv_convnext.config import Config

Stage = Literal["storage", "decode", "transfer", "augmentation", "step"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Images/s of one process on this machine; None: not measured."""

    storage: float | None  # cold, samples in random order, as in an epoch
    storage_in_order: float | None  # cold, from start to end
    decode: float  # with all cores
    decode_one_worker: float
    decode_bilinear: float | None  # with all cores; None: the config's interpolation is not bicubic
    transfer: float | None
    augmentation: float
    step: float  # one device, no loader, no augmentation; the config's batch_size and update_freq
    whole: float  # all stages together, with the micro-batch size of `step_as_run`
    step_as_run: float  # one device, with the micro-batch size that was measured, one micro-batch per step


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine that was measured."""

    processor: str
    cores: int  # that this process may use
    device: str
    cuda: bool
    memory_room_gb: float  # free memory, the page cache included, 1e9 bytes
    load: float  # running processes, average of the minute before the measurement
    torch: str
    device_memory_gb: float | None  # 1e9 bytes
    step_memory_gb: float | None  # peak use

    @property
    def busy(self) -> bool:
        """Whether other processes used so many cores that the rates are wrong."""
        return self.load > 0.5 * self.cores


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """The training images."""

    path: str | None  # None: synthetic images written for the measurement
    num_samples: int
    num_samples_of_run: int  # ImageNet's for synthetic images
    gigabytes: float  # 1e9 bytes
    image_bytes: float  # mean
    longest_side: float  # pixels, mean
    crop_alone: float  # share of the images with restart markers: only the crop is decoded
    remarks: tuple[str, ...]  # reasons why train.py cannot use it


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where stage_to would copy the data. Rates in images/s; None: not measured."""

    folder: str
    in_memory: bool
    write: float | None = None
    write_megabytes_per_s: float | None = None  # 1e6 bytes
    at_random: float | None = None  # cold; None in memory, where reads do not wait
    at_random_megabytes_per_s: float | None = None
    problem: str | None = None  # why the data cannot be copied there


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """The machine to predict."""

    gpus: int  # 0: training on the processor
    cores: int
    gpu_images_per_s: float | None  # of one GPU, augmentation included, if it is known


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Expected rates of the node in images/s, all devices together; None: not known."""

    stages: dict[Stage, float | None]  # each alone
    device: float | None  # augmentation and step in turn
    fits_in_memory: bool  # if so, storage matters in the first epoch only
    decoding_cores: int
    bound: Stage  # the bottleneck among the known stages
    images_per_s: float | None  # after the first epoch
    first_epoch_images_per_s: float | None
    hours: float | None  # all epochs, without evaluation
    host_images_per_s: float  # limit by storage, decode and transfer
    cores_per_gpu: float | None  # needed to decode for one GPU and to feed it


def predict(rates: Rates, machine: Machine, file: File, config: Config, node: Node) -> Prediction:
    """Scale the rates to the node, and find its bottleneck."""
    fits = file.gigabytes <= machine.memory_room_gb
    per_core = rates.decode / machine.cores
    if node.gpus == 0:
        return _on_processor(rates, machine, file, config, node, fits)
    cores = min(max(1, node.cores - node.gpus), node.gpus * config.data.num_workers)
    stages: dict[Stage, float | None] = {
        "storage": rates.storage,
        "decode": per_core * cores,
        "transfer": rates.transfer and rates.transfer * node.gpus,
        "augmentation": rates.augmentation * node.gpus if machine.cuda else None,
        "step": rates.step * node.gpus if machine.cuda else None,
    }
    device = serial_rate(rates.augmentation, rates.step) * node.gpus if machine.cuda else None
    if node.gpu_images_per_s is not None:
        device = stages["step"] = node.gpu_images_per_s * node.gpus
        stages["augmentation"] = None
    host: dict[Stage, float] = {
        name: value
        for name in ("storage", "decode", "transfer")
        if (value := stages[name]) is not None and not (name == "storage" and fits)
    }
    bound = min(host, key=lambda name: host[name])
    if device is not None and device <= host[bound]:
        slow = stages["augmentation"] is not None and rates.augmentation < rates.step
        bound = "augmentation" if slow else "step"
    images_per_s = None if device is None else min(device, *host.values())
    first = images_per_s and min(images_per_s, rates.storage or images_per_s)
    return Prediction(
        stages=stages,
        device=device,
        fits_in_memory=fits,
        decoding_cores=cores,
        bound=bound,
        images_per_s=images_per_s,
        first_epoch_images_per_s=first,
        hours=_hours(first, images_per_s, file, config),
        host_images_per_s=min(host.values()),
        cores_per_gpu=None if device is None else 1 + device / node.gpus / per_core,
    )


def _on_processor(rates: Rates, machine: Machine, file: File, config: Config, node: Node, fits: bool) -> Prediction:
    """Predict training on the processor: decode, augmentation and step share its cores."""
    scale = node.cores / machine.cores
    cores = min(node.cores, config.data.num_workers)
    work: dict[Stage, float] = {
        "decode": rates.decode * scale,
        "augmentation": rates.augmentation * scale,
        "step": rates.step * scale,
    }
    device = serial_rate(work["augmentation"], work["step"])
    host = rates.decode / machine.cores * cores
    if not fits and rates.storage is not None:
        host = min(host, rates.storage)
    images_per_s = min(serial_rate(*work.values()), host)
    bound: Stage = min(work, key=lambda name: work[name])
    if images_per_s == host:
        bound = "storage" if host == rates.storage else "decode"
    first = min(images_per_s, rates.storage or images_per_s)
    return Prediction(
        stages={"storage": rates.storage, "transfer": None, **work},
        device=device,
        fits_in_memory=fits,
        decoding_cores=cores,
        bound=bound,
        images_per_s=images_per_s,
        first_epoch_images_per_s=first,
        hours=_hours(first, images_per_s, file, config),
        host_images_per_s=host,
        cores_per_gpu=None,
    )


def serial_rate(*rates: float) -> float:
    """Return the rate of work that the same hardware does one after the other."""
    return 1 / sum(1 / rate for rate in rates)


def format_rate(rate: float | None) -> str:
    """Return '12,345', '99.1' or '0.482', or '-' if it is None."""
    if rate is None:
        return "-"
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def predict_whole(rates: Rates, machine: Machine, config: Config) -> float:
    """Predict `rates.whole`: the loader works beside a GPU, but shares the processor with a step on it."""
    decode = rates.decode / machine.cores * min(machine.cores, config.data.num_workers)
    if not machine.cuda:
        return min(decode, serial_rate(rates.decode, rates.augmentation, rates.step_as_run))
    return min(decode, rates.transfer or decode, serial_rate(rates.augmentation, rates.step_as_run))


def _hours(first: float | None, later: float | None, file: File, config: Config) -> float | None:
    if first is None or later is None:
        return None
    return file.num_samples_of_run / 3600 * (1 / first + (config.schedule.epochs - 1) / later)
