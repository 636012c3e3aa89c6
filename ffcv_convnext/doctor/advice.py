"""Advice on what to change, from the rates and the prediction; each line quotes the figure it follows from."""

from __future__ import annotations

from collections.abc import Iterator

from ffcv_convnext.config import Config
from ffcv_convnext.doctor.predict import (
    File,
    Machine,
    Node,
    Place,
    Prediction,
    Rates,
    format_rate,
    predict_whole,
    serial_rate,
)


def advise(
    rates: Rates,
    machine: Machine,
    file: File,
    config: Config,
    node: Node,
    prediction: Prediction,
    place: Place | None = None,
) -> list[str]:
    """Return the advice, the most important first. place: of stage_to, if it was measured."""
    groups: dict[str, list[str]] = {
        "storage": [
            *_about_storage(rates, machine, file, config, prediction),
            *_about_place(rates, file, config, node, prediction, place),
        ],
        "decode": list(_about_decoding(rates, machine, file, config, node, prediction)),
        "device": list(_about_device(rates, machine, config, node, prediction)),
    }
    first = groups.pop(prediction.bound if prediction.bound in groups else "device")
    settings, measurement = _about_settings(config, node), _about_measurement(rates, machine, config)
    return [*file.remarks, *first, *(text for group in groups.values() for text in group), *settings, *measurement]


def _about_storage(rates: Rates, machine: Machine, file: File, config: Config, prediction: Prediction) -> Iterator[str]:
    if rates.storage is None or rates.storage_in_order is None:
        return
    wanted = prediction.host_images_per_s if prediction.images_per_s is None else prediction.images_per_s
    memory, size = f"{machine.memory_room_gb:.1f} GB of memory", f"{file.gigabytes:.1f} GB"
    if prediction.bound == "storage":
        yield (
            f"storage is the bottleneck: random reads give {rates.storage:,.0f} images/s, and the file ({size}) does "
            f"not fit in {memory}. Use a node with more memory or a faster disk, or write a smaller file "
            "(write_ffcv_dataset.py --max_resolution, --jpeg_quality)"
        )
        if config.data.order == "random" and rates.storage_in_order > rates.storage:
            yield (
                "--order quasi_random reads long stretches: sequential reads of this storage give "
                f"{rates.storage_in_order:,.0f} images/s, {rates.storage_in_order / rates.storage:.1f} times the rate "
                "of random reads"
            )
    elif prediction.fits_in_memory and rates.storage < wanted:
        random, needed, in_order = (
            file.num_samples_of_run / rate / 60 for rate in (rates.storage, wanted, rates.storage_in_order)
        )
        if random - needed - in_order >= 1:
            yield (
                f"the first epoch waits for storage: {random:,.0f} minutes with random reads ({rates.storage:,.0f} "
                f"images/s) instead of {needed:,.0f}. The file ({size}) fits in {memory}: read it sequentially first, "
                f"in {in_order:,.1f} minutes: --data_cache ram, or cat {file.path} > /dev/null"
            )


