"""From measured rates to what a node will do: which stage bounds it, how long the run takes, what to change.

Pure arithmetic. The assumptions, which the page repeats: a node's cores decode as fast as these, one core a GPU is
busy feeding it, GPUs do not slow each other, and storage is shared by all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ffcv_convnext.config import SETTINGS, Config

Stage = Literal["storage", "decode", "transfer", "augmentation", "step"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Images/s of one process on this machine; none: not measured."""

    storage: float | None  # cold, samples at random, as an epoch reads them
    storage_in_order: float | None  # cold, from begin to end
    decode: float  # with all cores
    decode_one_worker: float
    decode_bilinear: float | None  # with all cores; none: the config's interpolation is not bicubic
    transfer: float | None
    augmentation: float
    step: float  # one device, no loader, no augmentation; the config's batch_size and update_freq
    whole: float  # all stages at once, here, in the micro-batches that `step_as_run` was measured with
    step_as_run: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where the rates come from."""

    processor: str
    cores: int  # that this process may use
    device: str
    cuda: bool
    memory_room_gb: float  # that could hold cached files, 1e9 bytes
    load: float  # processes that ran when we began, in the last minute
    torch: str
    device_memory_gb: float | None  # 1e9 bytes
    step_memory_gb: float | None  # of it in use at most

    @property
    def busy(self) -> bool:
        """Whether others took enough of the cores to falsify the rates."""
        return self.load > 0.5 * self.cores


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """The training images."""

    path: str | None  # none: photographs written for the measurement
    num_samples: int
    num_samples_of_run: int  # ImageNet's where the photographs stand for it
    gigabytes: float  # 1e9 bytes
    image_bytes: float  # mean
    longest_side: float  # pixels, mean
    crop_alone: float  # share of the images of which a crop can be decoded alone (restart markers)
    remarks: tuple[str, ...]  # what keeps train.py from using it


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """The machine that shall train."""

    gpus: int  # 0: on the processor
    cores: int
    gpu_images_per_s: float | None  # of one, augmentation included, known from elsewhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What to expect of the node, images/s of all its devices together; none: not known."""

    stages: dict[Stage, float | None]  # each alone
    device: float | None  # augmentation and step in turn
    fits_in_memory: bool  # then storage counts in the first epoch only
    decoding_cores: int
    bound: Stage  # of what is known
    images_per_s: float | None  # after the first epoch
    first_epoch_images_per_s: float | None
    hours: float | None  # of all epochs, without evaluation
    host_images_per_s: float  # what storage, decode and transfer can feed
    cores_a_gpu: float | None  # that one needs, to decode for it and to feed it


def foresee(rates: Rates, machine: Machine, file: File, config: Config, node: Node) -> Outlook:
    """Scale the rates to the node, and find its bound."""
    fits = file.gigabytes <= machine.memory_room_gb
    a_core = rates.decode / machine.cores
    if node.gpus == 0:
        return _on_processor(rates, machine, file, config, node, fits)
    cores = min(max(1, node.cores - node.gpus), node.gpus * config.data.num_workers)
    stages: dict[Stage, float | None] = {
        "storage": rates.storage,
        "decode": a_core * cores,
        "transfer": rates.transfer and rates.transfer * node.gpus,
        "augmentation": rates.augmentation * node.gpus if machine.cuda else None,
        "step": rates.step * node.gpus if machine.cuda else None,
    }
    device = in_turn(rates.augmentation, rates.step) * node.gpus if machine.cuda else None
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
    return Outlook(
        stages=stages,
        device=device,
        fits_in_memory=fits,
        decoding_cores=cores,
        bound=bound,
        images_per_s=images_per_s,
        first_epoch_images_per_s=first,
        hours=_hours(first, images_per_s, file, config),
        host_images_per_s=min(host.values()),
        cores_a_gpu=None if device is None else 1 + device / node.gpus / a_core,
    )


def _on_processor(rates: Rates, machine: Machine, file: File, config: Config, node: Node, fits: bool) -> Outlook:
    """Training on the processor: decode, augmentation and step share its cores."""
    scale = node.cores / machine.cores
    cores = min(node.cores, config.data.num_workers)
    work: dict[Stage, float] = {
        "decode": rates.decode * scale,
        "augmentation": rates.augmentation * scale,
        "step": rates.step * scale,
    }
    device = in_turn(work["augmentation"], work["step"])
    host = rates.decode / machine.cores * cores
    if not fits and rates.storage is not None:
        host = min(host, rates.storage)
    images_per_s = min(in_turn(*work.values()), host)
    bound: Stage = min(work, key=lambda name: work[name])
    if images_per_s == host:
        bound = "storage" if host == rates.storage else "decode"
    first = min(images_per_s, rates.storage or images_per_s)
    return Outlook(
        stages={"storage": rates.storage, "transfer": None, **work},
        device=device,
        fits_in_memory=fits,
        decoding_cores=cores,
        bound=bound,
        images_per_s=images_per_s,
        first_epoch_images_per_s=first,
        hours=_hours(first, images_per_s, file, config),
        host_images_per_s=host,
        cores_a_gpu=None,
    )


