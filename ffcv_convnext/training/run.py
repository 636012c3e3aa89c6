"""Build the parts of a run from its config, then train or evaluate.

Paths, data, batch sizes and combinations of settings are checked before the network is built.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from ffcv_convnext.augment import Normalisation, TrainAugment
from ffcv_convnext.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Config,
    DataConfig,
    differences,
    format_value,
    timm_images,
)
from ffcv_convnext.files import complaint, remove_leftovers
from ffcv_convnext.models import build_model, load_pretrained, use_triton
from ffcv_convnext.rng import Stream, step_seed
from ffcv_convnext.run_folder import FolderLock, check_same_config, read_facts, read_scores
from ffcv_convnext.training.affinity import bind_threads
from ffcv_convnext.training.checkpoint import STATE, Checkpoints, read_checkpoint
from ffcv_convnext.training.compile_cache import keep_compiled, places
from ffcv_convnext.training.cuda_graphs import GraphedPasses, uses_cuda_graphs
from ffcv_convnext.training.distributed import COPYING, TIMEOUT, Processes, data_parallel
from ffcv_convnext.training.engine import (
    Learner,
    Run,
    State,
    backward,
    compile_sizes,
    fit,
    input_dtype,
    memory_format,
)
from ffcv_convnext.training.kernel_choice import KernelChoice, check_device, choose_kernels
from ffcv_convnext.training.losses import build_criterion
from ffcv_convnext.training.lost_ranks import ending
from ffcv_convnext.training.metrics import LossTracker
from ffcv_convnext.training.optim import build_optimizer
from ffcv_convnext.training.preflight import check_model_ema_bn, check_same_classes, check_sizes, count_classes
from ffcv_convnext.training.runlog import RunLog, setup_logging
from ffcv_convnext.training.schedule import build_schedules

if TYPE_CHECKING:  # needs ffcv, which is imported when a run is built
    from ffcv_convnext.data.beton import Split
    from ffcv_convnext.data.load import EvalLoader, Staged, TrainLoader

log = logging.getLogger(__name__)


def train(config: Config) -> dict[str, Any]:
    """Train or continue a run; return the final scores.

    With torchrun every process calls this. Raises ValueError or FileNotFoundError before work begins, Failure if
    the run cannot continue, Interrupted if a signal stopped it after saving.
    """
    folder = config.run.output_dir
    if folder is None:
        raise ValueError("output_dir is not set; give a run folder: --output_dir runs/NAME")
    processes = start_processes(config)
    config = config.for_world(processes.world)
    uses_cuda_graphs(config, processes)  # refuses what is impossible
    lock = FolderLock(folder) if processes.is_main else None
    with ExitStack() as resources, ending(processes, folder):  # resources are closed after the end is logged
        if lock is not None:
            resources.callback(lock.release)
            remove_leftovers(folder)
        setup_logging(folder, processes)
        check_same_config(folder, config)
        finished = read_scores(folder)
        if finished is not None and config.run.auto_resume:
            log.info("%s is finished: %s. Nothing to do; choose another output_dir to train again", folder, finished)
            return finished
        data, copy = resources.enter_context(staged_data(config, processes))
        processes.join(patience=COPYING if copy is not None else TIMEOUT)  # another node may still copy
        cores = bind_threads(processes) if config.run.affinity == "auto" else None  # before the loaders start threads
        train_loader, val_loader = resources.enter_context(_loaders(config, data, processes))
        start = {"affinity": cores, "staged": copy and copy.facts()}
        run = build_run(config, processes, train_loader, val_loader, start=start)
        resources.callback(run.log.close)
        resources.callback(run.checkpoints.close)  # before the folder's lock is released
        _resume(run)
        train_loader.prepare()
        val_loader.prepare()
        if compiles(config, processes.device) and len(config.train_sizes()) > 1:
            compile_sizes(run.learner)
        scores: dict[str, Any] = {"epochs": config.schedule.epochs, **fit(run)}
        run.log.done(scores)
        log.info("finished: %s", ", ".join(f"{key} {value:.4g}" for key, value in scores.items()))
        return scores


def start_processes(config: Config) -> Processes:
    """Return this process and its device. Raises ValueError if the device cannot do what the config asks for."""
    processes = Processes.from_environment(config.run.device)
    if config.run.amp == "fp16" and processes.device.type == "cpu":
        raise ValueError("amp = fp16 needs a CUDA device; use --amp bf16 or --amp off on a CPU")
    check_device(config, processes.device)
    return processes


@contextmanager
def staged_data(
    config: Config, processes: Processes, *, splits: Sequence[Split] = ("train", "val")
) -> Iterator[tuple[DataConfig, Staged | None]]:
    """Yield the data's config, with the folder of a copy on this node if stage_to is set; see `stage_data`."""
    if config.data.stage_to is None:
        yield config.data, None
        return
    from ffcv_convnext.data.load import stage_data

    with stage_data(config.data, splits, local_rank=processes.local_rank) as found:
        yield found