def _about_place(
    rates: Rates, file: File, config: Config, node: Node, prediction: Prediction, place: Place | None
) -> Iterator[str]:
    """Compare training from the copy of stage_to, with the time of the copy, with training from the original."""
    name = f"stage_to = {place.folder if place else config.data.stage_to}"
    if place is not None and (place.problem is not None or place.write is None):
        yield place.problem or f"{name} was not measured"
        return
    if rates.storage is None or rates.storage_in_order is None:
        if place is not None:
            yield f"{name}: no comparison, because the original stays in memory here and its reads were not measured"
        return
    wanted = _without_storage(prediction, node)
    slow_epochs = 1 if prediction.fits_in_memory else config.schedule.epochs
    num = slow_epochs * file.num_samples_of_run / 60  # images of these epochs, a minute's share
    write = rates.storage_in_order if place is None else place.write or 0.0
    copying = file.gigabytes * 1e9 / (min(rates.storage_in_order, write) * file.image_bytes) / 60
    here = num / min(rates.storage, wanted)
    there = copying + num / min((place and place.at_random) or wanted, wanted)
    if place is None:
        if here - there >= 1:
            yield (
                "--stage_to DIR copies the file once to a disk or into the memory of each node (auto chooses one); add "
                "it to this command to measure both places"
            )
        return
    reads = "are from memory" if place.in_memory else f"give {format_rate(place.at_random)} images/s"
    which = "the first epoch takes" if slow_epochs == 1 else f"{slow_epochs} epochs take"
    yield (
        f"{name}: the copy takes {copying:,.1f} minutes; random reads {reads} there, {format_rate(rates.storage)} in "
        f"data_path. With the copy {which} {there:,.1f} minutes, without it {here:,.1f}: "
        + ("use it" if here - there >= 1 else "it does not pay here")
    )


def _without_storage(prediction: Prediction, node: Node) -> float:
    """Return the images/s of the known stages after storage."""
    stages = [rate for name, rate in prediction.stages.items() if name != "storage" and rate is not None]
    if not node.gpus:
        return serial_rate(*stages)
    host = [prediction.stages["decode"], prediction.stages["transfer"], prediction.device]
    return min(rate for rate in host if rate is not None)


def _about_decoding(
    rates: Rates, machine: Machine, file: File, config: Config, node: Node, prediction: Prediction
) -> Iterator[str]:
    data, processes = config.data, max(1, node.gpus)
    per_core = rates.decode / machine.cores
    free = max(1, node.cores - node.gpus)
    threads, max_workers = processes * data.num_workers, free // processes
    bounds, gpus_known = prediction.bound == "decode", prediction.device is not None
    if bounds and file.crop_alone < 0.9:
        share = f"only {100 * file.crop_alone:.0f} %" if file.crop_alone else "none"
        yield (
            f"{share} of the stored images have restart markers; the others are decoded completely for each crop. "
            "Convert again with write_ffcv_dataset.py (about 1.3 times the images/s in docs/performance.md)"
        )
    if bounds and data.num_workers < max_workers:
        yield (
            f"num_workers = {data.num_workers}: {processes} x {data.num_workers} threads leave {free - threads} of "
            f"{free} cores idle; --num_workers {max_workers} decodes {per_core * max_workers * processes:,.0f} "
            f"images/s instead of {per_core * threads:,.0f}"
        )
    if bounds and gpus_known and prediction.cores_per_gpu is not None:
        yield (
            f"more cores: a GPU trains {(prediction.device or 0) / node.gpus:,.0f} images/s and a core decodes "
            f"{per_core:,.0f}, so each GPU needs {prediction.cores_per_gpu:.1f} cores (one of them feeds it) and has "
            f"{node.cores / node.gpus:.1f}"
        )
    if bounds and gpus_known and rates.decode_bilinear is not None and rates.decode_bilinear > 1.05 * rates.decode:
        yield (
            f"--train_interpolation bilinear decodes {rates.decode_bilinear:,.0f} images/s here, bicubic "
            f"{rates.decode:,.0f}; but the pixels differ from the paper's"
        )
    if bounds and gpus_known and file.longest_side > 2 * data.max_train_size:
        shorter = round(1.6 * data.max_train_size)
        yield (
            f"the longest side of the stored images is {file.longest_side:.0f} pixels on average, the input size is "
            f"{data.max_train_size}: --max_resolution {shorter} at conversion leaves "
            f"{(shorter / file.longest_side) ** 2:.2f} of the pixels to decode (the training images differ then)"
        )
    if threads >= 2 * free and data.num_workers > 1:
        yield (
            f"num_workers = {data.num_workers}: {threads} threads share {free} cores; --num_workers "
            f"{max(1, max_workers)} is as fast with less memory"
        )
    speedup = rates.decode / rates.decode_one_worker
    if machine.cores > 1 and speedup < 0.7 * machine.cores and not machine.busy:
        yield (
            f"{machine.cores} cores decode only {speedup:.1f} times as fast as one ({rates.decode:,.0f} and "
            f"{rates.decode_one_worker:,.0f} images/s): they are hyperthreads or limited by a quota. The prediction "
            "uses the lower rate per core"
        )


