"""The page that `doctor` prints."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from ffcv_convnext.config import Config
from ffcv_convnext.doctor.diagnosis import Diagnosis
from ffcv_convnext.doctor.predict import format_rate
from ffcv_convnext.formatting import format_bytes, format_count, markdown_table

Cells = tuple[str, str, str, str, str]


def format_page(found: Diagnosis) -> str:
    """Return the page: machine, file and run; a table of the stages; the prediction; advice."""
    sections = [_heading(found), [_table(found)], _expected(found), _advice(found)]
    return "\n\n".join("\n".join(lines) for lines in sections)


def _node(found: Diagnosis) -> str:
    cores = format_count(found.node.cores, "core")
    return f"{format_count(found.node.gpus, 'GPU')} and {cores}" if found.node.gpus else cores


def _heading(found: Diagnosis) -> list[str]:
    machine, file, config, prediction = found.machine, found.file, found.config, found.prediction
    names = " ".join(found.config_names) or "the default settings"
    source = file.path or (
        f"{file.num_samples} synthetic images (no --data_path BETON_DIR), in place of ImageNet's "
        f"{file.num_samples_of_run:,}"
    )
    crop = "no restart markers: a whole image is decoded for each crop"
    if file.crop_alone:
        crop = f"restart markers in {100 * file.crop_alone:.0f} % of them, of which only the crop is decoded"
    memory = "" if machine.device_memory_gb is None else f", {machine.device_memory_gb:.0f} GB"
    rows = [
        (
            "machine",
            f"{machine.processor}: {format_count(machine.cores, 'core')}, {machine.memory_room_gb:.1f} GB of memory "
            f"available; {machine.device}{memory}; torch {machine.torch}",
        ),
        (
            "file",
            f"{format_count(file.num_samples, 'image')}, {file.image_bytes / 1e3:.1f} kB each, "
            f"{format_bytes(1e9 * file.gigabytes)} in total; {crop}",
        ),
        (
            "run",
            f"{config.model.model}, {found.num_parameters / 1e6:.2f} M parameters; {_sizes(config)} pixels, "
            f"batch_size {config.data.batch_size}, amp {config.run.amp}, {config.data.train_interpolation}; "
            f"{format_count(config.schedule.epochs, 'epoch')}",
        ),
    ]
    if machine.busy:
        text = (
            f"{machine.load:.1f} processes were running on {format_count(machine.cores, 'core')} at the start: the "
            "rates are too low and not consistent; measure again when the machine is idle"
        )
        rows.append(("warning", text))
    verdict = (
        f"{_node(found)} train {format_rate(prediction.images_per_s)} images/s; the bottleneck is {prediction.bound}"
        if prediction.images_per_s is not None
        else f"the host of {_node(found)} feeds {format_rate(prediction.host_images_per_s)} images/s, limited by "
        f"{prediction.bound}; the rate of its GPUs is not known"
    )
    return [
        f"{names} on {source}",
        verdict,
        "",
        *(line for name, text in rows for line in _wrap(f"  {name:9}", text)),
    ]


def _table(found: Diagnosis) -> str:
    rows = [*_storage_rows(found), *_place_rows(found), _decode_row(found), *_device_rows(found), _whole_row(found)]
    return markdown_table(("stage", "images/s here", "measured", _node(found), ""), rows, "<><><")


def _storage_rows(found: Diagnosis) -> Iterator[Cells]:
    if found.storage is None or found.storage_in_order is None:
        yield "storage", "-", "not measured: give --data_path", "not known", ""
        return
    rates, remark = found.rates, _mark(found, "storage")
    if not remark and found.prediction.fits_in_memory:
        remark = "first epoch only: it fits in memory"
    readers = format_count(found.num_readers, "reader")
    for name, measured, rate, how, scaled in (
        ("storage, in order", found.storage_in_order, rates.storage_in_order, "one reader", ""),
        ("storage, at random", found.storage, rates.storage, readers, format_rate(rates.storage)),
    ):
        if rate is None or measured.megabytes_per_s is None:
            text = "stays in memory: tmpfs, in use, or not your file"
            yield name, "-", text, "not known" if scaled else "", ""
        else:
            text = f"{measured.megabytes_per_s:,.0f} MB/s cold, {how}, {measured.megabytes:,.0f} MB read"
            yield name, format_rate(rate), text, scaled, remark if scaled else ""


def _place_rows(found: Diagnosis) -> Iterator[Cells]:
    place = found.place
    if place is None:
        return
    if place.problem is not None:
        yield "stage_to", "-", "no copy: see below", "", ""
        return
    yield "stage_to, write", format_rate(place.write), f"{place.write_megabytes_per_s:,.0f} MB/s, one writer", "", ""
    if place.at_random_megabytes_per_s is None:
        text = "in memory" if place.in_memory else "stays in memory: not measured"
    else:
        text = f"{place.at_random_megabytes_per_s:,.0f} MB/s cold, {format_count(found.num_readers, 'reader')}"
    yield "stage_to, at random", format_rate(place.at_random), text, "", ""


def _decode_row(found: Diagnosis) -> Cells:
    rates, cores = found.rates, found.machine.cores
    one = f"; 1 worker: {format_rate(rates.decode_one_worker)}" if cores > 1 else ""
    text = f"{format_rate(rates.decode / cores)} per core, {format_count(cores, 'core')}{one}"
    remark = _mark(found, "decode") or f"{found.prediction.decoding_cores} cores decode"
    return "decode", format_rate(rates.decode), text, format_rate(found.prediction.stages["decode"]), remark


def _device_rows(found: Diagnosis) -> Iterator[Cells]:
    stages, rates, node = found.prediction.stages, found.rates, found.node
    on_device = "on the GPU" if found.machine.cuda else "on the processor"
    if found.transfer_gigabytes_per_s is None:
        text, scaled = ("no CUDA device here", "not known") if node.gpus else ("not applicable: no CUDA device", "-")
        yield "transfer", "-", text, scaled, ""
    else:
        text = f"{found.transfer_gigabytes_per_s:.1f} GB/s, uint8 from pinned memory"
        yield "transfer", format_rate(rates.transfer), text, format_rate(stages["transfer"]), _mark(found, "transfer")
    given = node.gpu_images_per_s is not None
    scaled = format_rate(stages["augmentation"]) if stages["augmentation"] else "in the step" if given else "not known"
    yield "augmentation", format_rate(rates.augmentation), on_device, scaled, _mark(found, "augmentation")
    text = on_device
    if found.step.num_images != found.config.data.batch_size:
        text += f", only {format_count(found.step.num_images, 'image')} at a time, to save time"
    scaled = format_rate(stages["step"]) if stages["step"] else "not known"
    remarks = [_mark(found, "step"), f"{format_rate(node.gpu_images_per_s)} per GPU, as given" if given else ""]
    yield "step", format_rate(rates.step), text, scaled, "; ".join(filter(None, remarks))


def _whole_row(found: Diagnosis) -> Cells:
    predicted = found.predicted_whole
    how = "decode beside the GPU" if found.machine.cuda else "one after the other on the same cores"
    text = f"{format_rate(predicted)} predicted ({how}), ratio {found.rates.whole / predicted:.2f}"
    scaled = format_rate(found.prediction.images_per_s) if found.prediction.images_per_s else "not known"
    return "all together", format_rate(found.rates.whole), text, scaled, ""


def _mark(found: Diagnosis, stage: str) -> str:
    if found.prediction.bound != stage:
        return ""
    return "<- the bottleneck" if found.prediction.images_per_s else "<- limits the host"


def _expected(found: Diagnosis) -> list[str]:
    prediction, node, file = found.prediction, found.node, found.file
    host = prediction.host_images_per_s
    lines = []
    if prediction.images_per_s is None:
        lines += [
            f"{prediction.bound} feeds up to {format_rate(host)} images/s, {format_rate(host / node.gpus)} per GPU. A "
            "faster GPU waits; a slower GPU is the bottleneck itself.",
            "The rate of a GPU cannot be measured here: run doctor on the node, or give a known rate (images_per_s in "
            "the log of a run on one GPU) with --gpu_images_per_s.",
        ]
        if prediction.fits_in_memory and (found.rates.storage or host) < host:
            lines.append(f"In the first epoch storage feeds up to {format_rate(found.rates.storage)} images/s.")
    else:
        share = found.config.relative_pixels()
        per_gpu = f" ({format_rate(prediction.images_per_s / node.gpus)} per GPU)" if node.gpus else ""
        lines.append(
            f"{format_rate(prediction.images_per_s)} images/s{per_gpu}; the bottleneck is {prediction.bound}. "
            f"{format_count(found.config.schedule.epochs, 'epoch')} of {file.num_samples_of_run:,} images take "
            f"{'at most ' if share < 1 else ''}{_duration(prediction.hours or 0)} without evaluation"
            f"{f' (they have {100 * share:.0f} % of the pixels of the largest size)' if share < 1 else ''}."
        )
        first = prediction.first_epoch_images_per_s
        if first is not None and first < 0.99 * prediction.images_per_s:
            lines.append(f"In the first epoch {format_rate(first)} images/s, limited by storage.")
    if prediction.cores_per_gpu is not None:
        lines.append(f"Each GPU needs {prediction.cores_per_gpu:.1f} cores and has {node.cores / node.gpus:.1f}.")
    if node.gpus:
        assumed = ["cores as fast as these", "one core per GPU feeds it and does not decode"]
        assumed += ["gradient exchange between GPUs takes no time"] * (node.gpus > 1)
        assumed += ["storage and memory as here"] * (found.storage is not None)
        lines.append(f"Assumptions: {', '.join(assumed)}.")
    return [f"Prediction for {_node(found)}:", *(line for text in lines for line in _wrap("  ", text))]


def _sizes(config: Config) -> str:
    """Return the image sizes of a run; the stages are measured at the largest."""
    sizes = config.train_sizes()
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} (measured at {config.data.max_train_size})"


def _advice(found: Diagnosis) -> list[str]:
    lines = [line for i, text in enumerate(found.advice, 1) for line in _wrap(f"  {i}. ", text)]
    return ["What to change:", *(lines or ["  nothing"])]


def _wrap(start: str, text: str) -> list[str]:
    """Return lines of at most 120 characters; all but the first are indented to the start of the text."""
    lines = textwrap.wrap(text, 120 - len(start), break_long_words=False, break_on_hyphens=False)
    return [(start if i == 0 else " " * len(start)) + line for i, line in enumerate(lines)]


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 72 else f"{hours / 24:,.1f} days"