@contextmanager
def _loaders(config: Config, data: DataConfig, processes: Processes) -> Iterator[tuple[TrainLoader, EvalLoader]]:
    from ffcv_convnext.data.load import TrainLoader

    train_loader = TrainLoader(
        data,
        processes.device,
        seed=config.run.seed,
        rank=processes.rank,
        world=processes.world,
        local_rank=processes.local_rank,
        num_local=processes.num_local,
    )
    with closing(train_loader), closing(build_val_loader(replace(config, data=data), processes)) as val_loader:
        check_same_classes(train_loader.manifest, val_loader.manifest, config.data.data_path)
        yield train_loader, val_loader


def build_val_loader(config: Config, processes: Processes) -> EvalLoader:
    """Open val.beton in data_path; with dist_eval each process gets its share."""
    from ffcv_convnext.data.load import EvalLoader

    return EvalLoader(
        config.data,
        processes.device,
        rank=processes.rank if config.run.dist_eval else 0,
        world=processes.world if config.run.dist_eval else 1,
        local_rank=processes.local_rank,
        num_local=processes.num_local,
    )


def build_learner(
    config: Config,
    processes: Processes,
    *,
    num_classes: int,
    steps_per_epoch: int,
    kernels: KernelChoice | None = None,
) -> Learner:
    """Return a newly initialised learner. With torchrun the processes have joined.

    num_classes: of the network's head.   kernels: None: as `choose_kernels` says.
    Raises ValueError for settings that contradict each other.
    """
    device, seed = processes.device, config.run.seed
    kernels = kernels or choose_kernels(config, device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # batches have one size: cuDNN searches the fastest convolutions once
    schedules = build_schedules(config, steps_per_epoch)
    torch.manual_seed(step_seed(seed, 0, 0, Stream.INITIALISATION))
    network = build_network(config, num_classes, device, triton=kernels.network)
    check_model_ema_bn(config, network)
    ema = ModelEmaV3(network, decay=config.run.model_ema_decay) if config.run.model_ema else None
    compile = compiles(config, device)
    if compile:  # a graph for each image size, of the network and of the augmentation
        keep_compiled()
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 2 * len(config.train_sizes()) + 4)
    model = compiled(network, config) if compile else network
    if processes.world > 1:  # around the compiled network: compiled inside, DDP's own forward, which differs in
        # micro-batches that do not reduce, stays out of the graph, and DDP splits the graph at its buckets
        model = data_parallel(model, device)
    learner = Learner(
        config=config,
        processes=processes,
        network=network,
        model=model,
        ema=ema,
        optimizer=build_optimizer(network, config.optim, peak_lr=config.schedule.lr, triton=kernels.optimizer, ema=ema),
        scaler=torch.amp.GradScaler(device.type, enabled=config.run.amp == "fp16"),
        schedules=schedules,
        augment=TrainAugment(
            config.augment,
            num_classes=num_classes,
            seed=seed,
            device=device,
            normalisation=Normalisation.of(config.data),
            interpolation=config.data.train_interpolation,
            compile=compile,  # another graph than the network's
            dtype=input_dtype(config),
            kernels=kernels.augment,
        ),
        criterion=build_criterion(config.optim),
        tracker=LossTracker(processes),
        state=State(),
    )
    if uses_cuda_graphs(config, processes):
        learner.graphs = GraphedPasses(network, partial(backward, learner))
    return learner