def _about_device(rates: Rates, machine: Machine, config: Config, node: Node, prediction: Prediction) -> Iterator[str]:
    on_device = prediction.bound in ("step", "augmentation")
    if not node.gpus and prediction.bound == "step":
        share = serial_rate(rates.decode, rates.augmentation, rates.step) / rates.step
        yield (
            f"on the processor the step ({format_rate(rates.step)} images/s) takes {100 * share:.0f} % of the time, "
            f"and the loader can feed {rates.decode / rates.step:,.0f} times as much: train on a GPU, or use a smaller "
            "network or --input_size"
        )
    if prediction.bound == "transfer":
        yield (
            f"the transfer is the bottleneck: {rates.transfer or 0:,.0f} images/s per GPU, as uint8 already. Check for "
            "a PCIe link with too few lanes (nvidia-smi -q -d PCI), or for GPUs that share one"
        )
    if node.gpus and prediction.device is not None and on_device:
        yield (
            f"the GPUs are the bottleneck, as intended: the host can feed "
            f"{prediction.host_images_per_s / prediction.device:.1f} times their rate "
            f"({prediction.host_images_per_s:,.0f} and {prediction.device:,.0f} images/s). Faster: more GPUs"
        )
    if machine.cuda and on_device and node.gpu_images_per_s is None:
        if config.run.amp == "off":
            yield f"amp = off: the step ({rates.step:,.0f} images/s) computes in float32; measure --amp bf16"
        if not config.run.channels_last:
            yield f"channels_last = false: the step runs at {rates.step:,.0f} images/s; measure --channels_last true"
        used, total = machine.step_memory_gb, machine.device_memory_gb
        if used is not None and total is not None and used < 0.4 * total and config.data.update_freq % 2 == 0:
            yield (
                f"a step uses {used:.0f} of {total:.0f} GB of device memory: --batch_size "
                f"{2 * config.data.batch_size} --update_freq {config.data.update_freq // 2} gives the same global "
                "batch; measure whether it is faster (the micro-batches of BatchNorm and Mixup are larger then)"
            )
    if machine.cuda and rates.augmentation < 4 * rates.step:
        share = rates.step / (rates.step + rates.augmentation)
        yield f"augmentation takes {100 * share:.0f} % of the device's time ({rates.augmentation:,.0f} images/s alone)"


def _about_settings(config: Config, node: Node) -> Iterator[str]:
    data, recipe = config.data, config.schedule.recipe_batch
    processes = max(1, node.gpus)
    per_update = data.batch_size * processes
    global_batch = per_update * data.update_freq
    if global_batch == recipe:
        return
    change = (
        f"--update_freq {recipe // per_update}"
        if recipe % per_update == 0
        else f"another batch_size, or scale lr (linearly: {config.schedule.lr * global_batch / recipe:.3g}) and set "
        f"recipe_batch to {global_batch}"
    )
    yield (
        f"the global batch is {data.batch_size} x {data.update_freq} x {processes} = {global_batch:,}, but "
        f"lr = {config.schedule.lr:g} is meant for {recipe:,}: use {change}"
    )


def _about_measurement(rates: Rates, machine: Machine, config: Config) -> Iterator[str]:
    predicted = predict_whole(rates, machine, config)
    if rates.whole < 0.75 * predicted and not machine.busy:
        yield (
            f"all stages together reached {format_rate(rates.whole)} images/s; {format_rate(predicted)} are predicted "
            "from the single stages. They slow each other down here: expect the same ratio for the figures above"
        )
