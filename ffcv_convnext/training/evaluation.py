"""Evaluation apart from training: a run's weights or others, at one or several sizes, on all or some of the classes."""

from __future__ import annotations

import csv
import io
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffcv_convnext.config import Config
from ffcv_convnext.files import write_atomically
from ffcv_convnext.formatting import markdown_table
from ffcv_convnext.models import load_pretrained, read_weights_file
from ffcv_convnext.training.affinity import bind_threads
from ffcv_convnext.training.checkpoint import Checkpoints
from ffcv_convnext.training.distributed import COPYING, TIMEOUT, Processes
from ffcv_convnext.training.engine import evaluate_network
from ffcv_convnext.training.kernel_choice import choose_kernels
from ffcv_convnext.training.lost_ranks import ending
from ffcv_convnext.training.metrics import Evaluation
from ffcv_convnext.training.preflight import check_sizes, count_classes, tested_classes
from ffcv_convnext.training.run import (
    announce_timm_images,
    build_network,
    build_val_loader,
    check_same_network,
    staged_data,
    start_processes,
)
from ffcv_convnext.training.runlog import setup_logging

log = logging.getLogger(__name__)

NUM_CONFUSIONS = 3  # of a class, in eval_csv
CSV_HEADER = ["test_size", "weights", "tta", "class", "images", "acc1"]
CSV_HEADER += [f"{name}_{i + 1}" for i in range(NUM_CONFUSIONS) for name in ("confused_with", "images")]


def evaluate_only(config: Config) -> dict[int, dict[str, float]]:
    """Evaluate the raw and averaged weights of a checkpoint, as far as it has them; return the scores of each size.

    The checkpoint is --finetune or --resume, or else the newest one in output_dir. A file that is not a run's (a
    published state dict) is read as by `load_pretrained`. Keys of the scores: test_acc1, test_acc5, test_loss, the same
    with _ema (averaged weights), _flip (tta) and _ema_flip, and images.   Writes eval_csv; prints a table with
    test_sizes.
    """
    classes = tested_classes(config)
    check_sizes(config)
    _check_writable(config.run.eval_csv)
    processes = start_processes(config)
    setup_logging(None, processes)
    announce_timm_images(config)
    if classes.columns is not None:
        num, others = len(classes.names), classes.num_trained - len(classes.names)
        left_out = f"; the logits of the other {others} are left out" if others else ""
        other = config.run.eval_data_path
        log.info(f"eval_data_path = {other}: {num} of the {classes.num_trained} trained classes{left_out}")
    path, content = _weights_to_evaluate(config)
    results: dict[int, dict[str, float]] = {}
    rows: list[list[Any]] = []
    evaluated = replace(config, data=replace(config.data, data_path=config.run.eval_data_path or config.data.data_path))
    with ending(processes, folder=None), staged_data(evaluated, processes, splits=("val",)) as (data, copy):
        processes.join(patience=COPYING if copy is not None else TIMEOUT)  # another node may still copy
        if config.run.affinity == "auto":
            bind_threads(processes)  # before the loaders start threads
        num_classes = count_classes(config.model, classes.num_trained)
        networks = list(_networks(config, path, content, num_classes, processes))
        for size in config.run.test_sizes or (config.data.test_size,):
            at_size = config.replace(test_input_size=size, data_path=data.data_path)
            scores: dict[str, float] = {}
            with closing(build_val_loader(at_size, processes)) as loader:
                for suffix, network in networks:
                    for tta, found in evaluate_network(network, loader, at_size, processes, classes).items():
                        scores |= found.scores(suffix + tta)
                        key = [size, suffix[1:] or "raw", tta[1:] or "none"]
                        rows += [[*key, *row] for row in class_rows(found, classes.names)]
                results[size] = {**scores, "images": loader.num_samples}
    if processes.is_main:
        _report(config, path, results, rows)
    return results


def _check_writable(path: Path | None) -> None:
    """Raise ValueError if the file of eval_csv cannot be created."""
    if path is not None and (path.is_dir() or not os.access(path.resolve().parent, os.W_OK)):
        raise ValueError(f"eval_csv = {path}: expected a file in a folder that exists and can be written")