def compiles(config: Config, device: torch.device) -> bool:
    """Return whether the network is compiled for training.

    Raises ValueError if there is no compiler for it: torch compiles C++ for a CPU, and C around a GPU's kernels.
    """
    choice = config.run.compile
    if choice == "false" or (choice == "auto" and device.type != "cuda"):
        return False
    variable, names = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    if variable not in os.environ and not any(map(shutil.which, names)):
        raise ValueError(
            f"compile = {choice}: torch.compile needs {' or '.join(names)}, or another compiler named in {variable}; "
            "install one, or use --compile false"
        )
    return True


def compiled(network: nn.Module, config: Config) -> nn.Module:
    """Return `network` behind torch.compile, for batches of one size; parameters, buffers and names stay the same.

    `resnet` must be one graph. A timm network may break into several, which is slower but no error.
    """
    whole = config.model.model == "resnet"
    model: nn.Module = torch.compile(network, fullgraph=whole, dynamic=False)  # type: ignore[assignment]
    return model


def build_run(
    config: Config, processes: Processes, train_loader: TrainLoader, val_loader: EvalLoader, *, start: Mapping[str, Any]
) -> Run:
    """Return all parts of a run at its start; nothing is restored yet. start: facts of this start, for run.json."""
    assert config.run.output_dir is not None
    num_classes = count_classes(config.model, train_loader.num_classes)
    kernels = choose_kernels(config, processes.device)
    num_steps = train_loader.steps_per_epoch
    learner = build_learner(config, processes, num_classes=num_classes, steps_per_epoch=num_steps, kernels=kernels)
    parameters = sum(p.numel() for p in learner.network.parameters())
    facts = {
        "n_parameters": parameters,
        "num_classes": num_classes,
        "global_batch": learner.config.data.batch_size * learner.config.data.update_freq * processes.world,
        "steps_per_epoch": num_steps,
        "data": {"train": train_loader.manifest.sha256, "val": val_loader.manifest.sha256},
        "images": {"train": train_loader.num_samples, "val": val_loader.num_samples},
    }
    data = learner.config.data
    micro_batches = {str(size): data.batch_size * data.num_joined(size) for size in learner.config.train_sizes()}
    start = {**start, "kernels": kernels.facts(), "micro_batches": micro_batches}  # pixels -> images
    run = Run(
        learner=learner,
        train_loader=train_loader,
        val_loader=val_loader,
        checkpoints=Checkpoints(config.run.output_dir),
        log=RunLog(config.run.output_dir, config, processes, facts, start),
    )
    _announce(run, parameters)
    log.info(f"kernels: {kernels.words}: {kernels.reason}")
    return run


def build_network(config: Config, num_classes: int, device: torch.device, *, triton: bool) -> nn.Module:
    """Build the network on the device. From here on torch multiplies float32 matrices as the settings say.

    triton: with Triton kernels in its blocks.   Raises ValueError if it does not accept the sizes of the images.
    """
    check_sizes(config)
    torch.set_float32_matmul_precision(config.run.matmul_precision)
    network = build_model(config.model, num_classes)
    if triton:
        use_triton(network)
    return network.to(device, memory_format=memory_format(config))  # type: ignore[call-overload, no-any-return]


def _announce(run: Run, parameters: int) -> None:
    config, device, shares, loader = run.learner.config, run.learner.processes.device, run.sampler, run.train_loader
    schedule = config.schedule
    announce_timm_images(config)
    log.info(
        f"{config.model.model}, {parameters / 1e6:.2f} M parameters, {loader.num_classes} classes; "
        f"{loader.num_samples} training and {run.val_loader.num_samples} validation images"
    )
    log.info(
        f"global batch {shares.global_batch} = batch_size {shares.batch_size} x update_freq {shares.update_freq} x "
        f"{shares.world} processes on {device}; peak lr {schedule.lr:g}; {schedule.epochs} epochs of "
        f"{loader.steps_per_epoch} steps"
    )
    if config.data.res_batch:
        log.info(_describe_res_batch(config))
    if config.optim.loss == "bce" and config.augment.smoothing > 0:
        log.info(
            f"loss = bce with smoothing = {config.augment.smoothing:g}: before bce_target_thresh, each class has the "
            "target smoothing / classes, and an image's own class 1 - smoothing more"
        )
    if compiles(config, device):
        log.info("compiled code is kept in %s", ", ".join(f"{name} = {place}" for name, place in places().items()))
        log.info(
            "the network and the augmentation are compiled in the first step, which may take minutes"
            if len(sizes := config.train_sizes()) == 1
            else f"the network and the augmentation are compiled before the first step, once for each of {len(sizes)} "
            f"image sizes ({', '.join(map(str, sizes))} pixels), which may take minutes each"
        )
    if shares.global_batch != schedule.recipe_batch:
        log.warning(
            f"the global batch is {shares.global_batch}, but lr = {schedule.lr:g} is meant for {schedule.recipe_batch} "
            f"(recipe_batch): set update_freq so that the product is {schedule.recipe_batch}, or scale lr (linearly: "
            f"{schedule.lr * shares.global_batch / schedule.recipe_batch:.3g}) and set recipe_batch to "
            f"{shares.global_batch}"
        )