def in_turn(*rates: float) -> float:
    """The rate of work that is done one after the other by the same hardware."""
    return 1 / sum(1 / rate for rate in rates)


def in_figures(rate: float) -> str:
    """'12,345', '99.1', '0.482': three figures at least."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def predict_whole(rates: Rates, machine: Machine, config: Config) -> float:
    """What `rates.whole` should be: the loader works beside a GPU, but shares the processor with a step on it."""
    decode = rates.decode / machine.cores * min(machine.cores, config.data.num_workers)
    if not machine.cuda:
        return min(decode, in_turn(rates.decode, rates.augmentation, rates.step_as_run))
    return min(decode, rates.transfer or decode, in_turn(rates.augmentation, rates.step_as_run))


def _hours(first: float | None, later: float | None, file: File, config: Config) -> float | None:
    if first is None or later is None:
        return None
    return file.num_samples_of_run / 3600 * (1 / first + (config.schedule.epochs - 1) / later)


def advise(rates: Rates, machine: Machine, file: File, config: Config, node: Node) -> list[str]:
    """What to change, the most important first; each line quotes the figure it follows from."""
    outlook = foresee(rates, machine, file, config, node)
    bound = outlook.bound
    groups: dict[str, list[str]] = {
        "storage": list(_about_storage(rates, machine, file, config, outlook)),
        "decode": list(_about_decoding(rates, machine, file, config, node, outlook)),
        "device": list(_about_device(rates, machine, config, node, outlook)),
    }
    first = groups.pop(bound if bound in groups else "device")
    settings, measurement = _about_settings(config, node), _about_measurement(rates, machine, config)
    return [*file.remarks, *first, *(text for group in groups.values() for text in group), *settings, *measurement]


def _about_storage(rates: Rates, machine: Machine, file: File, config: Config, outlook: Outlook) -> Iterator[str]:
    if rates.storage is None or rates.storage_in_order is None:
        return
    wanted = outlook.images_per_s if outlook.images_per_s is not None else outlook.host_images_per_s
    room, size = f"{machine.memory_room_gb:.1f} GB of memory", f"{file.gigabytes:.1f} GB"
    if outlook.bound == "storage":
        yield (
            f"storage bounds: samples at random come at {rates.storage:,.0f} images/s, and the file ({size}) does not "
            f"fit into {room}. Train on a node with more memory, put the file on a faster disk, or write it smaller "
            "(write_ffcv_dataset.py --max_resolution, --jpeg_quality)"
        )
        if "order" in SETTINGS and config.flat()["order"] == "random" and rates.storage_in_order > rates.storage:
            yield (
                "--order quasi_random reads long stretches: in order this storage gives "
                f"{rates.storage_in_order:,.0f} images/s, {rates.storage_in_order / rates.storage:.1f} times as many "
                "as at random"
            )
    elif outlook.fits_in_memory and rates.storage < wanted:
        minutes = [file.num_samples_of_run / rate / 60 for rate in (rates.storage, wanted, rates.storage_in_order)]
        if minutes[0] - minutes[1] - minutes[2] < 1:
            return
        loaded = " (or --data_cache ram, which reads it so)" if "data_cache" in SETTINGS else ""
        yield (
            f"the first epoch waits for storage: {rates.storage:,.0f} images/s at random take {minutes[0]:,.0f} "
            f"minutes instead of {minutes[1]:,.0f}. The file ({size}) fits into {room}: read it in order before, in "
            f"{minutes[2]:,.1f} minutes: cat {file.path} > /dev/null{loaded}"
        )


def _about_decoding(
    rates: Rates, machine: Machine, file: File, config: Config, node: Node, outlook: Outlook
) -> Iterator[str]:
    data, processes = config.data, max(1, node.gpus)
    a_core = rates.decode / machine.cores
    free = max(1, node.cores - node.gpus)
    threads, most = processes * data.num_workers, free // processes
    bounds, gpus_known = outlook.bound == "decode", outlook.device is not None
    if bounds and file.crop_alone < 0.9:
        share = f"only {100 * file.crop_alone:.0f} %" if file.crop_alone else "none"
        yield (
            f"{share} of the stored images have restart markers; the others are decoded whole for a crop of them. "
            "Convert again with write_ffcv_dataset.py (about 1.3 times the images/s in docs/performance.md)"
        )
    if bounds and data.num_workers < most:
        yield (
            f"num_workers = {data.num_workers}: {processes} x {data.num_workers} threads leave {free - threads} of "
            f"{free} cores idle; --num_workers {most} decodes {a_core * most * processes:,.0f} images/s instead of "
            f"{a_core * threads:,.0f}"
        )
    if bounds and gpus_known and outlook.cores_a_gpu is not None:
        yield (
            f"more cores: a GPU trains {(outlook.device or 0) / node.gpus:,.0f} images/s and a core decodes "
            f"{a_core:,.0f}, so it needs {outlook.cores_a_gpu:.1f} cores (one of them feeds it) and has "
            f"{node.cores / node.gpus:.1f}"
        )
    if bounds and gpus_known and rates.decode_bilinear is not None and rates.decode_bilinear > 1.05 * rates.decode:
        yield (
            f"--train_interpolation bilinear decodes {rates.decode_bilinear:,.0f} images/s here, bicubic "
            f"{rates.decode:,.0f}; but the pixels are no longer the paper's"
        )
    if bounds and gpus_known and file.longest_side > 2 * data.input_size:
        shorter = round(1.6 * data.input_size)
        yield (
            f"the stored images are {file.longest_side:.0f} pixels long on average, a crop becomes {data.input_size}: "
            f"--max_resolution {shorter} at conversion leaves {(shorter / file.longest_side) ** 2:.2f} of the pixels "
            "to decode (and other training images)"
        )
    if threads >= 2 * free and data.num_workers > 1:
        yield (
            f"num_workers = {data.num_workers}: {threads} threads share {free} cores; --num_workers {max(1, most)} "
            "does the same with less memory"
        )
    times = rates.decode / rates.decode_one_worker
    if machine.cores > 1 and times < 0.7 * machine.cores and not machine.busy:
        yield (
            f"{machine.cores} cores decode only {times:.1f} times as fast as one ({rates.decode:,.0f} against "
            f"{rates.decode_one_worker:,.0f} images/s): they are hyperthreads or limited by a quota. The node's figure "
            "takes the lower rate of a core"
        )


def _about_device(rates: Rates, machine: Machine, config: Config, node: Node, outlook: Outlook) -> Iterator[str]:
    if not node.gpus and outlook.bound == "step":
        share = in_turn(rates.decode, rates.augmentation, rates.step) / rates.step
        yield (
            f"on the processor the step ({in_figures(rates.step)} images/s) takes {100 * share:.0f} % of an image's "
            f"time, and the loader could feed {rates.decode / rates.step:,.0f} times as much: train on a GPU, or a "
            "smaller network or --input_size"
        )
    if outlook.bound == "transfer":
        yield (
            f"transfer bounds: {rates.transfer or 0:,.0f} images/s a GPU. The images cross as uint8 already: look for "
            "a PCIe link that is too narrow (nvidia-smi -q -d PCI), or for GPUs that share one"
        )
    if node.gpus and outlook.device is not None and outlook.bound in ("step", "augmentation"):
        feeds = outlook.host_images_per_s / outlook.device
        yield (
            f"the GPUs are the bound, as it should be: the host could feed {feeds:.1f} times what they train "
            f"({outlook.host_images_per_s:,.0f} against {outlook.device:,.0f} images/s). Faster: more GPUs"
        )
    if machine.cuda and outlook.bound in ("step", "augmentation") and node.gpu_images_per_s is None:
        if config.run.amp == "off":
            yield f"amp = off: a step at {rates.step:,.0f} images/s is in float32; measure --amp bf16"
        if not config.run.channels_last:
            yield f"channels_last = false: a step at {rates.step:,.0f} images/s; measure --channels_last true"
        used, whole = machine.step_memory_gb, machine.device_memory_gb
        if used is not None and whole is not None and used < 0.4 * whole and config.data.update_freq % 2 == 0:
            yield (
                f"a step uses {used:.0f} of {whole:.0f} GB of device memory: --batch_size "
                f"{2 * config.data.batch_size} --update_freq {config.data.update_freq // 2} is the same global "
                "batch; measure whether it is faster (BatchNorm and Mixup then see other micro-batches)"
            )
    if machine.cuda and rates.augmentation < 4 * rates.step:
        share = rates.step / (rates.step + rates.augmentation)
        yield f"augmentation takes {100 * share:.0f} % of the device's time ({rates.augmentation:,.0f} images/s alone)"


def _about_settings(config: Config, node: Node) -> Iterator[str]:
    data, recipe = config.data, config.schedule.recipe_batch
    processes = max(1, node.gpus)
    global_batch = data.batch_size * data.update_freq * processes
    if global_batch == recipe:
        return
    each = data.batch_size * processes
    how = (
        f"--update_freq {recipe // each}"
        if recipe % each == 0
        else f"another batch_size, or scale lr (linearly: {config.schedule.lr * global_batch / recipe:.3g}) and set "
        f"recipe_batch to {global_batch}"
    )
    yield (
        f"the global batch would be {data.batch_size} x {data.update_freq} x {processes} = {global_batch:,}, but "
        f"lr = {config.schedule.lr:g} is meant for {recipe:,}: {how}"
    )


def _about_measurement(rates: Rates, machine: Machine, config: Config) -> Iterator[str]:
    predicted = predict_whole(rates, machine, config)
    if rates.whole < 0.75 * predicted and not machine.busy:
        yield (
            f"all together reached {in_figures(rates.whole)} images/s where its parts promise {in_figures(predicted)}: "
            "something here slows them down when they work at once; expect that share of the figures above"
        )