def _networks(
    config: Config, path: Path, content: dict[str, Any] | None, num_classes: int, processes: Processes
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the suffix of the scores ('' or '_ema') and the network with these weights.

    Raises ValueError if they are for another number of classes.
    """
    for part, suffix in (("model", ""), ("ema", "_ema")):
        weights = None if content is None else content.get(part)
        if weights is None and (content is not None or part == "ema"):
            continue
        triton = choose_kernels(config, processes.device).network
        network = build_network(config, num_classes, processes.device, triton=triton)
        if weights is None:
            names = {"model_key": config.run.model_key, "model_prefix": config.run.model_prefix}
            load_pretrained(network, path, **names, needs_head=True)
        else:
            try:
                network.load_state_dict(weights)
            except RuntimeError:  # the rest of the network is the same (check_same_network)
                raise ValueError(
                    f"{path} was trained on another number of classes than {num_classes}, which data_path = "
                    f"{config.data.data_path} has; give the training data with --data_path, and other images with "
                    "--eval_data_path"
                ) from None
        yield suffix, network


def class_rows(found: Evaluation, classes: Sequence[str]) -> Iterator[list[Any]]:
    """Yield, for each class: name, images, top-1 accuracy (percent, '' without images), most frequent confusions.

    A confusion is two columns, the other class and how many images were taken for it, most frequent first, then in
    the order of the classes; NUM_CONFUSIONS of them, '' where there are fewer. Nothing without predictions.
    """
    if not len(found.labels):
        return
    images_of = torch.bincount(found.labels, minlength=len(classes)).tolist()
    groups = torch.split(found.predictions[found.labels.argsort()], images_of)  # by label
    for label, (name, images, group) in enumerate(zip(classes, images_of, groups, strict=True)):
        taken_for, counts = torch.unique(group, return_counts=True)
        order = counts.argsort(descending=True, stable=True)
        pairs = list(zip(taken_for[order].tolist(), counts[order].tolist(), strict=True))
        correct = dict(pairs).get(label, 0)
        wrong = [pair for pair in pairs if pair[0] != label][:NUM_CONFUSIONS]
        cells: list[Any] = [cell for other, count in wrong for cell in (classes[other], count)]
        padding = [""] * (2 * NUM_CONFUSIONS - len(cells))
        yield [name, images, round(100 * correct / images, 4) if images else "", *cells, *padding]


def _report(config: Config, path: Path, results: dict[int, dict[str, float]], rows: Iterable[list[Any]]) -> None:
    """Write eval_csv; print the scores: a table of the sizes, or a line of the log."""
    if config.run.eval_csv is not None:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([CSV_HEADER, *rows])
        write_atomically(config.run.eval_csv, text.getvalue().encode())
        log.info("wrote %s", config.run.eval_csv)
    if config.run.test_sizes is None:
        (scores,) = results.values()
        log.info("%s: %s", path, ", ".join(f"{key} {value:.4f}" for key, value in scores.items()))
        return
    log.info("%s at %s pixels:", path, ", ".join(map(str, results)))
    keys = list(next(iter(results.values())))
    cells = [
        [str(size), *(f"{value:.4f}" if isinstance(value, float) else str(value) for value in scores.values())]
        for size, scores in results.items()
    ]
    sys.stdout.write(markdown_table(["test_size", *keys], cells, ">" * (1 + len(keys))) + "\n")
    sys.stdout.flush()


def _weights_to_evaluate(config: Config) -> tuple[Path, dict[str, Any] | None]:
    """Return a checkpoint's path and content; the content is None for `load_pretrained` to read."""
    run = config.run
    if run.finetune is not None:
        if run.resume is not None:
            raise ValueError("eval = true: --resume and --finetune both name weights; give one of them")
        return run.finetune, None
    found = None
    if run.resume is not None:
        content = read_weights_file(run.resume)
        if "config" not in content:
            return run.resume, None
        found = run.resume, content
    elif run.output_dir is not None:
        found = Checkpoints(run.output_dir).newest()
    if found is None:
        raise ValueError(
            "eval = true: there is no checkpoint; give one with --resume, a run folder with --output_dir, or other "
            "weights with --finetune"
        )
    check_same_network(*found, config)
    return found