def _describe_res_batch(config: Config) -> str:
    """Return one line: the micro-batch of each size, or why they are all the same and what changes that."""
    data = config.data
    num_joined = {size: data.num_joined(size) for size in config.train_sizes()}
    if max(num_joined.values()) > 1:
        sizes = ", ".join(f"{num * data.batch_size} images of {size} pixels" for size, num in num_joined.items())
        return f"res_batch: micro-batches of {sizes}"
    smallest, largest = min(num_joined), data.max_train_size
    fit = largest**2 // smallest**2  # as many micro-batches have at most the pixels of one at max_res
    if fit < 2:
        return (
            f"res_batch has no effect: 2 micro-batches of {smallest} pixels have more pixels than one of max_res = "
            f"{largest}; lower min_res to at most {int(largest / 2**0.5)}, or raise max_res"
        )
    return (
        f"res_batch has no effect: update_freq = {data.update_freq} has no divisor from 2 to {fit}, so no "
        "micro-batches can be joined; for the same global batch, use a smaller batch_size and a larger update_freq "
        "(half and double)"
    )


def announce_timm_images(config: Config) -> None:
    """With a timm model, log which settings of the images are the model's own in timm, and which are not."""
    model = config.model.model
    if model == "resnet":
        return
    own = timm_images(model)
    used = {name: getattr(config.data, name) for name in own}
    words = {name: f"{name} {format_value(value)}" for name, value in used.items()}
    same = [words[name] for name in own if used[name] == own[name]]
    changed = [f"{words[name]} (timm: {format_value(own[name])})" for name in own if used[name] != own[name]]
    log.info(
        f"{model}: images as in timm's configuration of the model: {', '.join(same) or 'nothing'}"
        + (f"; set otherwise: {', '.join(changed)}" if changed else "")
    )


def _resume(run: Run) -> None:
    """Continue from the newest checkpoint of the run folder, else from --resume, else start from the beginning."""
    learner, folder = run.learner, run.checkpoints.folder
    config, processes = learner.config.run, learner.processes
    found: tuple[Path, dict[str, Any]] | None = None

    def choose() -> Path | None:
        nonlocal found
        found = _checkpoint_to_continue(run)
        return None if found is None else found[0]

    path = processes.from_main(choose)  # rank 0 alone compares files, so that all processes agree
    content: dict[str, Any] = {}
    if path is not None:
        content = found[1] if found is not None else read_checkpoint(path, map_location=processes.device)
        run.restore(content)
        log.info("continuing from %s: epoch %d, optimiser step %d", path, learner.state.epoch, learner.state.step)
        _announce_world(run, Config.recorded(content["config"]).data.update_freq)
    elif config.finetune is not None:
        load_pretrained(learner.network, config.finetune, model_key=config.model_key, model_prefix=config.model_prefix)
        if learner.ema is not None:
            learner.ema.module.load_state_dict(learner.network.state_dict())
    if not config.auto_resume and learner.processes.is_main:
        run.checkpoints.clear()  # a kill before the first save must not bring the old run back
    own = config.auto_resume and path is not None and path.parent.resolve() == folder.resolve()
    if not own:
        learner.state.best.clear()  # this folder has no best checkpoint yet
    run.log.resume_at(
        learner.state.step,
        learner.state.epoch,
        run_id=content.get("run") if own else None,
        continued=own,
        interval=learner.tracker.interval.num_steps,
    )


def _checkpoint_to_continue(run: Run) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint from which the run continues, and its content; None if it starts from the beginning.

    Raises ValueError if it is not a run's state, or that of another run which `resume` does not name.
    """
    config, device = run.learner.config.run, run.learner.processes.device
    found = run.checkpoints.newest(map_location=device) if config.auto_resume else None
    named = config.resume is not None and (found is None or found[0].resolve() == config.resume.resolve())
    if found is None and config.resume is not None:
        found = config.resume, read_checkpoint(config.resume, map_location=device)
    if found is None:
        return None
    path, content = found
    if "model" in content and "optimizer" not in content:
        raise ValueError(
            f"{path} has weights only, not a run's state; start from them with --finetune, or evaluate them with "
            "--eval true"
        )
    if problem := complaint(content, STATE):
        raise ValueError(f"{path} is not the state of a run: {problem}; remove it, or continue from another one")
    if named:
        _check_resumable(path, content, run.learner.config)
    else:
        _check_own(path, content, run)
    return found


def _check_own(path: Path, content: dict[str, Any], run: Run) -> None:
    """Raise ValueError if the folder's checkpoint belongs to another run: other settings, or another run id.

    Without an id on one side (an older version's file, a lost run.json) the settings alone decide.
    """
    foreign = differences(run.learner.config, Config.recorded(content["config"]))
    theirs, ours = content.get("run"), read_facts(run.checkpoints.folder).get("run_id")
    if theirs is None:
        log.info("%s has no run id, because an older version wrote it; its settings are this run's", path)
    elif ours is None:
        log.warning("run.json does not name its run: the id %s is taken from %s; the settings agree", theirs, path)
    elif theirs != ours and not foreign:
        foreign.append(f"run id: {ours} != {theirs}")
    if foreign:
        raise ValueError(
            f"{path} belongs to another run ({'; '.join(foreign[:5])}); to continue from it on purpose, add --resume "
            f"{path}; else remove it, or choose another output_dir"
        )


def _announce_world(run: Run, update_freq: int) -> None:
    """Log a change of the number of processes. update_freq: before the change."""
    shares, data = run.sampler, run.learner.config.data
    if update_freq != shares.update_freq:
        before = shares.global_batch // (shares.batch_size * update_freq)
        log.info(
            f"the checkpoint was made on {before} processes with update_freq {update_freq}; the run continues on "
            f"{shares.world} with {shares.update_freq}: the same global batch of {shares.global_batch}, divided into "
            "the same micro-batches" + (", which res_batch joins otherwise than before" if data.res_batch else "")
        )


def _check_resumable(path: Path, content: dict[str, Any], config: Config) -> None:
    """Raise ValueError if the state of another run cannot be used, and warn about other differences."""
    check_same_network(path, content, config)
    theirs = Config.recorded(content["config"])
    for name, ours, other in (
        ("opt", config.optim.opt, theirs.optim.opt),
        ("layer_decay", config.optim.layer_decay, theirs.optim.layer_decay),
        ("model_ema", config.run.model_ema, theirs.run.model_ema),
        ("amp", config.run.amp, theirs.run.amp),
    ):
        if ours != other:
            raise ValueError(
                f"{name} = {format_value(ours)}, but {path} was made with {format_value(other)}: a resumed run must "
                "keep it; to start from the weights only, use --finetune"
            )
    if changed := differences(config, theirs):
        log.warning("%s was made with other settings, which change from now on: %s", path, "; ".join(changed))


def check_same_network(path: Path, content: dict[str, Any], config: Config) -> None:
    """Raise ValueError if a checkpoint is not a run's, or has another network than the config."""
    if "config" not in content or ("model" not in content and "ema" not in content):
        raise ValueError(
            f"{path} is not a checkpoint of ffcv-convnext: expected 'config' and 'model' or 'ema', found "
            f"{', '.join(map(str, content))[:200]}"
        )
    theirs = Config.recorded(content["config"]).model
    if theirs.architecture != config.model.architecture:
        raise ValueError(
            f"{path} has another network than these settings; use its own: --config {path.parent / 'config.yaml'}"
        )
    data = config.data
    if "mean" not in content["config"] and (data.mean, data.std) != (IMAGENET_MEAN, IMAGENET_STD):
        raise ValueError(
            f"{path} was made by an older version with ImageNet's mean and std; evaluate it with "
            f"--mean {format_value(IMAGENET_MEAN)} --std {format_value(IMAGENET_STD)}"
        )
